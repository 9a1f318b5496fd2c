"""Feature matching: the last steps of sampling learn what networks see in real images of a class, on average.

A denoiser's squared error is small where its images are a little too smooth, everywhere and in the same way; the mean
of features sees exactly that. Samples are drawn with guidance in few steps, the gradient goes through the last ones,
the decoder and the networks (as in DRaFT-K, Clark et al. 2024, arXiv 2309.17400), and the loss is the distance of mean
features of drawn and real images (feature matching, Salimans et al. 2016, arXiv 1606.03498, eq. 6), class by class.

- What is drawn must stay, since means are matched by erasing as well: averages of 4x4 pixels are kept at those that
  the base's own last steps draw. So is what repeats in neighbouring blocks of pixels that are one place of the
  latents each, most of all on flat ground, where it is seen: a shift of a channel is such a lattice, and the cheapest
  texture of all.
- The usual denoising loss goes on beside it, with the usual dropout of conditions.
- At the end the change of the weights is made a little larger (extrapolation, Zheng et al. 2024, arXiv 2404.16792).
- The networks must not be those that judge the result.

    medisyn train scripts/embedded_default/matching.yaml
"""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather
from torch import Tensor, nn

from medisyn.backbone import load_pipeline
from medisyn.config import FeatureMatchingTaskConfig, TrainConfig
from medisyn.data.preprocessing import Preprocessor
from medisyn.feature_statistics import ClassMeans, PooledFeatures, open_pooled_features
from medisyn.pipelines.medisyn_pipeline import MediSynPipeline
from medisyn.tasks.base import seeded_normal
from medisyn.tasks.diffusion import DiffusionTask

_START = 8  # stream of the noise that images are drawn from
CONTENT = 4  # pixels, side of the squares whose average must stay
WINDOW = 4  # places of the latents, side of the squares in which nothing new may repeat
FAINT = 4 / 127.5  # deviation of a block, in images of [-1, 1], under which it hides nothing


def visible_lattice(change: Tensor, images: Tensor, side: int) -> Tensor:
    """What a change repeats in neighbouring blocks of `side` x `side` pixels, relative to what the blocks vary by.

    Of each window of `WINDOW` x `WINDOW` blocks, the mean block of the change, where a block counts the less the
    more its pixels vary (contrast masking, Legge and Foley 1980): dots on an empty ground are seen, in tissue not.

    Args:
        change: (B, C, H, W), H and W multiples of `side`.
        images: (B, C, H, W) in [-1, 1], that are changed.
        side: of a block, pixels.

    Returns:
        A scalar: mean over windows of squared mean blocks, in units of the blocks' variance.
    """
    blocks = F.pixel_unshuffle(images, side)
    variance = blocks.unflatten(1, (images.shape[1], -1)).var(dim=2).mean(dim=1, keepdim=True)  # within the channels
    visible = 1 / (variance + FAINT**2)
    window = min(WINDOW, *blocks.shape[-2:])
    mean = F.avg_pool2d(visible * F.pixel_unshuffle(change, side), window, ceil_mode=True)
    return (mean.square() / F.avg_pool2d(visible, window, ceil_mode=True)).mean()


