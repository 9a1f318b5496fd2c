"""What synthetic images are worth: classifiers trained with and without them, asked about real patients.

Notable choices:

* A grid of (number of real images) x (synthetic images for each real one) x (strategy), in four regimes: real images
  only, synthetic only, both in every batch, and synthetic first, then real.
* A strategy is a pool of labelled synthetic images (any source), or a function that makes one from the very images
  that a fold has: then no label is used that the fold does not have, beside those that the generator learnt from.
* Folds are by patient. With test images of their own, all folds are asked about these; without, each fold about what
  it holds out. Classifiers of one fold share seed, real images and number of optimizer steps in all regimes.
* Synthetic images come in the proportions of the fold's classes, so a gain is not one of balance.
* Test images that the classifier or the generator has seen are refused (see `utility_inputs`).
* Each trained classifier leaves its probabilities in `cells/`, under a hash of everything that decides them: the same
  call goes on where it stopped, and a larger grid computes what is new.

    measure_utility("train.parquet", test="validation.parquet", label_column="finding", amounts=(50, 100),
                    strategies={"guided": "outputs/guided"}, ratios=(1, 5), out="outputs/utility")
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..generation.output_folder import check_writable
from ..prompts import choose
from .inputs import Images, source_names
from .statistics import RESAMPLES, DrawnScores, FoldPredictions, compare, draw_scores, summarise
from .utility_cells import (
    FOLD_KINDS,
    REGIMES,
    SYNTHETIC_SHARE,
    Cell,
    Fold,
    Maker,
    Runner,
    make_cells,
    make_folds,
    make_pools,
    synthetic_of,
)
from .utility_classifier import Classifier, CnnClassifier, ProbeClassifier
from .utility_generators import learnt_labels
from .utility_inputs import (
    LabelledImages,
    check_classes,
    check_test_classes,
    find_overlap,
    generator_hashes,
    open_labelled,
    parent_hashes,
    refuse_overlap,
)
from .utility_report import write_utility


def measure_utility(
    real: Images | LabelledImages,
    test: Images | LabelledImages | None = None,
    *,
    strategies: Mapping[str, "Images | LabelledImages | Maker"],
    label_column: str = "finding",
    group_column: str | None = None,
    filter: Mapping[str, Sequence[str]] | None = None,
    classes: Sequence[str] = (),
    amounts: Sequence[float] = (50,),
    ratios: Sequence[float | None] = (1,),
    regimes: Sequence[str] = REGIMES,
    folds: int = 5,
    fold_kind: str = "labels",
    pairs: Sequence[tuple[str, str]] = (),
    classifiers: Sequence[Classifier] | None = None,
    generators: Sequence[str] = (),
    label_seed: int = 0,
    synthetic_share: float = SYNTHETIC_SHARE,
    drop_overlap: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
    out: str | Path = "outputs/utility",
    progress: bool = False,
) -> dict:
    """Train and test every classifier of the grid; write `utility.json`, `.md`, `.csv` and `.png` to `out`.

    Args:
        real: Labelled real images to learn from.
        test: Real images of other patients; None asks each fold about what it holds out of `real`.
        strategies: Name -> pool of synthetic images with the column `label_column`, or a function (see `Maker`).
        label_column: Column of the class, in all images.
        group_column: Column of the patient; None: `group_id` where there is one.
        filter: Column -> values that are kept, of `real` and `test`.
        classes: What is told apart, in this order; empty: every class of `real`.
        amounts: Real images to learn from: numbers above 1, drawn fold by fold, or shares of the labels up to 1.
        ratios: Synthetic images for each real one; None takes the whole pool.
        regimes: Some of `REGIMES`; "real" is always measured, since the others are compared with it.
        folds: At least 2 without `test`.
        fold_kind: "labels": each fold leaves out its part of the labelled images. "seeds", which needs `test`: all
            folds learn from the same images, with another seed; fair where the generator has learnt from all of them.
        pairs: Strategies to compare with each other, beside each with real images only.
        classifiers: What is trained; None: a small CNN.
        generators: Models (folder, run, Hub name, "default") and priors that made the pools: their training images,
            too, must not be among the test images.
        label_seed: Of the share of the labels.
        synthetic_share: Share of synthetic images in the batches of the regime "both".
        drop_overlap: Leave test images that are no strangers out, and count them, instead of refusing all.
        resamples: Draws of the bootstrap.
        seed: Of folds, draws, training and bootstrap.
        out: Folder of the results.
        progress: Show a bar.

    Returns:
        The content of `utility.json`.

    Raises:
        ValueError: Unknown column, class or regime, a class that a set lacks, too few images, or an overlap.
        FileNotFoundError: A source or a generator does not exist.
        OSError: `out` cannot be written.
    """
    check_settings(amounts, ratios, regimes, folds, fold_kind, test is not None, synthetic_share, resamples)
    for name in (name for pair in pairs for name in pair):
        choose("strategy", name, tuple(strategies))
    out = Path(out)
    check_writable(out)
    options = {"group_column": group_column, "filter": filter}
    learn = _labelled(real, label_column, classes=classes, **options)
    asked = None if test is None else _labelled(test, label_column, classes=classes, **options)
    classes = check_classes(learn, classes)
    if asked is not None:
        check_test_classes(asked, classes)
    pools, makers = _open_strategies(strategies, label_column, classes)
    if makers and None in ratios:
        raise ValueError("a whole pool can be taken of a source alone: a strategy that makes its images has no size")
    asked, overlap = _keep_apart(learn, asked, pools, generators, drop_overlap)
    own = [replace(each) for each in classifiers] if classifiers else [CnnClassifier()]
    _suit_to_images(own, learn, pools)

    plan = {
        amount: make_folds(learn, asked, amount, folds, fold_kind, label_seed, seed)
        for amount in dict.fromkeys(amounts)
    }
    for fold in (fold for many in plan.values() for fold in many):
        fold.pools.update(pools)
    cells = make_cells(plan, list(strategies), ratios, regimes)
    for cell in cells:  # find out before anything is trained that a pool is too small
        if cell.strategy in pools:
            synthetic_of(plan[cell.amount][cell.fold], cell, seed)
    make_pools(plan, makers, [ratio for ratio in ratios if ratio is not None], out / "pools", seed)
    found = Runner(out / "cells", own, classes, synthetic_share, seed).run(plan, cells, progress)
    settings = {
        "label_column": label_column,
        "classes": list(classes),
        "folds": folds,
        "fold_kind": fold_kind,
        "regimes": [regime for regime in REGIMES if regime in (*regimes, "real")],
        "synthetic_share": synthetic_share,
        "label_seed": label_seed,
        "seed": seed,
        "resamples": resamples,
        "generators": list(generators),
    }
    report = {
        "settings": settings,
        "classifiers": [each.describe() for each in own],
        "sources": {
            "real": source_names(learn.images),
            "test": None if asked is None else source_names(asked.images),
            **{name: source_names(pool.images) for name, pool in pools.items()},
        },
        "images": {
            "real": learn.counts(),
            "test": None if asked is None else asked.counts(),
            **{name: pool.counts() for name, pool in pools.items()},
        },
        "patients_known": learn.has_groups,
        "overlap": overlap,
        "results": _results(found, cells, plan, classes, pairs, resamples, seed),
    }
    write_utility(report, out)
    return report


# --- what is given ---------------------------------------------------------------------------------------------------


def check_settings(
    amounts: Sequence[float],
    ratios: Sequence[float | None],
    regimes: Sequence[str],
    folds: int,
    fold_kind: str,
    has_test: bool,
    synthetic_share: float = SYNTHETIC_SHARE,
    resamples: int = RESAMPLES,
) -> None:
    """Raise ValueError for settings of `measure_utility` that cannot be, before anything is opened."""
    for regime in regimes:
        choose("regime", regime, REGIMES)
    if not amounts or any(not amount > 0 or (amount > 1 and amount != int(amount)) for amount in amounts):
        given = ", ".join(f"{amount:g}" for amount in amounts) or "nothing"
        raise ValueError(f"amounts of real images are whole numbers, or shares above 0 and at most 1, not {given}")
    if set(regimes) - {"real"} and not ratios:
        raise ValueError("no ratio of synthetic to real images is given")
    for ratio in ratios:
        if ratio is not None and not 0 < ratio <= 1000:
            raise ValueError(f"a ratio of synthetic to real images must be above 0 and at most 1000, not {ratio:g}")
    if not 0 < synthetic_share < 1:
        raise ValueError(f"synthetic_share must lie between 0 and 1, not {synthetic_share:g}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, not {resamples}")
    choose("fold_kind", fold_kind, FOLD_KINDS)
    if fold_kind == "seeds" and not has_test:
        raise ValueError('folds that differ in their seed alone need test images; valid without: fold_kind "labels"')
    if folds < (1 if has_test else 2):
        raise ValueError(f"folds must be at least {1 if has_test else '2 without test images'}, not {folds}")


def _labelled(source, label_column: str, **options) -> LabelledImages:
    return source if isinstance(source, LabelledImages) else open_labelled(source, label_column, **options)


def _open_strategies(
    strategies: Mapping, label_column: str, classes: Sequence[str]
) -> tuple[dict[str, LabelledImages], dict[str, Maker]]:
    pools, makers = {}, {}
    for name, source in strategies.items():
        if callable(source):
            makers[name] = source
        else:
            pools[name] = _labelled(source, label_column, classes=classes)
    return pools, makers


def _keep_apart(
    learn: LabelledImages,
    asked: LabelledImages | None,
    pools: Mapping[str, LabelledImages],
    generators: Sequence[str],
    drop_overlap: bool,
) -> tuple[LabelledImages | None, dict]:
    """The test images, strangers to all; and what was checked."""
    seen, unknown = generator_hashes(generators)
    owners: dict[str, set[str]] = {"generator's training images": seen}
    for name, pool in pools.items():
        owners[f"images of strategy {name!r}"] = set(pool.hashes)
        owners[f"parents of strategy {name!r}"] = parent_hashes(pool)
    facts: dict = {"generators_without_record": unknown, "generators_with_record": len(generators) - len(unknown)}
    facts["generators_learnt_labels"] = {name: learnt_labels(name) for name in generators}
    facts["labelled_images_of_generator"] = sum(content in seen for content in learn.hashes)
    if asked is None:  # each fold is asked about what the others learn from
        refuse_overlap(learn, find_overlap(learn, owners, None))
        patients: dict[str, set] = {}
        for content, group in zip(learn.hashes, learn.groups, strict=True):
            patients.setdefault(content, set()).add(group)
        copies = sum(len(names) > 1 for names in patients.values())
        if copies:
            raise ValueError(
                f"{copies} images occur in two groups, so a fold could learn what it is asked: give test images, or "
                "mend the group column"
            )
        return None, facts | {"left_out": 0}
    overlap = find_overlap(asked, {"labelled images": set(learn.hashes), **owners}, learn)
    if not drop_overlap:
        refuse_overlap(asked, overlap)
        return asked, facts | {"left_out": 0}
    strangers = ~np.any(list(overlap.values()), axis=0)
    if not strangers.any():
        raise ValueError(
            f"none of the {len(asked)} test images is a stranger to the labelled images and the generator"
        )
    return asked.select(np.flatnonzero(strangers)), facts | {"left_out": int((~strangers).sum())}


def _suit_to_images(classifiers: Sequence[Classifier], learn: LabelledImages, pools: Mapping) -> None:
    """One resolution for real and synthetic features, and no mirroring where a side is stated."""
    sizes = [min(part.images.image(0).size) for part in (learn, *pools.values())]
    for each in classifiers:
        if isinstance(each, ProbeClassifier) and each.extractor.resolution is None:
            each.extractor.resolution = min(sizes)
        if isinstance(each, CnnClassifier) and not learn.images.may_flip().all():
            object.__setattr__(each, "horizontal_flip", False)  # a copy of the caller's


# --- what comes out --------------------------------------------------------------------------------------------------


def _results(
    found: Mapping[tuple[str, Cell], FoldPredictions],
    cells: Sequence[Cell],
    plan: Mapping[float, Sequence[Fold]],
    classes: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    resamples: int,
    seed: int,
) -> list[dict]:
    """One entry per classifier and cell, folds together: its scores, and its gains.

    `gain` is over the real images alone, `against` (strategy -> gains) over the same cell of another strategy.
    """
    drawn: dict[tuple[str, Cell], DrawnScores] = {}
    own_cells = [cell for cell in cells if cell.fold == 0]
    names = list(dict.fromkeys(name for name, _ in found))
    for name in names:
        for cell in own_cells:
            own = [found[name, replace(cell, fold=number)] for number in range(len(plan[cell.amount]))]
            drawn[name, cell] = draw_scores(own, classes, resamples, seed)
    results = []
    for (name, cell), scores in drawn.items():
        folds = plan[cell.amount]
        used = [synthetic_of(fold, replace(cell, fold=number), seed) for number, fold in enumerate(folds)]
        others = [second for first, second in pairs if first == cell.strategy]
        entry = {"classifier": name, "amount": cell.amount, "regime": cell.regime, "strategy": cell.strategy}
        entry |= {
            "ratio": cell.ratio,
            "real_images": float(np.mean([len(fold.real) for fold in folds])),
            "synthetic_images": float(np.mean([0 if each is None else len(each) for each in used])),
            "test_images": len({content for fold in folds for content in fold.test.hashes}),
            "scores": summarise(scores),
            "gain": None if cell.regime == "real" else compare(scores, drawn[name, Cell(cell.amount, 0, "real")]),
            "against": {other: compare(scores, drawn[name, replace(cell, strategy=other)]) for other in others},
        }
        results.append(entry)
    return results
