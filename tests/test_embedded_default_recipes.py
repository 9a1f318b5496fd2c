"""The recipes of the embedded default: every stage parses, hardware changes what it must, stages follow each other."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from medisyn.config import load_config

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture
def stages(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("embedded_default.stages")


def all_stages(stages):
    return [stage for names in stages.STAGES.values() for stage in names]


def test_a_gpu_sees_as_many_images_in_larger_steps(stages):
    for stage in all_stages(stages):
        cpu, gpu = (stages.configure(stage, Path("elsewhere"), hardware) for hardware in stages.Hardware)
        images = [config.train.steps * config.train.batch_size for config in (cpu, gpu)]
        assert images[1] == pytest.approx(images[0], rel=0.01) and gpu.train.batch_size > cpu.train.batch_size
        assert gpu.optim.learning_rate == pytest.approx(2 * cpu.optim.learning_rate)


def test_the_data_folder_reaches_every_stage(stages):
    for stage in all_stages(stages):
        config = stages.configure(stage, Path("elsewhere"), stages.Hardware.CPU)
        assert config.data.source == "elsewhere/corpus/train-*.parquet"
        assert config.validation.source == "elsewhere/corpus/validation-*.parquet"
        assert getattr(config.task, "perceptual_weights", "elsewhere/").startswith("elsewhere/")


def test_each_stage_starts_from_what_an_earlier_one_leaves(stages):
    made = set()
    for stage in all_stages(stages):
        config = load_config(SCRIPTS / "embedded_default" / f"{stage}.yaml")
        starts = {getattr(config.task, name, None) for name in ("base", "vae")}
        starts |= {getattr(condition, "encoder", None) for condition in getattr(config.task, "conditions", ())}
        starts = {str(Path(start).relative_to("runs/embedded_default")) for start in starts if start}
        assert {start.split("/")[0] for start in starts} <= made
        made.add(Path(config.output_dir).name)


@pytest.mark.parametrize("script", ["pretrain_autoencoder", "pretrain_dino", "pretrain_default"])
def test_each_script_can_be_imported(stages, script):
    assert callable(importlib.import_module(script).main)


def test_a_wrong_folder_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, str(SCRIPTS / "pretrain_autoencoder.py"), "--data", "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "nowhere/corpus/train-*.parquet" in done.stderr
    assert len(done.stderr.splitlines()) == 1
