"""Cuboids filled with noise, or all but cuboids (Models Genesis, arXiv 1908.06912, section 3.1)."""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from voxelbridge.pretrain_ssl.corruptions.intensity import IntensityRange
from voxelbridge.pretrain_ssl.corruptions.noise import uniform

MAX_CUBOIDS = 5
MARGIN = 3  # voxels between a cuboid and the border of the patch


class Paint(IntEnum):
    """What noise replaces: nothing, the voxels inside the cuboids, or those outside."""

    NONE = 0
    INSIDE = 1  # in-painting
    OUTSIDE = 2  # out-painting


def draw_paint(rng: np.random.Generator, *, probability: float, outpaint_share: float) -> Paint:
    """Whether a patch is painted, and how."""
    is_painted, is_outside = rng.random() < probability, rng.random() < outpaint_share
    return (Paint.OUTSIDE if is_outside else Paint.INSIDE) if is_painted else Paint.NONE


def draw_cuboids(
    rng: np.random.Generator, shape: Sequence[int], paint: Paint, *, probability: float
) -> NDArray[np.int16]:
    """First voxels and edges of the cuboids in a patch (D, H, W), (MAX_CUBOIDS, 6), edge 0 = none.

    In-painting: cuboids follow, up to five, each with `probability` given the one before; edges
    uniform in extent // 6 .. extent // 3. Out-painting: one, and up to four more likewise; edges
    extent - uniform in (3 extent) // 7 .. (4 extent) // 7. Positions are uniform with 3 voxels to
    the border on either side; with as many as there are where the patch is too small for that.
    """
    extent = np.asarray(shape)
    size = (MAX_CUBOIDS, 3)
    match paint:
        case Paint.NONE:
            count, edges = 0, np.zeros(size, dtype=np.int64)
        case Paint.INSIDE:
            count = _run_length(rng, MAX_CUBOIDS, probability)
            smallest = np.maximum(1, extent // 6)
            edges = rng.integers(smallest, np.maximum(smallest, extent // 3), size, endpoint=True)
        case Paint.OUTSIDE:
            count = 1 + _run_length(rng, MAX_CUBOIDS - 1, probability)
            edges = extent - rng.integers(3 * extent // 7, 4 * extent // 7, size, endpoint=True)
    room = extent - edges
    margin = np.minimum(MARGIN, room // 2)
    starts = rng.integers(margin, room - margin, endpoint=True)
    cuboids = np.concatenate([starts, edges], axis=1).astype(np.int16)
    cuboids[count:] = 0
    return cuboids


def painted(paint: Tensor, cuboids: Tensor, shape: Sequence[int]) -> Tensor:
    """The voxels that noise replaces; (B,), (B, K, 6) -> (B, D, H, W) bool."""
    inside = torch.zeros((len(paint), *shape), dtype=torch.bool, device=paint.device)
    axes = [_covered(cuboids, axis, extent) for axis, extent in enumerate(shape)]  # (B, K, extent)
    for z, y, x in zip(*(axis.unbind(1) for axis in axes), strict=True):
        inside |= z[:, :, None, None] & y[:, None, :, None] & x[:, None, None, :]
    kind = paint.view(-1, 1, 1, 1)
    return (inside ^ (kind == Paint.OUTSIDE)) & (kind != Paint.NONE)


def paint_noise(
    image: Tensor, paint: Tensor, cuboids: Tensor, seeds: Tensor, *, within: IntensityRange
) -> Tensor:
    """A copy of `image` (B, C, D, H, W), noise uniform over the range `within` where `painted`.

    `paint` (B,), see `Paint`; `cuboids` (B, K, 6); `seeds` (B, 2). Every channel has noise of its
    own.
    """
    noise = within.from_unit(uniform(seeds, image[0].numel()).view_as(image))
    return torch.where(painted(paint, cuboids, image.shape[2:])[:, None], noise, image)


def _covered(cuboids: Tensor, axis: int, extent: int) -> Tensor:
    """Which places along an axis each cuboid covers, (B, K, extent)."""
    first, edge = cuboids[..., axis, None], cuboids[..., 3 + axis, None]
    place = torch.arange(extent, device=cuboids.device)
    return (place >= first) & (place < first + edge)


def _run_length(rng: np.random.Generator, most: int, probability: float) -> int:
    """How many draws succeed before the first fails, at most `most`."""
    fails = np.flatnonzero(rng.random(most) >= probability)
    return int(fails[0]) if len(fails) else most
