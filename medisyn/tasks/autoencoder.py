"""Autoencoder training: L1 + perceptual + KL, on request a patch discriminator and an image classifier.

- Any stock autoencoder: `AutoencoderKL` (sampled code, KL term) or the deterministic `AutoencoderDC`.
- The decoder alone can be tuned (latents stay valid), or a LoRA of it (an adapter, `medisyn.decoder_adapter`), with
  the loss of an image classifier on a small labelled set beside the others (`medisyn.tasks.judges`).
- At the end the latent scale is fitted and written (`medisyn.autoencoders.fit_latent_scale`).

    medisyn train scripts/embedded_default/autoencoder.yaml
"""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from medisyn.adapter_folder import make_manifest
from medisyn.adapter_training import save_adapter
from medisyn.autoencoders import Autoencoder, fit_latent_scale, initialize_from_pca
from medisyn.backbone import base_hash, create_autoencoder, load_autoencoder, load_pipeline
from medisyn.config import AutoencoderTaskConfig, TrainConfig
from medisyn.data.preprocessing import Preprocessor
from medisyn.data.subsets import class_names, stratified_subset
from medisyn.decoder_adapter import add_decoder_lora
from medisyn.loading import base_name
from medisyn.losses import (
    clip_where_reference_is,
    colour_difference,
    kl_to_standard_normal,
    peak_signal_to_noise_ratio,
)
from medisyn.perceptual import build_perceptual, structure_difference
from medisyn.tasks.base import TrainingTask, image_grid, image_record, load_splits, seeded_normal, seeded_uniform
from medisyn.tasks.judges import ClassConsistency, adversarial_losses, patch_discriminator
from medisyn.training_record import find_training_record, merge_training_records, write_training_record

logger = logging.getLogger(__name__)

