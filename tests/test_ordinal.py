"""Ordered values: which column has them, in which order, and how well predictions follow it."""

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from medisyn.evaluation.agreement import LabelledFeatures, label_agreement
from medisyn.evaluation.ordinal import find_grades, order_grades, parse_ordinal
from medisyn.evaluation.scores import score_grades

KL = tuple(f"KL grade {grade}" for grade in range(5))


def test_an_ordinal_column_is_named_with_or_without_the_order_of_its_values():
    assert parse_ordinal(None) == {}
    assert parse_ordinal("finding") == {"finding": None}
    assert parse_ordinal(["finding", "birads=1, 2,4a"]) == {"finding": None, "birads": ("1", "2", "4a")}
    assert parse_ordinal({"extra.grade": [0, 1], "finding": None}) == {"extra.grade": ("0", "1"), "finding": None}


@pytest.mark.parametrize(
    ("ordinal", "message"),
    [
        ("", "has no column"),
        ("=a,b", "has no column"),
        (["finding", "finding=a,b"], "names 'finding' twice"),
        ("finding=a", "two or more different values, not 'a'"),
        ("finding=a,,b", "two or more different values"),
        ("finding=a,b,a", "two or more different values"),
    ],
)
def test_a_wrong_order_is_refused(ordinal, message):
    with pytest.raises(ValueError, match=message):
        parse_ordinal(ordinal)


def test_numbers_at_the_end_order_the_values():
    assert order_grades({"KL grade 10", "KL grade 9", "KL grade 0"}) == ("KL grade 0", "KL grade 9", "KL grade 10")
    assert order_grades({"2", "1", "1.5"}) == ("1", "1.5", "2")
    assert order_grades({"normal", "COVID-19"}) is None
    assert order_grades({"left 1", "right 1"}) is None  # which of the two is more?
    assert order_grades({"grade 1"}) is None
    assert order_grades({"mild", "none"}, ("none", "mild", "severe")) == ("none", "mild", "severe")
    assert order_grades({"mild", "moderate"}, ("none", "mild", "severe")) is None


def test_grades_are_found_within_each_outer_value_that_is_evaluated():
    labels, within = [*KL, "normal", "pneumonia", None], ["knee"] * 5 + ["chest"] * 3
    assert find_grades("finding", None, labels, within) == {"knee": KL}
    assert find_grades("grade", None, KL) == {"": KL}
    assert find_grades("finding", ("normal", "pneumonia"), labels, within) == {"chest": ("normal", "pneumonia")}
    with pytest.raises(ValueError, match="'finding' are no grades.*normal, pneumonia.*finding=normal"):
        find_grades("finding", None, labels, within, wanted={"chest"})
    with pytest.raises(ValueError, match="does not cover its values: .*pneumonia; given: mild, severe"):
        find_grades("finding", ("mild", "severe"), labels, within)


def test_kappa_is_that_of_its_definition_and_counts_far_errors_more():
    rng = np.random.default_rng(0)
    labels = rng.integers(5, size=200)
    predicted = np.where(rng.random(200) < 0.5, labels, rng.integers(5, size=200))
    # Cohen 1968: 1 - mean squared difference / that of all pairs.
    expected = 1 - np.mean((labels - predicted) ** 2) / np.mean((labels[:, None] - predicted) ** 2)
    scores = score_grades([KL[i] for i in predicted], [KL[i] for i in labels], KL)
    assert scores["quadratic_weighted_kappa"] == pytest.approx(expected)
    assert cohen_kappa_score(labels, predicted, weights="quadratic") == pytest.approx(expected)
    low, high = scores["quadratic_weighted_kappa_interval"]
    assert low < expected < high and high - low < 0.5
    assert scores["images"] == 200 and scores["grades"] == list(KL)

    def kappa(predicted):
        return score_grades(predicted, list(KL) * 4, KL)["quadratic_weighted_kappa"]

    assert kappa(list(KL) * 4) == 1
    assert kappa([KL[4 - index] for index in range(5)] * 4) == pytest.approx(-1)
    assert kappa([KL[2]] * 20) == 0
    near, far = list(KL) * 4, list(KL) * 4
    near[0], far[0] = KL[1], KL[4]
    assert 1 > kappa(near) > kappa(far) > 0


def test_the_interval_of_kappa_widens_with_patients():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(40) % 5, 10)
    predicted = (labels + np.repeat(rng.integers(3, size=40), 10)) % 5
    names, found = [KL[i] for i in labels], [KL[i] for i in predicted]
    single = score_grades(found, names, KL)["quadratic_weighted_kappa_interval"]
    patients = score_grades(found, names, KL, np.repeat(np.arange(40), 10).tolist())
    low, high = patients["quadratic_weighted_kappa_interval"]
    assert high - low > 2 * (single[1] - single[0])


def test_one_grade_says_nothing():
    assert "fewer than two grades" in score_grades(KL, [KL[0]] * 5, KL)["omitted"]
    assert "fewer than two grades" in score_grades([], [], KL)["omitted"]


def test_grades_are_judged_by_the_classifier_of_findings():
    rng = np.random.default_rng(0)

    def knees_and_chests(number):
        grade = np.arange(number) % 5
        features = rng.normal(0, 0.05, (2 * number, 8))
        features[np.arange(number), grade] += 1
        features[number:, 5 + np.arange(number) % 2] += 1
        findings = [KL[i] for i in grade] + [("normal", "pneumonia")[i % 2] for i in range(number)]
        return features.astype(np.float32), findings, ["knee"] * number + ["chest"] * number

    training, real = knees_and_chests(50), knees_and_chests(20)
    swapped = [{KL[0]: KL[4], KL[4]: KL[0]}.get(finding, finding) for finding in real[1]]
    result = label_agreement(
        LabelledFeatures(*training),
        {"real": LabelledFeatures(*real), "synthetic": LabelledFeatures(real[0], swapped, real[2])},
        grades={"knee": KL},
    )
    assert set(result["real"]["ordinal"]) == {"knee"}
    assert result["real"]["ordinal"]["knee"]["quadratic_weighted_kappa"] == 1
    assert result["real"]["ordinal"]["knee"]["images"] == 20
    assert result["synthetic"]["ordinal"]["knee"]["quadratic_weighted_kappa"] < 0
    knees = label_agreement(
        LabelledFeatures(training[0][:50], training[1][:50]),
        {"real": LabelledFeatures(real[0][:20], real[1][:20])},
        grades={"": KL},
    )
    assert knees["real"]["ordinal"]["all"]["quadratic_weighted_kappa"] == 1
