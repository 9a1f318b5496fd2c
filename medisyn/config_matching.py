"""The section `task` of feature matching; beside `medisyn.config_parts` for its length."""

from dataclasses import dataclass
from typing import Literal

from medisyn.config_parts import STRICT, DiffusionTaskConfig, Fraction, NonNegative, Positive, check_interval


@dataclass(frozen=True)
class FeatureMatchingTaskConfig(DiffusionTaskConfig):
    """Train the last steps of sampling until drawn images have the mean features of real ones, class by class."""

    __pydantic_config__ = STRICT
    type: Literal["feature_matching"] = "feature_matching"  # type: ignore[assignment]
    extractors: tuple[str, ...] = ()  # timm:MODEL@FILE[?size=..] or st-lpips:FILE; not those that judge afterwards
    class_columns: tuple[str, ...] = ("modality", "finding")  # images of equal values are a class
    real_images: Positive = 100  # of each class, at most, whose features count; a class with under 8 is left out
    horizon: Positive = 24  # drawn images of a class whose features count
    draws: Positive = 12  # images drawn a step, of each process: at most, for the first rows of its batch
    drawn_with: tuple[str, ...] = ("text", "labels")  # the other kinds of condition are at their nulls
    num_inference_steps: Positive = 10  # of drawing: few, for the time; what is learnt holds for more
    guidance_scale: NonNegative = 4.0
    guidance_interval: tuple[Fraction, Fraction] = (0.0, 0.95)
    gradient_steps: Positive = 2  # the last ones, through which the gradient goes
    feature_weight: NonNegative = 0.5  # of each network
    content_weight: NonNegative = 20.0  # on what 4x4 pixels are on average: what is drawn stays
    visible_lattice_weight: NonNegative = 5.0  # on what repeats in neighbouring places of the latents, and is seen
    denoising_weight: NonNegative = 1.0  # on the usual loss
    extrapolation: NonNegative = 1.1  # the change of the weights at the end, as a multiple of what was learnt

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.extractors:
            raise ValueError("task.extractors names no network whose features are to be matched")
        if self.base is None:
            raise ValueError("feature matching starts from a trained model: set task.base")
        if self.adapts:
            raise ValueError(f"feature matching trains all weights: task.method={self.method} does not go with it")
        if self.prior is not None:
            raise ValueError("task.prior: images of a prior have no class to be matched")
        if any(getattr(condition, "train_encoder", False) for condition in self.conditions):
            raise ValueError("task.conditions: feature matching trains the UNet alone; set train_encoder: false")
        if self.gradient_steps > self.num_inference_steps:
            raise ValueError(
                f"task.gradient_steps={self.gradient_steps} is more than"
                f" task.num_inference_steps={self.num_inference_steps}"
            )
        check_interval(self.guidance_interval)
