"""Classifier-guided fine-tuning: an unconditional teacher and a few labels become a class-conditional student.

- The guided prediction of the frozen teacher, eps - sqrt(1 - alpha_bar) s grad log p(y | z_t) in its own prediction
  type (Dhariwal & Nichol 2021, algorithm 2), is the student's target, as Meng et al. (2023, arXiv 2210.03142, eq. 2)
  distil classifier-free guidance. Labelled images add their own denoising loss. Sampling then needs neither the
  classifier nor a gradient.
- The student is the teacher with a label embedding that starts at zero, and a LoRA or all weights trained: before the
  first step it draws what the teacher draws. The null label is taught the plain teacher.
- Images whose class the classifier's run has guessed (`pseudo_labels`) can count as labelled (DPT, You et al. 2023,
  arXiv 2302.10586). Classifier-free guidance away from the teacher can be built into their loss (`data_guidance`):
  teacher + s (target - teacher) has the guided prediction for its mean, so one pass draws it (Chen et al. 2025, arXiv
  2501.15420), where `guidance_interval` has it act.
- Images without labels serve as well: their class is drawn, by the classifier's posterior p(y | z_t) where a student
  that samples a class would meet that z_t, or uniformly.
- Everything drawn for an item comes from its seed alone.

    medisyn train scripts/unconditional_to_conditional/guided.yaml
    medisyn generate --model runs/guided --labels finding=adenocarcinoma --guidance 1
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from PIL import Image
from torch import Tensor

from medisyn import extension
from medisyn.adapter_folder import make_manifest
from medisyn.adapter_training import TRAINED, lora_facts, prepare_adapter, save_adapter, sharing_copy
from medisyn.backbone import add_condition, base_hash
from medisyn.conditions import LabelsCondition
from medisyn.conditions.labels import LabelSchema
from medisyn.config import DataConfig, GuidedTaskConfig, TrainConfig
from medisyn.data.cache import build_latent_cache
from medisyn.data.loading import ImageDataset, load_readable
from medisyn.data.preprocessing import Preprocessor
from medisyn.decoder_adapter import find_decoder_lora, load_decoder_lora
from medisyn.guidance import attach_classifier, draw_classes
from medisyn.loading import base_name, load_pipeline
from medisyn.lora import fuse_adapters
from medisyn.losses import diffusion_target, min_snr_weights
from medisyn.pipelines.medisyn_pipeline import EMBEDS_NAMES
from medisyn.tasks.base import (
    POSTERIOR,
    TrainingTask,
    draw_latents,
    image_grid,
    image_record,
    load_splits,
    seeded_normal,
    seeded_uniform,
    within,
)
from medisyn.tasks.cached_images import CachedImages, MixedImages
from medisyn.tasks.diffusion import VALIDATION_NOISE_LEVELS
from medisyn.tasks.labelled_rows import (
    UNLABELLED,
    field_name,
    find_classifier,
    labelled_rows,
    labelled_weights,
    with_classes,
)
from medisyn.tasks.pseudo_labels import with_pseudo_labels
from medisyn.training_record import find_training_record, merge_training_records, write_training_record

PREVIEW_IMAGES, PREVIEW_STEPS = 24, 12
# streams of an item's seed: one for each use, so that adding a use does not change the others
_NOISE, _UNIFORMS = range(POSTERIOR + 1, 3)


class GuidedTask(TrainingTask):
    """Batch of cached latents, some with a class -> distillation and denoising loss. See `GuidedTaskConfig`.

    Raises:
        ValueError: a base that takes labels already; a classifier for other latents or of other classes than the
            labelled images have; a class with fewer than two of them.
        FileNotFoundError: no such base or classifier, or no pseudo-labels in its run.
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        if not isinstance(config.task, GuidedTaskConfig):
            raise ValueError(f"task.type={config.task.type!r} given to the guided task")
        self.config, self.options = config, config.task
        column = self.options.class_column
        self.field = field_name(column)
        images, self._validation_images = load_splits(with_classes(config, column))
        base = load_pipeline(self.options.base)
        if "labels" in base.kinds:
            raise ValueError(f"task.base {self.options.base!r} takes labels already; name a model without them")
        classifier = find_classifier(self.options.classifier, base)
        self.classes = classifier.classes
        row_classes = labelled_rows(images, self.classes, column, self.options.label_fraction, self.options.label_seed)
        if self.options.pseudo_labels:
            name = self.options.classifier or self.options.base
            row_classes = with_pseudo_labels(row_classes, images, name, self.classes, self.options)
        starts = [base.config.get("_name_or_path") or self.options.base, self.options.classifier]
        starts += [self.options.lora.decoder] if self.options.lora is not None else []
        records = [find_training_record(name) for name in starts if name]
        self._earlier_records = [record for record in records if record is not None]
        self.pipe, self._base_hash = base, base_hash(base)
        attach_classifier(base, None)  # the student needs none
        base.unet.register_to_config(sample_size=config.data.resolution // base.vae_scale_factor)
        base.set_progress_bar_config(disable=True)
        for part in base.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval()
        base.vae.to(memory_format=torch.channels_last)
        base.to(device := PartialState().device)
        # nulls of the teacher's own conditions, where it has any
        with torch.no_grad():
            self._nulls = {EMBEDS_NAMES[kind]: base.null_embeds(kind) for kind in base.kinds}
        teacher = self._make_student()
        self._frozen = (teacher, classifier.requires_grad_(False).eval().to(device))  # a tuple: not registered
        self.unet = self.pipe.unet  # registered, hence saved; trained is what of it requires a gradient
        if self.options.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.noising = DDPMScheduler.from_config(base.scheduler.config, clip_sample=False)
        self.images = images
        self.data: CachedImages | MixedImages = self._cached(images, config.data, "train")
        self._may_flip = images.may_flip() & config.data.horizontal_flip
        weights = images.sampling_weights() if config.data.balance_columns else np.ones(len(images))
        self._more_images: ImageDataset | None = None
        if self.options.unlabelled is not None:
            shape: dict[str, Any] = {"resolution": config.data.resolution, "crop": config.data.crop}
            more = DataConfig(source=self.options.unlabelled, caption_column=None, **shape)
            self._more_images = load_readable(more)
            self.data = MixedImages([self.data, self._cached(self._more_images, more, "unlabelled")])
            count = len(self._more_images)
            self._may_flip = np.concatenate([self._may_flip, np.zeros(count, dtype=bool)])
            row_classes = np.concatenate([row_classes, np.full(count, UNLABELLED)])
            weights = np.concatenate([weights, np.full(count, weights.mean())])
        self.row_classes = row_classes
        self.row_weights = labelled_weights(row_classes, weights, self.options.labelled_share)
        self._validation: CachedImages | None = None

    # -- data ----------------------------------------------------------------------------------------------------

    def _cached(self, images: ImageDataset, data: DataConfig, split: str) -> CachedImages:
        """Latents of all readable images, from the cache folder or computed into it."""
        folder = Path(self.options.cache_dir or Path(self.config.output_dir) / "cache") / split / "latents"
        latents = build_latent_cache(
            self.pipe,
            images,
            Preprocessor.from_config(data),
            folder,
            batch_size=self.options.cache_batch_size,
            flips=data.horizontal_flip,
            bf16=self.config.train.mixed_precision == "bf16",
        )
        return CachedImages(images, latents, {})

    def __len__(self) -> int:
        return len(self.data)

    def sample(self, row: int, rng: np.random.Generator) -> dict[str, Any]:
        """The row's latent moments, perhaps of its mirror image, and its class (`UNLABELLED` where not known)."""
        flip = bool(self._may_flip[row]) and rng.random() < 0.5
        return self.data.moments(row, flip) | {"class": int(self.row_classes[row])}

    # -- student and teacher -------------------------------------------------------------------------------------

    def _make_student(self) -> UNet2DConditionModel:
        """Give the pipeline's UNet a label embedding and make it trainable; returns the teacher, frozen."""
        fields = {self.field: {"type": "categorical", "values": list(self.classes)}}
        schema = LabelSchema.from_dict({"name": self.field, "fields": fields})
        old = self.pipe.unet
        if self.options.method == "full":
            add_condition(self.pipe, LabelsCondition(schema))  # makes a new UNet; the old one is the teacher
            self.pipe.unet.requires_grad_(True)
            return old
        teacher = sharing_copy(old)
        extension.extend_labels(self.pipe, fields, TRAINED, schema_name=schema.name)
        prepare_adapter(self.pipe, "lora", self.options.lora)
        if (decoder := self.options.lora.decoder) is not None:
            load_decoder_lora(self.pipe.vae, find_decoder_lora(decoder, self._base_hash), TRAINED)
        for parameter in extension.extension_parameters(self.pipe, TRAINED).values():
            parameter.requires_grad_(True)
        return teacher

    def _conditions(self, label_embeds: Tensor | None, batch_size: int) -> dict[str, Tensor]:
        """The UNet's condition arguments: the teacher's nulls, and label vectors (B, K) for the student alone."""
        nulls = {name: null.expand(batch_size, *null.shape[1:]) for name, null in self._nulls.items()}
        arguments = self.pipe.unet_conditions(**nulls, label_embeds=label_embeds, batch_size=batch_size)
        if label_embeds is None:
            arguments.pop("class_labels", None)
        return arguments

    # -- objective -----------------------------------------------------------------------------------------------

    def forward(self, batch: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """The weighted loss, and unweighted: the error of what the teacher teaches, and that on labelled images."""
        options, prediction_type = self.options, self.noising.config.prediction_type
        latents, seeds = draw_latents(self.pipe, batch), batch["seed"]
        noise = seeded_normal(seeds, latents.shape[1:], _NOISE).to(latents.device)
        uniforms = seeded_uniform(seeds, 4, _UNIFORMS).to(latents.device)
        timesteps = (uniforms[:, 0] * self.noising.config.num_train_timesteps).long()
        noised = self.noising.add_noise(latents, noise, timesteps)
        classes, keep = batch["class"], uniforms[:, 3] >= options.class_dropout
        labelled = classes != UNLABELLED
        if not options.distillation_weight:
            classes, keep = classes.clamp(min=0), keep & labelled
        elif not labelled.all():
            drawn = (self.noising, noised, timesteps, uniforms[:, 1:3], options.uniform_classes)
            classes = torch.where(labelled, classes, draw_classes(self._frozen[1], *drawn))
        prediction = self._predict(noised, timesteps, classes, keep)
        plain = self._teach(noised, timesteps)
        target = diffusion_target(self.noising, prediction_type, latents, noise, timesteps)
        scale = self._data_guidance(timesteps)
        target = plain + scale.view(-1, 1, 1, 1) * (target - plain)
        error = (prediction - target).square().flatten(1).mean(dim=1) / scale**2
        own = (labelled & keep).float()  # the null is the teacher's affair: few images would only narrow it
        taught = torch.where(keep, options.distillation_weight, 1.0)
        if options.distillation_weight:
            plain = self._guided_target(noised, timesteps, classes, keep, plain)
        distillation = (prediction - plain).square().flatten(1).mean(dim=1)
        weights = min_snr_weights(compute_snr(self.noising, timesteps), options.min_snr_gamma, prediction_type)
        losses = {"loss": (weights * (taught * distillation + options.data_weight * own * error)).mean()}
        for name, part, counted in (("distillation_error", distillation, taught > 0), ("data_error", error, own > 0)):
            losses[name] = (counted * part.detach()).sum() / counted.sum().clamp(min=1)
        return losses

    def _predict(self, noised: Tensor, timesteps: Tensor, classes: Tensor, keep: Tensor | None = None) -> Tensor:
        """The student's prediction, float32 (B, C, h, w); of the null label where `keep` (B,) is false."""
        embeds = F.one_hot(classes, len(self.classes)).float()
        embeds = embeds if keep is None else embeds * keep[:, None]
        return self.unet(noised, timesteps, **self._conditions(embeds, len(noised))).sample.float()

    @torch.no_grad()
    def _teach(self, noised: Tensor, timesteps: Tensor) -> Tensor:
        """The teacher's prediction without guidance; float32 (B, C, h, w)."""
        return self._frozen[0](noised, timesteps, **self._conditions(None, len(noised))).sample.float()

    @torch.no_grad()
    def _guided_target(
        self, noised: Tensor, timesteps: Tensor, classes: Tensor, keep: Tensor, plain: Tensor | None = None
    ) -> Tensor:
        """The teacher's prediction (`plain`), guided to `classes` where `keep` (B,) is true; float32 (B, C, h, w)."""
        plain = self._teach(noised, timesteps) if plain is None else plain
        given = (noised, timesteps, self.noising, torch.where(keep & self._is_guided(timesteps), classes, -1))
        strength = {"scale": self.options.guidance_scale, "clip": self.options.guidance_clip}
        return self._frozen[1].guided_prediction(lambda _: plain, *given, **strength)

    def _is_guided(self, timesteps: Tensor) -> Tensor:
        """Whether guidance of either kind acts at these timesteps; bool (B,)."""
        return within(timesteps, self.options.guidance_interval, self.noising.config.num_train_timesteps)

    def _data_guidance(self, timesteps: Tensor) -> Tensor:
        """The guidance that the labelled images' own loss builds in at these timesteps; (B,)."""
        return torch.where(self._is_guided(timesteps), self.options.data_guidance, 1.0)

    # -- watching and writing ------------------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self, count: int) -> dict[str, float]:
        """Unweighted errors at fixed noise levels on images with a class: denoising with it and without, and teacher.

        The gap between `null_error` and `error`, in which no `data_guidance` is left, is what the student has learnt
        of the classes.
        """
        if self._validation is None:
            self._validation, self._validation_classes = self._prepare_validation(count)
        data, device = self._validation, self.pipe.device
        found: dict[str, list[Tensor]] = defaultdict(list)
        prediction_type = self.noising.config.prediction_type
        for level in VALIDATION_NOISE_LEVELS:
            for rows in torch.arange(len(data)).split(64):
                batch = self.collate([data.moments(row) for row in rows.tolist()])
                batch = {name: value.to(device) for name, value in batch.items()} | {"seed": rows}
                latents, classes = draw_latents(self.pipe, batch), self._validation_classes[rows].to(device)
                noise = seeded_normal(rows, latents.shape[1:], _NOISE).to(device)
                step = int(level * self.noising.config.num_train_timesteps)
                timesteps = torch.full((len(rows),), step, device=device)
                noised = self.noising.add_noise(latents, noise, timesteps)
                target = diffusion_target(self.noising, prediction_type, latents, noise, timesteps)
                keep = torch.ones(len(rows), dtype=torch.bool, device=device)
                prediction, plain = self._predict(noised, timesteps, classes), self._teach(noised, timesteps)
                unguided = plain + (prediction - plain) / self._data_guidance(timesteps).view(-1, 1, 1, 1)
                pairs = {
                    "error": (unguided, target),
                    "null_error": (self._predict(noised, timesteps, classes, ~keep), target),
                }
                if self.options.distillation_weight:
                    guided = self._guided_target(noised, timesteps, classes, keep, plain)
                    pairs["distillation_error"] = (prediction, guided)
                for name, (one, other) in pairs.items():
                    found[name].append((one - other).square().flatten(1).mean(dim=1))
        return {name: torch.cat(errors).mean().item() for name, errors in found.items()}

    def _prepare_validation(self, count: int) -> tuple[CachedImages, Tensor]:
        """At most `count` validation images of the classes, spread over all, with the numbers of their classes."""
        images = self._validation_images
        names = [str(name) for name in images.column(self.options.class_column)]
        rows = [row for row, name in enumerate(names) if name in self.classes]
        if not rows:
            raise ValueError(f"no validation image has one of the classes {', '.join(self.classes)}")
        rows = [rows[place] for place in np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]
        part = images.select(rows)
        classes = torch.tensor([self.classes.index(names[row]) for row in rows])
        return self._cached(part, images.config, f"validation_{len(part)}"), classes

    @torch.no_grad()
    def preview(self) -> Image.Image:
        """Samples of every class at fixed seeds; without classifier-free guidance, as the student is to be used."""
        each = max(1, PREVIEW_IMAGES // len(self.classes))
        labels = [{self.field: name} for name in self.classes for _ in range(each)]
        generators = [torch.Generator().manual_seed(seed % each) for seed in range(len(labels))]
        options: dict[str, Any] = {"num_inference_steps": PREVIEW_STEPS, "guidance_scale": 1.0, "output_type": "pt"}
        images = self.pipe(labels=labels, generator=generators, **options).images
        return image_grid(images * 2 - 1, columns=each)

    def export(self, folder: Path) -> None:
        """Write `pipeline/`, the student by itself, and of a LoRA `adapter/`, which turns the teacher into it."""
        own = image_record(self.images)
        if self._more_images is not None:
            own = merge_training_records(own, image_record(self._more_images))
        pipe = self.pipe
        if self.options.method == "lora":
            lora = self.options.lora
            manifest = make_manifest(
                Path(self.config.output_dir).resolve().name,
                "lora",
                base_name(self.options.base),
                self._base_hash,
                self.pipe.kinds,
                training_data=own["datasets"],
                **lora_facts(lora),
                **extension.added(self.pipe, TRAINED),
            )
            save_adapter(self.pipe, folder / "adapter", manifest)
            write_training_record(folder / "adapter", own)
            pipe = load_pipeline(self.options.base, adapter=folder / "adapter")
            fuse_adapters(pipe)
            attach_classifier(pipe, None)
            pipe.unet.register_to_config(sample_size=self.pipe.unet.config.sample_size)
        pipe.save_pretrained(folder / "pipeline")
        write_training_record(folder / "pipeline", merge_training_records(own, *self._earlier_records))
