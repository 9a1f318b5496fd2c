"""Self-supervised training: exact resume, crops of their own seed, the teacher, the metric, and what is saved."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, Dinov2Model

from medisyn.conditions import ImageCondition
from medisyn.config import ImageConditionConfig, TrainConfig, parse_config
from medisyn.data.loading import load_images
from medisyn.evaluation.agreement import LabelledFeatures
from medisyn.evaluation.nearest_neighbours import knn_accuracy, knn_predict
from medisyn.tasks.base import item_seed
from medisyn.trainer import Trainer
from tests.components import tiny_image_encoder
from tests.training import write_images

SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "mlp_ratio": 2,
    "local_crop_size": 8,
    "local_crops": 2,
    "head_hidden_size": 16,
    "bottleneck_size": 8,
    "prototypes": 32,
    "class_column": "kind",
    "neighbours": 3,
}


def dino_config(folder: Path, run: str = "run", task=None, **train) -> TrainConfig:
    data = {"source": str(folder / "images"), "resolution": 16, "horizontal_flip": True, "caption_column": None}
    tree = {
        "output_dir": str(folder / run),
        "data": data | {"license_column": "license"},
        "validation": data,
        "task": {"type": "dino"} | SHAPE | (task or {}),
        "optim": {"warmup_steps": 0, "decay_fraction": 0.0, "learning_rate": 1e-3},
        "train": {"steps": 4, "batch_size": 4, "log_every": 1, "checkpoint_every": 2, "ema_decay": 0} | train,
    }
    return parse_config(tree)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dino")
    write_images(folder / "images")
    return folder


def lightly():
    return pytest.importorskip("lightly", reason="DINO training needs medisyn[ssl]")


def make_task(folder: Path, **task):
    lightly()
    from medisyn.tasks.dino import DinoTask

    torch.manual_seed(0)
    return DinoTask(dino_config(folder, task=task))


def batch_of(task, rows: range) -> dict:
    return task.collate([task.sample(row, np.random.default_rng(row)) for row in rows])


def test_an_interrupted_run_ends_with_the_same_bits(folder):
    lightly()
    options = {"task": {"koleo_weight": 0.1, "last_layer_frozen_steps": 1, "teacher_momentum": 0.5}}
    run = Trainer(dino_config(folder, "whole", keep_checkpoints=3, **options)).fit()
    shutil.copytree(run, folder / "parts")
    shutil.rmtree(folder / "parts" / "checkpoints" / "step_00000004")
    (folder / "parts" / "log.jsonl").unlink()
    again = Trainer(dino_config(folder, "parts", keep_checkpoints=3, **options)).fit()
    for file in ("encoder/model.safetensors", "checkpoints/step_00000004/model.safetensors"):
        first, second = load_file(run / file), load_file(again / file)
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    first, second = ([json.loads(line)["loss"] for line in (r / "log.jsonl").open()] for r in (run, again))
    assert first[2:] == second and len(second) == 2


def test_the_run_saves_a_stock_encoder_that_an_image_condition_takes_by_name(folder):
    lightly()
    run = Trainer(dino_config(folder, "saved", validate_every=2, preview_every=4)).fit()
    encoder = AutoModel.from_pretrained(run / "encoder")
    processor = AutoImageProcessor.from_pretrained(run / "encoder")
    assert type(encoder) is Dinov2Model and encoder.config.image_size == 16
    images = load_images(folder / "images", caption_column=None)
    assert processor([images.image(0)], return_tensors="pt").pixel_values.shape == (1, 3, 16, 16)
    condition = ImageCondition.from_config(ImageConditionConfig(encoder=str(run / "encoder")), [])
    assert condition.token_width() == 16 and condition.encoder.config.model_type == "dinov2"
    record = json.loads((run / "encoder" / "training_images.json").read_text())
    assert record["hashes"] == sorted(set(images.hashes()))
    assert record["datasets"] == [{"name": "images", "license": "CC0", "images": 24}]
    lines = [json.loads(line) for line in (run / "log.jsonl").open()]
    assert [line["step"] for line in lines if "validation/knn_accuracy" in line] == [0, 2, 4]
    assert Image.open(run / "previews" / "step_00000004.png").size[0] > 8 * 16


def test_it_saves_the_teacher_and_not_the_student(folder):
    task = make_task(folder, teacher_momentum=1.0)
    with torch.no_grad():
        for parameter in task.student.parameters():
            parameter.add_(1.0)
    task.export(folder / "teacher")
    saved = AutoModel.from_pretrained(folder / "teacher" / "encoder").state_dict()
    student = task.student.encoder.state_dict()
    assert saved.keys() == student.keys()
    assert all(torch.allclose(saved[name] + 1.0, student[name]) for name in saved)


def test_the_teacher_is_the_moving_average_of_the_student_once_a_step(folder):
    task = make_task(folder, teacher_momentum=0.75)
    name, batch = "encoder.layernorm.weight", batch_of(task, range(4))
    with torch.no_grad():
        task.student.get_parameter(name).fill_(3.0)
    task(batch, 0)
    assert task.teacher_weights()[name].eq(1.0).all()
    # momentum 1 - 0.25 (cos(pi step / 3) + 1) / 2 in a run of 4 steps: 0.8125, then 0.9375
    for step, expected in ((1, 1.375), (1, 1.375), (2, 1.4765625)):
        task(batch, step)
        assert torch.allclose(task.teacher_weights()[name], torch.tensor(expected))


def test_only_the_student_is_trained_and_the_prototypes_wait(folder):
    task = make_task(folder, last_layer_frozen_steps=1)
    names = {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    assert names and all(name.startswith("student.") for name in names)
    prototypes = task.student.head.last_layer.weight_v
    for step, moves in ((0, False), (1, True)):
        task.zero_grad()
        task(batch_of(task, range(4)), step)["loss"].backward()
        assert bool(prototypes.grad.abs().sum() > 0) == moves
    assert all(p.grad is not None for name, p in task.named_parameters() if name in names)


def test_crops_depend_on_the_seed_of_the_item_alone(folder):
    task = make_task(folder, rotation=20.0, blur=1.0, grayscale=0.5)
    seed = item_seed(0, 3, 1)
    first = task.sample(5, np.random.default_rng(seed))
    torch.manual_seed(99)
    np.random.seed(99)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    again = task.sample(5, np.random.default_rng(seed))
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])
    other = task.sample(5, np.random.default_rng(seed + 1))
    for name, shape in (("global_crops", (2, 3, 16, 16)), ("local_crops", (2, 3, 8, 8))):
        assert first[name].shape == shape and torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])
    assert not torch.equal(first["global_crops"][0], first["global_crops"][1])
    smaller = make_task(folder, global_crop_size=8).sample(5, np.random.default_rng(seed))
    assert smaller["global_crops"].shape == (2, 3, 8, 8)
    assert "local_crops" not in make_task(folder, local_crops=0).sample(0, np.random.default_rng(0))


def test_the_loss_is_the_cross_entropy_of_the_paper(folder):
    """Equation 2 with multi-crop, written out; the centre starts at zero and follows the teacher's mean."""
    options = {"teacher_temperature": 0.2, "warmup_teacher_temperature": 0.1, "temperature_warmup_steps": 10}
    task = make_task(folder, **options)
    batch = batch_of(task, range(3))
    with torch.no_grad():
        views = [*batch["global_crops"].unbind(1), *batch["local_crops"].unbind(1)]
        outputs = [task.student(view)[0] for view in views]
        loss = task(batch, 5)["loss"]
    targets = [(each / 0.15).softmax(-1) for each in outputs[:2]]  # the teacher is the student at the start
    terms = [
        -(targets[t] * (outputs[s] / 0.1).log_softmax(-1)).sum(-1).mean()
        for t in range(2)
        for s in range(len(views))
        if s != t
    ]
    assert torch.allclose(loss, torch.stack(terms).mean(), rtol=1e-4)
    mean = torch.cat(outputs[:2]).mean(0)
    assert torch.allclose(task.criterion.center[0, 0], 0.1 * mean, rtol=1e-3, atol=1e-6)


