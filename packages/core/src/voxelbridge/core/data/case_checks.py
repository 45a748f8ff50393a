"""What must hold before a case enters a case store."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from voxelbridge.core.data.mapping import StoredToOriginal
from voxelbridge.core.data.volume import Grid
from voxelbridge.core.errors import DataError

BOX_TOLERANCE = 1e-3  # voxels: rounding of float32 edges at the border of the volume
MASK_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
# Endings of a case's other arrays: a case of such a name would overwrite another case's files.
RESERVED = re.compile(r"\.(instances|segmentation|mask\.[A-Za-z0-9_-]{1,64})$")


def check_case_id(case_id: str) -> None:
    """Refuses a case id that is no plain file name, or the name of another case's file."""
    legal = case_id and case_id == Path(case_id).name and not case_id.startswith(".")
    if not legal or "\0" in case_id or "\n" in case_id or RESERVED.search(case_id):
        raise DataError(f"case {case_id!r}: not usable as a file name in a case store; rename it")


def check_arrays(
    case_id: str,
    image: NDArray[Any],
    grid: Grid,
    *,
    mapping: StoredToOriginal,
    maps: Mapping[str, NDArray[Any]],
    locations: Mapping[int, NDArray[Any]] | None,
) -> None:
    """ValueError where arrays do not fit the grid; DataError for NaN or infinite voxels."""
    if image.ndim != 4 or image.shape[1:] != grid.shape or mapping.stored_shape != grid.shape:
        raise ValueError(
            f"case {case_id}: image {image.shape}, grid {grid.shape}, mapping "
            f"{mapping.stored_shape} must agree"
        )
    for name, array in maps.items():
        if array.shape != grid.shape:
            raise ValueError(f"case {case_id}: {name} {array.shape} on grid {grid.shape}")
    for label, voxels in (locations or {}).items():
        if voxels.ndim != 2 or voxels.shape[1] != 3 or voxels.dtype.kind not in "iu":
            raise ValueError(f"case {case_id}: locations of {label} are not (N, 3) integers")
        if voxels.size and (voxels.min() < 0 or (voxels >= np.asarray(grid.shape)).any()):
            raise ValueError(f"case {case_id}: locations of {label} reach outside {grid.shape}")
    if not np.isfinite(image).all():
        count = int(np.count_nonzero(~np.isfinite(image)))
        raise DataError(f"case {case_id}: {count} voxels are NaN or infinite; correct the image")


def check_boxes(
    case_id: str, boxes: ArrayLike, labels: ArrayLike, grid: Grid
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Boxes (N, 6) float32 and labels (N,) int64; DataError for what no image can hold."""
    edges = np.asarray(boxes, dtype=np.float32).reshape(-1, 6)
    classes = np.asarray(labels, dtype=np.int64).reshape(-1)
    if len(edges) != len(classes):
        raise ValueError(f"case {case_id}: {len(edges)} boxes but {len(classes)} labels")
    low, high = edges[:, :3], edges[:, 3:]
    wrong = ~(high > low).all(axis=1)  # also True for NaN
    outside = (low < -BOX_TOLERANCE).any(axis=1)
    outside |= (high > np.asarray(grid.shape) + BOX_TOLERANCE).any(axis=1)
    for rows, what in ((wrong, "inverted or empty"), (outside, "outside the image")):
        if rows.any():
            box = edges[rows][0].tolist()
            raise DataError(f"case {case_id}: box {box} is {what} {grid.shape}; correct the label")
    if (classes < 0).any():
        raise DataError(f"case {case_id}: class {classes.min()} is negative; classes start at 0")
    return edges, classes
