"""Bytes of voxels: exactly as many as declared, undamaged, of a regular file."""

import gzip
import os
import time
from pathlib import Path

import numpy as np
import pytest

from voxelbridge.core.data.image_io import READ_ENDINGS, read_grid, read_image, write_image
from voxelbridge.core.data.volume import Grid, Volume
from voxelbridge.core.errors import DataError

SHAPE = (9, 10, 11)


@pytest.fixture
def volume() -> Volume:
    voxels = np.random.default_rng(0).integers(0, 3000, size=(1, *SHAPE)).astype(np.int16)
    return Volume(voxels, Grid.from_parts(SHAPE, (2.0, 1.0, 0.5)))


def _refused(path: Path, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(DataError, match=message) as caught:
        read_image(path)
    assert time.monotonic() - start < 5
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_gzip_of_several_members_is_one_payload(tmp_path: Path, volume: Volume) -> None:
    write_image(tmp_path / "a.nii", volume)
    raw = (tmp_path / "a.nii").read_bytes()
    parts = [gzip.compress(part) for part in (raw[:300], raw[300:1000], b"", raw[1000:])]
    (tmp_path / "b.nii.gz").write_bytes(b"".join(parts))
    assert np.array_equal(read_image(tmp_path / "b.nii.gz").array, volume.array)
    (tmp_path / "b.nii.gz").write_bytes(b"".join(parts) + bytes(512))  # padded as by tar
    assert np.array_equal(read_image(tmp_path / "b.nii.gz").array, volume.array)


@pytest.mark.parametrize("rest", [b"x", b"\0\0x", b"\x1f\x8b", b"\x1f", b"GARBAGE" * 1000])
def test_bytes_behind_the_compressed_voxels_are_refused(
    tmp_path: Path, volume: Volume, rest: bytes
) -> None:
    for ending in (".nii.gz", ".nrrd", ".mha"):
        path = tmp_path / f"a{ending}"
        write_image(path, volume)
        path.write_bytes(path.read_bytes() + rest)
        _refused(path, "behind the compressed voxels|end too early|damaged")


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd", ".mha"])
@pytest.mark.parametrize("extra", [1, 100, 1 << 21])
def test_more_voxels_than_declared_are_refused(
    tmp_path: Path, volume: Volume, ending: str, extra: int
) -> None:
    path = tmp_path / f"a{ending}"
    match ending:
        case ".nii" | ".nii.gz":
            write_image(tmp_path / "b.nii", volume)
            raw = (tmp_path / "b.nii").read_bytes() + bytes(extra)
            path.write_bytes(gzip.compress(raw) if ending == ".nii.gz" else raw)
        case ".nrrd":
            head = "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 2 3 4\nencoding: gzip\n\n"
            path.write_bytes(head.encode() + gzip.compress(bytes(24 + extra)))
        case _:
            head = "NDims = 3\nDimSize = 2 3 4\nElementType = MET_UCHAR\nElementDataFile = LOCAL\n"
            path.write_bytes(head.encode() + bytes(24 + extra))
    _refused(path, "declare")


@pytest.mark.parametrize("position", [-8, -5, -4, -1])
def test_wrong_gzip_checksum_or_length_is_refused(
    tmp_path: Path, volume: Volume, position: int
) -> None:
    path = tmp_path / "a.nii.gz"
    write_image(path, volume)
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)
    _refused(path, "damaged")


@pytest.mark.parametrize("ending", READ_ENDINGS)
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, ending: str) -> None:
    pipe, folder, loop, dangling, empty = (
        tmp_path / f"{name}{ending}" for name in ("pipe", "folder", "loop", "dangling", "empty")
    )
    os.mkfifo(pipe)
    folder.mkdir()
    loop.symlink_to(loop)
    dangling.symlink_to(tmp_path / "nothing")
    empty.touch()
    device = tmp_path / f"device{ending}"
    device.symlink_to("/dev/zero")
    _refused(pipe, "is not a file")
    _refused(folder, "is not a file")
    _refused(device, "is not a file")
    _refused(loop, "is a link that leads back to itself")
    _refused(dangling, "is a link to a file that is not there")
    _refused(empty, "truncated|not an? ")
    with pytest.raises(DataError, match="is not a file"):
        read_grid(pipe)


def test_detached_payload_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.raw")
    (tmp_path / "a.mhd").write_text(
        "NDims = 3\nDimSize = 2 3 4\nElementType = MET_UCHAR\nElementDataFile = a.raw\n"
    )
    _refused(tmp_path / "a.mhd", "same folder")


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_small_packed_file_that_declares_a_huge_volume_is_refused_at_once(
    tmp_path: Path, ending: str
) -> None:
    packed = gzip.compress(bytes(1000))
    if ending == ".nrrd":
        head = "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 2000 2000 2000\nencoding: gzip\n\n"
    else:
        head = (
            "NDims = 3\nDimSize = 2000 2000 2000\nElementType = MET_UCHAR\n"
            "CompressedData = True\nElementDataFile = LOCAL\n"
        )
    (tmp_path / f"a{ending}").write_bytes(head.encode() + packed)
    _refused(tmp_path / f"a{ending}", "cannot hold")
    with pytest.raises(DataError, match="cannot hold"):
        read_grid(tmp_path / f"a{ending}")


def test_bomb_behind_a_small_volume_is_not_unpacked(tmp_path: Path, volume: Volume) -> None:
    write_image(tmp_path / "a.nii", volume)
    raw = (tmp_path / "a.nii").read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(raw + bytes(1 << 28), 1))
    _refused(tmp_path / "b.nii.gz", "more bytes of voxels")
