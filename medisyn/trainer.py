"""The one training loop. A `TrainingTask` says what is trained and with which loss; the loop does everything else.

- Reads top to bottom: batch, loss, backward, clip, step, EMA, log, preview, validate, checkpoint.
- Which rows step s sees, and with which noise, is a function of (seed, s, position in the global batch): there is no
  data or random state to save, and neither batch splitting nor the number of processes changes the losses.
- A checkpoint is written beside the old ones and renamed when complete, so a run killed at any moment resumes from
  the last whole one. To resume is to run the same command again. Frozen weights are not written.

    medisyn train scripts/embedded_default/autoencoder.yaml
    accelerate launch --num_processes 2 -m medisyn train CONFIG.yaml
"""

import json
import logging
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, send_to_device
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm

from medisyn.config import OptimConfig, TrainConfig, config_to_dict, load_config, save_config
from medisyn.precision import settle_precision
from medisyn.processes import join_processes
from medisyn.tasks import create_task
from medisyn.tasks.base import TrainingTask, item_seed
from medisyn.tasks.batches import training_batches

logger = logging.getLogger(__name__)

CACHING_TIMEOUT = timedelta(days=2)  # the other processes wait while the first one fills the caches

# what may differ between a checkpoint and the command that resumes it: it changes when or where, not what is learnt
_MAY_DIFFER = (
    "output_dir",
    "data.num_workers",
    "task.cache_dir",
    "task.cache_batch_size",
    "task.compile",
    "task.gradient_checkpointing",
    "train.steps",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.preview_every",
    "train.validate_every",
    "train.validation_images",
    "train.tracker",
)


