"""Label fields and words that a trained pipeline never had: added, trained alone, saved, mixed, removed, fused.

- New label fields are new columns beside the layer that reads the label vector, zeros at first: the model starts as
  it was, and its null stays. A pipeline without labels gets its first ones. New words are new rows beside the text
  encoder's embedding, each starting as the mean of the pieces that the tokenizer broke it into.
- All state is on two wrapper modules, `ExtendedLinear` at `unet.class_embedding` and `ExtendedEmbedding` at the text
  encoder's input embedding: the untouched layer under them, a block of weights for each extension by name, and what
  the pipeline was before (settings, tokenizer). With the last block the wrapper goes, and no trace is left.
- Parameter names gain `original.` (`class_embedding.original.weight`) and `extensions.<name>.weight`. What the
  pipeline's `save_pretrained` writes has them fused, as by `fuse_extensions`.
- Extensions mix: the labels of each count by its scale; a word that two have is that of the greater scale. A label
  field that two have is one field, which each reads in its own way.
- Words are saved in the format of textual inversion. Stock pipelines take one word at a time:
  `load_textual_inversion([{word: vector} for word, vector in load_file("learned_embeds.safetensors").items()])`

    extend_labels(pipe, {"kl_grade": {"type": "ordinal", "values": ["0", "1", "2", "3", "4"]}}, "knee")
    extend_words(pipe, new_words(captions, pipe.tokenizer), "knee")
    optimizer = torch.optim.AdamW(extension_parameters(pipe, "knee").values())
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .adapter_folder import LABEL_WEIGHTS, WORD_WEIGHTS
from .conditions.labels import LabelSchema
from .extension_layers import (
    ExtendedLinear,
    ExtensionBlock,
    check_name,
    distinct_words,
    extension_blocks,
    label_wrapper,
    word_wrapper,
)
from .extension_words import attach_words, extend_words
from .pipelines.medisyn_pipeline import KINDS, MediSynPipeline, label_slots, label_width
from .words import extended_tokenizer, new_words

__all__ = [
    "added",
    "extend_labels",
    "extend_words",
    "extension_parameters",
    "fuse_extensions",
    "load_extension",
    "new_words",
    "remove_extension",
    "save_extension",
    "scale_extension",
]


def extend_labels(
    pipe: MediSynPipeline,
    fields: Mapping[str, Mapping[str, Any]],
    name: str = "default",
    schema_name: str | None = None,
) -> list[str]:
    """Add label fields to a pipeline, after those it has; one that it has already is left out.

    Args:
        pipe: Its UNet and label schema are changed in place.
        fields: `{code: {"type": ..., "values": [...], "display": ...}}`, as in a label schema.
        name: Of the extension.
        schema_name: The label schema's name where the pipeline had no labels; by default `name`.

    Returns:
        The codes of the fields that are new to the base.

    Raises:
        ValueError: An ill-formed field, a field of that name but another definition, or a UNet whose class embedding
            is not a label vector's.
    """
    check_name(pipe, name, 0)
    schema = LabelSchema.from_dict({"name": schema_name or name, "fields": fields}).to_dict(rules=False)
    wrapper = label_wrapper(pipe)
    base = wrapper.settings["pipe"]["label_schema"] if wrapper else pipe.label_schema
    known = _merge({} if base is None else base["fields"], {})
    _merge(known, schema["fields"])
    schema["fields"] = {code: field for code, field in schema["fields"].items() if code not in known}
    if schema["fields"]:
        width = pipe.unet.time_embedding.linear_2.out_features
        _attach_labels(pipe, schema, torch.zeros(width, label_width(schema)), name)
    return list(schema["fields"])


def _merge(fields: Mapping[str, Mapping], added: Mapping[str, Mapping]) -> dict[str, dict]:
    """Both sets of fields in the complete form, equal ones once. Raises ValueError for a clash."""

    def complete(these: Mapping[str, Mapping]) -> dict[str, dict]:
        return LabelSchema.from_dict({"name": "-", "fields": these}).to_dict(rules=False)["fields"] if these else {}

    def spellings(code: str, field: Mapping) -> set[str]:  # what `label_field` takes for this field
        return {text.strip().lower().replace(" ", "_").replace("-", "_") for text in (code, field["display"])}

    merged = complete(fields)
    for code, field in complete(added).items():
        for other, present in merged.items():
            if code == other and field != present:
                raise ValueError(
                    f"label field {code!r} is {field}, but the pipeline has a field of that name: {present}"
                )
            if code != other and spellings(code, field) & spellings(other, present):
                raise ValueError(f"label field {code!r} ({field['display']}) would be taken for the field {other!r}")
        merged[code] = field
    return merged


def _attach_labels(pipe: MediSynPipeline, schema: Mapping[str, Any], weight: Tensor, name: str) -> None:
    """Put a block at the class embedding; nothing is changed if that is not possible."""
    unet, wrapper = pipe.unet, label_wrapper(pipe)
    _merge(pipe.label_schema["fields"] if pipe.label_schema else {}, schema["fields"])
    if wrapper is None:
        base, kind = unet.class_embedding, unet.config.class_embed_type
        if base is not None and kind != "simple_projection":
            raise ValueError(
                f"this UNet's class embedding is a {type(base).__name__} (class_embed_type {kind!r}); "
                "label fields can be added to 'simple_projection', or where there is none"
            )
        known = 0 if pipe.label_schema is None else label_width(pipe.label_schema)
        if known != (0 if base is None else base.in_features):
            raise ValueError(
                f"the UNet reads {0 if base is None else base.in_features} label numbers, but the "
                f"pipeline's label schema describes {known}"
            )
        settings = {
            "pipe": {key: pipe.config[key] for key in ("label_schema", "conditions")},
            "unet": {key: unet.config[key] for key in ("class_embed_type", "projection_class_embeddings_input_dim")},
        }
        wrapper = ExtendedLinear(base, settings)
    expected = unet.time_embedding.linear_2.out_features, label_width(schema)
    if tuple(weight.shape) != expected:
        raise ValueError(f"label columns of extension {name!r} have the shape {tuple(weight.shape)}, not {expected}")
    wrapper.extensions[name] = ExtensionBlock(weight.to(unet.device, unet.dtype), schema)
    wrapper.freeze()
    unet.class_embedding = wrapper
    _update_labels(pipe)


def _update_labels(pipe: MediSynPipeline) -> None:
    """Bring schema, configurations and columns into line with the extensions that are there."""
    wrapper = label_wrapper(pipe)
    before = wrapper.settings["pipe"]
    blocks = list(wrapper.blocks().values())
    if not blocks:
        wrapper.restore_trainable(wrapper.original)
        pipe.unet.class_embedding = wrapper.original
        pipe.register_to_config(**before)
        pipe.unet.register_to_config(**wrapper.settings["unet"])
        return
    schema = before["label_schema"] or {"name": blocks[0].content["name"], "fields": {}}
    fields = dict(schema["fields"])
    for block in blocks:
        fields |= {code: field for code, field in block.content["fields"].items() if code not in fields}
    schema = {**schema, "fields": fields}
    places = label_slots(schema)
    for block in blocks:
        columns = [places.index(slot) for slot in label_slots(block.content)]
        block.columns = torch.tensor(columns, device=block.weight.device)
    kinds = {*(before["conditions"] or "").split("+"), "labels"}
    pipe.register_to_config(label_schema=schema, conditions="+".join(kind for kind in KINDS if kind in kinds))
    pipe.unet.register_to_config(
        class_embed_type="simple_projection", projection_class_embeddings_input_dim=label_width(schema)
    )


# ---- use ----


def added(pipe: MediSynPipeline, name: str = "default") -> dict[str, Any]:
    """What an extension adds, as in `adapter.json`: "label_schema" (`{"name", "fields"}` or None) and "tokens"."""
    labels, words = extension_blocks(pipe, name)
    return {"label_schema": labels and dict(labels.content), "tokens": list(words.content) if words else []}


def extension_parameters(pipe: MediSynPipeline, name: str = "default") -> dict[str, nn.Parameter]:
    """The weights of an extension, made trainable: "label_embedding" (time_embed_dim, k), "learned_embeds" (n, dim).

    Empty for a name without label fields and words of its own.
    """
    blocks = zip(("label_embedding", "learned_embeds"), extension_blocks(pipe, name), strict=True)
    return {part: cast(nn.Parameter, block.weight.requires_grad_(True)) for part, block in blocks if block is not None}


def save_extension(pipe: MediSynPipeline, folder: str | Path, name: str = "default") -> None:
    """Write `label_embedding.safetensors` and `learned_embeds.safetensors`, of these what the extension has."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    labels, words = extension_blocks(pipe, name)
    if labels is not None:
        metadata = {"format": "pt", "fields": json.dumps(list(labels.content["fields"]))}
        save_file({"weight": labels.weight.detach().cpu().contiguous()}, folder / LABEL_WEIGHTS, metadata=metadata)
    if words is not None:
        vectors = {
            word: vector.clone() for word, vector in zip(words.content, words.weight.detach().cpu(), strict=True)
        }
        save_file(vectors, folder / WORD_WEIGHTS, metadata={"format": "pt"})


