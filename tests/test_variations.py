"""Variations of images: class agreement, likeness to the parent and distances, of constructed and of generated ones.

python -m pytest tests/test_variations.py
"""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from medisyn.data.loading import load_images
from medisyn.evaluation.features import load_extractor
from medisyn.evaluation.fidelity import split_halves
from medisyn.evaluation.inputs import nested_values, open_images
from medisyn.evaluation.scores import score_values
from medisyn.evaluation.utility_classifier import CnnClassifier
from medisyn.evaluation.variations import compare_with_parents, evaluate_variations, recompressed, strangers
from tests.components import tiny_pipeline
from tests.evaluation import evaluation_data, write_images

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("modality", "finding")


# ---- measures -------------------------------------------------------------------------------------------------------


def test_recompression_keeps_an_image_and_costs_more_at_a_lower_quality():
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3)).astype(np.uint8)
    image = Image.fromarray(pixels).resize((640, 480))
    exact = np.asarray(recompressed(image, 48, 95), float)
    errors = [np.abs(np.asarray(recompressed(image, 48, quality), float) - exact).mean() for quality in (75, 50, 5)]
    assert exact.shape == (48, 48, 3) and errors == sorted(errors) and 0 < errors[0] < 20


def test_a_stranger_is_of_the_same_class_and_of_another_patient():
    classes = ["a", "a", "a", "b", "b", None, None]
    groups = [1, 1, 2, 3, 3, 4, 5]
    assert strangers(classes, groups, [0, 1, 3]) == [2, 2, None]
    assert {strangers(classes, groups, [2], seed)[0] for seed in range(20)} == {0, 1}
    assert strangers(classes, None, [3, 4]) == [4, 3]


def test_likeness_to_the_parent():
    parents = np.eye(4)[[0, 0, 1, 1]]
    near, far = parents * 3 + 0.1, np.eye(4)[[1, 1, 0, 0]]
    nothing = np.full((2, 4), np.nan)
    compared = {"near": near, "far": np.concatenate([nothing, far[2:]]), "none": np.concatenate([nothing, nothing])}
    found = compare_with_parents(parents, compared, groups=["a", "a", "b", "b"])
    cosine = 3.1 / np.sqrt(3.1**2 + 3 * 0.1**2)
    assert found["near"]["images"] == 4 and found["near"]["median"] == pytest.approx(cosine)
    assert found["near"]["median_interval"] == pytest.approx([cosine, cosine])
    assert found["near"]["share_above"] == {"far": 1.0} and found["far"]["share_above"] == {"near": 0.0}
    assert (found["far"]["images"], found["far"]["median"]) == (2, 0.0)
    assert found["none"] == {"omitted": "no parent has one"}


def test_the_interval_of_a_median_covers_it_and_widens_with_patients():
    values = np.random.default_rng(0).normal(3, 1, 60).round(1).repeat(5)
    alone, grouped = score_values(values), score_values(values, np.arange(60).repeat(5).tolist())
    widths = [np.ptp(scores["median_interval"]) for scores in (alone, grouped)]
    assert alone["median"] == grouped["median"] == np.median(values) and alone["images"] == 300
    low, high = grouped["median_interval"]
    assert low <= alone["median"] <= high and widths[1] > 1.3 * widths[0]


# ---- from images to the report --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return evaluation_data(tmp_path_factory.mktemp("variations"))


def measure(data, pipe, out, **options):
    images = [open_images(data[name], COLUMNS) for name in ("real", "train")]
    options = {"number": 30, "num_inference_steps": 1, "cache_dir": data["cache_dir"], "progress": False} | options
    return evaluate_variations(pipe, *images, load_extractor(data["extractor"]), out, **options)


