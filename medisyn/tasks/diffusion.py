"""Latent diffusion training: epsilon, velocity or sample prediction on cached latents, under any conditions.

- The task builds a `MediSynPipeline` and trains inside it: conditions are encoded, nulled, wired and latents are
  scaled by the pipeline's own methods, so sampling cannot drift from training.
- All weights are trained, or an adapter beside a frozen base (`method: lora` or `norm`), which is what is then saved.
- What is frozen is computed once: latent moments (never samples) and the embeddings of frozen encoders.
- Timestep, noise, posterior sample and condition dropout of an item come from its seed alone.

    medisyn train scripts/knee_osteoarthritis/lora.yaml
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.training_utils import compute_snr
from PIL import Image
from torch import Tensor, nn

from medisyn import extension
from medisyn.adapter_folder import make_manifest
from medisyn.adapter_training import TRAINED, lora_facts, norm_parameters, prepare_adapter, save_adapter, teach_words
from medisyn.backbone import adapt_unet, base_hash, create_pipeline, load_autoencoder, load_pipeline
from medisyn.conditions import (
    Condition,
    TextCondition,
    condition_dropout,
    conditions_of,
    drop,
    get_condition,
    get_schema,
)
from medisyn.conditions.image import fit_noise, noise_embeds
from medisyn.config import DataConfig, DiffusionTaskConfig, LabelsConditionConfig, TextConditionConfig, TrainConfig
from medisyn.data.cache import build_latent_cache
from medisyn.data.loading import ImageDataset, load_readable
from medisyn.data.preprocessing import Preprocessor
from medisyn.decoder_adapter import find_decoder_lora, load_decoder_lora
from medisyn.loading import base_name
from medisyn.losses import diffusion_target, min_snr_weights
from medisyn.paraphrases import perhaps_paraphrase
from medisyn.pipelines.medisyn_pipeline import MediSynPipeline
from medisyn.prompt_vocabulary import record_vocabulary
from medisyn.tasks.base import (
    POSTERIOR,
    TrainingTask,
    draw_latents,
    image_grid,
    image_record,
    load_splits,
    seeded_normal,
    seeded_uniform,
)
from medisyn.tasks.cached_images import CachedImages, MixedImages, mixing_weights, prior_data
from medisyn.training_record import find_training_record, merge_training_records, write_training_record

logger = logging.getLogger(__name__)

VALIDATION_NOISE_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # fractions of the training timesteps
PREVIEW_IMAGES, PREVIEW_STEPS = 24, 12
DEFAULT_DROPOUT = 0.1  # of a condition that the base model brings along
# streams of an item's seed: one for each use, so that adding a use does not change the others
_NOISE, _OFFSET, _UNIFORMS = range(POSTERIOR + 1, 4)
_WORDING = 6  # 4 and 5 are the image condition's


class DiffusionTask(TrainingTask):
    """Batch of cached latents -> denoising loss. See `DiffusionTaskConfig` for the options."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        if not isinstance(config.task, DiffusionTaskConfig):
            raise ValueError(f"task.type={config.task.type!r} given to the diffusion task")
        self.config, self.options = config, config.task
        images, self._validation_images = load_splits(config)
        self._prior_images: ImageDataset | None = None
        self._nulls: dict[str, Tensor] = {}  # of conditions with frozen encoders
        self._base_hash: str | None = None  # of the base of an adapter
        self.built_in_guidance: float | None = None  # of what is trained; it is then sampled with guidance 1
        self._norms: dict[str, Tensor] = {}  # the base's values of what a norm adapter changes
        self.pipe = self._build_pipeline(images)
        source = self.pipe.config.get("_name_or_path") if self.options.base is not None else None
        encoders = [condition.encoder for condition in self.options.conditions if condition.type == "image"]
        starts = [name for name in (source or self.options.base, self.options.vae, *encoders) if name is not None]
        self._earlier_records = [record for name in starts if (record := find_training_record(name)) is not None]
        self.pipe.unet.register_to_config(sample_size=config.data.resolution // self.pipe.vae_scale_factor)
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.vae.requires_grad_(False).eval().to(memory_format=torch.channels_last)
        self.pipe.to(PartialState().device)
        listed = [condition.type for condition in self.options.conditions] or self.pipe.kinds
        self.conditions = [condition for condition in conditions_of(self.pipe) if condition.kind in listed]
        for text in (c for c in self.conditions if isinstance(c, TextCondition)):
            text.count_truncated(images.captions)
        described = {"text": any(images.captions), "labels": any(images.labels)}
        for kind in (c.kind for c in self.conditions if not described.get(c.kind, True)):
            logger.warning("no training image has %s: that condition is trained on its null alone", kind)
        self.dropout = {c.kind: DEFAULT_DROPOUT for c in self.conditions}
        self.dropout |= {c.type: c.dropout for c in self.options.conditions}
        texts = (c for c in self.options.conditions if isinstance(c, TextConditionConfig))
        self._paraphrase = next((c.paraphrase for c in texts), 0.0)
        # registered, hence trained and saved: what of the UNet and of every encoder requires a gradient
        self.unet = self.pipe.unet
        parts = (part for c in self.conditions if not c.cacheable for part in c.components().values())
        self.trained_encoders = nn.ModuleList(part for part in parts if isinstance(part, nn.Module))
        if self.options.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self._denoiser = (torch.compile(self.unet) if self.options.compile else self.unet,)  # a tuple: registered once
        self.noising = DDPMScheduler.from_config(self.pipe.scheduler.config, clip_sample=False)
        self.images = images
        self.data: CachedImages | MixedImages = self._cached(images, config.data, "train")
        self._may_flip = images.may_flip() & config.data.horizontal_flip
        if config.data.balance_columns or self._prior_images is not None:
            self.row_weights = images.sampling_weights()
        if self._prior_images is not None:
            prior = self._cached(self._prior_images, self._prior_images.config, "prior")
            self.data = MixedImages([self.data, prior])
            self.row_weights = mixing_weights([self.row_weights, np.ones(len(prior))], self.options.prior.fraction)
            self._may_flip = np.concatenate([self._may_flip, np.zeros(len(prior), dtype=bool)])
        fit_noise(self.pipe, self.data)
        self._validation: CachedImages | None = None

    def _build_pipeline(self, images: ImageDataset) -> MediSynPipeline:
        options = self.options
        base = load_pipeline(options.base) if options.base is not None else None
        if options.prior is not None:
            folder = Path(self.config.output_dir) / "prior"
            base.to(PartialState().device)  # it draws the images
            drawn = prior_data(base, options.prior, self.config.data, folder, base_name(options.base))
            self._prior_images = load_readable(drawn)
        if options.adapts:
            self._put_adapter(base, images)
            return base
        for encoder in (base.text_encoder, base.image_encoder) if base is not None else ():
            if encoder is not None:
                encoder.requires_grad_(False)  # a configured condition says otherwise
        for condition in options.conditions if base is not None else ():
            if isinstance(condition, TextConditionConfig) and condition.new_words:
                teach_words(base, condition, images.captions)
                extension.fuse_extensions(base)  # its text encoder is trained: the words become rows like the others
        built = [get_condition(c.type).from_config(c, images.captions, base) for c in options.conditions]
        if base is not None:
            for name in adapt_unet(base, built) if built else ():
                logger.warning("newly initialised or replaced: %s", name)
            return base
        pipe = create_pipeline(options.preset, conditions=built, vae=load_autoencoder(options.vae))
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(
            pipe.scheduler.config,
            beta_schedule=options.beta_schedule,
            prediction_type=options.prediction_type,
            rescale_betas_zero_snr=options.zero_terminal_snr,
            timestep_spacing="trailing",  # sampling starts at the last training timestep (Lin et al. 2024, eq. 11)
        )
        return pipe

    def _put_adapter(self, base: MediSynPipeline, images: ImageDataset) -> None:
        """Freeze the base, add the label fields and words that it lacks, and the adapter itself."""
        options = self.options
        self._base_hash = base_hash(base)
        for condition in options.conditions:
            if isinstance(condition, LabelsConditionConfig) and condition.schema is not None:
                schema = get_schema(condition.schema)
                fields = schema.to_dict(rules=False)["fields"]
                extension.extend_labels(base, fields, TRAINED, schema_name=schema.name)
            elif isinstance(condition, TextConditionConfig) and condition.new_words:
                teach_words(base, condition, images.captions)
            if condition.type not in base.kinds:
                raise ValueError(f"the base has no {condition.type} condition, and an adapter cannot add one")
        prepare_adapter(base, options.method, options.lora)
        if options.lora is not None and options.lora.decoder is not None:
            load_decoder_lora(base.vae, find_decoder_lora(options.lora.decoder, self._base_hash), TRAINED)
        if options.method == "norm":
            self._norms = {name: value.detach().clone() for name, value in norm_parameters(base.unet).items()}
        for parameter in extension.extension_parameters(base, TRAINED).values():
            parameter.requires_grad_(True)

    def _cached(self, images: ImageDataset, data: DataConfig, split: str) -> CachedImages:
        """Latents and frozen embeddings of all readable images, from the cache folder or computed into it."""
        folder = Path(self.options.cache_dir or Path(self.config.output_dir) / "cache") / split
        options: dict[str, Any] = {
            "batch_size": self.options.cache_batch_size,
            "flips": data.horizontal_flip,
            "bf16": self.config.train.mixed_precision == "bf16",
        }
        preprocessor = Preprocessor.from_config(data)
        latents = build_latent_cache(self.pipe, images, preprocessor, folder / "latents", **options)
        caches = {c.kind: c.build_cache(self.pipe, images, folder / c.kind, **options) for c in self.conditions}
        return CachedImages(images, latents, {kind: cache for kind, cache in caches.items() if cache is not None})

    def __len__(self) -> int:
        return len(self.data)

    def sample(self, row: int, rng: np.random.Generator) -> dict[str, Any]:
        """The row's latent moments, perhaps of its mirror image."""
        flip = bool(self._may_flip[row]) and rng.random() < 0.5
        return self.data.moments(row, flip) | {"row": row, "flip": flip}

    def forward(self, batch: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """The weighted denoising loss and the unweighted error."""
        latents, seeds = draw_latents(self.pipe, batch), batch["seed"]
        noise = seeded_normal(seeds, latents.shape[1:], _NOISE).to(latents.device)
        if self.options.noise_offset:
            offset = seeded_normal(seeds, (latents.shape[1], 1, 1), _OFFSET).to(latents.device)
            noise = noise + self.options.noise_offset * offset
        uniforms = seeded_uniform(seeds, 2 + len(self.conditions), _UNIFORMS)
        timesteps = (uniforms[:, 0] * self.noising.config.num_train_timesteps).long().to(latents.device)
        keep = condition_dropout(self.dropout, uniforms[:, 1:], self.options.joint_dropout)
        embeds = self._embeds(self.data, batch["row"].tolist(), batch["flip"].tolist(), seeds.tolist())
        conditions = self._unet_conditions(noise_embeds(self.pipe, embeds, seeds), keep, len(latents))
        error = self._error(latents, noise, timesteps, conditions)
        snr, prediction_type = compute_snr(self.noising, timesteps), self.noising.config.prediction_type
        loss = (error * min_snr_weights(snr, self.options.min_snr_gamma, prediction_type)).mean()
        return {"loss": loss, "error": error.detach().mean()}

    def _embeds(
        self,
        data: CachedImages | MixedImages,
        rows: Sequence[int],
        flips: Sequence[bool] | bool = False,
        seeds: Sequence[int] = (),
    ) -> dict[str, Tensor]:
        """Embeddings of the conditions of these rows by kind, from the cache where there is one.

        With seeds, captions are said in other words where the configuration asks for it.
        """
        embeds = {}
        for condition in self.conditions:
            cached = data.embeddings(condition.kind, rows, flips)
            if cached is None:
                examples = data.examples(rows)
                if condition.kind == "text":
                    for example, seed in zip(examples, seeds, strict=False):
                        rng = Random(seed + _WORDING)
                        example["caption"] = perhaps_paraphrase(example["caption"], self._paraphrase, rng)
                embeds[condition.kind] = condition.encode(self.pipe, examples)
            else:
                embeds[condition.kind] = cached.to(self.pipe.device)
        return embeds

    def _record_known_words(self) -> None:
        """Of a text encoder that was made for the captions: what it was taught, for warnings of prompts."""
        known = self.pipe.config.get("known_words")
        text = next((c for c in self.options.conditions if isinstance(c, TextConditionConfig)), None)
        if text is None or not text.train_encoder or text.encoder or (self.options.base and known is None):
            return
        record_vocabulary(self.pipe, self.images.captions, paraphrased=bool(text.paraphrase))

    def _unet_conditions(
        self, embeds: Mapping[str, Tensor], keep: Mapping[str, Tensor] | None = None, batch_size: int = 1
    ) -> dict[str, Tensor]:
        """The UNet's condition arguments; with `keep` masks (B,), nulls where a kind is dropped."""
        arguments = {}
        for condition in self.conditions:
            features = embeds[condition.kind]
            if keep is not None:
                features = drop(features, self._null(condition), keep[condition.kind])
            arguments[condition.embeds_name] = features
            batch_size = len(features)
        return self.pipe.unet_conditions(**arguments, batch_size=batch_size)

    def _null(self, condition: Condition) -> Tensor:
        """The null of a condition, (1, ...); that of a frozen encoder is computed once."""
        if not condition.cacheable:
            return condition.null(self.pipe, 1)
        if condition.kind not in self._nulls:
            with torch.no_grad():
                self._nulls[condition.kind] = condition.null(self.pipe, 1)
        return self._nulls[condition.kind]

    def _error(self, latents: Tensor, noise: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """Mean squared error of the UNet's prediction per item, (B,)."""
        (denoiser,) = self._denoiser
        prediction = denoiser(self.noising.add_noise(latents, noise, timesteps), timesteps, **conditions).sample
        target = self._target(latents, noise, timesteps, conditions)
        return (prediction.float() - target).square().flatten(1).mean(dim=1)

    def _target(self, latents: Tensor, noise: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """What the UNet is to predict, float32 (B, C, h, w)."""
        return diffusion_target(self.noising, self.noising.config.prediction_type, latents, noise, timesteps)

    @torch.no_grad()
    def validate(self, count: int) -> dict[str, float]:
        """Unweighted error at fixed noise levels and fixed noise, with the conditions of the validation rows."""
        if self._validation is None:
            images = self._validation_images
            images = images.select(np.linspace(0, len(images) - 1, min(count, len(images))).astype(int))
            self._validation = self._cached(images, images.config, f"validation_{len(images)}")
        data, device = self._validation, self.pipe.device
        metrics = {}
        for level in VALIDATION_NOISE_LEVELS:
            errors = []
            for rows in torch.arange(len(data)).split(64):
                batch = self.collate([data.moments(row) for row in rows.tolist()])
                batch = {name: value.to(device) for name, value in batch.items()} | {"seed": rows}
                latents = draw_latents(self.pipe, batch)
                noise = seeded_normal(rows, latents.shape[1:], _NOISE).to(device)
                step = int(level * self.noising.config.num_train_timesteps)
                timesteps = torch.full((len(rows),), step, device=device)
                conditions = self._unet_conditions(self._embeds(data, rows.tolist()), batch_size=len(rows))
                errors.append(self._error(latents, noise, timesteps, conditions))
            metrics[f"error_at_{level}"] = torch.cat(errors).mean().item()
        return {"error": float(np.mean(list(metrics.values())))} | metrics

    @torch.no_grad()
    def preview(self) -> Image.Image:
        """Samples for the conditions of rows spread over the training data, at fixed seeds."""
        rows = np.linspace(0, len(self) - 1, PREVIEW_IMAGES).astype(int).tolist()
        embeds = self._embeds(self.data, rows)
        arguments: dict[str, Any] = {c.embeds_name: embeds[c.kind] for c in self.conditions}
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(rows))]
        if not arguments:
            arguments["num_images_per_prompt"] = len(rows)
        arguments |= {"guidance_scale": 1.0} if self.built_in_guidance else {}
        images = self.pipe(
            **arguments, generator=generators, num_inference_steps=PREVIEW_STEPS, output_type="pt"
        ).images
        return image_grid(images * 2 - 1, columns=8)

    def export(self, folder: Path) -> None:
        """Write `pipeline/`, the published form of the model, or `adapter/`; with the record of all that was seen."""
        own = image_record(self.images)
        if self._prior_images is not None and self.options.prior.source is not None:
            own = merge_training_records(own, image_record(self._prior_images))
        lora = self.options.lora
        if lora is not None and lora.decoder is not None and (decoder := find_training_record(lora.decoder)):
            own = merge_training_records(own, decoder)
        if not self.options.adapts:
            self._record_known_words()
            self.pipe.save_pretrained(folder / "pipeline")
            write_training_record(folder / "pipeline", merge_training_records(own, *self._earlier_records))
            return
        manifest = make_manifest(
            Path(self.config.output_dir).resolve().name,
            self.options.method,
            base_name(self.options.base),
            self._base_hash,
            [condition.kind for condition in self.conditions],
            captions=self.images.captions,
            training_data=own["datasets"],
            built_in_guidance=self.built_in_guidance,
            **lora_facts(lora),
            **extension.added(self.pipe, TRAINED),
        )
        save_adapter(self.pipe, folder / "adapter", manifest, self._norms)
        write_training_record(folder / "adapter", own)
