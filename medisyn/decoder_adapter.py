"""LoRA on the decoder of an autoencoder: the part of an adapter that draws the texture of a specialty.

- An autoencoder draws the texture of what it was trained on. With a frozen encoder its latents, and all models on
  them, stay valid, while the decoder learns the texture of another specialty (`task: autoencoder` with `lora:`).
- Any stock autoencoder: peft's layers are put into `vae.decoder` itself, since `AutoencoderDC` has no adapter methods.
- In a file of its own beside diffusers' LoRA file, so that a stock `load_lora_weights` reads the rest as ever.

    add_decoder_lora(pipe.vae, DecoderLoraConfig(rank=16))
    save_decoder_lora(pipe.vae, "adapters/mine")
    load_decoder_lora(other.vae, "adapters/mine/decoder_lora_weights.safetensors", "mine")
"""

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from diffusers.utils import peft_utils
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from .adapter_folder import DECODER_WEIGHTS, read_manifest
from .autoencoders import Autoencoder
from .config_parts import DecoderLoraConfig
from .loading import find_adapter

TRAINED = "default"  # name of the adapter that is being trained


def add_decoder_lora(vae: Autoencoder, options: DecoderLoraConfig) -> None:
    """Freeze an autoencoder and put a trainable LoRA on every convolution and linear layer of its decoder."""
    vae.requires_grad_(False)
    targets = [name for name, layer in vae.decoder.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    config = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.rank if options.alpha is None else options.alpha,
        target_modules=targets,
        lora_dropout=options.dropout,
        use_rslora=options.use_rslora,
    )
    peft.inject_adapter_in_model(config, vae.decoder, adapter_name=TRAINED)


def decoder_adapters(vae: Autoencoder) -> set[str]:
    """The names under which a decoder holds LoRA weights."""
    return set(getattr(vae.decoder, "peft_config", {}))


def save_decoder_lora(vae: Autoencoder, folder: str | Path, name: str = TRAINED) -> None:
    """Write the LoRA of a decoder, with rank, alpha and targets in the file's metadata."""
    config = vae.decoder.peft_config[name]
    options = {"r": config.r, "lora_alpha": config.lora_alpha, "use_rslora": config.use_rslora}
    options["target_modules"] = sorted(config.target_modules)
    weights = peft.get_peft_model_state_dict(vae.decoder, adapter_name=name)
    weights = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    save_file(weights, Path(folder) / DECODER_WEIGHTS, metadata={"lora": json.dumps(options)})


def find_decoder_lora(name_or_dir: str | Path, base_hash: str) -> Path:
    """The file of the decoder's LoRA of an adapter or run.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it belongs to another base than the one with this `base_hash`.
    """
    folder = find_adapter(name_or_dir)
    file = folder / DECODER_WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(f"{name_or_dir} has no {DECODER_WEIGHTS}")
    manifest = read_manifest(folder)
    if manifest is not None and manifest["base_hash"] != base_hash:
        raise ValueError(
            f"the decoder of {name_or_dir} was adapted on a base with the hash {manifest['base_hash']}; this base has "
            f"the hash {base_hash}"
        )
    return file


def load_decoder_lora(vae: Autoencoder, file: str | Path, name: str) -> None:
    """Put a saved LoRA on a decoder, frozen and at weight 1.

    Raises:
        ValueError: The file is not one that `save_decoder_lora` wrote, or it belongs to another decoder.
    """
    with safe_open(file, framework="pt") as opened:
        options: dict[str, Any] | None = json.loads((opened.metadata() or {}).get("lora", "null"))
    if options is None:
        raise ValueError(f"{file} has no description of its LoRA; it is not a decoder's")
    weights = load_file(file)
    flags = [(parameter, parameter.requires_grad) for parameter in vae.decoder.parameters()]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are meant
        peft.inject_adapter_in_model(peft.LoraConfig(**options), vae.decoder, adapter_name=name)
    result = peft.set_peft_model_state_dict(vae.decoder, weights, adapter_name=name)
    strangers = [*result.unexpected_keys, *(key for key in result.missing_keys if f".{name}." in key)]
    if strangers:
        raise ValueError(f"{file} does not fit this decoder: {strangers[0]}")
    for parameter, flag in flags:  # peft freezes all, and kernels (the last bits of images) go by it
        parameter.requires_grad_(flag)
    _freeze(vae, [name])


def set_decoder_adapters(vae: Autoencoder, weights: Mapping[str, float]) -> None:
    """Mix the LoRAs of a decoder with these weights; one that is not named, or has weight 0, is off."""
    chosen = {name: weight for name, weight in weights.items() if weight and name in decoder_adapters(vae)}
    if chosen:
        peft_utils.set_adapter_layers(vae.decoder, enabled=True)
        peft_utils.set_weights_and_activate_adapters(vae.decoder, list(chosen), list(chosen.values()))
        _freeze(vae, chosen)  # peft makes what is active trainable
    elif decoder_adapters(vae):
        peft_utils.set_adapter_layers(vae.decoder, enabled=False)


def remove_decoder_adapters(vae: Autoencoder, name: str | None = None) -> None:
    """Take one LoRA, or all, off a decoder, which is then what it was before, bit for bit."""
    remaining = decoder_adapters(vae) - {name} if name is not None else set()
    if remaining:
        if name in decoder_adapters(vae):
            peft_utils.delete_adapter_layers(vae.decoder, name)
            vae.decoder.peft_config.pop(name, None)
    elif decoder_adapters(vae):
        peft_utils.recurse_remove_peft_layers(vae.decoder)
        del vae.decoder.peft_config


@torch.no_grad()
def fuse_decoder_adapters(vae: Autoencoder, weights: Mapping[str, float]) -> None:
    """Make the LoRAs of a decoder part of its weights, mixed as `set_decoder_adapters` does."""
    set_decoder_adapters(vae, weights)
    active = [name for name, weight in weights.items() if weight and name in decoder_adapters(vae)]
    for layer in vae.decoder.modules():
        if active and isinstance(layer, BaseTunerLayer):
            layer.merge(safe_merge=True, adapter_names=[name for name in active if name in layer.lora_A])
    remove_decoder_adapters(vae)


def _freeze(vae: Autoencoder, names: Iterable[str]) -> None:
    """No gradient for these LoRAs, in the precision of the autoencoder."""
    for key, parameter in vae.decoder.named_parameters():
        if any(f".{name}." in key for name in names):
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(vae.dtype)
