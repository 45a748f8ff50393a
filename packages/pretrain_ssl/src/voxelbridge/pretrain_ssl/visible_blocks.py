"""The visible blocks of masked volumes as one compact tensor, and the way back.

T = n * B visible blocks, slot-major: block t = slot * B + sample, so that (T, C, ...) is, without a
copy, (n, B * C, ...), which a batch norm reads as "per sample and channel over visible voxels".
What is hidden is never read: a result computed from compact blocks cannot depend on it.
Nothing here waits for the device: the number n of visible blocks is the caller's knowledge.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from voxelbridge.core.arch.config import Triple
from voxelbridge.pretrain_ssl.masking import GridShape, as_blocks

OFFSETS = tuple(product((-1, 0, 1), repeat=3))  # of neighbour blocks (z, y, x)


@dataclass(frozen=True, eq=False)
class VisibleBlocks:
    """Which blocks of a batch are visible, and who their neighbours are."""

    batch_size: int
    grid: GridShape
    index: tuple[Tensor, Tensor, Tensor, Tensor]  # each (T,) int64: sample, z, y, x
    hidden: Tensor  # (B, gz, gy, gx) bool
    neighbors: Tensor  # (27, T) int64: the block t' at each of OFFSETS, 0 where there is none
    absent: Tensor  # (27, T) bool: outside of the volume or hidden

    @property
    def per_sample(self) -> int:
        """Visible blocks of each sample, n."""
        return len(self.index[0]) // self.batch_size


def find_visible(hidden: Tensor, *, num_hidden: int) -> VisibleBlocks:
    """The visible blocks of `hidden` (B, gz, gy, gx), which hides `num_hidden` of each sample."""
    batch_size, *shape = hidden.shape
    gz, gy, gx = shape
    flat = hidden.flatten(1)
    visible = flat.shape[1] - num_hidden
    order = torch.argsort(flat.to(torch.uint8), dim=1, stable=True)  # visible ones first
    place = order[:, :visible].t().reshape(-1)  # (T,), slot-major
    sample = torch.arange(batch_size, device=hidden.device).repeat(visible)
    number = torch.full((batch_size, gz + 2, gy + 2, gx + 2), -1, device=hidden.device)
    z, y, x = place // (gy * gx), place // gx % gy, place % gx
    number[sample, z + 1, y + 1, x + 1] = torch.arange(len(place), device=hidden.device)
    rows = torch.stack(
        [number[sample, z + 1 + dz, y + 1 + dy, x + 1 + dx] for dz, dy, dx in OFFSETS]
    )
    index = (sample, z, y, x)
    return VisibleBlocks(batch_size, (gz, gy, gx), index, hidden, rows.clamp(min=0), rows < 0)


def gather(dense: Tensor, blocks: VisibleBlocks) -> Tensor:
    """(B, C, D, H, W) -> its visible blocks (T, C, bz, by, bx)."""
    return _Gather.apply(dense, blocks)


def scatter(values: Tensor, blocks: VisibleBlocks, *, fill: Tensor | None = None) -> Tensor:
    """Visible blocks (T, C, bz, by, bx) -> (B, C, D, H, W) with 0 or `fill` (C,) where hidden."""
    return _Scatter.apply(values, fill, blocks)


def with_halo(values: Tensor, blocks: VisibleBlocks, halo: Triple) -> Tensor:
    """(T, C, bz, by, bx) -> each block with `halo` cells of its neighbours on either side.

    Hidden neighbours and what lies outside of the volume are 0. A halo may be as wide as a block.
    """
    return values if halo == (0, 0, 0) else _Halo.apply(values, blocks, halo)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dense: Tensor, blocks: VisibleBlocks) -> Tensor:
        # Any: torch's context object takes whatever is put on it
        ctx.blocks = blocks
        return _read(dense, blocks)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return _write(gradients[0], ctx.blocks, None), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, fill: Tensor | None, blocks: VisibleBlocks) -> Tensor:
        ctx.blocks = blocks
        return _write(values, blocks, fill)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor | None, None]:
        (gradient,) = gradients
        blocks: VisibleBlocks = ctx.blocks
        fill = None
        if ctx.needs_input_grad[1]:
            wide = torch.promote_types(gradient.dtype, torch.float32)
            cells = as_blocks(gradient.contiguous(), blocks.grid)
            per_block = cells.sum(dim=(3, 5, 7), dtype=wide)  # (B, C, gz, gy, gx)
            fill = torch.where(blocks.hidden[:, None], per_block, 0).sum(dim=(0, 2, 3, 4))
        return _read(gradient, blocks), fill, None


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, blocks: VisibleBlocks, halo: Triple) -> Tensor:
        ctx.blocks, ctx.halo = blocks, halo
        count, channels, *edges = values.shape
        padded = [edge + 2 * width for edge, width in zip(edges, halo, strict=True)]
        windows = values.new_empty((count, channels, *padded))
        for row, inside, outside in _pieces(edges, halo):
            piece = values[inside]
            if row is not None:
                piece = piece.index_select(0, blocks.neighbors[row])
                piece.masked_fill_(blocks.absent[row][:, None, None, None, None], 0)
            windows[outside] = piece
        return windows

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        blocks: VisibleBlocks = ctx.blocks
        halo: Triple = ctx.halo
        edges = [size - 2 * width for size, width in zip(gradient.shape[2:], halo, strict=True)]
        result = gradient.new_empty((*gradient.shape[:2], *edges))
        for row, inside, outside in _pieces(edges, halo):
            piece = gradient[outside]
            if row is None:
                result.copy_(piece)
                continue
            # A block's cells went to the neighbour that sees this block at the opposite offset.
            back = len(OFFSETS) - 1 - row
            piece = piece.index_select(0, blocks.neighbors[back])
            piece.masked_fill_(blocks.absent[back][:, None, None, None, None], 0)
            result[inside] += piece
        return result, None, None


Piece = tuple[int | None, tuple[slice, ...], tuple[slice, ...]]


def _pieces(edges: list[int], halo: Triple) -> list[Piece]:
    """Row of OFFSETS, cells of the neighbour and cells of the window; the block itself first."""
    own = tuple(slice(width, width + edge) for edge, width in zip(edges, halo, strict=True))
    pieces: list[Piece] = [(None, (slice(None),) * 5, (slice(None), slice(None), *own))]
    for row, offset in enumerate(OFFSETS):
        if offset == (0, 0, 0) or any(
            o and not width for o, width in zip(offset, halo, strict=True)
        ):
            continue
        inside, outside = [slice(None)] * 2, [slice(None)] * 2
        for step, edge, width in zip(offset, edges, halo, strict=True):
            match step:
                case -1:
                    inside.append(slice(edge - width, edge))
                    outside.append(slice(0, width))
                case 0:
                    inside.append(slice(0, edge))
                    outside.append(slice(width, width + edge))
                case _:
                    inside.append(slice(0, width))
                    outside.append(slice(width + edge, edge + 2 * width))
        pieces.append((row, tuple(inside), tuple(outside)))
    return pieces


def _read(dense: Tensor, blocks: VisibleBlocks) -> Tensor:
    by_block = as_blocks(dense.contiguous(), blocks.grid).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return by_block[blocks.index]


def _write(values: Tensor, blocks: VisibleBlocks, fill: Tensor | None) -> Tensor:
    channels, *edges = values.shape[1:]
    size = [edge * count for edge, count in zip(edges, blocks.grid, strict=True)]
    dense = values.new_zeros((blocks.batch_size, channels, *size))
    if fill is not None:
        dense += fill.to(values.dtype)[:, None, None, None]
    by_block = as_blocks(dense, blocks.grid).permute(0, 2, 4, 6, 1, 3, 5, 7)
    by_block[blocks.index] = values
    return dense
