"""Real volumes in every format, cut and damaged: each bad file is refused by name, each good kept.

And mutated headers of every format, read as strange files are read: in a process with limits.
"""

import gzip
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from voxelbridge.core.data.executor import Done, Failed, isolated, map_cases
from voxelbridge.core.data.image_io import read_image, write_image
from voxelbridge.core.data.volume import Volume
from voxelbridge.core.errors import DataError

VOLUMES = (
    "ct_abdomen/ct.nii.gz",
    "ct_chest_lowres/ct.nrrd",
    "ct_lung_elastix/lung_small.mha",
    "ct_vertebra_crop/ct.nii.gz",
    "mr_breast_tumour/mr.nrrd",
    "orientations/RAS.nii.gz",
)
FORMATS = (".nii", ".nii.gz", ".mha", ".nrrd")
CUTS = (0.1, 0.5, 0.9, 0.99, 0.999)
FLIPS = 4  # damaged copies per packed file, one bit each
MUTATIONS = 60  # per format
DETACHED = {".mhd": ".zraw", ".nhdr": ".raw.gz"}
MEBIBYTE = 1 << 20


def _source(shared: Path, name: str) -> Path:
    path = shared / "data" / name
    return path if path.exists() else sorted(path.parent.glob("*.nii.gz"))[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", VOLUMES)
def test_every_cut_or_flipped_file_is_refused_and_every_good_one_read(
    shared: Path, tmp_path: Path, name: str
) -> None:
    reference = read_image(_source(shared, name))
    rng = np.random.default_rng(len(name))
    good: list[Path] = []
    bad: list[Path] = []
    for ending in FORMATS:
        path = tmp_path / f"good{ending}"
        write_image(path, reference)
        good.append(path)
        raw = path.read_bytes()
        for cut in CUTS:
            bad.append(tmp_path / f"cut_{cut}{ending}")
            bad[-1].write_bytes(raw[: int(cut * len(raw))])
        if ending == ".nii":
            continue  # without any checksum: a flipped bit cannot be seen
        for flip in range(FLIPS):
            damaged = bytearray(raw)
            damaged[int(rng.integers(1000, len(raw)))] ^= 1 << int(rng.integers(8))
            bad.append(tmp_path / f"flip_{flip}{ending}")
            bad[-1].write_bytes(damaged)
    assert (len(good), len(bad)) == (4, 4 * 5 + 3 * FLIPS)
    outcomes = list(map_cases(_same_as(reference), [*good, *bad], workers=2, description=name))
    for outcome in outcomes:
        if outcome.item in good:
            assert isinstance(outcome, Done), outcome
            assert outcome.value, outcome.item
        else:
            assert isinstance(outcome, Failed), outcome.item
            assert outcome.item.name in str(outcome.error)
            assert "\n" not in str(outcome.error)


def _same_as(reference: Volume) -> partial[bool]:
    return partial(_is_same, reference)


def _is_same(reference: Volume, path: Path) -> bool:
    volume = read_image(path)
    same_voxels = np.array_equal(volume.array, reference.array)
    same_type = volume.array.dtype == reference.array.dtype
    return same_voxels and same_type and volume.grid.agrees_with(reference.grid, tolerance=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("ending", [*FORMATS, *DETACHED])
def test_mutated_headers_end_in_one_line_or_a_volume(tmp_path: Path, ending: str) -> None:
    voxels = np.random.default_rng(0).integers(0, 3000, size=(6, 7, 8)).astype(np.int16)
    path = tmp_path / f"a{ending}"
    sitk.WriteImage(sitk.GetImageFromArray(voxels), str(path), useCompression=ending != ".nii")
    packed = ending == ".nii.gz"  # the checksum would catch every change before the header is seen
    raw = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
    header = len(raw) if ending in DETACHED else min(len(raw), 400)
    rng = np.random.default_rng(1)
    slowest, errors = 0.0, []
    for _ in range(MUTATIONS):
        mutated = bytearray(raw)
        for _ in range(int(rng.integers(1, 4))):
            _mutate(mutated, header, rng)
        path.write_bytes(gzip.compress(mutated, 1) if packed else mutated)
        start = time.monotonic()
        try:
            shape, size = isolated(_read_small, path, memory_limit=512 * MEBIBYTE, timeout_s=10.0)
            assert len(shape) == 4
            assert size <= 64 * MEBIBYTE
        except DataError as error:
            errors.append(str(error))
        slowest = max(slowest, time.monotonic() - start)
    print(f"{ending}: {len(errors)} of {MUTATIONS} refused, slowest {slowest:.2f} s")
    assert len(errors) > MUTATIONS // 10
    for error in errors:  # refused by the reader, not ended by a crash or a limit
        assert error.startswith(f"{path}: ")
        assert "\n" not in error


def _read_small(path: Path) -> tuple[tuple[int, ...], int]:
    array = read_image(path).array
    return array.shape, array.nbytes


def _mutate(raw: bytearray, header: int, rng: np.random.Generator) -> None:
    """One change of the kinds that break parsers: bits, extreme, random, more or fewer bytes."""
    at = int(rng.integers(min(header, len(raw)) if rng.random() < 0.7 else len(raw)))
    match int(rng.integers(5)):
        case 0:
            raw[at] ^= 1 << int(rng.integers(8))
        case 1:
            raw[at] = int(rng.choice([0, 1, 127, 128, 255]))
        case 2:
            raw[at : at + 4] = rng.integers(0, 256, size=4, dtype=np.uint8).tobytes()
        case 3:
            raw[at:at] = b"9" * int(rng.integers(1, 6))
        case _:
            del raw[at : at + int(rng.integers(1, 8))]
