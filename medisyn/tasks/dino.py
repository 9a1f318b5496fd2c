"""Self-supervised training of a vision transformer: DINO, self-distillation without labels (Caron et al. 2021).

- Loss, projection head and multi-crop augmentation are those of `lightly`; encoder and image processor are stock
  components of transformers, saved as `encoder/`, which any image condition takes by name.
- The teacher is the moving average of the student, so the loop keeps no other (`train.ema_decay: 0`). Its weights and
  the centre are buffers: a checkpoint holds them, and a resumed run ends with the same bits.
- The crops of an item depend on its seed alone. The loss of an item depends on its batch too, through the centre.
- Progress is the k-NN accuracy of the teacher's global token: validation images against training images, by a column
  that training never reads.

    medisyn train scripts/dino_diffusion/dino.yaml data.source=FOLDER  # any images
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoConfig, AutoModel, BitImageProcessor, Dinov2Config, Dinov2Model, PreTrainedModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from medisyn.config import DinoTaskConfig, TrainConfig
from medisyn.data.loading import ImageDataset
from medisyn.evaluation.agreement import LabelledFeatures
from medisyn.evaluation.nearest_neighbours import knn_accuracy
from medisyn.tasks.base import TrainingTask, image_grid, image_record, load_splits
from medisyn.training_record import find_training_record, merge_training_records, write_training_record

try:
    from lightly.loss import DINOLoss, KoLeoLoss
    from lightly.loss.swav_loss import sinkhorn
    from lightly.models.modules import DINOProjectionHead
    from lightly.transforms import DINOTransform
    from lightly.utils.scheduler import cosine_schedule
except ImportError as error:
    raise ImportError("task dino needs lightly: pip install medisyn[ssl]") from error

# families that take crops of any size as they are: the small local ones, and the resolution of the images at hand
FAMILIES = ("dinov2", "dinov2_with_registers", "dinov3_vit")
SINKHORN_ITERATIONS = 3
IMAGES_PER_PASS = 64  # where features are computed


class DinoTask(TrainingTask):
    """Batch of crops -> cross-entropy of the student's against the teacher's. See `DinoTaskConfig` for the options."""

    teacher_step: Tensor

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        if not isinstance(config.task, DinoTaskConfig):
            raise ValueError(f"task.type={config.task.type!r} given to the dino task")
        self.config, options = config, config.task
        self.options = options
        self.images, self.validation_images = load_splits(config)
        if self.validation_images is not None and options.class_column is not None:
            self.images.column(options.class_column)  # a misspelt name is an error now, not after an hour
            self.validation_images.column(options.class_column)
        if config.data.balance_columns:
            self.row_weights = self.images.sampling_weights()
        self.augment = multi_crop(options, config.data.resolution, config.data.horizontal_flip)
        self.processor = image_processor(config.data.resolution)
        self.student = Student(build_encoder(options, config.data.resolution), options)
        # flat, since the name of a buffer has no dots; parameters that are not trained would not be checkpointed
        self.teacher = nn.Module()
        for name, value in self.student.state_dict().items():
            self.teacher.register_buffer(name.replace(".", "/"), value.clone())
        self.register_buffer(
            "teacher_step", torch.tensor(0)
        )  # the step whose weights, before it, the teacher saw last
        self.criterion = DINOLoss(
            options.prototypes,
            student_temp=options.student_temperature,
            center_momentum=options.center_momentum if options.centering == "mean" else 1.0,  # 1: it stays at zero
        )
        self.spread = KoLeoLoss()
        self._step = 0
        self.student.head.last_layer.weight_v.register_hook(self._freeze_prototypes)

    def __len__(self) -> int:
        return len(self.images)

    def sample(self, row: int, rng: np.random.Generator) -> dict[str, Any]:
        """Two global crops (2, 3, size, size) and the local ones (L, 3, size, size), normalised."""
        with seeded_globally(rng):
            crops = cast(list[Tensor], self.augment(self.images.image(row)))
        sample = {"global_crops": torch.stack(crops[:2])}
        return sample | ({"local_crops": torch.stack(crops[2:])} if crops[2:] else {})

    def forward(self, batch: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """The DINO loss (equation 2, with multi-crop), with KoLeo on request; entropies tell of a collapse.

        `teacher_entropy` is that of the teacher's outputs, at log(prototypes) where they are uniform;
        `prototype_entropy` that of their mean, at 0 where all images get the same prototype. Both in nats.
        """
        options = self.options
        self._step = step
        if step > int(self.teacher_step):
            self._update_teacher(step)
        crops = batch["global_crops"].transpose(0, 1)
        with torch.no_grad():
            taught = functional_call(self.student, self.teacher_weights(), (crops.flatten(0, 1),))[0]
        outputs, tokens = self.student(crops.flatten(0, 1))
        views = list(outputs.chunk(2))
        if "local_crops" in batch:
            local = batch["local_crops"].transpose(0, 1)
            views += self.student(local.flatten(0, 1))[0].chunk(len(local))
        with torch.autocast(crops.device.type, enabled=False):  # differences of probabilities, in full precision
            targets = taught.float()
            temperature = self._teacher_temperature(step)
            if self.options.centering == "sinkhorn":  # logits whose softmax in the loss is the balanced assignment
                targets = temperature * sinkhorn(targets, SINKHORN_ITERATIONS, temperature).clamp(min=1e-12).log()
            assigned = ((targets - self.criterion.center[0]) / temperature).softmax(-1)
            loss = self.criterion(list(targets.chunk(2)), [view.float() for view in views], teacher_temp=temperature)
            metrics = {"dino": loss.detach()}
            if options.koleo_weight:
                koleo = torch.stack([self.spread(part) for part in tokens.float().chunk(2)]).mean()
                loss = loss + options.koleo_weight * koleo
                metrics["koleo"] = koleo.detach()
        metrics["teacher_entropy"] = torch.special.entr(assigned).sum(-1).mean()
        metrics["prototype_entropy"] = torch.special.entr(assigned.mean(0)).sum()
        return {"loss": loss} | metrics

    def teacher_weights(self) -> dict[str, Tensor]:
        """The teacher's tensors by the student's names."""
        return {name.replace("/", "."): value for name, value in self.teacher.named_buffers()}

    @torch.no_grad()
    def _update_teacher(self, step: int) -> None:
        """Take in what the last step learnt; once in a step, however many micro-batches it has."""
        momentum = cosine_schedule(
            min(step, self.config.train.steps), self.config.train.steps, self.options.teacher_momentum, 1.0
        )
        student = self.student.state_dict()
        for name, value in self.teacher_weights().items():
            value.lerp_(student[name], 1.0 - momentum)
        self.teacher_step.fill_(step)

    def _teacher_temperature(self, step: int) -> float:
        first, last = self.options.warmup_teacher_temperature, self.options.teacher_temperature
        steps = self.options.temperature_warmup_steps
        return last if step >= steps else first + (last - first) * step / steps

    def _freeze_prototypes(self, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient) if self._step < self.options.last_layer_frozen_steps else gradient

    def validate(self, count: int) -> dict[str, float]:
        """Accuracy and balanced accuracy of `neighbours` votes on (at most) `count` labelled validation images."""
        bank = self._labelled(self.images, self.options.bank_images)
        scores = knn_accuracy(bank, self._labelled(self.validation_images, count), self.options.neighbours)
        return {"knn_accuracy": scores["accuracy"], "knn_balanced_accuracy": scores["balanced_accuracy"]}

    @torch.no_grad()
    def preview(self) -> Image.Image:
        """Images above the first three principal components of their patch tokens, as colours."""
        source = self.validation_images or self.images
        rows = np.linspace(0, len(source) - 1, min(8, len(source))).astype(int)
        pixels = self._pixels([source.image(row) for row in rows])
        encoder = self._teacher_encoder()
        patches = encoder(pixels).last_hidden_state.float().cpu()
        patches = patches[:, 1 + getattr(encoder.config, "num_register_tokens", 0) :]
        flat = patches.flatten(0, 1) - patches.mean((0, 1))
        colours = flat @ torch.linalg.svd(flat, full_matrices=False).Vh[:3].T
        colours = (colours / colours.abs().amax(0)).unflatten(0, (len(rows), -1)).transpose(1, 2)
        side = pixels.shape[-1] // encoder.config.patch_size
        maps = nn.functional.interpolate(colours.unflatten(2, (side, -1)), size=pixels.shape[-2:])
        mean, deviation = (torch.tensor(each)[:, None, None] for each in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        return image_grid(torch.cat([(pixels.cpu() * deviation + mean) * 2 - 1, maps]), columns=len(rows))

    def export(self, folder: Path) -> None:
        """Write `encoder/`: the teacher's encoder, its image processor, and the record of its training images."""
        self._teacher_encoder().save_pretrained(folder / "encoder")
        self.processor.save_pretrained(folder / "encoder")
        base = find_training_record(self.options.base) if self.options.base is not None else None
        record = merge_training_records(image_record(self.images), *([base] if base else []))
        write_training_record(folder / "encoder", record)

    def _teacher_encoder(self) -> PreTrainedModel:
        encoder = type(self.student.encoder)(self.student.encoder.config).to(self.teacher_step.device).eval()
        prefix = "encoder."
        weights = {name: value for name, value in self.teacher_weights().items() if name.startswith(prefix)}
        encoder.load_state_dict({name.removeprefix(prefix): value for name, value in weights.items()})
        return encoder.requires_grad_(False)

    def _labelled(self, images: ImageDataset, count: int) -> LabelledFeatures:
        """Features of `count` images spread evenly over those with a class (all where there are fewer)."""
        classes = images.column(self.options.class_column)
        rows = [row for row, value in enumerate(classes) if value is not None]
        rows = [rows[place] for place in np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]
        encoder, parts = self._teacher_encoder(), []
        for start in range(0, len(rows), IMAGES_PER_PASS):
            pixels = self._pixels([images.image(row) for row in rows[start : start + IMAGES_PER_PASS]])
            parts.append(encoder(pixels).last_hidden_state[:, 0].float().cpu())
        return LabelledFeatures(torch.cat(parts).numpy(), [str(classes[row]) for row in rows])

    def _pixels(self, images: list[Image.Image]) -> Tensor:
        return self.processor(images, return_tensors="pt").pixel_values.to(self.teacher_step.device)


