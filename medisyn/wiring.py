"""Give a UNet other conditions without losing what it has learned.

- Every weight that still fits is copied. In `encoder_hid_proj`, the layer that tokens pass when their width is not the
  UNet's or when text and images come together, a kind keeps its columns; one that went in directly gets the identity.
- A rewired model starts out as the one it came from: new label projections are zeros, another label schema keeps the
  columns of the values that both have, absent images are masked, and latent channels that were not there read as
  zeros. Two things have to be learned: another text or image encoder, and the pooled tokens beside the time step
  (`addition_embed_type="text"`, as in the presets mini and small) once the width of all tokens together changes, as
  when images join text. That pool normalises over the width and knows no mask, so no copy of its weights could give
  the old values; its new parameters start at random.
- What is newly initialised is returned by name, and so is an encoder that another one replaced.

    add_condition(pipe, LabelsCondition(get_schema("synfundus")))  # ['class_embedding.weight', 'class_embedding.bias']
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from medisyn.conditions import Condition, conditions_of, unet_kwargs
from medisyn.generation.provenance import ADAPTERS
from medisyn.pipelines.medisyn_pipeline import KINDS, MediSynPipeline, label_slots

logger = logging.getLogger(__name__)


def adapt_unet(pipe: MediSynPipeline, conditions: Sequence[Condition]) -> list[str]:
    """Give a pipeline these conditions, and its UNet the latent channels of its autoencoder; works in place.

    Returns:
        The names of newly initialised parameters, "name[:, 4:]" where only these columns are new, then "text_encoder"
        and "image_encoder" where the pipeline had another one. Empty if nothing is new.

    Raises:
        ValueError: a kind occurs twice, or the UNet would have to change while an adapter is on.
    """
    old, channels = pipe.unet, pipe.vae.config.latent_channels
    wanted = unet_kwargs(conditions, old.config.cross_attention_dim)
    wanted |= {"in_channels": channels, "out_channels": channels}
    if old.config.addition_embed_type == "text":  # the heads of the pool share the tokens' width evenly
        heads, width = old.config.addition_embed_type_num_heads, wanted["encoder_hid_dim"]
        wanted["addition_embed_type_num_heads"] = math.gcd(heads, width or old.config.cross_attention_dim)
    changes = {name: value for name, value in wanted.items() if old.config[name] != value}
    widths = {one.kind: width for one in conditions if (width := one.token_width()) is not None}
    schema = next((one.components()["label_schema"] for one in conditions if one.kind == "labels"), None)
    slots, known_slots = (label_slots(one) if one else [] for one in (schema, pipe.label_schema))
    relabelled = bool(slots and known_slots) and slots != known_slots
    new: list[str] = []
    if changes or relabelled:
        if getattr(pipe, ADAPTERS, None) is not None or getattr(pipe.unet, "peft_config", None):
            raise ValueError("The pipeline has adapters on: fuse or unload them before it gets other conditions.")
        arguments = {name: value for name, value in old.config.items() if not name.startswith("_")}
        unet = UNet2DConditionModel(**arguments | changes).to(old.device)
        if unet.dtype != old.dtype:
            unet.to(old.dtype)
        new = _copy_weights(old, unet)
        if unet.config.encoder_hid_dim_type == "text_proj":
            before = _columns({kind: pipe.embeds_width(kind) for kind in pipe.kinds if kind != "labels"})
            new += _copy_projection(old, unet, before, _columns(widths))
        if relabelled:
            new = [name for name in new if name != "class_embedding.weight"]
            new += _copy_labels(old, unet, known_slots, slots)
        pipe.register_modules(unet=unet.train(old.training))

    present = {condition.kind for condition in conditions}
    components = dict.fromkeys(name for name in pipe._optional_components if name != "classifier")
    settings: dict[str, Any] = {"label_schema": None, "image_tokens": "global"}
    settings |= {"image_noise": None} if pipe.config.get("image_noise") else {}
    lost = [] if "text" in present else ["known_words", "prompt_vocabulary"]
    lost += [] if "labels" in present and slots == known_slots else ["prompt_labels"]
    settings |= {name: None for name in lost if pipe.config.get(name)}
    for condition in conditions:
        for name, value in condition.components().items():
            (components if name in components else settings)[name] = value
    encoders = {name: getattr(pipe, name) for name in ("text_encoder", "image_encoder")}
    new += [name for name, had in encoders.items() if had is not None and components[name] not in (had, None)]
    pipe.register_modules(**components)
    pipe.register_to_config(conditions="+".join(kind for kind in KINDS if kind in present) or None, **settings)
    if new:
        logger.info("newly initialised or replaced: %s", ", ".join(new))
    return new


def add_condition(pipe: MediSynPipeline, condition: Condition) -> list[str]:
    """`adapt_unet` with the conditions that the pipeline has and one more, which replaces one of the same kind."""
    kept = [one for one in conditions_of(pipe) if one.kind != condition.kind]
    return adapt_unet(pipe, sorted([*kept, condition], key=lambda one: KINDS.index(one.kind)))


def _columns(widths: Mapping[str, int]) -> dict[str, slice]:
    """Where each kind of token lies along the feature axis: text first, then image."""
    columns, start = {}, 0
    for kind in KINDS:
        if kind in widths:
            columns[kind] = slice(start, start + widths[kind])
            start += widths[kind]
    return columns


@torch.no_grad()
def _copy_weights(old: UNet2DConditionModel, new: UNet2DConditionModel) -> list[str]:
    """Copy all but `encoder_hid_proj`; returns the names of what stays newly initialised."""
    source, fresh = old.state_dict(), []
    for name, target in new.state_dict().items():
        weight = source.get(name)
        if name.startswith("encoder_hid_proj."):
            continue
        if weight is not None and weight.shape == target.shape:
            target.copy_(weight)
        elif name == "conv_in.weight":
            shared = min(weight.shape[1], target.shape[1])
            target.zero_()[:, :shared] = weight[:, :shared]
            fresh += [f"{name}[:, {shared}:]"] if shared < target.shape[1] else []
        elif name in ("conv_out.weight", "conv_out.bias"):
            shared = min(weight.shape[0], target.shape[0])
            target[:shared] = weight[:shared]
            fresh += [f"{name}[{shared}:]"] if shared < target.shape[0] else []
        else:
            fresh.append(name)
    if "class_embedding.weight" in fresh:
        new.class_embedding.weight.zero_()
    if "class_embedding.bias" in fresh:
        new.class_embedding.bias.zero_()
    return fresh


@torch.no_grad()
def _copy_labels(old: UNet2DConditionModel, new: UNet2DConditionModel, old_slots: list, new_slots: list) -> list[str]:
    """Fill `class_embedding` slot by slot; returns what starts at zero."""
    source, target = old.class_embedding.weight, new.class_embedding.weight
    fresh = [i for i, slot in enumerate(new_slots) if slot not in old_slots]
    for i, slot in enumerate(new_slots):
        target[:, i] = 0.0 if i in fresh else source[:, old_slots.index(slot)]
    return [f"class_embedding.weight[:, {i}]" for i in fresh]


@torch.no_grad()
def _copy_projection(
    old: UNet2DConditionModel,
    new: UNet2DConditionModel,
    old_columns: Mapping[str, slice],
    new_columns: Mapping[str, slice],
) -> list[str]:
    """Fill `encoder_hid_proj` kind by kind; returns what stays newly initialised."""
    target, fresh = new.encoder_hid_proj, []
    had_projection = old.config.encoder_hid_dim_type == "text_proj"
    if had_projection:
        target.bias.copy_(old.encoder_hid_proj.bias)
    else:
        target.bias.zero_()
    for kind, columns in new_columns.items():
        block, before = target.weight[:, columns], old_columns.get(kind, slice(0, 0))
        if block.shape[1] != before.stop - before.start:
            fresh.append(f"encoder_hid_proj.weight[:, {columns.start}:{columns.stop}]")
        elif had_projection:
            block.copy_(old.encoder_hid_proj.weight[:, before])
        else:
            block.copy_(torch.eye(*block.shape))
    return fresh
