"""Which number format steps faster here: `train.mixed_precision: auto`.

- bfloat16 autocast is not always faster on a CPU: small layers lose more by the casts than they gain. So both are
  timed on the model's own shapes, with random inputs, before a run's first step.
- The answer becomes part of the run: it is in `config.yaml` and a resumed run keeps it.

    medisyn train CONFIG.yaml train.mixed_precision=auto
"""

import dataclasses
import logging
import time
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState
from torch import nn

from medisyn.config import AutoencoderTaskConfig, TrainConfig, load_config, save_config

logger = logging.getLogger(__name__)

Precision = Literal["no", "bf16"]
_WARM_UP, _TIMED = 1, 3  # steps


def settle_precision(config: TrainConfig, recorded: Path) -> TrainConfig:
    """The configuration with "auto" replaced by what the run in this folder uses, or by what is faster.

    Args:
        config: Of the run.
        recorded: `config.yaml` in its folder; written by the first process where it is missing.
    """
    if config.train.mixed_precision != "auto":
        return config
    state = PartialState()
    with state.main_process_first():
        if recorded.is_file() and (kept := load_config(recorded).train.mixed_precision) != "auto":
            precision = kept
        else:
            precision = fastest_precision(config)
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, mixed_precision=precision))
        if state.is_main_process and not recorded.is_file():  # here, before the others look for it
            recorded.parent.mkdir(parents=True, exist_ok=True)
            save_config(config, recorded)
    return config


def fastest_precision(config: TrainConfig) -> Precision:
    """Time training steps of the configured model under float32 and under bfloat16 autocast on this device."""
    device = PartialState().device
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return "no"
    with torch.random.fork_rng():
        step = _training_step(config, device)
        seconds = {precision: _time(step, device, precision == "bf16") for precision in ("no", "bf16")}
    logger.info("a step takes %.3f s in float32 and %.3f s under bfloat16", seconds["no"], seconds["bf16"])
    return "bf16" if seconds["bf16"] < seconds["no"] else "no"


def _training_step(config: TrainConfig, device: torch.device):
    """A function that runs the model of a configuration forward and backward once, on random inputs."""
    from medisyn.adapter_training import prepare_adapter
    from medisyn.backbone import create_autoencoder, create_pipeline, load_autoencoder, load_pipeline

    task, batch_size = config.task, config.train.batch_size // config.train.accumulation
    if isinstance(task, AutoencoderTaskConfig):
        size = config.data.random_crop_size or config.data.resolution
        model: nn.Module = (create_autoencoder(task.preset) if task.base is None else load_autoencoder(task.base)).to(
            device
        )
        images = torch.randn(batch_size, 3, size, size, device=device)
        return lambda: model(images).sample.square().mean().backward()
    pipe = create_pipeline(task.preset, ["text"]) if task.base is None else load_pipeline(task.base)
    if task.adapts:
        prepare_adapter(pipe, task.method, task.lora)
    unet = pipe.unet.to(device)
    side = config.data.resolution // pipe.vae_scale_factor
    latents = torch.randn(batch_size, unet.config.in_channels, side, side, device=device)
    conditions = {
        name: value.detach().to(device) for name, value in pipe.unet_conditions(batch_size=batch_size).items()
    }
    timesteps = torch.randint(0, 1000, (batch_size,), device=device)
    return lambda: unet(latents, timesteps, **conditions).sample.square().mean().backward()


def _time(step, device: torch.device, bf16: bool) -> float:
    """The shortest of a few steps, in seconds."""
    taken = []
    for _ in range(_WARM_UP + _TIMED):
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return min(taken[_WARM_UP:])
