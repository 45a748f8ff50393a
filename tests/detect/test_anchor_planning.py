"""Anchor sizes: the search never does worse than the default, and is reproducible."""

import numpy as np
import pytest

from voxelbridge.detect.anchor_planning import (
    default_anchor_sizes,
    mean_best_overlap,
    plan_anchor_sizes,
)

STRIDES = ((4, 4, 4), (8, 8, 8), (16, 16, 16), (32, 32, 32))


def test_default_sizes_are_nndetections() -> None:
    sizes = default_anchor_sizes(STRIDES)
    assert sizes[0] == ((4.0, 8.0, 16.0),) * 3
    assert sizes[3] == ((32.0, 64.0, 128.0),) * 3


def test_a_cube_with_a_matching_anchor_overlaps_fully() -> None:
    sizes = default_anchor_sizes(STRIDES)
    assert mean_best_overlap(np.array([[8.0, 8.0, 8.0]]), sizes) == 1.0
    # 8 x 8 x 16 is the nearest of all sizes and contains it
    assert mean_best_overlap(np.array([[8.0, 8.0, 12.0]]), sizes) == pytest.approx(12 / 16)


@pytest.mark.parametrize("sizes_per_axis", [1, 2, 3])
def test_the_search_does_not_lose_against_the_default(sizes_per_axis: int) -> None:
    rng = np.random.default_rng(0)
    objects = rng.uniform(3, 40, size=(50, 3))
    planned = plan_anchor_sizes(objects, STRIDES, sizes_per_axis=sizes_per_axis)
    again = plan_anchor_sizes(objects, STRIDES, sizes_per_axis=sizes_per_axis)
    default = default_anchor_sizes(STRIDES, sizes_per_axis)
    assert planned == again
    assert mean_best_overlap(objects, planned) >= mean_best_overlap(objects, default)
    assert all(len(axis) == sizes_per_axis for level in planned for axis in level)


def test_equal_objects_and_no_objects_are_planned() -> None:
    same = np.full((4, 3), 7.0)
    assert mean_best_overlap(same, plan_anchor_sizes(same, STRIDES)) == 1.0
    assert plan_anchor_sizes(np.zeros((0, 3)), STRIDES) == default_anchor_sizes(STRIDES)


def test_an_axis_that_is_not_pooled_keeps_its_sizes() -> None:
    sizes = default_anchor_sizes(((2, 4, 4), (2, 8, 8)))
    assert sizes[1][0] == sizes[0][0] == (2.0, 4.0, 8.0)
    assert sizes[1][1] == (8.0, 16.0, 32.0)
