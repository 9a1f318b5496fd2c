"""The LoRA tests of diffusers' own suite, adapted: files, whole pipelines, precision and devices.

What is covered and what does not apply: `tests.test_diffusers_lora_suite`.

    python -m pytest -q tests/test_diffusers_lora_files.py
"""

import itertools
import json

import numpy as np
import pytest
import torch
from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN, apply_layerwise_casting
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya, logging
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from medisyn.adapter_folder import make_manifest, write_manifest
from medisyn.backbone import base_hash, model_hash
from medisyn.extension import added, save_extension
from medisyn.generation.provenance import adapter_hash
from medisyn.lora import fuse_adapters, load_adapter, loaded_adapters, set_adapters, unload_adapters
from medisyn.pipelines.medisyn_pipeline import MediSynPipeline
from tests.adapters import (
    BOTH,
    PARTS,
    QUERY,
    TARGETS,
    WEIGHTS,
    adapted_parts,
    add_lora,
    all_differ,
    base,
    build,
    draw,
    metadata,
    same,
    save,
    state_dict,
    two_adapters,
)
from tests.hub import LocalHub
from tests.test_extension import KNEE, bert, extend, t5, traces


@pytest.fixture
def log(caplog):
    """What diffusers logs; its loggers do not propagate by themselves."""
    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()


PICKLE = "pytorch_lora_weights.bin"


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "parts", "file_name"),
    [*(("text", parts, WEIGHTS) for parts in PARTS), ("text+labels", BOTH, WEIGHTS), ("text", BOTH, PICKLE)],
)
def test_saved_is_loaded(model, parts, file_name, tmp_path):
    pipe = add_lora(build(model), parts)
    expected, file = draw(pipe), tmp_path / file_name
    save(pipe, tmp_path, parts, safe_serialization=file_name == WEIGHTS)
    assert list(tmp_path.iterdir()) == [file]
    for source, low_cpu_mem_usage in [(tmp_path, False), (file, False), (file, True)]:
        pipe.unload_lora_weights()
        pipe.load_lora_weights(str(source), low_cpu_mem_usage=low_cpu_mem_usage)
        assert adapted_parts(pipe) == parts
        assert same(draw(pipe), expected)
    pipe.delete_adapters(pipe.get_active_adapters()[0])
    assert same(draw(pipe), base(model))
    pipe.load_lora_weights(tmp_path)
    assert same(draw(pipe), expected), "after deletion there is room for it"


def test_pickled_weights_are_refused_by_medisyn(tmp_path):
    pipe = add_lora(build())
    save(pipe, tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match="pickle"):
        load_adapter(build(), tmp_path)


def test_one_of_several_files_is_chosen_by_name(tmp_path):
    pipes = {
        name: add_lora(build(), seed=seed) for seed, name in enumerate(["first.safetensors", "second.safetensors"])
    }
    for name, pipe in pipes.items():
        save(pipe, tmp_path, weight_name=name)
    for name, pipe in pipes.items():
        loaded = build()
        loaded.load_lora_weights(tmp_path, weight_name=name)
        assert same(draw(loaded), draw(pipe))


def test_weights_are_injected_without_memory_first():
    pipe = build()
    for part in BOTH:
        module = getattr(pipe, part)
        inject_adapter_in_model(LoraConfig(r=4, target_modules=TARGETS[part]), module, low_cpu_mem_usage=True)
        assert "meta" in {parameter.device.type for parameter in module.parameters()}
        state = {key: torch.randn(value.shape) for key, value in get_peft_model_state_dict(module).items()}
        set_peft_model_state_dict(module, state, low_cpu_mem_usage=True)
        assert "meta" not in {parameter.device.type for parameter in module.parameters()}
    assert all_differ(draw(pipe), base())


FORMATS = ["peft", "diffusers", "attention processors", "kohya", "kohya without alpha"]


