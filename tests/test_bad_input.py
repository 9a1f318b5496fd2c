"""Bad input to every command: one line on stderr, exit code 2, no traceback, and not a byte changed on disk.

python -m pytest tests/test_bad_input.py
"""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from medisyn.cli import app
from medisyn.generation.provenance import write_png
from tests.components import tiny_pipeline

CONFIG = """
output_dir: run
data: {source: images}
task: {type: autoencoder}
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with models, images and files, good and bad, that no command below may change."""
    folder = tmp_path_factory.mktemp("workspace")
    for name, kinds in (("model", ("text", "labels")), ("text", ("text",)), ("labels", ("labels",)), ("free", ())):
        tiny_pipeline(kinds).save_pretrained(folder / name)
    tiny_pipeline(("image",)).save_pretrained(folder / "image")

    def broken(name, file, content):
        shutil.copytree(folder / "text", folder / name)
        (folder / name / file).write_bytes(content)

    weights = "unet/diffusion_pytorch_model.safetensors"
    broken("cut-weights", weights, (folder / "text" / weights).read_bytes()[:5000])
    broken("empty-weights", weights, b"")
    broken("no-json", "model_index.json", b"{")
    broken("no-mapping", "model_index.json", b"[]")
    broken("no-unet", "model_index.json", b'{"_class_name": "MediSynPipeline"}')
    broken("bad-config", "unet/config.json", b"not json")
    index = json.loads((folder / "text" / "model_index.json").read_text())
    broken("foreign", "model_index.json", json.dumps({**index, "unet": ["os", "System"]}).encode())
    config = json.loads((folder / "text" / "unet" / "config.json").read_text())
    broken("other-shape", "unet/config.json", json.dumps({**config, "block_out_channels": [32, 32]}).encode())
    broken("bad-record", "training_images.json", b'{"nothing": 1}')
    shutil.copytree(folder / "text", folder / "no-weights")
    (folder / "no-weights" / weights).unlink()
    shutil.copytree(folder / "no-weights", folder / "pickled")
    (folder / "pickled" / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"")

    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / "good.png")
    good = (folder / "good.png").read_bytes()
    (folder / "cut.png").write_bytes(good[: len(good) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("no image")
    (folder / "page.html").write_text("<html></html>")
    (folder / "file").write_text("mine")
    (folder / "link").symlink_to("nowhere")
    (folder / "empty").mkdir()

    (folder / "full").mkdir()
    write_png(Image.new("RGB", (8, 8)), folder / "full" / "00000_x.png", {"seed": 3})
    (folder / "full" / "metadata.jsonl").write_text('{"file_name": "00000_x.png", "seed": 3}\n')
    (folder / "other-metadata").mkdir()
    (folder / "other-metadata" / "metadata.jsonl").write_text("hello\n")
    (folder / "other-grid").mkdir()
    (folder / "other-grid" / "grid.png").write_bytes(good)

    for name, text in {
        "blank.txt": "\n \n",
        "no-json.jsonl": "{",
        "no-object.jsonl": "[1]",
        "no-prompt.jsonl": '{"finding": "glioma"}',
        "empty-prompt.jsonl": '{"prompt": " "}',
        "number.jsonl": '{"prompt": 3}',
        "labels.jsonl": '{"prompt": "x", "labels": "gc=1"}',
        "seed.jsonl": '{"prompt": "x", "seed": 3}',
        "with-labels.jsonl": '{"prompt": "x", "labels": {"gc": 1}}',
        "config.yaml": CONFIG,
        "no-yaml.yaml": "a: [",
        "list.yaml": "- a",
        "empty.yaml": "",
        "no-data.yaml": "output_dir: run\ntask: {type: autoencoder}",
        "task.yaml": CONFIG.replace("autoencoder", "classifier"),
        "key.yaml": CONFIG + "learning_rate: 1",
        "typo.yaml": CONFIG + "train: {step: 1}",
        "file-as-run.yaml": CONFIG.replace("output_dir: run", "output_dir: file"),
    }.items():
        (folder / name).write_text(text)
    (folder / "latin.txt").write_bytes("Röntgen".encode("latin-1"))
    (folder / "latin.yaml").write_bytes("a: ö".encode("latin-1"))
    return folder


def state(folder):
    """Every path below, with the time and the size of each file."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        found[str(path.relative_to(folder))] = (
            status.st_mode,
            0 if path.is_dir() else (status.st_size, status.st_mtime_ns),
        )
    return found


def check(workspace, monkeypatch, arguments, words):
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("MEDISYN_DEBUG", raising=False)
    before = state(workspace)
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and "Traceback" not in line and len(line) < 700
    assert words.lower() in line.lower()
    assert state(workspace) == before


USAGE = {
    "unknown command": (["paint"], "paint"),
    "almost a command": (["generat", "x"], "generate"),
    "unknown option": (["--loud"], "--loud"),
    "unknown option of generate": (["generate", "x", "--colour"], "--colour"),
    "almost an option": (["generate", "x", "--step", "3"], "--steps"),
    "option without value": (["generate", "x", "--steps"], "--steps"),
    "info of two models": (["info", "a", "b"], "b"),
    "doctor with an argument": (["doctor", "now"], "now"),
    "train without configuration": (["train"], "CONFIG"),
    "evaluate without a model": (["evaluate", "--real", "x"], "MODEL_OR_FOLDER"),
    "evaluate without real images": (["evaluate", "model"], "--real"),
}

# Options of `generate "x" --model model --out out` that are refused before a model is loaded.
OPTIONS = {
    "steps 0": (["--steps", "0"], "--steps"),
    "steps -1": (["--steps", "-1"], "--steps"),
    "steps 1001": (["--steps", "1001"], "--steps"),
    "steps 2.5": (["--steps", "2.5"], "--steps"),
    "steps many": (["--steps", "many"], "--steps"),
    "steps empty": (["--steps", ""], "--steps"),
    "num-images 0": (["--num-images", "0"], "--num-images"),
    "num-images -1": (["--num-images", "-1"], "--num-images"),
    "num-images a billion": (["--num-images", "1000000000"], "--num-images"),
    "num-images x": (["--num-images", "x"], "--num-images"),
    "batch-size 0": (["--batch-size", "0"], "--batch-size"),
    "batch-size nan": (["--batch-size", "nan"], "--batch-size"),
    "size 0": (["--size", "0"], "--size"),
    "size -8": (["--size", "-8"], "--size"),
    "size 100": (["--size", "100"], "multiple of 8"),
    "size 130": (["--size", "130"], "multiple of 8"),
    "size huge": (["--size", "1000000"], "--size"),
    "size 32x32": (["--size", "32x32"], "--size"),
    "seed -1": (["--seed", "-1"], "--seed"),
    "seed 1.5": (["--seed", "1.5"], "--seed"),
    "seed too large": (["--seed", str(2**63)], "seed"),
    "seed without room": (["--seed", str(2**63 - 1)], "seed"),
    "guidance nan": (["--guidance", "nan"], "guidance"),
    "guidance inf": (["--guidance", "inf"], "guidance"),
    "guidance negative": (["--guidance", "-1"], "guidance"),
    "guidance large": (["--guidance", "101"], "guidance"),
    "guidance word": (["--guidance", "strong"], "strong"),
    "guidance empty": (["--guidance", ""], "guidance"),
    "guidance of another kind": (["--guidance", "txt=3"], "text, image, labels"),
    "guidance twice": (["--guidance", "text=3,text=2"], "once"),
    "guidance of nothing": (["--guidance", "text="], "guidance"),
    "guidance kind nan": (["--guidance", "text=nan"], "guidance"),
    "guidance trailing comma": (["--guidance", "text=3,"], "guidance"),
    "guidance interval upside down": (["--guidance-interval", "0.8", "0.2"], "0 <= LOW <= HIGH <= 1"),
    "guidance interval of one number": (["--guidance-interval", "0.8"], "--guidance-interval"),
    "guidance interval nan": (["--guidance-interval", "nan", "1"], "--guidance-interval"),
    "guidance rescale 2": (["--guidance-rescale", "2"], "--guidance-rescale"),
    "classifier guidance interval too wide": (
        ["--class-label", "a", "--classifier-guidance-interval", "0", "1.5"],
        "--classifier-guidance-interval",
    ),
    "classifier guidance clip 0": (["--class-label", "a", "--classifier-guidance-clip", "0"], "above 0"),
    "classifier guidance clip alone": (["--classifier-guidance-clip", "1"], "needs --class-label"),
    "scheduler unknown": (["--scheduler", "magic"], "ddim"),
    "scheduler empty": (["--scheduler", ""], "--scheduler"),
    "scheduler of torch": (["--scheduler", "StepLR"], "unknown scheduler"),
    "strength alone": (["--strength", "0.5"], "--init-image"),
    "strength 0": (["--init-image", "good.png", "--strength", "0"], "--strength"),
    "strength 2": (["--init-image", "good.png", "--strength", "2"], "--strength"),
    "strength -0.1": (["--init-image", "good.png", "--strength", "-0.1"], "--strength"),
    "strength nan": (["--init-image", "good.png", "--strength", "nan"], "--strength"),
    "strength word": (["--init-image", "good.png", "--strength", "half"], "--strength"),
    "init-image absent": (["--init-image", "absent.png"], "absent.png"),
    "init-image cut off": (["--init-image", "cut.png"], "cut.png"),
    "init-image empty": (["--init-image", "empty.png"], "empty.png"),
    "init-image text": (["--init-image", "text.png"], "text.png"),
    "init-image folder": (["--init-image", "empty"], "no image file empty"),
    "init-image broken link": (["--init-image", "link"], "link"),
    "like absent": (["--like", "absent.png"], "absent.png"),
    "like cut off": (["--like", "cut.png"], "cut.png"),
    "like html": (["--like", "page.html"], "page.html"),
    "like nothing": (["--like", ""], "--like"),
    "prompt empty": ([""], "prompt is empty"),
    "prompt blank": ([" \t\n"], "prompt is empty"),
    "one prompt of two blank": (["lung", "  "], "prompt is empty"),
    "negative prompt blank": (["--negative-prompt", " "], "--negative-prompt"),
    "labels empty": (["--labels", ""], "field=value"),
    "labels without value": (["--labels", "gc"], "field=value"),
    "labels without field": (["--labels", "=1"], "field=value"),
    "labels field twice": (["--labels", "gc=1, gc=0"], "twice"),
    "labels second bad": (["--labels", "gc=1", "--labels", "gc="], "field=value"),
    "demo and prompt": (["--demo"], "--demo"),
    "prompts file absent": (["--prompts-file", "absent.txt"], "absent.txt"),
    "prompts file folder": (["--prompts-file", "empty"], "no prompts file"),
    "prompts file blank": (["--prompts-file", "blank.txt"], "no prompts"),
    "prompts file latin-1": (["--prompts-file", "latin.txt"], "UTF-8"),
    "prompts file not JSON": (["--prompts-file", "no-json.jsonl"], "line 1"),
    "prompts file no object": (["--prompts-file", "no-object.jsonl"], "line 1"),
    "prompts file no prompt": (["--prompts-file", "no-prompt.jsonl"], "neither prompt nor labels"),
    "prompts file empty prompt": (["--prompts-file", "empty-prompt.jsonl"], "prompt is empty"),
    "prompts file number": (["--prompts-file", "number.jsonl"], "must be text"),
    "prompts file label text": (["--prompts-file", "labels.jsonl"], "must be an object"),
    "prompts file seed": (["--prompts-file", "seed.jsonl"], "seed"),
    "labels in both": (["--prompts-file", "with-labels.jsonl", "--labels", "gc=1"], "prompts file"),
    "device unknown": (["--device", "abacus"], "cpu"),
    "device absent": (["--device", "cuda:99"], "cpu"),
    "device empty": (["--device", ""], "--device"),
    "adapter empty": (["--adapter", ""], "--adapter"),
    "out empty": (["--out", ""], "--out"),
    "out is a file": (["--out", "file"], "file"),
    "out below a file": (["--out", "file/deep/er"], "file"),
    "out is a broken link": (["--out", "link"], "link"),
    "out has a long name": (["--out", "x" * 300], "too long"),
    "out cannot be made": (["--out", "/proc/medisyn"], "/proc/medisyn"),
}

# Other options of the same command, refused by what the model or the output folder is.
WITH_MODEL = {
    "unknown label": (["--labels", "cataract=1"], "dr_grade"),
    "value outside its field": (["--labels", "dr_grade=5"], "0, 1, 2, 3, 4"),
    "value of a binary field": (["--labels", "gc=maybe"], "0, 1"),
    "label by two names": (["--labels", "gc=1, Glaucoma=1"], "twice"),
    "labels for a model without": (["--model", "text", "--labels", "gc=1"], "no labels condition"),
    "prompt for a label model": (["--model", "labels"], "no text condition"),
    "prompt for an unconditional model": (["--model", "free"], "unconditional"),
    "like for a text model": (["--like", "good.png"], "no image condition"),
    "guidance of a kind it has not": (["--guidance", "image=2"], "text, labels"),
    "adapter absent": (["--adapter", "adapters/none-of-these/here"], "adapter"),
    "adapter without weights": (["--adapter", "empty"], "adapter"),
    "adapter that is a model": (["--adapter", "text"], "adapter"),
    "other request": (["--out", "full"], "another request"),
    "other metadata": (["--out", "other-metadata"], "metadata.jsonl"),
    "other metadata, overwritten": (["--out", "other-metadata", "--overwrite"], "metadata.jsonl"),
    "other grid": (["--out", "other-grid"], "grid.png"),
}

MODELS = {
    "absent": ("absent", "absent"),
    "empty": ("", "model is empty"),
    "blank": ("  ", "model is empty"),
    "path that is not there": ("./models/none", "models/none"),
    "Hub name, offline": ("owner/not-in-the-cache", "owner/not-in-the-cache"),
    "address": ("https://example.com/model", "example.com"),
    "empty folder": ("empty", "empty"),
    "image": ("good.png", "good.png"),
    "folder of images": ("full", "full"),
    "index is not JSON": ("no-json", "model_index.json"),
    "index is no mapping": ("no-mapping", "no-mapping"),
    "index without a UNet": ("no-unet", "unet"),
    "foreign component": ("foreign", "foreign"),
    "component configuration is not JSON": ("bad-config", "config.json"),
    "no weights": ("no-weights", "safetensors"),
    "pickled weights": ("pickled", "pickled"),
    "cut weights": ("cut-weights", "cut-weights"),
    "empty weights": ("empty-weights", "empty-weights"),
    "weights of another shape": ("other-shape", "other-shape"),
}

OTHERS = {
    "nothing to generate from": (["generate", "--out", "out"], "nothing to generate"),
    "nothing for a text model": (["generate", "--model", "text", "--out", "out"], "this model takes: text"),
    "start image alone": (["generate", "--init-image", "good.png", "--out", "out"], "nothing to generate"),
    "negative prompt for a label model": (
        ["generate", "--labels", "gc=1", "--negative-prompt", "x", "--model", "labels", "--out", "out"],
        "negative prompt",
    ),
    "prompt and like": (
        ["generate", "x", "--like", "good.png", "--model", "image", "--out", "out"],
        "no text condition",
    ),
    "generate with a broken model": (["generate", "x", "--model", "cut-weights", "--out", "out"], "cut-weights"),
    "info of a bad record": (["info", "bad-record"], "training_images.json"),
    "configuration absent": (["train", "absent.yaml"], "absent.yaml"),
    "configuration is a folder": (["train", "empty"], "empty"),
    "configuration is an image": (["train", "good.png"], "good.png"),
    "configuration is not YAML": (["train", "no-yaml.yaml"], "not YAML"),
    "configuration is a list": (["train", "list.yaml"], "output_dir"),
    "configuration is empty": (["train", "empty.yaml"], "output_dir"),
    "configuration in latin-1": (["train", "latin.yaml"], "not YAML"),
    "configuration without data": (["train", "no-data.yaml"], "data"),
    "unknown task": (["train", "task.yaml"], "diffusion"),
    "unknown key": (["train", "key.yaml"], "learning_rate"),
    "mistyped key": (["train", "typo.yaml"], "steps"),
    "override without value": (["train", "config.yaml", "train.steps"], "train.steps"),
    "override of nothing": (["train", "config.yaml", "=3"], "=3"),
    "override of an unknown key": (["train", "config.yaml", "train.stepz=3"], "steps"),
    "override of a value as a section": (["train", "config.yaml", "output_dir.x=3"], "output_dir"),
    "steps 0 in training": (["train", "config.yaml", "train.steps=0", "--dry-run"], "train.steps"),
    "steps x in training": (["train", "config.yaml", "train.steps=x", "--dry-run"], "train.steps"),
    "negative learning rate": (["train", "config.yaml", "optim.learning_rate=-1", "--dry-run"], "learning_rate"),
    "NaN learning rate": (["train", "config.yaml", "optim.learning_rate=.nan", "--dry-run"], "learning_rate"),
    "run folder is a file": (["train", "file-as-run.yaml"], "file"),
    "per empty": (["evaluate", "full", "--real", "full", "--per", ""], "--per"),
    "per with a gap": (["evaluate", "full", "--real", "full", "--per", "modality,,finding"], "--per"),
    "real empty": (["evaluate", "full", "--real", ""], "--real"),
    "train empty": (["evaluate", "full", "--real", "full", "--train", " "], "--train"),
    "model empty": (["evaluate", "", "--real", "full"], "empty"),
    "one image to evaluate": (["evaluate", "text", "--real", "full", "--num-images", "1"], "--num-images"),
    "evaluate steps 0": (["evaluate", "text", "--real", "full", "--steps", "0"], "--steps"),
    "evaluate guidance nan": (["evaluate", "text", "--real", "full", "--guidance", "nan"], "guidance"),
    "evaluate seed -1": (["evaluate", "text", "--real", "full", "--seed", "-1"], "--seed"),
    "evaluate extractor empty": (["evaluate", "full", "--real", "full", "--extractor", ""], "--extractor"),
    "evaluate into a file": (["evaluate", "full", "--real", "full", "--out", "file"], "file"),
    "evaluate with real images that are absent": (
        ["evaluate", "full", "--real", "absent/", "--out", "empty"],
        "absent",
    ),
    "evaluate an absent folder": (["evaluate", "./absent", "--real", "full", "--out", "empty"], "absent"),
    "evaluate a broken model": (["evaluate", "no-json", "--real", "full", "--out", "empty"], "model_index.json"),
    "evaluate by an unknown column": (
        ["evaluate", "full", "--real", "full", "--per", "colour", "--out", "empty"],
        "colour",
    ),
    "evaluate with an unknown extractor": (
        ["evaluate", "full", "--real", "full", "--extractor", "eyes", "--out", "empty"],
        "eyes",
    ),
}


def table(cases):
    return pytest.mark.parametrize(("arguments", "words"), cases.values(), ids=cases)


@table(USAGE)
def test_usage(workspace, monkeypatch, arguments, words):
    check(workspace, monkeypatch, arguments, words)


@table(OPTIONS)
def test_generate_refuses_before_loading(workspace, monkeypatch, arguments, words):
    check(workspace, monkeypatch, ["generate", "x", "--model", "absent", "--out", "out", *arguments], words)


@table(WITH_MODEL)
def test_generate_refuses_what_the_model_cannot_do(workspace, monkeypatch, arguments, words):
    arguments = ["generate", "x", "--steps", "2", "--model", "model", "--out", "out", *arguments]
    check(workspace, monkeypatch, arguments, words)


@pytest.mark.parametrize(("name", "words"), MODELS.values(), ids=MODELS)
def test_model(workspace, monkeypatch, name, words):
    check(workspace, monkeypatch, ["info", name], words)


@table(OTHERS)
def test_other(workspace, monkeypatch, arguments, words):
    check(workspace, monkeypatch, arguments, words)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission(workspace, monkeypatch, tmp_path):
    tmp_path.chmod(0o500)
    check(workspace, monkeypatch, ["generate", "x", "--model", "model", "--out", str(tmp_path / "out")], "denied")


def test_checkpoint_of_another_configuration(workspace, monkeypatch, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    config = workspace / "config.yaml"
    resolved = CliRunner().invoke(app, ["train", str(config), f"output_dir={run}", "--dry-run"]).stdout
    (run / "config.yaml").write_text(resolved)
    before = state(run)
    check(workspace, monkeypatch, ["train", "config.yaml", f"output_dir={run}", "train.batch_size=8"], "batch_size")
    assert state(run) == before
