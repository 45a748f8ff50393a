"""Resampling over equal outer edges: cubic B-spline for images, nearest voxel for labels.

A separable resize is one small matrix per axis. Multiplying by the three matrices gives what
`skimage.transform.resize(order=3, mode="edge", anti_aliasing=False, clip=True)` gives, at a small
fraction of its time.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from voxelbridge.core.data.volume import Shape

BAND_TOLERANCE = 1e-7  # spline weights below this are left out: the filter decays by 0.27 per voxel
ROWS_PER_BLOCK = 32  # output positions per product; neighbours share most of their input window
SLAB_BYTES = 64 << 20  # a slab of slices is resized at once: working memory stays near this


def resampled_shape(
    shape: Sequence[int], spacing_mm: Sequence[float], new_spacing_mm: Sequence[float]
) -> Shape:
    """Shape at another spacing: round(shape * old / new), at least one voxel per axis (z, y, x)."""
    z, y, x = (
        max(1, int(np.round(n * old / new)))
        for n, old, new in zip(shape, spacing_mm, new_spacing_mm, strict=True)
    )
    return z, y, x


def resample_image(array: NDArray[Any], shape: Sequence[int]) -> NDArray[np.float32]:
    """(C, D, H, W) -> (C, *shape) float32, cubic, edges aligned, clipped to each channel's range.

    An image that already has this shape is returned untouched (only cast to float32).
    """
    if array.ndim != 4:
        raise ValueError(f"image must be (C, D, H, W), got {array.shape}")
    image = array.astype(np.float32, copy=False)
    if tuple(shape) == image.shape[1:]:
        return image
    resized = np.empty((image.shape[0], *shape), dtype=np.float32)
    for source, target in zip(image, resized, strict=True):
        _resize_channel(source, target)
        np.clip(target, source.min(), source.max(), out=target)
    return resized


def resample_labels(array: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
    """(D, H, W) -> shape by the nearest voxel centre, edges aligned; the type is kept.

    A centre exactly between two voxels takes the later one.
    """
    if array.ndim != 3:
        raise ValueError(f"label map must be (D, H, W), got {array.shape}")
    if tuple(shape) == array.shape:
        return array
    picks = (
        # integer arithmetic: floor((i + 0.5) * old / new) without rounding error
        ((2 * np.arange(new) + 1) * old) // (2 * new)
        for old, new in zip(array.shape, shape, strict=True)
    )
    return array[np.ix_(*picks)]


def _resize_channel(source: NDArray[np.float32], target: NDArray[np.float32]) -> None:
    # (D, H, W) -> target. Axes that shrink come first, so that the later products are smaller; z
    # goes first or last as a whole, y and x slab by slab to bound the memory.
    shrinks = target.shape[0] < source.shape[0]
    current: NDArray[np.float32] = source
    if shrinks:
        current = np.empty_like(source, shape=(target.shape[0], *source.shape[1:]), order="C")
        _resize_z(source, current)
    plane_bytes = 4 * max(current.shape[1], target.shape[1]) * max(source.shape[2], target.shape[2])
    step = max(1, SLAB_BYTES // plane_bytes)
    if shrinks or source.shape[0] == target.shape[0]:
        for start in range(0, current.shape[0], step):
            target[start : start + step] = _resize_plane(
                current[start : start + step], target.shape[1:]
            )
        return
    planes = np.empty((source.shape[0], *target.shape[1:]), dtype=np.float32)
    for start in range(0, source.shape[0], step):
        planes[start : start + step] = _resize_plane(source[start : start + step], target.shape[1:])
    _resize_z(planes, target)


def _resize_z(source: NDArray[np.float32], target: NDArray[np.float32]) -> None:
    # target must be contiguous: the products are written into views of it
    flat, out = source.reshape(len(source), -1), target.reshape(len(target), -1)
    for rows, columns, weights in _blocks(len(source), len(target)):
        np.matmul(weights, flat[columns], out=out[rows])


def _resize_plane(slab: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    height, width = shape
    if height * slab.shape[2] <= width * slab.shape[1]:  # the smaller intermediate first
        return _resize_x(_resize_y(slab, height), width)
    return _resize_y(_resize_x(slab, width), height)


def _resize_y(slab: NDArray[np.float32], new: int) -> NDArray[np.float32]:
    depth, height, width = slab.shape
    if height == new:
        return slab
    out = np.empty((depth, new, width), dtype=np.float32)
    for rows, columns, weights in _blocks(height, new):
        out[:, rows] = np.matmul(weights, slab[:, columns])
    return out


def _resize_x(slab: NDArray[np.float32], new: int) -> NDArray[np.float32]:
    depth, height, width = slab.shape
    if width == new:
        return slab
    flat = slab.reshape(-1, width)
    out = np.empty((depth * height, new), dtype=np.float32)
    for rows, columns, weights in _blocks(width, new):
        out[:, rows] = flat[:, columns] @ weights.T
    return out.reshape(depth, height, new)


@lru_cache(maxsize=16)
def _blocks(old: int, new: int) -> tuple[tuple[slice, slice, NDArray[np.float32]], ...]:
    # The resize matrix (new, old) of one axis as dense blocks around its diagonal band.
    matrix = np.asarray(
        ndimage.zoom(np.eye(old), (new / old, 1.0), order=3, mode="nearest", grid_mode=True)
    )
    blocks = []
    for start in range(0, new, ROWS_PER_BLOCK):
        rows = slice(start, min(start + ROWS_PER_BLOCK, new))
        used = np.flatnonzero((np.abs(matrix[rows]) > BAND_TOLERANCE).any(axis=0))
        columns = slice(int(used[0]), int(used[-1]) + 1)
        weights = np.ascontiguousarray(matrix[rows, columns], dtype=np.float32)
        weights.setflags(write=False)
        blocks.append((rows, columns, weights))
    return tuple(blocks)
