"""The manifold functions against their formulas: endpoints, norms, convexity, moments.

python -m pytest tests/test_embedding_space.py
"""

import numpy as np
import pytest
import torch

from medisyn.generation.embedding_space import (
    covariance_root,
    lerp,
    mix,
    nearest_neighbours,
    perturb,
    slerp,
    within_class_covariance,
)


@pytest.fixture
def pair():
    rng = torch.Generator().manual_seed(0)
    return torch.randn(24, generator=rng) * 3, torch.randn(24, generator=rng)


# ---- between two embeddings -----------------------------------------------------------------------------------------


def test_lerp_is_the_straight_line_and_ends_exactly_at_its_parents(pair):
    first, second = pair
    assert torch.equal(lerp(first, second, 0.0), first) and torch.equal(lerp(first, second, 1.0), second)
    torch.testing.assert_close(lerp(first, second, 0.3), 0.7 * first + 0.3 * second)


def test_slerp_ends_at_its_parents(pair):
    first, second = pair
    torch.testing.assert_close(slerp(first, second, 0.0), first)
    torch.testing.assert_close(slerp(first, second, 1.0), second)


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.8])
def test_slerp_has_a_norm_between_and_divides_the_angle(pair, weight):
    first, second = pair
    between = slerp(first, second, weight)
    torch.testing.assert_close(between.norm(), (1 - weight) * first.norm() + weight * second.norm())

    def angle(a, b):
        return torch.arccos((a @ b) / a.norm() / b.norm())

    whole = angle(first, second)
    torch.testing.assert_close(angle(first, between), weight * whole, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(angle(between, second), (1 - weight) * whole, rtol=1e-3, atol=1e-4)
    # On a quarter of a circle the formula is known: the straight line would have the norm 0.707 in the middle.
    quarter = slerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), weight)
    torch.testing.assert_close(quarter, torch.tensor([np.cos(weight * np.pi / 2), np.sin(weight * np.pi / 2)]).float())


def test_slerp_joins_parallel_vectors_and_moves_tokens_one_by_one(pair):
    first, second = pair
    torch.testing.assert_close(slerp(first, 2 * first, 0.5), 1.5 * first)
    tokens = slerp(torch.stack([first, second]), torch.stack([second, 2 * second]), 0.25)
    torch.testing.assert_close(tokens, torch.stack([slerp(first, second, 0.25), 1.25 * second]))


def test_what_has_no_arc_is_refused(pair):
    first, second = pair
    with pytest.raises(ValueError, match="zeros"):
        slerp(first, torch.zeros_like(first), 0.5)
    with pytest.raises(ValueError, match="opposite"):
        slerp(first, -first, 0.5)
    for between in (lerp, slerp):
        with pytest.raises(ValueError, match="0..1, not 1.5"):
            between(first, second, 1.5)


# ---- among neighbours -----------------------------------------------------------------------------------------------


def test_neighbours_are_the_nearest_of_the_candidates():
    angles = torch.tensor([0.0, 0.1, 0.5, 0.2, 3.0])
    embeddings = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.tensor([1.0, 5.0, 1.0, 9.0, 1.0])[:, None]
    assert nearest_neighbours(embeddings, 0, range(5), 3) == [1, 3, 2]
    assert nearest_neighbours(embeddings, 0, [0, 2, 4], 2) == [2, 4]
    with pytest.raises(ValueError, match="3 nearest neighbours of 2 other images"):
        nearest_neighbours(embeddings, 0, [0, 2, 4], 3)


def test_a_mixture_lies_in_the_convex_hull():
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])  # inside: x >= 0, y >= 0, x + y / 2 <= 1
    rng = np.random.default_rng(0)
    for _ in range(200):
        weights = rng.dirichlet([0.3] * 3)
        x, y = mix(corners, weights).tolist()
        assert x == pytest.approx(weights[1]) and y == pytest.approx(2 * weights[2])
        assert min(x, y) >= 0 and x + y / 2 <= 1 + 1e-6
    assert torch.equal(mix(corners, [0, 1, 0]), corners[1])


