"""LoRA on tiny pipelines: what the tests of adapters build, draw and compare.

- `build` makes the models of `MODELS`; `add_lora` attaches random weights, so that an adapter has an effect
- images are small arrays of two steps from one seed; the base's own are drawn once

    pipe = add_lora(build("text+labels"), ("unet",), rank_pattern={"to_k": 2})
    assert all_differ(draw(pipe), base("text+labels"))
"""

import functools
import itertools

import numpy as np
import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer

from medisyn.pipelines.medisyn_pipeline import MediSynPipeline
from tests.components import tiny_pipeline

BOTH = ("unet", "text_encoder")
PARTS = [("unet",), ("text_encoder",), BOTH]
TARGETS = {"unet": ["to_q", "to_k", "to_v", "to_out.0"], "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"]}
MODELS = {"text": (("text",), "kl"), "text+labels": (("text", "labels"), "dc"), "labels": (("labels",), "kl")}
WEIGHTS = "pytorch_lora_weights.safetensors"
QUERY = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def build(model="text"):
    kinds, vae = MODELS[model]
    return tiny_pipeline(kinds, vae=vae)


def add_lora(pipe, parts=BOTH, name="default", seed=0, **options):
    """Attach a LoRA with random weights, so that it has an effect."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for part in parts:
            given = {"r": 4, "lora_alpha": 4, "target_modules": TARGETS[part], "init_lora_weights": False} | options
            getattr(pipe, part).add_adapter(LoraConfig(**given), adapter_name=name)
    return pipe


def two_adapters(parts=BOTH):
    return add_lora(add_lora(build(), parts, "one", seed=1), parts, "two", seed=2)


def draw(pipe, **arguments):
    given = {"prompt": "a chest x-ray"} if "text" in pipe.kinds else {}
    given |= {"labels": {"gc": 1}} if "labels" in pipe.kinds else {}
    given |= {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 2, "guidance_scale": 6.0}
    return pipe(**given | arguments, output_type="np").images


@functools.cache
def base(model="text"):
    return draw(build(model))


def same(first, second, atol=1e-4):
    return np.allclose(first, second, atol=atol, rtol=1e-3)


def all_differ(*images):
    return not any(same(first, second, atol=1e-3) for first, second in itertools.combinations(images, 2))


def lora_layers(pipe, parts=BOTH):
    return [layer for part in parts for layer in getattr(pipe, part).modules() if isinstance(layer, BaseTunerLayer)]


def adapted_parts(pipe):
    """Which of UNet and text encoder hold a LoRA."""
    return tuple(part for part in BOTH if getattr(pipe, part) is not None and lora_layers(pipe, (part,)))


def layer_states(pipe, parts=BOTH, name="default"):
    return {f"{part}_lora_layers": get_peft_model_state_dict(getattr(pipe, part), adapter_name=name) for part in parts}


def state_dict(pipe, parts=BOTH, name="default"):
    states = {part: get_peft_model_state_dict(getattr(pipe, part), adapter_name=name) for part in parts}
    return {f"{part}.{key}": value for part, state in states.items() for key, value in state.items()}


def metadata(pipe, parts=BOTH, name="default"):
    return {f"{part}_lora_adapter_metadata": getattr(pipe, part).peft_config[name].to_dict() for part in parts}


def save(pipe, folder, parts=BOTH, name="default", **options):
    MediSynPipeline.save_lora_weights(folder, **layer_states(pipe, parts, name), **options)
    return folder
