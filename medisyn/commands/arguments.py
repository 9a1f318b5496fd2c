"""What several commands share: their options, the checks of their arguments, and the model that they name.

- No torch is imported before a command needs a model.

    parse_guidance("text=3,labels=2"), parse_adapters(["adapters/knee=0.7"])
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..console import EXPECTED, one_line, quiet_progress_bars

if TYPE_CHECKING:
    from ..pipelines.medisyn_pipeline import MediSynPipeline

KINDS = ("text", "image", "labels")
DEFAULT = "default"  # names the embedded model where a name is needed
LARGEST_GUIDANCE = 100.0

ModelOption = Annotated[str | None, typer.Option(help="Folder or Hub name; without it, the embedded default.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; without it, the best there is.")]
StepsOption = Annotated[int | None, typer.Option(min=1, max=1000, help="Sampling steps (20).")]
GuidanceOption = Annotated[
    str | None, typer.Option(help='Weight of the conditions: a number, or one per kind, "text=3,labels=2".')
]
GuidanceIntervalOption = Annotated[
    tuple[float, float] | None,
    typer.Option(metavar="LOW HIGH", help="Where guidance is on, from no noise (0) to the most (1)."),
]
ClassifierGuidanceIntervalOption = Annotated[
    tuple[float, float] | None, typer.Option(metavar="LOW HIGH", help="Where that is on, in 0..1.")
]
ClassifierGuidanceClipOption = Annotated[
    float | None, typer.Option(help="Root mean square that it may move a latent by (1); a large number: any.")
]
AdapterOption = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME[=WEIGHT]", help="Adapter to load on top: folder, file or Hub name; may be repeated."),
]
SeedOption = Annotated[int, typer.Option(min=0, help="Image i is made with the seed SEED + i.")]


def parse_guidance(text: str) -> float | dict[str, float]:
    """`"3"` as 3.0, `"text=3,labels=2"` as a dictionary. Raises ValueError naming what is wrong."""

    def number(part: str) -> float:
        try:
            value = float(part)
        except ValueError:
            value = math.nan
        if not 0 <= value <= LARGEST_GUIDANCE:
            raise ValueError(
                f'--guidance must be a number in 0..{LARGEST_GUIDANCE:.0f} or "text=3,labels=2", not {text!r}'
            )
        return value

    if "=" not in text:
        return number(text)
    weights: dict[str, float] = {}
    for item in text.split(","):
        kind, _, value = (part.strip() for part in item.partition("="))
        if kind not in KINDS or kind in weights:
            raise ValueError(f"--guidance {text!r}: {kind!r} is not one of {', '.join(KINDS)}, once each")
        weights[kind] = number(value)
    return weights


def check_interval(option: str, interval: tuple[float, float] | None) -> None:
    """Refuse what is not a part of 0..1."""
    if interval is not None and not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(f"{option} must be LOW HIGH with 0 <= LOW <= HIGH <= 1, not {interval}")


def check_clip(option: str, clip: float | None) -> None:
    """Refuse what is not a finite number above 0."""
    if clip is not None and not 0 < clip < math.inf:
        raise ValueError(f"{option} must be a number above 0, not {clip}")


def parse_adapters(given: Sequence[str] | None) -> dict[str, float]:
    """`["adapters/knee=0.7"]` as name -> weight; 1 without a weight. Raises ValueError naming what is wrong."""
    weights: dict[str, float] = {}
    for text in given or ():
        name, equals, number = text.rpartition("=")
        try:
            weight = float(number) if equals else 1.0
        except ValueError:
            name, weight = text, 1.0  # a name with an equals sign in it
        name = name if equals and name else text
        if not name.strip() or not math.isfinite(weight):
            raise ValueError(f"--adapter must be a name, or NAME=WEIGHT with a finite number, not {text!r}")
        if name in weights:
            raise ValueError(f"--adapter {name!r} is given twice")
        weights[name] = weight
    return weights


def check_names(**names: str | None) -> None:
    """Refuse options that were given as an empty text."""
    for name, value in names.items():
        if value is not None and not value.strip():
            raise ValueError(f"--{name.replace('_', '-')} is empty")


def load_model(
    model: str | None, adapters: Mapping[str, float] | None = None, device: str | None = None
) -> "MediSynPipeline":
    """The pipeline on its device, without progress bars of its own.

    Raises:
        ValueError, OSError, ImportError: Whatever is wrong with it.
    """
    from ..doctor import best_device, check_device

    device = best_device() if device is None else check_device(device)
    from ..backbone import load_pipeline

    quiet_progress_bars()
    try:
        pipe = load_pipeline(model, adapters or None)
    except Exception as error:  # noqa: BLE001 - damaged files raise errors of every library in between
        names = [model_name(name) for name in (model, *(adapters or ()))]
        if isinstance(error, EXPECTED) and any(name in str(error) for name in names):
            raise
        raise ValueError(f"{' with '.join(names)} cannot be loaded: {one_line(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def model_name(model: str | None) -> str:
    """A name to write into images: a Hub name, or a folder without the path to it."""
    if model in (None, DEFAULT):
        return "medisyn embedded default"
    if not Path(model).exists():
        return model
    folder = Path(model).resolve()
    return folder.parent.name if folder.name == "pipeline" else folder.name  # of a run
