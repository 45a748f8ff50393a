"""Anchor boxes on the cells of feature maps, in the order in which a head lays out its outputs.

Order: levels finest first; in a level the locations in C order (z slowest); at a location all
size combinations product(z sizes, y sizes, x sizes), the last axis fastest. Letters: L levels,
D H W cells of a level, A anchors per location.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

AxisSizes = tuple[Sequence[float], Sequence[float], Sequence[float]]  # sizes along z, y, x


@dataclass(frozen=True, eq=False)
class AnchorLevel:
    """Anchors of one feature map: every cell centre carries every size.

    centers: the centres along z, y, x in voxel edges, (D,), (H,), (W,), ascending;
    sizes (A, 3) side lengths in voxels. float32, on one device.
    """

    centers: tuple[Tensor, Tensor, Tensor]
    sizes: Tensor

    @property
    def anchors_per_location(self) -> int:
        return len(self.sizes)

    @property
    def num_locations(self) -> int:
        return math.prod(len(axis) for axis in self.centers)

    @property
    def num_anchors(self) -> int:
        return self.num_locations * self.anchors_per_location

    def boxes(self) -> Tensor:
        """All anchors of the level, (D*H*W*A, 6)."""
        grid = torch.meshgrid(*self.centers, indexing="ij")
        centers = torch.stack(grid, dim=-1).reshape(-1, 1, 3)  # (D*H*W, 1, 3)
        half = self.sizes / 2
        return torch.cat([centers - half, centers + half], dim=-1).reshape(-1, 6)


@dataclass(frozen=True, eq=False)
class AnchorGrid:
    """Anchors of all levels of a head, finest level first."""

    levels: tuple[AnchorLevel, ...]

    @property
    def num_anchors(self) -> int:
        return sum(level.num_anchors for level in self.levels)

    @property
    def anchors_per_level(self) -> tuple[int, ...]:
        return tuple(level.num_anchors for level in self.levels)

    def boxes(self) -> Tensor:
        """All anchors, (sum over levels of D*H*W*A, 6) float32."""
        return torch.cat([level.boxes() for level in self.levels])


def anchor_grid(
    feature_shapes: Sequence[Sequence[int]],
    strides: Sequence[Sequence[int]],
    sizes_per_level: Sequence[AxisSizes],
    *,
    device: torch.device | str = "cpu",
) -> AnchorGrid:
    """Anchors centred on cells: cell i of an axis has its centre at (i + 0.5) * stride.

    Per level (finest first): feature shape (z, y, x) in cells, stride (z, y, x) in voxels per cell,
    and the sizes along z, y and x in voxels, which are combined freely.
    """
    levels = []
    for shape, stride, sizes in zip(feature_shapes, strides, sizes_per_level, strict=True):
        z, y, x = (
            (torch.arange(cells, dtype=torch.float32, device=device) + 0.5) * step
            for cells, step in zip(shape, stride, strict=True)
        )
        levels.append(AnchorLevel(centers=(z, y, x), sizes=size_combinations(sizes, device=device)))
    return AnchorGrid(levels=tuple(levels))


def anchor_boxes(
    feature_shapes: Sequence[Sequence[int]],
    strides: Sequence[Sequence[int]],
    sizes_per_level: Sequence[AxisSizes],
    *,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The boxes of `anchor_grid` as one tensor, (sum over levels of D*H*W*A, 6) float32."""
    return anchor_grid(feature_shapes, strides, sizes_per_level, device=device).boxes()


def size_combinations(sizes: AxisSizes, *, device: torch.device | str = "cpu") -> Tensor:
    """All combinations of the sizes along z, y and x, last axis fastest; (A, 3) float32."""
    combinations = list(itertools.product(*sizes))
    return torch.tensor(combinations, dtype=torch.float32, device=device).reshape(-1, 3)
