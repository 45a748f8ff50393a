"""One array in one compressed, chunked file (.b2nd): written once, read in patches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import blosc2
import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.errors import DataError

# 32^3 float32 are 128 KiB, which fits the second-level cache; a chunk of 64^3 keeps the surplus
# around an unaligned patch small. Of 7 shapes x 6 codecs on resampled CT read in patches of 96^3,
# LZ4HC 5 reads as fast as LZ4 and packs 10 % tighter; ZSTD packs 10 % tighter still but takes
# 3 times as long to read. Label maps are almost empty: the fastest ZSTD shrinks them to nothing.
LARGEST_BLOCK = 32  # voxels per axis
SMALLEST_BLOCK = 4
BLOCKS_PER_CHUNK = 2  # per axis
IMAGE_CODEC = (blosc2.Codec.LZ4HC, 5)
LABEL_CODEC = (blosc2.Codec.ZSTD, 1)
ONE_THREAD = {"nthreads": 1}  # a thread pool that was forked away would wait for ever
READ_OPTIONS: dict[str, Any] = {"mmap_mode": "r", "dparams": ONE_THREAD}  # Any: blosc2's keywords


def chunk_shapes(
    shape: Sequence[int], patch_size: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(chunks, blocks) for an array (..., D, H, W) read in patches of `patch_size` (z, y, x).

    A block spans at most half a patch, a power of two from 4 to 32 voxels, per axis, a chunk two
    blocks; both are cut to the volume, so one-slice and tiny volumes are one block. Leading axes
    are not mixed within a block.
    """
    lead = (1,) * (len(shape) - 3)
    blocks = tuple(
        min(size, _power_of_two(extent // 2))
        for size, extent in zip(shape[-3:], patch_size, strict=True)
    )
    chunks = tuple(
        min(size, BLOCKS_PER_CHUNK * block) for size, block in zip(shape[-3:], blocks, strict=True)
    )
    return lead + chunks, lead + blocks


def write_array(
    path: Path, array: NDArray[Any], *, patch_size: Sequence[int], kind: Literal["image", "labels"]
) -> None:
    """Writes (..., D, H, W) to a .b2nd file; the caller makes it atomic. Same bytes every time."""
    chunks, blocks = chunk_shapes(array.shape, patch_size)
    codec, level = IMAGE_CODEC if kind == "image" else LABEL_CODEC
    blosc2.asarray(
        np.ascontiguousarray(array),  # type: ignore[arg-type]  # blosc2's Array protocol is too narrow
        urlpath=str(path),
        mode="w",
        chunks=chunks,
        blocks=blocks,
        cparams={
            "codec": codec,
            "clevel": level,
            "filters": [blosc2.Filter.SHUFFLE],
            **ONE_THREAD,
        },
        dparams=ONE_THREAD,
    )


def open_array(path: Path, *, shape: Sequence[int], dtype: type[np.generic]) -> blosc2.NDArray:
    """Opens a .b2nd file for reading. Anything but a plain array of this shape and type: DataError.

    blosc2 files can also hold expressions with Python source; those are never opened.
    """
    try:
        array = blosc2.open(str(path), mode="r", **READ_OPTIONS)
    except Exception as error:  # blosc2 has no error type of its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: cannot be opened ({reason}); prepare the case again") from error
    if type(array) is not blosc2.NDArray:
        raise DataError(f"{path}: holds a {type(array).__name__}, expected a plain array")
    if array.shape != tuple(shape) or array.dtype != dtype:
        raise DataError(
            f"{path}: holds {array.dtype} {array.shape}, the index says "
            f"{np.dtype(dtype)} {tuple(shape)}; prepare the case again"
        )
    return array


def read_padded(
    array: blosc2.NDArray, start: Sequence[int], size: Sequence[int], *, pad_value: float
) -> NDArray[Any]:
    """(..., *size) cut from the last three axes at `start`; voxels outside get `pad_value`."""
    lead = array.shape[:-3]
    inside, target = [], []
    for first, extent, length in zip(start, size, array.shape[-3:], strict=True):
        low, high = min(max(first, 0), length), min(max(first + extent, 0), length)
        inside.append(slice(low, high))
        target.append(slice(low - first, high - first))
    everything = (slice(None),) * len(lead)
    if all(part.stop - part.start == extent for part, extent in zip(inside, size, strict=True)):
        return _decode(array, (*everything, *inside))
    patch = np.full((*lead, *size), pad_value, dtype=array.dtype)
    if all(part.stop > part.start for part in inside):
        patch[(*everything, *target)] = _decode(array, (*everything, *inside))
    return patch


def read_whole(array: blosc2.NDArray) -> NDArray[Any]:
    """The whole array in memory."""
    return _decode(array, (slice(None),) * array.ndim)


def _decode(array: blosc2.NDArray, key: tuple[slice, ...]) -> NDArray[Any]:
    try:
        return np.asarray(array[key])
    except RuntimeError as error:
        path = array.schunk.urlpath
        raise DataError(f"{path}: damaged ({error}); prepare the case again") from error


def _power_of_two(limit: int) -> int:
    block = SMALLEST_BLOCK
    while block * 2 <= min(limit, LARGEST_BLOCK):
        block *= 2
    return block
