"""What a measurement of utility is given: labelled real images, test images, pools, and what keeps them apart.

- A class is the text of a column. Images of one group (patient) are never on both sides of a split.
- Few labels are either a number (drawn in proportion to the classes from what a fold leaves) or a share (the very
  images of `stratified_subset`, on which a latent classifier or a student of the same share and seed was trained).
- Test images must be strangers to the classifier and to the generator: by content hash to the labelled images, to the
  generator's training record, to synthetic images and to their recorded parents; by name to the patients.

    real = open_labelled("corpus/train-*.parquet", "finding", filter={"dataset": ("wbc_bloodcell",)})
    for rest, held_out in split_folds(real, folds=5, seed=0): ...
"""

import warnings
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from ..data.loading import ImageDataset
from ..data.subsets import class_names, stratified_subset
from ..loading import DEFAULT, is_hub_name
from ..training_record import find_training_record
from .inputs import Images, open_images
from .sampling import draw_rows

GROUP_COLUMN = "group_id"
PARENTS = "parents"  # column of a generated folder: hashes of the real images that an image was made from


@dataclass(frozen=True)
class LabelledImages:
    """Images that have a class each.

    Attributes:
        images: The images.
        labels: Class of each.
        groups: Patient of each; an image without one stands for itself.
        group_column: Column of the patients; None: they are not known.
        found: Images of each class in the column, those of classes that were not asked for too.
    """

    images: ImageDataset
    labels: tuple[str, ...]
    groups: tuple[Hashable, ...]
    group_column: str | None
    found: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def has_groups(self) -> bool:
        """Whether the patients are known."""
        return self.group_column is not None

    @cached_property
    def hashes(self) -> list[str]:
        """Content hash of each image."""
        return [str(found) for found in self.images.hashes()]

    def select(self, rows: Sequence[int] | np.ndarray) -> "LabelledImages":
        """The images at `rows`, in that order."""
        own = [int(row) for row in rows]
        part = replace(
            self,
            images=self.images.select(own),
            labels=tuple(self.labels[row] for row in own),
            groups=tuple(self.groups[row] for row in own),
        )
        if "hashes" in self.__dict__:
            part.__dict__["hashes"] = [self.hashes[row] for row in own]
        return part

    def counts(self) -> dict[str, int]:
        """Images of each class."""
        return dict(sorted(Counter(self.labels).items()))


def open_labelled(
    source: Images,
    label_column: str,
    *,
    group_column: str | None = None,
    filter: Mapping[str, Sequence[str]] | None = None,
    classes: Sequence[str] = (),
) -> LabelledImages:
    """Images of one or several sources that have a class; rows without one, or of other classes, are left out.

    Args:
        source: Strings may end in `@SPLIT`.
        label_column: Column of the class.
        group_column: Column of the patient; None: `group_id` where there is one.
        filter: Column -> values that are kept.
        classes: What is kept; empty keeps every class.

    Raises:
        ValueError: No such column, a filter that keeps nothing, or no row with one of the classes.
        FileNotFoundError: There is no such source.
    """
    images = filter_images(open_images(source, [label_column]), filter)
    labels = ["" if value is None else str(value) for value in images.column(label_column)]
    counts = dict(sorted(Counter(label for label in labels if label).items()))
    wanted = set(classes) or set(counts)
    rows = [row for row, label in enumerate(labels) if label in wanted]
    if not rows:
        asked = f"of the classes {', '.join(classes)}" if classes else "with a class"
        raise ValueError(f"no image {asked} in the column {label_column!r}; classes there: {_listed(counts)}")
    return with_labels(images.select(rows), [labels[row] for row in rows], group_column, counts)


def filter_images(images: ImageDataset, filter: Mapping[str, Sequence[str]] | None) -> ImageDataset:
    """The images with one of the values of each column. Raises ValueError for a value that none has."""
    for column, kept in (filter or {}).items():
        values = [str(value) for value in images.column(column)]
        unknown = sorted(set(map(str, kept)) - set(values))
        if unknown:
            raise ValueError(f"no image has {column}={unknown[0]!r}; values: {', '.join(sorted(set(values))[:30])}")
        images = images.select(np.isin(np.array(values, dtype=object), list(map(str, kept))))
        if not len(images):
            raise ValueError(f"no image passes the filter {dict(filter or {})}")
    return images


