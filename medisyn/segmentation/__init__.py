"""Zero-shot segmentation: what a diffusion model knows of the parts of an image, without a mask.

medisyn segment chest.png --rule lungs --out outputs/lungs
"""

from .attention import AttentionMap, record_attention
from .diffseg import aggregate_attention, diffseg
from .rules import RULES
from .segmenter import METHODS, Segmenter, Settings
from .words import word_maps

__all__ = [
    "METHODS",
    "RULES",
    "AttentionMap",
    "Segmenter",
    "Settings",
    "aggregate_attention",
    "diffseg",
    "record_attention",
    "word_maps",
]
