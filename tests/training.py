"""Tiny training runs for tests: 24 images of three kinds with captions and labels, and configurations."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from medisyn.config import TrainConfig, parse_config
from tests.components import tiny_pipeline

GPU = torch.device("cuda", 0)
CAPTIONS = ("bright square", "dark disc", "grey stripes")


def write_images(folder: Path, count: int = 24) -> Path:
    """An imagefolder with metadata.jsonl: file_name, caption, kind, gc, patient, license."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = []
    for i in range(count):
        pixels = rng.integers(0, 60, (32, 32, 3)) + 60 * (i % 3)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02d}.png")
        row = {"file_name": f"{i:02d}.png", "caption": CAPTIONS[i % 3], "kind": i % 3, "gc": str(i % 2)}
        lines.append(json.dumps(row | {"patient": f"p{i // 2}", "license": "CC0"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def write_base(folder: Path, **options) -> Path:
    """A saved tiny pipeline to start from."""
    tiny_pipeline(**options).save_pretrained(folder)
    return folder


def diffusion_config(folder: Path, run: str = "run", **changes) -> TrainConfig:
    """A diffusion run on `folder/images` from `folder/base`; `changes` go into sections: train={"steps": 2}."""
    task = {"type": "diffusion", "preset": None, "base": str(folder / "base"), "cache_dir": str(folder / "cache")}
    return _config(folder, run, task, {"license_column": "license"}, changes)


def autoencoder_config(folder: Path, run: str = "run", **changes) -> TrainConfig:
    """An autoencoder run on `folder/images` from that of `folder/base`; `changes` as in `diffusion_config`."""
    task = {"type": "autoencoder", "preset": None, "base": str(folder / "base"), "scale_images": 8}
    return _config(folder, run, task, {"caption_column": None}, changes)


def _config(folder: Path, run: str, task: dict, data: dict, changes: dict) -> TrainConfig:
    tree = {
        "data": {"source": str(folder / "images"), "resolution": 32} | data,
        "task": task,
        "optim": {"warmup_steps": 0, "decay_fraction": 0.0, "learning_rate": 1e-3},
        "train": {"steps": 4, "batch_size": 4, "log_every": 1, "checkpoint_every": 2},
    }
    merged = {name: tree[name] | changes.get(name, {}) for name in tree}
    merged |= {name: value for name, value in changes.items() if name not in tree}
    return parse_config({"output_dir": str(folder / run)} | merged)


def to_fake_gpu(mode: FakeTensorMode, *owners: object) -> None:
    """What `Module.to` does on a machine that has a GPU: weights and buffers of all modules that the owners hold."""
    moved: dict[int, torch.Tensor] = {}

    def move(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in moved:
            with mode:
                copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=GPU)
            same = isinstance(tensor, nn.Parameter)
            moved[id(tensor)] = nn.Parameter(copy, requires_grad=tensor.requires_grad) if same else copy
        return moved[id(tensor)]

    def modules(held: object):
        if isinstance(held, nn.Module):
            yield from held.modules()
        elif isinstance(held, (tuple, list)):
            for each in held:
                yield from modules(each)

    for owner in owners:
        for held in (owner, *vars(owner).values()):
            for module in modules(held):
                for tensors in (module._parameters, module._buffers):
                    for name, tensor in tensors.items():
                        if tensor is not None and tensor.device != GPU:
                            tensors[name] = move(tensor)