def with_labels(
    images: ImageDataset, labels: Sequence[str], group_column: str | None, found: Mapping[str, int] | None = None
) -> LabelledImages:
    """Images with a class each, and their patients; see `LabelledImages`.

    Args:
        images: The images.
        labels: Class of each.
        group_column: None: `group_id` where there is one.
        found: See there.
    """
    column = group_column or (GROUP_COLUMN if GROUP_COLUMN in images.column_names else None)
    groups: list[Hashable] = [None] * len(images) if column is None else images.column(column)
    named = [f"image {row}" if group in (None, "") else ("group", str(group)) for row, group in enumerate(groups)]
    return LabelledImages(images, tuple(labels), tuple(named), column, found or {})


def _listed(counts: Mapping[str, int]) -> str:
    """`bright (8), dark (8)`."""
    return ", ".join(f"{label} ({number})" for label, number in list(counts.items())[:30]) or "none"


def check_classes(real: LabelledImages, classes: Sequence[str] = ()) -> tuple[str, ...]:
    """The classes to tell apart: `classes`, or all.

    Raises:
        ValueError: A class that the column does not have (the message lists all that it has), fewer than two
            classes, or one with a single image.
    """
    for name in classes:
        if real.found and name not in real.found:
            raise ValueError(f"class {name!r} has no image in the labelled data; classes there: {_listed(real.found)}")
    return class_names(real.labels, classes, minimum=2)


def check_test_classes(test: LabelledImages, classes: Sequence[str]) -> None:
    """Raise ValueError for test images of a class that is not told apart, or of fewer than two classes."""
    strange = sorted(set(test.labels) - set(classes))
    if strange:
        raise ValueError(
            f"test images have the class {strange[0]!r}, which no labelled image has; name the classes to tell apart, "
            f"of: {', '.join(classes)}"
        )
    if len(set(test.labels)) < 2:
        raise ValueError(f"the test images have fewer than two of the classes {', '.join(classes)}")


def choose_labels(real: LabelledImages, amount: float, label_seed: int = 0) -> LabelledImages:
    """All labelled images for a number of them (drawn fold by fold), or the fixed small part for a share up to 1."""
    if amount > 1:
        return real
    names = [group[1] if isinstance(group, tuple) else None for group in real.groups]  # as a training run reads them
    return real.select(stratified_subset(real.labels, names, amount, label_seed))


