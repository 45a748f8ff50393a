"""Drawn spatial transforms applied on the device of the voxels, for whole batches.

    boxes = SourceBoxes(sources, params)        # made in the loader: read, drawn, not resampled
    images = boxes.to(device).apply()           # (B, C, *patch_size) on the device

The values are those of `SpatialParams.apply_image` up to rounding: both work with coordinates in
float32, which err by a few 1e-5 voxels where a source box is 200 voxels long. The parameters stay
on the CPU, so nothing waits for the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from voxelbridge.core.data.augment import SpatialParams


@dataclass(frozen=True, eq=False)
class SourceBoxes:
    """A batch before its transforms: source boxes (C, *size), each of its own size, and draws.

    `source_box` of each of the `params` says which voxels its source holds.
    """

    sources: tuple[Tensor, ...]
    params: tuple[SpatialParams, ...]

    def __post_init__(self) -> None:
        if len(self.sources) != len(self.params):
            raise ValueError(f"{len(self.sources)} sources, {len(self.params)} transforms")

    def to(self, device: torch.device | str) -> "SourceBoxes":
        """The same with its voxels on `device`."""
        moved = tuple(source.to(device, non_blocking=True) for source in self.sources)
        return SourceBoxes(moved, self.params)

    def apply(self) -> Tensor:
        """The patches (B, C, *patch_size), as `apply_images_on` gives them."""
        return apply_images_on(self.sources, self.params)


def apply_image_on(source: Tensor, params: SpatialParams) -> Tensor:
    """The patch (C, *patch_size) from the voxels (C, *size) of `source_box`, trilinear, float32.

    On the source's device. Where nothing but mirroring was drawn, voxels are copied exactly.
    """
    params.check_source(source.shape[1:])
    if params.copies:
        return source.flip([1 + axis for axis in params.flipped_axes]).float()
    image, grid = source[None].float(), _grid(params, source)
    # the neighbours of all points lie in the box; border only takes what rounding moves outside
    patch = grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return patch[0]


def apply_images_on(sources: Sequence[Tensor], params: Sequence[SpatialParams]) -> Tensor:
    """The patches (B, C, *patch_size) of several sources, each with its own transform.

    All on one device, with the same channels and patch size; at least one.
    """
    first = sources[0]
    shape = (len(sources), first.shape[0], *params[0].patch_size)
    patches = torch.empty(shape, dtype=torch.float32, device=first.device)
    for patch, source, drawn in zip(patches, sources, params, strict=True):
        patch.copy_(apply_image_on(source, drawn))
    return patches


def _grid(params: SpatialParams, source: Tensor) -> Tensor:
    """Where each voxel of the patch lies in the source: (1, *patch_size, 3), x y z in -1 .. 1.

    A sum of one vector per axis of the patch: sums of three numbers stay in float32 whatever
    the settings of matrix products and autocast are.
    """
    index_map = params.index_map()
    last = np.array(source.shape[1:], dtype=np.float64) - 1
    matrix = index_map.matrix * (2 / last)[:, None]  # (3, 3) rows: source axes
    offset = index_map.offset * (2 / last) - 1
    z, y, x = (
        np.arange(edge)[:, None] * matrix[:, axis] for axis, edge in enumerate(params.patch_size)
    )  # each (edge, 3)
    parts = torch.from_numpy(np.concatenate([z + offset, y, x])).float().flip(1)  # columns x y z
    z, y, x = parts.to(source.device, non_blocking=True).split(params.patch_size)
    return (z[:, None, None] + y[None, :, None] + x[None, None])[None]
