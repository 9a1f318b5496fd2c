"""Near-duplicates among image features: exact cosine search, and a threshold that fits the feature extractor.

- Search is always exact: an approximate index may overlook the very copy that an audit is about. From
  `LARGE_SEARCH` comparisons on it is faiss' flat index (the extra `search`), below it blocks of a torch product.
- "Cosine above 0.95" means another thing in every feature space: after a ReLU all cosines are positive, and two
  patients may be more alike than that. `calibrate_threshold` finds the cosine that real images of *other* patients
  hardly ever reach, so that what is dropped is nearer to a training image than nearly every real image is.

    index = CosineIndex(training_features.shape[1], expected_comparisons=len(training_features) * len(features))
    index.add(training_features)
    similarity, row = index.best(features)    # (N,), (N,)
"""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch

LARGE_SEARCH = 100_000_000  # comparisons, as of 10,000 images with 10,000; about 10 s of one core for 1,280 features
SEARCHES = ("auto", "torch", "faiss")
BLOCK = 512  # queries at once
CALIBRATION_IMAGES = 2000  # of the real ones are enough to know a share of 1 % to 0.2 points
SAME_IMAGE = 1 - 1e-6  # cosine of an image with itself, as float32 has it


def unit_rows(features: np.ndarray) -> np.ndarray:
    """Features (N, D) as float32 rows of length 1; a row of zeros stays one."""
    features = np.asarray(features, dtype=np.float32)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), np.float32(1e-12))


def check_search(search: str, comparisons: int = 0) -> str:
    """The search that will be used, "torch" or "faiss", for a number of comparisons of two images.

    Raises:
        ValueError: `search` is none of `SEARCHES`.
        ImportError: faiss is needed, or asked for, and is not installed.
    """
    if search not in SEARCHES:
        raise ValueError(f"unknown search {search!r}; valid: {', '.join(SEARCHES)}")
    if search == "torch" or (search == "auto" and comparisons < LARGE_SEARCH):
        return "torch"
    try:
        import faiss  # noqa: F401
    except ImportError as error:
        why = f"comparing {comparisons:,} pairs of images" if search == "auto" else "search='faiss'"
        raise ImportError(f"{why} needs faiss: pip install medisyn[search], or search='torch'") from error
    return "faiss"


