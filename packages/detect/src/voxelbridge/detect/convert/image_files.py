"""The image files of a folder as cases, and boxes from world coordinates onto their grids."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from voxelbridge.core.data.dicom import DicomVolume, find_series
from voxelbridge.core.data.image_io import image_ending, image_stem, read_grid
from voxelbridge.core.data.volume import Grid, Volume, world_to_edges
from voxelbridge.core.errors import DataError
from voxelbridge.detect.convert.raw_writer import RECORDS

CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")

FloatArray = NDArray[np.float64]
Images = tuple[Path, ...] | DicomVolume  # one file per channel, or a series


def find_case_images(folder: Path) -> tuple[dict[str, Images], tuple[str, ...]]:
    """The images of each case below `folder`, and a line for each DICOM series that is refused.

    Image files are called `CASE.nii.gz`, or `CASE_0000.nii.gz` and so on, in any format we read.
    Where there is none, DICOM series are looked for. What an earlier conversion wrote below
    `folder` is passed over. DataError when there is nothing, or two files are the same channel of
    a case.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: not a folder with images")
    files = _find_files(folder)
    if files:
        return dict(files), ()
    dicom = find_series(folder)
    if not dicom.volumes and not dicom.refused:
        raise DataError(
            f"{folder}: no images below it; expected CASE.nii.gz, .nrrd, .mha, .mhd or DICOM series"
        )
    return {v.case_id: v for v in dicom.volumes}, tuple(str(line) for line in dicom.refused)


def grid_of(images: Images) -> Grid:
    """The grid of a case, from headers alone."""
    return images.grid if isinstance(images, DicomVolume) else read_grid(images[0])


def content_of(images: Images) -> tuple[Path, ...] | Volume:
    """What a data set writer takes: the files, or the volume of a series."""
    return images.read() if isinstance(images, DicomVolume) else images


def origins_of(images: Images) -> tuple[str, ...]:
    """The origin ids of a case: that of a DICOM series."""
    if isinstance(images, DicomVolume) and images.origin_id is not None:
        return (images.origin_id,)
    return ()


def common_channels(cases: Mapping[str, Images]) -> tuple[str, ...]:
    """Names for the channels of all cases. DataError when cases differ in their number."""
    counts: dict[int, str] = {}
    for case, channels in cases.items():
        counts.setdefault(1 if isinstance(channels, DicomVolume) else len(channels), case)
    if len(counts) > 1:
        shown = ", ".join(f"{case} has {count}" for count, case in sorted(counts.items()))
        raise DataError(f"cases differ in their number of channels: {shown}")
    count = next(iter(counts))
    return ("image",) if count == 1 else tuple(f"image{n}" for n in range(count))


def ras_to_lps(values: ArrayLike) -> FloatArray:
    """Points (..., 3) of x, y, z from RAS to LPS and back: x and y change sign."""
    return np.asarray(values, dtype=np.float64) * (-1.0, -1.0, 1.0)


def sphere_box(centre_mm: ArrayLike, diameter_mm: float, grid: Grid) -> FloatArray:
    """Tight box (6,) in voxel edges around a sphere at LPS `centre_mm`, exact on oblique grids."""
    centre = world_to_edges(centre_mm, grid)
    # How far an array axis runs inside a sphere: the length of the inverse affine's row.
    reach = diameter_mm / 2 * np.linalg.norm(np.linalg.inv(grid.affine[:, :3]), axis=1)
    return np.concatenate([centre - reach, centre + reach])


def clipped_box(box: FloatArray, grid: Grid, *, where: str) -> FloatArray:
    """`box` (6,) cut to the image. DataError when its centre lies outside."""
    centre = (box[:3] + box[3:]) / 2
    if (centre < 0).any() or (centre > grid.shape).any():
        raise DataError(
            f"{where}: centre {np.round(centre, 1).tolist()} (voxels z, y, x) lies outside the "
            f"image {grid.shape}; check the coordinate system, the axis order and the image"
        )
    return np.concatenate([np.maximum(box[:3], 0.0), np.minimum(box[3:], grid.shape)])


def _find_files(folder: Path) -> dict[str, tuple[Path, ...]]:
    found: dict[str, dict[int, Path]] = {}
    for path in _walk(folder):
        parts = CHANNEL.fullmatch(image_stem(path.name))
        case = parts["case"] if parts else image_stem(path.name)
        channel = int(parts["channel"]) if parts else 0
        other = found.setdefault(case, {}).setdefault(channel, path)
        if other != path:
            raise DataError(f"{path}: case {case} is also {other}; keep one of them")
    for case, channels in found.items():
        if sorted(channels) != list(range(len(channels))):
            raise DataError(f"{folder}: case {case} has the channels {sorted(channels)}")
    return {case: tuple(of[n] for n in sorted(of)) for case, of in sorted(found.items())}


def _walk(folder: Path) -> Iterator[Path]:
    for where, folders, names in os.walk(folder):
        here = Path(where)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and not (here / name / RECORDS).is_dir()
        )
        for name in sorted(names):
            path = here / name
            if not name.startswith(".") and image_ending(name) is not None and path.is_file():
                yield path
