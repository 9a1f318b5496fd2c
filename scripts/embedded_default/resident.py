"""The diffusion stage on one GPU that holds everything: pixels, latents, captions, and a compiled UNet.

- What is learnt is the diffusion task's own (`medisyn.tasks.diffusion`): pipeline, conditions, wiring, validation and
  export. Only where numbers come from differs: rows, noise and dropout are drawn on the GPU. A run can be repeated,
  not reproduced to the bit, and a step costs what the UNet costs.
- Images are seen in many views, which are drawn anew all the time (`resident_images`).
- Towards the end the forward pass sees the matrices as 8 bits hold them and gradients go straight through (Jacob et
  al. 2018, arXiv 1712.05877): what is shipped is what was trained.
"""

import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.models.embeddings import get_timestep_embedding
from embedded_default.resident_images import VIEWS, WORDINGS, ResidentImages
from torch import Tensor
from torch.nn import functional

from medisyn.conditions import condition_dropout, drop
from medisyn.conditions.image import NOISE_CHANNELS
from medisyn.config import DataConfig, TrainConfig
from medisyn.data.loading import ImageDataset
from medisyn.eight_bits import is_eight_bit, rounded
from medisyn.losses import diffusion_target
from medisyn.tasks.base import item_seed
from medisyn.tasks.diffusion import DiffusionTask
from medisyn.trainer import claim_folder, latest_checkpoint, learning_rate_factor

REFRESH_EVERY, REFRESHED = 20, 1024  # steps, images with a view
EIGHT_BIT_SHARE = 0.25  # of the run


class ResidentTask(DiffusionTask):
    """A `DiffusionTask` whose training images are `ResidentImages`; validation is the task's own."""

    def _cached(self, images: ImageDataset, data: DataConfig, split: str) -> Any:
        if split != "train":
            return super()._cached(images, data, split)
        return ResidentImages(self.pipe, images, data, self._paraphrase)


