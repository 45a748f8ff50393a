import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from voxelbridge.pretrain_ssl.visible_blocks import (
    VisibleBlocks,
    find_visible,
    gather,
    scatter,
    with_halo,
)

grids = st.tuples(*[st.integers(1, 3)] * 3)
edges = st.tuples(*[st.integers(1, 3)] * 3)


def draw_hidden(batch: int, grid: tuple[int, int, int], seed: int) -> tuple[Tensor, int]:
    """A mask that hides the same number of blocks in each sample and leaves at least one."""
    generator = torch.Generator().manual_seed(seed)
    count = grid[0] * grid[1] * grid[2]
    num_hidden = count * 2 // 3
    rows = [torch.randperm(count, generator=generator) < num_hidden for _ in range(batch)]
    return torch.stack(rows).view(batch, *grid), num_hidden


def slow_blocks(dense: Tensor, blocks: VisibleBlocks, edges: tuple[int, ...]) -> Tensor:
    ez, ey, ex = edges
    found = []
    for b, z, y, x in torch.stack(blocks.index, 1).tolist():
        rows = slice(z * ez, (z + 1) * ez), slice(y * ey, (y + 1) * ey), slice(x * ex, (x + 1) * ex)
        found.append(dense[(b, slice(None), *rows)])
    return torch.stack(found)


def slow_windows(dense: Tensor, blocks: VisibleBlocks, halo: tuple[int, int, int]) -> Tensor:
    pz, py, px = halo
    padded = torch.nn.functional.pad(dense, (px, px, py, py, pz, pz))
    sizes = zip(dense.shape[2:], blocks.grid, strict=True)
    ez, ey, ex = (size // count for size, count in sizes)
    found = []
    for b, z, y, x in torch.stack(blocks.index, 1).tolist():
        window = padded[b, :, z * ez :, y * ey :, x * ex :]
        found.append(window[:, : ez + 2 * pz, : ey + 2 * py, : ex + 2 * px])
    return torch.stack(found)


@given(st.integers(1, 3), grids, st.integers(0, 1000))
@settings(deadline=None, max_examples=20)
def test_every_visible_block_is_found_once_and_samples_alternate(
    batch: int, grid: tuple[int, int, int], seed: int
) -> None:
    hidden, num_hidden = draw_hidden(batch, grid, seed)
    blocks = find_visible(hidden, num_hidden=num_hidden)
    again = torch.ones_like(hidden)
    again[blocks.index] = False
    assert torch.equal(again, hidden)
    assert len(blocks.index[0]) == int((~hidden).sum())
    assert blocks.index[0].tolist() == list(range(batch)) * blocks.per_sample


@given(st.integers(1, 2), grids, edges, st.integers(0, 1000))
@settings(deadline=None, max_examples=20)
def test_gather_and_scatter_equal_slicing(
    batch: int, grid: tuple[int, int, int], edges: tuple[int, int, int], seed: int
) -> None:
    hidden, num_hidden = draw_hidden(batch, grid, seed)
    blocks = find_visible(hidden, num_hidden=num_hidden)
    size = [edge * count for edge, count in zip(edges, grid, strict=True)]
    dense = torch.randn(batch, 2, *size)
    values = gather(dense, blocks)
    assert torch.equal(values, slow_blocks(dense, blocks, edges))
    fill = torch.tensor([5.0, -5.0])
    filled = scatter(values, blocks, fill=fill)
    mask = hidden[:, None]
    for axis, edge in enumerate(edges):
        mask = mask.repeat_interleave(edge, axis + 2)
    assert torch.equal(filled, torch.where(mask, fill[:, None, None, None], dense))
    assert torch.equal(scatter(values, blocks), torch.where(mask, 0, dense))


@pytest.mark.parametrize(
    ("edges", "halo"),
    [
        ((2, 2, 2), (1, 1, 1)),
        ((1, 1, 1), (1, 1, 1)),  # a block is nothing but border
        ((2, 3, 4), (2, 0, 1)),  # as wide as the block, none, narrower
        ((3, 2, 1), (0, 0, 0)),
    ],
)
def test_windows_equal_slicing_of_the_masked_volume(
    edges: tuple[int, int, int], halo: tuple[int, int, int]
) -> None:
    grid = (3, 2, 3)
    hidden, num_hidden = draw_hidden(2, grid, 1)
    blocks = find_visible(hidden, num_hidden=num_hidden)
    values = torch.randn(len(blocks.index[0]), 2, *edges)
    expected = slow_windows(scatter(values, blocks), blocks, halo)
    assert torch.equal(with_halo(values, blocks, halo), expected)


def test_gradients_are_those_of_finite_differences() -> None:
    hidden, num_hidden = draw_hidden(2, (1, 2, 2), 0)
    hidden[0] = torch.tensor([[[True, False], [False, True]]])
    blocks = find_visible(hidden, num_hidden=num_hidden)
    values = torch.randn(len(blocks.index[0]), 1, 2, 1, 2, dtype=torch.float64, requires_grad=True)
    dense = torch.randn(2, 1, 2, 2, 4, dtype=torch.float64, requires_grad=True)
    fill = torch.randn(1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: with_halo(v, blocks, (1, 1, 2)), (values,))
    assert torch.autograd.gradcheck(lambda v, f: scatter(v, blocks, fill=f), (values, fill))
    assert torch.autograd.gradcheck(lambda d: gather(d, blocks), (dense,))