def test_the_report_of_a_model(data, tmp_path):
    report = measure(data, tiny_pipeline(("text", "image")), tmp_path)
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert report["images"] == {"real": 168, "train": 90, "parents": 30, "variations": 30, "prompted": 30}
    for column in COLUMNS:
        scores = report["agreement"][column]
        assert scores["parents"]["accuracy"] > 0.9  # their colours tell the classes apart
        assert scores["ratio"]["variations"] == scores["variations"]["accuracy"] / scores["parents"]["accuracy"]
    similarity = report["similarity"]
    assert similarity["jpeg_75"]["median"] > similarity["jpeg_50"]["median"] > similarity["variation"]["median"]
    assert report["checks"]["less like the parent than its JPEG re-compression"]
    assert {name: scores["images"] for name, scores in report["fidelity"].items()} == {
        "variations": 30,
        "prompted": 30,
    }
    page = (tmp_path / "report.md").read_text()
    assert "| modality | variations | 30" in page and "jpeg_50" in page and "| prompted " in page

    real = open_images(data["real"], COLUMNS)
    groups, classes, hashes = real.column("group_id"), nested_values(real, COLUMNS)["finding"], real.hashes()
    reference = {groups[row] for row in split_halves(groups, classes, 0)[0]}
    made = load_images(str(tmp_path / "variations"), caption_column=None)
    parents = [hashes.index(parent) for (parent,) in made.column("parents")]
    assert len(set(parents)) == 30 and not reference & {groups[row] for row in parents}
    assert nested_values(made, COLUMNS)["finding"] == [classes[row] for row in parents]
    prompted = load_images(str(tmp_path / "prompted"), caption_column=None)
    assert prompted.column("prompt") == [real.column("caption")[row] for row in parents]


def test_a_cnn_is_a_second_judge_with_checks_of_its_own(data, tmp_path):
    cnn = CnnClassifier(model="test_resnet", resolution=64, steps=40, batch_size=16, learning_rate=4e-3)
    report = measure(data, tiny_pipeline(("image",)), tmp_path, number=12, cnn=cnn)
    found = report["judge"]
    assert found["classifier"]["resolution"] == report["extractor"]["resolution"] == 32
    scores = found["agreement"]["modality"]
    assert scores["parents"]["accuracy"] > 0.9 and scores["variations"]["images"] == 12
    expected = scores["variations"]["accuracy"] / scores["parents"]["accuracy"] >= 0.85
    assert report["checks"]["agreement on modality is at least 0.85 of the parents', by a CNN"] == expected
    assert "network of the domain" in (tmp_path / "report.md").read_text()


def test_an_interrupted_run_goes_on_and_a_model_without_text_has_no_prompts(data, tmp_path):
    pipe = tiny_pipeline(("image",))
    report = measure(data, pipe, tmp_path, number=5, strategy="perturbation:scale=0.1")
    assert "prompted" not in report["images"] and not (tmp_path / "prompted").exists()
    assert "too few images" in report["fidelity"]["variations"]["omitted"]
    files = sorted((tmp_path / "variations").glob("0*.png"))
    times = [file.stat().st_mtime_ns for file in files]
    assert measure(data, pipe, tmp_path, number=5, strategy="perturbation:scale=0.1") == report
    assert [file.stat().st_mtime_ns for file in files] == times
    with pytest.raises(FileExistsError, match="another request"):
        measure(data, pipe, tmp_path, number=5)


@pytest.mark.parametrize(
    ("kinds", "options", "message"),
    [
        (("image",), {"strategy": "mixture"}, "'mixture' does not give; valid: reconstruction, perturbation, sdedit"),
        (("image",), {"strategy": "prior"}, "one parent"),
        (("text",), {}, "no image condition"),
        (("image",), {"number": 1000}, "valid: 1 to 84"),
        (("image",), {"columns": ["modality", "grade"]}, "no column 'grade'"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_made(data, tmp_path, kinds, options, message):
    with pytest.raises(ValueError, match=message):
        measure(data, tiny_pipeline(kinds), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_training_images_without_two_classes_are_refused_before_anything_is_made(data, tmp_path):
    write_images(tmp_path / "one", 6, 9, pairs=[("CT", "normal"), ("fundus", "normal")])
    with pytest.raises(ValueError, match="no two classes of finding to tell apart"):
        measure(data | {"train": str(tmp_path / "one")}, tiny_pipeline(kinds=("image",)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_script(data, tmp_path):
    tiny_pipeline(("text", "image")).save_pretrained(tmp_path / "model")
    app = typer.Typer()
    app.command()(runpy.run_path(str(ROOT / "scripts" / "variations.py"))["main"])
    arguments = [
        tmp_path / "model",
        tmp_path / "out",
        "--real",
        data["real"],
        "--train",
        data["train"],
        "--parents",
        4,
    ]
    arguments += ["--extractor", data["extractor"], "--cache-dir", data["cache_dir"], "--steps", 1]
    result = CliRunner().invoke(app, [str(part) for part in [*arguments, "--strategy", "sdedit:strength=1"]])
    assert result.exit_code == 0, result.output
    assert "# Variations by sdedit:strength=1.0 of model" in result.stdout
    assert json.loads((tmp_path / "out" / "report.json").read_text())["images"]["variations"] == 4
