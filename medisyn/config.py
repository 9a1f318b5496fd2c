"""Training configuration: frozen dataclasses read from YAML with `a.b=c` overrides.

- One dataclass per concern; the comment behind a field says what it does, its unit and its range.
- Unknown keys, wrong types and out-of-range values are errors that name the key and the valid ones.
- `type:` selects a variant (the task, a condition), so a configuration holds the options of the chosen variant and no
  others.
- The resolved configuration is written to the run folder; `medisyn train RUN/config.yaml` repeats the run.

    config = load_config("scripts/embedded_default/autoencoder.yaml", ["train.steps=100"])
"""

import dataclasses
import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from medisyn.config_matching import FeatureMatchingTaskConfig
from medisyn.config_parts import (
    STRICT,
    AutoencoderTaskConfig,
    Count,
    DiffusionTaskConfig,
    DinoTaskConfig,
    Fraction,
    GuidanceDistillationTaskConfig,
    GuidedTaskConfig,
    ImageConditionConfig,
    LabelsConditionConfig,
    LatentClassifierTaskConfig,
    LoraConfig,
    NonNegative,
    Positive,
    PositiveFloat,
    PriorConfig,
    TextConditionConfig,
)
from medisyn.overrides import apply_override

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataConfig:
    """Which images, with which captions and labels, and how they become tensors."""

    __pydantic_config__ = STRICT
    source: str | tuple[str, ...]  # file(s), glob, folder or Hub dataset name; anything `datasets` loads
    split: str = "train"  # split of a Hub dataset or of a folder that has several
    image_column: str = "image"
    caption_column: str | None = "caption"  # None: images without captions
    label_columns: dict[str, str] = field(
        default_factory=dict
    )  # label field -> column; "extra.x": key x of JSON extra
    label_schema: str | None = None  # a schema whose row rules fill the labels; alternative to label_columns
    group_column: str | None = None  # patient; a split never puts one group on both sides
    dataset_column: str | None = None  # name of the source, for the model card
    license_column: str | None = None  # licence of the source, for the model card
    filter: dict[str, tuple[str, ...]] = field(default_factory=dict)  # column -> values that are kept
    max_images: Positive | None = None  # at most so many of them, drawn at random by a fixed seed
    resolution: Positive = 128  # pixels, square
    crop: Literal["center", "random", "pad"] = "center"
    random_crop_size: Positive | None = None  # pixels; with crop: random, train on crops of this size
    # flip half of the images, never rows with a stated laterality; task dino flips crops of any row
    horizontal_flip: bool = False
    # column -> values: only these may be flipped (a mirrored chest has its heart on the wrong side); empty: all
    flip_only: dict[str, tuple[str, ...]] = field(default_factory=dict)
    balance_columns: tuple[str, ...] = ()  # draw rows by (1 / frequency of these columns' values) ** balance_power
    balance_power: Fraction = 0.5
    on_error: Literal["raise", "skip"] = "raise"  # an image that cannot be read: stop, or count and skip
    num_workers: Count = 0  # processes that load batches; of use where images are decoded in training