class Student(nn.Module):
    """A vision transformer and DINO's projection head: pixels (B, 3, H, W) -> outputs (B, K), global tokens (B, D)."""

    def __init__(self, encoder: PreTrainedModel, options: DinoTaskConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = DINOProjectionHead(
            encoder.config.hidden_size, options.head_hidden_size, options.bottleneck_size, options.prototypes
        )

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs before the softmax, and global tokens."""
        tokens = self.encoder(pixels).last_hidden_state[:, 0]
        return self.head(tokens), tokens


def build_encoder(options: DinoTaskConfig, resolution: int) -> PreTrainedModel:
    """A new `Dinov2Model` of the configured shape for images of `resolution` pixels, or the configured `base`.

    Raises:
        ValueError: the base is of another family than `FAMILIES`.
        OSError: there is no such base.
    """
    if options.base is not None:
        family = AutoConfig.from_pretrained(options.base).model_type
        if family not in FAMILIES:
            raise ValueError(f"task.base={options.base} holds a {family!r} model; valid: {', '.join(FAMILIES)}")
        return AutoModel.from_pretrained(options.base).train()
    shape = Dinov2Config(
        image_size=resolution,
        patch_size=options.patch_size,
        hidden_size=options.hidden_size,
        num_hidden_layers=options.num_hidden_layers,
        num_attention_heads=options.num_attention_heads,
        mlp_ratio=options.mlp_ratio,
        use_mask_token=False,
    )
    return Dinov2Model(shape)


def image_processor(resolution: int) -> BitImageProcessor:
    """Resize the shorter side to `resolution` pixels, cut out the centre, normalise as ImageNet."""
    return BitImageProcessor(
        size={"shortest_edge": resolution},
        crop_size={"height": resolution, "width": resolution},
        image_mean=list(IMAGENET_DEFAULT_MEAN),
        image_std=list(IMAGENET_DEFAULT_STD),
    )


def multi_crop(options: DinoTaskConfig, resolution: int, horizontal_flip: bool) -> DINOTransform:
    """The augmentation: image -> two global crops and the local ones, normalised as ImageNet; no solarisation."""
    return DINOTransform(
        global_crop_size=options.global_crop_size or resolution,
        global_crop_scale=options.global_crop_scale,
        local_crop_size=options.local_crop_size,
        local_crop_scale=options.local_crop_scale,
        n_local_views=options.local_crops,
        hf_prob=0.5 if horizontal_flip else 0.0,
        vf_prob=options.vertical_flip,
        rr_prob=1.0 if options.rotation else 0.0,
        rr_degrees=options.rotation or None,
        cj_prob=0.8 if options.color_jitter else 0.0,
        cj_strength=options.color_jitter,
        random_gray_scale=options.grayscale,
        gaussian_blur=(options.blur, options.blur, options.blur),
        sigmas=(0.1, 1.0),
        solarization_prob=0.0,
        normalize={"mean": list(IMAGENET_DEFAULT_MEAN), "std": list(IMAGENET_DEFAULT_STD)},
    )


@contextmanager
def seeded_globally(rng: np.random.Generator) -> Iterator[None]:
    """Seed the global generators of torch (CPU) and NumPy, from which lightly draws, and put them back after."""
    torch_seed, numpy_seed = (int(seed) for seed in rng.integers(2**32, size=2))
    numpy_state = np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(torch_seed)
        np.random.seed(numpy_seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
