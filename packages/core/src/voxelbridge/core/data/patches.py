"""Where a patch is cut: anywhere, around an object or a voxel; and the boxes seen through it."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Start = tuple[int, int, int]  # first voxel of the patch (z, y, x); may be negative: padded there


def uniform_start(rng: np.random.Generator, shape: Sequence[int], patch: Sequence[int]) -> Start:
    """A patch uniform over all positions inside the volume; centred on axes where it is larger."""
    z, y, x = (
        int(rng.integers(0, size - extent + 1)) if size >= extent else _centred(size, extent)
        for size, extent in zip(shape, patch, strict=True)
    )
    return z, y, x


def object_start(
    rng: np.random.Generator, shape: Sequence[int], patch: Sequence[int], box: ArrayLike
) -> Start:
    """A patch that shows the object of `box` (6,), in voxel edges, at a random offset.

    Per axis: a volume no larger than the patch is centred; an object smaller than the patch lies
    inside it whole; for a larger one the patch's centre is uniform over the object. The patch never
    leaves a volume that is larger than it. Rules of nnDetection v0.1's offset loader.
    """
    edges = np.asarray(box, dtype=np.float64)
    z, y, x = (
        _object_start_on_axis(rng, size, extent, float(edges[axis]), float(edges[axis + 3]))
        for axis, (size, extent) in enumerate(zip(shape, patch, strict=True))
    )
    return z, y, x


def centred_start(voxel: ArrayLike, shape: Sequence[int], patch: Sequence[int]) -> Start:
    """The patch centred on `voxel` (3,), moved by as little as keeps it inside the volume.

    On axes where the patch is larger than the volume, the volume is centred in it.
    """
    z, y, x = (
        min(max(0, int(centre) - extent // 2), size - extent)
        if size >= extent
        else _centred(size, extent)
        for centre, size, extent in zip(np.asarray(voxel).tolist(), shape, patch, strict=True)
    )
    return z, y, x


def boxes_in_patch(
    boxes: ArrayLike, start: Sequence[int], patch: Sequence[int]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The visible parts (M, 6) of boxes (N, 6) in patch coordinates, and their rows (M,).

    A box that only touches the patch from outside is not visible.
    """
    edges = np.asarray(boxes, dtype=np.float64).reshape(-1, 6)
    shifted = (edges - np.tile(np.asarray(start, float), 2)).reshape(-1, 2, 3)
    clipped = np.clip(shifted, 0.0, np.asarray(patch, float))
    rows = np.flatnonzero((clipped[:, 1] > clipped[:, 0]).all(axis=1))
    return clipped[rows].reshape(-1, 6).astype(np.float32), rows


def _centred(size: int, extent: int) -> int:
    return -((extent - size) // 2)


def _object_start_on_axis(
    rng: np.random.Generator, size: int, extent: int, low: float, high: float
) -> int:
    if size <= extent:
        return _centred(size, extent)
    last = size - extent
    first_voxel, end_voxel = int(np.floor(low)), int(np.ceil(high))
    if end_voxel - first_voxel > extent:
        centre = rng.integers(first_voxel, end_voxel)
        return int(np.clip(centre - extent // 2, 0, last))
    earliest = int(np.clip(end_voxel - extent, 0, last))
    latest = int(np.clip(first_voxel, 0, last))
    return int(rng.integers(earliest, latest + 1))
