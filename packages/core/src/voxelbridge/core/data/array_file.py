"""The arrays of a case: compressed, chunked files (.b2nd) read in patches, lists of voxels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import blosc2
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from voxelbridge.core.errors import DataError

# 32^3 float32 are 128 KiB, which fits the second-level cache; a chunk of 64^3 keeps the surplus
# around an unaligned patch small. Of LZ4, LZ4HC and ZSTD on resampled CT (docs/preprocessing.md),
# LZ4 writes 11 times faster than LZ4HC, reads as fast and packs 9 % worse; ZSTD packs best but
# takes more than twice as long to read, and patches are read far more often than written. Label
# maps are almost empty: the fastest ZSTD shrinks them to nothing.
LARGEST_BLOCK = 32  # voxels per axis
SMALLEST_BLOCK = 4
BLOCKS_PER_CHUNK = 2  # per axis
IMAGE_CODEC = (blosc2.Codec.LZ4, 5)
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


def write_locations(path: Path, locations: Mapping[int, NDArray[Any]]) -> None:
    """Writes voxels (N, 3) per class as safetensors, one int32 tensor per class number."""
    tensors = {
        str(label): np.ascontiguousarray(locations[label], dtype=np.int32)
        for label in sorted(locations)
    }
    path.write_bytes(save(tensors))


def read_locations(path: Path) -> dict[int, NDArray[np.int32]]:
    """What `write_locations` wrote; anything else is a DataError."""
    try:
        tensors = load_file(path)
        locations = {int(label): tensors[label] for label in sorted(tensors, key=int)}
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be read ({error}); prepare the case again") from error
    for label, voxels in locations.items():
        if voxels.dtype != np.int32 or voxels.ndim != 2 or voxels.shape[1] != 3:
            raise DataError(f"{path}: class {label} holds {voxels.dtype} {voxels.shape}")
    return locations


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