@pytest.mark.parametrize(
    ("parts", "lora_format"),
    [*((BOTH, each) for each in FORMATS), *((parts, each) for parts in PARTS[:2] for each in ("peft", "kohya"))],
)
def test_formats_of_other_programs_are_read(parts, lora_format):
    pipe = add_lora(build(), parts)
    state = state_dict(pipe, parts)
    if lora_format == "diffusers":
        state = convert_state_dict_to_diffusers(state)
    elif lora_format == "attention processors":  # before peft
        state = {_attention_processor_key(key): value for key, value in state.items()}
    elif lora_format.startswith("kohya"):
        names = {key: key.replace("text_encoder.", "text_encoder.text_model.") for key in state}
        state = convert_state_dict_to_kohya({names[key]: value for key, value in state.items()})
        assert all(key.startswith(("lora_unet_", "lora_te1_")) for key in state)
        if lora_format.endswith("alpha"):
            state = {key: value for key, value in state.items() if not key.endswith(".alpha")}
    before, loaded = dict(state), build()
    for _ in range(2):  # load, unload, load
        loaded.load_lora_weights(state, adapter_name="one")
        assert state.keys() == before.keys() and all(state[key] is before[key] for key in before)
        assert same(draw(loaded), draw(pipe))
        loaded.unload_lora_weights()
        assert same(draw(loaded), base())


def _attention_processor_key(key):
    if not key.startswith("unet."):
        return key.replace("lora_A", "lora_linear_layer.down").replace("lora_B", "lora_linear_layer.up")
    module, name = key.removesuffix(".weight").rsplit(".", 1)
    path, layer = module.removesuffix(".0").rsplit(".", 1)
    return f"{path}.processor.{layer}_lora.{'down' if name == 'lora_A' else 'up'}.weight"


def test_alpha_of_kohya_counts():
    pipe = add_lora(build(), lora_alpha=8)
    names = {key: key.replace("text_encoder.", "text_encoder.text_model.") for key in state_dict(pipe)}
    state = convert_state_dict_to_kohya({names[key]: value for key, value in state_dict(pipe).items()})
    state = {key: torch.tensor(8.0) if key.endswith(".alpha") else value for key, value in state.items()}
    loaded = build()
    loaded.load_lora_weights(state)
    assert same(draw(loaded), draw(pipe))


@pytest.mark.parametrize("alpha", [2, 4, 8])
def test_metadata_survives(alpha, tmp_path):
    pipe = add_lora(build(), lora_alpha=alpha)
    given = metadata(pipe)
    save(pipe, tmp_path, **given)
    _, _, read = MediSynPipeline.lora_state_dict(tmp_path, return_lora_metadata=True)
    for part in BOTH:
        wanted = json.loads(json.dumps(given[f"{part}_lora_adapter_metadata"], default=sorted))
        found = {key.removeprefix(f"{part}."): value for key, value in read.items() if key.startswith(f"{part}.")}
        wanted["target_modules"], found["target_modules"] = (
            sorted(wanted["target_modules"]),
            sorted(found["target_modules"]),
        )
        assert found == wanted
    loaded = build()
    loaded.load_lora_weights(tmp_path)
    assert same(draw(loaded), draw(pipe))


def test_wrong_metadata_is_an_error(tmp_path):
    wrong = {"lora_adapter_metadata": json.dumps({"unet.rank": 4, "text_encoder.rank": 4}), "format": "pt"}
    save_file(state_dict(add_lora(build())), tmp_path / WEIGHTS, metadata=wrong)
    pipe = build()
    with pytest.raises(TypeError, match="LoraConfig"):
        pipe.load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="cannot be loaded: .*LoraConfig"):
        load_adapter(pipe, tmp_path)
    np.testing.assert_array_equal(draw(pipe), base())


def test_missing_and_unexpected_keys_are_told(log):
    state = state_dict(add_lora(build(), ("unet",)), ("unet",))
    key = next(key for key in state if "lora_A" in key)
    build().load_lora_weights({other: value for other, value in state.items() if other != key})
    assert "missing keys" in log.text and key.removeprefix("unet.").removesuffix(".weight") in log.text
    log.clear()
    build().load_lora_weights(state | {f"{key}.unknown": torch.ones(1)})
    assert "unexpected keys" in log.text and ".unknown" in log.text


