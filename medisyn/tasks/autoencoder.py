"""Autoencoder training: L1 + perceptual + KL, and a patch discriminator late in the run on request.

- Any stock autoencoder: `AutoencoderKL` (sampled code, KL term) or the deterministic `AutoencoderDC`.
- One optimizer and one backward for both players: the discriminator's own loss sees detached images, and the
  autoencoder's adversarial loss sees detached discriminator weights.
- At the end the latent scale is fitted and written (`medisyn.autoencoders.fit_latent_scale`).

    medisyn train scripts/embedded_default/autoencoder.yaml
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from medisyn.autoencoders import fit_latent_scale, initialize_from_pca
from medisyn.backbone import create_autoencoder, load_autoencoder
from medisyn.config import AutoencoderTaskConfig, TrainConfig
from medisyn.data.preprocessing import Preprocessor
from medisyn.losses import discriminator_hinge_loss, kl_to_standard_normal, peak_signal_to_noise_ratio
from medisyn.perceptual import build_perceptual
from medisyn.tasks.base import TrainingTask, image_grid, image_record, load_splits, seeded_normal, seeded_uniform
from medisyn.training_record import find_training_record, merge_training_records, write_training_record

# streams of an item's seed; the posterior's noise is stream 0
_DISTURBANCE, _STRENGTH = 1, 2


class AutoencoderTask(TrainingTask):
    """Batch of images -> reconstruction losses. See `AutoencoderTaskConfig` for the options."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        if not isinstance(config.task, AutoencoderTaskConfig):
            raise ValueError(f"task.type={config.task.type!r} given to the autoencoder task")
        self.config, self.options = config, config.task
        self.images, self.validation_images = load_splits(config)
        if config.data.balance_columns:
            self.row_weights = self.images.sampling_weights()
        self.preprocess = Preprocessor.from_config(config.data)
        self.preprocess_whole = Preprocessor(
            config.data.resolution, crop="pad" if config.data.crop == "pad" else "center"
        )
        if self.options.preset is not None:
            self.vae = create_autoencoder(self.options.preset)
        else:
            self.vae = load_autoencoder(self.options.base)
        if not self.options.train_encoder:
            self.vae.requires_grad_(False)
            self.vae.decoder.requires_grad_(True)
        if self.options.pca_images:
            initialize_from_pca(self.vae, self._stack(self.images, self._spread(self.images, self.options.pca_images)))
        self.discriminator = None
        if self.options.adversarial_weight:
            self.discriminator = patch_discriminator(self.options.discriminator_channels)
        perceptual = build_perceptual(self.options.perceptual, self.options.perceptual_weights)
        self._frozen = (perceptual,)  # a tuple keeps it out of the module registry: neither trained nor saved

    def __len__(self) -> int:
        return len(self.images)

    def sample(self, row: int, rng: np.random.Generator) -> dict[str, Any]:
        """A crop, perhaps mirrored, (3, h, w) in [-1, 1]."""
        return {"images": self.preprocess(self.images.image(row), rng)}

    def averaged_parameters(self) -> Iterable[nn.Parameter]:
        """Those of the autoencoder that are trained, not of the discriminator."""
        return [parameter for parameter in self.vae.parameters() if parameter.requires_grad]

    def forward(self, batch: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """The weighted sum of the losses, and each of them."""
        images = batch["images"].contiguous(memory_format=torch.channels_last)
        options, losses = self.options, {}
        with torch.set_grad_enabled(options.train_encoder):
            if isinstance(self.vae, AutoencoderKL):
                posterior = self.vae.encode(images).latent_dist
                noise = seeded_normal(batch["seed"], posterior.mean.shape[1:]).to(posterior.mean)
                latents = posterior.mean + posterior.std * noise
                losses["kl"] = kl_to_standard_normal(posterior.mean.float(), posterior.logvar.float())
            else:
                latents = self.vae.encode(images).latent
        reconstruction = self.vae.decode(self._disturbed(latents, batch["seed"])).sample.float()
        losses["l1"] = (reconstruction - images).abs().mean()
        losses["l2"] = (reconstruction - images).square().mean()
        total = options.l1_weight * losses["l1"] + options.l2_weight * losses["l2"]
        total = total + options.kl_weight * losses.get("kl", 0.0)
        (perceptual,) = self._frozen
        if perceptual is not None:
            losses["perceptual"] = perceptual.to(images.device)(reconstruction, images)
            total = total + options.perceptual_weight * losses["perceptual"]
        if self.discriminator is not None:
            losses |= self._adversarial(images, reconstruction)
            weight = options.adversarial_weight if step >= options.adversarial_start else 0.0
            total = total + weight * losses["generator"] + losses["discriminator"]
        return {"loss": total} | {name: value.detach() for name, value in losses.items()}

    def _disturbed(self, latents: Tensor, seeds: Tensor) -> Tensor:
        """Latents with noise of a strength of their own, between none and `latent_noise`."""
        if not self.options.latent_noise:
            return latents
        strength = self.options.latent_noise * seeded_uniform(seeds, 1, _STRENGTH)[:, :, None, None]
        noise = strength * seeded_normal(seeds, latents.shape[1:], _DISTURBANCE) / self.vae.config.scaling_factor
        return latents + noise.to(latents)

    def _adversarial(self, images: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        frozen = {name: tensor.detach() for name, tensor in self.discriminator.state_dict(keep_vars=True).items()}
        judged = torch.func.functional_call(self.discriminator, frozen, (reconstruction,))
        return {
            "generator": -judged.float().mean(),
            "discriminator": discriminator_hinge_loss(
                self.discriminator(images).float(), self.discriminator(reconstruction.detach()).float()
            ),
        }

    @torch.no_grad()
    def validate(self, count: int) -> dict[str, float]:
        """PSNR in dB, mean over images, and the perceptual distance, on whole images."""
        images = self._stack(self.validation_images, self._spread(self.validation_images, count))
        reconstruction = self._reconstruct(images)
        (perceptual,) = self._frozen
        metrics = {"psnr": peak_signal_to_noise_ratio(reconstruction, images).mean().item()}
        if perceptual is not None:
            device = next(self.vae.parameters()).device
            parts = zip(reconstruction.split(32), images.split(32), strict=True)
            metrics["perceptual"] = float(np.mean([perceptual(a.to(device), b.to(device)).item() for a, b in parts]))
        return metrics

    @torch.no_grad()
    def preview(self) -> Image.Image:
        """Originals above their reconstructions."""
        source = self.validation_images or self.images
        images = self._stack(source, self._spread(source, 16))
        rows = zip(images.split(8), self._reconstruct(images).split(8), strict=True)
        return image_grid(torch.cat([part for row in rows for part in row]), columns=min(8, len(images)))

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """Write `vae/` (stock component); where the encoder was trained, its latent scale is fitted first."""
        if self.options.train_encoder:
            images = self._stack(self.images, self._spread(self.images, self.options.scale_images))
            report = fit_latent_scale(self.vae, torch.cat([self._encode(part) for part in images.split(32)]))
            (folder / "latent_scale.json").write_text(json.dumps(report, indent=2))
        self.vae.save_pretrained(folder / "vae")
        base = find_training_record(self.options.base) if self.options.base is not None else None
        write_training_record(
            folder / "vae", merge_training_records(image_record(self.images), *([base] if base else []))
        )

    def _encode(self, images: Tensor) -> Tensor:
        images = images.to(next(self.vae.parameters()).device)
        encoded = self.vae.encode(images)
        return encoded.latent_dist.mean if isinstance(self.vae, AutoencoderKL) else encoded.latent

    def _reconstruct(self, images: Tensor) -> Tensor:
        return torch.cat([self.vae.decode(self._encode(part)).sample.float().cpu() for part in images.split(32)])

    def _stack(self, source, rows: list[int]) -> Tensor:
        return torch.stack([self.preprocess_whole(source.image(row)) for row in rows])

    @staticmethod
    def _spread(source, count: int) -> list[int]:
        """`count` rows spread evenly over the data (all rows where there are fewer)."""
        return np.linspace(0, len(source) - 1, min(count, len(source))).astype(int).tolist()


def patch_discriminator(channels: int) -> nn.Sequential:
    """A PatchGAN (Isola et al. 2017, section 3.2.2): (B, 3, H, W) -> logits (B, 1, H/8, W/8), normalised by groups."""
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    for width in (channels, 2 * channels):
        layers += [nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=False)]
        layers += [nn.GroupNorm(8, 2 * width), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(4 * channels, 1, 3, padding=1))