class Trainer:
    """Trains the task that a configuration describes and exports the result into `config.output_dir`.

    The folder holds `config.yaml` (resolved), `checkpoints/step_00001000/`, `log.jsonl`, `previews/`, and at the end
    what the task exports (`vae/` or `pipeline/`) with the averaged weights.

    Raises:
        ValueError: the folder holds a run of another configuration.
        FloatingPointError: (from `fit`) a loss or gradient is not finite; the last good checkpoint stays.
    """

    def __init__(self, config: TrainConfig, task: TrainingTask | None = None) -> None:
        self.folder = Path(config.output_dir)
        join_processes(CACHING_TIMEOUT)
        config = self.config = settle_precision(config, self.folder / "config.yaml")
        loop = config.train
        available = ["none", *(tracker.value for tracker in get_available_trackers())]
        if loop.tracker not in available:
            raise ImportError(f"train.tracker={loop.tracker} is not installed: pip install medisyn[track] or wandb")
        self.accelerator = Accelerator(
            mixed_precision=loop.mixed_precision,
            gradient_accumulation_steps=loop.accumulation,
            log_with=None if loop.tracker == "none" else loop.tracker,
            project_dir=self.folder,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        processes = self.accelerator.num_processes
        if loop.batch_size % (loop.accumulation * processes):
            raise ValueError(
                f"train.batch_size={loop.batch_size} does not divide into accumulation={loop.accumulation} x "
                f"{processes} processes"
            )
        if self.accelerator.is_main_process:
            claim_folder(self.folder, config)
        self.accelerator.wait_for_everyone()
        self.states: Any = self.accelerator  # what prepares the model, and keeps and restores it
        sharded = self.accelerator.distributed_type == DistributedType.FSDP
        if sharded:
            from medisyn.sharding import Sharding  # which asks for newer versions of torch and accelerate

            self.states = Sharding(self.accelerator, config.task.type)
        self.takes_part = self.accelerator.is_main_process or sharded  # in previews, validation and export
        torch.manual_seed(loop.seed)
        # the first process fills caches, the others then find them
        with self.accelerator.main_process_first():
            task = task or create_task(config)
        optimizer = torch.optim.AdamW(
            task.parameter_groups(config.optim), lr=config.optim.learning_rate, betas=config.optim.betas, fused=True
        )
        schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(step, loop.steps, config.optim))
        self.task = task
        self.model, self.optimizer = self.states.prepare(task, optimizer)
        self.schedule = schedule
        self.states.register_save_state_pre_hook(self._leave_out_frozen)
        self.states.register_load_state_pre_hook(self._load_trained)
        self.states.register_for_checkpointing(schedule)
        self.ema = None
        if loop.ema_decay:
            # torch copies shards one by one only
            self.ema = EMAModel(
                task.averaged_parameters(), decay=loop.ema_decay, use_ema_warmup=True, power=0.75, foreach=not sharded
            )
            self.ema.to(self.accelerator.device)
            self.states.register_for_checkpointing(self.ema)

    def fit(self) -> Path:
        """Run (or resume) to the last step and export. Returns the run folder."""
        config, loop, accelerator = self.config, self.config.train, self.accelerator
        start = self._resume()
        if loop.tracker != "none":
            accelerator.init_trackers("tracker")
        batches = iter(
            training_batches(
                self.task, loop, start, accelerator.process_index, accelerator.num_processes, config.data.num_workers
            )
        )
        sums: dict[str, float] = defaultdict(float)
        window_start, window_steps = time.monotonic(), 0
        progress = tqdm(
            total=loop.steps,
            initial=start,
            unit="step",
            desc=config.task.type,
            disable=not accelerator.is_main_process,
        )
        if start == 0:
            self._observe(0)
        self.model.train()
        for step in range(start, loop.steps):
            # global random state (dropout layers) is a function of the step as well
            torch.manual_seed(item_seed(loop.seed, step, -1 - accelerator.process_index))
            for _ in range(loop.accumulation):
                batch = send_to_device(next(batches), accelerator.device)
                with accelerator.accumulate(self.model):
                    losses = self.model(batch, step)
                    accelerator.backward(losses["loss"])
                    norm = None
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(self.model.parameters(), config.optim.max_grad_norm)
                    self._require_finite(losses["loss"], norm, step)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                for name, value in losses.items():
                    sums[name] += accelerator.reduce(value.detach().float(), "mean").item() / loop.accumulation
            self.schedule.step()
            if self.ema is not None:
                self.ema.step(self.task.averaged_parameters())
            done, window_steps = step + 1, window_steps + 1
            progress.update()
            if done % loop.log_every == 0 or done == loop.steps:
                seconds = time.monotonic() - window_start
                metrics = {name: total / window_steps for name, total in sums.items()}
                metrics["learning_rate"] = float(self.schedule.get_last_lr()[0])
                metrics["images_per_second"] = window_steps * loop.batch_size / max(seconds, 1e-9)
                progress.set_postfix_str(f"loss {metrics['loss']:.4f}, {metrics['images_per_second']:.1f} images/s")
                self._log(done, metrics)
                sums.clear()
                window_start, window_steps = time.monotonic(), 0
            self._observe(done)
            if done % loop.checkpoint_every == 0 or done == loop.steps:
                self._save_checkpoint(done)
        progress.close()
        accelerator.wait_for_everyone()
        if self.takes_part:
            with self._averaged_weights():
                self.task.export(self.folder)
        accelerator.end_training()
        return self.folder

    def _observe(self, step: int) -> None:
        """Previews and validation that fall on this step, with the averaged weights; the main process writes."""
        loop = self.config.train
        wanted = [
            every and (step % every == 0 or step == loop.steps) for every in (loop.preview_every, loop.validate_every)
        ]
        if not any(wanted):
            return
        if self.takes_part:
            self.task.eval()
            with self._averaged_weights(), self.accelerator.autocast():
                picture = self.task.preview() if wanted[0] else None
                if picture is not None and self.accelerator.is_main_process:
                    (self.folder / "previews").mkdir(exist_ok=True)
                    picture.save(self.folder / "previews" / f"step_{step:08d}.png")
                if wanted[1]:
                    metrics = self.task.validate(loop.validation_images)
                    self._log(step, {f"validation/{name}": value for name, value in metrics.items()})
            self.task.train()
        self.accelerator.wait_for_everyone()

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        if not self.accelerator.is_main_process:
            return
        if self.config.train.tracker != "none":
            self.accelerator.log(metrics, step=step)
        rounded = {name: float(f"{value:.6g}") for name, value in metrics.items()}
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps({"step": step} | rounded) + "\n")

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        if self.ema is None:
            yield
            return
        parameters = list(self.task.averaged_parameters())
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        try:
            yield
        finally:
            self.ema.restore(parameters)

    def _require_finite(self, loss: torch.Tensor, norm: torch.Tensor | None, step: int) -> None:
        scaled = (
            self.config.train.mixed_precision == "fp16"
        )  # its scaler skips steps with infinite gradients by itself
        culprit = None
        if not math.isfinite(loss.item()):
            culprit = f"the loss is {loss.item()}"
        elif norm is not None and not scaled and not math.isfinite(norm.item()):
            culprit = f"the gradient norm is {norm.item()}"
        if culprit:
            last = latest_checkpoint(self.folder)
            raise FloatingPointError(
                f"{culprit} at step {step + 1}; last good checkpoint: {last or 'none'}; "
                "try a lower optim.learning_rate or mixed_precision: no"
            )

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _resume(self) -> int:
        checkpoint = latest_checkpoint(self.folder)
        if checkpoint is None:
            return 0
        self.states.load_state(str(checkpoint))
        if self.ema is not None:
            self.ema.to(self.accelerator.device)  # loaded on the CPU
        step = int(checkpoint.name.removeprefix("step_"))
        for scheduler_group in self.optimizer.param_groups:  # train.steps may have changed, and with it the schedule
            scheduler_group["lr"] = scheduler_group["initial_lr"] * learning_rate_factor(
                step, self.config.train.steps, self.config.optim
            )
        logger.info("resumed from %s", checkpoint)
        return step

    def _leave_out_frozen(self, models: list, weights: list[dict], folder: str) -> None:
        """What no step changes is not written: a base as large as Stable Diffusion would be written every time."""
        frozen = {name for name, parameter in self.task.named_parameters() if not parameter.requires_grad}
        for state in weights:
            named = {name.removeprefix("module."): value for name, value in state.items()}  # of a distributed model
            state.clear()
            state.update({name: value for name, value in named.items() if name not in frozen})

    def _load_trained(self, models: list, folder: str) -> None:
        """Load what `_leave_out_frozen` left, and nothing less: an adapter is never dropped in silence."""
        models.clear()  # accelerate would ask for the frozen weights as well
        file = Path(folder) / "model.safetensors"
        state, every = load_file(file), set(self.task.state_dict())
        frozen = {name for name, parameter in self.task.named_parameters() if not parameter.requires_grad}
        # of weights with two names, such as T5's embedding, a checkpoint holds one
        named = dict(self.task.named_parameters(remove_duplicate=False))
        same = {id(named[name]) for name in named.keys() & set(state)}
        missing = {name for name in every - frozen - set(state) if id(named.get(name)) not in same}
        wrong = sorted(missing | (set(state) - every))
        if wrong:
            raise ValueError(f"{file} is a checkpoint of another model: {wrong[0]} is only in one of the two")
        self.task.load_state_dict(state, strict=False)

    def _save_checkpoint(self, step: int) -> None:
        folder = self.folder / "checkpoints"
        partial, final = folder / f"partial_{step:08d}", folder / f"step_{step:08d}"
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.states.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for old in sorted(folder.glob("step_*"))[: -self.config.train.keep_checkpoints]:
                shutil.rmtree(old)
            for stale in folder.glob("partial_*"):
                shutil.rmtree(stale)
        self.accelerator.wait_for_everyone()


