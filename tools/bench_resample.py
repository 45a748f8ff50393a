"""Our resampling against scikit-image's and, where it is installed, nnU-Net v2's, in one process.

    uv run tools/bench_resample.py --volumes FOLDER [--quick] [--json]
    uv run --isolated --no-project --with nnunetv2 --with-editable "packages/core[data]" \\
        tools/bench_resample.py --volumes FOLDER

FOLDER holds ct_lung_nodule/ct.nrrd and ct_abdomen/ct.nii.gz; without it, phantoms of the same
shapes and spacings are taken. One thread; the sides alternate, and CPU seconds are compared: on a
shared machine even those drift. The results must be equal, or the run fails.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.transform import resize
from threadpoolctl import threadpool_limits

from voxelbridge.core.data.image_io import read_image
from voxelbridge.core.data.resample import coarse_axis, resample_image, resampled_shape
from voxelbridge.core.data.volume import Grid, Volume

SPACING_MM = (1.0, 1.0, 1.0)
LARGEST_DIFFERENCE = 1e-4  # of the range of values
VOLUMES = {
    "ct_lung_nodule": ("ct_lung_nodule/ct.nrrd", (48, 512, 512), (5.0, 0.5703125, 0.5703125)),
    "ct_abdomen": ("ct_abdomen/ct.nii.gz", (112, 101, 122), (3.0, 3.0, 3.0)),
}


@dataclass(frozen=True)
class Result:
    """CPU seconds (medians over the rounds) and the largest difference as a part of the range."""

    volume: str
    peer: str
    rule: str
    ours_s: float
    peer_s: float
    times_faster: float  # median over the rounds
    difference: float
    equal: bool  # whether the two sides follow one rule; then equality was checked


def main() -> None:
    """Command line: prints a table, or JSON with --json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--volumes", type=Path, help="folder of real volumes (see the top)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small crops, one round")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    results: list[Result] = []
    with threadpool_limits(1):
        for name in VOLUMES:
            volume = load(name, arguments.volumes)
            if arguments.quick:
                volume = _crop(volume)
            rounds = 1 if arguments.quick else arguments.rounds
            results += measure(name, volume, rounds=rounds)
    if arguments.json:
        print(json.dumps([asdict(result) for result in results]))
        return
    if find_spec("nnunetv2") is None:
        print("nnunetv2 is not installed here: only scikit-image is compared (see --help)")
    for r in results:
        equal = f"largest difference {r.difference:.1e} of the range"
        print(
            f"{r.volume:15s} {r.rule:18s} ours {r.ours_s:7.3f} s  {r.peer} {r.peer_s:7.3f} s  "
            f"{r.times_faster:6.1f}x as fast, {equal if r.equal else 'by another rule'}"
        )


def load(name: str, folder: Path | None) -> Volume:
    """The real volume where `folder` has it, otherwise a phantom of its shape and spacing."""
    file, shape, spacing = VOLUMES[name]
    if folder is not None:
        return read_image(folder / file)
    rng = np.random.default_rng(0)
    coarse = rng.normal(size=tuple(n // 8 + 2 for n in shape))
    zoom = [n / c for n, c in zip(shape, coarse.shape, strict=True)]
    smooth = np.asarray(ndimage.zoom(coarse, zoom, order=1)) * 400
    array = np.round(smooth + rng.normal(scale=20, size=shape)).astype(np.int16)
    return Volume(array[None], Grid.from_parts(shape, spacing))


def measure(name: str, volume: Volume, *, rounds: int) -> list[Result]:
    """Ours against each peer, alternating; nnU-Net with its own rule and with its default."""
    spacing = volume.grid.spacing_mm
    shape = resampled_shape(volume.grid.shape, spacing, SPACING_MM)
    axis = coarse_axis(spacing, SPACING_MM)
    array = volume.array

    def cubic() -> NDArray[np.float32]:
        return resample_image(array, shape)

    def shortcut() -> NDArray[np.float32]:
        return resample_image(array, shape, nearest_axis=axis)

    results = [compare(name, "skimage", "cubic", cubic, _skimage(array[0], shape), rounds)]
    if find_spec("nnunetv2") is not None:
        peer = _nnunet(array, shape, spacing)
        if axis is None:
            results.append(compare(name, "nnU-Net", "cubic", cubic, peer, rounds))
        else:
            results.append(compare(name, "nnU-Net", "nearest across", shortcut, peer, rounds))
            # its default against ours: other numbers by intention, so only the time is compared
            results.append(
                compare(name, "nnU-Net", "default to default", cubic, peer, rounds, equal=False)
            )
    return results


def compare(
    name: str,
    peer_name: str,
    rule: str,
    ours: Callable[[], NDArray[Any]],
    peer: Callable[[], NDArray[Any]],
    rounds: int,
    *,
    equal: bool = True,
) -> Result:
    """Alternates the two sides; raises where `equal` results differ."""
    ours()  # the matrices of the two shapes are computed once per process
    seconds: list[tuple[float, float]] = []
    difference = 0.0
    for _ in range(rounds):
        started = time.process_time()
        first = ours()
        between = time.process_time()
        second = peer()
        seconds.append((between - started, time.process_time() - between))
        span = float(second.max() - second.min()) or 1.0
        difference = max(difference, float(np.abs(first - second).max()) / span)
    if equal and difference > LARGEST_DIFFERENCE:
        raise SystemExit(f"error: {name}, {rule}: differs from {peer_name} by {difference:.2g}")
    return Result(
        name,
        peer_name,
        rule,
        statistics.median(a for a, _ in seconds),
        statistics.median(b for _, b in seconds),
        statistics.median(b / a for a, b in seconds),
        difference,
        equal,
    )


def _skimage(array: NDArray[Any], shape: Sequence[int]) -> Callable[[], NDArray[Any]]:
    def run() -> NDArray[Any]:
        return np.asarray(
            resize(
                array,
                shape,
                order=3,
                mode="edge",
                anti_aliasing=False,
                clip=True,
                preserve_range=True,
            )
        )[None]

    return run


def _nnunet(
    array: NDArray[Any], shape: Sequence[int], spacing: Sequence[float]
) -> Callable[[], NDArray[Any]]:
    from nnunetv2.preprocessing.resampling.default_resampling import (  # type: ignore[import-not-found]  # in its own environment
        resample_data_or_seg_to_shape,
    )

    image = array.astype(np.float32)  # as nnU-Net's preprocessing hands it over

    def run() -> NDArray[Any]:
        return resample_data_or_seg_to_shape(
            image,
            shape,
            spacing,
            SPACING_MM,
            is_seg=False,
            order=3,
            order_z=0,
            force_separate_z=None,
        )

    return run


def _crop(volume: Volume) -> Volume:
    half = tuple(n // 4 for n in volume.grid.shape)
    window = tuple(slice(n, 2 * n) for n in half)
    return Volume(volume.array[(slice(None), *window)], volume.grid.cropped(half, half))


if __name__ == "__main__":
    main()
