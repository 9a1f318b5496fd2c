"""Distances between a set of synthetic images and a set of real ones, in a feature space.

Notable choices:

* No number stands alone. Fréchet distance and its relatives depend on the sample size and on how different two sets of
  real patients are anyway, so `fidelity` splits the real images into halves that share no patient, takes N images of
  each and N synthetic ones, and reports synthetic against the first half beside second half against first half.
* `frechet_distance` takes the trace of the matrix root as a nuclear norm: equal to torchmetrics'
  `FrechetInceptionDistance` (a test compares them), exact where fewer images than features make the covariances
  singular, and many times faster there, which a table of forty classes needs.
* The kernel distance uses torchmetrics' polynomial kernel and unbiased estimator.
* Too few images give a sentence instead of a number.

    fidelity(real_features, synthetic_features, groups=patients)["frechet_distance"]   # {"synthetic": .., "real": ..}
"""

from collections.abc import Hashable, Sequence

import numpy as np
import torch

MINIMUM_IMAGES = 25  # on each side; below it the numbers say more about the draw than about the images
NEAREST = 5  # k of the k-nearest-neighbour manifolds, as in Naeem et al. 2020
MAXIMUM_KERNEL_IMAGES = 4000  # three kernel matrices of this size in float64 take 400 MB


def frechet_distance(real: np.ndarray, synthetic: np.ndarray) -> float:
    """Squared Fréchet distance between Gaussians fitted to two feature sets (Heusel et al. 2017, eq. 6).

    `|m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2))` for features (N, D) and (M, D). With centred features A1, A2 the
    covariances are `A'A / (n - 1)`, and `Tr (C1 C2)^(1/2)` is the sum of the singular values of `A1 A2'`, divided by
    the root of both `n - 1`.
    """
    first, second = _centred_root(real), _centred_root(synthetic)
    means = np.square(real.mean(0, dtype=np.float64) - synthetic.mean(0, dtype=np.float64)).sum()
    cross = torch.linalg.svdvals(first @ second.T).sum()
    return max(0.0, float(means + first.square().sum() + second.square().sum() - 2 * cross))


def _centred_root(features: np.ndarray) -> torch.Tensor:
    """A matrix R (min(N, D), D) in float64 with `R'R` = covariance of `features` (N, D)."""
    centred = torch.from_numpy(np.asarray(features, dtype=np.float64))
    centred = (centred - centred.mean(0)) / (len(features) - 1) ** 0.5
    # A triangular factor has the same R'R in D rows, so the product above never exceeds (D, D).
    return centred if len(centred) <= centred.shape[1] else torch.linalg.qr(centred, mode="r").R


def kernel_distance(real: np.ndarray, synthetic: np.ndarray, blocks: int = 10, seed: int = 0) -> tuple[float, float]:
    """Kernel distance (KID) and its standard error for feature sets (N, D) of equal size.

    Unbiased MMD^2 with the kernel `(x.y / D + 1)^3` (Bińkowski et al. 2018, eq. 4), so values near 0 may be negative.
    The error is the jackknife over `blocks` subsets that each leave out one block of images. (The deviation over
    random subsets, which is often quoted, is that of a much smaller sample, and does not shrink with N.)

    Raises:
        ValueError: Sets of different size, or fewer than two images in a block.
    """
    from torchmetrics.image.kid import maximum_mean_discrepancy, poly_kernel

    if len(real) != len(synthetic):
        raise ValueError(f"the kernel distance compares sets of one size, not {len(real)} with {len(synthetic)}")
    if len(real) < 2 * blocks:
        raise ValueError(f"{len(real)} images are too few for {blocks} blocks of at least 2")
    rng = np.random.default_rng(seed)
    size = min(len(real), MAXIMUM_KERNEL_IMAGES)
    x = torch.from_numpy(real[rng.permutation(len(real))[:size]]).double()
    y = torch.from_numpy(synthetic[rng.permutation(len(synthetic))[:size]]).double()
    xx, xy, yy = poly_kernel(x, x), poly_kernel(x, y), poly_kernel(y, y)
    value = float(maximum_mean_discrepancy(xx, xy, yy))
    block = torch.arange(size) % blocks
    left_out = []
    for index in range(blocks):
        keep = (block != index).nonzero()[:, 0]
        left_out.append(float(maximum_mean_discrepancy(*(kernel[keep][:, keep] for kernel in (xx, xy, yy)))))
    error = ((blocks - 1) / blocks * np.square(np.array(left_out) - np.mean(left_out)).sum()) ** 0.5
    return value, float(error)


