"""No operation of a training step mixes devices: every weight is a fake tensor on a GPU that need not be there.

python -m pytest tests/test_devices.py
"""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from medisyn.config import parse_config
from medisyn.tasks import create_task
from tests.training import GPU, autoencoder_config, diffusion_config, to_fake_gpu, write_base, write_images

CONDITIONS = [{"type": "text"}, {"type": "image"}, {"type": "labels"}]
KINDS = ("text", "image", "labels")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices")
    write_images(folder / "images")
    write_base(folder / "base", kinds=KINDS)
    write_base(folder / "plain", kinds=())
    write_base(folder / "kl", kinds=KINDS, vae="kl")
    return folder


def diffusion(folder, run, base="base", **task):
    data = {"label_columns": {"gc": "gc"}, "horizontal_flip": True}
    task = {"conditions": CONDITIONS, "base": str(folder / base)} | task
    return diffusion_config(folder, run, data=data, task=task | {"cache_dir": str(folder / f"cache_{base}")})


def latent_classifier(folder, run):
    task = {"type": "latent_classifier", "base": str(folder / "plain"), "class_column": "kind"}
    tree = {
        "output_dir": str(folder / run),
        "data": {"source": str(folder / "images"), "resolution": 32, "caption_column": None},
        "task": task | {"cache_dir": str(folder / "cache_plain"), "label_fraction": 1.0},
        "train": {"steps": 1, "batch_size": 4},
    }
    return parse_config(tree)


TASKS = {
    "all weights": lambda folder: diffusion(folder, "all", conditions=[CONDITIONS[0] | {"train_encoder": True}]),
    "a posterior": lambda folder: diffusion(folder, "kl", "kl"),
    "min-SNR and offset noise": lambda folder: diffusion(folder, "snr", min_snr_gamma=5.0, noise_offset=0.1),
    "LoRA": lambda folder: diffusion(
        folder,
        "lora",
        method="lora",
        lora={"rank": 2, "text_encoder": True},
        conditions=[CONDITIONS[0] | {"new_words": "auto"}, *CONDITIONS[1:]],
    ),
    "norm": lambda folder: diffusion(folder, "norm", method="norm"),
    "guidance distillation": lambda folder: diffusion(
        folder, "distilled", type="guidance_distillation", lora={"rank": 2}
    ),
    "latent classifier": lambda folder: latent_classifier(folder, "classifier"),
    "autoencoder": lambda folder: autoencoder_config(
        folder, "vae", task={"perceptual": "none", "adversarial_weight": 0.1, "adversarial_start": 0}
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_training_step_runs_on_one_device(folder, name):
    task = create_task(TASKS[name](folder))
    batch = task.collate([task.sample(row, np.random.default_rng(row)) for row in range(4)])
    batch["seed"] = torch.arange(4)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    pipe = getattr(task, "pipe", None)
    to_fake_gpu(mode, task, *([] if pipe is None else [pipe]))
    task.train()
    with mode:  # as the loop does, all but the numbers that are read back
        moved = {
            name: value.to(GPU) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in batch.items()
        }
        losses = task(moved, 0)
    assert {value.device for value in losses.values()} == {GPU} and losses["loss"].requires_grad
