"""Parts of a training configuration that are sections of their own: conditions, LoRA, prior preservation.

- See `medisyn.config`, which holds the whole and reads it.

    TextConditionConfig(encoder="openai/clip-vit-large-patch14", dropout=0.1)
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

STRICT = ConfigDict(extra="forbid")
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]


@dataclass(frozen=True)
class TextConditionConfig:
    """Text prompts as cross-attention tokens."""

    __pydantic_config__ = STRICT
    type: Literal["text"] = "text"
    # a transformers or `open_clip:` name, or a folder; None: that of `base`, else a small one built from the captions
    encoder: str | None = None
    train_encoder: bool = False  # train the text encoder along with the UNet
    hidden_size: Positive = 192  # of the encoder that is built when none is named
    num_layers: Positive = 2
    max_length: Positive | None = None  # tokens; None: the encoder's own window, 24 for one built from the captions
    # words that an adapter teaches the text encoder; "auto": those of the captions that its tokenizer breaks to pieces
    new_words: Literal["auto"] | tuple[str, ...] = ()
    dropout: Fraction = 0.1  # probability of replacing the condition by its null


@dataclass(frozen=True)
class ImageConditionConfig:
    """Image embeddings (DINO and other vision transformers) as cross-attention tokens."""

    __pydantic_config__ = STRICT
    type: Literal["image"] = "image"
    encoder: str | None = None  # transformers name or folder, such as facebook/dinov2-base; None: that of `base`
    tokens: Literal["global", "patch"] = "global"  # patch tokens let a model copy its input
    dropout: Fraction = 0.1


@dataclass(frozen=True)
class LabelsConditionConfig:
    """Structured labels as a vector added to the time embedding."""

    __pydantic_config__ = STRICT
    type: Literal["labels"] = "labels"
    schema: str | None = None  # name of a shipped schema or path of a JSON file; None: that of `base`
    dropout: Fraction = 0.1


ConditionConfig = Annotated[
    TextConditionConfig | ImageConditionConfig | LabelsConditionConfig, Field(discriminator="type")
]


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside frozen weights (Hu et al. 2022), by peft."""

    __pydantic_config__ = STRICT
    rank: Positive = 16
    alpha: PositiveFloat | None = None  # the adapter is scaled by alpha / rank; None: the rank, a scale of 1
    # endings of module names, or one regular expression that whole names match; by default the UNet's attention
    target_modules: str | tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    use_rslora: bool = False  # scale by alpha / sqrt(rank) (Kalajdzievski 2023)
    use_dora: bool = False  # direction and magnitude apart (Liu et al. 2024)
    dropout: Fraction = 0.0
    text_encoder: bool = False  # adapt the text encoder as well
    text_encoder_target_modules: str | tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass(frozen=True)
class PriorConfig:
    """Images of what the base can already draw, mixed in so that it does not forget (Ruiz et al. 2023)."""

    __pydantic_config__ = STRICT
    fraction: Fraction = 0.25  # their share of the drawn rows
    source: str | tuple[str, ...] | None = None  # real ones, as in data.source; None: drawn by the base itself
    caption_column: str | None = "caption"  # of `source`
    num_images: Positive = 256  # how many the base draws
    prompts: tuple[str, ...] = ()  # what it draws; empty: a sentence for each modality and finding of the vocabulary