def test_weights_of_nothing_are_told(log, tmp_path):
    pipe, nothing = build(), {"lora_first": torch.ones(2), "lora_second": torch.ones(3)}
    pipe.load_lora_weights(nothing)
    for name in ("UNet2DConditionModel", "CLIPTextModel"):
        assert f"No LoRA keys associated to {name}" in log.text
    np.testing.assert_array_equal(draw(pipe), base())
    with pytest.raises(ValueError, match="'lora'"):
        pipe.load_lora_weights({"unet.weight": torch.ones(2)})


def test_the_name_of_an_adapter_is_free_once(tmp_path):
    folder = save(add_lora(build()), tmp_path)
    pipe = build()
    pipe.load_lora_weights(folder, adapter_name="one")
    adapted = draw(pipe)
    with pytest.raises(ValueError, match="already in use"):
        pipe.load_lora_weights(folder, adapter_name="one")
    assert same(draw(pipe), adapted)


def test_an_adapter_is_swapped_in_place(tmp_path):
    for rank in (4, 2):
        save(add_lora(build(), ("unet",), seed=rank, r=rank, lora_alpha=rank), tmp_path / f"rank {rank}", ("unet",))
    save(add_lora(build()), tmp_path / "both")
    expected, pipe = {}, build()
    for rank in (4, 2):
        pipe.load_lora_weights(tmp_path / f"rank {rank}")
        expected[rank] = draw(pipe)
        pipe.unload_lora_weights()
    pipe.enable_lora_hotswap(target_rank=4)
    pipe.load_lora_weights(tmp_path / "rank 4", adapter_name="one")
    layer = pipe.unet.get_submodule(QUERY)
    assert same(draw(pipe), expected[4])
    pipe.load_lora_weights(tmp_path / "rank 2", adapter_name="one", hotswap=True)
    assert same(draw(pipe), expected[2]) and pipe.unet.get_submodule(QUERY) is layer
    with pytest.raises(ValueError, match="no existing adapter by that name"):
        pipe.load_lora_weights(tmp_path / "rank 2", adapter_name="two", hotswap=True)
    with pytest.raises(ValueError, match="not supported for text encoders"):
        pipe.load_lora_weights(tmp_path / "both", adapter_name="one", hotswap=True)


# ---- whole pipelines ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "state"),
    [*((parts, "active") for parts in PARTS), (BOTH, "fused"), (BOTH, "disabled"), (BOTH, "deleted")],
)
def test_a_pipeline_saved_with_its_adapter_draws_the_same(parts, state, tmp_path):
    pipe = two_adapters(parts)
    pipe.set_adapters(["one", "two"], [0.7, 0.3])
    change = {"active": lambda: None, "fused": pipe.fuse_lora, "disabled": pipe.disable_lora}
    change["deleted"] = lambda: pipe.delete_adapters(["one", "two"])
    change[state]()
    expected = draw(pipe)
    assert same(expected, base()) == (state in ("disabled", "deleted"))
    pipe.save_pretrained(tmp_path)
    assert same(draw(MediSynPipeline.from_pretrained(tmp_path)), expected, atol=1e-3)
    assert same(draw(pipe), expected) and adapted_parts(pipe) == parts


def test_a_pipeline_saved_with_an_adapted_decoder_draws_the_same(tmp_path):
    pipe = build()
    config = LoraConfig(r=4, target_modules=["conv_in", "to_v"], init_lora_weights=False)
    inject_adapter_in_model(config, pipe.vae.decoder)
    expected = draw(pipe)
    pipe.save_pretrained(tmp_path)
    assert same(draw(MediSynPipeline.from_pretrained(tmp_path)), expected) and all_differ(expected, base())