class EmbeddingNoise:
    """`MediSynPipeline.noise_image_embeds` with all it needs on the device: there, each call copies from the CPU."""

    def __init__(self, settings: Mapping[str, Any], device: torch.device) -> None:
        self.level = settings["level"]
        self.mean, self.std = (torch.tensor(settings[name], device=device) for name in ("mean", "std"))
        self.kept = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod.to(device)

    def __call__(self, embeds: Tensor, levels: Tensor, noise: Tensor) -> Tensor:
        """Image tokens (B, T, width) with noise of levels (B,) in [0, 1], and the levels' sinusoids behind."""
        steps = (levels * 999).round().long()
        kept = self.kept[steps][:, None, None]
        noised = (kept.sqrt() * (embeds - self.mean) / self.std + (1 - kept).sqrt() * noise) * self.std + self.mean
        embeds = torch.where((steps > 0)[:, None, None], noised, embeds)
        channels = get_timestep_embedding(steps, NOISE_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
        return torch.cat([embeds, channels[:, None]], dim=-1)


class ResidentTraining:
    """Trains UNet and text encoder. `fit` returns the run folder with `pipeline/` in it; run again, it goes on.

    Args:
        config: Of a diffusion task with a text encoder that is trained along.
        minutes: When the learning rate has fallen to zero if the steps are not done before, counted from here: data
            are prepared within them, the pipeline is written after them.

    Raises:
        ValueError: The folder holds a run of another configuration, or this one asks for what is not done here.
        FloatingPointError: (from `fit`) loss or weights are not finite; the last good checkpoint stays.
    """

    def __init__(self, config: TrainConfig, minutes: float = math.inf) -> None:
        if minutes <= 0:
            raise ValueError(f"minutes must be above 0, not {minutes}")
        _check_options(config)
        self.start = time.monotonic()
        self.config, self.limit, self.folder = config, minutes * 60, Path(config.output_dir)
        claim_folder(self.folder, config)
        torch.manual_seed(config.train.seed)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
        self.task = ResidentTask(config)
        self.pipe, self.data, self.device = self.task.pipe, self.task.data, self.task.pipe.device
        if "logvar" in self.pipe.encode_latents(torch.zeros(1, 3, 64, 64)):
            raise ValueError("an autoencoder with a posterior is trained on by `medisyn train`, not here")
        unet = self.pipe.unet.to(memory_format=torch.channels_last)
        self.denoiser = torch.compile(unet) if self.device.type == "cuda" else unet
        groups = self.task.parameter_groups(config.optim)
        self.optimizer = torch.optim.AdamW(groups, lr=config.optim.learning_rate, betas=config.optim.betas, fused=True)
        self.weights = [parameter.data for group in groups for parameter in group["params"]]
        self.average = [weight.clone() for weight in self.weights]
        self.matrices = [weight.data for name, weight in unet.named_parameters() if is_eight_bit(name, weight)]
        labels = next((c for c in self.task.conditions if c.kind == "labels"), None)
        every = range(len(self.data))
        self.labels = labels and labels.encode(self.pipe, self.data.examples(every)).to(self.device)
        self.empty = self.data.tokenize([""])
        noise = self.pipe.config.get("image_noise")
        self.noise = EmbeddingNoise(noise, self.device) if noise else None

    def fit(self) -> Path:
        """Run (or resume) to the end and export."""
        loop, optim = self.config.train, self.config.optim
        step, before = self._resume()
        torch.manual_seed(item_seed(loop.seed, step, 0))
        self.task.train()
        share, losses, window = max(step / loop.steps, before / self.limit), [], time.monotonic()
        next_save, next_validation = share + 0.2, share
        while share < 1:
            if step % REFRESH_EVERY == 0:
                rows = torch.randperm(len(self.data), device=self.device)[:REFRESHED]
                self.data.draw_views(rows, torch.randint(2, VIEWS, rows.shape, device=self.device))
            rate = min(1.0, (step + 1) / max(1, optim.warmup_steps)) * optim.learning_rate
            for group in self.optimizer.param_groups:
                group["lr"] = rate * learning_rate_factor(int(share * 1e6), 10**6, replace(optim, warmup_steps=0))
            with self._in_eight_bits(share > 1 - EIGHT_BIT_SHARE):
                loss = self._loss(loop.batch_size)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(self.task.parameters(), optim.max_grad_norm, foreach=True)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            torch._foreach_lerp_(self.average, self.weights, max(1 - loop.ema_decay, (step + 1) ** -0.75))
            losses.append(loss.detach())
            step += 1
            seconds = before + time.monotonic() - self.start
            share = max(step / loop.steps, seconds / self.limit)
            if step % loop.log_every and share < 1:
                continue
            error = torch.stack(losses).mean().item()
            self._require_finite(error, step)
            speed = len(losses) * loop.batch_size / (time.monotonic() - window)
            self._log({"step": step, "share": share, "loss": error, "images_per_second": speed})
            if next_validation <= share < 1:  # the last one is below
                next_validation = share + 0.25
                self._validate(step)
            if share >= min(next_save, 1):
                next_save = share + 0.2
                self._save(step, seconds)
            losses, window = [], time.monotonic()
        self._use_average()
        self._log({"step": step} | self._metrics())
        self.task.export(self.folder)
        return self.folder

    def _require_finite(self, error: float, step: int) -> None:
        norm = torch.stack(torch._foreach_norm(self.weights)).norm().item()
        if not math.isfinite(error + norm):
            raise FloatingPointError(
                f"the loss is {error} and the norm of the weights {norm} at step {step}; last good checkpoint: "
                f"{latest_checkpoint(self.folder) or 'none'}; try a lower optim.learning_rate"
            )

    def _loss(self, count: int) -> Tensor:
        """The denoising loss of a batch that is drawn here."""
        noising, device = self.task.noising, self.device
        rows, views = self.data.draw_rows(count), torch.randint(0, VIEWS, (count,), device=device)
        latents = self.data.latents[rows, views].float()
        noise = torch.randn_like(latents)
        # one timestep in each of `count` equal parts: the same distribution with less variance
        places = (torch.arange(count, device=device) + torch.rand(count, device=device)) / count
        last = noising.config.num_train_timesteps - 1
        timesteps = (places * (last + 1)).long().clamp(max=last)  # rounding makes a place 1.0 now and then
        noisy = noising.add_noise(latents, noise, timesteps).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            prediction = self.denoiser(noisy, timesteps, **self._conditions(rows, views)).sample
        target = diffusion_target(noising, noising.config.prediction_type, latents, noise, timesteps)
        return functional.mse_loss(prediction.float(), target)

    def _conditions(self, rows: Tensor, views: Tensor) -> dict[str, Tensor]:
        """The UNet's condition arguments, each kind dropped as the configuration says."""
        task, pipe, device = self.task, self.pipe, self.device
        uniforms = torch.rand(len(rows), 1 + len(task.dropout), device=device)
        keep = condition_dropout(task.dropout, uniforms, task.options.joint_dropout)
        wordings = torch.randint(0, WORDINGS, rows.shape, device=device)
        tokens = torch.where(keep["text"][:, None], self.data.tokens[rows, wordings], self.empty)
        arguments = {"prompt_embeds": pipe.text_encoder(tokens).last_hidden_state}
        if "image" in keep:
            image = self.data.image_embeds(rows, views)
            if self.noise is not None:
                levels = self.noise.level * torch.rand(len(rows), device=device)
                image = self.noise(image, levels, torch.randn_like(image))
            arguments["image_embeds"] = drop(image, torch.zeros_like(image), keep["image"])
        if "labels" in keep:
            labels = self.labels[rows]
            arguments["label_embeds"] = drop(labels, torch.zeros_like(labels), keep["labels"])
        return pipe.unet_conditions(**arguments)

    @contextmanager
    def _in_eight_bits(self, wanted: bool) -> Iterator[None]:
        """The large matrices are what 8 bits hold, for as long as the context lasts."""
        if not wanted:
            yield
            return
        kept = [matrix.clone() for matrix in self.matrices]
        torch._foreach_copy_(self.matrices, [rounded(matrix) for matrix in self.matrices])
        try:
            yield
        finally:
            torch._foreach_copy_(self.matrices, kept)

    # ---- what it leaves ----

    def _log(self, metrics: Mapping[str, float]) -> None:
        line = json.dumps({name: float(f"{value:.6g}") for name, value in metrics.items()})
        print(line, flush=True)
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(line + "\n")

    def _use_average(self) -> None:
        torch._foreach_copy_(self.weights, self.average)
        torch._foreach_copy_(self.matrices, [rounded(matrix) for matrix in self.matrices])

    def _metrics(self) -> dict[str, float]:
        if self.config.validation is None and not self.config.validation_fraction:
            return {}
        self.task.eval()
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16):
            metrics = self.task.validate(self.config.train.validation_images)
        self.task.train()
        return {f"validation/{name}": value for name, value in metrics.items()}

    def _validate(self, step: int) -> None:
        kept = [weight.clone() for weight in self.weights]
        self._use_average()
        self._log({"step": step} | self._metrics())
        torch._foreach_copy_(self.weights, kept)

    def _save(self, step: int, seconds: float) -> None:
        folder = self.folder / "checkpoints"
        partial = folder / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        state = {"weights": self.weights, "average": self.average, "optimizer": self.optimizer.state_dict()}
        torch.save(state | {"step": step, "seconds": seconds}, partial / "state.pt")
        partial.rename(folder / f"step_{step:08d}")
        for old in sorted(folder.glob("step_*"))[:-1]:
            shutil.rmtree(old)

    def _resume(self) -> tuple[int, float]:
        """Steps done and seconds spent."""
        checkpoint = latest_checkpoint(self.folder)
        if checkpoint is None:
            return 0, 0.0
        state = torch.load(checkpoint / "state.pt", map_location=self.device, weights_only=True)
        torch._foreach_copy_(self.weights, state["weights"])
        torch._foreach_copy_(self.average, state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        return state["step"], state["seconds"]


def _check_options(config: TrainConfig) -> None:
    """Raise ValueError for what `DiffusionTask` does and `ResidentTraining` does not."""
    task, texts = config.task, [condition for condition in config.task.conditions if condition.type == "text"]
    here = {
        "train.accumulation": (config.train.accumulation, 1),
        "train.mixed_precision": (config.train.mixed_precision, "bf16"),
        "task.method": (task.method or "full", "full"),
        "task.min_snr_gamma": (task.min_snr_gamma, 0),
        "task.noise_offset": (task.noise_offset, 0),
        "task.prior": (task.prior, None),
        "train_encoder of the text condition": (any(text.train_encoder for text in texts), True),
    }
    for name, (asked, valid) in here.items():
        if asked != valid:
            raise ValueError(
                f"{name}={asked!r} is not for training on one GPU that holds everything; valid: {valid!r}"
            )
