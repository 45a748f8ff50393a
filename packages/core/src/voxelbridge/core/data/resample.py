"""Resampling over equal outer edges: cubic B-spline for images, nearest voxel for labels.

A separable resize is one small matrix per axis. Multiplying by the three matrices gives what
`skimage.transform.resize(order=3, mode="edge", anti_aliasing=False, clip=True)` gives, at a small
fraction of its time. nnU-Net's other rules are settings (`Resampling`): nearest slices along a
coarse axis, and label maps by linear votes (label_interpolation.py).
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from voxelbridge.core.config import Config
from voxelbridge.core.data.label_interpolation import nearest_picks, resample_labels_linear
from voxelbridge.core.data.volume import Shape

BAND_TOLERANCE = 1e-7  # spline weights below this are left out: the filter decays by 0.27 per voxel
ROWS_PER_BLOCK = 32  # output positions per product; neighbours share most of their input window
SLAB_BYTES = 8 << 20  # slices are resized in groups of about this size: they stay in the cache
ANISOTROPY_THRESHOLD = 3.0  # nnU-Net's: above this ratio of spacings one axis counts as coarse
EQUAL = 1e-5  # spacings from float32 headers and direction matrices that differ by less are one

Float32 = NDArray[np.float32]


class Workspace(Protocol):
    """Where large temporary volumes lie; it hears of progress, so that it can tidy up between."""

    def empty(self, shape: Sequence[int]) -> Float32:
        """A contiguous array with any content."""
        ...

    def wrote(self, num_bytes: int) -> None:
        """Told after every slab that was written."""
        ...


class InMemory:
    """The workspace that is plain memory."""

    def empty(self, shape: Sequence[int]) -> Float32:
        return np.empty(tuple(shape), dtype=np.float32)

    def wrote(self, num_bytes: int) -> None:
        pass


IN_MEMORY = InMemory()


class Resampling(Config):
    """How voxels are interpolated between grids.

    `image`: "cubic" is order 3 along all axes; "nnunet" takes nnU-Net's shortcut where one axis is
    more than three times as coarse as the finest: order 3 within slices, the nearest slice across.
    `labels`: "nearest" takes the voxel whose centre is nearest; "nnunet" the label with the
    largest linear weight, with the same shortcut along a coarse axis.
    """

    image: Literal["cubic", "nnunet"] = "cubic"
    labels: Literal["nearest", "nnunet"] = "nearest"


def resampled_shape(
    shape: Sequence[int], spacing_mm: Sequence[float], new_spacing_mm: Sequence[float]
) -> Shape:
    """Shape at another spacing: round(old / new * shape), at least one voxel per axis (z, y, x).

    Rounded and multiplied in nnU-Net's order, so that halves round as they do there.
    """
    z, y, x = (
        max(1, round(float(old) / float(new) * n))
        for n, old, new in zip(shape, spacing_mm, new_spacing_mm, strict=True)
    )
    return z, y, x


def coarse_axis(spacing_mm: Sequence[float], new_spacing_mm: Sequence[float]) -> int | None:
    """The axis that nnU-Net resamples on its own (0, 1 or 2), or None.

    The old spacing decides where its largest step is more than three times its smallest,
    otherwise the new one does. Two equally coarse axes are not treated separately; equal means
    within rounding of the header, where nnU-Net compares all digits.
    """
    for spacing in (spacing_mm, new_spacing_mm):
        if max(spacing) / min(spacing) > ANISOTROPY_THRESHOLD:
            coarse = [
                axis for axis, step in enumerate(spacing) if step > max(spacing) * (1 - EQUAL)
            ]
            return coarse[0] if len(coarse) == 1 else None
    return None


def resample_image(
    array: NDArray[Any], shape: Sequence[int], *, nearest_axis: int | None = None
) -> Float32:
    """(C, D, H, W) -> (C, *shape) float32, cubic, edges aligned, clipped to each channel's range.

    With `nearest_axis` the slices across that axis are resized by themselves, each clipped to its
    own range, and along it the nearest one is taken (nnU-Net's rule for anisotropic volumes).
    An image that already has this shape is returned untouched (only cast to float32).
    """
    if array.ndim != 4:
        raise ValueError(f"image must be (C, D, H, W), got {array.shape}")
    if tuple(shape) == array.shape[1:]:
        return array.astype(np.float32, copy=False)
    resized = np.empty((array.shape[0], *shape), dtype=np.float32)
    for source, target in zip(array, resized, strict=True):
        resample_into(target, source, nearest_axis=nearest_axis)
    return resized


def resample_into(
    target: Float32,
    source: NDArray[Any],
    *,
    nearest_axis: int | None = None,
    workspace: Workspace = IN_MEMORY,
) -> None:
    """Writes one channel (D, H, W), resampled as `resample_image` does it, to contiguous `target`.

    `target` may be a mapped file: it is written slab by slab, and read back at most once. The same
    numbers to the bit in any workspace.
    """
    if source.shape == target.shape:
        step = max(1, SLAB_BYTES // (4 * source[0].size))
        for start in range(0, len(source), step):
            part = target[start : start + step]
            part[...] = source[start : start + step]
            workspace.wrote(part.nbytes)
    elif nearest_axis is None:
        _resize_channel(source, target, workspace)
    else:
        _resize_slices(
            np.moveaxis(source, nearest_axis, 0), np.moveaxis(target, nearest_axis, 0), workspace
        )


def resample_labels(array: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
    """(D, H, W) -> shape by the nearest voxel centre, edges aligned; the type is kept.

    A centre exactly between two voxels takes the later one.
    """
    if array.ndim != 3:
        raise ValueError(f"label map must be (D, H, W), got {array.shape}")
    if tuple(shape) == array.shape:
        return array
    growth = [new / old for old, new in zip(array.shape, shape, strict=True)]
    picked = array
    for axis in sorted(range(3), key=lambda axis: (growth[axis], -axis)):  # the least copied
        old, new = array.shape[axis], shape[axis]
        if old != new:
            # integer arithmetic: floor((i + 0.5) * old / new) without rounding error
            picked = picked.take(((2 * np.arange(new) + 1) * old) // (2 * new), axis=axis)
    return picked


def resample_image_by(
    resampling: Resampling,
    array: NDArray[Any],
    shape: Sequence[int],
    *,
    spacing_mm: Sequence[float],
    new_spacing_mm: Sequence[float],
) -> Float32:
    """(C, D, H, W) -> (C, *shape) by the rule of `resampling.image`; spacings are (z, y, x)."""
    axis = nearest_image_axis(resampling, spacing_mm, new_spacing_mm)
    return resample_image(array, shape, nearest_axis=axis)


def nearest_image_axis(
    resampling: Resampling, spacing_mm: Sequence[float], new_spacing_mm: Sequence[float]
) -> int | None:
    """The axis of an image along which `resampling` takes the nearest slice, or None."""
    return coarse_axis(spacing_mm, new_spacing_mm) if resampling.image == "nnunet" else None


def resample_labels_by(
    resampling: Resampling,
    array: NDArray[Any],
    shape: Sequence[int],
    *,
    spacing_mm: Sequence[float],
    new_spacing_mm: Sequence[float],
) -> NDArray[Any]:
    """(D, H, W) -> shape by the rule of `resampling.labels`; spacings are (z, y, x)."""
    if resampling.labels == "nearest":
        return resample_labels(array, shape)
    axis = coarse_axis(spacing_mm, new_spacing_mm)
    return resample_labels_linear(array, shape, nearest_axis=axis)


def _resize_channel(source: NDArray[Any], target: Float32, workspace: Workspace) -> None:
    # (D, H, W) -> target. Axes that shrink come first, so that the later products are smaller; z
    # goes first or last as a whole, y and x slab by slab: temporaries stay within one slab, plus
    # the volume that is half done, which is never larger than the larger of source and target.
    low, high = np.float32(source.min()), np.float32(source.max())

    def finish(part: Float32) -> None:  # while the part is still in the cache
        np.clip(part, low, high, out=part)
        workspace.wrote(part.nbytes)

    def half_way(part: Float32) -> None:
        workspace.wrote(part.nbytes)

    if target.shape[0] < source.shape[0]:
        thinner = workspace.empty((target.shape[0], *source.shape[1:]))
        _resize_z(source, thinner, half_way)
        _resize_planes(thinner, target, finish)
    elif target.shape[0] == source.shape[0]:
        _resize_planes(source, target, finish)
    else:
        planes: NDArray[Any] = source
        if source.shape[1:] != target.shape[1:]:
            planes = workspace.empty((source.shape[0], *target.shape[1:]))
            _resize_planes(source, planes, half_way)
        _resize_z(planes, target, finish)


def _resize_slices(source: NDArray[Any], target: Float32, workspace: Workspace) -> None:
    # The first axis by the nearest slice. Only slices that are taken are resized, each once.
    picks = nearest_picks(source.shape[0], target.shape[0])
    for pick in np.unique(picks):
        slice_ = source[pick : pick + 1]
        resized = np.empty((1, *target.shape[1:]), dtype=np.float32)
        _resize_planes(slice_, resized)
        np.clip(resized, np.float32(slice_.min()), np.float32(slice_.max()), out=resized)
        target[picks == pick] = resized
        workspace.wrote(resized.nbytes)


def _resize_planes(
    source: NDArray[Any], target: Float32, finish: Callable[[Float32], None] | None = None
) -> None:
    # (D, H, W) -> (D, *shape), a few slices at a time; any layout and type of source
    height, width = target.shape[1:]
    shape = source.shape[1:]
    y_first = height * shape[1] <= width * shape[0]  # the smaller intermediate first
    between = (height, shape[1]) if y_first else (shape[0], width)
    plane_bytes = 4 * max(shape[0] * shape[1], between[0] * between[1], height * width)
    step = min(len(source), max(1, SLAB_BYTES // plane_bytes))
    slab = np.empty((step, *shape), dtype=np.float32)  # reused: fresh memory costs page faults
    half = np.empty((step, *between), dtype=np.float32)
    first, second = (_resize_y, _resize_x) if y_first else (_resize_x, _resize_y)
    for start in range(0, len(source), step):
        part = target[start : start + step]
        count = len(part)
        slab[:count] = source[start : start + step]
        first(slab[:count], half[:count])
        if part.flags.c_contiguous:
            second(half[:count], part)
        else:
            done = np.empty(part.shape, dtype=np.float32)
            second(half[:count], done)
            part[...] = done
        if finish is not None:
            finish(part)


def _resize_z(
    source: NDArray[Any], target: Float32, finish: Callable[[Float32], None] | None = None
) -> None:
    # target is contiguous: the products are written into views of it, a few rows of each slice at
    # a time, so that what is read and written stays in the cache
    depth, height, width = source.shape
    step = max(1, SLAB_BYTES // (4 * width * max(depth, len(target))))
    for start in range(0, height, step):
        rows_y = slice(start, start + step)
        slab = source[:, rows_y].astype(np.float32, order="C").reshape(depth, -1)
        part = target.reshape(len(target), -1)[:, start * width : start * width + slab.shape[1]]
        for rows, columns, weights in _blocks(depth, len(target)):
            np.matmul(weights, slab[columns], out=part[rows])
        if finish is not None:
            finish(part)


def _resize_y(slab: Float32, target: Float32) -> None:
    if slab.shape == target.shape:
        target[...] = slab
        return
    for rows, columns, weights in _blocks(slab.shape[1], target.shape[1]):
        np.matmul(weights, slab[:, columns], out=target[:, rows])


def _resize_x(slab: Float32, target: Float32) -> None:
    if slab.shape == target.shape:
        target[...] = slab
        return
    flat, out = slab.reshape(-1, slab.shape[2]), target.reshape(-1, target.shape[2])
    for rows, columns, weights in _blocks(slab.shape[2], target.shape[2]):
        np.matmul(flat[:, columns], weights.T, out=out[:, rows])


@lru_cache(maxsize=16)
def _blocks(old: int, new: int) -> tuple[tuple[slice, slice, Float32], ...]:
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
