"""The recipes of the embedded default: every stage parses, hardware changes what it must, stages follow each other."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from medisyn.backbone import load_autoencoder
from medisyn.conditions import ImageCondition
from medisyn.config import load_config
from tests.components import tiny_pipeline

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture
def stages(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("embedded_default.stages")


def all_stages(stages):
    return [stage for names in stages.STAGES.values() for stage in names] + ["diffusion", "matching"]


def test_a_gpu_sees_as_many_images_in_larger_steps(stages):
    for stage in all_stages(stages)[:-2]:
        cpu, gpu = (stages.configure(stage, Path("elsewhere"), hardware) for hardware in stages.Hardware)
        images = [config.train.steps * config.train.batch_size for config in (cpu, gpu)]
        assert images[1] == pytest.approx(images[0], rel=0.01) and gpu.train.batch_size > cpu.train.batch_size
        assert gpu.optim.learning_rate == pytest.approx(2 * cpu.optim.learning_rate)


def test_a_gpu_sees_more_images_in_the_diffusion_stage_and_trains_a_larger_unet(stages):
    cpu, gpu = (stages.configure("diffusion", Path("elsewhere"), hardware) for hardware in stages.Hardware)
    assert gpu.train.steps * gpu.train.batch_size > 5 * cpu.train.steps * cpu.train.batch_size
    assert (cpu.task.preset, gpu.task.preset) == ("mini", "mini-wide")


def test_parts_of_another_pipeline_can_stand_in_for_earlier_stages(stages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_pipeline(kinds=("text", "image")).save_pretrained(tmp_path / "parts")
    config = stages.configure("diffusion", Path("elsewhere"), stages.Hardware.GPU, parts=Path("parts"))
    assert config.task.vae == "parts" and load_autoencoder(config.task.vae).config.latent_channels == 4
    encoder = config.task.conditions[1]
    assert ImageCondition.from_pretrained(encoder.encoder, noise=encoder.noise).processor.size


def test_the_data_folder_reaches_every_stage(stages):
    for stage in all_stages(stages):
        config = stages.configure(stage, Path("elsewhere"), stages.Hardware.CPU)
        assert config.data.source == "elsewhere/corpus/train-*.parquet"
        assert config.validation.source == "elsewhere/corpus/validation-*.parquet"
        assert getattr(config.task, "perceptual_weights", "elsewhere/").startswith("elsewhere/")
        files = [re.split("[:@]", spec)[-1] for spec in getattr(config.task, "extractors", ())]
        assert all(file.startswith("elsewhere/weights/") for file in files)


def test_networks_of_the_last_stage_that_are_missing_are_named_before_the_first_one(stages, tmp_path):
    tmp_path = tmp_path / "me@lab"
    with pytest.raises(FileNotFoundError, match=r"efficientnet_lite1\.pth; .*lite_weights\.py writes it"):
        stages.check_matching(tmp_path)
    (tmp_path / "weights").mkdir(parents=True)
    for size in (1, 2):
        (tmp_path / "weights" / f"efficientnet_lite{size}.pth").touch()
    with pytest.raises(FileNotFoundError, match=r"no \S+stlpips_alex\.pth; it is in PyPI's stlpips-pytorch"):
        stages.check_matching(tmp_path)
    (tmp_path / "weights" / "stlpips_alex.pth").touch()
    stages.check_matching(tmp_path)


def test_the_judge_is_not_among_the_networks_that_are_matched(stages):
    extractors = stages.configure("matching", Path("data"), stages.Hardware.CPU).task.extractors
    assert extractors and not any("lite0" in spec for spec in extractors)


def test_each_stage_starts_from_what_an_earlier_one_leaves(stages):
    made = set()
    for stage in all_stages(stages):
        config = load_config(SCRIPTS / "embedded_default" / f"{stage}.yaml")
        starts = {getattr(config.task, name, None) for name in ("base", "vae")}
        starts |= {getattr(condition, "encoder", None) for condition in getattr(config.task, "conditions", ())}
        starts = {str(Path(start).relative_to("runs/embedded_default")) for start in starts if start}
        assert {start.split("/")[0] for start in starts} <= made
        made.add(Path(config.output_dir).name)


def test_parts_that_are_not_there_are_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, str(SCRIPTS / "pretrain_default.py"), "--parts", "nowhere", "--hardware", "gpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "nowhere" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("script", ["pretrain_autoencoder", "pretrain_dino", "pretrain_default"])
def test_each_script_can_be_imported(stages, script):
    assert callable(importlib.import_module(script).main)


def test_a_wrong_folder_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, str(SCRIPTS / "pretrain_autoencoder.py"), "--data", "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "nowhere/corpus/train-*.parquet" in done.stderr
    assert len(done.stderr.splitlines()) == 1
