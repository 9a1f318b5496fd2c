"""What `compare.py` measures: agreement with the class asked for, distances, diversity, near copies.

scores = measure(sets, features, ["guided student"], classes, "finding", "group_id")
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import typer
from comparison_page import mean

from medisyn.data.loading import ImageDataset
from medisyn.evaluation import fidelity_by_value, label_agreement
from medisyn.evaluation.agreement import LabelledFeatures, fit_classifier
from medisyn.evaluation.fidelity import nearest_training_distance
from medisyn.evaluation.judge import train_judge
from medisyn.evaluation.utility_classifier import CnnClassifier

NEAR_COPY = 0.95  # cosine similarity


def measure(
    sets: Mapping[str, ImageDataset],
    features: Mapping[str, np.ndarray],
    drawn: Sequence[str],
    classes: Sequence[str],
    class_column: str,
    group_column: str | None,
    inputs: Mapping[str, np.ndarray] | None = None,
    fit: Callable[[np.ndarray, Sequence[str]], Any] = fit_classifier,
) -> dict[str, Any]:
    """All scores of the drawn sets and, under "real", those of real images; see `compare.py`.

    Args:
        sets: "training", "real" (of validation), the drawn ones, and "labelled" where there are such.
        features: Of each, (N, D): for distances.
        drawn: Names of the drawn ones.
        classes: In order.
        class_column: Of real images; drawn ones have the last part of its name.
        group_column: Of real images.
        inputs: What the judge of the classes sees; None: the features.
        fit: See `label_agreement`.
    """
    inputs = features if inputs is None else inputs
    field = class_column.rpartition(".")[2]
    columns = {name: class_column if name in ("training", "real", "labelled") else field for name in sets}
    labels = {name: [str(value) for value in images.column(columns[name])] for name, images in sets.items()}
    groups = {name: sets[name].column(group_column) if group_column else None for name in ("training", "real")}
    training = LabelledFeatures(inputs["training"], labels["training"], groups=groups["training"])
    asked = {name: LabelledFeatures(inputs[name], labels[name], groups=groups.get(name)) for name in ("real", *drawn)}
    agreement = label_agreement(training, asked, fit=fit)
    result: dict[str, Any] = {"chance": agreement["chance"], "ways": {}}
    result["real"] = {
        **_agreement(agreement["real"]),
        "diversity": diversity(features["training"], labels["training"]),
    }
    for name in drawn:
        ours = {**_agreement(agreement[name]), "diversity": diversity(features[name], labels[name])}
        distances = fidelity_by_value(
            features["training"], features[name], labels["training"], labels[name], groups["training"]
        )
        known = {value: found for value, found in distances.items() if "omitted" not in found}
        ours["frechet_distance"] = {value: found["frechet_distance"]["synthetic"] for value, found in known.items()}
        ours["recall"] = mean(found["recall"]["synthetic"] for found in known.values())
        result["real"]["frechet_distance"] = {v: found["frechet_distance"]["real"] for v, found in known.items()}
        result["real"]["recall"] = mean(found["recall"]["real"] for found in known.values())
        for kind, others in (("labelled", features.get("labelled")), ("training", features["training"])):
            if others is not None:
                near = 1 - nearest_training_distance(features[name], others) > NEAR_COPY
                ours[f"near_copies_of_{kind}"] = float(near.mean())
        result["ways"][name] = ours
    return result


def measure_by_cnn(
    cnn: CnnClassifier,
    sets: Mapping[str, ImageDataset],
    drawn: Sequence[str],
    classes: Sequence[str],
    class_column: str,
    group_column: str | None,
    cache_dir: Path,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """How a CNN was trained on the classes of the training images, and the same scores by it and in its features."""
    judge = train_judge(cnn, sets["training"], (class_column,), cache_dir=cache_dir)
    pixels = {name: judge.cnn.inputs(images).numpy() for name, images in sets.items()}
    features = {name: judge.features(own) for name, own in pixels.items()}
    scores = measure(sets, features, drawn, classes, class_column, group_column, pixels, judge.restrict)
    for way in scores["ways"].values():  # features that were made to bring a class together tell of no copies
        for name in [name for name in way if name.startswith("near_copies")]:
            del way[name]
    return judge.describe(), scores


def diversity(features: np.ndarray, labels: Sequence[str]) -> float:
    """Mean cosine distance, in [0, 2], between two images of a class; mean over classes of two images or more."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    found = []
    for value in sorted(set(labels)):
        part = unit[[label == value for label in labels]]
        if len(part) > 1:
            total = np.square(part.sum(0, dtype=np.float64)).sum() - len(part)  # of all pairs' similarities, twice
            found.append(1 - total / (len(part) * (len(part) - 1)))
    return float(np.mean(found))


def _agreement(scores: Mapping[str, Any]) -> dict[str, Any]:
    if "omitted" in scores:
        raise typer.BadParameter(f"agreement cannot be measured: {scores['omitted']}")
    recalls = {value: found["recall"] for value, found in scores["per_class"].items()}
    interval = scores["balanced_accuracy_interval"]
    return {"agreement": scores["balanced_accuracy"], "agreement_interval": interval, "agreement_per_class": recalls}
