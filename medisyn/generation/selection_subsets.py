"""Rules that choose a subset of each class as a whole: covariance matching, farthest points, and a random draw.

Notable choices:

* Each class by itself: the choice in one class does not depend on the others.
* Every choice is a function of the features and the seed: ties go to the lower index. The score in the audit is the
  order in which images were chosen, from 0.
* Covariance matching compares first and second moments exactly, by explicit features: no kernel matrix, no sampling.

    chosen, radius = farthest_points(unit_rows(features), 500)
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..evaluation.fidelity import frechet_distance
from .selection_pool import Amount, Outcome, Pool, Rule, check_amount, count_of

COMPONENTS = 32  # at most, in which `covariance` compares
IMAGES_PER_COMPONENT = 3  # real ones; fewer would match the noise of the second moments
SWAP_PASSES = 5  # after the greedy choice; most classes need two or three


@dataclass(frozen=True)
class Covariance(Rule):
    """The subset of a class whose mean and covariance come closest to those of its real images.

    With z the features in the leading principal components, scaled to variance 1 and centred on the real mean, and
    `f(z) = [z, z z' / sqrt(k)]`, images are chosen one by one so that `|mean f(chosen) - mean f(real)|^2` falls most
    (herding: Welling 2009; Chen, Welling & Smola 2010, eq. 4), then exchanged one by one while that helps. It is the
    squared MMD of the kernel `x.y + (x.y)^2 / k`, zero where means and covariances are equal.

    Args:
        amount: Images of each class.
    """

    name: ClassVar[str] = "covariance"
    amount: Amount = 0.5

    def __post_init__(self) -> None:
        """Refuse what is neither a count nor a share."""
        check_amount(self.name, self.amount)

    def spec(self) -> str:
        """The rule as it is written."""
        return f"covariance:{self.amount}"

    def apply(self, pool: Pool, alive: np.ndarray, preference: np.ndarray) -> Outcome:
        """Drop what the best subset of each class does not need."""

        def choose(label: str, own: np.ndarray, number: int) -> tuple[np.ndarray, dict[str, Any]]:
            real = pool.real(label)
            if len(real) < 2:
                raise ValueError(f"the rule covariance needs two real images of each class; {label!r} has {len(real)}")
            z, z_real = _whitened(pool.features[own], real)
            chosen = match_moments(_moments(z), _moments(z_real).mean(0), number)
            distances = {
                "before": frechet_distance(z_real, z) if len(z) > 1 else None,
                "after": frechet_distance(z_real, z[chosen]) if number > 1 else None,
            }
            return chosen, {"components": z.shape[1], "frechet_distance": distances}

        return _choose_per_class(pool, alive, self, "covariance_order", choose)


@dataclass(frozen=True)
class Diverse(Rule):
    """Farthest-point choice (Gonzalez 1985): each next image is the one least like all that were chosen before.

    It starts with the image nearest to the mean of its class. Distances are those of features of length 1. It likes
    outliers, so it belongs behind the rules that remove them.

    Args:
        amount: Images of each class.
    """

    name: ClassVar[str] = "diverse"
    amount: Amount = 0.5

    def __post_init__(self) -> None:
        """Refuse what is neither a count nor a share."""
        check_amount(self.name, self.amount)

    def spec(self) -> str:
        """The rule as it is written."""
        return f"diverse:{self.amount}"

    def apply(self, pool: Pool, alive: np.ndarray, preference: np.ndarray) -> Outcome:
        """Drop what is closest to the chosen images of its class."""

        def choose(label: str, own: np.ndarray, number: int) -> tuple[np.ndarray, dict[str, Any]]:
            chosen, radius = farthest_points(pool.unit[own], number)
            return chosen, {"covering_distance": radius}

        return _choose_per_class(pool, alive, self, "farthest_point_order", choose)


@dataclass(frozen=True)
class Random(Rule):
    """A random choice of each class: the baseline that every other rule has to beat.

    Args:
        amount: Images of each class.
    """

    name: ClassVar[str] = "random"
    amount: Amount = 0.5

    def __post_init__(self) -> None:
        """Refuse what is neither a count nor a share."""
        check_amount(self.name, self.amount)

    def spec(self) -> str:
        """The rule as it is written."""
        return f"random:{self.amount}"

    def apply(self, pool: Pool, alive: np.ndarray, preference: np.ndarray) -> Outcome:
        """Drop what is not drawn."""

        def choose(label: str, own: np.ndarray, number: int) -> tuple[np.ndarray, dict[str, Any]]:
            return draw(label, len(own), number, pool.seed), {}

        return _choose_per_class(pool, alive, self, "random_order", choose)


# --- choosing --------------------------------------------------------------------------------------------------------


def draw(label: str, number: int, size: int, seed: int, repetition: int = 0) -> np.ndarray:
    """`size` of `number` positions at random; a class's draw does not depend on the other classes."""
    return np.random.default_rng([seed, repetition, zlib.crc32(label.encode())]).permutation(number)[:size]


