"""DiNO-Diffusion: the two recipes run one after the other on a folder of images of which nothing else is known."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import medisyn
from medisyn.config import load_config
from medisyn.data.loading import load_images
from medisyn.loading import load_pipeline
from medisyn.trainer import Trainer

SCRIPTS = Path(__file__).parent.parent / "scripts"
RECIPES = SCRIPTS / "dino_diffusion"
EMBEDDED_DEFAULT = Path(medisyn.__file__).parent / "pretrained" / "model_index.json"

SMALL = [
    "data.num_workers=0",
    "train.batch_size=4",
    "train.steps=2",
    "train.checkpoint_every=2",
    "train.preview_every=2",
]
SMALL_DINO = [
    *SMALL,
    *("task.hidden_size=16", "task.num_hidden_layers=1", "task.num_attention_heads=2", "task.local_crops=1"),
    *("task.head_hidden_size=16", "task.bottleneck_size=8", "task.prototypes=32", "optim.warmup_steps=0"),
]


@pytest.fixture
def pretrain_dino(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("pretrain_dino")


def write_folder(folder: Path, count: int = 24) -> Path:
    """Images of three sizes in two folders with other names than those of splits, and no table."""
    rng = np.random.default_rng(0)
    for i in range(count):
        place = folder / ("bright", "dark")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        size = (40 + 8 * (i % 3), 40)
        pixels = rng.integers(0, 60, (size[1], size[0], 3)) + 150 * (i % 2 == 0)
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i:02d}.png")
    return folder


@pytest.mark.parametrize("name", ["dino", "diffusion"])
def test_each_recipe_is_valid_names_its_command_and_reads_nothing_but_images(name):
    recipe = RECIPES / f"{name}.yaml"
    config = load_config(recipe)
    assert f"medisyn train scripts/dino_diffusion/{name}.yaml data.source=FOLDER" in recipe.read_text()
    data = config.data
    assert [data.caption_column, data.group_column, data.dataset_column, data.license_column] == [None] * 4
    assert not (data.label_columns or data.label_schema or data.filter or data.balance_columns)
    assert config.validation is None and config.train.validate_every == 0


def test_the_second_recipe_takes_the_encoder_of_the_first_or_a_published_one():
    recipe = RECIPES / "diffusion.yaml"
    (condition,) = load_config(recipe).task.conditions
    assert condition.type == "image" and condition.tokens == "global"
    assert condition.encoder == f"{load_config(RECIPES / 'dino.yaml').output_dir}/encoder"
    for name in ("facebook/dinov2-base", "microsoft/rad-dino", "facebook/dinov3-vits16-pretrain-lvd1689m"):
        assert f"# encoder: {name} " in recipe.read_text()
        assert load_config(recipe, [f"task.conditions.0.encoder={name}"]).task.conditions[0].encoder == name


def test_what_the_second_recipe_says_of_other_starts_is_valid():
    scratch = ["task.base=null", "task.preset=mini", "task.vae=default", "train.steps=24000"]
    assert all(word in (RECIPES / "diffusion.yaml").read_text() for word in scratch)
    assert load_config(RECIPES / "diffusion.yaml", scratch).task.preset == "mini"
    metrics = ["validation={source: OTHER, caption_column: null}", "train.validate_every=1000"]
    assert all(word in (RECIPES / "diffusion.yaml").read_text() for word in metrics)
    assert load_config(RECIPES / "diffusion.yaml", metrics).validation.source == "OTHER"


@pytest.mark.skipif(not EMBEDDED_DEFAULT.exists(), reason="medisyn/pretrained holds no model to start from")
def test_both_recipes_run_on_a_folder_and_the_model_draws_from_an_image(tmp_path):
    pytest.importorskip("lightly", reason="DINO training needs medisyn[ssl]")
    images = write_folder(tmp_path / "images", 8)
    (images / "dark" / "damaged.png").write_bytes(b"no image")
    where = [f"data.source={images}"]
    dino = Trainer(load_config(RECIPES / "dino.yaml", [*SMALL_DINO, *where, f"output_dir={tmp_path / 'dino'}"])).fit()
    changes = [*SMALL, *where, f"output_dir={tmp_path / 'run'}", f"task.conditions.0.encoder={dino / 'encoder'}"]
    changes += ["train.mixed_precision=no", "optim.learning_rate=1e-12", "optim.weight_decay=0"]
    run = Trainer(load_config(RECIPES / "diffusion.yaml", changes)).fit()
    pipe, default = load_pipeline(run), load_pipeline()
    assert pipe.kinds == ("image",) and pipe.text_encoder is None and pipe.label_schema is None
    assert pipe.image_encoder.config.hidden_size == 16 and pipe.config.image_noise["level"] == 0.3
    assert len(pipe.config.image_noise["mean"]) == 16
    for mine, its in ((pipe.vae, default.vae), (pipe.unet.down_blocks, default.unet.down_blocks)):
        its = its.state_dict()
        assert all(torch.allclose(value, its[name], atol=1e-6) for name, value in mine.state_dict().items())
    recorded = json.loads((run / "pipeline" / "training_images.json").read_text())
    found = load_images(str(images), caption_column=None, on_error="skip")
    assert set(found.drop_unreadable().hashes()) <= set(recorded["hashes"])
    assert {"name": "images", "license": "not stated", "images": 8} in recorded["datasets"]
    drawn = pipe(image=found.image(0), num_inference_steps=2).images[0]
    assert drawn.size == (128, 128)


# ---- scripts/pretrain_dino.py --images


def test_a_folder_of_images_gets_the_recipe(pretrain_dino, tmp_path):
    cpu, gpu = (pretrain_dino.configure_images(tmp_path, None, None, hardware) for hardware in pretrain_dino.Hardware)
    assert cpu == load_config(RECIPES / "dino.yaml", [f"data.source={tmp_path}"])
    assert gpu.train.batch_size > cpu.train.batch_size and gpu.data.num_workers > cpu.data.num_workers
    assert gpu.train.validate_every == 0


def test_a_folder_for_each_class_gets_a_metric_and_no_patients(pretrain_dino, tmp_path, caplog):
    pytest.importorskip("lightly", reason="DINO training needs medisyn[ssl]")
    images, out = write_folder(tmp_path / "images", 60), tmp_path / "run"
    config = pretrain_dino.configure_images(images, "label", out, pretrain_dino.Hardware.CPU)
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and "each image is a group of its own" in warnings[0]
    parts = [load_images(each) for each in (config.data, config.validation)]
    assert sum(map(len, parts)) == 60 and 0 < len(parts[1]) < 20
    assert not set(parts[0].hashes()) & set(parts[1].hashes())
    assert set(parts[0].column("label")) == {"bright", "dark"}
    assert parts[0].provenance()[0]["name"] == "images"
    assert pretrain_dino.configure_images(images, "label", out, pretrain_dino.Hardware.CPU) == config
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(medisyn.config.config_to_dict(config)))
    run = Trainer(load_config(tmp_path / "config.yaml", [*SMALL_DINO, "train.validate_every=2"])).fit()
    lines = [json.loads(line) for line in (run / "log.jsonl").open()]
    assert lines[-1]["validation/knn_accuracy"] == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": "images", "class_column": "labels"}, "no column 'labels' in 'images'; columns: label"),
        ({"images": "images/dark", "class_column": "label"}, "two classes or more, it has: dark"),
        ({"images": "images", "data": "data"}, "--data and --images: give one of them"),
        ({"class_column": "label"}, "--class-column needs --images"),
        ({"out": "run"}, "--out needs --images"),
    ],
)
def test_wrong_columns_and_options_are_refused(pretrain_dino, tmp_path, monkeypatch, options, message):
    write_folder(tmp_path / "images", 4)
    monkeypatch.chdir(tmp_path)
    paths = {name: value if name == "class_column" else Path(value) for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        pretrain_dino.main(**{"data": None, "images": None, "class_column": None, "out": None} | paths)


def test_a_wrong_folder_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, str(SCRIPTS / "pretrain_dino.py"), "--images", "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "--images nowhere: no such folder" in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1
