"""The scripts on embeddings, strategies and segments: what they make of their arguments, end to end on tiny models.

python -m pytest tests/test_scripts_of_embeddings.py
"""

import json
import runpy
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from medisyn.data.loading import load_images
from medisyn.training_record import write_training_record
from tests.components import tiny_pipeline
from tests.utility import write_extractor, write_labelled

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def script(name, *arguments):
    """A script with a typer `main`, its errors as exceptions."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(runpy.run_path(str(SCRIPTS / f"{name}.py"))["main"])
    return CliRunner().invoke(app, [str(each) for each in arguments])


# ---- knn_accuracy ---------------------------------------------------------------------------------------------------


def test_neighbours_by_the_image_encoder_of_a_saved_pipeline(tmp_path):
    tiny_pipeline(("image",)).save_pretrained(tmp_path / "model")
    sets = [write_labelled(tmp_path / name, 6, seed) for name, seed in (("training", 1), ("validation", 2))]
    options = ["--training", sets[0], "--validation", sets[1], "--neighbours", 3, "--cache-dir", tmp_path / "cache"]
    done = script("knn_accuracy", tmp_path / "model" / "image_encoder", *options)
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads(done.stdout)
    assert found["bank"] == 18 and found["images"] == 18 and 0 <= found["accuracy"] <= 1


# ---- autoencoder_fidelity -------------------------------------------------------------------------------------------


def test_an_autoencoder_is_measured_without_its_diffusion_model(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "model")
    sets = [write_labelled(tmp_path / name, 10, seed, spread=5) for name, seed in (("train", 1), ("real", 2))]
    options = ["--train", sets[0], "--real", sets[1], "--extractor", write_extractor(tmp_path)]
    options += ["--columns", "finding", "--cache-dir", tmp_path / "cache"]
    done = script("autoencoder_fidelity", tmp_path / "model", *options)
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads(done.stdout)
    assert found["images"] == 30 and found["psnr"] == pytest.approx(np.mean(list(found["psnr_by_finding"].values())))
    assert found["frechet_distance"] > found["frechet_distance_of_real"] > 0  # the tiny autoencoder is untrained
    assert found["finding_agreement"]["real"][0] >= 0.9 > found["finding_agreement"]["reconstructed"][0]


# ---- benchmarks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [("text",), ()])
def test_the_speed_of_any_model_is_measured(tmp_path, kinds):
    tiny_pipeline(kinds).save_pretrained(tmp_path / "model")
    done = script("benchmarks/sampling_speed", tmp_path / "model", "--images", 2, "--steps", 1, "--rounds", 2)
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["images"] == 2 and found["load_seconds"] > 0 and found["batch_seconds"] > 0


# ---- segmentation ---------------------------------------------------------------------------------------------------


def masked_images(folder, count):
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = {"image": [], "mask": []}
    for index in range(count):
        pixels, mask = rng.integers(100, 200, (32, 32, 3)), np.zeros((32, 32))
        pixels[8:24, 4:12], mask[8:24, 4:12] = 30, 255
        for kind, array in (("image", pixels), ("mask", mask)):
            Image.fromarray(array.astype(np.uint8)).save(folder / f"{kind}{index}.png")
            rows[kind].append(str(folder / f"{kind}{index}.png"))
    features = datasets.Features({name: datasets.Image() for name in rows})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / "data.parquet"))
    return str(folder / "data.parquet")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--timesteps", "1,x"), "--timesteps must be whole numbers of at least 0 joined by commas, not '1,x'"),
        (("--timesteps", ""), "--timesteps must be whole numbers"),
        (("--timesteps", "100,-3"), "--timesteps must be whole numbers"),
        (("--development", "0", "--timesteps", "100,300"), "need --development 1 or more"),
        (("--development", "0", "--layers", "up_blocks.0,mid_block"), "need --development 1 or more"),
    ],
)
def test_segmentation_tells_wrong_options_before_it_reads_anything(tmp_path, options, message):
    done = script("segmentation", tmp_path / "none.parquet", "lungs", tmp_path / "out", *options)
    assert isinstance(done.exception, ValueError) and message in str(done.exception)
    assert "\n" not in str(done.exception)


def test_segmentation_leaves_out_what_the_model_was_trained_on(tmp_path):
    source = masked_images(tmp_path / "masks", 50)
    hashes = load_images(source, caption_column=None).hashes()
    model = tmp_path / "model"
    tiny_pipeline().save_pretrained(model)
    write_training_record(model, {"hashes": [hashes[1]], "datasets": []})
    options = ["--model", model, "--segments", 2, "--references", 2, "--draws", 1, "--development", 0]
    done = script("segmentation", source, "lungs", tmp_path / "out", *options)
    assert done.exit_code == 0, (done.output, done.exception)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["seen_in_training"]["left_out"] == 1
    assert report["all"]["model"]["rule"]["images"] == 49  # the one that was seen is not scored


# ---- utility_of_strategies ------------------------------------------------------------------------------------------


@pytest.fixture
def utility_of_strategies(monkeypatch):
    """Runs the script, whose arguments are those of argparse."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["utility_of_strategies.py", *map(str, arguments)])
        runpy.run_path(str(SCRIPTS / "utility_of_strategies.py"))["main"]()

    return run


