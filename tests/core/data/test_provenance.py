"""Content hashes: equal for equal scans, whatever file they came from."""

import numpy as np

from voxelbridge.core.data.provenance import content_hashes
from voxelbridge.core.data.volume import Grid, Volume


def _volume(array: np.ndarray, flip_z: bool = False) -> Volume:
    directions = np.diag([1.0, 1.0, 1.0])[:, ::-1].copy()
    if flip_z:
        directions[:, 0] *= -1
        array = array[:, ::-1]
    grid = Grid.from_parts(
        array.shape[1:], (2.0, 1.0, 1.0), directions=directions, origin_mm=(0.0, 0.0, 0.0)
    )
    return Volume(array, grid)


def test_type_and_axis_order_do_not_change_the_hash() -> None:
    scan = np.random.default_rng(0).integers(-1000, 2000, (1, 5, 6, 7)).astype(np.int16)
    expected = content_hashes(_volume(scan))
    assert content_hashes(_volume(scan.astype(np.float32))) == expected
    assert content_hashes(_volume(scan, flip_z=True)) == expected


def test_one_voxel_changes_the_hash_of_its_channel_only() -> None:
    scan = np.zeros((2, 3, 4, 5), dtype=np.float32)
    before = content_hashes(_volume(scan))
    scan[1, 2, 3, 4] = 1.0
    after = content_hashes(_volume(scan))
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_shape_enters_and_negative_zero_does_not() -> None:
    flat = np.zeros((1, 2, 3, 4), dtype=np.float32)
    assert content_hashes(_volume(flat)) != content_hashes(_volume(flat.reshape(1, 3, 2, 4)))
    assert content_hashes(_volume(-flat)) == content_hashes(_volume(flat))