def split_folds(data: LabelledImages, folds: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows to learn from and rows held out, fold by fold: whole patients, classes in proportion (scikit-learn).

    Args:
        data: What is split.
        folds: 1 holds nothing out.
        seed: Of the split.

    Raises:
        ValueError: A class that a fold would learn without, because too few patients have it.
    """
    if folds == 1:
        return [(np.arange(len(data)), np.arange(0))]
    from sklearn.model_selection import StratifiedGroupKFold

    patients = {
        name: len({g for g, label in zip(data.groups, data.labels, strict=True) if label == name})
        for name in data.counts()
    }
    fewest = min(patients, key=lambda name: patients[name])
    if patients[fewest] < 2 or len(set(data.groups)) < folds:
        raise ValueError(
            f"{folds} folds need as many patients, and two of each class; there are {len(set(data.groups))}, and "
            f"{patients[fewest]} of class {fewest!r}"
        )
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class with fewer images than folds is checked below
        groups = [repr(group) for group in data.groups]
        split = list(splitter.split(np.zeros(len(data)), data.labels, groups))
    for number, (rest, held) in enumerate(split):
        missing = sorted(set(data.labels) - {data.labels[row] for row in rest})
        if missing or not len(held):
            what = f"no image of class {missing[0]!r} to learn from" if missing else "no image held out"
            raise ValueError(f"fold {number} of {folds} has {what}: too few patients; take fewer folds")
    return split


def draw_labelled(data: LabelledImages, rest: np.ndarray, amount: float, seed: int) -> np.ndarray:
    """The rows of `data` that one fold learns from: `amount` of `rest`, or all of it where `amount` is a share.

    A smaller number is part of a larger one with the same seed.

    Raises:
        ValueError: More than there are, or so few that a class gets none.
    """
    if amount <= 1:
        return rest
    number = int(amount)
    if number > len(rest):
        raise ValueError(f"{number} real images are asked for, but a fold has {len(rest)} to learn from")
    labels = [data.labels[row] for row in rest]
    chosen = rest[np.array(draw_rows(labels, number, seed))]
    missing = sorted(set(labels) - {data.labels[row] for row in chosen})
    if missing:
        raise ValueError(f"{number} real images are too few: class {missing[0]!r} would get none")
    return np.sort(chosen)


def draw_synthetic(pool: LabelledImages, wanted: Mapping[str, int], seed: int, name: str) -> np.ndarray:
    """Rows of a pool: `wanted` images of each class, drawn by `seed`; a smaller draw is part of a larger one.

    Raises:
        ValueError: The pool has too few of a class.
    """
    rows: list[int] = []
    for index, (label, number) in enumerate(sorted(wanted.items())):
        own = [row for row, other in enumerate(pool.labels) if other == label]
        if len(own) < number:
            raise ValueError(
                f"strategy {name!r} has {len(own)} images of class {label!r}, {number} are needed: make more, or take "
                "a smaller ratio"
            )
        rows += np.random.default_rng([seed, index]).permutation(own)[:number].tolist()
    return np.array(sorted(rows), dtype=np.int64)


# --- the wall --------------------------------------------------------------------------------------------------------


def generator_hashes(generators: Sequence[str]) -> tuple[set[str], list[str]]:
    """Hashes of the training images of models (folder, run, Hub name, "default"), and the models without a record."""
    known: set[str] = set()
    unknown = []
    for name in generators:
        if name != DEFAULT and not Path(name).exists() and not is_hub_name(name):
            raise FileNotFoundError(f"no model {name!r}; name a folder, a run, a Hub name, or {DEFAULT}")
        if (record := find_training_record(name)) is None:
            unknown.append(name)
        else:
            known.update(record["hashes"])
    return known, unknown


def parent_hashes(pool: LabelledImages) -> set[str]:
    """Hashes of the real images that the images of a pool were made from, where that is recorded."""
    if PARENTS not in pool.images.column_names:
        return set()
    found: set[str] = set()
    for value in pool.images.column(PARENTS):
        each = value if isinstance(value, list | tuple) else str(value or "").replace(",", " ").split()
        found.update(str(one.get("hash") if isinstance(one, Mapping) else one) for one in each)
    return found


def find_overlap(
    test: LabelledImages, owners: Mapping[str, Iterable[str]], train: LabelledImages | None
) -> dict[str, np.ndarray]:
    """Which test images are not strangers: per owner of hashes, and by patient, a boolean per image.

    Args:
        test: The test images.
        owners: Whose images -> their hashes.
        train: Labelled images whose patients must be others; None: not checked.
    """
    found = {}
    for owner, known in owners.items():
        own = set(known)
        found[owner] = np.array([content in own for content in test.hashes], dtype=bool)
    if train is not None and train.has_groups and test.has_groups:
        patients = {group for group in train.groups if isinstance(group, tuple)}
        found["patients of the labelled images"] = np.array([group in patients for group in test.groups], dtype=bool)
    return found


def refuse_overlap(test: LabelledImages, overlap: Mapping[str, np.ndarray]) -> None:
    """Raise ValueError if a test image is no stranger."""
    for owner, which in overlap.items():
        if which.any():
            raise ValueError(
                f"{int(which.sum())} of {len(test)} test images are among the {owner}: they measure memory, not "
                "utility; give other test images, or leave these out (--drop-overlap)"
            )
