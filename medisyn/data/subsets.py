"""A small labelled part of a data set: the same share of every class, whole groups (patients), always the same rows.

- A group's place in its class's queue is a hash of seed, class and group: the rows that are kept do not depend on the
  order of the data, and 5 % are part of 10 % with the same seed.
- Rows without a class are never chosen. What is not chosen may still serve as images without labels.

    rows = stratified_subset(images.column("finding"), images.column("group_id"), fraction=0.05, seed=0)
    few = images.select(rows)
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

__all__ = ["class_names", "stratified_subset"]


def stratified_subset(
    classes: Sequence[Any], groups: Sequence[Hashable] | None, fraction: float, seed: int = 0
) -> np.ndarray:
    """Rows that keep `fraction` of the images of every class in whole groups; sorted int64.

    Of each class groups are taken until the number of images is as close to its share as whole groups allow, and at
    least one group.

    Args:
        classes: of each row; None or "" is a row without a label.
        groups: of each row, such as its patient; None or "" is a row that is a group of its own, as all are if None.
        fraction: share of the labels, in (0, 1]; 1 keeps every row that has a class.
        seed: chooses the groups.

    Raises:
        ValueError: a fraction outside (0, 1], no row with a class, or `groups` of another length.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"label_fraction must be above 0 and at most 1, not {fraction}")
    if groups is not None and len(groups) != len(classes):
        raise ValueError(f"{len(groups)} groups for {len(classes)} rows")
    members: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for row, name in enumerate(classes):
        if name in (None, ""):
            continue
        group = None if groups is None else groups[row]
        members[str(name)][f"row {row}" if group in (None, "") else f"group {group}"].append(row)
    if not members:
        raise ValueError("no row has a class")
    chosen: list[int] = []
    for name, rows_of in members.items():
        wanted, kept = fraction * sum(map(len, rows_of.values())), 0
        for group in sorted(rows_of, key=lambda each: _place(seed, name, each)):
            after = kept + len(rows_of[group])
            if kept and abs(after - wanted) > abs(kept - wanted):
                break
            chosen += rows_of[group]
            kept = after
    return np.array(sorted(chosen), dtype=np.int64)


def class_names(classes: Sequence[Any], wanted: Sequence[str] = (), minimum: int = 2) -> tuple[str, ...]:
    """The classes to learn, in order: `wanted`, or all that are there in alphabetical order.

    Args:
        classes: of each row; None or "" is a row without a label.
        wanted: names to keep; empty: every class.
        minimum: images that every class must have.

    Raises:
        ValueError: fewer than two classes, a class of `wanted` that no row has, or one with too few images.
    """
    counts = Counter(str(name) for name in classes if name not in (None, ""))
    listed = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items())) or "none"
    names = tuple(wanted) or tuple(sorted(counts))
    for name in names:
        if name not in counts:
            raise ValueError(f"class {name!r} has no image in the labelled data; classes there: {listed}")
        if counts[name] < minimum:
            raise ValueError(
                f"class {name!r} has {counts[name]} image in the labelled data, at least {minimum} are needed; "
                f"classes there: {listed}"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"classes are named twice: {', '.join(names)}")
    if len(names) < 2:
        raise ValueError(f"at least two classes are needed; classes in the labelled data: {listed}")
    return names


def _place(seed: int, name: str, group: str) -> bytes:
    return hashlib.sha256(f"{seed}:{name}:{group}".encode()).digest()