def load_extension(
    pipe: MediSynPipeline, folder: str | Path, manifest: Mapping[str, Any], name: str = "default"
) -> None:
    """Add what `save_extension` wrote, or nothing at all.

    Args:
        pipe: Is changed in place.
        folder: With the weights.
        manifest: Content of `adapter.json`; "label_schema" and "tokens" say what there is.
        name: Of the extension.

    Raises:
        FileNotFoundError: The manifest names something that has no file.
        ValueError: Files and manifest differ, or the extension does not fit the pipeline.
    """
    folder, schema, tokens = Path(folder), manifest["label_schema"], list(manifest["tokens"])
    for what, file in ((schema, folder / LABEL_WEIGHTS), (tokens, folder / WORD_WEIGHTS)):
        if what and not file.is_file():
            raise FileNotFoundError(f"{folder} has no {file.name}, which its adapter.json asks for")
    if schema:
        check_name(pipe, name, 0)
        with safe_open(folder / LABEL_WEIGHTS, framework="pt") as file:
            order = json.loads((file.metadata() or {}).get("fields", "[]"))
            weight = file.get_tensor("weight")
        schema = LabelSchema.from_dict(schema).to_dict(rules=False)
        if sorted(order) != sorted(schema["fields"]):
            raise ValueError(
                f"{folder / LABEL_WEIGHTS} has columns for {order}, adapter.json {list(schema['fields'])}"
            )
        schema["fields"] = {code: schema["fields"][code] for code in order}
    if tokens:
        check_name(pipe, name, 1)
        vectors = load_file(folder / WORD_WEIGHTS)
        if sorted(vectors) != sorted(tokens):
            raise ValueError(f"{folder / WORD_WEIGHTS} has vectors for {sorted(vectors)}, adapter.json {tokens}")
        if pipe.text_encoder is None:
            raise ValueError("this pipeline has no text encoder that could take words")
        attach_words(pipe, {word: vectors[word] for word in tokens}, name)
    if schema:
        try:
            _attach_labels(pipe, schema, weight, name)
        except ValueError:
            remove_extension(pipe, name)
            raise


