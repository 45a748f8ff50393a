"""Windows cover every voxel and stay inside."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelbridge.core.tiles import tile_starts, tiles


def test_starts_equal_the_measured_grid_of_nndetection() -> None:
    assert tile_starts(300, 128) == [0, 22, 86, 150, 172]
    assert tile_starts(129, 128) == [0, 1]


def test_a_short_axis_has_one_window() -> None:
    assert tile_starts(5, 128) == [0]
    assert tile_starts(128, 128) == [0]


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 400), st.integers(1, 130), st.sampled_from([0.0, 0.25, 0.5, 0.75]))
def test_every_voxel_is_covered_and_windows_stay_inside(
    size: int, patch: int, overlap: float
) -> None:
    starts = tile_starts(size, patch, overlap=overlap)
    covered = np.zeros(size, dtype=bool)
    for start in starts:
        assert 0 <= start <= max(size - patch, 0)
        covered[start : start + patch] = True
    assert covered.all()
    assert starts == sorted(set(starts))


def test_tiles_are_the_product_of_the_axes() -> None:
    assert list(tiles((4, 6, 2), (4, 4, 4), overlap=0.5)) == [(0, 0, 0), (0, 2, 0)]
