r"""Selection: which generated images to keep, by rules that can be combined, with a record of every decision.

Notable choices:

* Rules are applied in their order; each sees what the rules before it left. `RULES` lists them: confidence of a
  classifier, distance to the class centroid (HistoGAN, HistoDiffusion), near-duplicates of training images and of each
  other, covariance matching, farthest-point diversity, and a random draw.
* Every image gets a record, kept or not: its scores, the thresholds it met, and the rule that decided.
* A selection is compared with a random one that has as many images of each class (`Selection.baseline`): with fewer
  images alone, a classifier trained on them changes too. Diversity that falls below it is warned of: over-filtering.
* The same input gives the same selection.

    selection = select(features, labels, real_features, real_labels, rules="confidence:quantile=0.5,diverse:500")
    selection.kept, selection.report["warnings"]

    medisyn select outputs/run --real data/labelled --label-column finding \
        --rules confidence:quantile=0.5,duplicates:0.95,diverse:500 --out outputs/selected
"""

import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .provenance import write_json_lines
from .selection_parsing import FORMS, RULES, Rules, parse_rules
from .selection_pool import Outcome, Pool, Rule
from .selection_report import compare_diversity, find_warnings, random_selection
from .selection_rules import check_real_images
from .selection_search import check_search

__all__ = ["FORMS", "RULES", "Rules", "Selection", "parse_rules", "select"]

logger = logging.getLogger(__name__)

# the surer half of each class, so that none is left empty where synthetic features are shifted against real ones
DEFAULT_RULES = "confidence:quantile=0.5,duplicates:0.95"
WARN_BELOW = 0.8  # of the diversity of a random selection
PASSED = "every rule"  # decided about the images that are kept
DIGITS = 6  # of scores in the records


@dataclass(frozen=True)
class Selection:
    """What was selected, and why.

    Attributes:
        kept: Sorted indices of the selected images.
        baseline: Sorted indices of a random selection with as many images of each class.
        records: One per image, in order: `index`, `name` where given, `label`, `kept`, `rule` (the one that dropped
            it, or "every rule"), `reason`, `scores` and `thresholds` (of each rule that looked at it).
        report: `rules`, `images` and `kept` (per class), `steps` (per rule: what it dropped and found), `diversity`,
            `warn_below` and `warnings`.
    """

    kept: np.ndarray
    baseline: np.ndarray
    records: list[dict[str, Any]]
    report: dict[str, Any]

    def write_audit(self, path: str | Path) -> None:
        """Write the records as JSON lines; the file appears whole or not at all."""
        write_json_lines(Path(path), self.records)


