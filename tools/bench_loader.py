"""Patches per second of the case store against reading whole volumes; `--quick` takes seconds.

    uv run tools/bench_loader.py [--quick] [--json]

All readers cut the same random patches from the same volumes, one after the other in one process
and alternating round by round, so that a busy machine slows them alike. Ratios are medians over the
rounds.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import blosc2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from voxelbridge.core.data.case_store import CaseStore, CaseStoreWriter
from voxelbridge.core.data.image_io import read_image, write_image
from voxelbridge.core.data.patches import uniform_start
from voxelbridge.core.data.volume import Grid, Volume

Reader = Callable[[str, Sequence[int]], NDArray[np.float32]]


@dataclass(frozen=True)
class Setting:
    """What is measured: volume and patch in voxels (z, y, x)."""

    shape: tuple[int, int, int]
    patch: tuple[int, int, int]
    num_cases: int
    rounds: int
    patches_per_round: int  # of the store; whole-volume readers cut `slow_patches`
    slow_patches: int


FULL = Setting((300, 300, 200), (96, 96, 96), 3, 5, 60, 4)
QUICK = Setting((120, 120, 80), (64, 64, 64), 2, 3, 30, 6)


def measure(setting: Setting, folder: Path) -> dict[str, object]:
    """Patches per second of every reader and the store's ratio to each; JSON-able."""
    names = [f"case{n}" for n in range(setting.num_cases)]
    started = time.perf_counter()
    _write_cases(names, setting, folder)
    written = time.perf_counter() - started
    started = time.perf_counter()
    store = CaseStore.open(folder / "store")
    for name in names:
        store.read_patch(name, (0, 0, 0), (8, 8, 8))  # the check at first read, counted apart
    first_read = (time.perf_counter() - started) / len(names)
    readers = _readers(store, setting, folder)
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for number in range(setting.rounds):
        for name, reader in readers.items():
            count = setting.slow_patches if "whole" in name else setting.patches_per_round
            rates[name].append(_rate(reader, names, setting, count=count, seed=number))
    ours = rates["store"]
    ratios = {
        name: statistics.median(a / b for a, b in zip(ours, other, strict=True))
        for name, other in rates.items()
        if name != "store"
    }
    stored = sum(path.stat().st_size for path in (folder / "store" / "cases").glob("*.b2nd"))
    return {
        "shape": setting.shape,
        "patch": setting.patch,
        "patches_per_second": {name: statistics.median(rate) for name, rate in rates.items()},
        "store_is_times_faster_than": ratios,
        "compression": 4.0 * np.prod(setting.shape).item() * len(names) / stored,
        "seconds_writing_all": written,
        "seconds_first_read_of_a_case": first_read,
    }


def main() -> None:
    """Command line: prints a table, or JSON with --json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small volumes, a few seconds")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(QUICK if arguments.quick else FULL, Path(folder))
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"volume {result['shape']}, patch {result['patch']}, {result['compression']:.2f}x packed")
    rates, ratios = result["patches_per_second"], result["store_is_times_faster_than"]
    assert isinstance(rates, dict)
    assert isinstance(ratios, dict)
    for name, rate in rates.items():
        ratio = f"store is {ratios[name]:.1f}x as fast" if name in ratios else ""
        print(f"{name:24s} {rate:8.1f} patches/s  {ratio}")
    print(f"first read of a case with its check: {result['seconds_first_read_of_a_case']:.3f} s")


def _write_cases(names: Sequence[str], setting: Setting, folder: Path) -> None:
    writer = CaseStoreWriter(folder / "store", patch_size=setting.patch)
    grid = Grid.from_parts(setting.shape, (1.0, 1.0, 1.0))
    for number, name in enumerate(names):
        image = _structure(setting.shape, np.random.default_rng(number))
        writer.write_case(name, image[None], grid=grid, boxes=[], labels=[])
        np.save(folder / f"{name}.npy", image)
        write_image(folder / f"{name}.nii.gz", Volume(image[None], grid))
    writer.finish()


def _structure(shape: tuple[int, int, int], rng: np.random.Generator) -> NDArray[np.float32]:
    # smooth anatomy on a coarse grid plus scanner noise in steps of 1 HU, normalised
    coarse = rng.normal(size=tuple(n // 10 + 2 for n in shape))
    zoom = [n / c for n, c in zip(shape, coarse.shape, strict=True)]
    smooth = np.asarray(ndimage.zoom(coarse, zoom, order=1)) * 300
    noisy = np.round(smooth + rng.normal(scale=10, size=shape))
    return ((noisy - noisy.mean()) / noisy.std()).astype(np.float32)


def _readers(store: CaseStore, setting: Setting, folder: Path) -> dict[str, Reader]:
    size = setting.patch

    def crop(array: NDArray[np.float32], start: Sequence[int]) -> NDArray[np.float32]:
        window = tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))
        return array[window].copy()

    def from_store(name: str, start: Sequence[int]) -> NDArray[np.float32]:
        return store.read_patch(name, start, size)

    def from_npy(name: str, start: Sequence[int]) -> NDArray[np.float32]:
        return crop(np.load(folder / f"{name}.npy"), start)

    def from_whole_store(name: str, start: Sequence[int]) -> NDArray[np.float32]:
        return crop(store.read_image(name)[0], start)

    def from_nifti(name: str, start: Sequence[int]) -> NDArray[np.float32]:
        return crop(read_image(folder / f"{name}.nii.gz").array[0], start)

    def with_acvl(name: str, start: Sequence[int]) -> NDArray[np.float32]:
        from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd

        path = folder / "store" / "cases" / f"{name}.b2nd"
        array = blosc2.open(str(path), mode="r", mmap_mode="r", dparams={"nthreads": 1})  # type: ignore[arg-type]  # blosc2's stub says dict
        box = [[s, s + n] for s, n in zip(start, size, strict=True)]
        return np.asarray(crop_and_pad_nd(array, box))

    return {
        "store": from_store,
        "acvl-utils lazy crop": with_acvl,
        "whole .npy": from_npy,
        "whole decompressed": from_whole_store,
        "whole .nii.gz": from_nifti,
    }


def _rate(
    reader: Reader, names: Sequence[str], setting: Setting, *, count: int, seed: int
) -> float:
    rng = np.random.default_rng(seed)
    picks = [
        (names[int(rng.integers(len(names)))], uniform_start(rng, setting.shape, setting.patch))
        for _ in range(count)
    ]
    checksum = 0.0
    started = time.perf_counter()
    for name, start in picks:
        checksum += float(reader(name, start)[..., 0, 0, 0].sum())
    seconds = time.perf_counter() - started
    assert np.isfinite(checksum)
    return count / seconds


if __name__ == "__main__":
    main()
