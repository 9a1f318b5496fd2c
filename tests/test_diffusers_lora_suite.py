"""The LoRA tests of diffusers' own suite, adapted: adapters at work. Files and devices: `test_diffusers_lora_files`.

diffusers keeps that suite (its LoRA mixin, that of Stable Diffusion, those of its loader) in its repository and does
not install it; these tests state the same behaviours in our words, on real components (`tests.adapters`): text with
an AutoencoderKL, text and labels with an AutoencoderDC, labels without a text encoder.

- Covered here: LoRA in UNet, text encoder, both; scale of a call, of `set_adapters`, by block; fuse and unfuse,
  several, scaled, with NaN; unload, delete, disable, enable; mixtures; wrong names, counts, components; DoRA, rsLoRA,
  biases; ranks and alphas by layer; missing layers.
- Covered there: round trips (safetensors, pickle, low memory); formats of diffusers, of its attention processors and
  of kohya; metadata; warnings of keys; hot-swapping; pipelines saved with adapters; precision; casting by layer;
  devices.
- Pickled weights load by the stock method alone (it unpickles nothing but tensors); `medisyn.lora` refuses them.
- Offloading needs an accelerator and is skipped without one.
- Does not apply: second text encoders, transformers, the formats of SDXL and SD 3, LoKr (no loader of this family
  takes them), compiled models (skipped there as well), checkpoints of the Hub compared by value (no network), several
  threads that load at once (of peft alone).

    python -m pytest -q tests/test_diffusers_lora_suite.py tests/test_diffusers_lora_files.py
"""

import itertools

import numpy as np
import pytest
import torch
from diffusers.utils import logging

from tests.adapters import (
    BOTH,
    PARTS,
    QUERY,
    adapted_parts,
    add_lora,
    all_differ,
    base,
    build,
    draw,
    lora_layers,
    metadata,
    same,
    save,
    state_dict,
    two_adapters,
)


@pytest.fixture
def log(caplog):
    """What diffusers logs; its loggers do not propagate by themselves."""
    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()


# ---- one adapter ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("model", ["text", "text+labels"])
def test_an_adapter_counts_until_it_is_unloaded(model, parts):
    pipe = add_lora(build(model), parts)
    adapted = draw(pipe)
    assert adapted_parts(pipe) == parts
    assert all_differ(adapted, base(model))
    pipe.unload_lora_weights()
    assert adapted_parts(pipe) == ()
    np.testing.assert_array_equal(draw(pipe), base(model))
    assert same(draw(add_lora(pipe, parts)), adapted), "after unloading there is room for the next one"


@pytest.mark.parametrize("parts", PARTS)
def test_the_scale_of_a_call_is_that_of_set_adapters(parts, tmp_path):
    pipe = add_lora(build(), parts)
    full, half = draw(pipe), draw(pipe, cross_attention_kwargs={"scale": 0.5})
    assert all_differ(full, half, base())
    assert same(draw(pipe, cross_attention_kwargs={"scale": 0.0}), base())
    assert all(layer.scaling["default"] == 1.0 for layer in lora_layers(pipe)), "the scale is that of the call alone"
    pipe.set_adapters("default", 0.5)
    assert same(draw(pipe), half)
    loaded = build()
    loaded.load_lora_weights(save(pipe, tmp_path, parts))
    assert same(draw(loaded, cross_attention_kwargs={"scale": 0.5}), half)


@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_the_scale_of_a_call_leaves_the_weights_of_adapters(scale):
    pipe = two_adapters()
    pipe.set_adapters(["one", "two"], [0.7, 0.2])
    mixed = draw(pipe)
    draw(pipe, cross_attention_kwargs={"scale": scale})
    np.testing.assert_allclose(draw(pipe), mixed, atol=1e-6)


