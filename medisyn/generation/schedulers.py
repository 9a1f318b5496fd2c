"""Samplers by name: any of these can take the place of the scheduler that a model was saved with.

- The training schedule (betas, prediction type, zero-terminal SNR) is carried over; only the way of stepping changes.
- Importing this module imports no diffusers, so that a command can check a name at once.

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
    "dpm-single": "DPMSolverSinglestepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}


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
    try:
        return getattr(diffusers, class_name).from_config(config)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"scheduler {name!r} does not go with this model: {error}") from None