def scale_extension(pipe: MediSynPipeline, name: str, weight: float) -> None:
    """Let the label fields of an extension count by `weight`: 1 as trained, 0 as if they were unknown.

    The vectors of words do not scale. Where several extensions have a word, the greatest weight decides whose is used.
    """
    for block in extension_blocks(pipe, name):
        if block is not None:
            block.scale = float(weight)
    if (wrapper := word_wrapper(pipe)) is not None:
        wrapper.update_rows()


def remove_extension(pipe: MediSynPipeline, name: str | None = None) -> None:
    """Take an extension off, or all of them (None). A name that has no extension is nothing to remove."""
    labels, words = label_wrapper(pipe), word_wrapper(pipe)
    for wrapper in (labels, words):
        for each in list(wrapper.extensions) if wrapper is not None else ():
            if name in (None, each):
                del wrapper.extensions[each]
    if labels is not None:
        _update_labels(pipe)
    if words is None:
        return
    if words.extensions:
        distinct = distinct_words(words.blocks().values())
        pipe.register_modules(tokenizer=extended_tokenizer(words.tokenizer, distinct, words.first_id))
        words.update_rows()
    else:
        words.restore_trainable(words.original)
        pipe.text_encoder.set_input_embeddings(words.original)
        pipe.register_modules(tokenizer=words.tokenizer)


@torch.no_grad()
def fuse_extensions(pipe: MediSynPipeline) -> None:
    """Make all extensions, at their scales, part of stock layers; the pipeline is then a model that can be saved.

    Raises:
        ValueError: A LoRA lies on one of the layers.
    """
    labels, words = label_wrapper(pipe), word_wrapper(pipe)
    for wrapper, stock in ((labels, nn.Linear), (words, nn.Embedding)):
        if wrapper is not None and type(wrapper.original) not in (stock, type(None)):
            raise ValueError(f"a {type(wrapper.original).__name__} lies on an extended layer: fuse or unload it first")
    if labels is not None:
        base = labels.original
        like = next(iter(labels.blocks().values())).weight if base is None else base.weight
        width = pipe.unet.config.projection_class_embeddings_input_dim
        has_bias = base is None or base.bias is not None  # a stock UNet's projection has one
        linear = nn.Linear(width, like.shape[0], bias=has_bias, device=like.device, dtype=like.dtype)
        weight = torch.zeros(linear.weight.shape, device=like.device)
        if base is not None:
            weight[:, : base.in_features] = base.weight
        for block in labels.blocks().values():
            weight[:, block.columns] += block.scale * block.weight.float()
        linear.weight.copy_(weight)
        if has_bias:
            linear.bias.copy_(torch.zeros_like(linear.bias) if base is None else base.bias)
        labels.restore_trainable(linear)
        pipe.unet.class_embedding = linear
    if words is not None:
        old, table = words.original, words.original.weight
        count = max(old.num_embeddings, words.first_id + len(words.rows))
        embedding = nn.Embedding(count, old.embedding_dim, old.padding_idx, device=table.device, dtype=table.dtype)
        embedding.weight.zero_()[: old.num_embeddings] = table
        embedding.weight[words.first_id : words.first_id + len(words.rows)] = words.table()[words.rows].to(table)
        words.restore_trainable(embedding)
        pipe.text_encoder.set_input_embeddings(embedding)
        pipe.text_encoder.config.vocab_size = count
