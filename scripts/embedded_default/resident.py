"""The diffusion stage on one GPU that holds everything: pixels, latents, captions, and a compiled UNet.

- What is learnt is the diffusion task's own (`medisyn.tasks.diffusion`): pipeline, conditions, wiring, validation and
  export. Only where numbers come from differs: rows, noise and dropout are drawn on the GPU. A run can be repeated,
  not reproduced to the bit, and a step costs what the UNet costs.
- More views than the mirror image: quarter turns where there is no upper side, and shifts of a few pixels, which fall
  on other places of the autoencoder's blocks. They are drawn anew all the time.
- Towards the end the forward pass sees the matrices as 8 bits hold them and gradients go straight through (Jacob et
  al. 2018, arXiv 1712.05877): what is shipped is what was trained.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import ImageOps
from torch import Tensor
from torch.nn import functional

from medisyn.conditions import condition_dropout, drop
from medisyn.config import DataConfig, TrainConfig
from medisyn.data.loading import ImageDataset
from medisyn.data.preprocessing import Preprocessor
from medisyn.eight_bits import is_eight_bit, rounded
from medisyn.losses import diffusion_target
from medisyn.paraphrases import perhaps_paraphrase
from medisyn.pipelines.medisyn_pipeline import MediSynPipeline
from medisyn.tasks.diffusion import DiffusionTask
from medisyn.trainer import latest_checkpoint, learning_rate_factor

NO_UPPER_SIDE = {"histopathology", "blood smear microscopy", "dermoscopy"}
VIEWS = 8  # of an image; the first two are the image and its mirror image
WORDINGS = 8  # of a caption; the first one is the caption
SHIFT = 3  # pixels at most
REFRESH_EVERY, REFRESHED = 20, 1024  # steps, views
EIGHT_BIT_SHARE = 0.25  # of the run
CHUNK = 512  # images


class ResidentImages:
    """Training images in the memory of the pipeline's device, with many views; a `CachedImages` without its latents.

    Attributes:
        latents: Scaled, float16 (N, VIEWS, C, h, w).
        mirrored: Whether a view is a mirror image, (N, VIEWS) of 0 and 1.
        tokens: Of the wordings of each caption, (N, WORDINGS, window).
    """

    def __init__(self, pipe: MediSynPipeline, images: ImageDataset, data: DataConfig, paraphrase: float) -> None:
        self.pipe, self.images, self.device = pipe, images, pipe.device
        preprocessor = Preprocessor.from_config(data)
        with ThreadPoolExecutor() as pool:
            rows = pool.map(lambda row: (preprocessor(images.image(row)) + 1) * 127.5, range(len(images)))
            self.pixels = torch.stack([pixels.round().byte() for pixels in rows]).to(self.device)
        self.may_flip = torch.from_numpy(images.may_flip() & data.horizontal_flip).to(self.device)
        modalities = images.column("modality") if "modality" in images.column_names else [None] * len(images)
        turns = [modality in NO_UPPER_SIDE for modality in modalities]
        self.may_turn = torch.tensor(turns, device=self.device)
        weights = torch.as_tensor(images.sampling_weights())
        self._cumulative = weights.cumsum(0).float().to(self.device)
        self._embeds = self._embed_images() if "image" in pipe.kinds else None
        rng = Random(0)
        shares = [0.0] + [paraphrase] * (WORDINGS - 1)
        texts = [perhaps_paraphrase(caption, share, rng) for caption in images.captions for share in shares]
        self.tokens = self.tokenize(texts).view(len(images), WORDINGS, -1)
        shape = self._encode(self.pixels[:1]).shape[1:]
        self.latents = torch.empty(len(images), VIEWS, *shape, dtype=torch.float16, device=self.device)
        self.mirrored = torch.zeros(len(images), VIEWS, dtype=torch.long, device=self.device)
        for view in range(VIEWS):
            for part in torch.arange(len(images), device=self.device).split(CHUNK):
                self.draw_views(part, torch.full_like(part, view))

    def __len__(self) -> int:
        return len(self.images)

    def embeddings(self, kind: str, rows: Sequence[int], flips: Any = False) -> Tensor | None:
        """As those of `CachedImages`, without mirror images."""
        return self._embeds[list(rows), 0] if kind == "image" and self._embeds is not None else None

    def image_embeds(self, rows: Tensor, views: Tensor) -> Tensor:
        """Embeddings of these views, (B, T, width), those of turned or shifted images without that."""
        return self._embeds[rows, self.mirrored[rows, views]]

    def examples(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """As those of `CachedImages`."""
        return [{"caption": self.images.captions[row], "labels": self.images.labels[row]} for row in rows]

    def draw_rows(self, count: int) -> Tensor:
        """Rows by their sampling weights, (count,)."""
        drawn = torch.searchsorted(self._cumulative, torch.rand(count, device=self.device))
        return drawn.clamp(max=len(self) - 1)

    def tokenize(self, texts: Sequence[str | None]) -> Tensor:
        """Token numbers, (len(texts), window)."""
        options = {"padding": "max_length", "max_length": self.pipe.text_window, "truncation": True}
        tokens = self.pipe.tokenizer([text or "" for text in texts], **options, return_tensors="pt")
        return tokens.input_ids.to(self.device)

    @torch.no_grad()
    def draw_views(self, rows: Tensor, views: Tensor) -> None:
        """Encode these views (B,) of these rows (B,) anew: 0 is the image, 1 its mirror image, others are drawn."""
        pixels, drawn = self.pixels[rows], views > 1

        def chosen() -> Tensor:
            return torch.rand(len(rows), device=self.device) < 0.5

        def apply(where: Tensor, changed: Tensor) -> Tensor:
            return torch.where(where.view(-1, 1, 1, 1), changed, pixels)

        flip = self.may_flip[rows] & ((views == 1) | (drawn & chosen()))
        pixels = apply(flip, pixels.flip(3))
        for turns in (2, 1):  # quarter turns
            pixels = apply(self.may_turn[rows] & drawn & chosen(), pixels.rot90(turns, (2, 3)))
        size, shifted = pixels.shape[-1], (drawn & chosen())[:, None]
        shift = torch.randint(-SHIFT, SHIFT + 1, (len(rows), 2), device=self.device) * shifted
        place = torch.arange(size, device=self.device)
        places = [(place + shift[:, axis, None]).abs() for axis in (0, 1)]
        down, across = (torch.where(where >= size, 2 * (size - 1) - where, where) for where in places)
        item = torch.arange(len(rows), device=self.device)[:, None, None]
        pixels = pixels.permute(0, 2, 3, 1)[item, down[:, :, None], across[:, None, :]].permute(0, 3, 1, 2)
        self.latents[rows, views] = self._encode(pixels).half()
        self.mirrored[rows, views] = flip.long()

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            images = pixels.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
            return self.pipe.scale_latents(self.pipe.encode_latents(images)["mean"].float())

    @torch.no_grad()
    def _embed_images(self) -> Tensor:
        """Of the images and their mirror images, (N, 2, T, width)."""

        def read(rows: range) -> list[Any]:
            plain = [self.images.image(row) for row in rows]
            views = (plain, [ImageOps.mirror(image) for image in plain])
            return [self.pipe.feature_extractor(view, return_tensors="pt").pixel_values for view in views]

        chunks = [range(start, min(start + CHUNK, len(self))) for start in range(0, len(self), CHUNK)]
        encoder, found = self.pipe.image_encoder, []
        with ThreadPoolExecutor() as pool:
            for views in pool.map(read, chunks):
                outputs = [encoder(view.to(encoder.device, encoder.dtype)) for view in views]
                found.append(torch.stack([output.pooler_output[:, None].float() for output in outputs], dim=1))
        return torch.cat(found)


class ResidentTask(DiffusionTask):
    """A `DiffusionTask` whose training images are `ResidentImages`; validation is the task's own."""

    def _cached(self, images: ImageDataset, data: DataConfig, split: str) -> Any:
        if split != "train":
            return super()._cached(images, data, split)
        return ResidentImages(self.pipe, images, data, self._paraphrase)