TaskConfig = Annotated[
    AutoencoderTaskConfig
    | DiffusionTaskConfig
    | GuidanceDistillationTaskConfig
    | FeatureMatchingTaskConfig
    | LatentClassifierTaskConfig
    | GuidedTaskConfig
    | DinoTaskConfig,
    Field(discriminator="type"),
]


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule: linear warm-up, constant, then a fall to zero over the last part."""

    __pydantic_config__ = STRICT
    learning_rate: PositiveFloat = 1e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.99)
    weight_decay: NonNegative = 0.01
    warmup_steps: Count = 100
    decay_fraction: Fraction = 0.4  # last part of the run in which the rate falls to 0
    decay: Literal["linear", "cosine"] = "linear"
    max_grad_norm: PositiveFloat = 1.0


@dataclass(frozen=True)
class LoopConfig:
    """The loop: how long, in which batches, what is written when."""

    __pydantic_config__ = STRICT
    steps: Positive = 1000  # optimizer steps
    batch_size: Positive = 32  # images per optimizer step over all processes
    accumulation: Positive = 1  # micro-batches per step; batch_size counts them all
    seed: int = 0
    mixed_precision: Literal["no", "bf16", "fp16", "auto"] = "no"  # auto: bf16 or no, whichever steps faster
    ema_decay: Fraction = 0.999  # 0: no moving average
    log_every: Positive = 50
    checkpoint_every: Positive = 1000
    keep_checkpoints: Positive = 2
    preview_every: Count = 0  # 0: no previews
    validate_every: Count = 0  # 0: no validation
    validation_images: Positive = 256
    tracker: Literal["none", "tensorboard", "wandb"] = "none"


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    __pydantic_config__ = STRICT
    output_dir: str  # run folder; running the same configuration again resumes it
    data: DataConfig
    task: TaskConfig
    validation: DataConfig | None = None  # images that are not trained on, for metrics and previews
    validation_fraction: Fraction = 0.0  # or hold out this share of data's groups (patients; else images)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        share, rest = divmod(self.train.batch_size, self.train.accumulation)
        if rest:
            raise ValueError(
                f"train.batch_size={self.train.batch_size} does not divide into train.accumulation="
                f"{self.train.accumulation} micro-batches of {share}"
            )
        if self.validation is not None and self.validation.resolution != self.data.resolution:
            raise ValueError(
                f"validation.resolution={self.validation.resolution} is not data.resolution={self.data.resolution}"
            )
        if self.validation_fraction and self.validation is not None:
            raise ValueError("validation_fraction goes with no `validation:` data beside it")
        if self.train.validate_every and self.validation is None and not self.validation_fraction:
            raise ValueError("train.validate_every is set but there is no `validation:` data")
        task = self.task
        if isinstance(task, AutoencoderTaskConfig) and task.base is not None and task.pca_images:
            raise ValueError("task.pca_images would overwrite the encoder of task.base; set it to 0")
        if isinstance(task, AutoencoderTaskConfig) and task.lora is not None and task.train_encoder:
            raise ValueError("task.lora adapts the decoder; set task.train_encoder=false")
        if isinstance(task, AutoencoderTaskConfig) and not task.train_encoder and task.base is None:
            raise ValueError("task.train_encoder=false keeps the encoder of task.base; name one (preset: null)")
        from_preset = isinstance(task, AutoencoderTaskConfig | DiffusionTaskConfig)
        if from_preset and (task.preset is None) == (task.base is None):
            raise ValueError("task: name either `preset` (from scratch; base: null) or `base` (preset: null)")
        if self.data.crop == "random" and not isinstance(task, AutoencoderTaskConfig | DinoTaskConfig):
            raise ValueError("data.crop=random does not go with cached latents; valid here: center, pad")
        if isinstance(task, DinoTaskConfig):
            self._check_dino(task)
        if isinstance(task, DiffusionTaskConfig):
            if task.zero_terminal_snr and task.prediction_type == "epsilon":
                raise ValueError("task.zero_terminal_snr needs prediction_type v_prediction or sample, not epsilon")
            new_model = DiffusionTaskConfig()
            for name in ("vae", "prediction_type", "beta_schedule", "zero_terminal_snr"):
                if task.base is not None and getattr(task, name) != getattr(new_model, name):
                    raise ValueError(
                        f"task.{name} belongs to a new model; one that starts from task.base keeps its own"
                    )
            if task.preset is not None and task.vae is None:
                raise ValueError(
                    "task.vae: a model from scratch needs an autoencoder (folder, run folder or Hub name)"
                )
            if (task.adapts or task.prior is not None) and task.base is None:
                what = f"task.method={task.method}" if task.adapts else "task.prior"
                raise ValueError(f"{what} needs a trained model: set task.base (preset: null)")
            for condition in task.conditions:
                if isinstance(condition, TextConditionConfig):
                    self._check_words(condition, task)
                if isinstance(condition, TextConditionConfig) and condition.train_encoder and task.adapts:
                    raise ValueError("train_encoder would change the frozen base; an adapter has lora.text_encoder")
                if task.adapts and getattr(condition, "encoder", None) is not None:
                    raise ValueError(f"an adapter keeps the encoders of its base: leave out {condition.type}.encoder")
            kinds = [condition.type for condition in task.conditions]
            if len(set(kinds)) != len(kinds):
                raise ValueError(f"task.conditions names a kind twice: {', '.join(kinds)}")

    def _check_words(self, condition: TextConditionConfig, task: DiffusionTaskConfig) -> None:
        if condition.new_words and (task.base is None or not (task.adapts or condition.train_encoder)):
            raise ValueError(
                "new_words are taught to the text encoder of task.base, by an adapter (task.method lora or norm) or "
                "with train_encoder"
            )
        if condition.paraphrase and not condition.train_encoder:
            raise ValueError("paraphrase needs train_encoder: the embeddings of a frozen text encoder are cached")

    def _check_dino(self, task: DinoTaskConfig) -> None:
        if self.data.crop != "center":
            raise ValueError(f"data.crop={self.data.crop} does not go with task dino, which crops; valid here: center")
        if self.data.flip_only:
            raise ValueError("data.flip_only: task dino flips crops of any image; set data.horizontal_flip alone")
        sizes = {"data.resolution": self.data.resolution, "task.global_crop_size": task.global_crop_size}
        for name, size in (sizes | {"task.local_crop_size": task.local_crop_size}).items():
            if task.base is None and size and size % task.patch_size:
                raise ValueError(f"{name}={size} does not divide into patches of task.patch_size={task.patch_size}")
        if self.train.ema_decay:
            raise ValueError("train.ema_decay: the teacher of task dino is the average; set it to 0")
        if self.train.validate_every and task.class_column is None:
            raise ValueError("train.validate_every: the k-NN accuracy needs task.class_column")


_ADAPTER = TypeAdapter(TrainConfig)


def load_config(path: str | Path, overrides: list[str] | None = None) -> TrainConfig:
    """Read a YAML file and apply overrides such as `train.steps=10` (values are YAML).

    An item of a list is named by its place: `task.conditions.0.dropout=0.3`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not YAML, an unknown key, a wrong type or range; one line that names the key.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file {path}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds no mapping; expected the keys {_keys(TrainConfig)}")
    for override in overrides or []:
        apply_override(tree, override)
    _leave_out_lora(tree, overrides or [])
    return parse_config(tree, where=str(path))


