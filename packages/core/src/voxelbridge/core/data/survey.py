"""What preparing a raw data set would do, from names and a few headers; nothing is written.

Made for data sets of 100 000 cases: no case is opened but a sample whose extent is measured.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from voxelbridge.core.data.case_index import CASES_FOLDER
from voxelbridge.core.data.dataset import RawCase
from voxelbridge.core.data.resample import resampled_shape
from voxelbridge.core.data.volume import reorientation_to_lps
from voxelbridge.core.errors import VoxelbridgeError

SAMPLED_HEADERS = 20
BYTES_PER_VOXEL = 4  # float32 before compression
GIB = 2**30
Spacing = tuple[float, float, float]  # mm, z y x


@dataclass(frozen=True)
class HeaderSample:
    """Shapes and spacings in LPS order of a few cases of a list."""

    shapes: tuple[tuple[int, int, int], ...]
    spacings_mm: tuple[Spacing, ...]
    unreadable: tuple[str, ...]  # a line for each case of the sample whose header is not readable

    @classmethod
    def read(cls, cases: Sequence[RawCase]) -> "HeaderSample":
        """Reads the headers of cases that are spread evenly over `cases`."""
        shapes, spacings, unreadable = [], [], []
        count = min(SAMPLED_HEADERS, len(cases))
        for number in range(count):
            case = cases[number * len(cases) // count]
            try:
                grid = case.read_grid()
            except VoxelbridgeError as error:
                unreadable.append(str(error))
                continue
            grid = reorientation_to_lps(grid).apply_grid(grid)
            shapes.append(grid.shape)
            spacings.append(grid.spacing_mm)
        return cls(tuple(shapes), tuple(spacings), tuple(unreadable))

    def median_spacing_mm(self) -> Spacing | None:
        """The median per axis; None without a readable header."""
        if not self.spacings_mm:
            return None
        z, y, x = (float(edge) for edge in np.median(np.array(self.spacings_mm), axis=0))
        return z, y, x

    def estimated_bytes(self, spacing_mm: Spacing, *, num_cases: int, num_channels: int) -> int:
        """Bytes of the images of `num_cases` such cases at `spacing_mm` before compression."""
        voxels = [
            int(np.prod(resampled_shape(shape, spacing, spacing_mm)))
            for shape, spacing in zip(self.shapes, self.spacings_mm, strict=True)
        ]
        mean = float(np.mean(voxels)) if voxels else 0.0
        return int(mean * num_cases * num_channels * BYTES_PER_VOXEL)


def stored_names(store: Path) -> set[str]:
    """Cases whose JSON lies in the store; it is written last, so their arrays do too."""
    try:
        with os.scandir(store / CASES_FOLDER) as entries:
            names = [entry.name for entry in entries]
    except FileNotFoundError:
        return set()
    return {name[: -len(".json")] for name in names if name.endswith(".json") and name[0] != "."}


def free_bytes(folder: Path) -> int:
    """Free space where `folder` is or would be made."""
    path = folder.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
