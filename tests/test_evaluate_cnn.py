"""A second judge: a CNN that learns the classes from the real training images."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from medisyn.card_metrics import metrics_of_report
from medisyn.cli import app
from medisyn.data.loading import load_images
from medisyn.evaluation.judge import train_judge
from medisyn.evaluation.utility_classifier import CnnClassifier, Part
from tests.evaluation import KNEES, evaluation_data, nodules_for_everything, run, write_images

COLUMNS = ("modality", "finding")
CNN = CnnClassifier(model="test_resnet", resolution=64, steps=40, batch_size=16, learning_rate=4e-3, balanced=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return evaluation_data(tmp_path_factory.mktemp("data"))


def test_a_network_of_the_domain_judges_beside_the_features(data, tmp_path):
    folder = nodules_for_everything(tmp_path / "images", 40)
    report = run(data, folder, tmp_path / "out", train=data["train"], cnn=CNN)
    found = report["judge"]
    assert found["agreement"]["finding"]["real"]["accuracy"] > 0.9
    assert found["agreement"]["finding"]["synthetic"]["balanced_accuracy"] == pytest.approx(0.5, abs=0.05)
    assert found["agreement"]["modality"]["synthetic"]["accuracy"] > 0.9
    # One kind of image in place of three is far from real images in its features, too.
    assert found["fidelity"]["overall"]["frechet_distance"]["ratio"] > 2
    # No larger than the images that are compared, or real ones would be seen sharper than synthetic ones.
    assert found["classifier"]["resolution"] == 32 and found["classifier"]["classes"] == 3
    written = (tmp_path / "out" / "report.md").read_text()
    assert "network of the domain" in written and "test_resnet at 32 px" in written
    metrics = {metric["name"]: metric for metric in metrics_of_report(report)}
    measured = metrics["agreement with the requested finding, accuracy, by a CNN of the domain"]
    assert measured["value"] == found["agreement"]["finding"]["synthetic"]["accuracy"]
    assert measured["extractor"] == "test_resnet at 32 px"
    assert metrics["agreement with the requested finding, accuracy"]["extractor"].startswith("timm:test_efficientnet")
    distance = metrics["Fréchet distance, by a CNN of the domain"]["value"]
    assert distance == found["fidelity"]["overall"]["frechet_distance"]["synthetic"]


def test_grades_get_a_kappa_too(data, tmp_path):
    sources = {"train": data["knees_train"], "per": ["finding"], "ordinal": "finding", "cnn": CNN}
    report = run(data, data["knees"], tmp_path / "out", "knees", **sources)
    grades = report["judge"]["agreement"]["finding"]["synthetic"]["ordinal"]["all"]
    assert grades["quadratic_weighted_kappa"] > 0.8 and grades["images"] == 12 * len(KNEES)


def test_without_training_images_there_is_nothing_to_learn_from(data, tmp_path):
    with pytest.raises(ValueError, match="give train"):
        run(data, data["synthetic"], tmp_path / "out", cnn=CNN)
    assert not (tmp_path / "out").exists()
    assert "judge" not in run(data, data["synthetic"], tmp_path / "out", train=data["train"])


def test_a_judge_is_trained_once(data, tmp_path, monkeypatch):
    train = load_images(data["train"], caption_column=None)
    quick = replace(CNN, resolution=32, steps=2)
    first = train_judge(quick, train, COLUMNS, cache_dir=tmp_path)
    (kept,) = tmp_path.glob("judge-*.safetensors")
    fits = []
    monkeypatch.setattr(CnnClassifier, "fit", lambda self, *given: fits.append(given) or first.network)
    again = train_judge(quick, train, COLUMNS, cache_dir=tmp_path)
    assert not fits and again.classes == first.classes == (
        ("CT", "CT / nodule"),
        ("CT", "CT / normal"),
        ("fundus", "fundus / normal"),
    )
    pixels = quick.inputs(train).numpy()[:4]
    assert np.array_equal(first.features(pixels), again.features(pixels)) and first.features(pixels).shape[0] == 4
    # Another question is another network; what a killed run has left behind is no network.
    train_judge(quick, train, COLUMNS[:1], cache_dir=tmp_path)
    train_judge(replace(quick, steps=3), train, COLUMNS, cache_dir=tmp_path)
    train_judge(quick, train, COLUMNS, seed=1, cache_dir=tmp_path)
    assert len(fits) == 3
    kept.write_bytes(b"half")
    train_judge(quick, train, COLUMNS, cache_dir=tmp_path)
    save_file({"other": torch.zeros(1)}, kept)
    train_judge(quick, train, COLUMNS, cache_dir=tmp_path)
    assert len(fits) == 5


def test_a_judge_adds_the_inner_classes_up_and_keeps_to_those_that_are_asked_for(data):
    train = load_images(data["train"], caption_column=None)
    judge = train_judge(replace(CNN, resolution=32), train, COLUMNS)
    pixels = judge.cnn.inputs(train).numpy()
    modality = judge.restrict(pixels, train.column("modality"))
    assert modality.classes_.tolist() == ["CT", "fundus"]
    assert (modality.predict(pixels) == np.array(train.column("modality"))).mean() > 0.9
    within = judge.restrict(pixels, ["CT / nodule", "CT / normal"]).predict(pixels)
    assert set(within) <= {"CT / nodule", "CT / normal"}  # also of what is no CT at all


def test_an_image_without_an_inner_class_stands_for_its_outer_one(data, tmp_path):
    folder = tmp_path / "train"
    write_images(folder, 4, 9)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for line in lines:
        if line["modality"] == "fundus":
            line["finding"] = None
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    judge = train_judge(replace(CNN, resolution=32, steps=2), load_images(str(folder), caption_column=None), COLUMNS)
    assert judge.classes == (("CT", "CT / nodule"), ("CT", "CT / normal"), ("fundus",))
    with pytest.raises(ValueError, match="two classes"):
        one = load_images(write_images(tmp_path / "one", 4, 9, pairs=[("CT", "nodule")]), caption_column=None)
        train_judge(CNN, one, COLUMNS)


def test_what_the_judge_cannot_judge_is_omitted_and_costs_nothing_else(data, tmp_path):
    one = write_images(tmp_path / "one", 20, 11, pairs=[("CT", "nodule")])
    plain = write_images(tmp_path / "plain", 20, 12, columns=("modality", "group_id"))
    report = run(data, data["synthetic"], tmp_path / "a", train=one, cnn=CNN)
    assert "two classes" in report["judge"]["omitted"] and report["fidelity"]["overall"]["images"] == 84
    assert "Omitted: a judge needs two classes" in (tmp_path / "a" / "report.md").read_text()
    assert not [metric for metric in metrics_of_report(report) if "CNN" in metric["name"]]
    report = run(data, data["synthetic"], tmp_path / "b", train=plain, cnn=CNN, per=list(COLUMNS))
    assert report["judge"]["agreement"]["modality"]["synthetic"]["accuracy"] > 0.9
    assert "no column 'finding'" in report["judge"]["agreement"]["finding"]["omitted"]


def test_a_class_is_not_taken_for_a_part_of_another_with_a_longer_name(data):
    train = load_images(data["train"], caption_column=None)
    judge = replace(
        train_judge(replace(CNN, resolution=32), train, COLUMNS[:1]), classes=(("CT",), ("CT / contrast",))
    )
    pixels = judge.cnn.inputs(train).numpy()
    found = judge.restrict(pixels, ["CT", "CT / contrast"]).predict(pixels)
    wanted = {"CT": "CT", "fundus": "CT / contrast"}  # which of the two outputs it is
    assert (found == np.array([wanted[name] for name in train.column("modality")])).mean() > 0.9


def test_a_last_batch_of_one_image_is_no_obstacle():
    """A network that ends in one pixel has no batch statistics of a single image."""
    cnn = CnnClassifier(resolution=32, steps=1, batch_size=8)
    inputs = torch.zeros(65, 3, 32, 32, dtype=torch.uint8)
    assert cnn.fit_predict([[Part(inputs, torch.arange(65) % 2)]], inputs[:2], 2, seed=0).shape == (2, 2)


def test_a_network_of_another_size_is_refused_before_anything_is_drawn(data, tmp_path):
    wrong = ["evaluate", data["synthetic"], "--real", data["real"], "--train", data["train"]]
    wrong += ["--cnn", "vit_tiny_patch16_224", "--extractor", data["extractor"], "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, wrong)
    assert result.exit_code == 2 and "vit_tiny_patch16_224 cannot judge images of 64 px" in result.output
    assert not list(tmp_path.glob("out/*"))


def test_a_rare_class_is_seen_as_often_as_the_others():
    """Of images that cannot be told apart, a balanced network gives more to the rare class."""
    pixels = np.random.default_rng(0).integers(0, 256, (200, 3, 32, 32), dtype=np.uint8)
    part = Part(torch.from_numpy(pixels), torch.tensor([0] * 190 + [1] * 10))
    rare = {}
    for balanced in (False, True):
        cnn = CnnClassifier(model="test_resnet", resolution=32, steps=60, learning_rate=4e-3, balanced=balanced)
        rare[balanced] = cnn.fit_predict([[part]], part.inputs, 2, seed=0)[:, 1].mean()
    assert rare[False] < 0.25 < 0.3 < rare[True]


def test_the_command_names_an_unknown_network(data, tmp_path):
    wrong = ["evaluate", data["synthetic"], "--real", data["real"], "--train", data["train"], "--cnn", "resnet10x"]
    result = CliRunner().invoke(app, [*wrong, "--extractor", data["extractor"], "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and "resnet10x" in result.output and "timm.list_models()" in result.output
    assert not (tmp_path / "out").exists()
