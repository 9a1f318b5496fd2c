"""What the rules of a selection share: the images they look at, what they decide, and how an amount is written.

- A rule sees the images that the rules before it left, and says which of them it drops and why.
- Counts and shares are per class, so that no rule changes which classes there are. An integer is a count (500), a
  number with a point is a share (0.5, 1.0).
- What several rules need (probabilities, centroids, features of length 1) is computed once, for every image.

    pool.confidence[0]                           # (N,) probability of the requested class
    count_of(0.5, 7), count_of(500, 7)           # 4, 7
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from ..evaluation.agreement import fit_classifier
from .selection_search import unit_rows

Amount = int | float  # of a class: a count, or a share in (0, 1]
FOLDS = 5  # of the out-of-fold confidence of real images


@dataclass
class Pool:
    """What the rules look at: the generated images, the labelled real ones, and what the generator was trained on.

    Attributes:
        features: (N, D) of the generated images.
        labels: The class each was asked for, N.
        real_features: (M, D) of the labelled real images.
        real_labels: Their classes, M.
        training_features: (T, D) of everything that must not be copied: real images and training images.
        training_names: What each of these is called in the audit, such as "real 3".
        real_groups: Patient of each real image, or None.
        training_groups: Patient of each training image, or None.
        held_out_features: (H, D) of real images that are in neither, or None.
        probabilities: (N, C) of a classifier of the caller's, or None.
        classes: Its C classes.
        seed: Of random choices.
        search: See `selection_search`.
    """

    features: np.ndarray
    labels: np.ndarray
    real_features: np.ndarray
    real_labels: np.ndarray
    training_features: np.ndarray
    training_names: Sequence[str]
    real_groups: Sequence[Hashable] | None = None
    training_groups: Sequence[Hashable] | None = None
    held_out_features: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    classes: Sequence[str] | None = None
    seed: int = 0
    search: str = "auto"

    def members(self, alive: np.ndarray) -> dict[str, np.ndarray]:
        """Per class, in alphabetical order, the indices of its images among `alive` (indices)."""
        own = self.labels[alive]
        return {label: alive[own == label] for label in sorted(set(self.labels.tolist()))}

    def real(self, label: str) -> np.ndarray:
        """Features of the real images of a class."""
        return self.real_features[self.real_labels == label]

    @cached_property
    def unit(self) -> np.ndarray:
        """The generated images' features as rows of length 1."""
        return unit_rows(self.features)

    @cached_property
    def confidence(self) -> tuple[np.ndarray, np.ndarray]:
        """Per generated image, the probability of the class it was asked for, and the most probable class."""
        if self.probabilities is None:
            names = sorted(set(self.real_labels.tolist()))
            if len(names) < 2:
                raise ValueError(
                    f"the rule confidence needs two classes of real images or more; there is only {names[0]!r}"
                )
            classifier = fit_classifier(self.real_features, self.real_labels.tolist())
            table, names = classifier.predict_proba(self.features), classifier.classes_.tolist()
        else:
            table, names = np.asarray(self.probabilities), list(self.classes or ())
        column = {name: position for position, name in enumerate(names)}
        requested = table[np.arange(len(table)), [column[label] for label in self.labels]]
        return requested, np.asarray(names, dtype=object)[table.argmax(1)]

    @cached_property
    def centroid_distances(self) -> tuple[np.ndarray, np.ndarray]:
        """Per generated image, the mean squared distance to the centroid of its class, and the nearest centroid."""
        names = sorted(set(self.real_labels.tolist()))
        centroids = np.stack([unit_rows(self.real(name)).mean(0) for name in names])
        squared = np.stack([np.square(self.unit - centroid).mean(1) for centroid in centroids], axis=1)  # (N, C)
        column = {name: position for position, name in enumerate(names)}
        own = squared[np.arange(len(squared)), [column[label] for label in self.labels]]
        return own, np.asarray(names, dtype=object)[squared.argmin(1)]


@dataclass
class Outcome:
    """What a rule decided.

    Attributes:
        dropped: Index of each image that it drops, with the reason in words.
        scores: Name -> one value per image, for all images (an array) or some (a mapping by index).
        thresholds: Per class, the number that decided.
        facts: What the report says of the rule.
        preference: Per image, higher is better; what later rules prefer of two images. None leaves it.
        warnings: Sentences.
    """

    dropped: dict[int, str]
    scores: Mapping[str, np.ndarray | Mapping[int, Any]] = field(default_factory=dict)
    thresholds: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    preference: np.ndarray | None = None
    warnings: list[str] = field(default_factory=list)


class Rule:
    """A rule of selection; `apply` must not change the pool."""

    name: ClassVar[str]

    def spec(self) -> str:
        """The rule as it is written, "centroid:0.5"."""
        raise NotImplementedError

    def apply(self, pool: Pool, alive: np.ndarray, preference: np.ndarray) -> Outcome:
        """Decide about the images `alive` (sorted indices); `preference` (N,) says which are better, higher first."""
        raise NotImplementedError


def out_of_fold_confidence(pool: Pool) -> np.ndarray:
    """Probability (M,) of its own class for each real image, by a classifier fitted without its fold.

    Raises:
        ValueError: A class has fewer than two images (or patients).
    """
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

    groups = list(range(len(pool.real_labels)) if pool.real_groups is None else pool.real_groups)
    names = sorted(set(pool.real_labels.tolist()))
    of_class = {
        name: len({g for g, own in zip(groups, pool.real_labels, strict=True) if own == name}) for name in names
    }
    smallest = min(names, key=lambda name: of_class[name])
    if of_class[smallest] < 2 or len(names) < 2:
        what = f"{smallest!r} has one" if len(names) > 1 else f"there is only the class {smallest!r}"
        raise ValueError(f"confidence:real needs two classes of two or more real images (patients) each, but {what}")
    codes = {group: code for code, group in enumerate(dict.fromkeys(groups))}
    folds = StratifiedGroupKFold(min(FOLDS, of_class[smallest]), shuffle=True, random_state=pool.seed)
    template = fit_classifier(pool.real_features, pool.real_labels.tolist())
    table = cross_val_predict(
        template,
        pool.real_features,
        pool.real_labels.tolist(),
        groups=[codes[group] for group in groups],
        cv=folds,
        method="predict_proba",
    )
    column = {name: position for position, name in enumerate(names)}
    return table[np.arange(len(table)), [column[label] for label in pool.real_labels]]


# --- amounts ---------------------------------------------------------------------------------------------------------


def count_of(amount: Amount, number: int) -> int:
    """How many of `number` images a count or a share is; a share is rounded up, so that it never empties a class."""
    return min(number, amount if isinstance(amount, int) else math.ceil(round(amount * number, 9)))


def check_amount(name: str, amount: Any) -> None:
    """Raise ValueError unless `amount` is a count from 1 or a share in (0, 1]."""
    right = is_number(amount) and (amount >= 1 if isinstance(amount, int) else 0 < amount <= 1)
    if not right:
        raise ValueError(f"the rule {name} takes a count of each class (500) or a share in 0..1 (0.5), not {amount!r}")


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
