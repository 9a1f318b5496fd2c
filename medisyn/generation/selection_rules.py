"""Rules that judge each image by itself: confidence of a classifier, distance to the class, likeness to another image.

Notable choices:

* Confidence and the distance to the centroid are scored for every image, also those that an earlier rule dropped, so
  that the audit can be read again with other thresholds. Likeness depends on what is left, and stands only there.
* Every decision is a function of the features and the seed: ties go to the lower index.
* A class without any image left is no error here: `select` warns of it.
* The classifier and the centroids see the labelled real images alone. A selection must not be judged by the classifier
  that made it: use another feature space, or a classifier trained on the selected images.

    outcome = Centroid(0.5).apply(pool, np.arange(len(pool.labels)), np.zeros(len(pool.labels)))
    outcome.dropped       # {index: reason}
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .selection_pool import Amount, Outcome, Pool, Rule, check_amount, count_of, is_number, out_of_fold_confidence
from .selection_search import SAME_IMAGE, CosineIndex, calibrate_threshold, drop_near_duplicates

LEAST_REAL_IMAGES = 2  # of a class: one image is no distribution
USELESS_THRESHOLD = SAME_IMAGE - 1e-3  # a cosine that only re-encoded copies reach


def check_real_images(
    rules: Sequence[Rule], labels: Iterable[str], real_labels: Iterable[str], judged: bool = False
) -> list[str]:
    """Warnings of rules that judge a class by a single real image.

    Args:
        rules: Of the selection.
        labels: Classes of the generated images.
        real_labels: Classes of the real images.
        judged: Whether the probabilities are given, so that `confidence` fits no classifier.

    Raises:
        ValueError: `confidence` would fit a classifier on one image of a class that is asked for; or the probabilities
            are given, and no rule takes them.
    """
    if judged and not any(isinstance(rule, Confidence) for rule in rules):
        raise ValueError("a judge needs the rule confidence, which none of the rules is")
    if judged and any(isinstance(rule, Confidence) and rule.real is not None for rule in rules):
        raise ValueError("confidence:real fits classifiers of its own; it cannot be used with given probabilities")
    counts = Counter(map(str, real_labels))
    single = sorted(label for label in set(map(str, labels)) if counts[label] < LEAST_REAL_IMAGES)
    if not single:
        return []
    names = ", ".join(map(repr, single))
    if any(isinstance(rule, Confidence) for rule in rules) and not judged:
        raise ValueError(
            f"the rule confidence needs {LEAST_REAL_IMAGES} real images or more of each class; there is one of {names}"
        )
    if any(isinstance(rule, Centroid) for rule in rules):
        return [f"the rule centroid has a single real image of {names}: it measures likeness to that image"]
    return []


@dataclass(frozen=True)
class Confidence(Rule):
    """A classifier must give the requested class at least a threshold (HistoDiffusion; class-likelihood filters).

    Exactly one of the three is given.

    Args:
        threshold: Lowest probability in [0, 1]; one for all classes, or one for each.
        quantile: Adaptive: the threshold of a class is this quantile of its generated images; the share is dropped.
        real: Adaptive: it is this quantile of its real images, judged by classifiers that have not seen their fold
            (nor their patient, where patients are known). A generated image then passes where a real one would.
    """

    name: ClassVar[str] = "confidence"
    threshold: float | Mapping[str, float] | None = None
    quantile: float | None = None
    real: float | None = None

    def __post_init__(self) -> None:
        """Refuse what is no probability."""
        if sum(value is not None for value in (self.threshold, self.quantile, self.real)) != 1:
            raise ValueError("the rule confidence takes one of: a threshold (0.8), quantile=0.3, real=0.1")
        thresholds = self.threshold.values() if isinstance(self.threshold, Mapping) else (self.threshold,)
        for value in (*thresholds, self.quantile, self.real):
            if value is not None and not (is_number(value) and 0 <= value <= 1):
                raise ValueError(f"the rule confidence takes numbers in 0..1, not {value!r}")

    def spec(self) -> str:
        """The rule as it is written."""
        if isinstance(self.threshold, Mapping):
            return "confidence:" + ";".join(f"{label}={value}" for label, value in sorted(self.threshold.items()))
        chosen = {"": self.threshold, "quantile=": self.quantile, "real=": self.real}
        return "confidence:" + next(f"{key}{value}" for key, value in chosen.items() if value is not None)

    def apply(self, pool: Pool, alive: np.ndarray, preference: np.ndarray) -> Outcome:
        """Drop what is below the threshold of its class."""
        requested, predicted = pool.confidence
        members = pool.members(alive)
        thresholds = self._thresholds(pool, {label: requested[own] for label, own in members.items()})
        dropped = {
            int(index): f"probability {requested[index]:.3f} of its class is below {thresholds[label]:.3f}"
            for label, own in members.items()
            for index in own[requested[own] < thresholds[label]]
        }
        scores = {"confidence": requested, "predicted_class": predicted}
        return Outcome(dropped, scores, thresholds, preference=requested)

    def _thresholds(self, pool: Pool, found: Mapping[str, np.ndarray]) -> dict[str, float]:
        if isinstance(self.threshold, Mapping):
            lacking, unknown = sorted(set(found) - set(self.threshold)), sorted(set(self.threshold) - set(found))
            if lacking or unknown:
                wrong = f"has none for {lacking[0]!r}" if lacking else f"names {unknown[0]!r}"
                classes = ", ".join(sorted(found))
                raise ValueError(f"the thresholds of confidence are one per class, but it {wrong}; classes: {classes}")
            return {label: float(self.threshold[label]) for label in found}
        if self.threshold is not None:
            return dict.fromkeys(found, float(self.threshold))
        if self.quantile is not None:
            # "lower": the share below the threshold is at most the quantile, also of few images.
            return {
                label: float(np.quantile(values, self.quantile, method="lower")) if len(values) else 0.0
                for label, values in found.items()
            }
        real = out_of_fold_confidence(pool)
        return {
            label: float(np.quantile(real[pool.real_labels == label], self.real, method="lower")) for label in found
        }


@dataclass(frozen=True)
class Centroid(Rule):
    """The nearest class centroid must be that of the requested class; of these, the closer ones of each class stay.

    HistoGAN (Xue et al. 2021) keeps the closer half; HistoDiffusion the first 500: features of length 1, the centroid
    is the mean of a class's real images, and the distance the mean squared difference.

    Args:
        amount: Of the images that are nearest to their own centroid; 1.0 keeps all of them.
    """

    name: ClassVar[str] = "centroid"
    amount: Amount = 0.5

    def __post_init__(self) -> None:
        """Refuse what is neither a count nor a share."""
        check_amount(self.name, self.amount)

    def spec(self) -> str:
        """The rule as it is written."""
        return f"centroid:{self.amount}"

    def apply(self, pool: Pool, alive: np.ndarray, preference: np.ndarray) -> Outcome:
        """Drop what is nearer to another class, then the farther images."""
        distance, nearest = pool.centroid_distances
        dropped: dict[int, str] = {}
        thresholds: dict[str, float] = {}
        for label, own in pool.members(alive).items():
            right = own[nearest[own] == label]
            dropped |= {int(i): f"its nearest centroid is that of {nearest[i]!r}" for i in own[nearest[own] != label]}
            order = right[np.argsort(distance[right], kind="stable")]
            kept = order[: count_of(self.amount, len(order))]
            if len(kept):
                thresholds[label] = float(distance[kept[-1]])
            rank = f"is not among the closer {len(kept)} of {len(order)}"
            dropped |= {int(i): f"distance {distance[i]:.3g} to its centroid {rank}" for i in order[len(kept) :]}
        scores = {"centroid_distance": distance, "nearest_centroid": nearest}
        return Outcome(dropped, scores, thresholds, preference=-distance)


@dataclass(frozen=True)
class Duplicates(Rule):
    """No image whose cosine similarity to a training image, or to a better selected image, is above a threshold.

    Of two generated images the one stays that the last rule before it with a score of its own (confidence, centroid)
    prefers: the more confident, or the one closer to its centroid; without such a rule the one with the lower index.

    Args:
        threshold: Highest cosine that stays, or "auto": see `calibrate_threshold`.
        rate: Of "auto": share of real images that may be above it.
    """

    name: ClassVar[str] = "duplicates"
    threshold: float | str = "auto"
    rate: float = 0.01

    def __post_init__(self) -> None:
        """Refuse what is no cosine."""
        number = self.threshold if is_number(self.threshold) else None
        if self.threshold != "auto" and (number is None or not -1 <= float(number) <= 1):
            raise ValueError(f"the rule duplicates takes a cosine in -1..1 or auto, not {self.threshold!r}")
        if not (is_number(self.rate) and 0 <= self.rate < 1):
            raise ValueError(f"the rate of duplicates:auto must be at least 0 and below 1, not {self.rate!r}")

    def spec(self) -> str:
        """The rule as it is written."""
        return f"duplicates:auto={self.rate}" if self.threshold == "auto" else f"duplicates:{self.threshold}"

    def apply(self, pool: Pool, alive: np.ndarray, preference: np.ndarray) -> Outcome:
        """Drop copies of training images, then copies of better images."""
        facts: dict[str, Any] = {"training_images": len(pool.training_features)}
        warnings = []
        if self.threshold == "auto":
            facts["calibration"] = calibrate_threshold(
                pool.training_features,
                pool.training_groups,
                pool.held_out_features,
                self.rate,
                pool.seed,
                pool.search,
            )
            threshold = facts["calibration"]["threshold"]
            if threshold >= USELESS_THRESHOLD:
                warnings.append(
                    f"duplicates:auto came out at {threshold:.4f}: the real images hold near-copies of each other "
                    "(views of one patient without a group column?), so it hardly finds any; give a threshold"
                )
        else:
            threshold = float(self.threshold)
        facts["threshold"] = threshold
        index = CosineIndex(pool.features.shape[1], len(alive) * len(pool.training_features), pool.search)
        index.add(pool.training_features)
        similarity, row = index.best(pool.features[alive])
        dropped, to_training, to_selected = {}, {}, {}
        for position, i in enumerate(alive.tolist()):
            name = pool.training_names[row[position]] if row[position] >= 0 else None
            to_training[i] = float(similarity[position])
            if similarity[position] > threshold:
                dropped[i] = f"cosine {similarity[position]:.4f} to {name} is above {threshold:.4f}"
        facts["copies_of_training_images"] = len(dropped)
        rest = np.array([i for i in alive.tolist() if i not in dropped], dtype=np.int64)
        order = rest[np.argsort(-preference[rest], kind="stable")]
        for i, (other, cosine) in drop_near_duplicates(pool.features, order, threshold, pool.search)[1].items():
            to_selected[i] = cosine
            dropped[i] = f"cosine {cosine:.4f} to the selected image {other} is above {threshold:.4f}"
        facts["copies_among_themselves"] = len(to_selected)
        scores = {"training_similarity": to_training, "selected_similarity": to_selected}
        return Outcome(dropped, scores, dict.fromkeys(pool.members(alive), threshold), facts, warnings=warnings)
