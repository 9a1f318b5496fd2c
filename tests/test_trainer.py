"""The loop: exact resume, independence of batch splitting and of processes, checkpoints, and clear failures."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from medisyn.config import OptimConfig, save_config
from medisyn.tasks.base import item_seed, seeded_normal
from medisyn.tasks.batches import training_row
from medisyn.trainer import Trainer, latest_checkpoint, learning_rate_factor
from tests.test_extension import t5
from tests.training import diffusion_config, write_base, write_images

ROOT = Path(__file__).parent.parent
TEXT_TRAINED = {"conditions": [{"type": "text", "train_encoder": True, "dropout": 0.3}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    write_images(folder / "images")
    write_base(folder / "base")
    return folder


def weights(run: Path) -> dict[str, torch.Tensor]:
    parts = {}
    for file in sorted((run / "pipeline").glob("*/*.safetensors")):
        parts |= {f"{file.parent.name}.{name}": value for name, value in load_file(file).items()}
    return parts


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def start(config_file: Path, *overrides: str, launcher=(sys.executable,)) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*launcher, "-m", "medisyn", "train", str(config_file), *overrides]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_four_steps_are_two_and_a_resume_of_two_bit_for_bit(folder):
    whole = Trainer(diffusion_config(folder, "whole", task=TEXT_TRAINED)).fit()
    Trainer(diffusion_config(folder, "parts", task=TEXT_TRAINED, train={"steps": 2})).fit()
    parts = Trainer(diffusion_config(folder, "parts", task=TEXT_TRAINED)).fit()
    assert same(weights(whole), weights(parts))
    assert losses(whole) == losses(parts)


def test_weights_with_two_names_resume(folder):
    """T5 has its embedding under two; a checkpoint holds one of them."""
    tokenizer, encoder = t5()
    for part in (tokenizer, encoder):
        part.save_pretrained(folder / "t5")
    text = {"type": "text", "encoder": str(folder / "t5"), "train_encoder": True, "max_length": 16}
    for steps in (1, 2):
        run = Trainer(diffusion_config(folder, "tied", task={"conditions": [text]}, train={"steps": steps})).fit()
    assert len(losses(run)) == 2


def test_training_changes_the_unet_and_the_trained_encoder_but_not_the_autoencoder(folder):
    run = Trainer(diffusion_config(folder, "changes", task=TEXT_TRAINED)).fit()
    before = {
        f"{file.parent.name}.{name}": value
        for file in sorted((folder / "base").glob("*/*.safetensors"))
        for name, value in load_file(file).items()
    }
    changed = {name.split(".")[0] for name, value in weights(run).items() if not torch.equal(value, before[name])}
    assert changed == {"unet", "text_encoder"}


def test_a_run_that_is_finished_trains_no_further(folder):
    config = diffusion_config(folder, "finished")
    first = weights(Trainer(config).fit())
    assert same(first, weights(Trainer(config).fit()))
    assert len(losses(folder / "finished")) == config.train.steps


def test_accumulation_does_not_change_the_losses(folder):
    whole = Trainer(diffusion_config(folder, "accumulate_1")).fit()
    split = Trainer(diffusion_config(folder, "accumulate_4", train={"accumulation": 4})).fit()
    assert np.allclose(losses(whole), losses(split), rtol=1e-5)


def test_two_processes_give_the_losses_of_one(folder):
    config = diffusion_config(folder, "one_process", train={"steps": 3})
    Trainer(config).fit()
    save_config(diffusion_config(folder, "two_processes", train={"steps": 3}), folder / "two.yaml")
    # on a CPU `accelerate launch` starts one process only
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    process = subprocess.run(
        [*launcher, "-m", "medisyn", "train", str(folder / "two.yaml")],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    assert (latest_checkpoint(folder / "two_processes") / "random_states_1.pkl").is_file(), "one process only"
    assert np.allclose(losses(folder / "one_process"), losses(folder / "two_processes"), rtol=1e-4)


def test_killed_at_random_moments_and_started_again_it_ends_with_the_same_weights(folder):
    steps = {"steps": 40, "checkpoint_every": 3}
    undisturbed = Trainer(diffusion_config(folder, "undisturbed", train=steps)).fit()
    save_config(diffusion_config(folder, "killed", train=steps), folder / "killed.yaml")
    rng = np.random.default_rng(int(time.time()))
    for _ in range(2):
        process = start(folder / "killed.yaml")
        for _ in range(1200):  # wait until it has begun to train, then for a random moment
            if list((folder / "killed" / "checkpoints").glob("*")) or process.poll() is not None:
                break
            time.sleep(0.05)
        time.sleep(rng.random() * 1.5)
        process.send_signal(signal.SIGKILL)
        process.wait()
    process = start(folder / "killed.yaml")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-2000:]
    assert same(weights(undisturbed), weights(folder / "killed"))


def test_a_half_written_checkpoint_is_never_used(folder):
    config = diffusion_config(folder, "torn")
    Trainer(config).fit()
    torn = folder / "torn" / "checkpoints" / "partial_00000009"
    torn.mkdir()
    assert latest_checkpoint(folder / "torn").name == "step_00000004"


def test_checkpoints_are_limited_in_number(folder):
    config = diffusion_config(folder, "limited", train={"steps": 6, "checkpoint_every": 1, "keep_checkpoints": 2})
    Trainer(config).fit()
    kept = sorted(path.name for path in (folder / "limited" / "checkpoints").iterdir())
    assert kept == ["step_00000005", "step_00000006"]


def test_a_run_of_another_configuration_is_refused_and_left_alone(folder):
    Trainer(diffusion_config(folder, "claimed", train={"steps": 2})).fit()
    recorded = (folder / "claimed" / "config.yaml").read_text()
    with pytest.raises(ValueError, match=r"optim.learning_rate was 0.001, now 0.5"):
        Trainer(diffusion_config(folder, "claimed", optim={"learning_rate": 0.5}))
    assert (folder / "claimed" / "config.yaml").read_text() == recorded


def test_a_tracker_that_is_not_installed_is_an_error(folder, monkeypatch):
    monkeypatch.setattr("medisyn.trainer.get_available_trackers", lambda: [])
    with pytest.raises(ImportError, match=r"medisyn\[track\]"):
        Trainer(diffusion_config(folder, "tracked", train={"tracker": "wandb"}))


def test_a_start_that_is_killed_while_it_writes_the_configuration_does_no_harm(folder):
    config = diffusion_config(folder, "cut_off", train={"steps": 2})
    Trainer(config).fit()
    (folder / "cut_off" / "config.partial").write_text("output_")  # what such a start leaves
    assert Trainer(config).fit() == folder / "cut_off"


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(folder):
    trainer = Trainer(diffusion_config(folder, "diverging", train={"steps": 6}))
    original = trainer.task.forward

    def diverge(batch, step):
        losses = original(batch, step)
        return losses if step < 3 else losses | {"loss": losses["loss"] * float("nan")}

    trainer.task.forward = trainer.model.forward = diverge
    with pytest.raises(FloatingPointError, match="loss is nan at step 4.*step_00000002"):
        trainer.fit()
    state = load_file(latest_checkpoint(folder / "diverging") / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in state.values())


def test_previews_validation_and_the_log_are_written(folder):
    config = diffusion_config(
        folder,
        "observed",
        train={"preview_every": 2, "validate_every": 2, "validation_images": 4, "tracker": "tensorboard"},
        validation={"source": str(folder / "images"), "resolution": 32},
    )
    run = Trainer(config).fit()
    assert sorted(path.name for path in (run / "previews").iterdir()) == [f"step_{n:08d}.png" for n in (0, 2, 4)]
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validation/error" in line] == [0, 2, 4]
    assert any("images_per_second" in line for line in lines)
    assert list((run / "tracker").rglob("events.out.tfevents.*"))


def test_observing_a_run_does_not_change_it(folder):
    plain = Trainer(diffusion_config(folder, "unobserved")).fit()
    observed = Trainer(diffusion_config(folder, "watched", train={"preview_every": 1})).fit()
    assert same(weights(plain), weights(observed))


def test_every_epoch_is_a_permutation_and_weights_set_the_frequencies():
    epoch = [training_row(position, 7, seed=1) for position in range(7, 14)]
    assert sorted(epoch) == list(range(7))
    assert epoch != [training_row(position, 7, seed=1) for position in range(7)]
    drawn = [training_row(position, 3, seed=1, cumulative=np.cumsum([1.0, 0.0, 3.0])) for position in range(2000)]
    assert np.allclose(np.bincount(drawn, minlength=3) / 2000, [0.25, 0.0, 0.75], atol=0.03)


def test_the_noise_of_an_item_depends_on_seed_step_and_place_alone():
    seeds = torch.tensor([item_seed(0, 5, place) for place in range(4)])
    assert torch.equal(seeded_normal(seeds, (2, 3))[2:3], seeded_normal(seeds[2:3], (2, 3)))
    assert len({item_seed(s, t, p) for s in range(3) for t in range(3) for p in range(3)}) == 27
    assert not torch.equal(seeded_normal(seeds, (2, 3), stream=0), seeded_normal(seeds, (2, 3), stream=1))


def test_the_learning_rate_rises_stays_and_falls():
    optim = OptimConfig(warmup_steps=10, decay_fraction=0.5)
    factors = [learning_rate_factor(step, 100, optim) for step in range(101)]
    assert factors[0] == pytest.approx(0.1) and factors[9:50] == [1.0] * 41
    assert factors[75] == pytest.approx(0.5) and factors[100] == 0
    assert all(later <= earlier for earlier, later in zip(factors[50:], factors[51:], strict=False))
