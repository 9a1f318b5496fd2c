"""Training objectives. `create_task(config)` builds the one that `task.type` names."""

from medisyn.config import TrainConfig
from medisyn.tasks.base import TrainingTask

TASK_NAMES = (
    "autoencoder",
    "diffusion",
    "guidance_distillation",
    "feature_matching",
    "latent_classifier",
    "guided",
    "dino",
)


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
    if config.task.type == "guidance_distillation":
        from medisyn.tasks.guidance_distillation import GuidanceDistillationTask

        return GuidanceDistillationTask(config)
    if config.task.type == "feature_matching":
        from medisyn.tasks.feature_matching import FeatureMatchingTask

        return FeatureMatchingTask(config)
    if config.task.type == "latent_classifier":
        from medisyn.tasks.latent_classifier import LatentClassifierTask

        return LatentClassifierTask(config)
    if config.task.type == "guided":
        from medisyn.tasks.guided import GuidedTask

        return GuidedTask(config)
    if config.task.type == "dino":
        from medisyn.tasks.dino import DinoTask

        return DinoTask(config)
    raise ValueError(f"unknown task type {config.task.type!r}; valid: {', '.join(TASK_NAMES)}")