def test_sinkhorn_centring_shares_the_prototypes_out_evenly(folder):
    used = {}
    for centering in ("mean", "sinkhorn"):
        task = make_task(folder, centering=centering)
        with torch.no_grad():
            used[centering] = task(batch_of(task, range(8)), 0)["prototype_entropy"].item()
        assert bool(task.criterion.center.any()) == (centering == "mean")
    assert used["sinkhorn"] > max(used["mean"], 0.95 * np.log(32))


@pytest.mark.parametrize("registers", [0, 2])
def test_training_goes_on_from_an_encoder_with_its_registers_and_record(folder, registers):
    lightly()
    encoder, processor = tiny_image_encoder(registers=registers)
    base = folder / f"base_{registers}"
    encoder.save_pretrained(base)
    processor.save_pretrained(base)
    (base / "training_images.json").write_text(json.dumps({"hashes": ["0" * 16], "datasets": []}))
    task = {"base": str(base), "local_crop_size": 14}
    config = dino_config(folder, f"further_{registers}", task=task, steps=1)
    config = parse_config(_with_resolution(config, 28))
    run = Trainer(config).fit()
    further = AutoModel.from_pretrained(run / "encoder")
    assert type(further) is type(encoder) and getattr(further.config, "num_register_tokens", 0) == registers
    assert "0" * 16 in json.loads((run / "encoder" / "training_images.json").read_text())["hashes"]


