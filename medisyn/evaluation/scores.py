"""Scores of predicted against requested classes, with confidence intervals that resample patients.

- Accuracy and balanced accuracy (mean recall over classes) for any classes, quadratic-weighted kappa for grades: a
  neighbouring grade is a small error, the other end of the scale a large one.
- Intervals are 95 % percentile intervals over draws of groups with replacement.

    score_predictions(["CT", "CT"], ["CT", "MRI"])["accuracy"]                # 0.5
    score_grades(["0", "1", "1"], ["0", "1", "2"], ("0", "1", "2"))["quadratic_weighted_kappa"]   # 0.667
"""

from collections.abc import Hashable, Iterator, Sequence

import numpy as np

RESAMPLES = 1000


def score_predictions(
    predicted: Sequence[str],
    labels: Sequence[str],
    groups: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict:
    """Accuracy, balanced accuracy, recall per class and confusion matrix.

    Args:
        predicted: Class that the classifier gave each image.
        labels: Class that each image has or was asked to have.
        groups: Images of one group (patient) are drawn together in the bootstrap; None draws single images.
        resamples: Bootstrap draws for the intervals.
        seed: Of the bootstrap.

    Returns:
        `images`, `accuracy`, `balanced_accuracy`, their `*_interval` [low, high], `per_class` (class to images and
        recall) and `confusion_matrix` (classes; counts, one row per label, one column per prediction).
    """
    classes = sorted({*labels, *predicted})
    label_index = np.array([classes.index(label) for label in labels])
    right = np.asarray(predicted) == np.asarray(labels)
    accuracies, balanced = [], []
    for weight in _draws(len(labels), groups, resamples, seed):
        accuracies.append(float(np.average(right, weights=weight)))
        total = np.bincount(label_index, weight)
        drawn = total > 0  # a draw may miss a rare class
        balanced.append(float(np.mean(np.bincount(label_index, weight * right)[drawn] / total[drawn])))
    scores: dict = {
        "images": len(labels),
        "accuracy": float(right.mean()),
        "balanced_accuracy": balanced_accuracy(labels, predicted),
        "accuracy_interval": _interval(accuracies),
        "balanced_accuracy_interval": _interval(balanced),
    }
    counts = np.zeros((len(classes), len(classes)), dtype=int)
    np.add.at(counts, (label_index, np.array([classes.index(label) for label in predicted], dtype=int)), 1)
    scores["per_class"] = {
        label: {"images": int(row.sum()), "recall": float(row[index] / row.sum())}
        for index, (label, row) in enumerate(zip(classes, counts, strict=True))
        if row.sum()
    }
    scores["confusion_matrix"] = {"classes": classes, "counts": counts.tolist()}
    return scores


def balanced_accuracy(labels: Sequence[str], predicted: Sequence[str]) -> float:
    """Mean recall over the classes that occur among `labels`."""
    from sklearn.metrics import recall_score

    return float(recall_score(labels, predicted, labels=sorted(set(labels)), average="macro", zero_division=0))


def score_grades(
    predicted: Sequence[str],
    labels: Sequence[str],
    grades: Sequence[str],
    groups: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict:
    """Cohen's kappa with quadratic weights: 1 for the same grades, 0 for chance (Cohen 1968).

    Args:
        predicted: Grade that the classifier gave each image.
        labels: Grade that each image has or was asked to have.
        grades: All grades, lowest first; one step counts the same anywhere on the scale.
        groups: See `score_predictions`.
        resamples: See `score_predictions`.
        seed: See `score_predictions`.

    Returns:
        `images`, `grades`, `quadratic_weighted_kappa` and `quadratic_weighted_kappa_interval` [low, high]; or
        `{"omitted": reason}` where all images have the same grade: then kappa says nothing.
    """
    if len(set(labels)) < 2:
        return {"omitted": f"fewer than two grades among {len(labels)} images"}
    position = {grade: index for index, grade in enumerate(grades)}
    wanted, found = (np.array([position[grade] for grade in each]) for each in (labels, predicted))
    draws = []
    for weight in _draws(len(labels), groups, resamples, seed):
        if np.ptp(wanted[weight > 0]):  # a small draw may hold one grade only
            draws.append(_quadratic_kappa(wanted, found, weight))
    return {
        "images": len(labels),
        "grades": list(grades),
        "quadratic_weighted_kappa": _quadratic_kappa(wanted, found, np.ones(len(labels))),
        "quadratic_weighted_kappa_interval": _interval(draws),
    }


def score_values(
    values: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict:
    """`images`, the `median` of one value per image, and its `median_interval` [low, high].

    Args:
        values: At least one.
        groups: See `score_predictions`.
        resamples: See `score_predictions`.
        seed: See `score_predictions`.
    """
    draws = [float(np.median(np.repeat(values, w.astype(int)))) for w in _draws(len(values), groups, resamples, seed)]
    return {"images": len(values), "median": float(np.median(values)), "median_interval": _interval(draws)}


def _quadratic_kappa(labels: np.ndarray, predicted: np.ndarray, weight: np.ndarray) -> float:
    """1 - mean squared difference of pairs / that of independent draws (scikit-learn's takes 1000 draws seconds)."""
    observed = np.average((labels - predicted) ** 2, weights=weight)
    means = [np.average(ranks, weights=weight) for ranks in (labels, predicted)]
    spread = [
        np.average((ranks - mean) ** 2, weights=weight) for ranks, mean in zip((labels, predicted), means, strict=True)
    ]
    return float(1 - observed / (sum(spread) + (means[0] - means[1]) ** 2))


def _interval(draws: Sequence[float]) -> list[float]:
    return [float(bound) for bound in np.percentile(draws, (2.5, 97.5))]


def _draws(number: int, groups: Sequence[Hashable] | None, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of `number` images is in each of `resamples` draws of groups with replacement."""
    names = range(number) if groups is None else groups
    position = {name: index for index, name in enumerate(dict.fromkeys(names))}
    group_index = np.array([position[name] for name in names])
    rng = np.random.default_rng(seed)
    for _ in range(resamples):
        drawn = rng.integers(len(position), size=len(position))
        yield np.bincount(drawn, minlength=len(position))[group_index].astype(float)
