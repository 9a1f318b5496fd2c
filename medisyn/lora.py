"""Adapters on a trained pipeline: load, mix, fuse, remove. How they are trained: `medisyn.adapter_training`.

- A LoRA, or differences of normalisation weights; either may bring label fields and words (`medisyn.extension`) and a
  LoRA of the decoder (`medisyn.decoder_adapter`).
- It belongs to one base, by hash: on another one it is refused. Several mix by weight; `unload_adapters` gives the
  base back bit for bit, `fuse_adapters` makes the mixture the new base.
- The pipeline's own `set_adapters`, `unload_lora_weights` and the like come here when it has adapters, so what it
  remembers is what it draws with; here diffusers' methods are called by their class (`Stock`).

    pipe = medisyn.load_pipeline(adapter="adapters/knee-osteoarthritis")
    set_adapters(pipe, ["knee-osteoarthritis"], [0.7])
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin as Stock
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from . import extension
from .adapter_folder import DECODER_WEIGHTS, LORA_WEIGHTS, NORM_WEIGHTS, read_manifest, weights_hash
from .adapter_training import norm_parameters
from .backbone import base_hash
from .decoder_adapter import (
    decoder_adapters,
    fuse_decoder_adapters,
    load_decoder_lora,
    remove_decoder_adapters,
    set_decoder_adapters,
)
from .generation.provenance import ADAPTERS, low_rank_hash
from .loading import find_adapter, load_pipeline, load_plain_lora, low_rank_names
from .pipelines.medisyn_pipeline import MediSynPipeline
from .prompt_vocabulary import record_vocabulary

logger = logging.getLogger(__name__)


@dataclass
class LoadedAdapter:
    """One adapter of a pipeline.

    Attributes:
        method: "lora", "norm", or "plain" for a LoRA without `adapter.json`.
        weight: Its share of the mixture.
        hash: Identity of its weights.
        manifest: `adapter.json`, where there is one.
        differences: Of a norm adapter: parameter name -> what is added to the base's value at weight 1.
    """

    method: str
    weight: float
    hash: str
    manifest: Mapping[str, Any] | None = None
    differences: Mapping[str, Tensor] | None = None


@dataclass
class _State:
    """What a pipeline remembers while adapters are on it."""

    base_hash: str
    adapters: dict[str, LoadedAdapter]
    originals: dict[str, Tensor]  # the base's values of normalisation parameters that adapters change
    disabled: dict[str, float] | None = None  # the weights before `disable_adapters`


def loaded_adapters(pipe: MediSynPipeline) -> dict[str, LoadedAdapter]:
    """The adapters of a pipeline by name."""
    state: _State | None = getattr(pipe, ADAPTERS, None)
    return {} if state is None else state.adapters


def load_adapter(
    pipe: MediSynPipeline,
    name_or_dir: str | Path,
    weight: float = 1.0,
    adapter_name: str | None = None,
    force: bool = False,
) -> str:
    """Put an adapter onto a pipeline, beside those that it has.

    Args:
        pipe: Its base.
        name_or_dir: An adapter's folder, a LoRA's .safetensors file, or a Hub name.
        weight: Its share, 1 as it was trained; any finite number.
        adapter_name: To call it by; by default that of its `adapter.json`, else of its folder.
        force: Load it onto another base than its own.

    Returns:
        The adapter's name.

    Raises:
        FileNotFoundError: There is no such adapter.
        ValueError: It belongs to another base, is damaged, or its name is taken.
    """
    folder = find_adapter(name_or_dir)
    manifest = read_manifest(folder) if folder.is_dir() else None
    given = Path(name_or_dir).expanduser()  # the folder of a download is named by its hash
    given = given.resolve() if given.is_dir() else given
    default_name = manifest["name"] if manifest else given.name.removesuffix(".safetensors")
    name = re.sub(r"[^\w-]+", "_", adapter_name or default_name)  # peft makes it part of module names: no dots
    if name in loaded_adapters(pipe):
        raise ValueError(f"an adapter named {name!r} is loaded already; unload it or choose another adapter_name")
    if manifest is not None and not force:
        require_base(pipe, manifest, str(name_or_dir))
    state: _State = getattr(pipe, ADAPTERS, None) or _State(base_hash(pipe), {}, {})
    try:
        if manifest is None:
            load_plain_lora(pipe, folder, name)
            adapter = LoadedAdapter("plain", weight, low_rank_hash(pipe))
        else:
            adapter = LoadedAdapter(manifest["method"], weight, weights_hash(folder), manifest)
            extension.load_extension(pipe, folder, manifest, name)
            if (folder / DECODER_WEIGHTS).is_file():
                load_decoder_lora(pipe.vae, folder / DECODER_WEIGHTS, name)
            if manifest["method"] == "norm":
                adapter.differences = _read_differences(pipe, folder)
            elif (folder / LORA_WEIGHTS).is_file():
                Stock.load_lora_weights(pipe, str(folder / LORA_WEIGHTS), adapter_name=name, use_safetensors=True)
                if name not in low_rank_names(pipe):  # diffusers only warns when no key matches
                    raise ValueError(f"{folder / LORA_WEIGHTS} has no weights named 'unet.' or 'text_encoder.'")
            elif name not in decoder_adapters(pipe.vae):
                raise FileNotFoundError(f"{folder} has no {LORA_WEIGHTS}")
    except (TypeError, RuntimeError, SafetensorError) as error:  # TypeError: metadata that peft does not know
        _remove_parts(pipe, name)
        raise ValueError(
            f"adapter {str(name_or_dir)!r} cannot be loaded: {str(error).strip().splitlines()[0]}"
        ) from error
    except BaseException:
        _remove_parts(pipe, name)
        raise
    if manifest is not None and weight and (built_in := manifest.get("built_in_guidance")):
        logger.warning(
            "adapter %s has guidance %g built in: sample with guidance_scale=1 (--guidance 1)", name, built_in
        )
    state.adapters[name] = adapter
    setattr(pipe, ADAPTERS, state)
    _set_again(pipe)
    return name


def record_loras(pipe: MediSynPipeline, swapped: str | None = None) -> None:
    """Take LoRAs that diffusers put beside a pipeline's adapters among them, with the weight 1.

    Args:
        pipe: Has adapters.
        swapped: One of them, if diffusers replaced its weights in place.
    """
    state: _State = getattr(pipe, ADAPTERS)
    for name in sorted(low_rank_names(pipe) - set(state.adapters)):
        state.adapters[name] = LoadedAdapter("plain", 1.0, low_rank_hash(pipe))
    if swapped is not None and swapped in state.adapters:
        state.adapters[swapped].hash = low_rank_hash(pipe)
    _set_again(pipe)


def set_adapters(
    pipe: MediSynPipeline, names: str | Sequence[str], weights: float | Sequence[float | None] | None = None
) -> None:
    """Use these adapters with these weights (1 each by default), and no others.

    Raises:
        ValueError: A name that is not loaded, another number of weights than of names, or weights by part of the
            model.
    """
    names = [names] if isinstance(names, str) else list(names)
    given = [weights] * len(names) if isinstance(weights, (int, float, Mapping, type(None))) else list(weights)
    if any(isinstance(weight, Mapping) for weight in given):
        raise ValueError(f"weights are one number for each adapter, which is recorded with images, not {weights!r}")
    adapters = loaded_adapters(pipe)
    unknown = [name for name in names if name not in adapters]
    if unknown:
        raise ValueError(f"adapter {unknown[0]!r} is not loaded; loaded are: {', '.join(adapters) or 'none'}")
    if len(given) != len(names):
        raise ValueError(f"{len(given)} weights for {len(names)} adapters")
    chosen = {name: 1.0 if weight is None else float(weight) for name, weight in zip(names, given, strict=True)}
    for name, adapter in adapters.items():
        adapter.weight = chosen.get(name, 0.0)
        extension.scale_extension(pipe, name, adapter.weight)
    # without those of weight 0, since DoRA's magnitude does not scale
    present = low_rank_names(pipe)
    low_rank = [name for name, weight in chosen.items() if name in present and weight]
    if low_rank:
        Stock.enable_lora(pipe)
        Stock.set_adapters(pipe, low_rank, [chosen[name] for name in low_rank])
    elif present:
        Stock.disable_lora(pipe)
    set_decoder_adapters(pipe.vae, chosen)
    if (state := getattr(pipe, ADAPTERS, None)) is not None:
        state.disabled = None
        _mix_norms(pipe)


def disable_adapters(pipe: MediSynPipeline) -> None:
    """Set all adapters to weight 0, until `enable_adapters` or `set_adapters`."""
    state: _State | None = getattr(pipe, ADAPTERS, None)
    if state is not None and state.disabled is None:
        weights = {name: adapter.weight for name, adapter in state.adapters.items()}
        set_adapters(pipe, list(weights), 0.0)
        state.disabled = weights


def enable_adapters(pipe: MediSynPipeline) -> None:
    """Give adapters the weights that they had before `disable_adapters`."""
    state: _State | None = getattr(pipe, ADAPTERS, None)
    if state is not None and state.disabled is not None:
        set_adapters(pipe, list(state.disabled), list(state.disabled.values()))


def delete_adapters(pipe: MediSynPipeline, names: str | Sequence[str]) -> None:
    """Take these adapters off and leave the others at their weights. Raises ValueError for one that is not loaded."""
    names, adapters = [names] if isinstance(names, str) else list(names), loaded_adapters(pipe)
    unknown = [name for name in names if name not in adapters]
    if unknown:
        raise ValueError(f"adapter {unknown[0]!r} is not loaded; loaded are: {', '.join(adapters) or 'none'}")
    if set(names) == set(adapters):
        return unload_adapters(pipe)
    for name in set(names):
        del adapters[name]
        _remove_parts(pipe, name)
    return _set_again(pipe)


def unload_adapters(pipe: MediSynPipeline) -> None:
    """Take all adapters off: the base is left as it was, bit for bit."""
    state: _State | None = getattr(pipe, ADAPTERS, None)
    if state is None:
        return
    if low_rank_names(pipe):
        Stock.unload_lora_weights(pipe)
    remove_decoder_adapters(pipe.vae)
    parameters = dict(pipe.unet.named_parameters())
    for name, value in state.originals.items():
        parameters[name].data.copy_(value)
    extension.remove_extension(pipe)
    delattr(pipe, ADAPTERS)


def fuse_adapters(pipe: MediSynPipeline) -> None:
    """Make the adapters part of the weights, with the weights they have now. The result is a model of its own."""
    state: _State | None = getattr(pipe, ADAPTERS, None)
    if state is None:
        return
    present = low_rank_names(pipe)
    active = [name for name, adapter in state.adapters.items() if name in present and adapter.weight]
    if present:
        if active:
            components = [
                part for part in ("unet", "text_encoder") if getattr(getattr(pipe, part), "peft_config", None)
            ]
            pipe.fuse_lora(components=components, adapter_names=active)
        Stock.unload_lora_weights(pipe)
    fuse_decoder_adapters(pipe.vae, {name: adapter.weight for name, adapter in state.adapters.items()})
    extension.fuse_extensions(pipe)
    taught = [one.manifest["captions"] for one in state.adapters.values() if one.manifest and one.weight]
    if taught and pipe.config.get("known_words") is not None:  # its words are the model's own now
        record_vocabulary(pipe, chain(*taught))
    delattr(pipe, ADAPTERS)


def _remove_parts(pipe: MediSynPipeline, name: str) -> None:
    """Take off what was loaded of an adapter before its loading failed."""
    extension.remove_extension(pipe, name)
    remove_decoder_adapters(pipe.vae, name)
    present = low_rank_names(pipe)
    if present - {name}:
        if name in present:
            Stock.delete_adapters(pipe, name)
    elif present:
        Stock.unload_lora_weights(pipe)


def _set_again(pipe: MediSynPipeline) -> None:
    """Bring all parts into line with the weights that are recorded."""
    weights = {name: adapter.weight for name, adapter in loaded_adapters(pipe).items()}
    set_adapters(pipe, list(weights), list(weights.values()))


def require_base(pipe: MediSynPipeline, manifest: Mapping[str, Any], name: str) -> None:
    """Raise ValueError, with both hashes, for an adapter of another base than a pipeline's."""
    under, expected = base_hash(pipe), manifest["base_hash"]
    if under == expected:
        return
    source = pipe.config.get("_name_or_path")
    if pipe.unet.dtype != torch.float32 and source and Path(source).is_dir():
        under = base_hash(load_pipeline(source))  # the hash is that of float32 weights
        if under == expected:
            return
    raise ValueError(
        f"adapter {name!r} was trained on {manifest.get('base_model')} with the hash {expected}; this model has the "
        f"hash {under}. On another base its effect is undefined"
    )


def _read_differences(pipe: MediSynPipeline, folder: Path) -> dict[str, Tensor]:
    if not (folder / NORM_WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} has no {NORM_WEIGHTS}")
    differences, parameters = load_file(folder / NORM_WEIGHTS), norm_parameters(pipe.unet)
    for name, value in differences.items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise ValueError(f"{folder / NORM_WEIGHTS} has {name} {tuple(value.shape)}, which this UNet has not")
    return differences


@torch.no_grad()
def _mix_norms(pipe: MediSynPipeline) -> None:
    """Base value + sum of weight x difference, for every normalisation parameter that an adapter changes."""
    state: _State = getattr(pipe, ADAPTERS)
    parameters = norm_parameters(pipe.unet)
    for adapter in state.adapters.values():
        for name in adapter.differences or ():
            state.originals.setdefault(name, parameters[name].detach().clone())
    for name, original in state.originals.items():
        total = original.float()
        for adapter in state.adapters.values():
            if adapter.differences and name in adapter.differences and adapter.weight:
                total = total + adapter.weight * adapter.differences[name].to(total)
        parameters[name].data.copy_(total)