class FeatureMatchingTask(DiffusionTask):
    """Batch of cached latents -> denoising loss, and shift of the features of images drawn for its conditions.

    See `FeatureMatchingTaskConfig` for the options.

    Raises:
        ValueError: a condition that the model lacks, no column of classes, or a network that does not fit.
    """

    options: FeatureMatchingTaskConfig
    _base: tuple[MediSynPipeline]  # tuples: not registered, hence neither trained nor saved
    _networks: tuple[PooledFeatures, ...]

    def __init__(self, config: TrainConfig) -> None:
        if not isinstance(config.task, FeatureMatchingTaskConfig):
            raise ValueError(f"task.type={config.task.type!r} given to the feature matching task")
        options, device = config.task, PartialState().device
        networks = [open_pooled_features(spec).to(device) for spec in options.extractors]  # wrong ones before any work
        base = load_pipeline(cast(str, options.base))
        kept: set[str] = {condition.type for condition in options.conditions} or set(base.kinds)
        if missing := set(options.drawn_with) - (set(base.kinds) & kept):
            raise ValueError(f"task.drawn_with: {', '.join(sorted(missing))} is no condition of {options.base!r}")
        super().__init__(config)
        base.vae = None
        self._base = (base.to(device),)
        values = zip(*(self.images.column(name) for name in options.class_columns), strict=True)
        names = [tuple(map(str, row)) for row in values]
        numbers = {name: number for number, name in enumerate(sorted(set(names)))}
        self._classes = torch.tensor([numbers[name] for name in names])
        self._networks = tuple(networks)
        self.means = nn.ModuleList(ClassMeans(each, len(numbers), options.horizon).to(device) for each in networks)
        self._fit()

    def _fit(self) -> None:
        generator, preprocessor = np.random.default_rng(0), Preprocessor.from_config(self.config.data)
        chosen = []
        for number in range(int(self._classes.max()) + 1):
            rows = generator.permutation(np.flatnonzero(self._classes.numpy() == number))
            chosen.append(rows[: self.options.real_images])
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.config.train.mixed_precision)
        for _, means in self._matched():
            real = (torch.stack([preprocessor(self.images.image(int(row))) for row in rows]) for rows in chosen)
            with torch.autocast(self.pipe.device.type, half, enabled=half is not None):
                means.fit(real, torch.Generator().manual_seed(0))

    def forward(self, batch: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """The weighted sum of all losses, the shift of the features, and what changed of the base's own drawings."""
        options = self.options
        denoising = super().forward(batch, step)
        rows, seeds = batch["row"][: options.draws], batch["seed"][: options.draws]
        images, before = self._draw(rows, seeds)
        classes = self._classes[rows.cpu()].to(images.device)
        matching = images.new_zeros(())
        for network, means in self._matched():
            features = network(images, torch.Generator().manual_seed(int(seeds[0])))
            matching = matching + means.loss(features, classes)
            means.add(gather(features.detach()), gather(classes))
        change = F.avg_pool2d(images - before, CONTENT).square().mean()
        lattice = visible_lattice(images - before, before, self.pipe.vae_scale_factor)
        loss = options.denoising_weight * denoising["loss"] + options.feature_weight * matching
        loss = loss + options.content_weight * change + options.visible_lattice_weight * lattice
        shift = torch.stack([means.squared_shift() for _, means in self._matched()]).mean()
        metrics = {"error": denoising["error"], "change": change.detach(), "lattice": lattice.detach()}
        return {"loss": loss, "shift": shift} | metrics

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """As the diffusion task, with the change of the UNet from the base `extrapolation` times as large."""
        (base,), trained = self._base, copy.deepcopy(self.pipe.unet.state_dict())
        for weights, start in zip(self.pipe.unet.parameters(), base.unet.parameters(), strict=True):
            weights.copy_(torch.lerp(start.to(weights), weights, self.options.extrapolation))
        super().export(folder)
        self.pipe.unet.load_state_dict(trained)

    def _matched(self) -> Iterable[tuple[PooledFeatures, ClassMeans]]:
        return zip(self._networks, cast(Iterable[ClassMeans], self.means), strict=True)

    def _draw(self, rows: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1] for these rows' conditions, and what the base's last steps draw."""
        options, pipe, (base,) = self.options, self.pipe, self._base
        embeds = self._embeds(self.data, rows.tolist())
        embeds = {kind: embeds[kind] for kind in options.drawn_with}
        nulls = {c.kind: self._null(c) for c in self.conditions if c.kind in embeds}
        nulls = {kind: null.expand(len(rows), *null.shape[1:]) for kind, null in nulls.items()}
        pipe._guidance_scale, pipe._guidance_rescale = options.guidance_scale, 0.0
        base._guidance_scale, base._guidance_rescale = options.guidance_scale, 0.0
        timesteps, _ = pipe.prepare_timesteps(options.num_inference_steps, 1.0)
        side = pipe.unet.config.sample_size
        latents = seeded_normal(seeds, (pipe.unet.config.in_channels, side, side), _START).to(pipe.device)
        latents = latents * pipe.scheduler.init_noise_sigma
        first = len(timesteps) - options.gradient_steps
        with torch.no_grad():
            latents = self._denoise(pipe, latents, timesteps[:first], embeds, nulls)
            base.scheduler = copy.deepcopy(pipe.scheduler)
            before = pipe.decode_latents(self._denoise(base, latents, timesteps[first:], embeds, nulls))
        images = pipe.decode_latents(self._denoise(pipe, latents, timesteps[first:], embeds, nulls))
        return images.float(), before.float()

    def _denoise(
        self,
        pipe: MediSynPipeline,
        latents: Tensor,
        timesteps: Tensor,
        embeds: Mapping[str, Tensor],
        nulls: Mapping[str, Tensor],
    ) -> Tensor:
        """These steps of a pipeline's sampler, as its `__call__` takes them; differentiable."""
        for t in timesteps:
            stages = pipe._guidance_stages(tuple(embeds), t, self.options.guidance_interval)
            conditions = pipe._stage_conditions([number for number, _ in stages], embeds, nulls, len(latents))
            inputs = pipe.scheduler.scale_model_input(latents, t)
            prediction = pipe._predict(inputs, t, [weight for _, weight in stages], conditions, None)
            latents = pipe.scheduler.step(prediction.float(), t, latents, return_dict=False)[0]
        return latents
