"""Image embeddings as a condition: the tokens of a frozen vision transformer.

Any vision transformer of transformers whose output has a `last_hidden_state` (B, 1 + R + P, width), R register tokens
after the global one: Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel, ViTModel. The pipeline encodes; this holds
the components.

* The global token is the default, as in DiNO-Diffusion (arXiv 2407.11594): patch tokens let a model copy its input.
* Patch tokens on request (`tokens="patch"`); register tokens are skipped.

    condition = ImageCondition.from_pretrained("facebook/dinov2-base")
    pipe = create_pipeline("mini", conditions=[condition])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, BaseImageProcessor, PreTrainedModel

from medisyn import prompts
from medisyn.conditions.base import register_condition

if TYPE_CHECKING:
    from pathlib import Path

    from medisyn.config import ImageConditionConfig
    from medisyn.data.cache import EmbeddingCache
    from medisyn.data.loading import ImageDataset
    from medisyn.pipelines.medisyn_pipeline import MediSynPipeline


@register_condition
@dataclass(frozen=True)
class ImageCondition:
    """A vision transformer and its image processor as the condition `"image"`; see `base.Condition`.

    Attributes:
        encoder: A vision transformer of transformers.
        processor: Its image processor.
        tokens: "global" (one token per image) or "patch" (one for each patch).
    """

    encoder: PreTrainedModel
    processor: BaseImageProcessor
    tokens: Literal["global", "patch"] = "global"

    kind: ClassVar[str] = "image"
    embeds_name: ClassVar[str | None] = "image_embeds"
    cacheable: ClassVar[bool] = True  # image encoders are never trained here

    def __post_init__(self) -> None:
        """Refuses values outside the documented ones."""
        prompts.choose("kind of image tokens", self.tokens, ("global", "patch"))

    @classmethod
    def from_pretrained(cls, name: str, tokens: Literal["global", "patch"] = "global") -> ImageCondition:
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
        encoder, loading = AutoModel.from_pretrained(name, output_loading_info=True)
        missing = sorted(loading["missing_keys"])
        if missing and all(key.startswith("pooler.") for key in missing) and hasattr(config, "pooler_act"):
            _pass_global_token(encoder)
        elif missing:
            raise ValueError(f"The checkpoint {name!r} lacks weights: {', '.join(missing[:5])}.")
        return cls(encoder.requires_grad_(False), AutoImageProcessor.from_pretrained(name), tokens)

    @classmethod
    def from_pipeline(cls, pipe: MediSynPipeline) -> ImageCondition:
        """The image encoder that the pipeline has."""
        if pipe.image_encoder is None:
            raise ValueError(
                "This pipeline was saved without its image encoder; load it with image_encoder and feature_extractor."
            )
        return cls(pipe.image_encoder, pipe.feature_extractor, pipe.config.image_tokens)

    @classmethod
    def from_config(
        cls, config: ImageConditionConfig, captions: Sequence[str | None], base: MediSynPipeline | None = None
    ) -> ImageCondition:
        """The encoder that the configuration names, else that of `base`."""
        if config.encoder is not None:
            return cls.from_pretrained(config.encoder, config.tokens)
        if base is None or cls.kind not in base.kinds:
            raise ValueError("The image condition needs an encoder, such as facebook/dinov2-base.")
        return cls.from_pipeline(base)

    def build_cache(self, pipe: MediSynPipeline, images: ImageDataset, folder: Path, **options) -> EmbeddingCache:
        """Embeddings of all images (and of their mirror images where flips are used)."""
        from medisyn.data.cache import build_image_embedding_cache

        return build_image_embedding_cache(pipe, images, folder, **options)

    def components(self) -> dict:
        """The constructor arguments of `MediSynPipeline` that this condition stands for."""
        return {"image_encoder": self.encoder, "feature_extractor": self.processor, "image_tokens": self.tokens}

    def token_width(self) -> int:
        """The width of one image token."""
        return self.encoder.config.hidden_size

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
