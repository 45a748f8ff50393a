"""Crops of a patch for VoCo: base crops on a grid, target crops anywhere, how much they share.

The grid cuts the patch into equal boxes without gaps; base crop number i is the i-th of them in
the order z, y, x (x fastest). Target crops have the size of a base crop.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from voxelbridge.core.arch.config import Triple

NO_ORIENTATION = (0, 0, 0, 0)  # mirrored along z, y, x (0 or 1), quarter turns (0 to 3)


def crop_size(patch_size: Triple, grid: Triple) -> Triple:
    """Voxels of a crop (z, y, x); a grid that does not divide the patch is a ValueError."""
    if any(edge % parts for edge, parts in zip(patch_size, grid, strict=True)):
        raise ValueError(
            f"base_grid {list(grid)} does not divide the patch {list(patch_size)}; take a patch "
            "of multiples of it"
        )
    z, y, x = (edge // parts for edge, parts in zip(patch_size, grid, strict=True))
    return z, y, x


def base_starts(grid: Triple, crop: Triple) -> NDArray[np.int64]:
    """First voxels (n, 3) of the base crops."""
    return np.indices(grid).reshape(3, -1).T * np.asarray(crop)


def random_starts(
    rng: np.random.Generator, count: int, *, patch_size: Sequence[int], crop: Triple
) -> NDArray[np.int64]:
    """First voxels (count, 3) of target crops, uniform over all positions inside the patch."""
    free = [edge - part for edge, part in zip(patch_size, crop, strict=True)]
    return rng.integers(free, size=(count, 3), endpoint=True)


def overlap_fractions(
    targets: NDArray[np.int64], bases: NDArray[np.int64], crop: Triple
) -> NDArray[np.float32]:
    """Share |T and B| / |T| of each target crop (k, 3) in each base crop (n, 3): (k, n).

    A row sums to 1: the base crops leave no gap.
    """
    distance = np.abs(targets[:, None] - bases[None])  # (k, n, 3)
    shared = np.maximum(np.asarray(crop) - distance, 0).prod(axis=-1)
    return (shared / np.prod(crop)).astype(np.float32)


def random_orientations(
    rng: np.random.Generator, count: int, *, mirror: float, rot90: float
) -> NDArray[np.int64]:
    """(count, 4): each axis mirrored with probability `mirror`; 1 to 3 turns with `rot90`."""
    mirrored = rng.random((count, 3)) < mirror
    turns = np.where(rng.random(count) < rot90, rng.integers(1, 4, size=count), 0)
    return np.concatenate([mirrored, turns[:, None]], axis=1).astype(np.int64)


def cut_crops(
    image: Tensor,
    starts: NDArray[np.int64],
    crop: Triple,
    *,
    orientations: NDArray[np.int64] | None = None,
    turned_axes: tuple[int, int] = (0, 1),
) -> Tensor:
    """Crops (B, M, C, *crop) of `image` (B, C, D, H, W) at `starts` (B, M, 3).

    With `orientations` (B, M, 4) each is then mirrored, then turned as by `rot90` in the plane of
    the spatial axes `turned_axes`.
    """
    batch, count = starts.shape[:2]
    crops = image.new_empty(batch, count, image.shape[1], *crop)
    turned = (turned_axes[0] + 1, turned_axes[1] + 1)
    for b in range(batch):
        for m in range(count):
            z, y, x = starts[b, m].tolist()
            voxels = image[b, :, z : z + crop[0], y : y + crop[1], x : x + crop[2]]
            if orientations is not None:
                *mirrored, turns = orientations[b, m].tolist()
                axes = [axis + 1 for axis in range(3) if mirrored[axis]]
                voxels = voxels.flip(axes) if axes else voxels
                voxels = torch.rot90(voxels, turns, turned) if turns else voxels
            crops[b, m] = voxels
    return crops
