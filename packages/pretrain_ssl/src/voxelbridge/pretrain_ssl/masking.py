"""Block masks. Polarity everywhere: `hidden`, True = masked out."""

from collections.abc import Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

GridShape = tuple[int, int, int]  # blocks (z, y, x)


def block_grid(patch_size: Sequence[int], block_size: int) -> GridShape:
    """Number of blocks per axis; a block that does not divide the patch is a ValueError."""
    if any(edge % block_size for edge in patch_size):
        raise ValueError(
            f"mask blocks of {block_size} voxels do not divide the patch {list(patch_size)}; "
            f"take a patch of multiples of {block_size}, or another block_size"
        )
    z, y, x = (edge // block_size for edge in patch_size)
    return z, y, x


def hidden_count(grid: GridShape, ratio: float) -> int:
    """int(ratio * blocks): how many blocks of a patch are hidden."""
    # The blocks first: 0.6 * 3 * 3 * 5 rounds to less than the 27 of 0.6 * 45.
    return int(ratio * prod(grid))


def random_block_mask(
    rng: np.random.Generator, grid: GridShape, *, ratio: float
) -> NDArray[np.bool_]:
    """Hidden blocks of a patch (z, y, x): exactly `hidden_count`, every choice equally likely."""
    hidden = np.zeros(grid, dtype=bool)
    chosen = rng.permutation(hidden.size)[: hidden_count(grid, ratio)]
    hidden.reshape(-1)[chosen] = True
    return hidden


def as_blocks(voxels: Tensor, grid: Sequence[int]) -> Tensor:
    """(B, C, D, H, W) -> view (B, C, gz, bz, gy, by, gx, bx) of a grid (gz, gy, gx) of blocks."""
    batch, channels, depth, height, width = voxels.shape
    gz, gy, gx = grid
    return voxels.view(batch, channels, gz, depth // gz, gy, height // gy, gx, width // gx)


def over_blocks(per_block: Tensor) -> Tensor:
    """(B, gz, gy, gx) -> view (B, 1, gz, 1, gy, 1, gx, 1) that broadcasts over `as_blocks`."""
    return per_block[:, None, :, None, :, None, :, None]


def over_voxels(per_block: Tensor, size: Sequence[int]) -> Tensor:
    """(B, gz, gy, gx) -> (B, *size): every voxel has the value of its block."""
    for axis, edge in enumerate(size, start=1):
        per_block = per_block.repeat_interleave(edge // per_block.shape[axis], dim=axis)
    return per_block
