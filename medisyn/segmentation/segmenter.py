"""Segments of real images by a trained diffusion model that has never seen a mask.

- "features": clusters of the UNet's decoder features (Baranchuk et al. 2022, arXiv 2112.03126; DIFT, Tang et al. 2023,
  arXiv 2306.03881). They are fitted on images that the model draws itself, so a mask depends neither on the other
  images of the command nor on any real image; for models whose attention is coarse, as that of the embedded default.
- "diffseg": merged self-attention maps (`diffseg`), for each image by itself; for models with attention at fine
  resolutions, such as Stable Diffusion.
- A rule (`rules`) says which segments are the structure; a word of the prompt makes a mask by itself (`words`).

    segmenter = Segmenter(medisyn.load_pipeline(), Settings(prompt="frontal chest X-ray of a child with clear lungs"))
    masks = segmenter.masks([Image.open("chest.png")], rule="lungs")     # (1, 128, 128) bool
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from medisyn.pipelines.medisyn_pipeline import MediSynPipeline

from .attention import FINE, finest_grid, record_attention
from .clusters import Clusters, assign, fit_clusters
from .diffseg import diffseg
from .probing import Probe, encode_images, image_tensor, run_unet, unet_features
from .rules import SMALLEST, choose, describe, get_rule, name_segments
from .words import SHARE_OF_MAXIMUM, word_attention

METHODS = ("features", "diffseg")
DRAWING_STEPS, DRAWING_GUIDANCE = 10, 2.0  # of the images that clusters are fitted on: plain ones will do
FEWEST_IMAGES = 10  # below, clusters that are fitted on them follow what the few happen to show


@dataclass(frozen=True)
class Settings:
    """How a model segments.

    Attributes:
        method: One of `METHODS`.
        prompt: What the images show; conditions the UNet and the drawn images. None: no text condition.
        timestep: Whose noise is added to the images, 0 <= timestep < training timesteps.
        layer: Whose features are clustered; None: `default_layer`.
        segments: Clusters of features.
        references: Images that the model draws to fit the clusters; 0 fits them on the images to segment, together.
        threshold: Divergence below which DiffSeg merges.
        draws: Noises that features and attention are averaged over.
        seed: Of the noise, of the drawn images (image i has seed + i), and of the clusters' starts.
        refine: Whether outlines of clusters follow the edges of the image.
    """

    method: str = "features"
    prompt: str | None = None
    timestep: int = 300
    layer: str | None = None
    segments: int = 6
    references: int = 32
    threshold: float = 0.9
    draws: int = 2
    seed: int = 0
    refine: bool = True

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"unknown segmentation method {self.method!r}; valid: {', '.join(METHODS)}")
        for name, least in (("segments", 2), ("references", 0), ("draws", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")

    def used(self, word: bool = False) -> dict[str, Any]:
        """The settings that act on segments, or on the mask of a word, by name."""
        always = ("prompt", "timestep", "draws", "seed")
        features, diffseg = ("layer", "segments", "references", "refine"), ("threshold",)
        own: tuple[str, ...] = ("method", *(features if self.method == "features" else diffseg))
        names = (*(() if word else own), *always)
        return {name: getattr(self, name) for name in names}


def default_layer(pipe: MediSynPipeline) -> str:
    """The last decoder block but one: its map has the latents' resolution and still says what, not how bright."""
    return f"up_blocks.{max(0, len(pipe.unet.up_blocks) - 2)}"