def test_a_pipeline_saved_after_fusing_is_a_plain_one(tmp_path):
    pipe = add_lora(build())
    expected = draw(pipe)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path)
    loaded = MediSynPipeline.from_pretrained(tmp_path)
    assert same(draw(loaded), expected, atol=1e-3) and not adapted_parts(loaded)
    assert not any("lora" in key for key in load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors"))


def test_a_model_without_a_text_encoder_takes_adapters_of_the_unet(tmp_path):
    pipe = add_lora(add_lora(build("labels"), ("unet",), "one", seed=1), ("unet",), "two", seed=2)
    assert pipe.get_list_adapters() == {"unet": ["one", "two"]}
    pipe.set_adapters(["one", "two"], [0.5, 0.25])
    mixed = draw(pipe)
    pipe.fuse_lora()
    assert same(draw(pipe), mixed, atol=1e-3)
    pipe.unfuse_lora()
    pipe.disable_lora()
    assert same(draw(pipe), base("labels"), atol=1e-3) and all_differ(mixed, base("labels"))
    pipe.enable_lora()
    pipe.delete_adapters("one")
    assert all_differ(draw(pipe), mixed, base("labels"))
    with pytest.raises(ValueError, match="no text encoder"):
        build("labels").load_lora_weights(save(add_lora(build()), tmp_path))


@pytest.mark.parametrize("with_metadata", [False, True])
@pytest.mark.parametrize(("family", "targets"), [(bert, ["query", "value"]), (t5, ["q", "v"])])
def test_text_encoders_other_than_clip_take_adapters(family, targets, with_metadata, tmp_path):
    pipe, part = build(), ("text_encoder",)
    tokenizer, encoder = family()
    pipe.register_modules(tokenizer=tokenizer, text_encoder=encoder.eval())
    plain = draw(pipe)
    adapted = draw(add_lora(pipe, part, target_modules=targets, lora_alpha=32 if with_metadata else 4))
    save(pipe, tmp_path, part, **metadata(pipe, part) if with_metadata else {})
    pipe.unload_lora_weights()
    assert same(draw(pipe), plain) and all_differ(adapted, plain)
    pipe.load_lora_weights(tmp_path, adapter_name="one")
    assert pipe.get_list_adapters() == {"text_encoder": ["one"]} and same(draw(pipe), adapted)


def test_plain_adapters_mix_fuse_and_unload_in_medisyn(tmp_path):
    for seed, name in enumerate(("one", "two")):
        save(add_lora(build(), seed=seed), tmp_path / name)
    pipe, stock = build(), build()
    for name in ("one", "two"):
        load_adapter(pipe, tmp_path / name)
        stock.load_lora_weights(tmp_path / name, adapter_name=name)
    set_adapters(pipe, ["one", "two"], [0.5, 0.25])
    stock.set_adapters(["one", "two"], [0.5, 0.25])
    mixed = draw(pipe)
    np.testing.assert_array_equal(mixed, draw(stock))
    unload_adapters(pipe)
    np.testing.assert_array_equal(draw(pipe), base())
    for name, weight in (("one", 0.5), ("two", 0.25)):
        load_adapter(pipe, tmp_path / name, weight=weight)
    fuse_adapters(pipe)
    assert same(draw(pipe), mixed, atol=1e-3) and not adapted_parts(pipe)


# ---- adapters that medisyn keeps account of -------------------------------------------------------------------------

LABELLED = "text+labels"
OWN = {"prompt": "a mammogram", "labels": "kl_grade=3, gc=1"}  # a word and a field of the adapter


@pytest.fixture
def knee(tmp_path):
    """An adapter with a LoRA of both parts, a label field and a word."""
    folder, extended = tmp_path / "knee", build(LABELLED)
    extend(extended, KNEE, ["mammogram"], "knee")
    save_extension(extended, folder, "knee")
    save(add_lora(build(LABELLED)), folder)
    facts = ("knee", "lora", "tiny", base_hash(build(LABELLED)), ("text", "labels"))
    write_manifest(folder, make_manifest(*facts, **added(extended, "knee")))
    return folder


@pytest.fixture
def other(tmp_path):
    """An adapter of the same base, with a LoRA alone and without `adapter.json`."""
    return save(add_lora(build(LABELLED), seed=5), tmp_path / "other")


def parts_of(pipe):
    """What a pipeline is made of; diffusers itself leaves facts of the last call and saving and flags of gradients."""
    found = traces(pipe)
    weights = [(name, place) for name, place, _ in found["weights"]]
    configs = [(name, value) for name, value in found["configs"][0] if not name.startswith("_")], found["configs"][1:]
    return {"weights": weights, "configs": configs} | {name: found[name] for name in ("hash", "modules", "tokens")}


def adapted(folder, weight=1.0):
    pipe = build(LABELLED)
    load_adapter(pipe, folder, weight=weight)
    return pipe


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_a_pipeline_saved_with_label_fields_and_words_draws_the_same(knee, weight, tmp_path):
    pipe = build(LABELLED)
    before = parts_of(pipe)
    load_adapter(pipe, knee, weight=weight)
    expected, on = draw(pipe, **OWN), parts_of(pipe)
    for _ in range(2):  # the second is saved over the first
        pipe.save_pretrained(tmp_path / "saved")
    saved = MediSynPipeline.from_pretrained(tmp_path / "saved")
    assert same(draw(saved, **OWN), expected) and not adapted_parts(saved)
    assert saved.label_schema == pipe.label_schema and saved.kinds == pipe.kinds
    assert type(saved.unet.class_embedding) is torch.nn.Linear
    assert (
        parts_of(pipe) == on and same(draw(pipe, **OWN), expected) and loaded_adapters(pipe)["knee"].weight == weight
    )
    unload_adapters(pipe)
    assert parts_of(pipe) == before
    load_adapter(pipe, knee, weight=weight)
    fuse_adapters(pipe)
    assert same(draw(pipe, **OWN), draw(saved, **OWN)), "as if fused first"


@pytest.mark.parametrize("source", ["folder", "file", "subfolder"])
def test_another_base_is_refused_by_diffusers_own_loading(knee, source):
    pipe = MediSynPipeline(**build(LABELLED).components, label_schema=build(LABELLED).label_schema)
    pipe.unet.conv_in.weight.data += 0.1
    before, found = parts_of(pipe), model_hash(pipe)
    place = {"folder": knee, "file": knee / WEIGHTS, "subfolder": knee.parent}[source]
    options = {"subfolder": knee.name, "weight_name": WEIGHTS} if source == "subfolder" else {}
    with pytest.raises(ValueError, match=f"{base_hash(build(LABELLED))}.*{found}"):
        pipe.load_lora_weights(place, **options)
    assert parts_of(pipe) == before
    load_adapter(pipe, knee, force=True)
    assert adapted_parts(pipe) == BOTH


@pytest.mark.parametrize("source", ["folder", "file", "subfolder"])
def test_what_diffusers_own_loading_leaves_out_is_told(knee, source, log):
    pipe = build(LABELLED)
    place = {"folder": knee, "file": knee / WEIGHTS, "subfolder": knee.parent}[source]
    pipe.load_lora_weights(
        place, **({"subfolder": knee.name, "weight_name": WEIGHTS} if source == "subfolder" else {})
    )
    assert "label fields or words" in log.text and adapted_parts(pipe) == BOTH and not loaded_adapters(pipe)
    log.clear()
    adapted(knee)
    assert "label fields or words" not in log.text, "medisyn's own loading leaves nothing out"


def test_adapters_of_the_hub_are_looked_at_as_those_of_folders(knee, other, tmp_path):
    build(LABELLED).save_pretrained(tmp_path / "model")
    pipe = build(LABELLED)
    pipe.unet.conv_in.weight.data += 0.1
    pipe.save_pretrained(tmp_path / "another")
    with LocalHub(tmp_path) as hub:
        hub.add("user/knee", knee)
        hub.add("user/other", other)
        result = hub.python(f"""
            from medisyn.pipelines.medisyn_pipeline import MediSynPipeline
            pipe = MediSynPipeline.from_pretrained({str(tmp_path / "model")!r})
            pipe.load_lora_weights("user/other", adapter_name="other")
            print(pipe.get_list_adapters())
            pipe.load_lora_weights("user/knee", adapter_name="knee")
            print(pipe.get_list_adapters())
            pipe = MediSynPipeline.from_pretrained({str(tmp_path / "another")!r})
            try:
                pipe.load_lora_weights("user/knee")
            except ValueError as error:
                print("refused:", error)
            """)
    first, second, refused = result.stdout.splitlines()
    assert "knee" not in first and "knee" in second, result.stderr
    assert result.stderr.count("label fields or words") == 1 and "user/knee also brings" in result.stderr
    assert refused.startswith("refused:") and base_hash(build(LABELLED)) in refused and model_hash(pipe) in refused


def test_unloaded_by_diffusers_own_method_an_adapter_leaves_no_trace(knee, other):
    pipe = build(LABELLED)
    before = parts_of(pipe)
    load_adapter(pipe, knee)
    load_adapter(pipe, other)
    pipe.unload_lora_weights()
    assert parts_of(pipe) == before and not loaded_adapters(pipe) and adapter_hash(pipe) is None
    np.testing.assert_array_equal(draw(pipe), base(LABELLED))
    load_adapter(pipe, knee)
    load_adapter(pipe, other)
    pipe.delete_adapters("knee")
    assert list(loaded_adapters(pipe)) == ["other"] and "kl_grade" not in pipe.label_schema["fields"]
    assert same(draw(pipe), draw(adapted(other)))
    with pytest.raises(ValueError, match="'knee' is not loaded; loaded are: other"):
        pipe.delete_adapters(["other", "knee"])
    pipe.delete_adapters(["other"])
    assert parts_of(pipe) == before and not loaded_adapters(pipe)


@pytest.mark.parametrize("weights", [0.5, [0.5]])
def test_weights_set_by_diffusers_own_method_are_recorded(knee, weights):
    pipe, expected = adapted(knee), adapted(knee, weight=0.5)
    full = draw(pipe, **OWN)
    pipe.set_adapters("knee", weights)
    assert loaded_adapters(pipe)["knee"].weight == 0.5 and adapter_hash(pipe) == adapter_hash(expected)
    np.testing.assert_array_equal(draw(pipe, **OWN), draw(expected, **OWN))
    pipe.set_adapters(["knee"], [None])
    np.testing.assert_array_equal(draw(pipe, **OWN), full)
    assert adapter_hash(pipe) == adapter_hash(adapted(knee))
    with pytest.raises(ValueError, match="one number for each adapter"):
        pipe.set_adapters("knee", {"unet": 0.5})
    np.testing.assert_array_equal(draw(pipe, **OWN), full)


def test_disabled_by_diffusers_own_method_an_adapter_is_recorded_as_off(knee):
    pipe = adapted(knee, weight=0.5)
    on, recorded = draw(pipe, **OWN), adapter_hash(pipe)
    pipe.disable_lora()
    pipe.disable_lora()
    assert adapter_hash(pipe) is None and same(draw(pipe), base(LABELLED))
    pipe.enable_lora()
    pipe.enable_lora()
    assert adapter_hash(pipe) == recorded
    np.testing.assert_array_equal(draw(pipe, **OWN), on)


def test_an_adapter_that_diffusers_puts_beside_others_is_recorded(knee, other):
    pipe, expected = adapted(knee, weight=0.5), adapted(knee, weight=0.5)
    load_adapter(expected, other)
    pipe.load_lora_weights(other, adapter_name="other")
    assert {name: each.weight for name, each in loaded_adapters(pipe).items()} == {"knee": 0.5, "other": 1.0}
    assert adapter_hash(pipe) == adapter_hash(expected)
    np.testing.assert_array_equal(draw(pipe, **OWN), draw(expected, **OWN))
    pipe.unload_lora_weights()
    np.testing.assert_array_equal(draw(pipe), base(LABELLED))


def test_weights_that_diffusers_swaps_in_place_are_recorded(tmp_path):
    for seed in (1, 2):
        save(add_lora(build(), ("unet",), seed=seed), tmp_path / str(seed), ("unet",))
    pipe = build()
    load_adapter(pipe, tmp_path / "1", adapter_name="one")
    before, first = draw(pipe), adapter_hash(pipe)
    pipe.load_lora_weights(tmp_path / "2", adapter_name="one", hotswap=True)
    assert adapter_hash(pipe) != first and list(loaded_adapters(pipe)) == ["one"] and all_differ(draw(pipe), before)


def test_fused_and_unloaded_by_diffusers_own_methods_all_of_an_adapter_is_fused(knee):
    pipe = adapted(knee)
    expected = draw(pipe, **OWN)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert same(draw(pipe, **OWN), expected, atol=1e-3) and not adapted_parts(pipe) and not loaded_adapters(pipe)
    assert type(pipe.unet.class_embedding) is torch.nn.Linear and model_hash(pipe) != model_hash(build(LABELLED))


# ---- precision and devices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_adapter_takes_the_precision_of_its_model(dtype, tmp_path):
    pipe = add_lora(build())
    folder, expected = save(pipe, tmp_path), draw(pipe)
    half = build().to(dtype=dtype)
    half.load_lora_weights(folder)
    dtypes = {value.dtype for part in BOTH for key, value in getattr(half, part).named_parameters() if "lora_" in key}
    assert dtypes == {dtype}
    assert np.abs(draw(half) - expected).mean() < 0.05


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_adapter", [False, True])
def test_weights_are_cast_layer_by_layer(with_adapter, compute_dtype):
    """Stored in 8 bits: the UNet alone, or its adapter as well."""
    pipe = add_lora(build().to(dtype=compute_dtype))
    if compute_dtype != torch.float32:
        for part in BOTH:
            getattr(pipe, part).to(compute_dtype)
    options = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": compute_dtype}
    if with_adapter:
        skipped = DEFAULT_SKIP_MODULES_PATTERN + tuple(pipe.unet._skip_layerwise_casting_patterns or ())
        apply_layerwise_casting(pipe.unet, skip_modules_pattern=skipped, **options)
    else:
        pipe.unet.enable_layerwise_casting(**options)
    layer = pipe.unet.get_submodule(QUERY)
    assert layer.base_layer.weight.dtype == torch.float8_e4m3fn
    assert layer.lora_A["default"].weight.dtype == (torch.float8_e4m3fn if with_adapter else compute_dtype)
    assert np.isfinite(draw(pipe)).all()


def test_padding_may_be_circular():
    pipe = add_lora(build())
    for layer in itertools.chain(pipe.unet.modules(), pipe.vae.modules()):
        if isinstance(layer, torch.nn.Conv2d):
            layer.padding_mode = "circular"
    assert np.isfinite(draw(pipe)).all()


@pytest.mark.parametrize("use_dora", [False, True])
def test_one_adapter_of_several_moves_to_another_device(use_dora):
    pipe = add_lora(add_lora(build(), name="one", use_dora=use_dora), name="two", use_dora=use_dora)
    pipe.set_lora_device(["one"], "meta")
    for part in BOTH:
        for name, parameter in getattr(pipe, part).named_parameters():
            assert parameter.device.type == ("meta" if ".one" in name else "cpu"), name
    pipe.set_adapters("two")
    assert all_differ(draw(pipe), base())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading needs a CUDA device")
@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload", "group"])
def test_adapters_load_into_offloaded_models(offload, tmp_path):
    folder = save(add_lora(build()), tmp_path)
    expected = draw(add_lora(build()).to("cuda"))
    pipe = build()
    if offload == "group":
        pipe.to("cuda")
        pipe.unet.enable_group_offload(torch.device("cuda"), torch.device("cpu"), offload_type="leaf_level")
    else:
        getattr(pipe, offload)()
    for _ in range(2):
        pipe.load_lora_weights(folder)
        assert np.abs(draw(pipe) - expected).max() < 1e-2
        pipe.unload_lora_weights()
