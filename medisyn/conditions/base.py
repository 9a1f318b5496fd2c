"""What a condition is, the registry of its kinds, and dropping conditions in training.

A condition is tokens (text, image embeddings: where a stock UNet takes `encoder_hidden_states`) or a vector (labels:
where it takes `class_labels`). It brings components to a pipeline; encoding and nulls are the pipeline's own methods,
so that training and sampling cannot differ. Nothing outside this package needs to know which kind it handles.

* `unet_kwargs` writes the wiring as stock `UNet2DConditionModel` configuration.
* `condition_dropout` and `drop` replace conditions by their nulls, per kind and all together, which is what makes
  guidance possible (Ho & Salimans 2022, arXiv 2207.12598, algorithm 1). They are pure: random numbers are passed in.

    >>> from medisyn.conditions import get_condition, list_conditions
    >>> list_conditions()
    ('none', 'image', 'labels', 'text')
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch

from medisyn import prompts

if TYPE_CHECKING:
    from pathlib import Path

    from medisyn.data.cache import EmbeddingCache
    from medisyn.data.loading import ImageDataset
    from medisyn.pipelines.medisyn_pipeline import MediSynPipeline


@runtime_checkable
class Condition(Protocol):
    """One kind of condition; implemented by `TextCondition`, `ImageCondition`, `LabelsCondition` and `NoCondition`."""

    kind: ClassVar[str]  # "text" | "image" | "labels" | "none"
    embeds_name: ClassVar[str | None]  # the argument of `pipe.unet_conditions` that takes this kind's features

    @classmethod
    def from_pipeline(cls, pipe: MediSynPipeline) -> Condition:
        """The condition that a pipeline already has."""
        ...

    @classmethod
    def from_config(
        cls, config: Any, captions: Sequence[str | None], base: MediSynPipeline | None = None
    ) -> Condition:
        """The condition that its variant of `ConditionConfig` describes.

        Args:
            config: Where it names no encoder or schema, that of `base` is kept.
            captions: Those of the training data.
            base: The pipeline that training starts from.

        Raises:
            ValueError: When nothing says which encoder or schema to use.
        """
        ...

    @property
    def cacheable(self) -> bool:
        """Whether features may be computed once for a whole training: true where nothing in the encoder is trained."""
        ...

    def build_cache(
        self, pipe: MediSynPipeline, images: ImageDataset, folder: Path, **options
    ) -> EmbeddingCache | None:
        """Features of all `images` on disk; None where they are trained, or cheaper to compute than to read.

        Options are those of `medisyn.data.cache.build_image_embedding_cache`: `batch_size`, `flips`, `bf16`.
        """
        ...

    def components(self) -> dict:
        """Constructor arguments of `MediSynPipeline`."""
        ...

    def token_width(self) -> int | None:
        """The width of a token, or None for a kind that gives no tokens."""
        ...

    def vector_width(self) -> int | None:
        """The length of the vector, or None for a kind that gives none."""
        ...

    def encode(self, pipe: MediSynPipeline, examples: Sequence[Mapping]) -> torch.Tensor:
        """Features (B, T, width) or (B, K) of examples with the keys "caption", "labels" and "image"."""
        ...

    def null(self, pipe: MediSynPipeline, batch_size: int) -> torch.Tensor:
        """The features of "no condition", shaped like those of `encode`."""
        ...


ConditionType = TypeVar("ConditionType", bound=type[Condition])

_CONDITIONS: dict[str, type[Condition]] = {}  # filled by `medisyn.conditions`, which imports every kind


def register_condition(condition: ConditionType) -> ConditionType:
    """Class decorator: makes a condition available under its `kind`."""
    _CONDITIONS[condition.kind] = condition
    return condition


def get_condition(kind: str) -> type[Condition]:
    """The condition class of a kind.

    Raises:
        ValueError: For an unknown kind; the message lists the known ones.
    """
    return _CONDITIONS[prompts.choose("kind of condition", kind, _CONDITIONS)]


def list_conditions() -> tuple[str, ...]:
    """The known kinds of condition."""
    return tuple(_CONDITIONS)


def conditions_of(pipe: MediSynPipeline) -> list[Condition]:
    """The conditions that a pipeline has, in the order of `pipe.kinds`; empty for an unconditional one."""
    return [get_condition(kind).from_pipeline(pipe) for kind in pipe.kinds]


@register_condition
class NoCondition:
    """No condition, for unconditional models: the same as an empty list of conditions."""

    kind: ClassVar[str] = "none"
    embeds_name: ClassVar[str | None] = None
    cacheable: ClassVar[bool] = True

    @classmethod
    def from_pipeline(cls, pipe: MediSynPipeline) -> NoCondition:
        """Every pipeline can be sampled without a condition."""
        return cls()

    @classmethod
    def from_config(
        cls, config: Any, captions: Sequence[str | None], base: MediSynPipeline | None = None
    ) -> NoCondition:
        """Nothing to configure."""
        return cls()

    def build_cache(self, pipe: MediSynPipeline, images: ImageDataset, folder: Path, **options) -> None:
        """Nothing to compute."""
        return None

    def components(self) -> dict:
        """No components."""
        return {}

    def token_width(self) -> None:
        """No tokens."""
        return None

    def vector_width(self) -> None:
        """No vector."""
        return None

    def encode(self, pipe: MediSynPipeline, examples: Sequence[Mapping]) -> torch.Tensor:
        """An empty vector for each example, (B, 0)."""
        return self.null(pipe, len(examples))

    def null(self, pipe: MediSynPipeline, batch_size: int) -> torch.Tensor:
        """An empty vector for each example, (B, 0)."""
        return torch.zeros(batch_size, 0)


def unet_kwargs(conditions: Sequence[Condition], cross_attention_dim: int) -> dict:
    """The configuration entries of `UNet2DConditionModel` that connect `conditions`.

    One kind of tokens that has the UNet's `cross_attention_dim` goes in as it is. Otherwise the UNet's own linear
    layer (`encoder_hid_dim_type="text_proj"`) maps tokens to it; several kinds share that layer in blocks along the
    feature axis, which gives each its own projection. Labels enter by `class_embed_type="simple_projection"`.

    Raises:
        ValueError: When a kind occurs twice.
    """
    kinds = [condition.kind for condition in conditions]
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"Each kind of condition can be given once, got: {', '.join(kinds)}.")
    token_widths = [width for condition in conditions if (width := condition.token_width()) is not None]
    vector_widths = [width for condition in conditions if (width := condition.vector_width()) is not None]
    projected = bool(token_widths) and token_widths != [cross_attention_dim]
    return {
        "cross_attention_dim": cross_attention_dim,
        "encoder_hid_dim_type": "text_proj" if projected else None,
        "encoder_hid_dim": sum(token_widths) if projected else None,
        "class_embed_type": "simple_projection" if vector_widths else None,
        "projection_class_embeddings_input_dim": sum(vector_widths) if vector_widths else None,
    }


def condition_dropout(
    probabilities: Mapping[str, float], uniforms: torch.Tensor, joint: float = 0.0
) -> dict[str, torch.Tensor]:
    """Which examples keep which condition.

    Each kind is dropped with its own probability, independently of the others; beside that, all kinds are dropped
    together with probability `joint`. A kind is thus kept with probability (1 - p_kind) (1 - joint).

    Args:
        probabilities: Kind -> probability of dropping it, in [0, 1].
        uniforms: (B, n + 1) numbers in [0, 1): a column for each of the n kinds in their order, then one for all
            together.
        joint: Probability of dropping all kinds, in [0, 1].

    Returns:
        Kind -> boolean mask (B,), true where the condition is kept.

    Raises:
        ValueError: For a probability outside [0, 1] or uniforms of another shape.
    """
    for name, probability in {**probabilities, "joint": joint}.items():
        if not 0.0 <= probability <= 1.0:
            raise ValueError(f"The dropout probability of {name!r} must be in 0..1, got {probability}.")
    if uniforms.ndim != 2 or uniforms.shape[1] != len(probabilities) + 1:
        raise ValueError(
            f"uniforms must have shape (batch, {len(probabilities) + 1}), one column for each of "
            f"{', '.join([*probabilities, 'joint'])}; got {tuple(uniforms.shape)}."
        )
    together = uniforms[:, -1] >= joint
    return {
        kind: (uniforms[:, column] >= probability) & together
        for column, (kind, probability) in enumerate(probabilities.items())
    }


def drop(embeds: torch.Tensor, null: torch.Tensor, keep_mask: torch.Tensor) -> torch.Tensor:
    """`embeds` (B, ...) where `keep_mask` (B,) is true, elsewhere `null` (B or 1, ...); differentiable in both."""
    keep = keep_mask.to(embeds.device).view(-1, *(1,) * (embeds.ndim - 1))
    return torch.where(keep, embeds, null.to(embeds))
