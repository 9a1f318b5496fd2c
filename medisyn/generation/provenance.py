"""Provenance in the image file: who made this synthetic image, from what, with which seed.

- PNG text chunks, so that the record survives copying and renaming of the file and any PNG reader can show it
  (`exiftool`, `identify -verbose`, `PIL.Image.open(path).text`).
- No date and no absolute path: the same request gives the same bytes on every run and says nothing about the machine.
- Every image says `synthetic=true` and that it is not for diagnosis.

    python -c "from medisyn.generation.provenance import read_provenance as r; print(r('outputs/demo/grid.png'))"
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, PngImagePlugin

import medisyn

if TYPE_CHECKING:
    from ..pipelines.medisyn_pipeline import MediSynPipeline

SOFTWARE = f"medisyn {medisyn.__version__}"
NOTICE = "synthetic image, not for diagnosis"
HASH_DIGITS = 12
ADAPTERS = "_medisyn_adapters"  # attribute of a pipeline that has adapters, see `medisyn.lora`

# Chunks whose value is JSON when read back; all others are text.
_JSON_KEYS = frozenset(
    ("labels", "seed", "num_inference_steps", "guidance_scale", "strength", "width", "height", "synthetic")
    + ("parents", "parent_weights", "parent_labels", "image_noise_level", "guidance_interval", "guidance_rescale")
    + ("classifier_guidance_scale", "classifier_guidance_interval", "classifier_guidance_clip")
)


def write_png(image: Image.Image, path: Path, record: Mapping[str, Any]) -> None:
    """Save an image with its record as text chunks; the file appears whole or not at all.

    Args:
        image: The image to save.
        path: A `.png` file; an existing one is replaced in one step.
        record: Text or JSON-serialisable values; entries that are None are left out.

    Raises:
        OSError: The file cannot be written (for example a full disk); nothing is left behind.
    """
    chunks = PngImagePlugin.PngInfo()
    for key, value in {"software": SOFTWARE, **record, "synthetic": True, "notice": NOTICE}.items():
        if value is not None:
            chunks.add_text(key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    with atomic_file(path) as partial:
        image.save(partial, format="PNG", pnginfo=chunks)


def read_provenance(path: str | Path) -> dict[str, Any]:
    """The record that `write_png` put into an image, with numbers, dictionaries and booleans restored.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a PNG made by medisyn.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no image file {path}")
    try:
        with Image.open(path) as image:
            image.load()  # text chunks may follow the pixels
            chunks = dict(getattr(image, "text", {}))
        if not chunks.get("software", "").startswith("medisyn "):
            raise ValueError("it has no medisyn provenance")
        return {key: json.loads(value) if key in _JSON_KEYS else value for key, value in chunks.items()}
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"cannot read the provenance of {path}: {' '.join(str(error).split())}") from None


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, 12 hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:HASH_DIGITS]


def adapter_hash(pipe: "MediSynPipeline") -> str | None:
    """Identity of the adapters that change a pipeline's images, with their weights; 12 hexadecimal digits.

    None without an adapter, or when it was fused: then it is part of the model's own hash.
    """
    state = getattr(pipe, ADAPTERS, None)
    if state is None:
        return low_rank_hash(pipe)
    active = sorted((each.hash, each.weight) for each in state.adapters.values() if each.weight)
    if not active:
        return None
    return hashlib.sha256(json.dumps(active).encode()).hexdigest()[:HASH_DIGITS]


def low_rank_hash(pipe: "MediSynPipeline") -> str | None:
    """Identity of the LoRA weights in a pipeline (values, rank and alpha); None without any."""
    digest, found = hashlib.sha256(), False
    for component in ("unet", "text_encoder"):
        module = getattr(pipe, component, None)
        for adapter, config in sorted(getattr(module, "peft_config", {}).items()):
            digest.update(f"{component} {adapter} {config.r} {config.lora_alpha}".encode())
        for name, value in sorted(module.state_dict().items()) if module is not None else ():
            if ".lora_" in name:
                found = True
                digest.update(f"{component}.{name}".encode())
                digest.update(value.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:HASH_DIGITS] if found else None


def write_json_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line; the file is replaced in one step, so a reader never sees half of it."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    with atomic_file(path) as partial:
        partial.write_bytes(text.encode("utf-8"))


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a hidden neighbour of `path` to write to, and move it to `path` if the block succeeds.

    The neighbour's name is fixed, so what a killed process leaves behind is overwritten by the next run.

    Raises:
        OSError: The block could not write; the error names `path`.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:  # PIL and write() do not say which file it was
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
