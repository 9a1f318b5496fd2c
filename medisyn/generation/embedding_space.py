"""Moving on the manifold of image embeddings: pure functions on vectors.

- Nothing here knows a model, a file or a random generator: noise and weights are passed in; `strategies` draws them
  from the seed of an image.
- Vectors lie along the last axis. Tokens (T, D) of one image are moved token by token.
- The covariance within classes is shrunk (Ledoit & Wolf 2004): there are often fewer images than dimensions.

    between = slerp(embeddings[0], embeddings[1], 0.5)
    root = covariance_root(within_class_covariance(embeddings, findings))
    nearby = perturb(embeddings[0], root, torch.randn(embeddings.shape[-1]), scale=0.5)
"""

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

_PARALLEL = 1e-6  # 1 - |cosine| below which the arc between two directions is a point or is not unique


def lerp(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """`(1 - weight) first + weight second`, on the straight line between (..., D) and (..., D).

    Args:
        first: Where weight 0 leads, exactly.
        second: Where weight 1 leads, exactly.
        weight: In [0, 1].

    Raises:
        ValueError: A weight outside [0, 1].
    """
    _check_weight(weight)
    return torch.lerp(first, second, weight)


def slerp(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """On the arc between (..., D) and (..., D): directions by Shoemake (1985, section 3.3), norms linearly.

    With the angle W between the directions a and b the direction is `(sin((1 - t) W) a + sin(t W) b) / sin W`, whose
    norm is 1. The result has the norm `(1 - t) |first| + t |second|`, so it never falls into the empty middle of the
    shell on which embeddings of high dimension lie, as a straight line does. Vectors of one direction are joined by
    `lerp`.

    Raises:
        ValueError: A weight outside [0, 1], a zero vector, or opposite vectors, between which there is no single arc.
    """
    _check_weight(weight)
    norms = [vector.norm(dim=-1, keepdim=True) for vector in (first, second)]
    if any(bool((norm == 0).any()) for norm in norms):
        raise ValueError("slerp needs directions, and a vector of zeros has none; use lerp")
    a, b = first / norms[0], second / norms[1]
    cosine = (a * b).sum(dim=-1, keepdim=True).clamp(-1, 1)
    if bool((cosine < _PARALLEL - 1).any()):
        raise ValueError("slerp between opposite vectors: there is no single arc; use lerp")
    parallel = cosine > 1 - _PARALLEL
    angle = torch.where(parallel, torch.ones_like(cosine), torch.arccos(cosine))
    direction = (torch.sin((1 - weight) * angle) * a + torch.sin(weight * angle) * b) / torch.sin(angle)
    direction = torch.where(parallel, torch.lerp(a, b, weight), direction)
    return direction * torch.lerp(norms[0], norms[1], weight)


def nearest_neighbours(embeddings: Tensor, row: int, candidates: Sequence[int], count: int) -> list[int]:
    """The `count` rows among `candidates` that are nearest to `row` by cosine, nearest first; never `row` itself.

    Args:
        embeddings: (N, D).
        row: Whose neighbours.
        candidates: Rows to choose from; of equally near ones the first comes first.
        count: How many, at least 1.

    Raises:
        ValueError: Fewer candidates than that.
    """
    others = [other for other in candidates if other != row]
    if not 1 <= count <= len(others):
        raise ValueError(f"{count} nearest neighbours of {len(others)} other images; valid: 1..{len(others)}")
    near = torch.nn.functional.cosine_similarity(embeddings[others], embeddings[row][None], dim=-1)
    return [others[place] for place in torch.argsort(near, descending=True, stable=True)[:count].tolist()]


def mix(parents: Tensor, weights: Sequence[float] | Tensor) -> Tensor:
    """The convex combination `sum_k weights_k parents_k` of (K, ..., D), a point of their convex hull.

    Args:
        parents: One along the first axis each.
        weights: K numbers of at least 0 that sum to 1, such as a draw from a Dirichlet distribution.

    Raises:
        ValueError: Another number of weights, a negative one, or another sum.
    """
    shares = torch.as_tensor(weights, dtype=torch.float64)
    if shares.shape != (len(parents),):
        raise ValueError(f"{shares.numel()} weights for {len(parents)} parents")
    if bool((shares < 0).any()) or abs(float(shares.sum()) - 1) > 1e-6:
        raise ValueError(
            f"weights must be at least 0 and sum to 1, not {[round(each, 6) for each in shares.tolist()]}"
        )
    return torch.einsum("k,k...->...", shares, parents.double()).to(parents.dtype)


def within_class_covariance(embeddings: Tensor, classes: Sequence[Hashable]) -> Tensor:
    """How embeddings (N, D) scatter around the mean of their class: a covariance (D, D), float64, positive definite.

    `(1 - s) S + s (tr S / D) I` with the scatter S pooled over the classes (divisor N - number of classes) and the
    shrinkage s of Ledoit & Wolf (2004, "A well-conditioned estimator for large-dimensional covariance matrices",
    eq. 14), which scikit-learn estimates from the residuals. It is 1 / N at least, below
    that of normal vectors: the estimate is 0 for two images, whose opposite residuals seem to have no sampling error.

    Args:
        embeddings: One row per image.
        classes: Of each image; the same for all where there are none.

    Raises:
        ValueError: No class has two different images.
        ImportError: scikit-learn is missing.
    """
    try:
        from sklearn.covariance import empirical_covariance, ledoit_wolf, shrunk_covariance
    except ImportError as error:
        raise ImportError("a covariance needs scikit-learn: pip install medisyn[eval]") from error

    values = embeddings.double()
    names = list(dict.fromkeys(classes))
    number = torch.tensor([names.index(each) for each in classes])
    members = torch.nn.functional.one_hot(number, len(names)).double()  # (N, classes)
    means = members.T @ values / members.sum(0)[:, None]
    residuals = values - means[number]
    freedom = len(values) - len(names)
    if freedom < 1 or not bool(residuals.abs().max() > 0):
        raise ValueError("a covariance within classes needs two different images of at least one class")
    covariance, shrinkage = ledoit_wolf(residuals.numpy(), assume_centered=True)
    least = 1 / len(values)
    if shrinkage < least:
        covariance = shrunk_covariance(empirical_covariance(residuals.numpy(), assume_centered=True), least)
    return torch.from_numpy(np.asarray(covariance)) * (len(values) / freedom)


def covariance_root(covariance: Tensor) -> Tensor:
    """The lower triangular L (D, D) with `L L' = covariance` (Cholesky).

    Raises:
        ValueError: The matrix is not positive definite.
    """
    root, failed = torch.linalg.cholesky_ex(covariance)
    if bool(failed):
        raise ValueError(f"a covariance {tuple(covariance.shape)} must be positive definite")
    return root


def perturb(embedding: Tensor, root: Tensor, noise: Tensor, scale: float = 1.0) -> Tensor:
    """`embedding + scale L noise`: a draw from a normal distribution around (..., D) with the covariance scale² L L'.

    Args:
        embedding: The middle.
        root: L (D, D) of `covariance_root`.
        noise: Standard normal, as `embedding`.
        scale: Share of the standard deviation within a class, at least 0; 1 is as far as classmates lie from the mean.

    Raises:
        ValueError: A negative scale.
    """
    if not scale >= 0:
        raise ValueError(f"the scale of a perturbation must be at least 0, not {scale}")
    return embedding + (scale * (noise.double() @ root.double().T)).to(embedding.dtype)


def _check_weight(weight: float) -> None:
    if not 0 <= weight <= 1:
        raise ValueError(f"the weight between two embeddings must be in 0..1, not {weight}")
