"""The layers of an extended pipeline: an untouched base layer with blocks of weights beside it, one by extension.

- Plain modules: they move, cast, compile and checkpoint with the model. Under their names lie `original.*` (the
  base's own parameters) and `extensions.<name>.weight`.
- A block is no `nn.Linear`, so that peft, whatever its targets, does not put a LoRA on it.

See `medisyn.extension`, which puts them in and takes them out:

    extend_labels(pipe, fields)
    pipe.unet.class_embedding.extensions["default"].weight
"""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .pipelines.medisyn_pipeline import MediSynPipeline


class ExtensionBlock(nn.Module):
    """The weights of one extension at one place.

    Args:
        weight: (time_embed_dim, k) for k label slots, or (n, dim) for n words.
        content: The label schema `{"name", "fields"}`, or the words.
    """

    columns: Tensor

    def __init__(self, weight: Tensor, content: Mapping[str, Any] | tuple[str, ...]) -> None:
        """Hold the weights, frozen until `extension_parameters` asks for them."""
        super().__init__()
        self.weight = nn.Parameter(weight.clone(), requires_grad=False)
        self.content: Any = content  # which of the two, the place of the block says
        self.scale = 1.0
        self.register_buffer("columns", None, persistent=False)  # of labels: where the slots are in the label vector


class ExtendedLayer(nn.Module):
    """A frozen layer with blocks of weights beside it."""

    def __init__(self, original: nn.Module | None) -> None:
        super().__init__()
        self.original = original  # first, because encoders take their dtype from the first parameter
        self.extensions = nn.ModuleDict()
        self.trainable = [p.requires_grad for p in original.parameters()] if original is not None else []

    def blocks(self) -> dict[str, ExtensionBlock]:
        """The blocks by the names of their extensions."""
        return cast(dict[str, ExtensionBlock], dict(self.extensions.items()))

    def freeze(self) -> None:
        """Keep the base layer from learning."""
        if self.original is not None:
            self.original.requires_grad_(False)

    def restore_trainable(self, layer: nn.Module | None) -> None:
        """Give `layer` the gradient flags that the base layer had."""
        for parameter, flag in zip(layer.parameters() if layer is not None else (), self.trainable, strict=False):
            parameter.requires_grad_(flag)


class ExtendedLinear(ExtendedLayer):
    """`original(x[:, :K])` + the sum over extensions of scale * weight @ x[:, their columns].

    Args:
        original: Reads the first K numbers of the label vector; None for a UNet without labels.
        settings: What the configurations of pipeline and UNet held before the first extension.
    """

    original: nn.Linear | None

    def __init__(self, original: nn.Linear | None, settings: Mapping[str, Mapping[str, Any]]) -> None:
        """Start without extensions."""
        super().__init__(original)
        self.settings = settings

    def forward(self, labels: Tensor) -> Tensor:
        """Label vectors (B, K + k) to (B, time_embed_dim)."""
        total = None
        if self.original is not None:
            # contiguous: the base then multiplies the very matrices that it did without extensions
            total = self.original(labels[..., : self.original.in_features].contiguous())
        for block in self.blocks().values():
            part = nn.functional.linear(labels[..., block.columns].to(block.weight.dtype), block.weight)
            part = (block.scale * part).to(labels.dtype if total is None else total.dtype)
            total = part if total is None else total + part
        assert total is not None  # without a base layer there is a block: the wrapper goes with the last one
        return total


class ExtendedEmbedding(ExtendedLayer):
    """The base layer's vectors for its ids, and the extensions' for the ids from `first_id` on.

    Args:
        original: The embedding of the text encoder.
        tokenizer: As it was before the first extension.
    """

    original: nn.Embedding
    rows: Tensor

    def __init__(self, original: nn.Embedding, tokenizer: PreTrainedTokenizerBase) -> None:
        """Start without extensions."""
        super().__init__(original)
        self.tokenizer = tokenizer
        # not the embedding's length: that may be padded (T5), and added tokens take the first free ids
        self.first_id = max(tokenizer.get_vocab().values()) + 1
        self.register_buffer("rows", torch.empty(0, dtype=torch.long), persistent=False)

    def table(self) -> Tensor:
        """The vectors of all blocks (n, dim); `rows` says which one a new id has."""
        return torch.cat([block.weight for block in self.blocks().values()])

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids (B, T) to vectors (B, T, dim)."""
        is_new = input_ids >= self.first_id
        vectors = self.original(input_ids.masked_fill(is_new, 0))
        rows = self.rows[(input_ids - self.first_id).clamp(min=0)]
        return torch.where(is_new[..., None], self.table().to(vectors.dtype)[rows], vectors)

    def update_rows(self) -> None:
        """Choose each new word's row: where several blocks have it that of the greatest scale, or the first."""
        chosen: dict[str, tuple[float, int]] = {}
        row = 0
        for block in self.blocks().values():
            for word in block.content:
                if word not in chosen or block.scale > chosen[word][0]:
                    chosen[word] = (block.scale, row)
                row += 1
        rows = [chosen[word][1] for word in distinct_words(self.blocks().values())]
        self.rows = torch.tensor(rows, dtype=torch.long, device=self.original.weight.device)


def distinct_words(blocks: Iterable[ExtensionBlock]) -> list[str]:
    """The words of blocks in the order of their ids."""
    return list(dict.fromkeys(word for block in blocks for word in block.content))


def label_wrapper(pipe: MediSynPipeline) -> ExtendedLinear | None:
    """What holds a pipeline's label extensions, None where it has none."""
    layer = pipe.unet.class_embedding
    return layer if isinstance(layer, ExtendedLinear) else None


def word_wrapper(pipe: MediSynPipeline) -> ExtendedEmbedding | None:
    """What holds a pipeline's word extensions, None where it has none."""
    layer = None if pipe.text_encoder is None else pipe.text_encoder.get_input_embeddings()
    return layer if isinstance(layer, ExtendedEmbedding) else None


def extension_blocks(pipe: MediSynPipeline, name: str) -> tuple[ExtensionBlock | None, ExtensionBlock | None]:
    """The label block and the word block of an extension, None for what it does not have."""
    labels, words = (wrapper.blocks() if wrapper else {} for wrapper in (label_wrapper(pipe), word_wrapper(pipe)))
    return labels.get(name), words.get(name)


def check_name(pipe: MediSynPipeline, name: str, part: int) -> None:
    """Raise ValueError for a name that cannot be a parameter's or is taken; `part` is 0 for labels, 1 for words."""
    if not name or "." in name or hasattr(nn.ModuleDict, name):
        raise ValueError(f"extension name {name!r} cannot be part of a parameter's name; use letters, digits, _ and -")
    if extension_blocks(pipe, name)[part] is not None:
        raise ValueError(f"extension {name!r} has {('label fields', 'words')[part]} already; remove it first")
