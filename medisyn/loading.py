"""Trained models and adapters of a folder or the Hub (`medisyn.hub`).

- A Stable-Diffusion-family repository becomes a `MediSynPipeline`; its safety checker is left out.
- Only safetensors are read: pickled weights can run any code when they are read.

    pipe = load_pipeline("runs/chest/pipeline", adapter="adapters/pneumonia")
    pipe = load_pipeline("stable-diffusion-v1-5/stable-diffusion-v1-5", adapter={"owner/lora": 0.8})
"""

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TypeAlias

import torch
from diffusers import AutoModel
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError

from medisyn.autoencoders import Autoencoder
from medisyn.hub import (
    ADAPTER_MARKS,
    INDEX,
    PICKLES,
    WITH_WEIGHTS,
    adapter_files,
    autoencoder_files,
    first_line,
    from_hub,
    is_hub_name,
    model_files,
    pickled_only,
    split_revision,
    without_index,
)
from medisyn.pipelines.medisyn_pipeline import MediSynPipeline
from medisyn.prompts import choose

__all__ = [
    "Adapters",
    "base_name",
    "find_adapter",
    "is_hub_name",
    "load_autoencoder",
    "load_pipeline",
    "load_plain_lora",
    "low_rank_names",
]

Adapters: TypeAlias = str | Path | Sequence[str | Path] | Mapping[str, float]


# ---- models ---------------------------------------------------------------------------------------------------------

DEFAULT = "default"  # names the embedded model where a name is needed


def load_pipeline(
    name_or_dir: str | Path | None = None,
    adapter: Adapters | None = None,
    dtype: torch.dtype | str | None = None,
) -> MediSynPipeline:
    """A trained pipeline: the one embedded in the package, or that of a folder or Hub name.

    Args:
        name_or_dir: a folder with `model_index.json`, a run folder with `pipeline/`, or a Hub name "owner/model" or
            "owner/model@revision" of a MediSyn or Stable-Diffusion-family model. None or "default": the embedded one.
        adapter: what to load on top (`medisyn.lora`): a folder, a .safetensors file or a Hub name; several of them; or
            a mapping of such names to weights.
        dtype: of all components, also as a name ("bfloat16"); float32 by default.

    Raises:
        FileNotFoundError: no such model or adapter; the message lists what was tried and says why.
        PermissionError: a gated Hub repository.
        ValueError: a model of another family, or one with pickled weights only.
    """
    precision: torch.dtype | None = (
        getattr(torch, choose("dtype", dtype, ("float32", "bfloat16", "float16"))) if isinstance(dtype, str) else dtype
    )
    name = DEFAULT if name_or_dir is None else name_or_dir
    pipe = _load_folder(_embedded_folder() if str(name) == DEFAULT else _find_model(name), precision)
    if adapter is not None:
        _load_adapters(pipe, adapter)
    return pipe


def load_autoencoder(name_or_dir: str | Path) -> Autoencoder:
    """The autoencoder of a folder or Hub name: a pipeline's, a run's (`vae/`) or one by itself; or "default".

    Raises:
        FileNotFoundError, PermissionError: as for `load_pipeline`.
        ValueError: another kind of component, or pickled weights only.
    """
    name = str(name_or_dir)
    folder = _embedded_folder() if name == DEFAULT else Path(name_or_dir).expanduser()
    places = [folder / "pipeline" / "vae", folder / "vae", folder]
    found = next((place for place in places if (place / "config.json").is_file()), None)
    if found is None:
        if folder.exists() or not is_hub_name(name):
            raise FileNotFoundError(f"no autoencoder {name!r}; tried: {', '.join(map(str, places))}")
        marks = ("vae/config.json", "config.json")
        downloaded = from_hub("autoencoder", name, lambda files: autoencoder_files(name, files), marks, places)
        found = downloaded / "vae" if (downloaded / "vae" / "config.json").is_file() else downloaded
    _require_safetensors(found)
    vae = AutoModel.from_pretrained(str(found), use_safetensors=True)
    if not isinstance(vae, Autoencoder):
        raise ValueError(f"{name!r} holds a {type(vae).__name__}; valid are AutoencoderKL and AutoencoderDC")
    return vae


def base_name(name_or_dir: str) -> str:
    """How a base is named to others: "default", a Hub name, or a folder without the path to it."""
    folder = Path(name_or_dir).expanduser()
    if not folder.exists():
        return name_or_dir
    folder = folder.resolve()
    return folder.parent.name if folder.name == "pipeline" else folder.name


def _embedded_folder() -> Path:
    folder = _model_folder(Path(str(resources.files("medisyn"))) / "pretrained")
    if folder is None:
        raise FileNotFoundError(
            "no embedded model (medisyn/pretrained) in this installation; name a folder or Hub model"
        )
    return folder


def _model_folder(folder: Path) -> Path | None:
    """The folder itself or its `pipeline/`, whichever holds a pipeline."""
    return next((place for place in (folder, folder / "pipeline") if (place / INDEX).is_file()), None)