@pytest.mark.parametrize(
    ("parts", "options"), [*((parts, {}) for parts in PARTS), (BOTH, {"use_dora": True}), (BOTH, {"use_rslora": True})]
)
def test_fused_draws_as_before_and_unfused_again(parts, options):
    pipe = add_lora(build(), parts, **options)
    expected = draw(pipe)
    assert all_differ(expected, base())
    pipe.fuse_lora()
    assert pipe.num_fused_loras == 1 and pipe.fused_loras == {"default"}
    assert adapted_parts(pipe) == parts, "fusing keeps the layers"
    assert same(draw(pipe), expected, atol=1e-3)
    pipe.unfuse_lora()
    assert pipe.num_fused_loras == 0 and adapted_parts(pipe) == parts
    assert same(draw(pipe), expected, atol=1e-3)
    pipe.unload_lora_weights()
    assert same(draw(pipe), base(), atol=1e-3)


def test_biases_of_a_lora_count():
    without, with_bias = (draw(add_lora(build(), ("unet",), lora_bias=lora_bias)) for lora_bias in (False, True))
    assert all_differ(without, with_bias, base())


@pytest.mark.parametrize("pattern", [{"rank_pattern": {QUERY: 8}}, {"alpha_pattern": {QUERY: 16}}])
def test_ranks_and_alphas_differ_by_layer(pattern, tmp_path):
    pipe = add_lora(build(), ("unet",), **pattern)
    adapted = draw(pipe)
    (name,) = pattern
    assert getattr(pipe.unet.peft_config["default"], name) == pattern[name]
    assert all_differ(adapted, draw(add_lora(build(), ("unet",))), base())
    loaded = build()
    loaded.load_lora_weights(save(pipe, tmp_path, ("unet",), **metadata(pipe, ("unet",))))
    assert same(draw(loaded), adapted)


def test_ranks_by_layer_are_read_from_the_weights():
    """Without metadata every layer has the scale 1, whichever rank comes first."""
    pipe = add_lora(build(), rank_pattern={"to_k": 2, "q_proj": 1, "k_proj": 2, "v_proj": 3})
    for layer in lora_layers(pipe):
        layer.scaling["default"] = 1.0
    state = state_dict(pipe)
    for ordered in (state, dict(reversed(state.items()))):
        loaded = build()
        loaded.load_lora_weights(ordered)
        assert same(draw(loaded), draw(pipe))


def test_layers_may_be_missing():
    pipe = add_lora(build(), ("text_encoder",))
    partial = {key: value for key, value in state_dict(pipe, ("text_encoder",)).items() if "layers.1." not in key}
    loaded = build()
    loaded.load_lora_weights(partial)
    assert all_differ(draw(loaded), draw(pipe), base())


# ---- several adapters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", PARTS)
def test_several_adapters_are_chosen_mixed_and_disabled(parts):
    pipe, images = two_adapters(parts), []
    for names, weights in [("one", None), ("two", None), (["one", "two"], None), (["one", "two"], [0.5, 0.6])]:
        pipe.set_adapters(names, weights)
        assert pipe.get_active_adapters() == ([names] if isinstance(names, str) else names)
        images.append(draw(pipe))
    assert all_differ(*images, base())
    pipe.disable_lora()
    assert same(draw(pipe), base())
    pipe.enable_lora()
    assert same(draw(pipe), images[-1])


def test_deleted_adapters_are_gone():
    pipe = two_adapters()
    pipe.set_adapters("two")
    second = draw(pipe)
    pipe.set_adapters(["one", "two"])
    pipe.delete_adapters("one")
    assert same(draw(pipe), second)
    pipe.delete_adapters("two")
    assert same(draw(pipe), base())
    for name in ("one", "two"):
        add_lora(pipe, name=name)
    pipe.set_adapters(["one", "two"])
    pipe.delete_adapters(["one", "two"])
    assert same(draw(pipe), base())


def test_adapters_are_listed():
    pipe = add_lora(build(), name="one")
    assert pipe.get_list_adapters() == {"unet": ["one"], "text_encoder": ["one"]}
    assert pipe.get_active_adapters() == ["one"]
    add_lora(pipe, name="two")
    assert pipe.get_active_adapters() == ["two"]
    pipe.set_adapters(["one", "two"])
    add_lora(pipe, ("unet",), name="three")
    assert pipe.get_list_adapters() == {"unet": ["one", "two", "three"], "text_encoder": ["one", "two"]}


