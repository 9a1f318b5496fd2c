"""Training objectives. `create_task(config)` builds the one that `task.type` names."""

from medisyn.config import TrainConfig
from medisyn.tasks.base import TrainingTask

TASK_NAMES = ("autoencoder", "diffusion")


def create_task(config: TrainConfig) -> TrainingTask:
    """The training task that `config.task.type` names.

    Raises:
        ValueError: unknown type.
    """
    if config.task.type == "autoencoder":
        from medisyn.tasks.autoencoder import AutoencoderTask

        return AutoencoderTask(config)
    if config.task.type == "diffusion":
        from medisyn.tasks.diffusion import DiffusionTask

        return DiffusionTask(config)
    raise ValueError(f"unknown task type {config.task.type!r}; valid: {', '.join(TASK_NAMES)}")
