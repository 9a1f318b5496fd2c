"""A second judge of labels: a CNN that learns from the real training images."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from medisyn.cards import metrics_of_report
from medisyn.evaluation.agreement import LabelledFeatures, label_agreement
from medisyn.evaluation.utility_classifier import CnnClassifier, Part, cnn_fit
from tests.evaluation import KNEES, evaluation_data, run, write_images

CNN = CnnClassifier(model="test_resnet", resolution=64, steps=40, batch_size=16, learning_rate=4e-3, balanced=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return evaluation_data(tmp_path_factory.mktemp("data"))


def test_a_cnn_judges_labels_beside_the_features(data, tmp_path):
    # A generator that makes nodules whatever it is asked for.
    folder = tmp_path / "images"
    write_images(folder, 40, 5, pairs=[("CT", "nodule")])
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for index, line in enumerate(lines):
        line["finding"] = ("normal", "nodule")[index % 2]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = run(data, str(folder), tmp_path / "out", train=data["train"], cnn=CNN)
    found = report["agreement_cnn"]
    assert found["columns"]["finding"]["real"]["accuracy"] > 0.9
    assert found["columns"]["finding"]["synthetic"]["balanced_accuracy"] == pytest.approx(0.5, abs=0.05)
    assert found["columns"]["modality"]["synthetic"]["accuracy"] > 0.9
    # No larger than the images that are compared, or real ones would be seen sharper than synthetic ones.
    assert found["classifier"]["resolution"] == 32 and found["classifier"]["balanced"]
    written = (tmp_path / "out" / "report.md").read_text()
    assert "by a CNN" in written and "test_resnet at 32 px" in written
    metrics = {metric["name"]: metric for metric in metrics_of_report(report)}
    measured = metrics["agreement with the requested finding, accuracy, by a CNN"]
    assert measured["value"] == found["columns"]["finding"]["synthetic"]["accuracy"]
    assert measured["extractor"] == "test_resnet at 32 px"
    assert metrics["agreement with the requested finding, accuracy"]["extractor"].startswith("timm:test_efficientnet")


def test_grades_get_a_kappa_of_the_cnn_too(data, tmp_path):
    report = run(
        data, data["knees"], tmp_path / "out", "knees", train=data["knees_train"], per=["finding"], ordinal="finding",
        cnn=CNN,
    )  # fmt: skip
    grades = report["agreement_cnn"]["columns"]["finding"]["synthetic"]["ordinal"]["all"]
    assert grades["quadratic_weighted_kappa"] > 0.8 and grades["images"] == 12 * len(KNEES)


def test_without_training_images_there_is_nothing_to_learn_from(data, tmp_path):
    with pytest.raises(ValueError, match="give train"):
        run(data, data["synthetic"], tmp_path / "out", cnn=CNN)
    assert not (tmp_path / "out").exists()
    assert "agreement_cnn" not in run(data, data["synthetic"], tmp_path / "out", train=data["train"])


def test_a_rare_class_is_seen_as_often_as_the_others():
    """Of images that cannot be told apart, a balanced network gives more to the rare class."""
    pixels = np.random.default_rng(0).integers(0, 256, (200, 3, 32, 32), dtype=np.uint8)
    labels = torch.tensor([0] * 190 + [1] * 10)
    part = Part(torch.from_numpy(pixels), labels)
    rare = {}
    for balanced in (False, True):
        cnn = CnnClassifier(model="test_resnet", resolution=32, steps=60, learning_rate=4e-3, balanced=balanced)
        rare[balanced] = cnn.fit_predict([[part]], part.inputs, 2, seed=0)[:, 1].mean()
    assert rare[False] < 0.25 < 0.3 < rare[True]


def test_label_agreement_takes_any_classifier():
    """A network on pixels predicts names of classes, as the logistic regression does."""
    rng = np.random.default_rng(0)
    bright = np.repeat([0, 1], 20)
    pixels = (rng.integers(0, 60, (40, 3, 32, 32)) + 150 * bright[:, None, None, None]).astype(np.uint8)
    images = LabelledFeatures(pixels, ["bright" if each else "dark" for each in bright])
    cnn = CnnClassifier(model="test_resnet", resolution=32, steps=30, batch_size=16, learning_rate=4e-3)
    found = label_agreement(images, {"same": images}, fit=cnn_fit(cnn))
    assert found["same"]["accuracy"] > 0.9


def test_the_command_names_an_unknown_network(data, tmp_path):
    from medisyn.cli import app

    wrong = ["evaluate", data["synthetic"], "--real", data["real"], "--train", data["train"], "--cnn", "resnet10x"]
    result = CliRunner().invoke(app, [*wrong, "--extractor", data["extractor"], "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 or isinstance(result.exception, ValueError)
    assert "resnet10x" in (result.output + str(result.exception))
