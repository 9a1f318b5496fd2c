"""Distances between feature sets: known answers."""

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from medisyn.evaluation.fidelity import (
    MINIMUM_IMAGES,
    fidelity,
    fidelity_by_value,
    frechet_distance,
    kernel_distance,
    nearest_training_distance,
    neighbourhood_scores,
    split_halves,
)


class Identity(torch.nn.Module):
    """Lets torchmetrics take features for images."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, features):
        return features


def normal(number, dimensions=8, shift=0.0, scale=1.0, seed=0):
    values = np.random.default_rng(seed).normal(shift, scale, (number, dimensions))
    return values.astype(np.float32)


@pytest.mark.parametrize(("number", "dimensions"), [(300, 8), (20, 64)])
def test_frechet_distance_equals_torchmetrics_with_many_and_with_few_images(number, dimensions):
    real, synthetic = normal(number, dimensions), normal(number + 7, dimensions, 0.3, 1.5, seed=1)
    metric = FrechetInceptionDistance(feature=Identity(dimensions))
    metric.update(torch.from_numpy(real).double(), real=True)
    metric.update(torch.from_numpy(synthetic).double(), real=False)
    assert frechet_distance(real, synthetic) == pytest.approx(float(metric.compute()), rel=1e-4)


def test_frechet_distance_of_equal_shifted_and_scaled_sets():
    features = normal(100)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(features, features + 2) == pytest.approx(8 * 2**2, rel=1e-5)
    # Centred Gaussians with covariance C and 9 C: the trace of (1 - 3)^2 C.
    centred = features - features.mean(0)
    trace = np.cov(centred.T).trace()
    assert frechet_distance(centred, 3 * centred) == pytest.approx(4 * trace, rel=1e-5)


def test_kernel_distance_is_unbiased_and_its_error_covers_the_deviation_between_samples():
    values = [kernel_distance(normal(100, seed=2 * s), normal(100, seed=2 * s + 1)) for s in range(40)]
    estimates, errors = np.array(values).T
    assert abs(estimates.mean()) < 3 * estimates.std() / 40**0.5
    assert estimates.min() < 0 < estimates.max()
    apart = [kernel_distance(normal(100, seed=2 * s), normal(100, shift=1, seed=2 * s + 1)) for s in range(40)]
    estimates, errors = np.array(apart).T
    assert estimates.min() > 10 * np.abs(np.array(values)[:, 0]).max()
    assert np.median(errors) == pytest.approx(estimates.std(), rel=0.5)


def test_kernel_distance_needs_equal_and_large_enough_sets():
    with pytest.raises(ValueError, match="not 30 with 31"):
        kernel_distance(normal(30), normal(31))
    with pytest.raises(ValueError, match="5 images are too few"):
        kernel_distance(normal(5), normal(5))


def test_neighbourhood_scores_of_constructed_clusters():
    left, right = normal(50, seed=0), normal(50, shift=100, seed=1)
    both = np.concatenate([left, right])
    same = neighbourhood_scores(left, left)
    assert same["precision"] == same["recall"] == same["coverage"] == 1
    apart = neighbourhood_scores(left, right)
    assert apart == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}
    # A generator that makes one of two kinds: all it makes is real, and half of what is real it makes.
    collapsed = neighbourhood_scores(both, left)
    assert collapsed["precision"] == 1 and collapsed["recall"] == pytest.approx(0.5)
    assert collapsed["coverage"] == pytest.approx(0.5)
    # One that also makes another kind: half of what it makes is real.
    invented = neighbourhood_scores(left, both)
    assert invented["precision"] == pytest.approx(0.5) and invented["recall"] == 1
    with pytest.raises(ValueError, match="3 images are too few"):
        neighbourhood_scores(left, right[:3])


def test_nearest_training_distance_is_zero_for_a_copy_at_any_scale():
    training = normal(700)
    features = np.concatenate([3 * training[5:6], -training[:1]])
    distances = nearest_training_distance(features, training)
    assert distances[0] == pytest.approx(0, abs=1e-6) and distances[1] > 0.1
    assert nearest_training_distance(training, training).max() < 1e-6


def test_halves_share_no_patient_and_have_the_same_mixture():
    rng = np.random.default_rng(0)
    patients = [f"p{i}" for i in rng.integers(0, 60, 300)]
    findings = ["a" if int(patient[1:]) % 3 else "b" for patient in patients]
    first, second = split_halves(patients, findings, seed=1)
    assert sorted([*first, *second]) == list(range(300))
    assert not {patients[i] for i in first} & {patients[i] for i in second}
    shares = [sum(findings[i] == "a" for i in half) for half in (first, second)]
    assert abs(shares[0] - shares[1]) <= 6 and abs(len(first) - len(second)) <= 6
    assert not np.array_equal(first, split_halves(patients, findings, seed=2)[0])


def test_fidelity_gives_each_value_beside_real_against_real_at_one_sample_size():
    real, good, bad = normal(300), normal(120, seed=1), normal(120, shift=1.0, seed=2)
    result = fidelity(real, good)
    assert result["images"] == 120
    assert 0.5 < result["frechet_distance"]["ratio"] < 2
    assert set(result["kernel_distance"]) == {
        "synthetic",
        "real",
        "synthetic_standard_error",
        "real_standard_error",
    }
    worse = fidelity(real, bad)
    assert worse["frechet_distance"]["ratio"] > 5
    assert worse["frechet_distance"]["real"] == result["frechet_distance"]["real"]
    assert worse["coverage"]["synthetic"] < result["coverage"]["synthetic"]


def test_too_few_images_or_patients_are_a_sentence_not_a_number():
    few = MINIMUM_IMAGES - 1
    assert f"{few} synthetic" in fidelity(normal(300), normal(few))["omitted"]
    one_patient = fidelity(normal(300), normal(300), groups=["same"] * 300)
    assert "300 + 0 real" in one_patient["omitted"]
    by_value = fidelity_by_value(normal(120), normal(60), ["a"] * 80 + ["b"] * 40, ["a"] * 50 + ["c"] * 9 + [None])
    assert by_value["a"]["images"] == 40
    assert "omitted" in by_value["b"] and "omitted" in by_value["c"]
