"""Label agreement: does a synthetic image show what was asked for?

A logistic regression on standardised features is fitted on real training images and asked about real validation images
and about synthetic ones. The first score is the ceiling: where the classifier cannot tell two findings apart in real
photographs, no generator can be blamed for it.

Notable choices:

* Classes are the values of a column. For a column nested in another (a finding within its modality) there is one
  classifier per outer value, fitted and asked only about images of that value, since "normal" in a fundus photograph
  and "normal" in a chest X-ray have nothing in common; the joint class is written "fundus photography / normal".
* Classes are weighted equally in the fit, and balanced accuracy (mean recall over classes) stands beside accuracy.
* Confidence intervals resample patients, not images, where real images have a patient.
* Grades get a quadratic-weighted kappa of the same predictions, since grade 2 for grade 3 is nearly right.
* Only outer values that are evaluated are fitted: those of a whole corpus cost minutes beside one new specialty.
* The classifier can be another: frozen features read faint texture, which an autoencoder may take from an image whose
  class is still there to see. A CNN of the domain (`medisyn.evaluation.judge`) is a second opinion.

    labelled = LabelledFeatures(features, labels=table["modality"])
    label_agreement(training, {"real": validation, "synthetic": labelled})["synthetic"]["accuracy"]
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .scores import balanced_accuracy, score_grades, score_predictions

REGULARISATION = 0.01  # inverse strength C; chosen on real validation images, where 0.001–0.1 differ by under 0.02


@dataclass(frozen=True)
class LabelledFeatures:
    """Features (N, D) with one label per image.

    Attributes:
        features: One row per image; pixels (N, 3, S, S) for a classifier that takes those.
        labels: The class of each image; None where it is not known.
        within: The outer value of each image where the column is nested in another, None where it is not known.
        groups: Patient of each image, for the confidence interval.
    """

    features: np.ndarray
    labels: Sequence[str | None]
    within: Sequence[str | None] | None = None
    groups: Sequence[Hashable] | None = None

    def classes(self) -> list[str | None]:
        """The joint class of each image: "outer / label" for a nested column."""
        if self.within is None:
            return list(self.labels)
        pairs = zip(self.within, self.labels, strict=True)
        return [None if outer is None or label is None else f"{outer} / {label}" for outer, label in pairs]

    def outer(self) -> list[str | None]:
        """The outer value of each image: "" for a column that is not nested."""
        return [""] * len(self.labels) if self.within is None else list(self.within)


def fit_classifier(features: np.ndarray, labels: Sequence[str]):
    """Scikit-learn pipeline (standardisation, logistic regression) fitted on features (N, D); at least two classes."""
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError("label agreement needs scikit-learn: pip install medisyn[eval]") from error
    regression = LogisticRegression(C=REGULARISATION, class_weight="balanced", max_iter=500, tol=1e-3)
    return make_pipeline(StandardScaler(), regression).fit(features, np.asarray(labels))


def label_agreement(
    training: LabelledFeatures,
    evaluated: Mapping[str, LabelledFeatures],
    seed: int = 0,
    grades: Mapping[str, Sequence[str]] | None = None,
    fit: Callable[[np.ndarray, Sequence[str]], Any] = fit_classifier,
) -> dict:
    """Fit on `training`, score each of `evaluated`.

    Args:
        training: Real training images.
        evaluated: Name, such as "real" or "synthetic", to images with the labels they have or were asked to have.
        seed: Of the bootstrap.
        grades: For an ordinal column, outer value ("" if it is not nested) to all its labels, lowest first.
        fit: Features and labels to a classifier with `classes_` and `predict`.

    Returns:
        `chance` (expected balanced accuracy of guessing), `training_images` (their number), `omitted_classes` (class
        to reason) and, per name of `evaluated`, what `score_predictions` returns, with `by_outer_value` for a nested
        column and `ordinal` (outer value, or "all", to what `score_grades` returns) for one with grades; or
        `{"omitted": reason}`.
    """
    training_classes, outer = training.classes(), training.outer()
    wanted = {value for images in evaluated.values() for value in images.outer()}
    classifiers, omitted, chances = {}, {}, []
    for value in sorted({value for value in outer if value is not None} & wanted):
        own = {row: known for row, known in enumerate(training_classes) if known is not None and outer[row] == value}
        classes = sorted(set(own.values()))
        if len(classes) < 2:
            omitted.update(dict.fromkeys(classes, "the only class here among the training images"))
            continue
        classifiers[value] = fit(training.features[list(own)], list(own.values()))
        chances += [1 / len(classes)] * len(classes)
    if not classifiers:
        return {"omitted": "the training images have fewer than two classes to tell apart"}
    result: dict = {"chance": float(np.mean(chances)), "training_images": len(training.features)}
    for name, images in evaluated.items():
        result[name] = _score(classifiers, omitted, images, seed, grades or {})
    return result | {"omitted_classes": omitted}


def _score(classifiers: dict, omitted: dict, images: LabelledFeatures, seed: int, grades: Mapping) -> dict:
    """Scores of one set; classes that training images do not have are added to `omitted`."""
    outer = images.outer()
    labels = {row: label for row, label in enumerate(images.classes()) if label is not None}
    known = {label for classifier in classifiers.values() for label in classifier.classes_.tolist()}
    for label in sorted(set(labels.values()) - known):
        omitted.setdefault(label, "not among the training images")
    predicted: dict[int, str] = {}
    parts: dict[str, list[int]] = {}
    for value, classifier in classifiers.items():
        own = [row for row, label in labels.items() if outer[row] == value and label in known]
        if own:
            parts[value] = own
            predicted.update(zip(own, classifier.predict(images.features[own]).tolist(), strict=True))
    if not predicted:
        return {"omitted": "no image has a label that the training images have"}

    def select(rows: Sequence[int]) -> tuple[list[str], list[str], list[Hashable] | None]:
        groups = None if images.groups is None else [images.groups[row] for row in rows]
        return [predicted[row] for row in rows], [labels[row] for row in rows], groups

    scores = score_predictions(*select(list(predicted)), seed=seed)
    if images.within is not None:
        scores["by_outer_value"] = {}
        for value, own in parts.items():
            own_predicted, own_labels, _ = select(own)
            scores["by_outer_value"][value] = {
                "images": len(own),
                "accuracy": float(np.mean([a == b for a, b in zip(own_labels, own_predicted, strict=True)])),
                "balanced_accuracy": balanced_accuracy(own_labels, own_predicted),
            }
    if grades:
        scores["ordinal"] = {}
        for value, order in grades.items():
            own_predicted, own_labels, groups = select(parts.get(value, []))
            prefix = len(f"{value} / ") if images.within is not None else 0
            scores["ordinal"][value or "all"] = score_grades(
                [label[prefix:] for label in own_predicted],
                [label[prefix:] for label in own_labels],
                order,
                groups,
                seed=seed,
            )
    return scores
