"""Training an adapter: what is put beside a frozen base, and how it is written.

- LoRA is peft's, saved in diffusers' format together with its metadata, so that `load_lora_weights` of any stock
  pipeline reads it and alpha is not lost. Norm-only adaptation is the batch-statistics adaptation of Noguchi & Harada
  (ICCV 2019, eq. 2: one scale and one shift for each channel, all else frozen) at the norms of a diffusion UNet.
- An adapter may bring label fields and words that its base never knew (`medisyn.extension`).

    prepare_adapter(pipe, "lora", LoraConfig(rank=8))
    optimizer = torch.optim.AdamW(parameter for parameter in pipe.unet.parameters() if parameter.requires_grad)
    save_adapter(pipe, "adapters/mine", make_manifest("mine", "lora", "default", base_hash, pipe.kinds, rank=8))
"""

import copy
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
from safetensors.torch import save_file
from torch import Tensor, nn

from . import extension
from .adapter_folder import NORM_WEIGHTS, WEIGHTS, write_manifest
from .config import LoraConfig, TextConditionConfig
from .decoder_adapter import TRAINED, decoder_adapters, save_decoder_lora
from .paraphrases import known_phrases
from .pipelines.medisyn_pipeline import MediSynPipeline

PHRASE_COUNT = 5  # how often each phrase of a paraphrase counts where words are looked for
logger = logging.getLogger(__name__)
_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def lora_facts(lora: LoraConfig | None) -> dict[str, Any]:
    """What `make_manifest` is told of a LoRA; empty for None."""
    if lora is None:
        return {}
    return {"rank": lora.rank, "alpha": lora.alpha or lora.rank, "target_modules": lora.target_modules}


def sharing_copy(network: nn.Module) -> nn.Module:
    """A copy on the same weights: what is put beside the layers of one, as a LoRA is, leaves the other as it was."""
    return copy.deepcopy(network, {id(each): each for each in (*network.parameters(), *network.buffers())})


def teach_words(
    pipe: MediSynPipeline, condition: TextConditionConfig, captions: Sequence[str | None], name: str = TRAINED
) -> None:
    """Put the `new_words` of a text condition into a pipeline's tokenizer, with embeddings that are learned.

    Args:
        pipe: Changed in place.
        condition: Its words, or "auto" for those of the captions that the tokenizer has never seen.
        captions: Of the training images.
        name: Of the adapter.
    """
    words: Sequence[str] = condition.new_words
    if words == "auto":
        paraphrases = known_phrases() if condition.paraphrase else []
        known = [caption for caption in captions if caption]
        words = extension.new_words([*known, *PHRASE_COUNT * paraphrases], pipe.tokenizer)
        logger.info("new words: %s", ", ".join(words) or "none")
    extension.extend_words(pipe, words, name)


def prepare_adapter(pipe: MediSynPipeline, method: str, options: LoraConfig | None = None) -> None:
    """Freeze a pipeline and put a trainable adapter into it: what then requires a gradient is the adapter.

    Args:
        pipe: The base; its UNet (and text encoder) are changed in place.
        method: "lora" or "norm".
        options: Of the LoRA.

    Raises:
        ValueError: An unknown method, or `target_modules` that match nothing in the model.
    """
    for module in (pipe.unet, pipe.text_encoder, pipe.image_encoder):
        if module is not None:
            module.requires_grad_(False)
    if method == "norm":
        for parameter in norm_parameters(pipe.unet).values():
            parameter.requires_grad_(True)
        return
    if method != "lora":
        raise ValueError(f"method {method!r} is not one of: lora, norm")
    options = options or LoraConfig()
    _inject(pipe.unet, options.target_modules, options, "target_modules")
    if options.text_encoder:
        if pipe.text_encoder is None:
            raise ValueError("lora.text_encoder: this model has no text encoder")
        _inject(pipe.text_encoder, options.text_encoder_target_modules, options, "text_encoder_target_modules")


def norm_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Scale and shift of all normalisation layers, by name."""
    return {
        f"{name}.{part}": parameter
        for name, layer in module.named_modules()
        if isinstance(layer, _NORMS)
        for part, parameter in layer.named_parameters(recurse=False)
    }


def _inject(module: Any, targets: str | Sequence[str], options: LoraConfig, option: str) -> None:
    names = [name for name, layer in module.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    matching: set[str] = set()
    for pattern in [targets] if isinstance(targets, str) else targets:
        if isinstance(targets, str):
            matches = {name for name in names if re.fullmatch(pattern, name)}
        else:
            matches = {name for name in names if name == pattern or name.endswith(f".{pattern}")}
        matching |= matches
        if not matches:
            endings = sorted({re.sub(r"^.*?([^.]+(\.\d+)?)$", r"\1", name) for name in names})
            raise ValueError(
                f"lora.{option}: {pattern!r} matches no layer of the {type(module).__name__}; "
                f"layers end in: {', '.join(endings)}"
            )
    config = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.rank if options.alpha is None else options.alpha,
        target_modules=targets if isinstance(targets, str) else list(targets),
        lora_dropout=options.dropout,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        # under new label fields that layer's name is not the one that it has in a stock UNet
        exclude_modules=[name for name in matching if name.startswith("class_embedding.")] or None,
    )
    module.add_adapter(config, adapter_name=TRAINED)


def save_adapter(
    pipe: MediSynPipeline,
    folder: str | Path,
    manifest: Mapping[str, Any],
    originals: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapter that `prepare_adapter` put into a pipeline, with `adapter.json`.

    Args:
        pipe: The adapted pipeline.
        folder: Is created; weight files in it are replaced.
        manifest: See `medisyn.adapter_folder.make_manifest`.
        originals: Of a norm adapter: the base's values of `norm_parameters`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in WEIGHTS:
        (folder / name).unlink(missing_ok=True)  # of an earlier run with other options
    if manifest["method"] == "norm":
        now = norm_parameters(pipe.unet)
        differences = {
            name: now[name].detach().float().cpu() - value.float().cpu() for name, value in originals.items()
        }
        save_file(differences, folder / NORM_WEIGHTS, metadata={"format": "pt"})
    else:
        arguments: dict[str, Any] = {}
        for part in ("unet", "text_encoder"):
            module = getattr(pipe, part)
            config = getattr(module, "peft_config", {}).get(TRAINED)
            if config is not None:
                config.base_model_name_or_path = None  # the path of this machine; the manifest names the base
                config.exclude_modules = None  # of use at the injection only; peft would warn at each loading
                # peft's own names: diffusers' older ones cover attention alone, and its loader takes no mixture
                arguments[f"{part}_lora_layers"] = peft.get_peft_model_state_dict(module, adapter_name=TRAINED)
                arguments[f"{part}_lora_adapter_metadata"] = config.to_dict()  # without it alpha would become the rank
        if arguments:
            pipe.save_lora_weights(folder, **arguments)
    if TRAINED in decoder_adapters(pipe.vae):
        save_decoder_lora(pipe.vae, folder)
    extension.save_extension(pipe, folder, TRAINED)
    write_manifest(folder, manifest)
