"""Diffusion training: conditions, prediction types, cached latents, adaptation of a base, and what is exported."""

import json

import numpy as np
import pytest
import torch

from medisyn.backbone import create_pipeline, load_pipeline
from medisyn.config import DiffusionTaskConfig
from medisyn.data.loading import load_images
from medisyn.tasks.base import draw_latents
from medisyn.tasks.diffusion import DiffusionTask
from medisyn.trainer import Trainer
from medisyn.training_record import read_training_record, write_training_record
from tests.components import LABEL_SCHEMA, tiny_image_encoder, tiny_vae
from tests.training import CAPTIONS, diffusion_config, write_base, write_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusion")
    write_images(folder / "images")
    write_base(folder / "base")
    write_base(folder / "labelled", kinds=("text", "labels"))
    write_base(folder / "kl", vae="kl")
    return folder


def batch_of(task, rows=(0, 1, 2, 3)):
    samples = [task.sample(row, np.random.default_rng(row)) for row in rows]
    return task.collate(samples) | {"seed": torch.tensor(rows)}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_model_from_scratch_learns_under_every_prediction_type(folder, prediction_type):
    tiny_vae().save_pretrained(folder / "vae")
    config = diffusion_config(
        folder,
        prediction_type,
        task={"preset": "mini", "base": None, "vae": str(folder / "vae"), "prediction_type": prediction_type},
        train={"steps": 12, "checkpoint_every": 12, "ema_decay": 0.0},
    )
    run = Trainer(config).fit()
    losses = [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert sum(losses[-4:]) < sum(losses[:4])
    pipe = load_pipeline(run)
    assert pipe.scheduler.config.prediction_type == prediction_type and pipe.kinds == ()


def test_text_and_labels_from_scratch_become_a_pipeline_that_takes_both(folder):
    tiny_vae().save_pretrained(folder / "vae")
    (folder / "schema.json").write_text(json.dumps(LABEL_SCHEMA))
    conditions = [
        {"type": "text", "train_encoder": True, "hidden_size": 32, "num_layers": 1, "max_length": 8},
        {"type": "labels", "schema": str(folder / "schema.json")},
    ]
    config = diffusion_config(
        folder,
        "joint",
        data={"label_columns": {"gc": "gc"}},
        task={"preset": "mini", "base": None, "vae": str(folder / "vae"), "conditions": conditions},
        train={"steps": 2},
    )
    pipe = load_pipeline(Trainer(config).fit())
    pipe.set_progress_bar_config(disable=True)
    assert pipe.kinds == ("text", "labels")
    assert pipe(CAPTIONS[0], labels={"gc": 1}, num_inference_steps=2).images[0].size == (32, 32)


def test_the_loss_of_an_item_does_not_depend_on_its_batch(folder):
    task = DiffusionTask(diffusion_config(folder))
    task.options = DiffusionTaskConfig(base="x", preset=None)
    together = task(batch_of(task, (0, 1, 2, 3)), 0)["loss"]
    alone = torch.stack([task(batch_of(task, (row,)), 0)["loss"] for row in range(4)]).mean()
    assert torch.allclose(together, alone, atol=1e-5)


def test_dropping_every_condition_trains_on_the_nulls(folder):
    dropped = [{"type": "text", "dropout": 1.0}, {"type": "labels", "dropout": 1.0}]
    config = diffusion_config(
        folder, task={"base": str(folder / "labelled"), "conditions": dropped}, data={"label_columns": {"gc": "gc"}}
    )
    task = DiffusionTask(config)
    keep = {"text": torch.zeros(2, dtype=torch.bool), "labels": torch.zeros(2, dtype=torch.bool)}
    conditions = task._unet_conditions(task._embeds(task.data, [0, 1]), keep)
    nulls = task.pipe.unet_conditions(batch_size=2)
    assert all(torch.allclose(conditions[name], nulls[name]) for name in nulls)
    kept = task._unet_conditions(task._embeds(task.data, [0, 1]))
    assert not torch.allclose(kept["class_labels"], nulls["class_labels"])


def test_frozen_encoders_are_cached_and_trained_ones_are_not(folder):
    frozen = DiffusionTask(diffusion_config(folder))
    assert set(frozen.data.embeds) == {"text"} and len(frozen.trained_encoders) == 0
    direct = frozen.pipe.encode_prompt([CAPTIONS[1]])
    assert torch.allclose(frozen._embeds(frozen.data, [1])["text"], direct, atol=2e-3)
    trained = DiffusionTask(diffusion_config(folder, task={"conditions": [{"type": "text", "train_encoder": True}]}))
    assert trained.data.embeds == {} and len(trained.trained_encoders) == 1


@pytest.mark.parametrize(("method", "kinds"), [("full", ("text",)), ("lora", ("text", "image", "labels"))])
def test_a_condition_that_is_not_listed_is_taken_out_or_stays_at_its_null(folder, method, kinds):
    base = write_base(folder / "three", kinds=("text", "image", "labels"))
    options = {"base": str(base), "method": method, "conditions": [{"type": "text"}]}
    task = DiffusionTask(diffusion_config(folder, task=options))
    assert set(task.data.embeds) == {"text"}
    conditions = task._unet_conditions(task._embeds(task.data, [0, 1]))
    only_text = task.pipe.unet_conditions(prompt_embeds=task.pipe.encode_prompt([CAPTIONS[0], CAPTIONS[1]]))
    assert all(torch.allclose(conditions[name], only_text[name], atol=2e-3) for name in only_text)
    assert task.pipe.kinds == kinds


def test_latents_of_a_kl_autoencoder_are_sampled_anew_from_cached_moments(folder):
    config = diffusion_config(folder, task={"base": str(folder / "kl"), "cache_dir": str(folder / "cache_kl")})
    task = DiffusionTask(config)
    batch = batch_of(task)
    assert {"mean", "logvar"} <= set(batch)
    first, again = draw_latents(task.pipe, batch), draw_latents(task.pipe, batch)
    other = draw_latents(task.pipe, batch | {"seed": batch["seed"] + 100})
    assert torch.equal(first, again) and not torch.equal(first, other)
    with torch.no_grad():
        images = torch.stack([task.pipe.image_processor.preprocess(task.data.images.image(i))[0] for i in range(4)])
        mean = task.pipe.scale_latents(task.pipe.encode_latents(images)["mean"])
    spread = torch.exp(0.5 * batch["logvar"]) * task.pipe.vae.config.scaling_factor
    assert ((first - mean).abs() < 6 * spread + 1e-2).all()


def test_an_image_condition_is_added_to_a_text_base(folder):
    encoder, processor = tiny_image_encoder()
    encoder.save_pretrained(folder / "dino")
    processor.save_pretrained(folder / "dino")
    conditions = [{"type": "text"}, {"type": "image", "encoder": str(folder / "dino")}]
    config = diffusion_config(folder, "image", task={"conditions": conditions}, train={"steps": 2})
    run = Trainer(config).fit()
    pipe = load_pipeline(run)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.kinds == ("text", "image")
    images = load_images(folder / "images")
    assert pipe(CAPTIONS[0], image=images.image(0), num_inference_steps=2).images[0].size == (32, 32)


def test_horizontal_flips_never_touch_a_stated_side(folder, tmp_path):
    lines = (folder / "images" / "metadata.jsonl").read_text().replace("bright square", "left bright square")
    sided = write_images(tmp_path / "images")
    (sided / "metadata.jsonl").write_text(lines)
    task = DiffusionTask(
        diffusion_config(
            folder, task={"cache_dir": str(tmp_path / "cache")}, data={"source": str(sided), "horizontal_flip": True}
        )
    )
    flips = {row: {task.sample(row, np.random.default_rng(s))["flip"] for s in range(20)} for row in (0, 1)}
    assert flips == {0: {False}, 1: {False, True}}


def test_flip_only_names_what_may_be_mirrored(folder, tmp_path):
    data = {"horizontal_flip": True, "flip_only": {"kind": ["1"]}}
    task = DiffusionTask(diffusion_config(folder, task={"cache_dir": str(tmp_path / "cache")}, data=data))
    flips = {row: {task.sample(row, np.random.default_rng(s))["flip"] for s in range(20)} for row in (0, 1, 2)}
    assert flips == {0: {False}, 1: {False, True}, 2: {False}}
    data["flip_only"] = {"kind": ["7"]}
    with pytest.raises(ValueError, match="data.flip_only: no row has kind='7'; values: 0, 1, 2"):
        DiffusionTask(diffusion_config(folder, data=data))


def test_a_trained_text_encoder_learns_new_words_and_records_all_that_it_knows(folder):
    text = {"type": "text", "train_encoder": True, "paraphrase": 0.5, "new_words": ["sonogram"]}
    base = write_base(folder / "base_with_words", kinds=("text",))
    load = json.loads((base / "model_index.json").read_text()) | {"known_words": ["bright"]}
    (base / "model_index.json").write_text(json.dumps(load))
    task = {"base": str(base), "conditions": [text]}
    pipe = load_pipeline(Trainer(diffusion_config(folder, "words", task=task, train={"steps": 1})).fit())
    assert len(pipe.tokenizer("sonogram", add_special_tokens=False).input_ids) == 1
    assert {"bright", "square", "disc", "radiograph"} <= set(pipe.config.known_words)
    assert pipe.unknown_words("a dark square, OCT, sonogram 12 x") == {"oct": []}


def test_a_model_of_captions_of_the_vocabulary_records_which_modalities_and_findings_those_are(folder, tmp_path):
    source = write_images(tmp_path / "scans", 6)
    lines = (source / "metadata.jsonl").read_text().replace("bright square", "brain MRI slice showing a glioma")
    lines = lines.replace("dark disc", "brain MRI slice with no tumor").replace("grey stripes", "MRI")
    data, text = {"source": str(source)}, [{"type": "text", "train_encoder": True}]
    base = write_base(folder / "base_that_knows", kinds=("text",))
    load = json.loads((base / "model_index.json").read_text()) | {"known_words": ["bright"]}
    (base / "model_index.json").write_text(json.dumps(load))
    task = {"base": str(base), "conditions": text, "cache_dir": str(tmp_path / "cache")}
    expected = {"all canonical": [["no tumor", "glioma"]], "another caption": []}
    for name, last in (("another caption", "MRI"), ("all canonical", "brain MRI slice showing a glioma")):
        (source / "metadata.jsonl").write_text(lines.replace('"MRI"', f'"{last}"'))
        run = Trainer(diffusion_config(folder, name, data=data, task=task, train={"steps": 1})).fit()
        vocabulary = load_pipeline(run).config.get("prompt_vocabulary") or {"modalities": []}
        assert [[names[0] for names in one["findings"]] for one in vocabulary["modalities"]] == expected[name]


def test_a_model_that_does_not_say_what_it_knows_finds_no_unknown_word(folder):
    assert load_pipeline(folder / "base").unknown_words("whatever") == {}


def test_the_exported_pipeline_names_its_training_images(folder):
    run = Trainer(diffusion_config(folder, "exported", train={"steps": 1})).fit()
    record = json.loads((run / "pipeline" / "training_images.json").read_text())
    images = load_images(folder / "images")
    assert record["hashes"] == sorted(set(images.hashes()))
    assert record["datasets"] == [{"name": "images", "license": "CC0", "images": 24}]


def test_a_fine_tuned_model_keeps_the_record_of_its_base(folder, tmp_path):
    first = Trainer(diffusion_config(folder, "first", train={"steps": 1})).fit()
    other = write_images(tmp_path / "others", 6)
    data = {"source": str(other), "license_column": None}
    task = {"base": str(first), "cache_dir": str(tmp_path / "cache")}
    second = Trainer(diffusion_config(folder, "second", data=data, task=task, train={"steps": 1})).fit()
    record = read_training_record(second / "pipeline")
    assert set(record["hashes"]) == {*load_images(folder / "images").hashes(), *load_images(other).hashes()}
    assert {(entry["name"], entry["license"]) for entry in record["datasets"]} == {
        ("images", "CC0"),
        ("others", "not stated"),
    }


def test_the_record_of_an_image_encoder_is_kept(folder, tmp_path):
    """What its encoder has seen, the model has seen."""
    for part in tiny_image_encoder():
        part.save_pretrained(tmp_path / "encoder")
    seen = {"hashes": ["0" * 16], "datasets": [{"name": "unlabelled", "license": "CC0", "images": 1}]}
    write_training_record(tmp_path / "encoder", seen)
    task = {"conditions": [{"type": "image", "encoder": str(tmp_path / "encoder")}]}
    run = Trainer(diffusion_config(folder, "embedded", task=task, train={"steps": 1})).fit()
    record = read_training_record(run / "pipeline")
    assert set(record["hashes"]) == {"0" * 16, *load_images(folder / "images").hashes()}
    assert {entry["name"] for entry in record["datasets"]} == {"images", "unlabelled"}


def test_a_condition_without_data_is_reported(folder, caplog):
    with caplog.at_level("WARNING", logger="medisyn"):
        DiffusionTask(diffusion_config(folder, task={"base": str(folder / "labelled")}))
    assert "no training image has labels" in caplog.text


def test_a_share_of_the_patients_is_held_out_for_validation(folder, tmp_path):
    config = diffusion_config(
        folder,
        "held_out",
        data={"group_column": "patient"},
        task={"cache_dir": str(tmp_path / "cache")},
        train={"steps": 2, "validate_every": 2},
        validation_fraction=0.3,
    )
    trainer = Trainer(config)
    trained = set(trainer.task.data.images.column("patient"))
    held_out = set(trainer.task._validation_images.column("patient"))
    assert trained and held_out and not trained & held_out
    assert "validation/error" in (trainer.fit() / "log.jsonl").read_text()
    hashes = set(read_training_record(folder / "held_out" / "pipeline")["hashes"])
    assert not hashes & set(trainer.task._validation_images.hashes())


def test_rows_are_balanced_by_the_named_columns(folder):
    task = DiffusionTask(diffusion_config(folder, data={"balance_columns": ["kind"], "balance_power": 1.0}))
    kinds = task.data.images.column("kind")
    share = {kind: sum(w for w, k in zip(task.row_weights, kinds, strict=True) if k == kind) for kind in set(kinds)}
    assert all(value == pytest.approx(1 / 3) for value in share.values())


def test_zero_terminal_snr_starts_from_pure_noise(folder):
    tiny_vae().save_pretrained(folder / "vae")
    task = DiffusionTask(
        diffusion_config(
            folder, task={"preset": "mini", "base": None, "vae": str(folder / "vae"), "zero_terminal_snr": True}
        )
    )
    assert task.noising.alphas_cumprod[-1] == pytest.approx(0, abs=1e-8)
    assert create_pipeline("mini").scheduler.config.rescale_betas_zero_snr is False
    batch = batch_of(task)
    assert torch.isfinite(task(batch, 0)["loss"])
