import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelbridge.pretrain_ssl.masking import (
    as_blocks,
    block_grid,
    hidden_count,
    over_blocks,
    random_block_mask,
)


@given(
    grid=st.tuples(*[st.integers(1, 6)] * 3),
    ratio=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=50)
def test_exactly_the_stated_number_of_blocks_is_hidden(
    grid: tuple[int, int, int], ratio: float, seed: int
) -> None:
    hidden = random_block_mask(np.random.default_rng(seed), grid, ratio=ratio)
    assert hidden.shape == grid
    assert hidden.sum() == int(ratio * hidden.size) == hidden_count(grid, ratio)


def test_paper_hides_1296_of_1728_blocks() -> None:
    grid = block_grid((192, 192, 192), 16)
    assert grid == (12, 12, 12)
    assert hidden_count(grid, 0.75) == 1296


def test_the_share_is_taken_of_the_whole_number_of_blocks() -> None:
    # 0.6 * 3 * 3 * 5, multiplied one by one, rounds to a little less than 27.
    assert hidden_count((3, 3, 5), 0.6) == 27
    assert random_block_mask(np.random.default_rng(0), (3, 3, 5), ratio=0.6).sum() == 27


def test_mask_depends_on_the_generator_alone() -> None:
    first, again, other = (
        random_block_mask(np.random.default_rng(seed), (4, 4, 4), ratio=0.75) for seed in (1, 1, 2)
    )
    assert (first == again).all()
    assert (first != other).any()


def test_every_block_is_hidden_equally_often() -> None:
    rng = np.random.default_rng(0)
    count = sum(random_block_mask(rng, (2, 2, 2), ratio=0.75).astype(int) for _ in range(4000))
    assert np.abs(count / 4000 - 0.75).max() < 0.03


def test_block_that_does_not_divide_the_patch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"blocks of 16 voxels do not divide the patch \[48, 40"):
        block_grid((48, 40, 48), 16)


def test_block_view_agrees_with_upsampling() -> None:
    hidden = torch.rand(2, 2, 3, 4) < 0.5
    voxels = torch.zeros(2, 1, 8, 12, 16)
    as_blocks(voxels, (2, 3, 4)).add_(over_blocks(hidden).float())
    upsampled = hidden.float()[:, None]
    for axis in (2, 3, 4):
        upsampled = upsampled.repeat_interleave(4, axis)
    assert torch.equal(voxels, upsampled)
