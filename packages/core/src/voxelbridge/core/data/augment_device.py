"""Drawn spatial transforms applied on the device of the voxels, for whole batches.

    boxes = SourceBoxes(sources, params)        # made in the loader: read, drawn, not resampled
    images = boxes.to(device).apply()           # (B, C, *patch_size) on the device
    labels = apply_labels_on(source, params)    # (*patch_size): the loader's, voxel for voxel
    extents = label_extents(labels, count=9)    # (9, 6) boxes of the labels 1 .. 9

Images are those of `SpatialParams.apply_image` up to rounding: both work with coordinates in
float32, which err by a few 1e-5 voxels where a source box is 200 voxels long. Labels have the very
coordinates of `apply_labels`. The parameters stay on the CPU, so nothing waits for the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from voxelbridge.core.data.augment import SpatialParams
from voxelbridge.core.data.sampling_grid import Affine


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


def apply_labels_on(source: Tensor, params: SpatialParams) -> Tensor:
    """The label patch (*patch_size) from the voxels (*size) of `source_box`, nearest voxel.

    On the source's device and in its type; equal to `SpatialParams.apply_labels` in every voxel.
    """
    params.check_source(source.shape)
    if params.copies:
        return source.flip(params.flipped_axes)
    grid = params.index_map()
    if grid.is_diagonal:
        for axis, edge in enumerate(params.patch_size):
            index = np.arange(edge) * grid.matrix[axis, axis] + grid.offset[axis]
            nearest = torch.from_numpy(np.floor(index + 0.5).astype(np.int64))
            source = source.index_select(axis, nearest.to(source.device, non_blocking=True))
        return source
    _, height, width = source.shape
    z, y, x = (axis.add_(0.5).int() for axis in _coordinates(grid, params, source.device))
    index = z.mul_(height).add_(y).mul_(width).add_(x)
    return source.reshape(-1)[index.view(-1).long()].view(params.patch_size)


def label_extents(labels: Tensor, *, count: int) -> Tensor:
    """Tight boxes (count, 6) of the labels 1 .. count in (D, H, W), in voxel edges, int64.

    A label without a voxel has a row of -1. On the device of the labels, which may hold others too;
    nothing waits for the device.
    """
    index = labels.long().clamp(0, count + 1)  # 0 and count + 1: nobody asks for these
    rows = []
    for axis, edge in enumerate(labels.shape):
        shape = [1, 1, 1]
        shape[axis] = edge
        place = torch.arange(edge, device=labels.device).view(shape).expand_as(index)
        seen = torch.zeros((count + 2, edge), dtype=torch.int32, device=labels.device)
        seen[index, place] = 1
        seen = seen[1:-1]
        absent = seen.amax(dim=1) == 0
        low = seen.argmax(dim=1).masked_fill(absent, -1)
        high = (edge - seen.flip(1).argmax(dim=1)).masked_fill(absent, -1)
        rows.append((low, high))
    return torch.stack([*(low for low, _ in rows), *(high for _, high in rows)], dim=1)


def _coordinates(grid: Affine, params: SpatialParams, device: torch.device) -> list[Tensor]:
    """Source coordinates z, y, x of each voxel of the patch, each (*patch_size) float32.

    Bit for bit those of `gather_nearest`: rounded once within a slice and once between slices.
    """
    depth, height, width = params.patch_size
    offset, number = grid.offset[:, None, None], np.arange(depth)
    matrix = grid.matrix
    plane = (
        matrix[:, 1, None, None] * np.arange(height)[:, None]
        + matrix[:, 2, None, None] * np.arange(width)
        + offset
    )  # (3, H, W)
    steps = torch.from_numpy(matrix[:, :1] * number).float().to(device, non_blocking=True)
    base = torch.from_numpy(plane).float().to(device, non_blocking=True)
    return [base[axis] + steps[axis, :, None, None] for axis in range(3)]


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
