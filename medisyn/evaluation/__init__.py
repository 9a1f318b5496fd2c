"""Measuring synthetic images: fidelity, label agreement, and the report that puts both beside real images.

medisyn evaluate outputs/run/pipeline --real photographs/ --extractor dinov2:facebook/dinov2-base
"""

from .agreement import label_agreement
from .features import EXTRACTORS, FeatureExtractor, extract_features, load_extractor
from .fidelity import fidelity, fidelity_by_value, frechet_distance, kernel_distance
from .report import evaluate, format_table

__all__ = [
    "EXTRACTORS",
    "FeatureExtractor",
    "evaluate",
    "extract_features",
    "fidelity",
    "fidelity_by_value",
    "format_table",
    "frechet_distance",
    "kernel_distance",
    "label_agreement",
    "load_extractor",
]
