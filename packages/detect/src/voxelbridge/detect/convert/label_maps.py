"""Label maps of downloads, read on the grid of their image in the image's own axis order."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.data.image_io import describe_grid, image_ending, read_image
from voxelbridge.core.data.volume import Grid, match_grid
from voxelbridge.core.errors import DataError


def read_label_map(path: Path, grid: Grid) -> NDArray[Any]:
    """The labels (D, H, W) of a file as integers, brought to the axis order of the image's `grid`.

    DataError when the file shows other voxels than the image or holds values that are not whole.
    """
    volume = read_image(path)
    matched = match_grid(volume, grid)
    if matched is None:
        raise DataError(
            f"{path}: label grid {describe_grid(volume.grid)} differs from image grid "
            f"{describe_grid(grid)}; resample the label or fix the file"
        )
    array = matched.array[0]
    if array.dtype.kind != "f":
        return array
    if not np.isfinite(array).all() or not np.array_equal(np.rint(array), array):
        raise DataError(f"{path}: label values are not whole numbers")
    return array.astype(np.int32)


def check_labels(path: Path, labels: NDArray[Any], known: set[int]) -> None:
    """Refuses a label map with values that the data set does not define."""
    if unknown := sorted({int(value) for value in np.unique(labels)} - known):
        raise DataError(f"{path}: unknown labels {unknown}, expected only {sorted(known)}")


def images_in(folder: Path) -> dict[str, Path]:
    """The image files of a folder by name without ending; macOS's `._` files are no images.

    DataError when two files share a name, for instance `a.nii` and `a.nii.gz`.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        ending = image_ending(path.name)
        if ending is None or path.name.startswith(".") or not path.is_file():
            continue
        name = path.name[: -len(ending)]
        if name in found:
            raise DataError(f"{folder}: {found[name].name} and {path.name} are the same case")
        found[name] = path
    return found