def select(
    features: np.ndarray,
    labels: Sequence[str],
    real_features: np.ndarray,
    real_labels: Sequence[str],
    train_features: np.ndarray | None = None,
    rules: Rules = DEFAULT_RULES,
    *,
    real_groups: Sequence[Hashable] | None = None,
    train_groups: Sequence[Hashable] | None = None,
    held_out_features: np.ndarray | None = None,
    probabilities: np.ndarray | None = None,
    classes: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    seed: int = 0,
    warn_below: float = WARN_BELOW,
    search: str = "auto",
) -> Selection:
    """Decide about every generated image. All features are those of one extractor.

    Args:
        features: (N, D) of the generated images.
        labels: The class that each was asked for; each must be among `real_labels`.
        real_features: (M, D) of labelled real images: of these are the classifier, the centroids and the covariances.
        real_labels: Their classes. Those that no generated image was asked for compete in classifier and centroids.
        train_features: (T, D) of the images that the generator was trained on; with the real ones they are what
            `duplicates` compares with.
        rules: See `parse_rules`; none keeps everything.
        real_groups: Patient of each real image.
        train_groups: Patient of each training image.
        held_out_features: (H, D) of real images that are in neither set; they calibrate `duplicates:auto`.
        probabilities: (N, C) of a classifier of yours instead of a logistic regression on `real_features`.
        classes: Its C classes.
        names: Of the generated images, for the records.
        seed: Of every random draw.
        warn_below: Warn where a measure of diversity is below this share of a random selection's.
        search: "torch", "faiss", or "auto": faiss from 100 million comparisons on.

    Returns:
        The selection. Its warnings are logged, unless it is empty: then they are in its report alone.

    Raises:
        ValueError: Unknown rules, sets that do not fit together, a class that has no real image, or one that has too
            few for a rule.
        ImportError: scikit-learn or faiss is needed and not installed.
    """
    chain = parse_rules(rules)
    if not (isinstance(warn_below, int | float) and 0 <= warn_below <= 1):
        raise ValueError(f"warn_below must lie in 0..1, not {warn_below!r}")
    check_search(search)
    if names is not None and len(names) != len(labels):
        raise ValueError(f"there are {len(names)} names for {len(labels)} images")
    pool = _pool(features, labels, real_features, real_labels, train_features, held_out_features)
    _check_length("real_groups", real_groups, len(pool.real_labels))
    _check_length("train_groups", train_groups, 0 if train_features is None else len(train_features))
    pool.real_groups, pool.seed, pool.search = real_groups, seed, search
    if real_groups is not None or train_groups is not None:
        # An image whose patient is not known stands for itself.
        alone = [("real", row) for row in range(len(pool.real_labels))]
        others = [("train", row) for row in range(len(pool.training_names) - len(pool.real_labels))]
        pool.training_groups = [*(real_groups or alone), *(train_groups or others)]
    if probabilities is not None:
        pool.probabilities, pool.classes = _probabilities(probabilities, classes, pool.labels)

    alive = np.arange(len(pool.labels))
    preference = np.zeros(len(alive))
    records = _records(pool, names)
    steps, warnings = [], check_real_images(chain, pool.labels, pool.real_labels, probabilities is not None)
    for rule in chain:
        outcome = rule.apply(pool, alive, preference)
        _note(records, rule, outcome, alive)
        preference = preference if outcome.preference is None else outcome.preference
        left = np.array([index for index in alive.tolist() if index not in outcome.dropped], dtype=np.int64)
        steps.append({"rule": rule.spec(), "before": len(alive), "dropped": len(outcome.dropped), "after": len(left)})
        steps[-1] |= {"by_class": _counts(pool.labels[left], pool.labels)} | (
            {"thresholds": outcome.thresholds} if outcome.thresholds else {}
        )
        steps[-1] |= {"facts": outcome.facts} if outcome.facts else {}
        warnings += outcome.warnings
        alive = left
    diversity = compare_diversity(pool, alive, seed)
    warnings += find_warnings(diversity, warn_below)
    for warning in warnings if len(alive) else ():  # nothing left is for the caller to say
        logger.warning("%s", warning)
    report = {
        "rules": [rule.spec() for rule in chain],
        "seed": seed,
        "images": _counts(pool.labels, pool.labels),
        "kept": _counts(pool.labels[alive], pool.labels),
        "steps": steps,
        "diversity": diversity,
        "warn_below": warn_below,
        "warnings": warnings,
    }
    return Selection(alive, random_selection(pool.labels, alive, seed), records, report)


# --- input and records -----------------------------------------------------------------------------------------------


