"""Label agreement: a classifier of real features asked about real and synthetic images."""

import numpy as np
import pytest

from medisyn.evaluation.agreement import LabelledFeatures, label_agreement
from medisyn.evaluation.scores import score_predictions

CENTRES = {("CT", "normal"): 0, ("CT", "nodule"): 1, ("MRI", "normal"): 2, ("MRI", "glioma"): 3}


def clusters(number, seed, pairs=tuple(CENTRES), spread=0.1):
    """`number` images of each (modality, finding): columns of labels, and features around one axis each."""
    rng = np.random.default_rng(seed)
    rows = [pair for pair in pairs for _ in range(number)]
    features = rng.normal(0, spread, (len(rows), 6))
    features[np.arange(len(rows)), [CENTRES[pair] for pair in rows]] += 1
    return features.astype(np.float32), [modality for modality, _ in rows], [finding for _, finding in rows]


def test_separable_classes_agree_and_swapped_labels_do_not():
    features, modality, _ = clusters(20, 0)
    other, labels, _ = clusters(10, 1)
    swapped = [{"CT": "MRI", "MRI": "CT"}[label] for label in labels]
    result = label_agreement(
        LabelledFeatures(features, modality),
        {"real": LabelledFeatures(other, labels), "synthetic": LabelledFeatures(other, swapped)},
    )
    assert result["real"]["accuracy"] == result["real"]["balanced_accuracy"] == 1
    assert result["synthetic"]["accuracy"] == 0
    assert result["chance"] == 0.5
    assert result["synthetic"]["confusion_matrix"] == {"classes": ["CT", "MRI"], "counts": [[0, 20], [20, 0]]}


def test_a_finding_is_judged_within_its_modality():
    features, modality, finding = clusters(20, 0)
    other, other_modality, other_finding = clusters(10, 1)
    result = label_agreement(
        LabelledFeatures(features, finding, modality), {"real": LabelledFeatures(other, other_finding, other_modality)}
    )["real"]
    assert set(result["per_class"]) == {"CT / normal", "CT / nodule", "MRI / normal", "MRI / glioma"}
    assert result["by_outer_value"]["CT"] == {"images": 20, "accuracy": 1.0, "balanced_accuracy": 1.0}
    # No CT image is ever called a glioma: that class belongs to another modality.
    matrix = result["confusion_matrix"]
    glioma = matrix["classes"].index("MRI / glioma")
    assert matrix["counts"][matrix["classes"].index("CT / normal")][glioma] == 0


def test_classes_that_cannot_be_judged_are_left_out_with_a_reason():
    features, modality, finding = clusters(20, 0, [("CT", "normal"), ("CT", "nodule"), ("MRI", "normal")])
    other, other_modality, other_finding = clusters(10, 1)
    other_finding[0] = None
    other_finding[10] = "fracture"
    result = label_agreement(
        LabelledFeatures(features, finding, modality),
        {"synthetic": LabelledFeatures(other, other_finding, other_modality)},
    )
    assert result["synthetic"]["images"] == 18
    assert set(result["omitted_classes"]) == {"MRI / normal", "MRI / glioma", "CT / fracture"}
    nothing = LabelledFeatures(other, [None] * len(other), other_modality)
    result = label_agreement(LabelledFeatures(features, finding, modality), {"synthetic": nothing})
    assert "no image has a label" in result["synthetic"]["omitted"]
    single = label_agreement(LabelledFeatures(features, ["same"] * len(features)), {})
    assert "fewer than two classes" in single["omitted"]


def test_scores_of_known_predictions():
    labels = ["a"] * 8 + ["b"] * 2
    predicted = ["a"] * 8 + ["a", "c"]
    scores = score_predictions(predicted, labels)
    assert scores["accuracy"] == pytest.approx(0.8) and scores["balanced_accuracy"] == pytest.approx(0.5)
    assert scores["per_class"] == {"a": {"images": 8, "recall": 1.0}, "b": {"images": 2, "recall": 0.0}}
    assert scores["confusion_matrix"] == {"classes": ["a", "b", "c"], "counts": [[8, 0, 0], [1, 0, 1], [0, 0, 0]]}
    assert scores == score_predictions(predicted, labels)


def test_the_interval_covers_the_binomial_deviation_and_widens_with_patients():
    rng = np.random.default_rng(0)
    labels = ["a"] * 200
    right = np.repeat(rng.random(20) < 0.7, 10)  # ten images of each of twenty patients, all right or all wrong
    predicted = ["a" if value else "b" for value in right]
    low, high = score_predictions(predicted, labels)["accuracy_interval"]
    share = right.mean()
    assert high - low == pytest.approx(2 * 1.96 * (share * (1 - share) / 200) ** 0.5, rel=0.2)
    patients = np.repeat(np.arange(20), 10).tolist()
    low_patients, high_patients = score_predictions(predicted, labels, patients)["accuracy_interval"]
    assert high_patients - low_patients > 2 * (high - low)
