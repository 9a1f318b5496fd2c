"""A run's checkpoints as pipelines, for looking at what a model knew early in training.

- A checkpoint holds the weights that are trained, a finished run also the pipeline around them (`pipeline/`): its
  configuration and frozen parts with the checkpoint's weights are the model of that step.
- The weights are those of the step itself, not their moving average, which a checkpoint keeps pickled.

    pipe = open_model("runs/my_model/checkpoints/step_00002000")
"""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from medisyn.loading import load_pipeline
from medisyn.pipelines.medisyn_pipeline import MediSynPipeline

WEIGHTS = "model.safetensors"
UNET, ENCODERS = "unet.", "trained_encoders."  # names of a diffusion task's modules


def is_checkpoint(name: str | Path | None) -> bool:
    """Whether a name is the folder of a checkpoint rather than that of a pipeline or a Hub name."""
    return name is not None and (Path(name) / WEIGHTS).is_file() and Path(name).parent.name == "checkpoints"


def open_model(name: str | Path | None) -> MediSynPipeline:
    """The pipeline of a folder or Hub name (None: the embedded default), or of a checkpoint of a finished run.

    Raises:
        FileNotFoundError: No such model, or a checkpoint whose run has no `pipeline/` yet.
        ValueError: A checkpoint of a task that trains no UNet, or of another model than `pipeline/`.
    """
    if not is_checkpoint(name):
        return load_pipeline(name)
    folder = Path(name)
    shell = folder.parent.parent / "pipeline"
    if not (shell / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder} is a checkpoint, and its run has no finished pipeline at {shell}")
    weights = load_file(folder / WEIGHTS)
    unet = _part(weights, UNET)
    if not unet:
        raise ValueError(f"{folder / WEIGHTS} has no weights named {UNET!r}: it is not of a diffusion run")
    pipe = load_pipeline(shell)
    encoders = [part for part in (pipe.text_encoder, pipe.image_encoder) if part is not None]
    parts = [(pipe.unet, unet)]
    for index in sorted({key.removeprefix(ENCODERS).split(".")[0] for key in weights if key.startswith(ENCODERS)}):
        own = _part(weights, f"{ENCODERS}{index}.")
        fitting = [encoder for encoder in encoders if set(own) <= set(encoder.state_dict())]
        if not fitting:
            raise ValueError(f"{folder / WEIGHTS} has an encoder that the pipeline {shell} has not")
        parts.append((fitting[0], own))
    for module, own in parts:
        try:
            module.load_state_dict(own, strict=module is pipe.unet)  # weights with two names are saved once
        except RuntimeError as error:
            raise ValueError(f"{folder} does not fit {shell}: {' '.join(str(error).split())[:200]}") from error
    return pipe


def _part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
