"""Images of which a few have a class: which rows those are, how often they are drawn, and whose classes they are.

- The labels that count are a share of each class in whole groups (`medisyn.data.subsets`); the class column of every
  other row is not read.
- The classes are those of a latent classifier, in its order, and each needs labelled images.
- Which labels were used is written into the training record (`label_record`), so that whoever compares with real
  images, such as `medisyn augment`, can use the same ones.

    rows = labelled_rows(images, classifier.classes, "finding", fraction=0.05, seed=0)  # (N,), -1 where not known
    weights = labelled_weights(rows, np.ones(len(rows)), share=0.25)
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from medisyn.config import DataConfig, TrainConfig
from medisyn.data.loading import ImageDataset
from medisyn.data.subsets import class_names, stratified_subset
from medisyn.guidance import load_classifier
from medisyn.pipelines.medisyn_latent_classifier import MediSynLatentClassifier
from medisyn.pipelines.medisyn_pipeline import MediSynPipeline

UNLABELLED = -1  # class of a row whose label is not known
LEAST_HELD_OUT = 3  # images of each class


def labelled_rows(
    images: ImageDataset, classes: tuple[str, ...], class_column: str, fraction: float, seed: int
) -> np.ndarray:
    """The number of each row's class, (N,) int64; `UNLABELLED` outside the labelled share.

    Args:
        images: their group column keeps patients together.
        classes: all that there may be, in order.
        class_column: where the class stands.
        fraction: labelled share of each class, in (0, 1].
        seed: chooses the groups.

    Raises:
        ValueError: a labelled image of another class, or a class with fewer than two labelled images.
    """
    names, column = images.column(class_column), images.config.group_column
    rows = stratified_subset(names, images.column(column) if column else None, fraction, seed)
    few = [str(names[row]) for row in rows]
    other = sorted(set(few) - set(classes))
    if other:
        raise ValueError(
            f"class {other[0]!r} in {class_column} is not a class of the classifier; its classes: {', '.join(classes)}"
        )
    class_names(few, classes)
    found = np.full(len(names), UNLABELLED, dtype=np.int64)
    found[rows] = [classes.index(name) for name in few]
    return found


def held_out_rows(classes: Sequence[Any], groups: Sequence[Hashable] | None, fraction: float, seed: int) -> np.ndarray:
    """Rows to hold out, whole groups with about `fraction` of the images of every class; sorted int64.

    A group is on one side with all of its images, of whatever class. None at all are held out where that would be
    fewer than `LEAST_HELD_OUT` images of a class, or more than half of one.

    Args:
        classes: of each row.
        groups: of each row, such as its patient; None or "" is a row that is a group of its own, as all are if None.
        fraction: share of each class.
        seed: chooses the groups.
    """
    names = [str(name) for name in classes]
    members: dict[str, list[int]] = defaultdict(list)
    for row in range(len(names)):
        group = None if groups is None else groups[row]
        members[f"row {row}" if group in (None, "") else f"group {group}"].append(row)
    order = sorted(members, key=lambda each: hashlib.sha256(f"held out:{seed}:{each}".encode()).digest())
    counts, held = Counter(names), Counter[str]()
    chosen: dict[str, list[int]] = {}
    for name in sorted(counts, key=lambda each: (counts[each], each)):  # the rarest has the least choice
        wanted = fraction * counts[name]
        for group in order:
            after = held[name] + sum(names[row] == name for row in members[group])
            if group not in chosen and held[name] < after and abs(after - wanted) <= abs(held[name] - wanted):
                chosen[group] = members[group]
                held.update(names[row] for row in members[group])
    enough = all(LEAST_HELD_OUT <= held[name] <= counts[name] / 2 for name in counts)
    return np.array(sorted(row for rows in chosen.values() for row in rows) if enough else [], dtype=np.int64)


def rows_apart_from(images: ImageDataset, held: ImageDataset) -> np.ndarray:
    """Rows of the images that are neither in `held`, a part of the same data, nor of a group of it; sorted int64."""
    out, column = np.isin(images.rows, held.rows), images.config.group_column
    if column is not None:
        groups = set(held.column(column)) - {None, ""}
        out |= np.array([group in groups for group in images.column(column)], dtype=bool)
    return np.flatnonzero(~out)


def label_record(
    images: ImageDataset, classes: Sequence[str], class_column: str, fraction: float, seed: int
) -> dict[str, Any]:
    """The "labels" of a training record: column, share, seed, classes, and the hashes of the labelled images."""
    return {
        "class_column": class_column,
        "group_column": images.config.group_column,
        "label_fraction": fraction,
        "label_seed": seed,
        "classes": list(classes),
        "hashes": sorted({found for found in images.hashes() if found}),
    }


def labelled_weights(row_classes: np.ndarray, weights: np.ndarray, share: float) -> np.ndarray:
    """Sampling weights (N,) that sum to 1: `share` for the labelled rows, each class as often; all if all have one.

    Args:
        row_classes: see `labelled_rows`.
        weights: of the rows without a label among themselves, (N,).
        share: in [0, 1].
    """
    labelled = row_classes != UNLABELLED
    own, rest = np.zeros(len(weights)), np.where(labelled, 0.0, weights)
    own[labelled] = 1 / np.bincount(row_classes[labelled])[row_classes[labelled]]
    if not rest.any():
        return own / own.sum()
    return share * own / own.sum() + (1 - share) * rest / rest.sum()


def with_classes(config: TrainConfig, class_column: str) -> TrainConfig:
    """The class column mapped as a label: an image whose class names a body side is then never mirrored."""

    def mapped(data: DataConfig | None) -> DataConfig | None:
        columns = {field_name(class_column): class_column}
        return None if data is None else replace(data, label_schema=None, label_columns=columns)

    return replace(config, data=mapped(config.data), validation=mapped(config.validation))


def field_name(class_column: str) -> str:
    """The label field of a class column: that of "extra.finding" is "finding"."""
    return class_column.rpartition(".")[2]


def find_classifier(name_or_dir: str, base: MediSynPipeline) -> MediSynLatentClassifier:
    """The classifier of a run, folder or Hub name; of "" the one that `base` carries.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is for other latents than those of `base`.
    """
    found = load_classifier(name_or_dir) if name_or_dir else base.classifier
    if found is None:
        raise FileNotFoundError("task.classifier names no classifier, and task.base carries none")
    found.check_latents(base)
    return found
