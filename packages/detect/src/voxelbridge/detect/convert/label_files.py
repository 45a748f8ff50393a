"""The label files of one case in nnDetection's form: an instance map with its JSON, or boxes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from voxelbridge.core.data.image_io import image_ending, write_image
from voxelbridge.core.data.volume import Grid, Volume
from voxelbridge.core.errors import DataError
from voxelbridge.core.files import write_json


def write_instances(
    path: Path,
    array: NDArray[Any],
    classes: Mapping[int, int],
    *,
    grid: Grid,
    num_classes: int,
) -> int:
    """Writes ids (D, H, W) to `path` and id -> class beside it; returns the number of objects.

    DataError when shape, ids or classes do not fit each other.
    """
    if array.shape != grid.shape:
        raise DataError(f"instance map {array.shape} does not fit the image {grid.shape}")
    present = [int(number) for number in np.unique(array) if number != 0]
    if set(present) != set(classes):
        raise DataError(f"instance map holds the ids {present}, the classes name {sorted(classes)}")
    if wrong := {n: k for n, k in classes.items() if not 0 <= k < num_classes}:
        raise DataError(f"instances have unknown classes: {wrong}; expected 0 to {num_classes - 1}")
    kind = _smallest_type(max(present, default=0))
    write_image(path, Volume(array.astype(kind)[None], grid))
    ending = image_ending(path.name) or ""
    json_path = path.with_name(path.name.removesuffix(ending) + ".json")
    write_json(json_path, {"instances": {str(n): int(classes[n]) for n in present}})
    return len(present)


def write_boxes(
    path: Path,
    boxes: ArrayLike,
    labels: Sequence[int],
    *,
    key: Literal["box", "box_mm"],
    num_classes: int,
) -> int:
    """Writes boxes (N, 6), voxel edges or LPS mm by `key`, as JSON; returns their number.

    DataError for a box without extent, a number that is not finite or an unknown class.
    """
    array = np.asarray(boxes, dtype=np.float64).reshape(-1, 6)
    if not np.isfinite(array).all():
        raise DataError("a box holds a number that is not finite")
    sizes = array[:, 3:] if key == "box_mm" else array[:, 3:] - array[:, :3]
    for number, (size, label) in enumerate(zip(sizes, labels, strict=True)):
        if not (size > 0).all():
            raise DataError(f"object {number}: box {array[number].tolist()} has no extent")
        if not 0 <= int(label) < num_classes:
            raise DataError(f"object {number}: class {label}, expected 0 to {num_classes - 1}")
    rows = [
        {"label": int(label), key: [float(value) for value in row]}
        for row, label in zip(array, labels, strict=True)
    ]
    write_json(path, {"boxes": rows})
    return len(rows)


def _smallest_type(largest: int) -> type[np.integer[Any]]:
    return np.uint8 if largest < 256 else np.uint16 if largest < 65536 else np.int32
