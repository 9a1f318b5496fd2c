"""A LoRA under FSDP2, two processes: the same training as in one, and checkpoints that go on in either way.

The processes are started with the settings of `scripts/lora_tiers/multi_gpu_fsdp2.accelerate.yaml`.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from PIL import Image
from safetensors.torch import load_file

from medisyn.config import TrainConfig, save_config
from medisyn.sharding import Sharding
from medisyn.trainer import Trainer
from tests.training import diffusion_config, write_base, write_images

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "scripts" / "lora_tiers" / "multi_gpu_fsdp2.accelerate.yaml"
# of layers inside the sharded blocks and outside; 3 rows do not divide by two processes
LORA = {"lora": {"rank": 3, "target_modules": ["to_q", "to_out.0", "proj_in", "conv_in"]}}
OBSERVED = {"preview_every": 4, "validate_every": 3, "validation_images": 4}  # the third step has no checkpoint
BF16 = {"steps": 2, "mixed_precision": "bf16", "accumulation": 2, "ema_decay": 0.0}


def train_in_two_processes(folder: Path, *runs: tuple[str, TrainConfig]) -> None:
    """Runs ("sharded" or "ordinary", configuration), in this order, as `accelerate launch` would start them."""
    arguments = []
    for place, (way, config) in enumerate(runs):
        save_config(config, folder / f"{place}.yaml")
        arguments.append(f"{way}={folder / f'{place}.yaml'}")
    options, *_ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(LAUNCH), "x.py"]))
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    process = subprocess.run(
        [*launcher, str(ROOT / "tests" / "sharded_training.py"), *arguments],
        env=prepare_multi_gpu_env(options) | settings,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr[-4000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Finished runs by name; after half of its steps "from_one" went from one process to two, "to_one" back."""
    folder = tmp_path_factory.mktemp("sharded")
    write_images(folder / "images")
    write_base(folder / "base")
    validation = {"source": str(folder / "images"), "resolution": 32}

    def config(run: str, **train) -> TrainConfig:
        return diffusion_config(folder, run, task=LORA, train=train, validation=validation)

    def bf16(run: str) -> TrainConfig:
        task = LORA | {"cache_dir": str(folder / "cache_bf16"), "gradient_checkpointing": True}
        return diffusion_config(folder, run, task=task, train=BF16)

    Trainer(config("one", **OBSERVED)).fit()
    Trainer(config("from_one", steps=2)).fit()
    train_in_two_processes(
        folder,
        ("sharded", config("two", **OBSERVED)),
        ("sharded", config("parts", steps=2)),
        ("sharded", config("parts")),
        ("sharded", config("from_one")),
        ("sharded", config("to_one", steps=2)),
        ("ordinary", bf16("bf16_ordinary")),
        ("sharded", bf16("bf16_sharded")),
    )
    Trainer(config("to_one")).fit()
    return folder


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "pytorch_lora_weights.safetensors")


def logged(run: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.allclose(first[name], second[name], rtol=1e-3, atol=1e-6) for name in first
    )


def test_the_losses_and_the_averaged_adapter_are_those_of_one_process(folder):
    assert np.allclose(logged(folder / "one", "loss"), logged(folder / "two", "loss"), rtol=1e-5)
    assert close(adapter(folder / "one"), adapter(folder / "two"))


def test_four_steps_are_two_and_a_resume_of_two_bit_for_bit_and_observing_changes_nothing(folder):
    whole, parts = adapter(folder / "two"), adapter(folder / "parts")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert logged(folder / "two", "loss") == logged(folder / "parts", "loss")


@pytest.mark.parametrize("run", ["from_one", "to_one"])
def test_a_run_goes_on_with_another_number_of_processes(folder, run):
    assert close(adapter(folder / "one"), adapter(folder / run))
    assert np.allclose(logged(folder / "one", "loss"), logged(folder / run, "loss"), rtol=1e-5)


def test_a_checkpoint_has_the_files_of_an_ordinary_one_with_whole_tensors_of_what_is_trained(folder):
    one, two = (folder / run / "checkpoints" / "step_00000002" for run in ("one", "two"))
    names = {file.name for file in one.iterdir()}
    assert {file.name for file in two.iterdir()} == names | {"random_states_1.pkl"}
    assert close(load_file(one / "model.safetensors"), load_file(two / "model.safetensors"))
    first, second = (torch.load(file / "optimizer.bin", weights_only=True)["state"] for file in (one, two))
    assert first.keys() == second.keys() and all(close(first[place], second[place]) for place in first)


def test_previews_and_validation_are_those_of_one_process(folder):
    assert np.allclose(logged(folder / "one", "validation/error"), logged(folder / "two", "validation/error"), 1e-4)
    for step in (0, 4):
        first, second = (
            np.asarray(Image.open(folder / run / "previews" / f"step_{step:08d}.png"), int) for run in ("one", "two")
        )
        assert first.std() > 0 and np.abs(first - second).max() <= 1


def test_number_formats_accumulation_and_gradient_checkpointing_are_as_in_ordinary_data_parallelism(folder):
    assert np.allclose(logged(folder / "bf16_ordinary", "loss"), logged(folder / "bf16_sharded", "loss"), rtol=1e-3)
    assert adapter(folder / "bf16_ordinary").keys() == adapter(folder / "bf16_sharded").keys()


def test_a_task_that_cannot_be_sharded_is_refused():
    with pytest.raises(ValueError, match="task.type=latent_classifier cannot be sharded by FSDP2; valid types: "):
        Sharding(Accelerator(cpu=True), "latent_classifier")
