"""The small labelled part of a data set."""

import numpy as np
import pytest

from medisyn.data.subsets import class_names, stratified_subset

CLASSES = ["glioma"] * 100 + ["no tumor"] * 40 + [None] * 10 + ["rare"] * 3
GROUPS = [f"p{row // 4}" for row in range(len(CLASSES))]


def chosen(fraction: float, seed: int = 0) -> set[int]:
    return set(stratified_subset(CLASSES, GROUPS, fraction, seed).tolist())


def test_every_class_keeps_its_share_in_whole_groups():
    rows = stratified_subset(CLASSES, GROUPS, 0.2)
    assert [CLASSES[row] for row in rows].count("glioma") == 20
    assert [CLASSES[row] for row in rows].count("no tumor") == 8
    assert "rare" in {CLASSES[row] for row in rows}
    assert None not in {CLASSES[row] for row in rows}
    for row in rows:  # whole groups of a class
        members = {i for i, group in enumerate(GROUPS) if group == GROUPS[row] and CLASSES[i] == CLASSES[row]}
        assert members <= set(rows.tolist())


def test_the_same_seed_keeps_the_same_rows_and_less_is_part_of_more():
    assert chosen(0.2) == chosen(0.2)
    assert chosen(0.2) != chosen(0.2, seed=1)
    assert chosen(0.05) < chosen(0.2) < chosen(0.7)
    assert chosen(1.0) == {row for row, name in enumerate(CLASSES) if name}


def test_the_order_of_the_data_does_not_matter():
    order = np.random.default_rng(0).permutation(len(CLASSES))
    again = stratified_subset([CLASSES[i] for i in order], [GROUPS[i] for i in order], 0.2)
    assert {int(order[row]) for row in again} == chosen(0.2)


def test_rows_without_a_group_are_groups_of_their_own():
    assert len(stratified_subset(["a"] * 40 + ["b"] * 20, None, 0.05)) == 3
    assert len(stratified_subset(["a"] * 40 + ["b"] * 20, [None] * 60, 0.05)) == 3


@pytest.mark.parametrize("fraction", [0.0, 1.5, -0.1])
def test_a_fraction_outside_its_range(fraction):
    with pytest.raises(ValueError, match=f"label_fraction must be above 0 and at most 1, not {fraction}"):
        stratified_subset(CLASSES, GROUPS, fraction)


def test_classes_are_checked():
    assert class_names(CLASSES) == ("glioma", "no tumor", "rare")
    assert class_names(CLASSES, ("no tumor", "glioma")) == ("no tumor", "glioma")
    with pytest.raises(ValueError, match=r"class 'lymphoma' has no image .*glioma \(100\), no tumor \(40\)"):
        class_names(CLASSES, ("glioma", "lymphoma"))
    with pytest.raises(ValueError, match="class 'c' has 1 image in the labelled data, at least 2 are needed"):
        class_names(["a", "a", "b", "b", "c"])
    with pytest.raises(ValueError, match=r"at least two classes are needed; classes in the labelled data: a \(2\)"):
        class_names(["a", "a"])
    with pytest.raises(ValueError, match="named twice"):
        class_names(CLASSES, ("glioma", "glioma"))
    with pytest.raises(ValueError, match="no row has a class"):
        stratified_subset([None, ""], None, 0.5)
