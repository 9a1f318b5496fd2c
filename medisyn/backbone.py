"""Pipelines to be trained: presets built from scratch, and trained models with other conditions.

- A preset is data: an autoencoder, a UNet and a scheduler, all stock diffusers classes. The latent size follows from
  the autoencoder, so another one can be put into any preset.
- A trained start (`medisyn.loading`) gets other conditions by `medisyn.wiring`, which keeps the weights that fit and
  reports what is new.

    pipe = create_pipeline("mini", conditions=["text", "labels:synfundus"])
    pipe = create_pipeline("stable-diffusion-v1-5/stable-diffusion-v1-5", conditions=["text", "labels:synfundus"])
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel

from medisyn.autoencoders import Autoencoder
from medisyn.conditions import (
    Condition,
    ImageCondition,
    LabelsCondition,
    NoCondition,
    TextCondition,
    conditions_of,
    get_condition,
    get_schema,
    unet_kwargs,
)
from medisyn.generation.provenance import ADAPTERS
from medisyn.loading import is_hub_name, load_autoencoder, load_pipeline
from medisyn.pipelines.medisyn_pipeline import MediSynPipeline
from medisyn.prompts import choose, vocabulary
from medisyn.wiring import adapt_unet, add_condition

__all__ = [
    "PRESETS",
    "Preset",
    "adapt_unet",
    "add_condition",
    "base_hash",
    "create_autoencoder",
    "create_pipeline",
    "load_autoencoder",
    "load_pipeline",
    "model_hash",
]


@dataclass(frozen=True)
class Preset:
    """Configurations of the parts of a pipeline, as arguments of their stock classes."""

    resolution: int  # pixels
    autoencoder_class: type[Autoencoder]
    autoencoder: Mapping[str, Any]
    unet: Mapping[str, Any]
    scheduler: Mapping[str, Any]  # of DPMSolverMultistepScheduler
    pools_text: bool  # whether text also enters pooled, beside the time step (addition_embed_type="text")


def _deterministic_autoencoder(channels: tuple[int, ...]) -> dict[str, Any]:
    """DC-AE (Chen et al. 2024, arXiv 2410.10733), no layers at full resolution, no shortcut past the code."""
    layers, scales = (0, 2, 2, 2), ((), (), (), ())
    sides = {"block_types": "ResBlock", "block_out_channels": channels, "layers_per_block": layers}
    sides |= {"qkv_multiscales": scales}
    options = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()}
    return options | {"latent_channels": 16, "encoder_out_shortcut": False, "decoder_in_shortcut": False}


_COSINE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "solver_order": 2}

PRESETS: dict[str, Preset] = {
    "mini": Preset(
        resolution=128,  # latents 16 x 16 x 16
        autoencoder_class=AutoencoderDC,
        autoencoder=_deterministic_autoencoder((32, 64, 128, 128)),
        unet={
            "block_out_channels": (96, 128, 176),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 192,
            "attention_head_dim": 4,  # in a UNet2DConditionModel this is the number of heads
            "resnet_time_scale_shift": "scale_shift",
            "norm_num_groups": 16,
        },
        scheduler=_COSINE,
        pools_text=True,
    ),
    "mini-wide": Preset(
        resolution=128,  # of "mini", twice the weights: what 32 MB hold with the UNet's matrices in 8 bits
        autoencoder_class=AutoencoderDC,
        autoencoder=_deterministic_autoencoder((32, 64, 128, 128)),
        unet={
            "block_out_channels": (128, 160, 192),
            "layers_per_block": (2, 2, 1),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 192,
            "attention_head_dim": 4,
            "resnet_time_scale_shift": "scale_shift",
            "norm_num_groups": 16,
        },
        scheduler=_COSINE,
        pools_text=True,
    ),
    "small": Preset(
        resolution=256,  # latents 32 x 32 x 16
        autoencoder_class=AutoencoderDC,
        autoencoder=_deterministic_autoencoder((64, 128, 256, 256)),
        unet={
            "block_out_channels": (128, 256, 384, 384),
            "layers_per_block": 2,
            "down_block_types": ("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 384,
            "attention_head_dim": 8,
            "resnet_time_scale_shift": "scale_shift",
        },
        scheduler=_COSINE,
        pools_text=True,
    ),
    "sd": Preset(
        resolution=512,  # latents 64 x 64 x 4; Rombach et al. 2022, the shape of Stable Diffusion 1.x
        autoencoder_class=AutoencoderKL,
        autoencoder={
            "block_out_channels": (128, 256, 512, 512),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "layers_per_block": 2,
            "latent_channels": 4,
            "sample_size": 512,
            "scaling_factor": 0.18215,
        },
        unet={
            "block_out_channels": (320, 640, 1280, 1280),
            "layers_per_block": 2,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
        scheduler={
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "prediction_type": "epsilon",
            "steps_offset": 1,
        },
        pools_text=False,
    ),
}


# ---- from scratch, or from a trained start ----


def create_pipeline(
    preset: str = "mini",
    conditions: Sequence[Condition | str] = (),
    vae: Autoencoder | str | Path | None = None,
) -> MediSynPipeline:
    """A pipeline to be trained.

    Args:
        preset: a preset's name for a model from scratch (seed torch first where its weights must be reproducible),
            or a folder or Hub name to start from, whose UNet is then adapted.
        conditions: `Condition` objects, or names: "text:<encoder>", "image:<encoder>", "labels:<schema>". A bare
            kind is the start's own condition; where there is none, "text" is a small new encoder with a tokenizer of
            `medisyn.prompts`. Empty: unconditional, or those of the start.
        vae: an autoencoder, or the folder or Hub name of one; by default the preset's or the start's own.

    Raises:
        ValueError: an unknown preset, condition or schema.
        OSError: a folder or repository that is not there.
    """
    vae = load_autoencoder(vae) if isinstance(vae, (str, Path)) else vae
    if preset not in PRESETS:
        if not Path(preset).exists() and not is_hub_name(preset):
            choose("preset, folder or Hub name", str(preset), PRESETS)
        pipe = load_pipeline(preset)
        if vae is not None:
            pipe = MediSynPipeline(**pipe.components | {"vae": vae}, **_settings(pipe))
        width = pipe.unet.config.cross_attention_dim
        if conditions or pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
            adapt_unet(pipe, [_condition(one, width, pipe) for one in conditions] or conditions_of(pipe))
        return pipe

    shape = PRESETS[preset]
    vae = create_autoencoder(preset) if vae is None else vae
    width = shape.unet["cross_attention_dim"]
    chosen = [_condition(one, width) for one in conditions]
    wiring = unet_kwargs(chosen, width)
    if shape.pools_text and any(condition.kind == "text" for condition in chosen):
        heads = max(number for number in (1, 2, 4) if (wiring["encoder_hid_dim"] or width) % number == 0)
        wiring |= {"addition_embed_type": "text", "addition_embed_type_num_heads": heads}
    stages = vae.config.get("block_out_channels") or vae.config.encoder_block_out_channels
    latents = {"sample_size": shape.resolution // 2 ** (len(stages) - 1)}
    latents |= dict.fromkeys(("in_channels", "out_channels"), vae.config.latent_channels)
    components = {name: value for condition in chosen for name, value in condition.components().items()}
    return MediSynPipeline(
        vae=vae,
        unet=UNet2DConditionModel(**{**shape.unet, **latents, **wiring}),
        scheduler=DPMSolverMultistepScheduler(**shape.scheduler),
        **components,
    )


def create_autoencoder(preset: str = "mini") -> Autoencoder:
    """The autoencoder of a preset, from scratch. Raises ValueError for an unknown preset."""
    shape = PRESETS[choose("preset", preset, PRESETS)]
    return shape.autoencoder_class(**shape.autoencoder)


def _settings(pipe: MediSynPipeline) -> dict[str, Any]:
    names = ["label_schema", "image_tokens", "conditions", "image_noise", "known_words"]
    names += ["prompt_labels", "prompt_vocabulary"]
    return {name: pipe.config[name] for name in names if name in pipe.config}


def _condition(condition: Condition | str, width: int, start: MediSynPipeline | None = None) -> Condition:
    if not isinstance(condition, str):
        return condition
    kind, _, name = condition.partition(":")
    condition_class = get_condition(kind)  # raises for an unknown kind
    if not name and start is not None and kind in start.kinds:
        return condition_class.from_pipeline(start)
    if kind == "text" and not name:
        return TextCondition.from_captions(vocabulary(), hidden_size=width)
    if kind == "text":
        return TextCondition.from_pretrained(name)
    if kind == "image":
        return ImageCondition.from_pretrained(name or "facebook/dinov2-base")
    return LabelsCondition(get_schema(name or "corpus_fundus")) if kind == "labels" else NoCondition()


def model_hash(pipe: MediSynPipeline) -> str:
    """12 hex digits that name a model: its weights, latent scale, label schema, classes and prediction type.

    Adapters that are loaded but not fused do not change it; they have a hash of their own.
    """
    base, classifier = base_hash(pipe), pipe.classifier
    if classifier is None:
        return base
    digest = hashlib.blake2b(digest_size=6)
    digest.update(json.dumps([base, list(classifier.classes), list(classifier.config.temperatures)]).encode())
    _add_weights(digest, "classifier", classifier)
    return digest.hexdigest()


def base_hash(pipe: MediSynPipeline) -> str:
    """What adapters know their base by: the `model_hash` without a latent classifier, which they do not touch."""
    if (adapted := getattr(pipe, ADAPTERS, None)) is not None:
        return adapted.base_hash
    scale = {name: pipe.vae.config.get(name) for name in ("scaling_factor", "shift_factor")}
    digest = hashlib.blake2b(digest_size=6)
    facts = [scale, pipe.label_schema, pipe.scheduler.config.get("prediction_type")]
    facts += [pipe.config[name] for name in ("image_noise",) if name in pipe.config]  # others keep their old hash
    digest.update(json.dumps(facts).encode())
    for component in ("vae", "unet", "text_encoder", "image_encoder"):
        if (module := getattr(pipe, component)) is not None:
            _add_weights(digest, component, module)
    return digest.hexdigest()


@torch.no_grad()
def _add_weights(digest: "hashlib.blake2b", component: str, module: torch.nn.Module) -> None:
    weights = {name.replace(".base_layer.", "."): v for name, v in module.state_dict().items() if ".lora_" not in name}
    for name, value in sorted(weights.items()):
        digest.update(f"{component}.{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
