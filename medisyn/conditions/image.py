"""Image embeddings as a condition: the tokens of a frozen vision transformer.

Any vision transformer of transformers whose output has a `last_hidden_state` (B, 1 + R + P, width), R register tokens
after the global one: Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel, ViTModel. The pipeline encodes; this holds
the components.

* The global token is the default, as in DiNO-Diffusion (arXiv 2407.11594): patch tokens let a model copy its input.
* Patch tokens on request (`tokens="patch"`), with a warning; register tokens are skipped.
* Noise on request (`noise=0.3`), as in stable unCLIP: in training the normalised embedding gets noise of a random
  level up to this one, and the sinusoids of the level take 16 channels behind it, so a stock UNet knows how far to
  trust it.

    condition = ImageCondition.from_pretrained("facebook/dinov2-base")
    pipe = create_pipeline("mini", conditions=[condition])
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, BaseImageProcessor, PreTrainedModel

from medisyn import prompts
from medisyn.conditions.base import register_condition
from medisyn.pipelines.medisyn_pipeline import NOISE_CHANNELS

if TYPE_CHECKING:
    from pathlib import Path

    from medisyn.config import ImageConditionConfig
    from medisyn.data.cache import EmbeddingCache
    from medisyn.data.loading import ImageDataset
    from medisyn.pipelines.medisyn_pipeline import MediSynPipeline
    from medisyn.tasks.cached_images import CachedImages, MixedImages

logger = logging.getLogger(__name__)

FITTED_IMAGES = 10_000  # whose embeddings give the mean and deviation for noise
# streams of an item's seed, beside those of the diffusion task
_NOISE_LEVEL, _EMBEDDING_NOISE = 4, 5


@register_condition
@dataclass(frozen=True)
class ImageCondition:
    """A vision transformer and its image processor as the condition `"image"`; see `base.Condition`.

    Attributes:
        encoder: A vision transformer of transformers.
        processor: Its image processor.
        tokens: "global" (one token per image) or "patch" (one for each patch).
        noise: Most noise on an embedding in training, in [0, 1]; 0: none, and no channels for its level.
        statistics: "mean" and "std" of the embeddings' channels, for noise; None: not fitted yet (`fit_noise`).
    """

    encoder: PreTrainedModel
    processor: BaseImageProcessor
    tokens: Literal["global", "patch"] = "global"
    noise: float = 0.0
    statistics: Mapping[str, Sequence[float]] | None = None

    kind: ClassVar[str] = "image"
    embeds_name: ClassVar[str | None] = "image_embeds"
    cacheable: ClassVar[bool] = True  # image encoders are never trained here

    def __post_init__(self) -> None:
        """Refuses values outside the documented ones."""
        prompts.choose("kind of image tokens", self.tokens, ("global", "patch"))
        if not 0 <= self.noise <= 1:
            raise ValueError(f"The noise on image embeddings must be in 0..1, got {self.noise}.")

    @classmethod
    def from_pretrained(
        cls, name: str, tokens: Literal["global", "patch"] = "global", noise: float = 0.0
    ) -> ImageCondition:
        """Loads the vision transformer of a folder or Hub name, frozen.

        Raises:
            ValueError: For a model that is not a vision transformer, or whose checkpoint lacks weights.
            OSError: When the folder or repository does not hold a model.
        """
        config = AutoConfig.from_pretrained(name)
        if not (hasattr(config, "patch_size") and hasattr(config, "hidden_size")):
            raise ValueError(
                f"{name!r} holds a {config.model_type!r} model, which is not a vision transformer (dinov2, "
                "dinov2_with_registers, dinov3_vit, vit, ...)."
            )
        encoder, loading = AutoModel.from_pretrained(name, output_loading_info=True, dtype=torch.float32)
        missing = sorted(loading["missing_keys"])
        if missing and all(key.startswith("pooler.") for key in missing) and hasattr(config, "pooler_act"):
            _pass_global_token(encoder)
        elif missing:
            raise ValueError(f"The checkpoint {name!r} lacks weights: {', '.join(missing[:5])}.")
        return cls(encoder.requires_grad_(False), AutoImageProcessor.from_pretrained(name), tokens, noise)

    @classmethod
    def from_pipeline(cls, pipe: MediSynPipeline) -> ImageCondition:
        """The image encoder that the pipeline has."""
        if pipe.image_encoder is None:
            raise ValueError(
                "This pipeline was saved without its image encoder; load it with image_encoder and feature_extractor."
            )
        noise = dict(pipe.config.get("image_noise") or {"level": 0.0})
        level = noise.pop("level")
        return cls(pipe.image_encoder, pipe.feature_extractor, pipe.config.image_tokens, level, noise or None)

    @classmethod
    def from_config(
        cls, config: ImageConditionConfig, captions: Sequence[str | None], base: MediSynPipeline | None = None
    ) -> ImageCondition:
        """The encoder that the configuration names, else that of `base`."""
        if config.tokens == "patch":
            logger.warning(
                "patch tokens tell the UNet where everything is: such a model learns to copy its input, and what it "
                "draws is no new patient; the global token is the default for that reason"
            )
        if config.encoder is not None:
            return cls.from_pretrained(config.encoder, config.tokens, config.noise)
        if base is None or cls.kind not in base.kinds:
            raise ValueError("The image condition needs an encoder, such as facebook/dinov2-base.")
        kept = cls.from_pipeline(base)
        if config.noise not in (0.0, kept.noise):
            raise ValueError(
                f"image.noise={config.noise}: the image condition of this base has {kept.noise}; another needs a new "
                "condition, so name its encoder."
            )
        return kept

    def build_cache(self, pipe: MediSynPipeline, images: ImageDataset, folder: Path, **options) -> EmbeddingCache:
        """Embeddings of all images (and of their mirror images where flips are used)."""
        from medisyn.data.cache import build_image_embedding_cache

        return build_image_embedding_cache(pipe, images, folder, **options)

    def components(self) -> dict:
        """The constructor arguments of `MediSynPipeline` that this condition stands for."""
        parts = {"image_encoder": self.encoder, "feature_extractor": self.processor, "image_tokens": self.tokens}
        return parts | ({"image_noise": {"level": self.noise, **(self.statistics or {})}} if self.noise else {})

    def token_width(self) -> int:
        """The width of one image token as the UNet gets it."""
        return self.encoder.config.hidden_size + (NOISE_CHANNELS if self.noise else 0)

    def vector_width(self) -> None:
        """Images give no vector."""
        return None

    def encode(self, pipe: MediSynPipeline, examples: Sequence[Mapping]) -> torch.Tensor:
        """Features (B, 1 or P, width) of the examples' images.

        Raises:
            ValueError: When an example has no image.
        """
        images = [image for example in examples if (image := example.get("image")) is not None]
        if len(images) < len(examples):
            raise ValueError("The image condition needs an image in every example.")
        return pipe.encode_image(images)

    def null(self, pipe: MediSynPipeline, batch_size: int) -> torch.Tensor:
        """The features of "no image", (B, 1 or P, width)."""
        return pipe.null_embeds(self.kind, batch_size)


def fit_noise(pipe: MediSynPipeline, data: CachedImages | MixedImages) -> None:
    """Take mean and deviation of the training images' embeddings for a pipeline that takes noise and has none yet.

    Stable unCLIP keeps them in a `StableUnCLIPImageNormalizer`; here they are part of the pipeline's configuration.
    """
    settings: Mapping[str, Any] | None = pipe.config.get("image_noise")
    if settings is None or "mean" in settings:
        return
    rows = torch.linspace(0, len(data) - 1, min(len(data), FITTED_IMAGES)).long().tolist()
    embeds = data.embeddings("image", rows).flatten(0, 1).double()
    deviation = embeds.std(dim=0, correction=0)
    deviation = deviation.clamp(min=1e-3 * float(deviation.max()) + 1e-12)  # of channels that never change
    statistics = {"mean": embeds.mean(dim=0), "std": deviation}
    rounded = {name: [float(f"{value:.6g}") for value in values.tolist()] for name, values in statistics.items()}
    pipe.register_to_config(image_noise={"level": settings["level"], **rounded})


def noise_embeds(pipe: MediSynPipeline, embeds: Mapping[str, torch.Tensor], seeds: torch.Tensor) -> dict[str, Any]:
    """Embeddings by kind as training shows them: those of images with noise, where the model takes it.

    Each item has a level of its own, uniform up to the model's (Ramesh et al. 2022, arXiv 2204.06125, as in stable
    unCLIP). Without `image_noise` nothing changes.

    Args:
        pipe: Its `noise_image_embeds` is used.
        embeds: Kind -> (B, T, width).
        seeds: Of the items, (B,); level and noise of an item depend on its seed alone.
    """
    settings = pipe.config.get("image_noise")
    if settings is None or "image" not in embeds:
        return dict(embeds)
    from medisyn.tasks.base import seeded_normal, seeded_uniform

    image = embeds["image"]
    levels = settings["level"] * seeded_uniform(seeds, 1, _NOISE_LEVEL)[:, 0]
    noise = seeded_normal(seeds, image.shape[1:], _EMBEDDING_NOISE)
    return dict(embeds) | {"image": pipe.noise_image_embeds(image, levels.to(image), noise.to(image))}


def _pass_global_token(encoder: PreTrainedModel) -> None:
    """Makes the pooler of a `ViTModel` the identity on the global token.

    Self-supervised checkpoints (DINO of 2021) have no pooler; the stock class would give them a random one at each
    load.
    """
    with torch.no_grad():
        torch.nn.init.eye_(encoder.pooler.dense.weight)
        torch.nn.init.zeros_(encoder.pooler.dense.bias)
    encoder.pooler.activation = torch.nn.Identity()
    encoder.config.pooler_act = "linear"
