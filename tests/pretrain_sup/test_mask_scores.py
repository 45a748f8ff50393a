"""Dice and surface distances against loops over all pairs of surface voxels."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelbridge.pretrain_sup.mask_scores import MaskScores, compare_labels, compare_masks

SPACING = (3.0, 0.5, 1.25)


def slow_surface(mask: np.ndarray) -> list[tuple[int, ...]]:
    found = []
    for voxel in product(*(range(n) for n in mask.shape)):
        if not mask[voxel]:
            continue
        for axis, step in product(range(3), (-1, 1)):
            near = list(voxel)
            near[axis] += step
            if not 0 <= near[axis] < mask.shape[axis] or not mask[tuple(near)]:
                found.append(voxel)
                break
    return found


def slow_distances(
    start: list[tuple[int, ...]], end: list[tuple[int, ...]], spacing: tuple[float, ...]
) -> list[float]:
    return [
        min(
            math.sqrt(sum(((i - j) * mm) ** 2 for i, j, mm in zip(a, b, spacing, strict=True)))
            for b in end
        )
        for a in start
    ]


def slow_percentile(values: list[float], percent: float) -> float:
    """Linear between the two nearest ranks."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def slow_scores(a: np.ndarray, b: np.ndarray) -> MaskScores:
    sizes = int(a.sum()), int(b.sum())
    if sizes == (0, 0):
        return MaskScores(0, 0, None, None, None)
    both = sum(bool(a[v] and b[v]) for v in product(*(range(n) for n in a.shape)))
    if 0 in sizes:
        return MaskScores(*sizes, 0.0, None, None)
    there = slow_distances(slow_surface(a), slow_surface(b), SPACING)
    back = slow_distances(slow_surface(b), slow_surface(a), SPACING)
    assd = sum(there + back) / len(there + back)
    hd95 = max(slow_percentile(there, 95), slow_percentile(back, 95))
    return MaskScores(*sizes, 2 * both / sum(sizes), assd, hd95)


def assert_equal(found: MaskScores, expected: MaskScores) -> None:
    assert found.reference_voxels == expected.reference_voxels
    assert found.predicted_voxels == expected.predicted_voxels
    for name in ("dice", "assd_mm", "hd95_mm"):
        value, wanted = getattr(found, name), getattr(expected, name)
        assert value is wanted if wanted is None else value == pytest.approx(wanted, rel=1e-12)


@given(seed=st.integers(0, 10_000), shape=st.tuples(*[st.integers(1, 6)] * 3))
@settings(deadline=None, max_examples=30)
def test_scores_equal_loops_over_voxels(seed: int, shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(seed)
    a, b = (rng.random(shape) < rng.choice([0.05, 0.4, 0.9]) for _ in range(2))
    assert_equal(compare_masks(a, b, SPACING), slow_scores(a, b))


def test_equal_masks_are_perfect_and_scores_do_not_depend_on_the_order() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random((5, 6, 7)) < 0.3, rng.random((5, 6, 7)) < 0.3
    assert compare_masks(a, a, SPACING) == MaskScores(int(a.sum()), int(a.sum()), 1.0, 0.0, 0.0)
    there, back = compare_masks(a, b, SPACING), compare_masks(b, a, SPACING)
    assert (there.dice, there.assd_mm, there.hd95_mm) == (back.dice, back.assd_mm, back.hd95_mm)


def test_distance_of_two_voxels_is_in_millimetres_of_its_axis() -> None:
    for axis, (place, mm) in enumerate(
        zip(((3, 0, 0), (0, 3, 0), (0, 0, 3)), SPACING, strict=True)
    ):
        a, b = np.zeros((4, 4, 4), dtype=bool), np.zeros((4, 4, 4), dtype=bool)
        a[0, 0, 0], b[place] = True, True
        scores = compare_masks(a, b, SPACING)
        assert (scores.dice, scores.assd_mm, scores.hd95_mm) == (0.0, 3 * mm, 3 * mm), axis


@given(seed=st.integers(0, 10_000))
@settings(deadline=None, max_examples=20)
def test_label_maps_are_compared_target_by_target_where_they_count(seed: int) -> None:
    rng = np.random.default_rng(seed)
    reference = rng.choice([-1, 0, 1, 2, 3, 9], size=(4, 5, 6))
    predicted = rng.choice([0, 1, 2, 4], size=(4, 5, 6)).astype(np.uint8)
    targets = [(1,), (1, 2), (3,), (4,), (5,)]
    counted = (reference >= 0) & (reference != 9)
    found = compare_labels(reference, predicted, targets, SPACING, uncounted=(9,))
    for ids, scores in zip(targets, found, strict=True):
        masks = [np.isin(labels, ids) & counted for labels in (reference, predicted)]
        assert_equal(scores, slow_scores(*masks))


def test_maps_without_any_target_are_absent_in_both() -> None:
    zeros = np.zeros((2, 3, 4), dtype=np.int16)
    assert compare_labels(zeros, zeros, [(1,)], SPACING) == [MaskScores(0, 0, None, None, None)]