class CosineIndex:
    """Finds, for each query, the image with the highest cosine similarity among those that were added.

    Args:
        dimension: Features of each image.
        expected_comparisons: Pairs that will be compared in all; decides between torch and faiss for "auto".
        search: One of `SEARCHES`.

    Raises:
        ValueError, ImportError: See `check_search`.
    """

    def __init__(self, dimension: int, expected_comparisons: int = 0, search: str = "auto") -> None:
        self.search = check_search(search, expected_comparisons)
        self._rows = np.empty((0, dimension), dtype=np.float32)  # of torch; grows by doubling
        self._size = 0
        if self.search == "faiss":
            import faiss

            self._index = faiss.IndexFlatIP(dimension)

    def __len__(self) -> int:
        return self._size

    def add(self, features: np.ndarray) -> None:
        """Append features (N, D); the first that was ever added has row 0."""
        rows = unit_rows(features)
        if self.search == "faiss":
            self._index.add(rows)
        else:
            if self._size + len(rows) > len(self._rows):
                larger = np.empty((max(2 * len(self._rows), self._size + len(rows)), rows.shape[1]), np.float32)
                larger[: self._size] = self._rows[: self._size]
                self._rows = larger
            self._rows[self._size : self._size + len(rows)] = rows
        self._size += len(rows)

    def best(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Highest cosine similarity (N,) float32 of features (N, D), and the row (N,) that has it; -1 if empty."""
        queries = unit_rows(features)
        similarities, rows = np.full(len(queries), -1, np.float32), np.full(len(queries), -1, np.int64)
        if not self._size:
            return similarities, rows
        for start in range(0, len(queries), BLOCK):
            here = slice(start, start + BLOCK)
            if self.search == "faiss":
                found, at = self._index.search(queries[here], 1)
                similarities[here], rows[here] = found[:, 0], at[:, 0]
            else:
                product = _product(queries[here], self._rows[: self._size])
                rows[here] = product.argmax(1)  # the first of equals
                similarities[here] = product[np.arange(len(product)), rows[here]]
        return similarities, rows


def _product(queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return (torch.from_numpy(queries) @ torch.from_numpy(rows).T).numpy()


def drop_near_duplicates(
    features: np.ndarray, order: Sequence[int] | np.ndarray, threshold: float, search: str = "auto"
) -> tuple[list[int], dict[int, tuple[int, float]]]:
    """Go through images in `order` and keep each unless it is too like one that was kept before.

    So of a pair the earlier one stays, no two kept images are above the threshold, and every dropped image has a kept
    one above it.

    Args:
        features: (N, D) of all images.
        order: Indices to look at, the ones to prefer first.
        threshold: Highest cosine similarity of two images that both stay.
        search: One of `SEARCHES`.

    Returns:
        The kept indices in `order`, and for each dropped one the most similar kept image before it and the cosine.
    """
    indices = np.asarray(order, dtype=np.int64)
    index = CosineIndex(features.shape[1], len(indices) ** 2 // 2, search)
    kept: list[int] = []
    dropped: dict[int, tuple[int, float]] = {}
    for start in range(0, len(indices), BLOCK):
        block = indices[start : start + BLOCK]
        similarity, row = index.best(features[block])
        rows = unit_rows(features[block])
        within = _product(rows, rows)
        new: list[int] = []  # positions in the block
        for position in range(len(block)):
            best, to = float(similarity[position]), kept[row[position]] if row[position] >= 0 else -1
            if new:
                nearest = new[int(within[position, new].argmax())]
                if within[position, nearest] > best:
                    best, to = float(within[position, nearest]), int(block[nearest])
            if best > threshold:
                dropped[int(block[position])] = (to, best)
            else:
                new.append(position)
        kept += [int(block[position]) for position in new]
        index.add(features[block[new]])
    return kept, dropped


def calibrate_threshold(
    training: np.ndarray,
    groups: Sequence[Hashable] | None = None,
    held_out: np.ndarray | None = None,
    rate: float = 0.01,
    seed: int = 0,
    search: str = "auto",
) -> dict[str, Any]:
    """The lowest cosine threshold that would drop at most the share `rate` of real images as copies of training ones.

    Each real image counts with its cosine to the most similar training image: real held-out images where there are
    any, else training images against those of other groups (leave one group out; an exact copy is the same image).

    Args:
        training: (M, D) features of the training images.
        groups: Patient of each. None: every image stands for itself; then several views of one patient make real
            images look like copies, and the threshold comes out too high.
        held_out: (H, D) features of real images of other patients.
        rate: Share of real images that may be above the threshold.
        seed: Of the draw, where there are more than `CALIBRATION_IMAGES`.
        search: One of `SEARCHES`.

    Returns:
        `threshold`, `rate`, `dropped_share` (of the real images, at most `rate`), `images` (how many were compared),
        `compared` ("held-out images" or "leave one group out") and `median` (of their highest cosines).

    Raises:
        ValueError: `rate` is not in [0, 1), or there is nothing to compare: no held-out image and fewer than two
            groups.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"the rate of duplicates:auto must be at least 0 and below 1, not {rate}")
    rng = np.random.default_rng(seed)
    if held_out is not None:
        drawn = _draw(len(held_out), rng)
        index = CosineIndex(training.shape[1], len(training) * len(drawn), search)
        index.add(training)
        highest = index.best(held_out[drawn])[0]
    else:
        highest = _highest_of_other_groups(training, groups, _draw(len(training), rng))
    if not len(training) or not len(highest):
        raise ValueError(
            f"duplicates:auto has nothing to calibrate on: {len(training)} training images of one group and no "
            "held-out ones; give a threshold, such as duplicates:0.95"
        )
    allowed = int(rate * len(highest))
    # What is above the threshold is dropped, so the value with `allowed` values above it is the lowest that will do.
    threshold = float(np.sort(highest)[::-1][allowed])
    return {
        "threshold": threshold,
        "rate": rate,
        "dropped_share": float((highest > threshold).mean()),
        "images": len(highest),
        "compared": "leave one group out" if held_out is None else "held-out images",
        "median": float(np.median(highest)),
    }


def _draw(number: int, rng: np.random.Generator) -> np.ndarray:
    return np.sort(rng.permutation(number)[:CALIBRATION_IMAGES])


def _highest_of_other_groups(
    features: np.ndarray, groups: Sequence[Hashable] | None, chosen: np.ndarray
) -> np.ndarray:
    """Highest cosine of each of `chosen` to an image of another group; images without any other group are left out."""
    rows = unit_rows(features)
    known: dict[Hashable, int] = {}
    codes = np.array([known.setdefault(name, len(known)) for name in (range(len(rows)) if groups is None else groups)])
    highest = []
    for start in range(0, len(chosen), BLOCK):
        here = chosen[start : start + BLOCK]
        product = _product(rows[here], rows)
        product[codes[here][:, None] == codes[None, :]] = -np.inf
        product[product >= SAME_IMAGE] = -np.inf
        highest.append(product.max(1, initial=-np.inf))
    found = np.concatenate(highest) if highest else np.empty(0, np.float32)
    return found[np.isfinite(found)]