def _pool(
    features: Any, labels: Sequence[str], real: Any, real_labels: Sequence[str], train: Any, held_out: Any
) -> Pool:
    """The checked sets as one pool."""
    arrays = {"features": _checked("features", features), "real_features": _checked("real_features", real)}
    for name, rows in (("train_features", train), ("held_out_features", held_out)):
        if rows is not None:
            arrays[name] = _checked(name, rows)
    width = arrays["features"].shape[1]
    for name, rows in arrays.items():
        if rows.shape[1] != width:
            raise ValueError(f"{name} has {rows.shape[1]} columns, features has {width}: use one extractor for all")
    _check_length("labels", labels, len(arrays["features"]))
    _check_length("real_labels", real_labels, len(arrays["real_features"]))
    for name, values in (("labels", labels), ("real_labels", real_labels)):
        if any(value is None for value in values):
            raise ValueError(f"{name}: image {list(values).index(None)} has no class; leave such images out")
    classes = sorted({str(label) for label in real_labels})
    absent = sorted({str(label) for label in labels} - set(classes))
    if absent:
        raise ValueError(
            f"no real image has the class {absent[0]!r}; classes of the real images: {', '.join(classes)}"
        )
    training = [arrays["real_features"], *([arrays["train_features"]] if train is not None else [])]
    names = [f"real image {row}" for row in range(len(training[0]))]
    names += [f"training image {row}" for row in range(sum(map(len, training[1:])))]
    return Pool(
        arrays["features"],
        np.array([str(label) for label in labels], dtype=object),
        arrays["real_features"],
        np.array([str(label) for label in real_labels], dtype=object),
        np.concatenate(training),
        names,
        held_out_features=arrays.get("held_out_features"),
    )


def _checked(name: str, rows: Any) -> np.ndarray:
    rows = np.asarray(rows, dtype=np.float32)
    if rows.ndim != 2 or not rows.size:
        raise ValueError(f"{name} must be images x features and not empty, not of the shape {rows.shape}")
    if not np.isfinite(rows).all():
        raise ValueError(f"{name}: row {int(np.argmin(np.isfinite(rows).all(1)))} has values that are not finite")
    return rows


def _check_length(name: str, values: Sequence | None, number: int) -> None:
    if values is not None and len(values) != number:
        raise ValueError(f"{name} has {len(values)} entries for {number} images")


def _probabilities(table: Any, classes: Sequence[str] | None, labels: np.ndarray) -> tuple[np.ndarray, list[str]]:
    table, names = np.asarray(table, dtype=np.float64), [str(name) for name in classes or ()]
    if table.shape != (len(labels), len(names)):
        raise ValueError(
            f"probabilities must be images x classes, {len(labels)} x {len(names)}, not of the shape {table.shape}"
        )
    lacking = sorted(set(labels.tolist()) - set(names))
    if lacking:
        raise ValueError(f"the classifier has no class {lacking[0]!r}; its classes: {', '.join(names)}")
    if not (np.isfinite(table).all() and table.min() >= 0 and table.max() <= 1 + 1e-6):
        raise ValueError("probabilities must lie in 0..1")
    return table, names


def _records(pool: Pool, names: Sequence[str] | None) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for index, label in enumerate(pool.labels.tolist()):
        name = {} if names is None else {"name": names[index]}
        decided = {"label": label, "kept": True, "rule": PASSED, "reason": "no rule dropped it"}
        records.append({"index": index, **name, **decided, "scores": {}, "thresholds": {}})
    return records


def _note(records: list[dict[str, Any]], rule: Rule, outcome: Outcome, alive: np.ndarray) -> None:
    """Enter a rule's scores, thresholds and decisions."""
    for score, values in outcome.scores.items():
        pairs = values.items() if isinstance(values, Mapping) else enumerate(values)
        for index, value in pairs:
            records[index]["scores"][score] = value if isinstance(value, str | int) else round(float(value), DIGITS)
    for index in alive.tolist():
        threshold = outcome.thresholds.get(records[index]["label"])
        if threshold is not None:
            records[index]["thresholds"][rule.spec()] = round(threshold, DIGITS)
    for index, reason in outcome.dropped.items():
        records[index] |= {"kept": False, "rule": rule.spec(), "reason": reason}


def _counts(labels: np.ndarray, every: np.ndarray) -> dict[str, int]:
    """Images of each class of `every` among `labels`."""
    return {label: int((labels == label).sum()) for label in sorted(set(every.tolist()))}
