"""The stages that make the embedded default, in their order, and the one option that fits them to the hardware.

- A stage is a configuration beside this file and what the hardware changes in it. A stage that is done costs a moment,
  a stage that was cut off goes on: to resume is to run the same script again.
- `gpu` sees as many images as `cpu` in fewer, larger steps. Its numbers are computed and not measured.
"""

from enum import Enum
from pathlib import Path

from medisyn.config import TrainConfig, load_config
from medisyn.trainer import Trainer

HERE = Path(__file__).parent
STAGES = {"autoencoder": ("autoencoder", "decoder"), "dino": ("dino",), "default": ("diffusion",)}
SPLITS = {"data": "train", "validation": "validation"}
LARGER_STEPS = 4  # how many steps of a CPU are one of a GPU


class Hardware(str, Enum):
    """Where a recipe runs."""

    CPU = "cpu"  # two cores
    GPU = "gpu"  # one GPU


def configure(stage: str, data: Path, hardware: Hardware) -> TrainConfig:
    """The configuration of a stage.

    Args:
        stage: Name of a YAML file beside this one.
        data: Folder with `corpus/train-*.parquet`, `corpus/validation-*.parquet` and `weights/stlpips_alex.pth`.
        hardware: See `Hardware`.
    """
    file = HERE / f"{stage}.yaml"
    plain = load_config(file)
    overrides = [f"{part}.source={data}/corpus/{split}-*.parquet" for part, split in SPLITS.items()]
    if plain.task.type == "autoencoder":
        overrides.append(f"task.perceptual_weights={data}/weights/stlpips_alex.pth")
    if hardware is Hardware.GPU:
        overrides += [
            f"train.batch_size={plain.train.batch_size * LARGER_STEPS}",
            f"train.steps={plain.train.steps // LARGER_STEPS}",
            f"optim.learning_rate={plain.optim.learning_rate * LARGER_STEPS**0.5}",  # AdamW's square-root rule
            f"train.ema_decay={plain.train.ema_decay**LARGER_STEPS}",
            "train.mixed_precision=bf16",
            "data.num_workers=8",
        ]
    return load_config(file, overrides)


def run(script: str, data: Path, hardware: Hardware) -> list[Path]:
    """Train the stages of a script, or what is left of them. Returns their run folders."""
    return [Trainer(configure(stage, data, hardware)).fit() for stage in STAGES[script]]
