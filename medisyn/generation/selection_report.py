"""What a selection cost: diversity before and after, beside a random selection of the same size.

Notable choices:

* Over-filtering collapses modes: what is left looks right and looks alike. So each measure of the selected images
  stands beside that of *random* selections with as many images of each class, and their ratio is what warnings go by:
  Vendi score, recall and coverage change with the number of images alone, and "before" has more of them.
* Within classes first: a mixture of classes looks diverse even where each has collapsed to one image.
* The Vendi score is taken of features centred on the real mean. Uncentred features have cosines near 1, and a score
  that hardly moves.

    measure_diversity(features, real_features)["vendi_score"]
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..evaluation.fidelity import NEAREST, neighbourhood_scores
from .selection_pool import Pool
from .selection_search import unit_rows
from .selection_subsets import draw

MEASURES = ("mean_pairwise_distance", "vendi_score", "recall", "coverage")
MOST_IMAGES = 2000  # of each set; a distance matrix of this size takes 16 MB
RANDOM_DRAWS = 3  # whose mean stands beside the selection; the first is the baseline
LEAST_SHARE = 0.05  # recall and coverage of random selections below it are too few images for a ratio


def mean_pairwise_distance(features: np.ndarray) -> float | None:
    """Mean cosine distance in [0, 2] over all pairs of different rows of features (N, D); None of fewer than two."""
    unit = unit_rows(features).astype(np.float64)
    number = len(unit)
    if number < 2:
        return None
    # The sum over all pairs, with each row and itself, is |sum of rows|^2.
    total = np.square(unit.sum(0)).sum() - np.square(unit).sum()
    return float(1 - total / (number * (number - 1)))


def vendi_score(features: np.ndarray) -> float | None:
    """Effective number of different images in features (N, D): 1 to N; None of no image.

    The exponential of the entropy of the eigenvalues of K / N, with K the matrix of cosines (Friedman & Dieng 2023,
    eq. 1).
    """
    if not len(features):
        return None
    unit = unit_rows(features).astype(np.float64)
    # The product with the fewer rows has the same eigenvalues, but for zeros.
    gram = unit @ unit.T if len(unit) <= unit.shape[1] else unit.T @ unit
    values = np.linalg.eigvalsh(gram / len(unit))
    values = values[values > 1e-12]
    return float(np.exp(-(values * np.log(values)).sum()))


def measure_diversity(features: np.ndarray, real: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Diversity of generated images (N, D) among themselves and against real ones (M, D).

    Args:
        features: Of the generated images.
        real: Of real ones of the same classes.
        seed: Of the draw, where a set has more than `MOST_IMAGES`.

    Returns:
        `images` and the `MEASURES`: the mean pairwise cosine distance, the Vendi score (centred on the real mean),
        and recall and coverage as in `neighbourhood_scores`; None where there are too few images for one.
    """
    rng = np.random.default_rng(seed)
    sample, real_sample = (rows[np.sort(rng.permutation(len(rows))[:MOST_IMAGES])] for rows in (features, real))
    result: dict[str, Any] = {
        "images": len(features),
        "mean_pairwise_distance": mean_pairwise_distance(features),
        "vendi_score": vendi_score(sample - real.mean(0)),
        "recall": None,
        "coverage": None,
    }
    if min(len(sample), len(real_sample)) > NEAREST:
        scores = neighbourhood_scores(real_sample, sample)
        result |= {name: scores[name] for name in ("recall", "coverage")}
    return result


def compare_diversity(pool: Pool, kept: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Diversity of all generated images, of the kept ones, and of random ones, overall and for each class.

    Args:
        pool: All images.
        kept: Indices of the selected ones.
        seed: Of the random selections.

    Returns:
        `overall` and `by_class` (class to the same): `before`, `random` (mean of `RANDOM_DRAWS` selections of the same
        size), `after`, each as `measure_diversity` returns it, and `ratio` (after / random, None where that is
        undefined).
    """
    everything = np.arange(len(pool.labels))
    draws = [random_selection(pool.labels, kept, seed, repetition) for repetition in range(RANDOM_DRAWS)]
    present = np.isin(pool.real_labels, pool.labels)
    result: dict[str, Any] = {"overall": _compare(pool, everything, draws, kept, pool.real_features[present], seed)}
    result["by_class"] = {
        label: _compare(
            pool,
            own,
            [drawn[pool.labels[drawn] == label] for drawn in draws],
            kept[pool.labels[kept] == label],
            pool.real(label),
            seed,
        )
        for label, own in pool.members(everything).items()
    }
    return result


def random_selection(labels: np.ndarray, kept: np.ndarray, seed: int, repetition: int = 0) -> np.ndarray:
    """Sorted indices of a random selection with as many images of each class as `kept` has."""
    drawn = []
    for label in sorted(set(labels.tolist())):
        own = np.flatnonzero(labels == label)
        drawn.append(own[draw(label, len(own), int((labels[kept] == label).sum()), seed, repetition)])
    return np.sort(np.concatenate(drawn))


def find_warnings(diversity: dict[str, Any], warn_below: float) -> list[str]:
    """One sentence for each class with one image left or none, and for each ratio below `warn_below`."""
    warnings = []
    for label, compared in diversity["by_class"].items():
        left, before = compared["after"]["images"], compared["before"]["images"]
        if not left:
            warnings.append(f"no image of {label!r} is left of {before}")
        elif left == 1 < before:
            warnings.append(f"only one image of {label!r} is left of {before}: over-filtering cannot be measured")
    places = {"all classes together": diversity["overall"]}
    places |= {repr(label): compared for label, compared in diversity["by_class"].items()}
    for place, compared in places.items():
        low = [name for name, ratio in compared["ratio"].items() if ratio is not None and ratio < warn_below]
        for name in low:
            after, random = compared["after"][name], compared["random"][name]
            warnings.append(
                f"over-filtering: {name.replace('_', ' ')} of {place} is {after:.3g}, {compared['ratio'][name]:.2f} "
                f"times the {random:.3g} of a random selection of the same size"
            )
    return warnings


def _compare(
    pool: Pool, before: np.ndarray, draws: Sequence[np.ndarray], after: np.ndarray, real: np.ndarray, seed: int
) -> dict[str, Any]:
    sets = {"before": before, "after": after}
    found = {name: measure_diversity(pool.features[rows], real, seed) for name, rows in sets.items()}
    drawn = [measure_diversity(pool.features[rows], real, seed) for rows in draws]
    random: dict[str, Any] = {"images": drawn[0]["images"]}
    for name in MEASURES:
        values = [each[name] for each in drawn]
        random[name] = None if None in values else float(np.mean(values))
    ratio = {}
    for name in MEASURES:
        least = LEAST_SHARE if name in ("recall", "coverage") else 1e-12
        usable = random[name] is not None and random[name] >= least and found["after"][name] is not None
        ratio[name] = found["after"][name] / random[name] if usable else None
    return {"before": found["before"], "random": random, "after": found["after"], "ratio": ratio}
