"""Where patches are cut."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelbridge.core.data.patches import boxes_in_patch, centred_start, object_start, uniform_start

triples = st.tuples(*[st.integers(1, 30)] * 3)
few = settings(max_examples=60, deadline=None)


def test_uniform_start_reaches_every_position_and_no_other() -> None:
    rng = np.random.default_rng(0)
    starts = {uniform_start(rng, (6, 4, 9), (4, 4, 12)) for _ in range(200)}
    assert starts == {(z, 0, -1) for z in range(3)}


@few
@given(triples, triples, st.integers(0, 2**31))
def test_object_is_whole_in_the_patch_whenever_it_fits(
    shape: tuple[int, ...], patch: tuple[int, ...], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    low = rng.integers(0, shape)
    high = rng.integers(low, shape) + 1
    start = object_start(rng, shape, patch, [*low, *high])
    for axis in range(3):
        if shape[axis] <= patch[axis]:
            assert start[axis] <= 0
            assert start[axis] + patch[axis] >= shape[axis]
        else:
            assert 0 <= start[axis] <= shape[axis] - patch[axis]
        if high[axis] - low[axis] <= patch[axis]:
            assert start[axis] <= low[axis]
            assert high[axis] <= start[axis] + patch[axis]
        else:
            assert start[axis] < high[axis]
            assert start[axis] + patch[axis] > low[axis]


def test_offset_of_a_small_object_is_random() -> None:
    rng = np.random.default_rng(0)
    starts = {
        object_start(rng, (50, 50, 50), (8, 8, 8), [20, 1, 44, 23, 4, 50])[0:3] for _ in range(500)
    }
    assert {z for z, _, _ in starts} == set(range(15, 21))
    assert {y for _, y, _ in starts} == {0, 1}
    assert {x for _, _, x in starts} == {42}


def test_box_with_fractional_edges_is_covered() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        z, _, _ = object_start(rng, (50, 50, 50), (8, 8, 8), [20.4, 1, 1, 26.6, 2, 2])
        assert z <= 20.4
        assert z + 8 >= 26.6


def test_patches_of_a_large_object_spread_over_it() -> None:
    rng = np.random.default_rng(0)
    starts = [
        object_start(rng, (100, 9, 9), (10, 9, 9), [20, 0, 0, 80, 9, 9])[0] for _ in range(500)
    ]
    assert min(starts) == 15
    assert max(starts) == 74


def test_same_generator_state_gives_the_same_patch() -> None:
    draws = [uniform_start(np.random.default_rng(5), (90, 80, 70), (9, 9, 9)) for _ in range(2)]
    assert draws[0] == draws[1]


def test_boxes_are_shifted_clipped_and_dropped() -> None:
    boxes = [[0, 0, 0, 4, 4, 4], [3, 3, 3, 9, 9, 30], [6, 0, 0, 8, 2, 2], [5, 5, 5, 6, 6, 6]]
    visible, rows = boxes_in_patch(boxes, (2, 2, -1), (4, 4, 8))
    assert rows.tolist() == [0, 1, 3]
    assert visible.tolist() == [[0, 0, 1, 2, 2, 5], [1, 1, 4, 4, 4, 8], [3, 3, 6, 4, 4, 7]]


def test_no_boxes_are_visible_where_there_are_none() -> None:
    visible, rows = boxes_in_patch(np.zeros((0, 6)), (0, 0, 0), (4, 4, 4))
    assert visible.shape == (0, 6)
    assert rows.shape == (0,)


def test_patch_around_a_voxel_is_centred_and_moved_inside() -> None:
    assert centred_start((20, 20, 20), (50, 50, 50), (8, 9, 8)) == (16, 16, 16)
    assert centred_start((1, 49, 46), (50, 50, 50), (8, 8, 8)) == (0, 42, 42)
    assert centred_start((3, 0, 4), (5, 8, 5), (8, 8, 6)) == (-1, 0, 0)


def test_patch_around_a_voxel_shows_it() -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        shape, patch = rng.integers(1, 12, 3), rng.integers(1, 12, 3)
        voxel = rng.integers(0, shape)
        start = np.array(centred_start(voxel, shape.tolist(), patch.tolist()))
        assert ((start <= voxel) & (voxel < start + patch)).all()
        inside = shape >= patch
        assert ((start >= 0) & (start + patch <= shape))[inside].all()