def farthest_points(unit: np.ndarray, number: int) -> tuple[np.ndarray, float]:
    """Positions of `number` rows (N, D), each farthest from those before, and how far any row is from its nearest."""
    if not number:
        return np.empty(0, np.int64), math.nan
    chosen = [int(np.square(unit - unit.mean(0)).sum(1).argmin())]
    distance = np.square(unit - unit[chosen[0]]).sum(1)
    while len(chosen) < number:
        distance[chosen] = -1  # a row equal to a chosen one has distance 0 and may come, a chosen one may not
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.square(unit - unit[chosen[-1]]).sum(1))
    distance[chosen] = 0
    return np.array(chosen), float(max(distance.max(), 0.0) ** 0.5)


def match_moments(moments: np.ndarray, target: np.ndarray, number: int) -> np.ndarray:
    """Positions of `number` rows of `moments` (N, F) whose mean is near `target` (F,): greedy, then exchanges."""
    squares = np.square(moments).sum(1)
    free = np.ones(len(moments), dtype=bool)
    total = np.zeros(moments.shape[1])
    chosen: list[int] = []

    def best(size: int) -> int:
        # |total + f - size * target|^2 without the terms that no candidate changes
        cost = squares + 2 * (moments @ (total - size * target))
        return int(np.where(free, cost, np.inf).argmin())

    for size in range(1, number + 1):
        chosen.append(best(size))
        free[chosen[-1]] = False
        total += moments[chosen[-1]]
    for _ in range(SWAP_PASSES):
        changed = False
        for position, old in enumerate(chosen):
            total -= moments[old]
            free[old] = True
            new = best(number)
            changed |= new != old
            chosen[position] = new
            free[new] = False
            total += moments[new]
        if not changed:
            break
    return np.array(chosen, dtype=np.int64)


def _whitened(features: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both sets in the leading components of their common spread, scaled to variance 1 and centred on the real mean.

    Of the common spread, since directions in which only the generated images vary are errors that must be seen.
    """
    mean = real.mean(0, dtype=np.float64)
    sets = [np.asarray(rows, dtype=np.float64) for rows in (features, real)]
    spread = [(rows - rows.mean(0)) / max(len(rows), 1) ** 0.5 for rows in sets]
    _, values, directions = np.linalg.svd(np.concatenate(spread), full_matrices=False)
    number = min(COMPONENTS, max(1, len(real) // IMAGES_PER_COMPONENT), max(1, int((values > 1e-6 * values[0]).sum())))
    scale = directions[:number].T / np.maximum(values[:number] / 2**0.5, 1e-12)
    return (sets[0] - mean) @ scale, (sets[1] - mean) @ scale


def _moments(z: np.ndarray) -> np.ndarray:
    """First and second moments (N, k + k^2) of each row of z (N, k); the second ones weigh as much as the first."""
    second = np.einsum("ni,nj->nij", z, z).reshape(len(z), -1)
    return np.concatenate([z, second / z.shape[1] ** 0.5], axis=1)


Choice = Callable[[str, np.ndarray, int], tuple[np.ndarray, dict[str, Any]]]


def _choose_per_class(pool: Pool, alive: np.ndarray, rule: Any, score: str, choose: Choice) -> Outcome:
    """Keep `rule.amount` of each class, as `choose` picks them; the order of picking is the score."""
    dropped: dict[int, str] = {}
    order: dict[int, int] = {}
    facts: dict[str, Any] = {}
    warnings: list[str] = []
    for label, own in pool.members(alive).items():
        if not len(own):
            continue
        number = count_of(rule.amount, len(own))
        if isinstance(rule.amount, int) and number < rule.amount:
            warnings.append(f"{rule.spec()}: only {len(own)} images of {label!r} are left to choose from")
        chosen, facts[label] = choose(label, own, number)
        order |= {int(own[position]): rank for rank, position in enumerate(chosen)}
        dropped |= {
            int(i): f"not among the {number} of {len(own)} that were chosen" for i in own if int(i) not in order
        }
    return Outcome(
        dropped, {score: order}, facts={"by_class": facts} if any(facts.values()) else {}, warnings=warnings
    )