def _leave_out_lora(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """The word `task.method=norm` or `full` on the command line turns the file's LoRA off."""
    names = [override.partition("=")[0].strip() for override in overrides]
    task = tree.get("task")
    if "task.method" in names and isinstance(task, dict) and task.get("method") in ("norm", "full"):
        if task.get("lora") is not None and not any(name.startswith("task.lora") for name in names):
            logger.warning("task.method=%s: the options under task.lora are left out", task["method"])
            task["lora"] = None


def parse_config(tree: dict[str, Any], where: str = "configuration") -> TrainConfig:
    """Build a `TrainConfig` from nested dictionaries; `where` opens the error message."""
    try:
        return _ADAPTER.validate_python(tree)
    except ValidationError as error:
        raise ValueError(f"{where}: {_first_problem(error)}") from None


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain nested dictionaries, every default spelled out."""
    return _ADAPTER.dump_python(config, mode="json")


def save_config(config: TrainConfig, path: str | Path) -> None:
    """Write the resolved configuration as YAML."""
    Path(path).write_text(yaml.safe_dump(config_to_dict(config), sort_keys=False), encoding="utf-8")


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        *section, name = [str(part) for part in problem["loc"]]
        valid = _valid_keys(section)
        close = difflib.get_close_matches(name, valid, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        return f"unknown key {where}{hint}; valid here: {', '.join(valid)}"
    if problem["type"] in ("missing", "missing_argument"):
        return f"{where} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    given = f" (given {problem['input']!r})" if where and not isinstance(problem["input"], dict) else ""
    return f"{where}: {message}{given}" if where else message


_SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "validation": DataConfig,
    "optim": OptimConfig,
    "train": LoopConfig,
    "autoencoder": AutoencoderTaskConfig,
    "diffusion": DiffusionTaskConfig,
    "guidance_distillation": GuidanceDistillationTaskConfig,
    "feature_matching": FeatureMatchingTaskConfig,
    "latent_classifier": LatentClassifierTaskConfig,
    "guided": GuidedTaskConfig,
    "dino": DinoTaskConfig,
    "text": TextConditionConfig,
    "image": ImageConditionConfig,
    "labels": LabelsConditionConfig,
    "lora": LoraConfig,
    "prior": PriorConfig,
}


def _valid_keys(section: list[str]) -> list[str]:
    named = [_SECTIONS[part] for part in section if part in _SECTIONS]
    return _keys(named[-1] if named else TrainConfig)


def _keys(section: type) -> list[str]:
    return [entry.name for entry in dataclasses.fields(section)]
