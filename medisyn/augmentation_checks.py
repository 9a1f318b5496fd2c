"""What the generator of an augmentation may know: no label beyond the small set, no image that is not compared with.

- A run folder says from which share of the labels its classifier or student learnt (`label_fraction`, `label_seed`),
  and the record of a latent classifier has the hashes of the images whose labels those were. A model of other data
  is not asked.
- The same seed makes a smaller share a part of a larger one: such a generator knows no more than it may.
- Where no run folder says it, that is a warning, not an error: a published model may be as good as any.

    warnings = check_labels(["runs/guided"], labelled, small, 0.05, label_seed=0)
    warnings += find_uncompared(["runs/guided"], [*small.hashes, *train.hashes()])
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from .evaluation.utility_inputs import LabelledImages, find_overlap, generator_hashes, refuse_overlap
from .training_record import find_training_record, read_training_record

LABEL_TASKS = ("latent_classifier", "guided")  # those whose configuration chooses a share of the labels
CONFIG = "config.yaml"
PARTS = ("pipeline", "adapter", "classifier")  # of a run folder


def check_labels(
    generators: Sequence[str],
    labelled: LabelledImages,
    small: LabelledImages,
    label_fraction: float,
    label_seed: int,
) -> list[str]:
    """Refuse generators that learnt from other labels than those of the small set.

    Args:
        generators: Models and adapters by name: folder, run, Hub name, "default".
        labelled: The images of which the share is taken.
        small: The share.
        label_fraction: How large it is.
        label_seed: What chose it.

    Returns:
        One sentence for each generator that learnt from fewer labels, or of which that cannot be known.

    Raises:
        ValueError: A run folder names a label seed or a larger share that makes other labels, or its classifier has
            learnt from images that are not in the small set.
    """
    warnings, every, own = [], set(labelled.hashes), set(small.hashes)
    for name in generators:
        record = find_training_record(name)
        if record is not None and every.isdisjoint(record["hashes"]):
            continue  # a model of other images
        runs = _runs_with_labels(name)
        if not runs and label_fraction < 1:
            warnings.append(
                f"it cannot be checked that {name} learnt from these labels alone: no config.yaml of a run says so"
            )
        for folder, fraction, seed in runs:
            given = f"{folder} learnt from --label-fraction {fraction:g} --label-seed {seed}"
            if fraction > label_fraction or (seed != label_seed and label_fraction < 1):
                raise ValueError(
                    f"{given}, not {label_fraction:g} and {label_seed}: it knows labels that the classifiers beside "
                    "it do not; give the same ones"
                )
            record = read_training_record(folder / "classifier") or {"hashes": []}
            learnt = (record.get("labels") or {}).get("hashes", record["hashes"])  # older records have no "labels"
            others = every.intersection(learnt) - own
            if others:
                raise ValueError(
                    f"{folder} learnt from the labels of {len(others)} images that are not among the {len(small)} "
                    "labelled ones (another group column, filter or set of classes?)"
                )
            if fraction < label_fraction:
                warnings.append(f"{given}: fewer labels than the {label_fraction:g} of the classifiers beside it")
    return warnings


def keep_strangers(
    asked: LabelledImages, owners: Mapping[str, Iterable[str]], parents: LabelledImages, drop_overlap: bool
) -> LabelledImages:
    """The test images, none of a patient of `parents` beyond the labelled ones.

    Args:
        asked: The test images.
        owners: Whose images -> their hashes.
        parents: Real images that something learns from, or is made of.
        drop_overlap: Leave such patients out; copies are then left out, and counted, by `measure_utility`.

    Raises:
        ValueError: Without `drop_overlap`, a test image that is no stranger; with it, none that is one.
    """
    if not drop_overlap:
        refuse_overlap(asked, find_overlap(asked, owners, parents))
        return asked
    known = np.any([*find_overlap(asked, {}, parents).values(), np.zeros(len(asked), dtype=bool)], axis=0)
    if known.all():
        raise ValueError(f"all {len(asked)} test images are of patients that something is learnt from")
    return asked.select(np.flatnonzero(~known))


def find_uncompared(generators: Sequence[str], compared: Iterable[str]) -> list[str]:
    """One sentence if the training records of the generators have images beside those of the hashes `compared`."""
    rest = generator_hashes(generators)[0].difference(compared)
    if not rest:
        return []
    return [f"the generator has seen {len(rest)} images that no candidate is compared with: name them by --train"]


def _runs_with_labels(name: str) -> list[tuple[Path, float, int]]:
    """The run folder of a model, and that of the classifier it was taught by: label fraction and seed of each."""
    folder = Path(name).expanduser()
    if folder.name in PARTS and not (folder / CONFIG).is_file():  # a part of a run, unless that is the run's own name
        folder = folder.parent
    task = _task_of(folder)
    if task.get("type") not in LABEL_TASKS:
        return []
    fraction, seed = task.get("label_fraction"), task.get("label_seed")
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not isinstance(seed, int):
        return []
    teacher = (task.get("classifier") or task.get("base")) if task["type"] == "guided" else None
    return [(folder, float(fraction), seed), *(_runs_with_labels(str(teacher)) if teacher else ())]


def _task_of(folder: Path) -> dict[str, Any]:
    """The task in the resolved configuration of a run; empty where there is none that can be read."""
    file = folder / CONFIG
    if not file.is_file():
        return {}
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return {}
    task = tree.get("task") if isinstance(tree, dict) else None
    return task if isinstance(task, dict) else {}