def neighbourhood_scores(real: np.ndarray, synthetic: np.ndarray, nearest: int = NEAREST) -> dict[str, float]:
    """Precision, recall, density and coverage of `synthetic` (M, D) with respect to `real` (N, D).

    The manifold of a set is the union of balls around its members that reach their `nearest`-th neighbour.
    Precision and recall: share of one set inside the other's manifold (Kynkäänniemi et al. 2019, eq. 1–3). Density:
    mean number of real balls around a synthetic image, over `nearest`; coverage: share of real balls with a synthetic
    image in them (Naeem et al. 2020, eq. 2–4). All in [0, 1] but density, which may exceed 1.

    Raises:
        ValueError: A set has no `nearest` other images.
    """
    smallest = min(len(real), len(synthetic))
    if smallest <= nearest:
        raise ValueError(f"{smallest} images are too few for {nearest} nearest neighbours")
    x, y = torch.from_numpy(real).float(), torch.from_numpy(synthetic).float()
    between = torch.cdist(x, y)  # (N, M)
    # The smallest distance within a set is that of an image to itself, hence one more.
    real_radius = torch.cdist(x, x).kthvalue(nearest + 1, dim=1).values  # (N,)
    synthetic_radius = torch.cdist(y, y).kthvalue(nearest + 1, dim=1).values  # (M,)
    inside_real = between <= real_radius[:, None]
    return {
        "precision": inside_real.any(0).float().mean().item(),
        "recall": (between <= synthetic_radius[None, :]).any(1).float().mean().item(),
        "density": inside_real.sum(0).float().mean().item() / nearest,
        "coverage": (between.min(1).values <= real_radius).float().mean().item(),
    }


def nearest_training_distance(features: np.ndarray, training: np.ndarray) -> np.ndarray:
    """Cosine distance (N,) in [0, 2] of each feature vector (N, D) to the nearest training image's (M, D)."""
    training = training / np.linalg.norm(training, axis=1, keepdims=True)
    features = features / np.linalg.norm(features, axis=1, keepdims=True)
    chunks = np.array_split(features, max(1, len(features) // 256))
    return np.concatenate([1 - (chunk @ training.T).max(1) for chunk in chunks])


def split_halves(
    groups: Sequence[Hashable], strata: Sequence[Hashable] | None = None, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of two halves of real images: no group (patient) in both, and a similar mixture of `strata` in each.

    Args:
        groups: One per image; images of one group stay together. `range(n)` when each image stands for itself.
        strata: One per image, such as its finding. A group counts for the stratum of its first image.
        seed: Of the order in which equally large groups are dealt out.
    """
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    by_stratum: dict[Hashable, list[list[int]]] = {}
    for indices in members.values():
        by_stratum.setdefault(None if strata is None else strata[indices[0]], []).append(indices)
    rng = np.random.default_rng(seed)
    halves: tuple[list[int], list[int]] = ([], [])
    for stratum in by_stratum.values():
        rng.shuffle(stratum)
        dealt = [0, 0]
        # Largest group first, each to the half that has less of this stratum, then less of everything.
        for indices in sorted(stratum, key=len, reverse=True):
            side = min((0, 1), key=lambda half: (dealt[half], len(halves[half])))
            dealt[side] += len(indices)
            halves[side].extend(indices)
    return np.array(sorted(halves[0]), dtype=int), np.array(sorted(halves[1]), dtype=int)


def fidelity(
    real: np.ndarray,
    synthetic: np.ndarray,
    groups: Sequence[Hashable] | None = None,
    strata: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> dict:
    """All distances between real (N, D) and synthetic (M, D) features, beside their real-against-real values.

    Args:
        real: Features of real images.
        synthetic: Features of synthetic images.
        groups: Patient of each real image; the halves that are compared share none.
        strata: See `split_halves`.
        seed: Of the split and of the draws.

    Returns:
        `images` (the N of every set compared) and, per metric, `{"synthetic": value, "real": value}`, with
        `standard_error` beside each kernel distance and `ratio` for the Fréchet distance; or `{"omitted": reason}`.
    """
    first, second = split_halves(range(len(real)) if groups is None else groups, strata, seed)
    size = min(len(first), len(second), len(synthetic))
    if size < MINIMUM_IMAGES:
        return {
            "omitted": f"too few images ({len(synthetic)} synthetic, {len(first)} + {len(second)} real in the halves "
            f"that share no patient; {MINIMUM_IMAGES} of each are needed)"
        }
    rng = np.random.default_rng(seed)
    reference, other = (real[rng.permutation(half)[:size]] for half in (first, second))
    sample = synthetic[rng.permutation(len(synthetic))[:size]]
    result: dict = {"images": size}
    distances = {"synthetic": frechet_distance(reference, sample), "real": frechet_distance(reference, other)}
    result["frechet_distance"] = {**distances, "ratio": distances["synthetic"] / max(distances["real"], 1e-12)}
    kernel: dict = {}
    for name, compared in (("synthetic", sample), ("real", other)):
        kernel[name], kernel[f"{name}_standard_error"] = kernel_distance(reference, compared, seed=seed)
    result["kernel_distance"] = kernel
    scores = {
        "synthetic": neighbourhood_scores(reference, sample),
        "real": neighbourhood_scores(reference, other),
    }
    for metric in scores["real"]:
        result[metric] = {name: values[metric] for name, values in scores.items()}
    return result


def fidelity_by_value(
    real: np.ndarray,
    synthetic: np.ndarray,
    real_values: Sequence[str | None],
    synthetic_values: Sequence[str | None],
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> dict[str, dict]:
    """`fidelity` per value of a column: real images that have it against synthetic images that were asked for it."""
    result = {}
    groups = range(len(real)) if groups is None else groups
    for value in sorted({value for value in (*real_values, *synthetic_values) if value is not None}):
        real_rows = [row for row, other in enumerate(real_values) if other == value]
        synthetic_rows = [row for row, other in enumerate(synthetic_values) if other == value]
        chosen_groups = [groups[row] for row in real_rows]
        result[value] = fidelity(real[real_rows], synthetic[synthetic_rows], chosen_groups, seed=seed)
    return result