def _find_model(name_or_dir: str | Path) -> Path:
    """The local folder of a model, downloaded if need be."""
    name, folder = str(name_or_dir), Path(name_or_dir).expanduser()
    found = _model_folder(folder)
    if found is not None:
        return found
    tried = [folder / INDEX, folder / "pipeline" / INDEX]
    if any((place / mark).is_file() for place in (folder, folder / "adapter") for mark in ADAPTER_MARKS[:2]):
        raise ValueError(without_index(name, ADAPTER_MARKS))
    if folder.exists() or not is_hub_name(name):
        reason = "" if folder.exists() else "; nor is it a Hub name of the form owner/model"
        raise FileNotFoundError(f"no model {name!r}; tried: {', '.join(map(str, tried))}{reason}")

    def wanted(files: Sequence[str]) -> list[str]:
        if INDEX not in files:
            raise ValueError(without_index(name, files))
        repository, revision = split_revision(name)
        parts = _components(Path(hf_hub_download(repository, INDEX, revision=revision)))
        return [INDEX, *model_files(name, files, parts)]

    return from_hub("model", name, wanted, (INDEX,), tried)


def _components(index_file: Path) -> dict[str, str]:
    """Component names to class names of an index. Raises ValueError if no `MediSynPipeline` can be made of them."""
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
        index.pop("_class_name")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index_file} is not a pipeline's index: {error!r}") from error
    pairs = {name: value for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    parts = {name: part for name, (_, part) in pairs.items() if part}
    valid = {"unet": ("UNet2DConditionModel",), "vae": ("AutoencoderKL", "AutoencoderDC")}
    if "text_encoder_2" in parts or any(parts.get(name) not in classes for name, classes in valid.items()):
        held = ", ".join(f"{name}: {part}" for name, part in sorted(parts.items()))
        raise ValueError(
            f"{index_file.parent} is not a MediSyn or Stable Diffusion 1.x/2.x model (a UNet2DConditionModel, an "
            f"AutoencoderKL or AutoencoderDC, at most one text encoder); it holds {held or 'no components'}"
        )
    return parts


def _load_folder(folder: Path, dtype: torch.dtype | None) -> MediSynPipeline:
    parts = _components(folder / INDEX)
    for name in WITH_WEIGHTS:
        if name in parts:
            _require_safetensors(folder / name)
    class_name = json.loads((folder / INDEX).read_text(encoding="utf-8"))["_class_name"]
    foreign = {}
    if (class_name[-1] if isinstance(class_name, list) else class_name) != MediSynPipeline.__name__:
        foreign = {"image_encoder": None, "feature_extractor": None}  # of its safety checker or an IP-Adapter
    try:
        return MediSynPipeline.from_pretrained(folder, dtype=dtype, use_safetensors=True, **foreign)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be loaded: {first_line(error)}") from error


def _require_safetensors(folder: Path) -> None:
    """Raise for a component without safetensors."""
    names = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    if not any(name.endswith(".safetensors") for name in names):
        pickles = [name for name in names if name.endswith(PICKLES)]
        if pickles:
            raise ValueError(pickled_only(str(folder), pickles))
        raise FileNotFoundError(f"{folder} has no weights: no .safetensors file is there")


# ---- adapters -------------------------------------------------------------------------------------------------------


def _load_adapters(pipe: MediSynPipeline, adapter: Adapters) -> None:
    from medisyn.lora import load_adapter

    names = [adapter] if isinstance(adapter, str | Path) else adapter
    weights = adapter if isinstance(adapter, Mapping) else dict.fromkeys(names, 1.0)
    for name, weight in weights.items():
        load_adapter(pipe, name, weight=weight)


def find_adapter(name_or_dir: str | Path) -> Path:
    """The local folder (of a run: its `adapter/`) or .safetensors file of an adapter, downloaded if it is a Hub name.

    Raises:
        FileNotFoundError: there is none; the message says why.
        PermissionError: a gated Hub repository.
        ValueError: it is a whole model, or has pickled weights only.
    """
    name, place = str(name_or_dir), Path(name_or_dir).expanduser()
    if place.exists():
        place = place / "adapter" if (place / "adapter" / "adapter.json").is_file() else place
        files = [file.name for file in place.iterdir()] if place.is_dir() else [place.name]
        adapter_files(name, files)
        return place
    if not is_hub_name(name):
        valid = "a folder, a .safetensors file or a Hub name owner/adapter"
        raise FileNotFoundError(f"no adapter {name!r}; valid are {valid}")
    return from_hub("adapter", name, lambda files: adapter_files(name, files), ADAPTER_MARKS, [place])


def load_plain_lora(pipe: MediSynPipeline, name_or_dir: str | Path, adapter_name: str | None = None) -> str:
    """Load the LoRA of a folder or .safetensors file that has no `adapter.json`; returns the name it got.

    Raises:
        FileNotFoundError, PermissionError: there is none; the message says why.
        ValueError: it is damaged, pickled, or not for a UNet or text encoder in diffusers' format.
    """
    place = find_adapter(name_or_dir)
    before = low_rank_names(pipe)
    try:
        pipe.load_lora_weights(str(place), use_safetensors=True, adapter_name=adapter_name)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"adapter {str(name_or_dir)!r} cannot be loaded: {first_line(error)}") from error
    new = low_rank_names(pipe) - before
    if not new:  # diffusers only warns when no key matches
        raise ValueError(f"adapter {str(name_or_dir)!r} has no weights named 'unet.' or 'text_encoder.'")
    return new.pop()


def low_rank_names(pipe: MediSynPipeline) -> set[str]:
    """The names under which a pipeline holds LoRA weights."""
    return {name for names in pipe.get_list_adapters().values() for name in names}