def write_corpus(folder):
    """train-0.parquet and validation-0.parquet of the data set "ours"."""
    for split, number, seed in (("train", 4, 1), ("validation", 3, 2)):
        source = Path(write_labelled(folder / f"{split}_images", number, seed, dataset="ours", modality="CT"))
        lines = [json.loads(line) for line in (source / "metadata.jsonl").read_text().splitlines()]
        rows = {name: [line[name] for line in lines] for name in lines[0] if name != "file_name"}
        rows["image"] = [str(source / line["file_name"]) for line in lines]
        features = datasets.Features({name: datasets.Value("string") for name in rows} | {"image": datasets.Image()})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}-0.parquet"))
    return folder


def test_strategies_are_measured_by_the_command_and_shown_with_their_p(tmp_path, utility_of_strategies, capsys):
    model, corpus = tmp_path / "model", write_corpus(tmp_path / "corpus")
    tiny_pipeline(("image",)).save_pretrained(model)
    quick = ["--classifier", "cnn", "--cnn", "test_resnet", "--cnn-steps", 2, "--cnn-resolution", 32]
    quick += ["--folds", 1, "--num-real", 6, "--ratios", 1, "--regimes", "both", "--steps", 1, "--device", "cpu"]
    chosen = ["--strategy", "reconstruction", "--strategy", "mixture:neighbours=1", "--model", model]
    sources = ["--corpus", corpus, "--datasets", "ours", "--out", tmp_path / "out"]
    utility_of_strategies(*sources, *chosen, *quick)
    shown = capsys.readouterr().out
    assert not (tmp_path / "out" / "ours" / "prompted").exists()  # only what was asked for
    results = json.loads((tmp_path / "out" / "ours" / "utility" / "utility.json").read_text())["results"]
    assert {row["strategy"] for row in results} == {None, "reconstruction", "mixture:neighbours=1"}
    rows = [[part.strip() for part in line.split("|")[1:-1]] for line in shown.splitlines() if line.startswith("|")]
    header, own = rows[0], {row[3]: row for row in rows if row[3:4]}
    assert header[-3:] == ["accuracy", "macro-F1", "macro AUC"]
    for row in results[1:]:
        accuracy, gain = row["scores"]["accuracy"]["value"], row["gain"]["accuracy"]["gain"]
        assert own[row["strategy"]][-3].startswith(f"{accuracy:.3f} ({gain:+.3f}, p ")
        assert ", p " in own[row["strategy"]][-2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--strategy", "teleport"), "'teleport'.*or prompted"),
        (("--strategy", "sdedit", "--strategy", "sdedit"), "sdedit is given twice"),
        (("--strategy", "prior"), "--strategy prior and --prior DIR go together"),
        (("--prior", "absent"), "--strategy prior and --prior DIR go together"),
        (("--pool-only", "--strategy", "mixture"), "--pool-only draws prompted images alone"),
    ],
)
def test_strategies_that_are_not_are_told_at_once(tmp_path, utility_of_strategies, options, message):
    with pytest.raises(ValueError, match=message):
        utility_of_strategies("--corpus", tmp_path / "none", "--datasets", "ours", "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()