def claim_folder(folder: Path, config: TrainConfig) -> None:
    """Write the resolved configuration, or check that the run in this folder is the same, else raise ValueError."""
    folder.mkdir(parents=True, exist_ok=True)
    recorded = folder / "config.yaml"
    if recorded.is_file() and (folder / "checkpoints").is_dir():
        before, now = (_flatten(config_to_dict(c)) for c in (load_config(recorded), config))
        different = [key for key in sorted(before | now) if before.get(key) != now.get(key)]
        different = [key for key in different if key not in _MAY_DIFFER]
        if different:
            key = different[0]
            raise ValueError(
                f"{folder} holds a run of another configuration: {key} was {before.get(key)!r}, now "
                f"{now.get(key)!r}; choose another output_dir or restore "
                f"{'it' if len(different) == 1 else ', '.join(different)}"
            )
    partial = recorded.with_suffix(".partial")
    save_config(config, partial)
    partial.replace(recorded)


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete checkpoint of a run folder, or None."""
    return max((Path(folder) / "checkpoints").glob("step_*"), default=None)


def learning_rate_factor(step: int, steps: int, optim: OptimConfig) -> float:
    """Share of the rate at `step`: linear warm-up, then 1, then a fall to 0 over the last `decay_fraction`."""
    warmup = min(1.0, (step + 1) / optim.warmup_steps) if optim.warmup_steps else 1.0
    fall_steps = optim.decay_fraction * steps
    remaining = min(1.0, max(0.0, (steps - step) / fall_steps)) if fall_steps else 1.0
    if optim.decay == "cosine":
        remaining = 0.5 - 0.5 * math.cos(math.pi * remaining)
    return warmup * remaining


def _flatten(tree: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
