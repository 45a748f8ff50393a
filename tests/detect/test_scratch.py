"""Arrays in files: the same numbers as in memory, gone afterwards, a full disk is told."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from voxelbridge.core.data import resample
from voxelbridge.core.data.normalize import CTPercentile, ZScore
from voxelbridge.core.data.preprocess import (
    at_spacing,
    crop_mapping,
    preprocess,
    preprocess_channel,
)
from voxelbridge.core.data.resample import Resampling
from voxelbridge.core.data.volume import Grid, Volume
from voxelbridge.core.errors import DataError
from voxelbridge.detect import scratch
from voxelbridge.detect.scratch import FileWorkspace, ScratchArray, remove_scratch, scratch_prefix

CT = CTPercentile(lower=0.0, upper=400.0, mean=100.0, std=60.0)


@pytest.mark.parametrize("scheme", [CT, ZScore(), ZScore(nonzero_only=True)], ids=lambda s: s.name)
@pytest.mark.parametrize(
    "spacing", [(1.0, 0.7, 1.1), (3.1, 2.0, 1.9), (2.0, 1.5, 0.6), (2.0, 1.0, 1.0)], ids=str
)
@pytest.mark.parametrize("rule", ["cubic", "nnunet"])
def test_a_channel_in_a_file_is_the_one_in_memory_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: CTPercentile | ZScore,
    spacing: tuple[float, float, float], rule: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(resample, "SLAB_BYTES", 1 << 13)
    monkeypatch.setattr(scratch, "RELEASE_BYTES", 1 << 14)  # pages are let go all the time
    rng = np.random.default_rng(0)
    directions = np.array([[0.0, -1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    grid = Grid.from_parts((31, 40, 37), (2.0, 1.0, 1.0), directions=directions)
    array = rng.integers(0, 500, size=(1, 31, 40, 37)).astype(np.int16)
    array[:, :3] = 0
    volume = Volume(array, grid)
    resampling = Resampling(image=rule)  # type: ignore[arg-type]
    mapping = crop_mapping(volume)
    expected = preprocess(
        volume, mapping, spacing_mm=spacing, normalization=[scheme], resampling=resampling
    )
    workspace = FileWorkspace(tmp_path, scratch_prefix("a"))
    final = at_spacing(mapping, spacing)
    assert final.stored_shape == expected.mapping.stored_shape
    file, image = workspace.named("image", (1, *final.stored_shape))
    preprocess_channel(
        array[0], image[0], final, spacing_mm=spacing, normalization=scheme,
        resampling=resampling, workspace=workspace,
    )  # fmt: skip
    with ScratchArray(file) as opened:
        assert opened.shape == expected.image.shape
        assert np.array_equal(opened[:], expected.image)
        window = opened[:, 1:9, 2:30, 3:20]
        assert np.array_equal(window, expected.image[:, 1:9, 2:30, 3:20])
    assert window.flags.owndata  # it outlives the file
    assert [path.name for path in tmp_path.iterdir()] == [".partial-a.image"]
    remove_scratch(tmp_path, "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["u1", ">i2", "<f4", "f8"])
def test_copies_keep_type_and_values_in_any_layout(tmp_path: Path, dtype: str) -> None:
    array = np.arange(4 * 5 * 6).reshape(6, 5, 4).astype(dtype).transpose(2, 1, 0)[:, ::-1]
    file = FileWorkspace(tmp_path, "x.").copy_of("picture", array)
    with ScratchArray(file) as opened:
        assert np.array_equal(opened[:], array)
        assert np.array_equal(opened[2], array[2])
        assert opened.dtype.isnative


def test_scratch_of_another_case_stays(tmp_path: Path) -> None:
    for case in ("a", "a.b", "ab"):
        FileWorkspace(tmp_path, scratch_prefix(case)).named("image", (1, 2, 2, 2))
    remove_scratch(tmp_path, "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".partial-a.b.image", ".partial-ab.image",
    ]  # fmt: skip


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DataError, match=r"GiB of scratch space cannot be had \(No space left"):
        FileWorkspace(tmp_path, "x.").empty((2, 3, 4))
