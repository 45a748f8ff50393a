"""Image files to volumes and back: NIfTI, NRRD, MetaImage. Only this module knows x, y, z order."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813 - the name everybody uses
from numpy.typing import NDArray

from voxelbridge.core.data.nifti import Frames, check_frames, read_nifti_header, read_nifti_voxels
from voxelbridge.core.data.payload import check_regular_file
from voxelbridge.core.data.text_headers import read_text_image
from voxelbridge.core.data.volume import Grid, Volume, match_grid
from voxelbridge.core.errors import DataError
from voxelbridge.core.files import atomic_write

READ_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
WRITE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha")  # detached: two files, they cannot be atomic
SHEAR_TOLERANCE = 5e-3  # cosine between two axes that still counts as a right angle


def image_ending(name: str) -> str | None:
    """The supported ending of a file name (".nii.gz", ...), or None."""
    lower = name.lower()
    return next((ending for ending in READ_ENDINGS if lower.endswith(ending)), None)


def image_stem(name: str) -> str:
    """A file name without its image ending; other endings stay."""
    return name[: len(name) - len(image_ending(name) or "")]


def read_grid(path: Path, *, frames: Frames = "only") -> Grid:
    """The grid of an image file, from its header and the file's size alone."""
    _check_name(path)
    if _is_nifti(path):
        check_frames(path, read_nifti_header(path), frames)
        return _nifti_grid(path)
    grid = read_text_image(path).grid
    _check_angles(path, grid)
    return grid


def read_image(path: Path, *, frames: Frames = "only") -> Volume:
    """One three-dimensional image as (1, D, H, W) in its stored type and axis order.

    The file is checked whole: payload length against the header, gzip checksum and length, nothing
    behind the end; a detached header may only name a file of its own folder. NaN stays NaN. Of a
    NIfTI file with several frames `frames` takes the first or the mean. Raises DataError.
    """
    _check_name(path)
    try:
        if _is_nifti(path):
            voxels = read_nifti_voxels(path, frames=frames)
            grid = _nifti_grid(path)
        else:
            image = read_text_image(path)
            grid, voxels = image.grid, image.read_voxels()
            _check_angles(path, grid)
    except MemoryError as error:
        raise DataError(f"{path}: its voxels do not fit into memory") from error
    if voxels.shape != grid.shape:
        raise DataError(f"{path}: voxels {voxels.shape} do not fit the header's {grid.shape}")
    return Volume(voxels[None], grid)


def read_channels(paths: Sequence[Path]) -> Volume:
    """Several images of one grid as (C, D, H, W), channel order = path order.

    A file in another axis order over the same voxels is brought to the first file's order; any
    other difference of the grids is a DataError that names both files.
    """
    channels = list(iterate_channels(paths))
    if len(channels) == 1:
        return channels[0]
    arrays = [channel.array[0] for channel in channels]
    return Volume(np.stack(arrays), channels[0].grid)  # np.stack promotes mixed channel types


def iterate_channels(paths: Sequence[Path]) -> Iterator[Volume]:
    """The channels of `read_channels` as volumes (1, D, H, W), each read when it is asked for."""
    if not paths:
        raise ValueError("no channel given")
    grid: Grid | None = None
    for path in paths:
        volume = read_image(path)
        grid = volume.grid if grid is None else grid
        matched = match_grid(volume, grid)
        if matched is None:
            raise DataError(
                f"{path}: grid {describe_grid(volume.grid)} differs from {paths[0].name}: "
                f"{describe_grid(grid)}; resample the channels to one grid"
            )
        del volume  # or the next channel would be read while this one is held here
        yield matched
        del matched


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
    check_regular_file(path)


def _check_angles(path: Path, grid: Grid) -> None:
    cosines = np.abs(grid.directions.T @ grid.directions - np.eye(3))
    if cosines.max() > SHEAR_TOLERANCE:
        raise DataError(
            f"{path}: sheared: its axes are not at right angles (cosine {cosines.max():.3g}); "
            "resample it to an orthogonal grid"
        )


def _is_nifti(path: Path) -> bool:
    return path.name.lower().endswith((".nii", ".nii.gz"))


def _nifti_grid(path: Path) -> Grid:
    """The grid by SimpleITK, whose choice between qform and sform everybody is used to."""
    sitk.ProcessObject.GlobalWarningDisplayOff()  # our errors say it in one line
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("NiftiImageIO")
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise DataError(f"{path}: header cannot be read ({_last_line(error)})") from error
    dimension = reader.GetDimension()
    directions = np.array(reader.GetDirection()).reshape(dimension, dimension)[:3, :3]
    try:
        grid = Grid.from_parts(
            reader.GetSize()[2::-1],
            reader.GetSpacing()[2::-1],
            directions=directions[:, ::-1] + 0.0,  # + 0.0 turns -0.0 into 0.0
            origin_mm=reader.GetOrigin()[:3],
        )
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    _check_angles(path, grid)
    return grid


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
