"""Latent classifier training: log p(class | noised latent) at every noise level, on few labelled images.

- The classifier is the encoder half of the base's UNet with a head of its own. It starts from the UNet's weights,
  which know noised latents at every level from images without labels, or at random.
- Latents and the noise schedule are the base's; noise is the augmentation, mirror images are another.
- At the end a temperature is fitted for each noise level, so that the size of the gradient means what it says: on
  labelled images of other patients, which are held out of the training for it (`calibration_fraction`).
- Other images of the same data can be learnt from with labels that a CNN on pixels gives them (`pseudo_labels`).
- Loss, accuracy and calibration error are reported by noise level on the validation images. Nothing is fitted to
  those, so they stay strangers for later measurements; all labelled images are in the training record.
- The run ends with `classifier/`, and with `pipeline/`: the base that carries the classifier.

    medisyn train scripts/unconditional_to_conditional/classifier.yaml
    medisyn generate --model runs/classifier --class-label eosinophil
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from diffusers import DDPMScheduler
from torch import Tensor

from medisyn.config import LatentClassifierTaskConfig, OptimConfig, TrainConfig
from medisyn.config_parts import PseudoLabelsConfig
from medisyn.data.cache import LatentCache, build_latent_cache
from medisyn.data.loading import ImageDataset
from medisyn.data.preprocessing import Preprocessor
from medisyn.data.storage import digest
from medisyn.data.subsets import class_names, stratified_subset
from medisyn.guidance import attach_classifier
from medisyn.loading import load_pipeline
from medisyn.pipelines.medisyn_latent_classifier import MediSynLatentClassifier, latent_fingerprint
from medisyn.tasks.base import (
    POSTERIOR,
    TrainingTask,
    draw_latents,
    image_record,
    load_splits,
    seeded_normal,
    seeded_uniform,
)
from medisyn.tasks.calibration import calibration_scores, fit_temperature, require_torchmetrics
from medisyn.tasks.labelled_rows import LEAST_HELD_OUT, UNLABELLED, held_out_rows, label_record, rows_apart_from
from medisyn.tasks.pseudo_labels import NETWORK, by_hash, keep_pseudo_labels, pseudo_label
from medisyn.training_record import find_training_record, merge_training_records, write_training_record

logger = logging.getLogger(__name__)

NOISE_LEVELS = (0.05, 0.2, 0.4, 0.6, 0.8, 0.95)  # fractions of the training timesteps
CALIBRATION_DRAWS = 4  # of noise for each image
# streams of an item's seed
_NOISE, _UNIFORMS = range(POSTERIOR + 1, 3)


class LatentClassifierTask(TrainingTask):
    """Batch of cached latents with classes -> cross-entropy at random noise levels. See `LatentClassifierTaskConfig`.

    Raises:
        ValueError: fewer than two classes, a class that no labelled image has, or a class with one image.
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        if not isinstance(config.task, LatentClassifierTaskConfig):
            raise ValueError(f"task.type={config.task.type!r} given to the latent classifier task")
        self.config, self.options = config, config.task
        images, validation = load_splits(config)
        self.labelled, self.classes = labelled_subset(config, images)
        self.images, self._other_images = self._hold_out()
        self.targets = self._indices(self.images)
        self._sources = self.labelled  # all images that anything is learnt from
        if validation is not None:
            require_torchmetrics()
            known = np.array(self._indices(validation)) >= 0
            if not known.any():
                raise ValueError(f"no validation image has one of the classes {', '.join(self.classes)}")
            self._other_images["validation"] = validation.select(known)
        self.pipe = load_pipeline(self.options.base).to(PartialState().device)
        self.pipe.set_progress_bar_config(disable=True)
        self._pseudo: dict[str, Any] = {}
        self._guessed: dict[str, str] = {}  # classes by the images' hashes
        if self.options.pseudo_labels is not None:
            self._add_pseudo_labelled(images, self.options.pseudo_labels)
        scratch: dict[str, Any] = {}
        if self.options.initialize == "random":
            widths = self.options.block_out_channels
            scratch = {"block_out_channels": widths, "layers_per_block": self.options.layers_per_block}
            scratch |= {"down_block_types": ("DownBlock2D",) * (len(widths) - 1) + ("AttnDownBlock2D",)}
        # registered, hence trained and saved
        self.classifier = MediSynLatentClassifier.from_unet(
            self.pipe.unet,
            self.pipe.scheduler,
            self.classes,
            copy_weights=self.options.initialize == "base",
            dropout=self.options.dropout,
            latent_fingerprint=latent_fingerprint(self.pipe),
            **scratch,
        )
        self.noising = DDPMScheduler.from_config(self.pipe.scheduler.config, clip_sample=False)
        self.latents = self._cache(self.images, "train")
        self._other_latents: dict[str, LatentCache] = {}
        self._may_flip = self.images.may_flip() & config.data.horizontal_flip
        if self.options.balance_classes:
            counts = Counter(self.targets)
            self.row_weights = np.array([1 / counts[target] for target in self.targets])

    def _hold_out(self) -> tuple[ImageDataset, dict[str, ImageDataset]]:
        """The images to learn from, and those for the temperatures as "calibration" where there are enough."""
        column, options = self.config.data.group_column, self.options
        groups = self.labelled.column(column) if column else None
        held = held_out_rows(
            self.labelled.column(options.class_column), groups, options.calibration_fraction, options.label_seed
        )
        if not len(held):
            if options.calibration_fraction:
                logger.warning(
                    "the temperatures stay 1: task.calibration_fraction=%g of a class are fewer than %d images, or "
                    "its groups are too large",
                    options.calibration_fraction,
                    LEAST_HELD_OUT,
                )
            return self.labelled, {}
        rest = np.setdiff1d(np.arange(len(self.labelled)), held)
        return self.labelled.select(rest), {"calibration": self.labelled.select(held)}

    def _add_pseudo_labelled(self, images: ImageDataset, options: PseudoLabelsConfig) -> None:
        """Learn from the images as well whose class a CNN is sure of; patients of the calibration stay out of both."""
        names = images.column(self.options.class_column)
        foreign = {str(name) for name in names if name not in (None, "")} - set(self.classes)
        if foreign:
            raise ValueError(
                "task.pseudo_labels takes every image for one of the classes, and there are images of "
                f"{', '.join(sorted(foreign))}: leave them out by data.filter"
            )
        held = self._other_images.get("calibration")
        pool = images if held is None else images.select(rows_apart_from(images, held))
        known = np.full(len(pool), UNLABELLED)
        place = {row: i for i, row in enumerate(pool.rows.tolist())}
        known[[place[row] for row in self.images.rows.tolist()]] = self.targets
        if (known != UNLABELLED).all():
            logger.warning("task.pseudo_labels has nothing to label: all images have a label")
            return
        others = self._other_images.get("validation")
        found, judged = pseudo_label(
            pool,
            known,
            self.classes,
            options,
            self.config.train.seed,
            others=others,
            device=self.pipe.device,
            file=Path(self.config.output_dir) / NETWORK,
        )
        classes = np.where(known != UNLABELLED, known, found.argmax(axis=1))
        taken = np.flatnonzero((known != UNLABELLED) | (found.max(axis=1) >= options.threshold))
        self._sources = images
        self.images, self.targets = pool.select(taken), classes[taken].tolist()
        guessed = taken[known[taken] == UNLABELLED]
        out = images.select(~np.isin(images.rows, pool.rows))
        self._guessed = by_hash(pool, {i: self.classes[classes[i]] for i in guessed}, (self.labelled, out))
        added = Counter(classes[guessed].tolist())
        counts = {name: added[i] for i, name in enumerate(self.classes)}
        self._pseudo = {
            "of_images": int((known == UNLABELLED).sum()),
            "images": len(guessed),
            "images_by_class": counts,
        }
        if others is not None:
            self._pseudo["validation_accuracy"] = float((judged.argmax(axis=1) == self._indices(others)).mean())
        logger.info("pseudo-labels: %s", self._pseudo)
        if len(added) < len(self.classes):
            missing = ", ".join(name for name in counts if not counts[name])
            logger.warning("pseudo-labels: no other image is surely %s (task.pseudo_labels.threshold)", missing)

    def _indices(self, images: ImageDataset) -> list[int]:
        """The class of each image as its place in `classes`; -1 for none of them."""
        place = {name: index for index, name in enumerate(self.classes)}
        return [place.get(str(name), -1) for name in images.column(self.options.class_column)]

    def _cache(self, images: ImageDataset, split: str) -> LatentCache:
        # one folder holds the images of one subset, and a cache_dir may serve several subsets
        subset = digest(" ".join(map(str, images.hashes())).encode())[:8]
        folder = Path(self.options.cache_dir or Path(self.config.output_dir) / "cache") / f"{split}_{subset}"
        return build_latent_cache(
            self.pipe,
            images,
            Preprocessor.from_config(images.config),
            folder / "latents",
            batch_size=self.options.cache_batch_size,
            flips=images.config.horizontal_flip,
            bf16=self.config.train.mixed_precision == "bf16",
        )

    def __len__(self) -> int:
        return len(self.images)

    def parameter_groups(self, optim: OptimConfig) -> list[dict[str, Any]]:
        """Those of all tasks, and with `backbone_learning_rate` its own for what comes from the base."""
        groups, rate = super().parameter_groups(optim), self.options.backbone_learning_rate
        if rate is None:
            return groups
        new = {id(p) for part in ("norm_out", "pool", "head") for p in getattr(self.classifier, part).parameters()}
        backbone = [
            {**group, "lr": rate, "params": [p for p in group["params"] if id(p) not in new]} for group in groups
        ]
        return [{**group, "params": [p for p in group["params"] if id(p) in new]} for group in groups] + backbone

    def sample(self, row: int, rng: np.random.Generator) -> dict[str, Any]:
        """The row's latent moments, perhaps of its mirror image, and its class."""
        flip = bool(self._may_flip[row]) and rng.random() < 0.5
        return self.latents.moments(row, flip=flip) | {"target": self.targets[row]}

    def forward(self, batch: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """The cross-entropy at noise levels drawn evenly from the whole schedule, and the accuracy."""
        uniforms = seeded_uniform(batch["seed"], 1, _UNIFORMS)[:, 0]
        timesteps = (uniforms * self.noising.config.num_train_timesteps).long()
        noised, target = self._noised(batch, timesteps), batch["target"].to(self.pipe.device)
        logits = self.classifier(noised, timesteps.to(noised.device)).float()
        loss = F.cross_entropy(logits, target, label_smoothing=self.options.label_smoothing)
        return {"loss": loss, "accuracy": (logits.detach().argmax(dim=1) == target).float().mean()}

    def _noised(self, batch: Mapping[str, Tensor], timesteps: Tensor) -> Tensor:
        """Scaled latents with the noise of these timesteps; noise by the items' seeds alone."""
        latents = draw_latents(self.pipe, batch)
        noise = seeded_normal(batch["seed"], latents.shape[1:], _NOISE).to(latents.device)
        return self.noising.add_noise(latents, noise, timesteps.to(latents.device))

    @torch.no_grad()
    def _logits(self, split: str, level: float, count: int, draws: int = 1) -> tuple[Tensor, Tensor]:
        """Logits (draws x N, K) at a noise level of images spread over "validation" or "calibration", and classes."""
        images = self._other_images[split]
        rows = np.linspace(0, len(images) - 1, min(count, len(images))).astype(int)
        if split not in self._other_latents:
            self._other_latents[split] = self._cache(images, split)
        latents, classes = self._other_latents[split], torch.tensor(self._indices(images))[rows]
        timestep = int(level * self.noising.config.num_train_timesteps)
        logits = []
        for draw in range(draws):
            for part in torch.as_tensor(rows).split(64):
                batch = latents.moments(part.tolist()) | {"seed": part + draw * len(images)}
                timesteps = torch.full((len(part),), timestep)
                noised = self._noised(batch, timesteps)
                logits.append(self.classifier(noised, timesteps.to(noised.device)).float().cpu())
        return torch.cat(logits), classes.repeat(draws)

    def validate(self, count: int) -> dict[str, float]:
        """Loss, accuracy and expected calibration error at temperature 1, mean over noise levels and at each."""
        by_level = {level: calibration_scores(*self._logits("validation", level, count)) for level in NOISE_LEVELS}
        means = {name: float(np.mean([scores[name] for scores in by_level.values()])) for name in by_level[0.05]}
        return means | {f"{name}_at_{level}": v for level, scores in by_level.items() for name, v in scores.items()}

    def export(self, folder: Path) -> None:
        """Write `classifier/` with fitted temperatures, `classifier.json` with its scores, and `pipeline/`.

        The training records of both say which labels were used, see `label_record`.
        """
        self.classifier.eval()
        options = self.options
        report: dict[str, Any] = {"classes": list(self.classes), "images": len(self.labelled)}
        report |= {"pseudo_labels": self._pseudo} if self._pseudo else {}
        counts = Counter(self._indices(self.labelled))
        report["images_by_class"] = {name: counts[i] for i, name in enumerate(self.classes)}
        report |= {f"{split}_images": len(images) for split, images in self._other_images.items()}
        temperatures = [1.0] * len(NOISE_LEVELS)
        if "calibration" in self._other_images:
            count = len(self._other_images["calibration"])
            found = [self._logits("calibration", level, count, CALIBRATION_DRAWS) for level in NOISE_LEVELS]
            temperatures = [fit_temperature(logits, classes, count) for logits, classes in found]
            self.classifier.register_to_config(temperature_levels=list(NOISE_LEVELS), temperatures=temperatures)
        report["by_noise_level"] = [self._measure(*pair) for pair in zip(NOISE_LEVELS, temperatures, strict=True)]
        labels = label_record(
            self.labelled, self.classes, options.class_column, options.label_fraction, options.label_seed
        )
        report |= {name: labels[name] for name in ("class_column", "label_fraction", "label_seed")}
        self.classifier.save_pretrained(folder / "classifier")
        (folder / "classifier.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        if self._guessed:
            keep_pseudo_labels(folder, labels, self._guessed)
        record = image_record(self._sources)
        write_training_record(folder / "classifier", record | {"labels": labels})
        source = self.pipe.config.get("_name_or_path") or options.base
        base = find_training_record(source)
        attach_classifier(self.pipe, MediSynLatentClassifier.from_pretrained(folder / "classifier"))
        self.pipe.save_pretrained(folder / "pipeline")
        merged = merge_training_records(record, *([base] if base else []))
        write_training_record(folder / "pipeline", merged | {"labels": labels})

    def _measure(self, level: float, temperature: float) -> dict[str, float]:
        """The temperature of a noise level, and the scores with it on all validation images where there are some."""
        found = {"noise_level": level, "temperature": temperature}
        if "validation" not in self._other_images:
            return found
        count = len(self._other_images["validation"])
        logits, classes = self._logits("validation", level, count, CALIBRATION_DRAWS)
        found["calibration_error_before"] = calibration_scores(logits, classes)["calibration_error"]
        return found | calibration_scores(logits / temperature, classes)


def labelled_subset(config: TrainConfig, images: ImageDataset) -> tuple[ImageDataset, tuple[str, ...]]:
    """The images whose labels are used, by `label_fraction` and `label_seed`, and their classes in order.

    Raises:
        ValueError: see `class_names` and `stratified_subset`.
    """
    options = config.task
    assert isinstance(options, LatentClassifierTaskConfig)
    column = images.column(options.class_column)
    class_names(column, options.classes)  # names what is missing in all of the data first
    wanted = [name if not options.classes or str(name) in options.classes else None for name in column]
    groups = images.column(config.data.group_column) if config.data.group_column else None
    chosen = images.select(stratified_subset(wanted, groups, options.label_fraction, options.label_seed))
    return chosen, class_names(chosen.column(options.class_column), options.classes)
