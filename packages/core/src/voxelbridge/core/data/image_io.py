"""Image files to volumes and back: NIfTI, NRRD, MetaImage. Only this module knows x, y, z order."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813 - the name everybody uses
from numpy.typing import NDArray

from voxelbridge.core.data.payload import check_payload, read_nifti_header, read_nifti_voxels
from voxelbridge.core.data.volume import Grid, Volume, match_grid
from voxelbridge.core.errors import DataError
from voxelbridge.core.files import atomic_write

READ_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd")
WRITE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha")  # .mhd is two files: it cannot be atomic


def image_ending(name: str) -> str | None:
    """The supported ending of a file name (".nii.gz", ...), or None."""
    lower = name.lower()
    return next((ending for ending in READ_ENDINGS if lower.endswith(ending)), None)


def read_grid(path: Path) -> Grid:
    """The grid of an image file, from its header alone."""
    _check_name(path)
    if _is_nifti(path):
        read_nifti_header(path)
    else:
        check_payload(path)
    return _grid_of(path, _read_information(path))


def read_image(path: Path) -> Volume:
    """One three-dimensional image as (1, D, H, W) in its stored type and axis order.

    The file is checked whole: payload length against the header, gzip checksum and length; a
    detached header may only name a file of its own folder. NaN stays NaN. Raises DataError.
    """
    _check_name(path)
    if _is_nifti(path):
        voxels = read_nifti_voxels(path)
        grid = _grid_of(path, _read_information(path))
    else:
        check_payload(path)
        reader = _read_information(path)
        grid = _grid_of(path, reader)
        try:
            voxels = sitk.GetArrayFromImage(reader.Execute())
        except RuntimeError as error:
            raise DataError(f"{path}: cannot be decoded ({_last_line(error)})") from error
        voxels = voxels.reshape(grid.shape)
    if voxels.shape != grid.shape:
        raise DataError(f"{path}: voxels {voxels.shape} do not fit the header's {grid.shape}")
    return Volume(voxels[None], grid)


def read_channels(paths: Sequence[Path]) -> Volume:
    """Several images of one grid as (C, D, H, W), channel order = path order.

    A file in another axis order over the same voxels is brought to the first file's order; any
    other difference of the grids is a DataError that names both files.
    """
    if not paths:
        raise ValueError("no channel given")
    first = read_image(paths[0])
    channels = [first.array[0]]
    for path in paths[1:]:
        matched = match_grid(volume := read_image(path), first.grid)
        if matched is None:
            raise DataError(
                f"{path}: grid {describe_grid(volume.grid)} differs from {paths[0].name}: "
                f"{describe_grid(first.grid)}; resample the channels to one grid"
            )
        channels.append(matched.array[0])
    return Volume(np.stack(channels), first.grid)  # np.stack promotes mixed channel types


def write_image(path: Path, volume: Volume) -> None:
    """Writes a one-channel volume atomically; the ending decides the format (compressed if it can).

    bool is written as uint8 and float16 as float32. Raises DataError for an unsupported ending.
    """
    if not path.name.lower().endswith(WRITE_ENDINGS):
        raise DataError(f"{path}: cannot write this format; use one of {', '.join(WRITE_ENDINGS)}")
    if volume.array.shape[0] != 1:
        raise ValueError(f"one channel per file, got {volume.array.shape[0]}")
    image = sitk.GetImageFromArray(_storable(volume.array[0]))
    grid = volume.grid
    image.SetSpacing(tuple(reversed(grid.spacing_mm)))
    image.SetOrigin(grid.origin_mm)
    image.SetDirection(grid.directions[:, ::-1].ravel().tolist())
    sitk.ProcessObject.GlobalWarningDisplayOff()
    with atomic_write(path) as temporary:
        try:
            sitk.WriteImage(image, str(temporary), useCompression=path.suffix != ".nii")
        except RuntimeError as error:
            raise DataError(f"{path}: cannot be written ({_last_line(error)})") from error


def describe_grid(grid: Grid) -> str:
    """Shape and spacing in a few words for error messages, array order."""
    size = "x".join(str(n) for n in grid.shape)
    spacing = "x".join(f"{step:.4g}" for step in grid.spacing_mm)
    origin = ", ".join(f"{x:.5g}" for x in grid.origin_mm)
    return f"{size} voxels of {spacing} mm from ({origin})"


def _check_name(path: Path) -> None:
    if image_ending(path.name) is None:
        raise DataError(f"{path}: unknown image format; expected one of {', '.join(READ_ENDINGS)}")
    if not path.is_file():  # also keeps us from waiting on a pipe
        state = "is not a file" if path.exists() else "does not exist"
        raise DataError(f"{path}: {state}")


def _is_nifti(path: Path) -> bool:
    return path.name.lower().endswith((".nii", ".nii.gz"))


def _read_information(path: Path) -> sitk.ImageFileReader:
    sitk.ProcessObject.GlobalWarningDisplayOff()  # our errors say it in one line
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise DataError(f"{path}: header cannot be read ({_last_line(error)})") from error
    if reader.GetNumberOfComponents() != 1:
        raise DataError(f"{path}: {reader.GetNumberOfComponents()} values per voxel, expected 1")
    return reader


def _grid_of(path: Path, reader: sitk.ImageFileReader) -> Grid:
    dimension = reader.GetDimension()
    size = reader.GetSize()
    if dimension < 3 or any(n != 1 for n in size[3:]):
        raise DataError(f"{path}: {dimension}-dimensional image {size}; expected three dimensions")
    directions = np.array(reader.GetDirection()).reshape(dimension, dimension)[:3, :3]
    try:
        return Grid.from_parts(
            size[2::-1],
            reader.GetSpacing()[2::-1],
            directions=directions[:, ::-1] + 0.0,  # + 0.0 turns -0.0 into 0.0
            origin_mm=reader.GetOrigin()[:3],
        )
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error


def _storable(array: NDArray[Any]) -> NDArray[Any]:
    match array.dtype.kind, array.dtype.itemsize:
        case "b", _:
            array = array.astype(np.uint8)
        case "f", 2:
            array = array.astype(np.float32)
        case _:
            pass
    return np.ascontiguousarray(array)


def _last_line(error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
