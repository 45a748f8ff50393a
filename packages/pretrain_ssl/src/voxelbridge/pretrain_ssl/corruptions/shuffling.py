"""Voxels shuffled within many small windows (Models Genesis, arXiv 1908.06912, section 3.1).

Every window permutes the voxels of the unspoiled patch at random and overwrites what earlier
windows put there. Nothing here loops over windows: all (window, voxel) pairs of a patch stand in
one list, window by window. Sorting it by (window, random number) permutes all windows at once, and
the last pair of a voxel decides what it shows.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from voxelbridge.pretrain_ssl.corruptions.noise import random_bits

EDGE_DIVISOR = 10  # window edges reach a tenth of the patch's


def draw_windows(
    rng: np.random.Generator, shape: Sequence[int], *, count: int
) -> NDArray[np.int16]:
    """First voxels and edges (z, y, x) of `count` windows inside a patch (D, H, W), (count, 6).

    Each edge is uniform in 1 .. max(1, extent // 10), the position uniform over all that fit.
    """
    extent = np.asarray(shape)
    largest = np.maximum(1, extent // EDGE_DIVISOR)
    edges = 1 + (rng.random((count, 3)) * largest).astype(np.int16)
    starts = (rng.random((count, 3)) * (extent + 1 - edges)).astype(np.int16)
    return np.concatenate([starts, edges], axis=1)


def no_windows(count: int) -> NDArray[np.int16]:
    """`count` empty windows: nothing is shuffled."""
    return np.zeros((count, 6), dtype=np.int16)


def shuffle(image: Tensor, windows: Tensor, seeds: Tensor) -> Tensor:
    """A copy of `image` (B, C, D, H, W), shuffled in `windows` (B, N, 6); channels move alike.

    `seeds` (B, 2) as `draw_seed` gives. Reads two numbers per sample from the device.
    """
    windows = windows.long()
    edges = windows[..., 3:]
    rows = edges[..., :2].prod(dim=2).sum(dim=1)
    counts = torch.stack([rows, edges.prod(dim=2).sum(dim=1)], dim=1).tolist()
    shuffled = image.clone(memory_format=torch.contiguous_format)
    for sample, (num_rows, num_pairs) in enumerate(counts):
        if num_pairs == 0:
            continue
        source = source_voxels(
            windows[sample], seeds[sample], image.shape[2:], num_rows=num_rows, num_pairs=num_pairs
        )
        voxels = image[sample].flatten(1)
        torch.index_select(voxels, 1, source, out=shuffled[sample].view(len(voxels), -1))
    return shuffled


def source_voxels(
    windows: Tensor, seed: Tensor, shape: Sequence[int], *, num_rows: int, num_pairs: int
) -> Tensor:
    """Where each voxel of a patch (D, H, W) comes from: flat indices (D * H * W,).

    `windows` (N, 6) int64, `seed` (2,); together the windows have `num_rows` rows along x and
    `num_pairs` voxels.
    """
    num_voxels, device = int(np.prod(shape)), windows.device
    window, first_voxel, length = _rows(windows, shape, num_rows=num_rows)
    row = torch.repeat_interleave(length, output_size=num_pairs)  # of each pair
    pair = torch.arange(num_pairs, device=device)
    # (start of the row) - (number of its first pair) + (number of the pair)
    voxel = (first_voxel - (length.cumsum(0) - length)).index_select(0, row).add_(pair)
    order = _permuted(window.int(), row, seed, num_windows=len(windows))
    last = torch.full((num_voxels,), -1, device=device).scatter_reduce_(0, voxel, pair, "amax")
    itself = torch.arange(num_voxels, device=device)
    source = voxel.index_select(0, order.index_select(0, last.clamp(min=0)))
    return torch.where(last < 0, itself, source)


def _rows(windows: Tensor, shape: Sequence[int], *, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Window, first voxel (flat index) and length of every row along x, three of (num_rows,)."""
    (_, height, width), device = shape, windows.device
    (z, y, x), (depths, heights, widths) = windows[:, :3].unbind(1), windows[:, 3:].unbind(1)
    count = depths * heights
    first_row = count.cumsum(0) - count
    window = torch.repeat_interleave(count, output_size=num_rows)
    first_row, corner, rows_per_slice, length = (
        column.index_select(0, window)
        for column in (first_row, (z * height + y) * width + x, heights, widths)
    )
    row = torch.arange(num_rows, device=device) - first_row  # within its window
    skipped = (row // rows_per_slice) * (height - rows_per_slice)  # rows beside the window
    return window, corner + (row + skipped) * width, length


def _permuted(window: Tensor, row: Tensor, seed: Tensor, *, num_windows: int) -> Tensor:
    """Pair numbers, in random order within each window; `window` (num_rows,) int32, `row` (P,).

    One int32 holds the window and a random number: torch sorts that several times faster than
    int64. 10,000 windows leave 17 random bits; voxels that draw the same number keep their order.
    """
    key_bits = 31 - num_windows.bit_length()
    keys = random_bits(seed[None], len(row))[0]
    keys.bitwise_right_shift_(32 - key_bits).bitwise_and_(2**key_bits - 1)
    keys |= (window << key_bits).index_select(0, row)
    return torch.sort(keys, stable=True).indices
