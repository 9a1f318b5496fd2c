"""Adapters: what is trained, saved and loaded is the same; bases are told apart; mixing, fusing and removing."""

import json
import logging
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from medisyn.adapter_folder import LORA_WEIGHTS, MANIFEST, NORM_WEIGHTS, read_manifest
from medisyn.adapter_training import norm_parameters, prepare_adapter
from medisyn.backbone import load_pipeline, model_hash
from medisyn.config import DataConfig, LoraConfig, PriorConfig, load_config, save_config
from medisyn.generation.provenance import adapter_hash
from medisyn.guidance import attach_classifier
from medisyn.lora import fuse_adapters, load_adapter, loaded_adapters, set_adapters, unload_adapters
from medisyn.pipelines.medisyn_latent_classifier import MediSynLatentClassifier
from medisyn.tasks.cached_images import prior_data
from medisyn.tasks.diffusion import DiffusionTask
from medisyn.trainer import Trainer, latest_checkpoint
from medisyn.training_record import read_training_record
from tests.components import tiny_pipeline
from tests.training import CAPTIONS, diffusion_config, write_base, write_images

ALL_LAYERS = ["to_q", "to_v", "conv1", "conv_shortcut"]
GRADE = {"name": "severity", "fields": {"severity": {"type": "ordinal", "values": ["0", "1", "2"]}}}
GRADE |= {"rows": {"columns": {"severity": "kind"}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    write_images(folder / "images")
    write_base(folder / "base")
    write_base(folder / "labelled", kinds=("text", "labels"))
    (folder / "severity.json").write_text(json.dumps(GRADE))
    return folder


def adapter_config(folder, run, task, **changes):
    changes.setdefault("train", {"steps": 4, "checkpoint_every": 2})
    return diffusion_config(folder, run, task=task, **changes)


@pytest.fixture(scope="module")
def trained(folder):
    """A LoRA with alpha unlike rank, in UNet and text encoder; and a norm adapter."""
    lora = {"rank": 4, "alpha": 2.0, "target_modules": ALL_LAYERS, "text_encoder": True}
    return {
        "lora": Trainer(adapter_config(folder, "with_lora", {"lora": lora})).fit() / "adapter",
        "norm": Trainer(adapter_config(folder, "with_norm", {"method": "norm"})).fit() / "adapter",
    }


def draw(pipe, prompt="bright square", **arguments):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt, num_inference_steps=2, generator=generator, output_type="pt", **arguments).images


@pytest.mark.parametrize("method", ["lora", "norm"])
def test_the_saved_adapter_is_the_trained_one(folder, trained, method):
    lora = {"rank": 4, "alpha": 2.0, "target_modules": ALL_LAYERS, "text_encoder": True}
    task = {"lora": lora} if method == "lora" else {"method": "norm"}
    trainer = Trainer(adapter_config(folder, f"again_{method}", task))
    trainer.fit()
    with trainer._averaged_weights():
        expected = draw(trainer.task.pipe.eval() if hasattr(trainer.task.pipe, "eval") else trainer.task.pipe)
    loaded = load_pipeline(folder / "base", adapter=trained[method])
    assert torch.allclose(draw(loaded), expected, atol=1e-6)
    assert not torch.allclose(draw(load_pipeline(folder / "base")), expected, atol=1e-4)


def test_only_the_adapter_is_trained(folder):
    before = {name: value.clone() for name, value in load_pipeline(folder / "base").unet.state_dict().items()}
    task = DiffusionTask(adapter_config(folder, "frozen", {"lora": {"rank": 2}}))
    trained = [name for name, parameter in task.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    run = Trainer(adapter_config(folder, "frozen", {"lora": {"rank": 2}}), task).fit()
    after = {name.replace(".base_layer", ""): value for name, value in task.unet.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    checkpoint = load_file(latest_checkpoint(run) / "model.safetensors")
    assert set(checkpoint) == set(trained), "frozen weights are not written with every checkpoint"


def test_norm_adaptation_trains_scale_and_shift_alone(folder):
    task = DiffusionTask(adapter_config(folder, "norms", {"method": "norm"}))
    trained = {name for name, parameter in task.unet.named_parameters() if parameter.requires_grad}
    assert trained == set(norm_parameters(task.unet)) and len(trained) > 4


def test_alpha_survives_saving(trained):
    with safe_open(trained["lora"] / LORA_WEIGHTS, framework="pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (metadata["unet.r"], metadata["unet.lora_alpha"]) == (4, 2.0)
    manifest = read_manifest(trained["lora"])
    assert (manifest["rank"], manifest["alpha"]) == (4, 2.0)


@pytest.mark.parametrize(
    "options", [{"use_rslora": True}, {"use_dora": True}, {"target_modules": r".*attn1\.to_[qv]"}]
)
def test_variants_of_lora_come_back_as_they_were_trained(folder, options):
    name = "_".join(options)
    trainer = Trainer(adapter_config(folder, name, {"lora": {"rank": 2, "alpha": 6.0} | options}))
    run = trainer.fit()
    with trainer._averaged_weights():
        expected = draw(trainer.task.pipe)
    assert torch.allclose(draw(load_pipeline(folder / "base", adapter=run / "adapter")), expected, atol=1e-6)


@pytest.mark.parametrize("task", [{"lora": {"rank": 2, "text_encoder": True}}, {"method": "norm"}])
def test_a_resumed_adapter_equals_an_uninterrupted_one(folder, task):
    name = "norm" if "method" in task else "lora"
    whole = Trainer(adapter_config(folder, f"{name}_whole", task)).fit()
    Trainer(adapter_config(folder, f"{name}_parts", task, train={"steps": 2, "checkpoint_every": 2})).fit()
    parts = Trainer(adapter_config(folder, f"{name}_parts", task)).fit()
    for file in (whole / "adapter").glob("*.safetensors"):
        first, second = load_file(file), load_file(parts / "adapter" / file.name)
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_checkpoint_without_the_adapter_is_refused_on_resuming(folder):
    config = adapter_config(folder, "damaged", {"lora": {"rank": 2}}, train={"steps": 2})
    run = Trainer(config).fit()
    from safetensors.torch import save_file

    file = latest_checkpoint(run) / "model.safetensors"
    state = load_file(file)
    state.pop(sorted(state)[0])
    save_file(state, file)
    with pytest.raises(ValueError, match="checkpoint of another model"):
        Trainer(adapter_config(folder, "damaged", {"lora": {"rank": 2}}, train={"steps": 4})).fit()


def test_another_base_is_refused_and_both_hashes_are_named(folder, trained):
    other = tiny_pipeline(seed=1)
    for adapter in trained.values():
        with pytest.raises(ValueError) as raised:
            load_adapter(other, adapter)
        own, expected = model_hash(other), read_manifest(adapter)["base_hash"]
        assert own in str(raised.value) and expected in str(raised.value)
        assert not loaded_adapters(other) and model_hash(other) == own
    assert load_adapter(other, trained["norm"], force=True) == "with_norm"


def test_the_same_base_in_half_precision_is_the_same_base(folder, trained):
    pipe = load_pipeline(folder / "base", adapter=trained["lora"], dtype="bfloat16")
    assert loaded_adapters(pipe)


def test_a_classifier_makes_another_model_of_the_same_base(folder, tmp_path):
    """Adapters of the base go onto it with and without the classifier."""
    tasks, once = {"on_plain": {}, "on_carrying": {"base": str(tmp_path / "carrying")}}, {"steps": 1}
    pipe = load_pipeline(folder / "base")
    plain, classes = model_hash(pipe), ("bright", "dark")
    attach_classifier(pipe, MediSynLatentClassifier.from_unet(pipe.unet, pipe.scheduler, classes))
    pipe.save_pretrained(tmp_path / "carrying")
    carrying = model_hash(pipe)
    for name, task in tasks.items():
        Trainer(adapter_config(folder, name, task | {"lora": {"rank": 2}}, train=once)).fit()
        assert loaded_adapters(load_pipeline(folder / "base", adapter=folder / name))
        load_adapter(pipe, folder / name)
    assert carrying != plain and model_hash(pipe) == carrying
    attach_classifier(pipe, None)
    assert model_hash(pipe) == plain


def test_adapters_mix_by_weight_and_leave_no_trace(folder, trained):
    pipe = load_pipeline(folder / "base")
    base, own_hash = draw(pipe), model_hash(pipe)
    first, second = (load_adapter(pipe, trained[method]) for method in ("lora", "norm"))
    both = draw(pipe)
    set_adapters(pipe, first)
    only_first = draw(pipe)
    set_adapters(pipe, second)
    only_second = draw(pipe)
    set_adapters(pipe, [first, second], [0.0, 0.0])
    assert torch.allclose(draw(pipe), base, atol=1e-6)
    set_adapters(pipe, [first, second], [0.5, 0.25])
    weak = draw(pipe)
    pictures = [base, both, only_first, only_second, weak]
    for i, one in enumerate(pictures):
        assert all(not torch.allclose(one, other, atol=1e-5) for other in pictures[:i])
    assert model_hash(pipe) == own_hash, "the hash of a model is that of its base"
    unload_adapters(pipe)
    assert torch.equal(draw(pipe), base) and model_hash(pipe) == own_hash and not loaded_adapters(pipe)


def test_fused_adapters_are_a_model_of_their_own(folder, trained, tmp_path):
    pipe = load_pipeline(folder / "base", adapter={str(trained["lora"]): 0.5, str(trained["norm"]): 1.0})
    expected, under = draw(pipe), model_hash(pipe)
    fuse_adapters(pipe)
    assert torch.allclose(draw(pipe), expected, atol=1e-5)
    assert model_hash(pipe) != under
    pipe.save_pretrained(tmp_path / "fused")
    assert torch.allclose(draw(load_pipeline(tmp_path / "fused")), expected, atol=1e-5)


def test_the_hash_of_adapters_tells_weights_and_mixture(folder, trained):
    pipe = load_pipeline(folder / "base")
    assert adapter_hash(pipe) is None
    seen = set()
    for weights in ({"lora": 1.0}, {"norm": 1.0}, {"lora": 0.5}, {"lora": 1.0, "norm": 1.0}):
        mixed = load_pipeline(
            folder / "base", adapter={str(trained[name]): weight for name, weight in weights.items()}
        )
        seen.add(adapter_hash(mixed))
    assert len(seen) == 4 and None not in seen


def test_a_stock_pipeline_loads_the_lora(folder, trained, tmp_path):
    write_base(tmp_path / "base", vae="kl")
    lora = {"rank": 4, "alpha": 8.0, "text_encoder": True}
    run = Trainer(diffusion_config(tmp_path, task={"lora": lora}, data={"source": str(folder / "images")})).fit()
    adapted = load_pipeline(tmp_path / "base", adapter=run / "adapter")
    load_pipeline(tmp_path / "base").export_stable_diffusion(tmp_path / "stock")
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "stock", safety_checker=None)
    stock.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 2, "output_type": "pt", "guidance_scale": 2.0}
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    without = stock(CAPTIONS[0], latents=latents, **arguments).images
    stock.load_lora_weights(run / "adapter")
    with_lora = stock(CAPTIONS[0], latents=latents, **arguments).images
    # Stable Diffusion's guidance w is one more than ours
    ours = adapted(CAPTIONS[0], latents=latents, **arguments, guidance_interval=(0.0, 1.0)).images
    assert torch.allclose(with_lora, ours, atol=1e-5)
    assert not torch.allclose(with_lora, without, atol=1e-4)


def test_new_label_fields_and_words_come_with_the_adapter(folder, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    conditions = [
        {"type": "text", "new_words": ["square"]},
        {"type": "labels", "schema": str(folder / "severity.json")},
    ]
    task = {"base": str(folder / "labelled"), "lora": {"rank": 2}, "conditions": conditions}
    config = adapter_config(folder, "extended", task, data={"label_schema": str(folder / "severity.json")})
    trainer = Trainer(config)
    trainer.fit()
    with trainer._averaged_weights():
        expected = draw(trainer.task.pipe, labels="severity=2, gc=1")
    pipe = load_pipeline(folder / "labelled")
    schema, plain = pipe.label_schema, draw(pipe, labels="gc=1")
    load_adapter(pipe, folder / "extended" / "adapter")
    assert list(pipe.label_schema["fields"]) == [*schema["fields"], "severity"]
    assert torch.allclose(draw(pipe, labels="severity=2, gc=1"), expected, atol=1e-6)
    assert not torch.allclose(draw(pipe, labels="severity=0, gc=1"), expected, atol=1e-6)
    manifest = read_manifest(folder / "extended" / "adapter")
    assert manifest["tokens"] == ["square"] and "severity" in manifest["label_schema"]["fields"]
    unload_adapters(pipe)
    with caplog.at_level(logging.WARNING, logger="diffusers"):
        load_pipeline(folder / "labelled").load_lora_weights(folder / "extended" / "adapter")
    assert "were not loaded" in caplog.text, "diffusers' own loading must not drop a part of it in silence"
    assert pipe.label_schema == schema and torch.equal(draw(pipe, labels="gc=1"), plain)


def test_labels_can_be_new_altogether(folder):
    conditions = [{"type": "text"}, {"type": "labels", "schema": str(folder / "severity.json")}]
    task = {"lora": {"rank": 2}, "conditions": conditions}
    config = adapter_config(folder, "first_labels", task, data={"label_schema": str(folder / "severity.json")})
    run = Trainer(config).fit()
    pipe = load_pipeline(folder / "base", adapter=run / "adapter")
    assert pipe.kinds == ("text", "labels")
    assert not torch.equal(draw(pipe, labels="severity=0"), draw(pipe, labels="severity=2"))


def test_the_manifest_says_what_the_adapter_is(folder, trained):
    manifest = read_manifest(trained["lora"])
    assert manifest["base_hash"] == model_hash(load_pipeline(folder / "base"))
    assert manifest["base_model"] == "base" and str(folder) not in (trained["lora"] / MANIFEST).read_text()
    assert set(manifest["captions"]) == set(CAPTIONS) and manifest["conditions"] == ["text"]
    assert manifest["training_data"] == [{"name": "images", "license": "CC0", "images": 24}]
    assert len(read_training_record(trained["lora"])["hashes"]) == 24


@pytest.mark.parametrize("entry, value", [("method", "other"), ("tokens", None), ("format", 99), ("base_hash", 3)])
def test_a_damaged_manifest_is_one_clear_error(folder, trained, tmp_path, entry, value):
    manifest = json.loads((trained["norm"] / MANIFEST).read_text()) | {entry: value}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    (tmp_path / NORM_WEIGHTS).write_bytes((trained["norm"] / NORM_WEIGHTS).read_bytes())
    with pytest.raises(ValueError, match=entry):
        load_adapter(load_pipeline(folder / "base"), tmp_path)


def test_targets_that_match_nothing_are_refused_with_the_valid_ones():
    with pytest.raises(ValueError, match="'to_z' matches no layer.*to_q"):
        prepare_adapter(tiny_pipeline(), "lora", LoraConfig(target_modules=("to_q", "to_z")))


def test_names_are_checked(folder, trained):
    pipe = load_pipeline(folder / "base", adapter=trained["lora"])
    with pytest.raises(ValueError, match="loaded already"):
        load_adapter(pipe, trained["lora"])
    with pytest.raises(ValueError, match="'other' is not loaded; loaded are: with_lora"):
        set_adapters(pipe, "other")
    with pytest.raises(ValueError, match="1 weights for 2"):
        load_adapter(pipe, trained["norm"])
        set_adapters(pipe, ["with_lora", "with_norm"], [1.0])


@pytest.mark.parametrize("own", [True, False])
def test_images_of_the_base_are_mixed_in(folder, own):
    source = {"fraction": 0.5, "num_images": 6, "prompts": ["a", "b"]}
    if not own:
        source = {"fraction": 0.5, "source": str(folder / "images")}
    task = {"lora": {"rank": 2}, "prior": source, "cache_dir": str(folder / f"cache_prior_{own}")}
    config = adapter_config(folder, f"prior_{own}", task)
    task = DiffusionTask(config)
    assert len(task) == 24 + (6 if own else 24)
    assert task.row_weights[:24].sum() == pytest.approx(0.5) and task.row_weights.sum() == pytest.approx(1)
    losses = Trainer(config, task).fit()
    assert (losses / "adapter" / MANIFEST).is_file()
    if own:
        assert len(list((losses / "prior").glob("*.png"))) == 7  # and their grid
        assert task.data.examples([24, 29]) == [{"caption": "a", "labels": None}, {"caption": "b", "labels": None}]
        assert len(read_training_record(losses / "adapter")["hashes"]) == 24


def test_configuration_says_what_an_adapter_cannot_do(folder):
    for task, message in [
        ({"method": "lora", "preset": "mini", "base": None, "vae": "x"}, "needs a trained model"),
        ({"method": "norm", "lora": {"rank": 2}}, "belongs to method: lora"),
        ({"lora": {}, "conditions": [{"type": "text", "train_encoder": True}]}, "lora.text_encoder"),
        ({"conditions": [{"type": "text", "new_words": ["x"]}]}, "by an adapter .* or with train_encoder"),
        ({"conditions": [{"type": "text", "paraphrase": 0.5}]}, "paraphrase needs train_encoder"),
        ({"lora": {}, "conditions": [{"type": "image", "encoder": "x"}]}, "keeps the encoders"),
    ]:
        with pytest.raises(ValueError, match=message):
            adapter_config(folder, "wrong", task)
    task = {"lora": {}, "conditions": [{"type": "image"}]}
    with pytest.raises(ValueError, match="no image condition"):
        DiffusionTask(adapter_config(folder, "wrong", task))


def test_one_word_on_the_command_line_chooses_the_method(folder, tmp_path, caplog):
    save_config(adapter_config(folder, "word", {"lora": {"rank": 2}}), tmp_path / "lora.yaml")
    for method in ("norm", "full"):
        changed = load_config(tmp_path / "lora.yaml", [f"task.method={method}"])
        assert (changed.task.method, changed.task.lora) == (method, None)
        assert "task.lora are left out" in caplog.text
    with pytest.raises(ValueError, match="belongs to method: lora"):
        load_config(tmp_path / "lora.yaml", ["task.method=norm", "task.lora.rank=3"])
    assert load_config(tmp_path / "lora.yaml", ["task.method=lora"]).task.lora.rank == 2


def test_captions_that_the_bases_window_cuts_are_counted(folder, caplog):
    images = write_images(folder / "wordy" / "images")
    lines = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    lines[0]["caption"] = "bright square " * 60
    (images / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    data = {"data": {"source": str(images)}}
    DiffusionTask(diffusion_config(folder, "wordy", task={"lora": {}, "cache_dir": None}, **data))
    assert "1 of 24 prompts exceed the text encoder's window" in caplog.text


def test_new_words_that_the_captions_hold_are_found(folder, caplog):
    with caplog.at_level(logging.INFO):
        task = DiffusionTask(
            adapter_config(folder, "auto", {"lora": {}, "conditions": [{"type": "text", "new_words": "auto"}]})
        )
    assert "square" in task.pipe.tokenizer.get_vocab() or "square" in task.pipe.tokenizer.get_added_vocab()


def test_weight_zero_is_the_base_for_dora_as_well(folder):
    lora = {"rank": 2, "use_dora": True, "target_modules": ["to_q", "to_v"]}
    adapter = Trainer(adapter_config(folder, "dora_zero", {"lora": lora}, optim={"learning_rate": 0.1})).fit()
    pipe = load_pipeline(folder / "base", adapter={str(adapter): 0.0})
    assert torch.equal(draw(pipe), draw(load_pipeline(folder / "base")))
    set_adapters(pipe, list(loaded_adapters(pipe)), 1.0)
    assert not torch.equal(draw(pipe), draw(load_pipeline(folder / "base")))


def test_an_adapter_that_fails_half_way_leaves_nothing(folder, trained, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(trained["lora"], damaged)
    with safe_open(damaged / LORA_WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    state = load_file(damaged / LORA_WEIGHTS)
    wrong = {name: torch.zeros(3, 3) if name.startswith("text_encoder") else value for name, value in state.items()}
    save_file(wrong, damaged / LORA_WEIGHTS, metadata=metadata)
    base, pipe = draw(load_pipeline(folder / "base")), load_pipeline(folder / "base")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_adapter(pipe, damaged)
    assert torch.equal(draw(pipe), base) and not loaded_adapters(pipe)
    name = load_adapter(pipe, trained["lora"])  # the name is free
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_adapter(pipe, damaged, adapter_name="second")
    assert list(loaded_adapters(pipe)) == [name]
    assert torch.equal(draw(pipe), draw(load_pipeline(folder / "base", adapter=trained["lora"])))


def test_weights_for_another_model_are_an_error(folder, trained, tmp_path):
    foreign = tmp_path / "foreign"
    shutil.copytree(trained["lora"], foreign)
    state = {f"transformer.{name}": value for name, value in load_file(foreign / LORA_WEIGHTS).items()}
    save_file(state, foreign / LORA_WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="LoRA|lora|weights"):
        load_pipeline(folder / "base", adapter=foreign)


def test_prior_texts_are_all_drawn(folder, tmp_path):
    """Where the number of texts does not divide that of the images."""
    prior = PriorConfig(num_images=5, prompts=("bright square", "dark square", "circle"))
    pipe = load_pipeline(folder / "base")
    data = DataConfig(source="unused", resolution=32)
    prior_data(pipe, prior, data, tmp_path / "prior", "base")
    lines = (tmp_path / "prior" / "metadata.jsonl").read_text().splitlines()
    captions = [json.loads(line)["caption"] for line in lines]
    assert len(captions) == 5 and set(captions) == set(prior.prompts)
