"""In which form the maps of a sparsely walked encoder are kept at each resolution.

- blocks: compact (T, C, ez, ey, ex), one entry per visible block (`visible_blocks`), while cells
  fit into blocks.
- cells: dense (B, C, D, H, W), 0 where hidden, once a cell is larger than a block on some axis or
  lies across the border of two; a cell is visible if any voxel of it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from voxelbridge.core.arch.config import Triple
from voxelbridge.core.arch.encoder import PlainEncoder, ResEncoder
from voxelbridge.pretrain_ssl.visible_blocks import VisibleBlocks, scatter


@dataclass(frozen=True, eq=False)
class BlockLevel:
    """Maps of this level are compact: visible blocks of `edges` cells (z, y, x)."""

    blocks: VisibleBlocks
    edges: Triple


@dataclass(frozen=True, eq=False)
class CellLevel:
    """Maps of this level are dense; `visible` (B, 1, D, H, W) bool, None: every cell counts."""

    visible: Tensor | None


Level = BlockLevel | CellLevel


def make_levels(
    blocks: VisibleBlocks,
    size: Sequence[int],
    strides: Sequence[tuple[int, ...]],
    *,
    dense_below_blocks: bool,
) -> list[Level]:
    """The level of an input of `size` (z, y, x) and of what follows each of the `strides`.

    With `dense_below_blocks` every cell counts where cells do not fit into blocks.
    """
    z, y, x = (edge // count for edge, count in zip(size, blocks.grid, strict=True))
    levels: list[Level] = [BlockLevel(blocks, (z, y, x))]
    for stride in strides:
        levels.append(_next_level(levels[-1], stride, dense_below_blocks=dense_below_blocks))
    return levels


def layer_strides(encoder: ResEncoder | PlainEncoder) -> list[tuple[int, ...]]:
    """The stride of the stem and of each stage, relative to what comes before."""
    return [encoder.stem.conv.stride, *(_stride(stage) for stage in encoder.stages)]


def stages_inside_blocks(encoder: ResEncoder | PlainEncoder, block_size: int) -> list[bool]:
    """Per stage, finest first: do its cells fit into blocks of `block_size` voxels?"""
    edges, inside = (block_size,) * 3, [True]
    for stride in layer_strides(encoder):
        inside.append(inside[-1] and _fits(edges, stride))
        edges = tuple(edge // step for edge, step in zip(edges, stride, strict=True))
    return inside[2:]  # without input and stem


def fill_hidden(values: Tensor, level: Level, fill: Tensor | None) -> Tensor:
    """`values` of `level` as (B, C, D, H, W), with `fill` (C,) or else 0 where hidden."""
    match level:
        case BlockLevel():
            return scatter(values, level.blocks, fill=fill)
        case CellLevel():
            if level.visible is None or fill is None:
                return values
            wide = fill.to(values.dtype)[:, None, None, None]
            return torch.where(level.visible, values, wide)
        case _:
            assert_never(level)


def _next_level(level: Level, stride: tuple[int, ...], *, dense_below_blocks: bool) -> Level:
    match level:
        case BlockLevel():
            if _fits(level.edges, stride):
                z, y, x = (edge // step for edge, step in zip(level.edges, stride, strict=True))
                return BlockLevel(level.blocks, (z, y, x))
            if dense_below_blocks:
                return CellLevel(None)
            visible = ~level.blocks.hidden[:, None]
            for axis, edge in enumerate(level.edges):
                visible = visible.repeat_interleave(edge, axis + 2)
            return CellLevel(_any_visible(visible, stride))
        case CellLevel():
            if level.visible is None:
                return level
            return CellLevel(_any_visible(level.visible, stride))
        case _:
            assert_never(level)


def _fits(edges: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    return not any(edge % step for edge, step in zip(edges, stride, strict=True))


def _any_visible(visible: Tensor, stride: tuple[int, ...]) -> Tensor:
    return F.max_pool3d(visible.float(), stride, stride) > 0


def _stride(stage: nn.Module) -> tuple[int, ...]:
    """The stride of a stage: that of its first convolution, 1 where it has none."""
    for part in stage.modules():
        if isinstance(part, nn.Conv3d):
            return part.stride
    return (1, 1, 1)
