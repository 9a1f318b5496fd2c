"""Samplers by name: any of these can take the place of the scheduler that a model was saved with.

- The training schedule (betas, prediction type, zero-terminal SNR) is carried over; only the way of stepping changes.
- Importing this module imports no diffusers, so that a command can check a name at once.
- "dpm-lu" is "dpm" with steps at equal distances of log-SNR (Lu et al. 2022, section 4.1). Of twenty equal steps of a
  cosine schedule the first jumps over the noise levels where the layout is decided, and unguided images come out
  alike; these have the variance of a hundred.

    pipe.scheduler = make_scheduler("euler", pipe.scheduler.config)
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "deis": "DEISMultistepScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "dpm-lu": "DPMSolverMultistepScheduler",
    "dpm-single": "DPMSolverSinglestepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
LU = "dpm-lu"


def check_scheduler(name: str) -> str:
    """The class name of a sampler given by short name or class name. Raises ValueError listing the names."""
    if name in SCHEDULERS.values():
        return name
    if name.lower() not in SCHEDULERS:
        raise ValueError(f"unknown scheduler {name!r}; valid: {', '.join(SCHEDULERS)}")
    return SCHEDULERS[name.lower()]


def make_scheduler(name: str, config: Mapping[str, Any]) -> "SchedulerMixin":
    """A scheduler of another kind with the training schedule of `config`.

    Raises:
        ValueError: An unknown name, or a sampler that this model's schedule does not go with.
    """
    import diffusers

    class_name = check_scheduler(name)
    training = {key: value for key, value in config.items() if key != "use_lu_lambdas"}
    spacing = {"use_lu_lambdas": True} if name.lower() == LU else {}
    try:
        return getattr(diffusers, class_name).from_config(training, **spacing)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"scheduler {name!r} does not go with this model: {error}") from None


def scheduler_name(scheduler: "SchedulerMixin") -> str:
    """What gives a scheduler's way of stepping again through `make_scheduler`: its class name, or "dpm-lu"."""
    class_name = type(scheduler).__name__
    return LU if class_name == SCHEDULERS[LU] and scheduler.config.use_lu_lambdas else class_name
