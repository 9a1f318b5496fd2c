"""The example configurations in `scripts/lora_tiers`: each is valid, says what it needs, and the CPU one runs."""

import json
from pathlib import Path

import pytest
import yaml

from medisyn.config import load_config
from medisyn.trainer import Trainer
from tests.training import write_base, write_images

FOLDER = Path(__file__).parent.parent / "scripts" / "lora_tiers"
TIERS = ("cpu_2_cores", "gpu_8gb", "gpu_24gb", "gpu_80gb", "multi_gpu_fsdp2")
LAUNCH = "multi_gpu_fsdp2.accelerate.yaml"


@pytest.mark.parametrize("name", TIERS)
def test_each_tier_is_a_valid_configuration_of_a_lora(name):
    config = load_config(FOLDER / f"{name}.yaml")
    assert config.task.method == "lora"
    assert config.train.checkpoint_every < config.train.steps


def test_every_file_is_tested_and_says_what_it_needs_and_how_to_start_it():
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.yaml" for name in TIERS} | {LAUNCH}
    for name in TIERS:
        comments = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
        assert "# Needs: " in comments
        assert f"scripts/lora_tiers/{name}.yaml" in comments


def test_a_batch_divides_over_the_processes_that_the_launch_file_starts():
    config = load_config(FOLDER / "multi_gpu_fsdp2.yaml")
    launch = yaml.safe_load((FOLDER / LAUNCH).read_text(encoding="utf-8"))
    assert config.train.batch_size % (config.train.accumulation * launch["num_processes"]) == 0


def test_the_launch_file_holds_only_what_accelerate_knows_and_asks_for_fsdp2(monkeypatch):
    from accelerate import DistributedType
    from accelerate.commands.config.config_args import load_config_from_file

    launch = load_config_from_file(str(FOLDER / LAUNCH))
    assert launch.distributed_type == DistributedType.FSDP
    assert launch.fsdp_config["fsdp_version"] == 2


def test_the_cpu_tier_trains(tmp_path):
    write_images(tmp_path / "images")
    write_base(tmp_path / "base")
    changes = {"output_dir": tmp_path / "run", "data.source": tmp_path / "images", "data.resolution": 32}
    changes |= {"task.base": tmp_path / "base", "task.prior.num_images": 4, "task.lora.rank": 2}
    changes |= {"train.steps": 2, "train.batch_size": 4, "train.log_every": 1}
    run = Trainer(load_config(FOLDER / "cpu_2_cores.yaml", [f"{key}={value}" for key, value in changes.items()])).fit()
    assert (run / "adapter" / "pytorch_lora_weights.safetensors").is_file()
    assert json.loads((run / "log.jsonl").read_text().splitlines()[-1])["step"] == 2