class ResidentTraining:
    """Trains UNet and text encoder. `fit` returns the run folder with `pipeline/` in it; run again, it goes on.

    Args:
        config: Of a diffusion task with a text encoder that is trained along.
        minutes: When the learning rate has fallen to zero, if the steps are not done before.

    Raises:
        FloatingPointError: (from `fit`) the loss is not finite; the last good checkpoint stays.
    """

    def __init__(self, config: TrainConfig, minutes: float = math.inf) -> None:
        self.config, self.limit, self.folder = config, minutes * 60, Path(config.output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(config.train.seed)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
        self.task = ResidentTask(config)
        self.pipe, self.data, self.device = self.task.pipe, self.task.data, self.task.pipe.device
        unet = self.pipe.unet.to(memory_format=torch.channels_last)
        self.denoiser = torch.compile(unet) if self.device.type == "cuda" else unet
        groups = self.task.parameter_groups(config.optim)
        self.optimizer = torch.optim.AdamW(groups, lr=config.optim.learning_rate, betas=config.optim.betas, fused=True)
        self.weights = [parameter.data for group in groups for parameter in group["params"]]
        self.average = [weight.clone() for weight in self.weights]
        self.matrices = [
            parameter.data for name, parameter in unet.named_parameters() if is_eight_bit(name, parameter)
        ]
        labels = next((c for c in self.task.conditions if c.kind == "labels"), None)
        every = range(len(self.data))
        self.labels = labels and labels.encode(self.pipe, self.data.examples(every)).to(self.device)
        self.empty = self.data.tokenize([""])

    def fit(self) -> Path:
        """Run (or resume) to the end and export."""
        loop, optim = self.config.train, self.config.optim
        step, before = self._resume()
        start = window = time.monotonic()
        share, losses, next_save, next_validation = 0.0, [], 0.1, 0.0
        while share < 1:
            if step % REFRESH_EVERY == 0:
                rows = self.data.draw_rows(REFRESHED)
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
            seconds = before + time.monotonic() - start
            share = max(step / loop.steps, seconds / self.limit)
            if step % loop.log_every and share < 1:
                continue
            error = torch.stack(losses).mean().item()
            if not math.isfinite(error):
                raise FloatingPointError(f"the loss is {error} at step {step}; try a lower optim.learning_rate")
            speed = len(losses) * loop.batch_size / (time.monotonic() - window)
            self._log({"step": step, "share": share, "loss": error, "images_per_second": speed})
            if share >= next_validation:
                next_validation = share + 0.25
                self._validate(step)
            if share >= next_save:
                next_save = share + 0.2
                self._save(step, seconds)
            losses, window = [], time.monotonic()
        self._use_average()
        self._log({"step": step} | self._metrics())
        self.task.export(self.folder)
        return self.folder

    def _loss(self, count: int) -> Tensor:
        """The denoising loss of a batch that is drawn here."""
        noising, device = self.task.noising, self.device
        rows, views = self.data.draw_rows(count), torch.randint(0, VIEWS, (count,), device=device)
        latents = self.data.latents[rows, views].float()
        noise = torch.randn_like(latents)
        # one timestep in each of `count` equal parts: the same distribution with less variance
        places = (torch.arange(count, device=device) + torch.rand(count, device=device)) / count
        timesteps = (places * noising.config.num_train_timesteps).long()
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
            levels = (pipe.config.get("image_noise") or {}).get("level", 0.0) * torch.rand(len(rows), device=device)
            image = pipe.noise_image_embeds(image, levels, torch.randn_like(image))
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
        yield
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
        partial.mkdir(parents=True, exist_ok=True)
        state = {"weights": self.weights, "average": self.average, "optimizer": self.optimizer.state_dict()}
        torch.save(state | {"step": step, "seconds": seconds}, partial / "state.pt")
        partial.rename(folder / f"step_{step:08d}")
        for old in sorted(folder.glob("step_*"))[:-1]:
            (old / "state.pt").unlink()
            old.rmdir()

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
