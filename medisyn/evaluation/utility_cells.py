"""The cells of a measurement of utility: which classifier learns from what, and the loop that trains them once.

- A cell is a number of real images, a fold, a regime, and where it has synthetic images their strategy and ratio.
- Inputs (pixels or features) are kept by content hash, so that no image is decoded twice.
- Probabilities are kept in files under a hash of everything that decides them.

    cells = make_cells(plan, strategies=["guided"], ratios=[1, 5], regimes=REGIMES)
    predictions = Runner(Path("cells"), classifiers, classes).run(plan, cells)
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from tqdm import tqdm

from ..generation.provenance import atomic_file
from .statistics import FoldPredictions
from .utility_classifier import Classifier, Part
from .utility_inputs import (
    LabelledImages,
    choose_labels,
    draw_labelled,
    draw_synthetic,
    find_overlap,
    parent_hashes,
    refuse_overlap,
    split_folds,
)

REGIMES = ("real", "synthetic", "both", "pretrain")
FOLD_KINDS = ("labels", "seeds")
SYNTHETIC_SHARE = 0.5  # of a batch in the regime "both"

# (labelled real images of one fold, images wanted of each class, folder to keep them in, seed) -> synthetic images
Maker: TypeAlias = Callable[[LabelledImages, Mapping[str, int], Path, int], LabelledImages]


@dataclass(frozen=True)
class Cell:
    """One classifier to train.

    Attributes:
        amount: Real images of the fold, or share of the labels.
        fold: Number of the fold.
        regime: One of `REGIMES`.
        strategy: Name; None for real images only.
        ratio: Synthetic images for each real one; None: the whole pool.
    """

    amount: float
    fold: int
    regime: str
    strategy: str | None = None
    ratio: float | None = None


@dataclass
class Fold:
    """What one fold of one amount learns from and is asked about."""

    real: LabelledImages
    test: LabelledImages
    pools: dict[str, LabelledImages] = field(default_factory=dict)


def make_folds(
    learn: LabelledImages,
    asked: LabelledImages | None,
    amount: float,
    folds: int,
    fold_kind: str,
    label_seed: int,
    seed: int,
) -> list[Fold]:
    """What each fold of an amount of real images learns from and is asked about.

    Args:
        learn: Labelled real images.
        asked: Test images; None: each fold is asked about what it holds out.
        amount: Number of real images, or share of the labels.
        folds: Their number.
        fold_kind: One of `FOLD_KINDS`: every fold leaves out its part of the labelled images, or all learn from the
            same ones and differ in their seed.
        label_seed: Of the share, and of the images that folds of seeds have in common.
        seed: Of the split and the draws.
    """
    base = choose_labels(learn, amount, label_seed)
    if fold_kind == "seeds":
        rows = draw_labelled(base, np.arange(len(base)), amount, label_seed)
        return [Fold(base.select(rows), asked) for _ in range(folds)]
    made = []
    for number, (rest, held_out) in enumerate(split_folds(base, folds, seed)):
        rows = draw_labelled(base, rest, amount, 1000 * seed + number)
        made.append(Fold(base.select(rows), base.select(held_out) if asked is None else asked))
    return made


def make_cells(
    plan: Mapping[float, Sequence[Fold]],
    strategies: Sequence[str],
    ratios: Sequence[float | None],
    regimes: Sequence[str],
) -> list[Cell]:
    """Every cell of the grid, real images alone first."""
    cells = []
    for amount, folds in plan.items():
        for fold in range(len(folds)):
            cells.append(Cell(amount, fold, "real"))
            cells += [
                Cell(amount, fold, regime, strategy, ratio)
                for strategy in strategies
                for ratio in dict.fromkeys(ratios)
                for regime in REGIMES
                if regime in regimes and regime != "real"
            ]
    return cells


def synthetic_of(fold: Fold, cell: Cell, seed: int) -> LabelledImages | None:
    """The synthetic images of a cell; None for real images alone. Raises ValueError where the pool has too few."""
    if cell.strategy is None:
        return None
    pool = fold.pools[cell.strategy]
    if cell.ratio is None:
        lacking = sorted(set(fold.real.labels) - set(pool.labels))
        if lacking:
            raise ValueError(f"strategy {cell.strategy!r} has no image of class {lacking[0]!r}")
        return pool
    rows = draw_synthetic(pool, _wanted(fold.real, cell.ratio), 1000 * seed + cell.fold, cell.strategy)
    return pool.select(rows)


def make_pools(
    plan: Mapping[float, Sequence[Fold]],
    makers: Mapping[str, Maker],
    ratios: Sequence[float],
    folder: Path,
    seed: int,
) -> None:
    """Add the pools of strategies that make their images from those of a fold, large enough for the largest ratio.

    Raises:
        ValueError: An image of a pool, or one of its parents, is a test image.
    """
    for name, make in makers.items():
        for amount, folds in plan.items():
            for number, fold in enumerate(folds):
                place = folder / f"{name}-{amount:g}-{number}"
                pool = make(fold.real, _wanted(fold.real, max(ratios)), place, seed)
                own = {
                    f"images of strategy {name!r}": pool.hashes,
                    f"parents of strategy {name!r}": parent_hashes(pool),
                }
                refuse_overlap(fold.test, find_overlap(fold.test, own, None))
                fold.pools[name] = pool


def _wanted(real: LabelledImages, ratio: float) -> dict[str, int]:
    """Synthetic images of each class for a ratio; at least one."""
    return {label: max(1, round(ratio * number)) for label, number in Counter(real.labels).items()}


class Runner:
    """Trains what is not finished; keeps inputs by content hash and probabilities by what decides them."""

    def __init__(
        self, folder: Path, classifiers: Sequence[Classifier], classes: Sequence[str], share: float, seed: int
    ) -> None:
        self.folder, self.classifiers, self.classes, self.share, self.seed = folder, classifiers, classes, share, seed
        self._inputs: dict[tuple[str, str], torch.Tensor] = {}

    def run(
        self, plan: Mapping[float, Sequence[Fold]], cells: Sequence[Cell], progress: bool = False
    ) -> dict[tuple[str, Cell], FoldPredictions]:
        """Predictions of every classifier, by its name, in every cell."""
        found = {}
        with tqdm(total=len(cells) * len(self.classifiers), desc="utility", disable=not progress) as bar:
            for classifier in self.classifiers:
                for cell in cells:
                    fold = plan[cell.amount][cell.fold]
                    probabilities = self._probabilities(classifier, cell, fold, synthetic_of(fold, cell, self.seed))
                    labels = self._labels(fold.test).numpy()
                    found[classifier.name, cell] = FoldPredictions(labels, probabilities, fold.test.groups)
                    bar.update()
        return found

    def _probabilities(
        self, classifier: Classifier, cell: Cell, fold: Fold, synthetic: LabelledImages | None
    ) -> np.ndarray:
        seed = 1000 * self.seed + cell.fold
        facts = {
            "classifier": classifier.describe(),
            "classes": list(self.classes),
            "regime": cell.regime,
            "share": self.share if cell.regime == "both" else None,
            "real": None if cell.regime == "synthetic" else _content(fold.real),
            "synthetic": None if synthetic is None else _content(synthetic),
            "test": fold.test.hashes,
            "seed": seed,
        }
        name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        file = self.folder / f"{name}.npy"
        if file.is_file():
            return np.load(file)
        stages = self._stages(classifier, cell.regime, fold.real, synthetic)
        inputs = self._of(classifier, fold.test)
        probabilities = classifier.fit_predict(stages, inputs, len(self.classes), seed).astype(np.float32)
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as partial, open(partial, "wb") as handle:
            np.save(handle, probabilities)
        return probabilities

    def _stages(
        self, classifier: Classifier, regime: str, real: LabelledImages, synthetic: LabelledImages | None
    ) -> list[list[Part]]:
        def part(images: LabelledImages, share: float = 1.0) -> Part:
            return Part(self._of(classifier, images), self._labels(images), share)

        if synthetic is None:
            return [[part(real)]]
        if regime == "both":
            return [[part(real, 1 - self.share), part(synthetic, self.share)]]
        return [[part(synthetic)]] if regime == "synthetic" else [[part(synthetic)], [part(real)]]

    def _of(self, classifier: Classifier, images: LabelledImages) -> torch.Tensor:
        first = {content: row for row, content in reversed(list(enumerate(images.hashes)))}
        missing = [row for content, row in first.items() if (classifier.name, content) not in self._inputs]
        if missing:
            for row, own in zip(missing, classifier.inputs(images.images.select(missing)), strict=True):
                self._inputs[classifier.name, images.hashes[row]] = own
        return torch.stack([self._inputs[classifier.name, content] for content in images.hashes])

    def _labels(self, images: LabelledImages) -> torch.Tensor:
        return torch.tensor([self.classes.index(label) for label in images.labels])


def _content(images: LabelledImages) -> list[list[str]]:
    return [list(pair) for pair in zip(images.hashes, images.labels, strict=True)]