def test_wrong_names_counts_and_components_are_told(log):
    pipe = two_adapters()
    with pytest.raises(ValueError, match="not in the list of present adapters"):
        pipe.set_adapters("three")
    with pytest.raises(ValueError, match="Length of adapter names 2 is not equal to the length of the weights 1"):
        pipe.set_adapters(["one", "two"], [0.5])
    pipe.set_adapters("one", {"lung": 0.0, "heart": 0.0})
    assert "not part of the pipeline: ['heart', 'lung']" in log.text
    pipe.set_adapters("one")
    assert all_differ(draw(pipe), base())


def test_blocks_have_weights_of_their_own():
    pipe, scales = two_adapters(), [{"text_encoder": 2, "unet": {"down": 5}}, {"unet": {"down": 5, "mid": 5}}]
    images = []
    for names, weights in [
        ("one", scales[0]),
        ("one", {"unet": {"up": 5}}),
        ("two", scales[1]),
        (["one", "two"], scales),
    ]:
        pipe.set_adapters(names, weights)
        images.append(draw(pipe))
    assert all_differ(*images, base())
    pipe.disable_lora()
    assert same(draw(pipe), base())


def test_every_form_of_block_weights_is_taken():
    pipe = add_lora(build(), name="one")
    layers = pipe.unet.config.layers_per_block
    blocks = {
        "down": [i for i, block in enumerate(pipe.unet.down_blocks) if hasattr(block, "attentions")],
        "up": [i for i, block in enumerate(pipe.unet.up_blocks) if hasattr(block, "attentions")],
    }
    forms = {
        side: [None, 3.0]
        + [{f"block_{i}": value} for i in blocks[side] for value in (3.0, [3.0] * (layers + (side == "up")))]
        for side in blocks
    }
    for text, down, mid, up in itertools.product([None, 3.0], forms["down"], [None, 3.0], forms["up"]):
        unet = {key: value for key, value in {"down": down, "mid": mid, "up": up}.items() if value is not None}
        pipe.set_adapters("one", ({"text_encoder": text} if text else {}) | ({"unet": unet} if unet else {}))
        assert pipe.unet.get_submodule(QUERY).scaling["one"] == (mid or 1.0)
        assert lora_layers(pipe, ("text_encoder",))[0].scaling["one"] == (text or 1.0)


def test_several_adapters_are_fused_by_name():
    pipe = two_adapters()
    pipe.set_adapters(["one", "two"])
    mixed = draw(pipe)
    pipe.set_adapters("one")
    first = draw(pipe)
    pipe.fuse_lora(adapter_names=["one"])
    assert pipe.num_fused_loras == 1 and same(draw(pipe), first, atol=1e-3)
    pipe.unfuse_lora()
    assert pipe.num_fused_loras == 0 and adapted_parts(pipe) == BOTH
    pipe.fuse_lora(adapter_names=["two", "one"])
    assert pipe.num_fused_loras == 2 and same(draw(pipe), mixed, atol=1e-3)
    pipe.unfuse_lora()
    assert pipe.num_fused_loras == 0


@pytest.mark.parametrize("scale", [1.0, 0.8])
def test_fusing_with_a_scale_is_the_scale_of_a_call(scale):
    pipe = add_lora(build(), name="one")
    expected = draw(pipe, cross_attention_kwargs={"scale": scale})
    pipe.fuse_lora(adapter_names=["one"], lora_scale=scale)
    assert same(draw(pipe), expected, atol=1e-3) and all_differ(expected, base())


def test_infinite_weights_are_not_fused_safely():
    pipe = add_lora(build(), name="one")
    with torch.no_grad():
        pipe.unet.get_submodule(QUERY.replace("to_q", "to_v")).lora_A["one"].weight += float("inf")
    with pytest.raises(ValueError, match="NaNs detected"):
        pipe.fuse_lora(safe_fusing=True)
    pipe.fuse_lora(safe_fusing=False)
    assert np.isnan(draw(pipe)).all()