@pytest.mark.parametrize(
    ("weights", "words"), [([0.5, 0.6], "sum to 1"), ([1.5, -0.5], "at least 0"), ([1.0], "1 wei")]
)
def test_weights_that_are_not_convex_are_refused(weights, words):
    with pytest.raises(ValueError, match=words):
        mix(torch.eye(2), weights)


# ---- around an embedding --------------------------------------------------------------------------------------------


def test_perturbations_have_the_covariance_within_the_classes():
    rng = np.random.default_rng(0)
    truth = np.array([[4.0, 1.5, 0.0], [1.5, 1.0, 0.2], [0.0, 0.2, 0.25]])
    classes = rng.integers(0, 4, 4000)
    centres = rng.normal(0, 50, (4, 3))  # far apart: the scatter between classes must not count
    embeddings = torch.from_numpy(centres[classes] + rng.multivariate_normal(np.zeros(3), truth, 4000))
    covariance = within_class_covariance(embeddings, classes.tolist())
    np.testing.assert_allclose(covariance, truth, atol=0.2)

    root = covariance_root(covariance)
    torch.testing.assert_close(root @ root.T, covariance)
    noise = torch.randn(20000, 3, generator=torch.Generator().manual_seed(0))
    near = perturb(embeddings[:1].float(), root, noise, scale=0.5)
    np.testing.assert_allclose(near.mean(0), embeddings[0], atol=0.05)
    np.testing.assert_allclose(np.cov(near.T.numpy()), 0.25 * covariance, atol=0.03)
    assert torch.equal(perturb(embeddings[0], root, noise[0], scale=0), embeddings[0])


def test_the_pooled_scatter_is_unbiased_and_shrinks_where_images_are_few():
    rng = np.random.default_rng(1)
    # many classes of two images: dividing by N would halve the variance
    pairs = torch.from_numpy(np.repeat(rng.normal(0, 9, (3000, 2)), 2, axis=0) + rng.normal(0, 1, (6000, 2)))
    np.testing.assert_allclose(
        within_class_covariance(pairs, np.repeat(np.arange(3000), 2).tolist()), np.eye(2), atol=0.1
    )
    few = torch.from_numpy(rng.normal(0, 1, (10, 40)))  # the plain estimate has rank 9
    assert torch.linalg.eigvalsh(within_class_covariance(few, ["a"] * 10)).min() > 0.1


def test_two_images_have_a_covariance_that_keeps_their_difference_and_their_variance():
    pair = torch.from_numpy(np.random.default_rng(2).normal(0, 1, (2, 40)))
    covariance = within_class_covariance(pair, ["a", "a"])
    assert torch.linalg.eigvalsh(covariance).min() > 0 and covariance_root(covariance).isfinite().all()
    along = (pair[0] - pair[1]) / (pair[0] - pair[1]).norm()
    torch.testing.assert_close(covariance.trace(), ((pair[0] - pair[1]) ** 2).sum() / 2)  # the unbiased variance
    assert along @ covariance @ along > 0.5 * covariance.trace()
    # a class of one beside them adds nothing
    alone = torch.cat([pair, torch.full((1, 40), 7.0).double()])
    assert torch.linalg.eigvalsh(within_class_covariance(alone, ["a", "a", "b"])).min() > 0


def test_a_covariance_of_nothing_is_refused():
    with pytest.raises(ValueError, match="two different images"):
        within_class_covariance(torch.eye(3), ["a", "b", "c"])
    with pytest.raises(ValueError, match="two different images"):
        within_class_covariance(torch.ones(3, 2), ["a"] * 3)
    with pytest.raises(ValueError, match="positive definite"):
        covariance_root(-torch.eye(2))
    with pytest.raises(ValueError, match="at least 0, not -1"):
        perturb(torch.ones(2), torch.eye(2), torch.ones(2), scale=-1)