class Segmenter:
    """Segments and masks of images; what is fitted is fitted once, at the first use.

    Args:
        pipe: The model; it is left as it was.
        settings: See `Settings`.

    Attributes:
        named: Rule -> the numbers of the clusters that it chose, for clusters that were fitted on drawn images.
        grid: (height, width) of the finest attention that masks or segments were read from; None: they were not.
    """

    def __init__(self, pipe: MediSynPipeline, settings: Settings) -> None:
        self.pipe, self.settings = pipe, settings
        self.probe = Probe(settings.timestep, settings.prompt, settings.seed, settings.draws)
        self.layer = settings.layer or default_layer(pipe)
        self.named: dict[str, list[int]] = {}
        self.grid: tuple[int, int] | None = None
        self._clusters: Clusters | None = None
        self._reference: tuple[Tensor, Tensor] | None = None  # segments and pixels of the drawn images

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """The images as the model sees them, (B, 3, S, S) in [-1, 1]: see `probing.image_tensor`."""
        return image_tensor(self.pipe, images)

    def segments(self, images: Sequence[Image.Image]) -> Tensor:
        """Segments (B, S, S) int64 of images at the model's own size, see `probing.image_tensor`.

        Raises:
            ValueError: No images, or settings that this model cannot follow.
        """
        latents, pixels = encode_images(self.pipe, images), image_tensor(self.pipe, images)
        if self.settings.method == "diffseg":
            return self._attention_segments(latents, (pixels.shape[-2], pixels.shape[-1]))
        features = unet_features(self.pipe, latents, self.probe, self.layer)
        return assign(self._fitted(features), features, pixels, self.settings.refine)

    def masks(self, images: Sequence[Image.Image], rule: str) -> Tensor:
        """Masks (B, S, S) bool of the structure that a rule names; empty where it finds none.

        Raises:
            ValueError: No such rule, or whatever `segments` raises.
        """
        get_rule(rule)  # a wrong name is told before anything is computed
        return self.name(self.segments(images), self.pixels(images), rule)

    def name(self, segments: Tensor, pixels: Tensor, rule: str) -> Tensor:
        """Masks (B, S, S) bool of the segments that a rule takes for the structure.

        Clusters mean the same in all images: the rule looks at the drawn images once, or, without any, at all images
        together. Segments of DiffSeg are looked at image by image.
        """
        if self.settings.method == "diffseg" or self._reference is None:
            return name_segments(segments, pixels, rule, together=self.settings.method != "diffseg")
        if rule not in self.named:
            self.named[rule] = choose(rule, describe(*self._reference))
        return torch.isin(segments, torch.tensor(self.named[rule], dtype=torch.int64))

    def word_masks(self, images: Sequence[Image.Image], word: str, share: float = SHARE_OF_MAXIMUM) -> Tensor:
        """Masks (B, S, S) bool of where a word of the prompt acts: above `share` of the image's maximum."""
        latents, pixels = encode_images(self.pipe, images), image_tensor(self.pipe, images)
        size = (pixels.shape[-2], pixels.shape[-1])
        maps, self.grid = word_attention(self.pipe, latents, self.probe, word, size)
        return maps > share

    def doubts(self, images: int, rule: str | None = None, masks: Tensor | None = None) -> list[str]:
        """What speaks against the segments or masks of the last call, in words; nothing where all is well.

        Args:
            images: How many there were.
            rule: What named the segments, if anything did.
            masks: (B, S, S) bool, its masks.
        """
        found = []
        if self.grid is not None and min(self.grid) < FINE:
            found.append(
                f"the finest attention of this model that was read has {self.grid[0]} x {self.grid[1]} places, below "
                f"{FINE} x {FINE}: its masks show little; use --rule with --method features"
            )
        fitted = self.settings.method == "features" and not self.settings.references
        if rule is not None and fitted and images < FEWEST_IMAGES:
            drawn = get_rule(rule).references  # 0 where drawn images are too unlike real ones
            found.append(
                f"segments are fitted on the given images, {images} where the rule {rule!r} wants {FEWEST_IMAGES} or "
                "more: give more that show the same" + (f", or --references {drawn}" if drawn else "")
            )
        if rule is not None and masks is not None:
            small = int((masks.flatten(1).float().mean(dim=1) < SMALLEST).sum())
            if small:
                found.append(
                    f"nothing convincing was found in {small} of {images} images: their masks of the rule {rule!r} "
                    f"cover less than {SMALLEST:.0%}"
                )
        return found

    def _attention_segments(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        segments = []
        for latent in latents:  # maps of a single image fill much memory already
            with record_attention(self.pipe.unet, (latents.shape[-2], latents.shape[-1]), kinds=("self",)) as maps:
                for _ in run_unet(self.pipe, latent[None], self.probe):
                    pass
            self.grid = finest_grid(one.size for one in maps)
            segments.append(diffseg([(one.size, one.weights[0]) for one in maps], size, self.settings.threshold))
        return torch.stack(segments)

    def _fitted(self, features: Tensor) -> Clusters:
        """Clusters of the drawn images, or of `features` where none are drawn."""
        if self._clusters is not None:
            return self._clusters
        settings = self.settings
        if not settings.references:
            return fit_clusters(features, settings.segments, settings.seed)
        latents, pixels = self._draw()
        drawn = unet_features(self.pipe, latents, self.probe, self.layer)
        self._clusters = fit_clusters(drawn, settings.segments, settings.seed)
        self._reference = assign(self._clusters, drawn, pixels, settings.refine), pixels
        return self._clusters

    @torch.no_grad()
    def _draw(self) -> tuple[Tensor, Tensor]:
        """Latents and pixels of the images that the model draws for the prompt."""
        settings, latents = self.settings, []
        for start in range(0, settings.references, 16):
            seeds = range(settings.seed + start, settings.seed + min(start + 16, settings.references))
            drawn = self.pipe(
                prompt=None if settings.prompt is None else [settings.prompt] * len(seeds),
                num_images_per_prompt=len(seeds) if settings.prompt is None else 1,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                num_inference_steps=DRAWING_STEPS,
                guidance_scale=DRAWING_GUIDANCE,
                output_type="latent",
            )
            latents.append(drawn.images)
        stacked = torch.cat(latents)
        pixels = torch.cat([self.pipe.decode_latents(part) for part in stacked.split(16)])
        return stacked, pixels.float().cpu()