MOST_PSNR_LOST = 0.5  # dB that class consistency may cost

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
        if self.options.class_weight:
            self._choose_labelled()
            if self.validation_images is None:
                raise ValueError(
                    "task.class_weight may cost reconstruction, which needs `validation:` data to be seen"
                )
        if config.data.balance_columns:
            self.row_weights = self.images.sampling_weights()
        self._may_flip = self.images.may_flip()
        self.preprocess = Preprocessor.from_config(config.data)
        self.preprocess_whole = Preprocessor(
            config.data.resolution, crop="pad" if config.data.crop == "pad" else "center"
        )
        if self.options.preset is not None:
            self.vae = create_autoencoder(self.options.preset)
        elif self.options.lora is not None:
            self._base = load_pipeline(self.options.base)
            self._base_hash = base_hash(self._base)
            self.vae = self._base.vae
            add_decoder_lora(self.vae, self.options.lora)
        else:
            self.vae = load_autoencoder(self.options.base)
        if not self.options.train_encoder and self.options.lora is None:
            self.vae.requires_grad_(False)
            self.vae.decoder.requires_grad_(True)
        if self.options.pca_images:
            initialize_from_pca(self.vae, self._stack(self.images, self._spread(self.images, self.options.pca_images)))
        self.discriminator = None
        if self.options.adversarial_weight:
            self.discriminator = patch_discriminator(self.options.discriminator_channels)
        self.consistency = ClassConsistency(len(self.classes)) if self.options.class_weight else None
        perceptual = build_perceptual(self.options.perceptual, self.options.perceptual_weights)
        if self.options.structure_weight:
            structure_difference(*torch.zeros(2, 1, 3, 16, 16))  # what it lacks is said now, not in the first step
        self._frozen = (perceptual,)  # a tuple keeps it out of the module registry: neither trained nor saved

    def _choose_labelled(self) -> None:
        """Keep the labelled set: the same rows as a classifier with the same fraction and seed."""
        options, group_column = self.options, self.config.data.group_column
        names = self.images.column(options.class_column)
        groups = self.images.column(group_column) if group_column is not None else None
        self.images = self.images.select(stratified_subset(names, groups, options.label_fraction, options.label_seed))
        names = self.images.column(options.class_column)
        self.classes = class_names(names)
        self.targets = [self.classes.index(str(name)) for name in names]

    def __len__(self) -> int:
        return len(self.images)

    def sample(self, row: int, rng: np.random.Generator) -> dict[str, Any]:
        """A crop, perhaps mirrored, (3, h, w) in [-1, 1]; with class consistency, its class."""
        flip = None if self._may_flip[row] else False  # None: half of them, by `rng`
        sample = {"images": self.preprocess(self.images.image(row), rng, flip)}
        return sample | {"class": self.targets[row]} if self.consistency is not None else sample

    def averaged_parameters(self) -> Iterable[nn.Parameter]:
        """Those of the autoencoder that are trained, not of the discriminator and the classifier."""
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
        reconstruction = clip_where_reference_is(reconstruction, images)
        losses["l1"] = (reconstruction - images).abs().mean()
        losses["l2"] = (reconstruction - images).square().mean()
        total = options.l1_weight * losses["l1"] + options.l2_weight * losses["l2"]
        total = total + options.kl_weight * losses.get("kl", 0.0)
        if options.colour_weight:
            losses["colour"] = colour_difference(reconstruction, images)
            total = total + options.colour_weight * losses["colour"]
        if options.structure_weight:
            losses["structure"] = structure_difference(reconstruction, images)
            total = total + options.structure_weight * losses["structure"]
        (perceptual,) = self._frozen
        if perceptual is not None:
            losses["perceptual"] = perceptual.to(images.device)(reconstruction, images)
            total = total + options.perceptual_weight * losses["perceptual"]
        if self.discriminator is not None:
            losses |= adversarial_losses(self.discriminator, images, reconstruction)
            weight = options.adversarial_weight if step >= options.adversarial_start else 0.0
            total = total + weight * losses["generator"] + losses["discriminator"]
        if self.consistency is not None:
            losses |= self.consistency(images, reconstruction, batch["class"])
            total = total + options.class_weight * losses["consistency"] + losses["classifier"]
        return {"loss": total} | {name: value.detach() for name, value in losses.items()}

    def _disturbed(self, latents: Tensor, seeds: Tensor) -> Tensor:
        """Latents with noise of a strength of their own, between none and `latent_noise`."""
        if not self.options.latent_noise:
            return latents
        strength = self.options.latent_noise * seeded_uniform(seeds, 1, _STRENGTH)[:, :, None, None]
        noise = strength * seeded_normal(seeds, latents.shape[1:], _DISTURBANCE) / self.vae.config.scaling_factor
        return latents + noise.to(latents)

    @torch.no_grad()
    def validate(self, count: int) -> dict[str, float]:
        """PSNR in dB, mean over images, and the perceptual distance, on whole images.

        With class consistency, the change of the PSNR from that of `base`, in dB.
        """
        images = self._stack(self.validation_images, self._spread(self.validation_images, count))
        reconstruction = self._reconstruct(images)
        (perceptual,) = self._frozen
        metrics = {"psnr": peak_signal_to_noise_ratio(reconstruction, images).mean().item()}
        if perceptual is not None:
            device = next(self.vae.parameters()).device
            parts = zip(reconstruction.split(32), images.split(32), strict=True)
            metrics["perceptual"] = float(np.mean([perceptual(a.to(device), b.to(device)).item() for a, b in parts]))
        if self.consistency is not None and self.options.base is not None:
            metrics["psnr_change"] = self._psnr_change(images, metrics["psnr"])
        return metrics

    def _psnr_change(self, images: Tensor, psnr: float) -> float:
        """PSNR in dB beside that of `base` on the same images; a loss above `MOST_PSNR_LOST` is warned of."""
        start = load_autoencoder(self.options.base).to(next(self.vae.parameters()).device)
        change = psnr - peak_signal_to_noise_ratio(self._reconstruct(images, start), images).mean().item()
        if change < -MOST_PSNR_LOST:
            logger.warning(
                "reconstruction fell by %.2f dB, more than %.1f: lower task.class_weight or the learning rate",
                -change,
                MOST_PSNR_LOST,
            )
        return change

    @torch.no_grad()
    def preview(self) -> Image.Image:
        """Originals above their reconstructions."""
        source = self.validation_images or self.images
        images = self._stack(source, self._spread(source, 16))
        rows = zip(images.split(8), self._reconstruct(images).split(8), strict=True)
        return image_grid(torch.cat([part for row in rows for part in row]), columns=min(8, len(images)))

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """Write `vae/` (stock component), or `adapter/`; where the encoder was trained, its scale is fitted first."""
        if self.options.lora is not None:
            self._export_adapter(folder / "adapter")
            return
        if self.options.train_encoder:
            images = self._stack(self.images, self._spread(self.images, self.options.scale_images))
            report = fit_latent_scale(self.vae, torch.cat([self._encode(part) for part in images.split(32)]))
            (folder / "latent_scale.json").write_text(json.dumps(report, indent=2))
        self.vae.save_pretrained(folder / "vae")
        base = find_training_record(self.options.base) if self.options.base is not None else None
        write_training_record(
            folder / "vae", merge_training_records(image_record(self.images), *([base] if base else []))
        )

    def _export_adapter(self, folder: Path) -> None:
        own, lora = image_record(self.images), self.options.lora
        metrics: list[dict[str, Any]] = []
        if self.consistency is not None:  # its price, which a log alone would hide
            images = self._stack(
                self.validation_images, self._spread(self.validation_images, self.config.train.validation_images)
            )
            psnr = peak_signal_to_noise_ratio(self._reconstruct(images), images).mean().item()
            measured: dict[str, Any] = {"subset": "validation", "images": len(images), "real": None, "extractor": None}
            metrics.append({"name": "psnr_change", "value": self._psnr_change(images, psnr)} | measured)
        manifest = make_manifest(
            Path(self.config.output_dir).resolve().name,
            "lora",
            base_name(self.options.base),
            self._base_hash,
            self._base.kinds,
            rank=lora.rank,
            alpha=lora.alpha or lora.rank,
            captions=self.images.captions,
            training_data=own["datasets"],
            metrics=metrics,
        )
        save_adapter(self._base, folder, manifest)
        write_training_record(folder, own)

    def _encode(self, images: Tensor, vae: Autoencoder | None = None) -> Tensor:
        vae = vae or self.vae
        encoded = vae.encode(images.to(next(vae.parameters()).device))
        return encoded.latent_dist.mean if isinstance(vae, AutoencoderKL) else encoded.latent

    def _reconstruct(self, images: Tensor, vae: Autoencoder | None = None) -> Tensor:
        vae = vae or self.vae
        return torch.cat([vae.decode(self._encode(part, vae)).sample.float().cpu() for part in images.split(32)])

    def _stack(self, source, rows: list[int]) -> Tensor:
        return torch.stack([self.preprocess_whole(source.image(row)) for row in rows])

    @staticmethod
    def _spread(source, count: int) -> list[int]:
        """`count` rows spread evenly over the data (all rows where there are fewer)."""
        return np.linspace(0, len(source) - 1, min(count, len(source))).astype(int).tolist()
