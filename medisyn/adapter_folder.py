"""An adapter as a folder: its files, and `adapter.json`, which says what it belongs to and what it was made of.

    adapters/<name>/
      pytorch_lora_weights.safetensors   LoRA in diffusers' format, with its metadata (alpha, targets)
      norm_weights.safetensors           or differences of scale and shift of normalisation layers
      label_embedding.safetensors        columns of new label fields
      learned_embeds.safetensors         new words, textual-inversion format
      decoder_lora_weights.safetensors   LoRA of the autoencoder's decoder (`medisyn.decoder_adapter`)
      adapter.json                       base model and its hash, conditions, schema, captions, data, numbers
      training_images.json               hashes of the training images
      README.md, samples.png             card and sample grid

- The base is named by `medisyn.backbone.base_hash`, so an adapter on another model is refused, not silently wrong.
- No path of the machine that trained it is written.

    manifest = read_manifest("adapters/knee-osteoarthritis")
    manifest["base_hash"], manifest["captions"][0]
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .generation.provenance import HASH_DIGITS, atomic_file

MANIFEST = "adapter.json"
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
NORM_WEIGHTS = "norm_weights.safetensors"
LABEL_WEIGHTS = "label_embedding.safetensors"
WORD_WEIGHTS = "learned_embeds.safetensors"
DECODER_WEIGHTS = "decoder_lora_weights.safetensors"
WEIGHTS = (LORA_WEIGHTS, NORM_WEIGHTS, LABEL_WEIGHTS, WORD_WEIGHTS, DECODER_WEIGHTS)
SAMPLES = "samples.png"
FORMAT = 1
MOST_CAPTIONS = 24

_TYPES: dict[str, Any] = {
    "format": int,
    "name": str,
    "method": str,
    "base_model": str,
    "base_hash": str,
    "rank": (int, type(None)),
    "alpha": (int, float, type(None)),
    "target_modules": (list, str, type(None)),
    "conditions": list,
    "label_schema": (dict, type(None)),
    "tokens": list,
    "captions": list,
    "training_data": list,
    "metrics": list,
}


def make_manifest(
    name: str,
    method: str,
    base_model: str,
    base_hash: str,
    conditions: Iterable[str],
    *,
    rank: int | None = None,
    alpha: float | None = None,
    target_modules: Iterable[str] | str | None = None,
    label_schema: Mapping[str, Any] | None = None,
    tokens: Iterable[str] = (),
    captions: Iterable[str | None] = (),
    training_data: Iterable[Mapping[str, Any]] = (),
    metrics: Iterable[Mapping[str, Any]] = (),
    built_in_guidance: float | None = None,
) -> dict[str, Any]:
    """The content of `adapter.json`.

    Args:
        name: Of the adapter.
        method: "lora" or "norm".
        base_model: "default", a Hub name or a folder's name, without its path.
        base_hash: `medisyn.backbone.base_hash` of the base.
        conditions: Kinds of condition that the adapted model takes.
        rank: Of a LoRA.
        alpha: Of a LoRA.
        target_modules: Of a LoRA: endings of names, or a regular expression.
        label_schema: `{"name", "fields"}` of the fields that it adds.
        tokens: Words that it adds.
        captions: Of the training images; the most frequent different ones are kept as trigger captions.
        training_data: `{"name", "license", "images"}` for each source.
        metrics: `{"name", "subset", "value", "real", "images", "extractor"}` for each measured number.
        built_in_guidance: Classifier-free guidance that the adapter has learnt, so that it is sampled with 1.
    """
    counted = Counter(caption for caption in captions if caption)
    targets = target_modules if isinstance(target_modules, str | None) else sorted(target_modules)
    return {
        "format": FORMAT,
        "name": name,
        "method": method,
        "base_model": base_model,
        "base_hash": base_hash,
        "rank": rank,
        "alpha": alpha,
        "target_modules": targets,
        "conditions": list(conditions),
        "label_schema": None if label_schema is None else dict(label_schema),
        "tokens": list(tokens),
        "captions": [caption for caption, _ in counted.most_common(MOST_CAPTIONS)],
        "training_data": [dict(each) for each in training_data],
        "metrics": [dict(each) for each in metrics],
        **({} if built_in_guidance is None else {"built_in_guidance": built_in_guidance}),
    }


def write_manifest(folder: str | Path, manifest: Mapping[str, Any]) -> None:
    """Write `adapter.json`, in one step. Raises ValueError for what `read_manifest` would refuse."""
    file = Path(folder) / MANIFEST
    text = json.dumps(_checked(dict(manifest), file), indent=2, ensure_ascii=False) + "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as partial:
        partial.write_bytes(text.encode("utf-8"))


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """The manifest of an adapter's folder; None where there is none, as for a LoRA made by other software.

    Raises:
        ValueError: It is damaged, or of a later format.
    """
    file = Path(folder) / MANIFEST
    if not file.is_file():
        return None
    try:
        manifest = json.loads(file.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {' '.join(str(error).split())}") from None
    return _checked(manifest, file)


def weights_hash(folder: str | Path) -> str:
    """Identity of an adapter: SHA-256 over its weight files, 12 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in WEIGHTS:
        file = Path(folder) / name
        if file.is_file():
            digest.update(f"{name} {file.stat().st_size}".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:HASH_DIGITS]


def _checked(manifest: Any, file: Path) -> dict[str, Any]:
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int):
        raise ValueError(f"{file} is not the description of an adapter")
    if manifest["format"] > FORMAT:
        raise ValueError(f"{file} has format {manifest['format']}; this version of medisyn reads up to {FORMAT}")
    for name, kind in _TYPES.items():
        if name not in manifest or not isinstance(manifest[name], kind):
            what = f"has {name}={manifest[name]!r}" if name in manifest else f"has no entry {name!r}"
            raise ValueError(f"{file} {what}; it is not the description of an adapter")
    if manifest["method"] not in ("lora", "norm"):
        raise ValueError(f"{file} has method={manifest['method']!r}; valid are lora, norm")
    return manifest