def _with_resolution(config: TrainConfig, resolution: int) -> dict:
    from medisyn.config import config_to_dict

    tree = config_to_dict(config)
    tree["data"]["resolution"] = tree["validation"]["resolution"] = resolution
    return tree


def test_the_student_comes_to_agree_with_a_teacher_that_stays(folder):
    """With fixed targets the loss must fall; with a moving teacher it may rise, as its outputs spread."""
    task = make_task(folder, teacher_momentum=1.0, center_momentum=1.0)
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
    batch, losses = batch_of(task, range(6)), []
    with torch.no_grad():
        for parameter in task.student.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    for _ in range(15):
        losses.append(task(batch, 1)["loss"])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "train", "message"),
    [
        ({"num_attention_heads": 3}, {}, "hidden_size=16.*num_attention_heads=3"),
        ({"local_crop_size": 12}, {}, "local_crop_size=12.*patch_size=8"),
        ({"global_crop_size": 20}, {}, "global_crop_size=20.*patch_size=8"),
        ({"global_crop_scale": [0.9, 0.4]}, {}, "global_crop_scale=0.9, 0.4"),
        ({"class_column": None}, {"validate_every": 1}, "class_column"),
        ({}, {"ema_decay": 0.9}, "ema_decay.*teacher"),
        ({"prototype": 3}, {}, "unknown key task.dino.prototype.*prototypes"),
    ],
)
def test_impossible_configurations_are_refused(folder, changes, train, message):
    with pytest.raises(ValueError, match=message):
        dino_config(folder, task=changes, **train)


def test_a_wrong_column_or_base_is_an_error_before_training(folder, tmp_path):
    with pytest.raises(ValueError, match="'findings'.*kind"):
        make_task(folder, class_column="findings")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    with pytest.raises(ValueError, match="'resnet'.*dinov2_with_registers"):
        make_task(folder, base=str(tmp_path))


# ---- k-NN accuracy


def test_votes_are_weighted_by_similarity():
    """One close neighbour outvotes two that are far, at a small temperature only."""
    angles = np.array([0.1, 1.0, 1.1])
    bank = LabelledFeatures(np.stack([np.cos(angles), np.sin(angles)], 1) * [[3.0], [1.0], [7.0]], ["a", "b", "b"])
    query = np.array([[2.0, 0.0]])
    assert knn_predict(bank, query, neighbours=3) == ["a"]
    assert knn_predict(bank, query, neighbours=3, temperature=10.0) == ["b"]
    weights = np.exp(np.cos(angles) / 0.5)
    assert knn_predict(bank, query, 3, 0.5) == ["a" if weights[0] > weights[1] + weights[2] else "b"]


def test_accuracy_counts_images_with_a_class_and_resamples_patients():
    rng = np.random.default_rng(0)
    centres = {"a": [5.0, 0, 0], "b": [0, 5.0, 0]}
    labels = ["a", "b"] * 20
    features = np.array([centres[label] for label in labels]) + rng.normal(size=(40, 3))
    bank = LabelledFeatures(features, [*labels[:38], None, None])
    evaluated = LabelledFeatures(features, ["b", *labels[1:39], None], groups=[i // 2 for i in range(40)])
    scores = knn_accuracy(bank, evaluated, neighbours=5)
    assert scores["images"] == 39 and scores["accuracy"] == pytest.approx(38 / 39)
    low, high = scores["accuracy_interval"]
    assert low < scores["accuracy"] <= high


@pytest.mark.parametrize("neighbours", [0, 4])
def test_impossible_votes_are_refused(neighbours):
    bank = LabelledFeatures(np.eye(3), ["a", "b", "a"])
    with pytest.raises(ValueError, match=f"neighbours={neighbours} of 3.*1 to 3"):
        knn_predict(bank, np.eye(3), neighbours)
    with pytest.raises(ValueError, match="width"):
        knn_predict(bank, np.ones((1, 2)), 1)
    with pytest.raises(ValueError, match="none of the evaluated"):
        knn_accuracy(bank, LabelledFeatures(np.eye(3), [None] * 3), 1)
