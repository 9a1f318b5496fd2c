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

    labelled = LabelledFeatures(features, labels=table["modality"])
    label_agreement(training, {"real": validation, "synthetic": labelled})["synthetic"]["accuracy"]
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

REGULARISATION = 0.01  # inverse strength C; chosen on real validation images, where 0.001–0.1 differ by under 0.02
RESAMPLES = 1000


@dataclass(frozen=True)
class LabelledFeatures:
    """Features (N, D) with one label per image.

    Attributes:
        features: One row per image.
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


def label_agreement(training: LabelledFeatures, evaluated: Mapping[str, LabelledFeatures], seed: int = 0) -> dict:
    """Fit on `training`, score each of `evaluated`.

    Args:
        training: Real training images.
        evaluated: Name, such as "real" or "synthetic", to images with the labels they have or were asked to have.
        seed: Of the bootstrap.

    Returns:
        `chance` (expected balanced accuracy of guessing), `training_images` (their number), `omitted_classes` (class
        to reason) and, per name of `evaluated`, what `score_predictions` returns, with `by_outer_value` for a nested
        column; or `{"omitted": reason}`.
    """
    training_classes = training.classes()
    outer = training.within if training.within is not None else [""] * len(training_classes)
    classifiers, omitted, chances = {}, {}, []
    for value in sorted({value for value in outer if value is not None}):
        rows = [row for row, known in enumerate(training_classes) if known is not None and outer[row] == value]
        classes = sorted({training_classes[row] for row in rows})
        if len(classes) < 2:
            omitted.update(dict.fromkeys(classes, "the only class here among the training images"))
            continue
        classifiers[value] = fit_classifier(training.features[rows], [training_classes[row] for row in rows])
        chances += [1 / len(classes)] * len(classes)
    if not classifiers:
        return {"omitted": "the training images have fewer than two classes to tell apart"}
    result: dict = {"chance": float(np.mean(chances)), "training_images": len(training.features)}
    for name, images in evaluated.items():
        result[name] = _score(classifiers, omitted, images, seed)
    return result | {"omitted_classes": omitted}


def _score(classifiers: dict, omitted: dict, images: LabelledFeatures, seed: int) -> dict:
    """Scores of one set; classes that training images do not have are added to `omitted`."""
    classes = images.classes()
    outer = images.within if images.within is not None else [""] * len(classes)
    rows, predicted = [], []
    for value, classifier in classifiers.items():
        known = set(classifier.classes_.tolist())
        own = [row for row, label in enumerate(classes) if outer[row] == value and label is not None]
        omitted.update(dict.fromkeys({classes[row] for row in own} - known, "not among the training images"))
        own = [row for row in own if classes[row] in known]
        if own:
            rows += own
            predicted += classifier.predict(images.features[own]).tolist()
    if not rows:
        return {"omitted": "no image has a label that the training images have"}
    groups = None if images.groups is None else [images.groups[row] for row in rows]
    labels = [classes[row] for row in rows]
    scores = score_predictions(predicted, labels, groups, seed=seed)
    if images.within is not None:
        scores["by_outer_value"] = {}
        for value in classifiers:
            own = [position for position, row in enumerate(rows) if outer[row] == value]
            if own:
                own_labels, own_predicted = [labels[i] for i in own], [predicted[i] for i in own]
                scores["by_outer_value"][value] = {
                    "images": len(own),
                    "accuracy": float(np.mean([a == b for a, b in zip(own_labels, own_predicted, strict=True)])),
                    "balanced_accuracy": _balanced_accuracy(own_labels, own_predicted),
                }
    return scores


def score_predictions(
    predicted: Sequence[str],
    labels: Sequence[str],
    groups: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict:
    """Accuracy, balanced accuracy, recall per class and confusion matrix.

    Args:
        predicted: Class that the classifier gave each image.
        labels: Class that each image has or was asked to have.
        groups: Images of one group (patient) are drawn together in the bootstrap; None draws single images.
        resamples: Bootstrap draws for the 95 % percentile intervals.
        seed: Of the bootstrap.

    Returns:
        `images`, `accuracy`, `balanced_accuracy`, their `*_interval` [low, high], `per_class` (class to images and
        recall) and `confusion_matrix` (classes; counts, one row per label, one column per prediction).
    """
    classes = sorted({*labels, *predicted})
    label_index = np.array([classes.index(label) for label in labels])
    right = np.asarray(predicted) == np.asarray(labels)
    scores: dict = {
        "images": len(labels),
        "accuracy": float(right.mean()),
        "balanced_accuracy": _balanced_accuracy(labels, predicted),
    }
    draws = _bootstrap(label_index, right, groups, resamples, seed)
    for name, values in zip(("accuracy", "balanced_accuracy"), draws, strict=True):
        scores[f"{name}_interval"] = [float(bound) for bound in np.percentile(values, (2.5, 97.5))]
    counts = np.zeros((len(classes), len(classes)), dtype=int)
    np.add.at(counts, (label_index, [classes.index(label) for label in predicted]), 1)
    scores["per_class"] = {
        label: {"images": int(row.sum()), "recall": float(row[index] / row.sum())}
        for index, (label, row) in enumerate(zip(classes, counts, strict=True))
        if row.sum()
    }
    scores["confusion_matrix"] = {"classes": classes, "counts": counts.tolist()}
    return scores


def _balanced_accuracy(labels: Sequence[str], predicted: Sequence[str]) -> float:
    """Mean recall over the classes that occur among `labels`."""
    from sklearn.metrics import recall_score

    return float(recall_score(labels, predicted, labels=sorted(set(labels)), average="macro", zero_division=0))


def _bootstrap(
    label_index: np.ndarray, right: np.ndarray, groups: Sequence[Hashable] | None, resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy and balanced accuracy of `resamples` draws of groups with replacement."""
    names = range(len(right)) if groups is None else groups
    position = {name: index for index, name in enumerate(dict.fromkeys(names))}
    group_index = np.array([position[name] for name in names])
    number = len(position)
    rng = np.random.default_rng(seed)
    accuracy, balanced = np.empty(resamples), np.empty(resamples)
    for draw in range(resamples):
        weight = np.bincount(rng.integers(number, size=number), minlength=number)[group_index].astype(float)
        accuracy[draw] = np.average(right, weights=weight)
        total = np.bincount(label_index, weight)
        drawn = total > 0  # a draw may miss a rare class
        balanced[draw] = np.mean(np.bincount(label_index, weight * right)[drawn] / total[drawn])
    return accuracy, balanced
