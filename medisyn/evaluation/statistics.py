"""Scores of a classifier with confidence intervals, and paired tests between two classifiers on the same patients.

Notable choices:

* Accuracy, macro-F1 and the area under the ROC curve (one class against the rest, and their mean), over the classes
  that the test images have. A score is the mean over the folds; the spread over the folds stands beside it.
* Intervals are 95 % percentile intervals. They resample patients, and where all folds share one test set also the
  folds, so that they hold for new patients and for another draw of the labelled images (the pigeonhole bootstrap, Owen
  2007, whose variance errs on the large side).
* A gain is a difference in the same draws. Its p is that of the paired bootstrap (Efron & Tibshirani 1993, chapter
  16): twice the smaller share of draws on one side of zero. Beside it stand McNemar's exact test of the predictions
  (it takes images for independent) and the corrected resampled t test over folds (Nadeau & Bengio 2003).
* Draws are weights, not copies of rows, so that a thousand draws of an AUC are one sort.

    drawn = draw_scores([FoldPredictions(labels, probabilities, patients)], classes=("benign", "malignant"))
    summarise(drawn)["auc_macro"]   # {"value": .., "interval": [.., ..], "fold_deviation": ..}
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
TESTED = ("accuracy", "macro_f1", "auc_macro")


@dataclass(frozen=True)
class FoldPredictions:
    """What the classifier of one fold says about its test images.

    Attributes:
        labels: Index of each image's class, (N,).
        probabilities: Of each class, (N, K).
        groups: Patient of each image; images of one are drawn together.
    """

    labels: np.ndarray
    probabilities: np.ndarray
    groups: Sequence[Hashable]


@dataclass(frozen=True)
class DrawnScores:
    """The scores of one classifier in every fold and every draw.

    Attributes:
        folds: What they are the scores of.
        values: Score -> (folds, 1 + draws); the first column takes each image once.
        seed: Of the draws; only scores of the same seed and images compare.
    """

    folds: Sequence[FoldPredictions]
    values: Mapping[str, np.ndarray]
    seed: int


def draw_scores(
    folds: Sequence[FoldPredictions], classes: Sequence[str], resamples: int = RESAMPLES, seed: int = 0
) -> DrawnScores:
    """Every score in every draw of patients.

    Args:
        folds: One per fold: all about the same images (one test set), or each about its own (cross-validation).
        classes: Names of the classes, in the order of the probabilities.
        resamples: Bootstrap draws.
        seed: Of the draws.
    """
    position = {name: index for index, name in enumerate(dict.fromkeys(g for fold in folds for g in fold.groups))}
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(position), np.full(len(position), 1 / len(position)), size=resamples)
    drawn = np.vstack([np.ones((1, len(position))), drawn])
    present = sorted({int(label) for fold in folds for label in fold.labels})
    parts = [_scores(fold, drawn[:, [position[g] for g in fold.groups]], present, classes) for fold in folds]
    return DrawnScores(folds, {name: np.stack([part[name] for part in parts]) for name in parts[0]}, seed)


def summarise(drawn: DrawnScores) -> dict[str, dict]:
    """Scores of one classifier, trained once per fold.

    Returns:
        Per score ("accuracy", "macro_f1", "auc_macro", and "auc CLASS" for every class of the test images) its
        `value`, `interval` [low, high] and `fold_deviation` (standard deviation over folds; None for a single fold).
    """
    return {
        name: {
            "value": float(_row_mean(each[:, 0])),
            "interval": _interval(_mean_over_folds(drawn.folds, each, drawn.seed)),
            "fold_deviation": float(np.nanstd(each[:, 0], ddof=1)) if len(drawn.folds) > 1 else None,
        }
        for name, each in drawn.values.items()
    }


def compare(candidate: DrawnScores, baseline: DrawnScores) -> dict[str, dict]:
    """What `candidate` gains over `baseline`, which predicts the same images fold by fold.

    Returns:
        Per score as in `summarise` its `gain`, `interval` and `p` (paired bootstrap), and for those of `TESTED`
        `corrected_t` (see `corrected_resampled_t`); under "accuracy" also `mcnemar` (see `mcnemar_test`).

    Raises:
        ValueError: The two do not predict the same images.
    """
    pairs = list(zip(candidate.folds, baseline.folds, strict=False))
    if len(candidate.folds) != len(baseline.folds) or not all(np.array_equal(a.labels, b.labels) for a, b in pairs):
        raise ValueError("the classifiers to compare do not predict the same test images")
    result: dict[str, dict] = {}
    for name, values in candidate.values.items():
        difference = values - baseline.values[name]
        draws = _mean_over_folds(candidate.folds, difference, candidate.seed)
        gain = float(_row_mean(difference[:, 0]))
        result[name] = {"gain": gain, "interval": _interval(draws), "p": _bootstrap_p(draws)}
        if name in TESTED:
            result[name]["corrected_t"] = corrected_resampled_t(difference[:, 0])
    right = [_joint_prediction(drawn.folds) for drawn in (candidate, baseline)]
    result["accuracy"]["mcnemar"] = mcnemar_test(*right)
    return result


def mcnemar_test(first_right: np.ndarray, second_right: np.ndarray) -> dict:
    """McNemar's exact test: are two classifiers right on equally many of the images on which they differ?

    Args:
        first_right: Whether the first classifier is right, one boolean per image.
        second_right: The same of the second one.

    Returns:
        `first_only` and `second_only` (images that only one gets right) and `p`, two-sided binomial.
    """
    from scipy.stats import binomtest

    first_only, second_only = int((first_right & ~second_right).sum()), int((~first_right & second_right).sum())
    differing = first_only + second_only
    p = float(binomtest(first_only, differing).pvalue) if differing else 1.0
    return {"first_only": first_only, "second_only": second_only, "p": p}


def corrected_resampled_t(differences: np.ndarray) -> dict | None:
    """The t test over folds, corrected for training sets that overlap (Nadeau & Bengio 2003, section 4).

    `t = mean / sqrt((1/k + n2/n1) variance)` with k - 1 degrees of freedom; for k folds, n2/n1 = 1/(k - 1). With one
    test set for all folds the training sets overlap as much, and the same correction is used.

    Args:
        differences: Of a score, one per fold.

    Returns:
        `t` and two-sided `p`; None for fewer than two folds, or where all differences are the same.
    """
    from scipy.stats import t as student

    number = len(differences)
    if number < 2 or not np.isfinite(differences).all() or np.ptp(differences) < 1e-12:
        return None
    scale = np.sqrt((1 / number + 1 / (number - 1)) * np.var(differences, ddof=1))
    statistic = float(np.mean(differences) / scale)
    return {"t": statistic, "p": float(2 * student.sf(abs(statistic), number - 1))}


def _share_images(folds: Sequence[FoldPredictions]) -> bool:
    """Whether all folds predict one test set."""
    return all(list(fold.groups) == list(folds[0].groups) for fold in folds)


def _joint_prediction(folds: Sequence[FoldPredictions]) -> np.ndarray:
    """Whether each image is predicted rightly: by its own fold, or by the mean probability of folds that share it."""
    if _share_images(folds):
        mean = np.mean([fold.probabilities for fold in folds], axis=0)
        return mean.argmax(1) == folds[0].labels
    return np.concatenate([fold.probabilities.argmax(1) == fold.labels for fold in folds])


def _mean_over_folds(folds: Sequence[FoldPredictions], values: np.ndarray, seed: int) -> np.ndarray:
    """Mean of each draw over folds; folds that share a test set are drawn with replacement as well."""
    number = len(folds)
    weights = np.ones((number, values.shape[1] - 1))
    if number > 1 and _share_images(folds):
        rng = np.random.default_rng([seed, 1])
        weights = rng.multinomial(number, np.full(number, 1 / number), size=values.shape[1] - 1).T.astype(float)
    known = np.isfinite(values[:, 1:])
    total = (weights * known).sum(0)
    with np.errstate(invalid="ignore"):
        return (weights * np.where(known, values[:, 1:], 0)).sum(0) / total


def _scores(
    fold: FoldPredictions, weights: np.ndarray, present: Sequence[int], classes: Sequence[str]
) -> dict[str, np.ndarray]:
    """Scores under each row of `weights` (draws, N); NaN where a draw has no image of a class, or no other."""
    predicted, labels = fold.probabilities.argmax(1), fold.labels
    f1, areas = [], {}
    with np.errstate(invalid="ignore", divide="ignore"):
        accuracy = weights @ (predicted == labels) / weights.sum(1)
        for index in present:
            actual = weights @ (labels == index)
            found = 2 * (weights @ ((labels == index) & (predicted == index)))
            score = found / (actual + weights @ (predicted == index))
            f1.append(np.where(actual > 0, score, np.nan))
            areas[f"auc {classes[index]}"] = _area(fold.probabilities[:, index], labels == index, weights)
        return {
            "accuracy": accuracy,
            "macro_f1": _row_mean(f1),
            "auc_macro": _row_mean(list(areas.values())),
            **areas,
        }


def _row_mean(values: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Mean over what is known; NaN where nothing is."""
    stacked = np.asarray(values)
    known = np.isfinite(stacked)
    return np.where(known, stacked, 0).sum(0) / np.where(known.any(0), known.sum(0), np.nan)


def _area(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted area under the ROC curve: the share of (positive, negative) pairs in order, ties counting half."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) > 0])  # equal scores are one step of the curve
    up = np.add.reduceat(weights[:, order] * positive[order], starts, axis=1)
    down = np.add.reduceat(weights[:, order] * ~positive[order], starts, axis=1)
    below = np.cumsum(down, axis=1) - down / 2
    return (up * below).sum(1) / (up.sum(1) * down.sum(1))


def _interval(draws: np.ndarray) -> list[float] | None:
    known = draws[np.isfinite(draws)]
    return [float(bound) for bound in np.percentile(known, (2.5, 97.5))] if len(known) else None


def _bootstrap_p(draws: np.ndarray) -> float | None:
    """Two-sided, never zero: one more draw would not tell."""
    known = draws[np.isfinite(draws)]
    if not len(known):
        return None
    sides = ((known <= 0).sum(), (known >= 0).sum())
    return float(min(1.0, 2 * (min(sides) + 1) / (len(known) + 1)))
