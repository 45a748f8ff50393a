"""NIfTI headers: what is doubtful is told, several frames are only taken when asked for."""

import gzip
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from voxelbridge.core.data.image_io import read_grid, read_image, write_image
from voxelbridge.core.data.nifti import nifti_header_problems
from voxelbridge.core.data.volume import Grid, Volume
from voxelbridge.core.errors import DataError

NAN, INF = float("nan"), float("inf")


def _file(folder: Path) -> Path:
    voxels = np.arange(60, dtype=np.int16).reshape(1, 3, 4, 5)
    path = folder / "a.nii"
    directions = np.array([[0, 1.0, 0], [0, 0, -1.0], [1.0, 0, 0]])
    grid = Grid.from_parts((3, 4, 5), (2.5, 1.5, 0.5), directions=directions, origin_mm=(7, -8, 9))
    write_image(path, Volume(voxels, grid))
    return path


def _changed(path: Path, offset: int, kind: str, *values: float) -> Path:
    raw = bytearray(path.read_bytes())
    struct.pack_into("<" + kind, raw, offset, *values)
    path.write_bytes(raw)
    return path


def test_sound_header_has_no_problems(tmp_path: Path) -> None:
    assert nifti_header_problems(_file(tmp_path)) == []


@pytest.mark.slow
def test_shared_files_have_readable_headers(shared: Path) -> None:
    paths = sorted((shared / "data").rglob("*.nii.gz"))
    assert len(paths) > 20
    for path in paths:
        problems = nifti_header_problems(path)
        assert not [problem for problem in problems if "truncated" in problem], path


@pytest.mark.parametrize(
    ("offset", "kind", "values", "message", "readable"),
    [
        (112, "f", [NAN], "scl_slope is nan", True),
        (112, "2f", [NAN, NAN], "scl_inter is nan", True),
        (112, "f", [INF], "scl_slope is inf", False),
        (112, "2f", [2.0, NAN], "scl_inter is nan", False),
        (76, "f", [0.5], r"pixdim\[0\]", True),
        (80, "f", [-1.0], "expected positive mm", False),
        (84, "f", [NAN], "expected positive mm", False),
        (123, "B", [3], "not in mm", True),
        (252, "2h", [0, 0], "neither qform nor sform", True),
        (252, "h", [99], "qform_code is 99", True),
        (268, "f", [70.0], "disagree by up to", True),
        (256, "3f", [2.0, 2.0, 2.0], "quaternion", None),
        (280, "f", [NAN], "the sform holds NaN", None),
        (280, "3f", [0.5, 0.5, 0.5], "sheared", None),
        (80, "f", [0.9], "differs from pixdim", None),
        (108, "f", [-352.0], "vox_offset", False),
        (40, "h", [0], "dimensions", False),
        (40, "8h", [3, 5, 4, 32767, 1, 1, 1, 1], "truncated", False),
        (70, "h", [128], "real scalar", False),
        (344, "4s", [b"ni1\0"], "single-file", False),
        (0, "i", [7], "not a NIfTI", False),
    ],
)
def test_doubtful_header_is_told_in_one_line(
    tmp_path: Path,
    offset: int,
    kind: str,
    values: list[float],
    message: str,
    readable: bool | None,
) -> None:
    path = _changed(_file(tmp_path), offset, kind, *values)
    problems = nifti_header_problems(path)
    assert any(re.search(message, problem) for problem in problems), problems
    assert not any("\n" in problem or str(path) in problem for problem in problems)
    if readable:
        assert read_image(path).array.shape == (1, 3, 4, 5)
    elif readable is False:
        with pytest.raises(DataError, match=r"a\.nii"):
            read_image(path)


def test_problems_of_what_is_no_file(tmp_path: Path) -> None:
    assert nifti_header_problems(tmp_path / "none.nii") == ["does not exist"]
    (tmp_path / "a.nii.gz").write_bytes(b"no gzip")
    assert len(nifti_header_problems(tmp_path / "a.nii.gz")) == 1


def _series(folder: Path) -> tuple[Path, np.ndarray]:
    frames = np.random.default_rng(0).integers(0, 100, size=(4, 3, 4, 5)).astype(np.int16)
    image = sitk.GetImageFromArray(frames, isVector=False)
    image.SetSpacing((0.5, 1.5, 2.5, 1.0))
    sitk.WriteImage(image, str(folder / "a.nii.gz"))
    return folder / "a.nii.gz", frames


def test_frames_are_refused_unless_asked_for(tmp_path: Path) -> None:
    path, frames = _series(tmp_path)
    for read in (read_image, read_grid):
        with pytest.raises(DataError, match="4 frames in one NIfTI file; split"):
            read(path)
    first = read_image(path, frames="first")
    assert np.array_equal(first.array[0], frames[0])
    assert first.grid.spacing_mm == (2.5, 1.5, 0.5)
    mean = read_image(path, frames="mean").array[0]
    assert mean.dtype == np.float32
    np.testing.assert_allclose(mean, frames.mean(axis=0), rtol=1e-6)
    assert read_grid(path, frames="mean").shape == (3, 4, 5)
    raw = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(raw[:-1]))
    with pytest.raises(DataError, match="truncated"):
        read_image(path, frames="first")


def test_one_frame_is_the_same_for_every_choice(tmp_path: Path) -> None:
    path = _file(tmp_path)
    for frames in ("first", "mean"):
        volume = read_image(path, frames=frames)
        assert volume.array.dtype == np.int16
        assert np.array_equal(volume.array, read_image(path).array)
