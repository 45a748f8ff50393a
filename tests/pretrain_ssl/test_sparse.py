from itertools import pairwise
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from voxelbridge.core.arch.config import EncoderConfig, Triple
from voxelbridge.core.arch.encoder import build_encoder
from voxelbridge.core.train.placement import recompute_activations
from voxelbridge.pretrain_ssl.sparse import SparseMap, sparse_stages, visible_norm
from voxelbridge.pretrain_ssl.sparse_levels import (
    BlockLevel,
    CellLevel,
    Level,
    make_levels,
    stages_inside_blocks,
)
from voxelbridge.pretrain_ssl.visible_blocks import find_visible, gather

ISOTROPIC = ((1, 1, 1), (2, 2, 2), (2, 2, 2))
ANISOTROPIC = ((1, 1, 1), (1, 2, 2), (2, 2, 2))


def encoder_config(
    kind: Literal["residual", "plain"], strides: tuple[Triple, ...], kernel: Triple = (3, 3, 3)
) -> EncoderConfig:
    return EncoderConfig(
        kind=kind,
        features=(3, 4, 5),
        strides=strides,
        kernels=(kernel, (3, 3, 3), (3, 3, 3)),
        blocks=(1, 2, 1),
        conv_bias=True,
    )


def masks(batch: int, grid: Triple, num_hidden: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    count = grid[0] * grid[1] * grid[2]
    rows = [torch.randperm(count, generator=generator) < num_hidden for _ in range(batch)]
    return torch.stack(rows).view(batch, *grid)


def over(hidden: Tensor, size: torch.Size | Triple) -> Tensor:
    voxels = hidden[:, None]
    for axis, (edge, count) in enumerate(zip(size, hidden.shape[1:], strict=True)):
        voxels = voxels.repeat_interleave(edge // count, axis + 2)
    return voxels


def slow_norm(
    values: Tensor, visible: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Per sample and channel: gathers what is visible, norms it, puts it back among zeros."""
    result = torch.zeros_like(values)
    for b in range(values.shape[0]):
        for c in range(values.shape[1]):
            found = values[b, c][visible[b, 0]]
            mean = found.sum() / len(found)
            variance = ((found - mean) ** 2).sum() / len(found)
            normed = (found - mean) / torch.sqrt(variance + eps)
            if weight is not None and bias is not None:
                normed = normed * weight[c] + bias[c]
            result[b, c][visible[b, 0]] = normed
    return result


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("form", ["blocks", "cells"])
def test_norm_and_its_gradients_equal_gathering_the_visible_voxels(form: str, affine: bool) -> None:
    hidden = masks(2, (2, 2, 3), 8)
    visible = ~over(hidden, (4, 6, 6))
    blocks = find_visible(hidden, num_hidden=8)
    level: Level = BlockLevel(blocks, (2, 3, 2)) if form == "blocks" else CellLevel(visible)
    torch.manual_seed(0)
    x = (3 + 2 * torch.randn(2, 3, 4, 6, 6, dtype=torch.float64)).requires_grad_()
    weight, bias = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    inputs = [x, weight, bias] if affine else [x]
    parameters = {"weight": weight, "bias": bias} if affine else {}
    values = gather(x, blocks) if form == "blocks" else x
    result = SparseMap(visible_norm(values, level, eps=1e-5, **parameters), level).dense()
    expected = slow_norm(x, visible, 1e-5, *(inputs[1:] or (None, None)))
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad((result * upstream).sum(), inputs)
    slow_gradients = torch.autograd.grad((expected * upstream).sum(), inputs)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients, slow_gradients, rtol=1e-10, atol=1e-10)
    assert not result[(~visible).expand_as(result)].any()


def test_norm_in_float32_equals_the_gathered_one_far_from_zero() -> None:
    # One pass over x and x^2 would lose these digits.
    hidden = masks(1, (2, 2, 2), 6)
    visible = ~over(hidden, (8, 8, 8))
    x = 100 + torch.randn(1, 2, 8, 8, 8)
    expected = slow_norm(x.double(), visible, 1e-5, None, None)
    blocks = find_visible(hidden, num_hidden=6)
    for values, level in (
        (gather(x, blocks), BlockLevel(blocks, (4, 4, 4))),
        (x, CellLevel(visible)),
    ):
        result = SparseMap(visible_norm(values, level, eps=1e-5), level).dense()
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-4)


def test_the_only_visible_cell_becomes_its_bias() -> None:
    visible = torch.zeros(1, 1, 2, 2, 2, dtype=torch.bool)
    visible[0, 0, 1, 0, 1] = True
    hidden = ~visible[:, 0]
    blocks = find_visible(hidden, num_hidden=7)
    x = torch.randn(1, 2, 2, 2, 2)
    weight, bias = torch.tensor([2.0, 3.0]), torch.tensor([0.5, -1.0])
    expected = torch.where(visible, bias[:, None, None, None], 0)
    for values, level in (
        (gather(x, blocks), BlockLevel(blocks, (1, 1, 1))),
        (x, CellLevel(visible)),
    ):
        normed = visible_norm(values, level, eps=1e-5, weight=weight, bias=bias)
        torch.testing.assert_close(SparseMap(normed, level).dense(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["residual", "plain"])
@pytest.mark.parametrize("strides", [ISOTROPIC, ANISOTROPIC])
@pytest.mark.parametrize("block", [2, 8])
def test_visible_outputs_of_no_level_change_by_a_bit_with_the_hidden_voxels(
    kind: Literal["residual", "plain"], strides: tuple[Triple, ...], block: int
) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(encoder_config(kind, strides), in_channels=2)
    grid = (16 // block, 24 // block, 16 // block)
    num_hidden = grid[0] * grid[1] * grid[2] * 3 // 4
    hidden = masks(2, grid, num_hidden)
    image = torch.randn(2, 2, 16, 24, 16)
    mask = over(hidden, image.shape[2:])
    for other in (
        torch.where(mask, torch.randn_like(image), image),
        image.masked_fill(mask, torch.nan),
    ):
        with torch.no_grad():
            first, second = (
                sparse_stages(encoder, x, hidden, num_hidden=num_hidden) for x in (image, other)
            )
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a.values, b.values)
            assert torch.equal(a.dense(), b.dense())


def test_leak_changes_visible_outputs_from_the_first_level_on() -> None:
    torch.manual_seed(0)
    encoder = build_encoder(encoder_config("residual", ISOTROPIC), in_channels=1)
    hidden = masks(1, (2, 2, 2), 6)
    image = torch.randn(1, 1, 16, 16, 16)
    other = torch.where(over(hidden, image.shape[2:]), torch.randn_like(image), image)
    with torch.no_grad():
        first, second = (
            sparse_stages(encoder, x, hidden, num_hidden=6, hide_input=False)
            for x in (image, other)
        )
    assert all(not torch.equal(a.values, b.values) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("block", [2, 4, 8])
def test_hidden_cells_are_exactly_zero_and_visible_ones_are_not(block: int) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(encoder_config("residual", ISOTROPIC), in_channels=1)
    grid = (32 // block, 16 // block, 16 // block)
    num_hidden = grid[0] * grid[1] * grid[2] * 3 // 4
    hidden = masks(2, grid, num_hidden)
    maps = sparse_stages(encoder, torch.randn(2, 1, 32, 16, 16), hidden, num_hidden=num_hidden)
    for level, stride in zip(maps, encoder.strides, strict=True):
        dense = level.dense()
        visible = (~over(hidden, (32, 16, 16))).float()
        cells = torch.nn.functional.max_pool3d(visible, stride, stride).bool().expand_as(dense)
        assert not dense[~cells].any()
        assert dense[cells].ne(0).all()


def test_cells_leave_the_blocks_where_the_stride_does_not_divide_them() -> None:
    hidden = masks(1, (2, 1, 1), 1)
    blocks = find_visible(hidden, num_hidden=1)
    levels = make_levels(
        blocks, (8, 4, 8), [(1, 2, 2), (2, 2, 2), (2, 1, 2), (2, 1, 1)], dense_below_blocks=False
    )
    assert [type(level) for level in levels] == [BlockLevel] * 4 + [CellLevel]
    assert [level.edges for level in levels if isinstance(level, BlockLevel)] == [
        (4, 4, 8),
        (4, 2, 4),
        (2, 1, 2),
        (1, 1, 1),
    ]
    deepest = levels[-1]
    assert isinstance(deepest, CellLevel)
    assert deepest.visible is not None
    assert deepest.visible.flatten().tolist() == [True]  # one of its two blocks is visible


@pytest.mark.parametrize(
    ("strides", "block", "expected"),
    [
        (ISOTROPIC, 8, [True, True, True]),
        (ISOTROPIC, 2, [True, True, False]),
        (ANISOTROPIC, 2, [True, True, False]),
        (((2, 2, 2), (2, 2, 2), (1, 1, 1)), 2, [True, False, False]),
        (((1, 1, 1), (4, 2, 2), (1, 1, 1)), 6, [True, False, False]),
    ],
)
def test_stages_inside_blocks(
    strides: tuple[Triple, ...], block: int, expected: list[bool]
) -> None:
    for kind in ("residual", "plain"):
        encoder = build_encoder(encoder_config(kind, strides), in_channels=1)
        assert stages_inside_blocks(encoder, block) == expected


@pytest.mark.parametrize("kernel", [(1, 3, 3), (5, 1, 3), (9, 3, 1)])
def test_windows_and_dense_convolutions_agree(
    kernel: Triple, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = encoder_config("residual", ISOTROPIC, kernel)
    encoder = build_encoder(config, in_channels=1).double()
    hidden = masks(2, (4, 4, 4), 48)
    image = torch.randn(2, 1, 16, 16, 16, dtype=torch.float64)
    results = []
    for share in (0.0, 1e6):
        monkeypatch.setattr("voxelbridge.pretrain_ssl.sparse.MAX_WINDOW_SHARE", share)
        encoder.zero_grad()
        maps = [level.dense() for level in sparse_stages(encoder, image, hidden, num_hidden=48)]
        torch.stack([((level - 1) ** 2).sum() for level in maps]).sum().backward()
        results.append((maps, [p.grad for p in encoder.parameters()]))
    for dense, windows in pairwise(results):
        torch.testing.assert_close(windows, dense, rtol=1e-9, atol=1e-9)


def test_nothing_waits_for_the_device() -> None:
    # On the meta device there are no values to wait for: reading one raises.
    with torch.device("meta"):
        encoder = build_encoder(encoder_config("residual", ISOTROPIC), in_channels=1)
        image, hidden = torch.empty(2, 1, 16, 16, 16), torch.empty(2, 8, 8, 8, dtype=torch.bool)
        maps = sparse_stages(encoder, image, hidden, num_hidden=384)
        torch.stack([level.dense().sum() for level in maps]).sum().backward()
    assert [tuple(level.dense().shape[2:]) for level in maps] == [(16,) * 3, (8,) * 3, (4,) * 3]
    assert isinstance(maps[-1].level, CellLevel)
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_recomputed_stages_keep_less_and_give_the_same_gradients() -> None:
    hidden = masks(2, (4, 4, 4), 48)
    image = torch.randn(2, 1, 16, 16, 16)
    gradients, kept = [], []
    for stages in (0, 2):
        torch.manual_seed(0)
        encoder = build_encoder(encoder_config("residual", ISOTROPIC), in_channels=1)
        if stages:
            recompute_activations(encoder, stages=stages)
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            maps = sparse_stages(encoder, image, hidden, num_hidden=48)
            total = sum((level.dense().square().mean() for level in maps), torch.zeros(()))
        kept.append(sum(sizes))
        total.backward()
        gradients.append([parameter.grad for parameter in encoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert kept[1] < 0.5 * kept[0]


def test_a_mask_that_hides_another_number_is_refused() -> None:
    encoder = build_encoder(encoder_config("residual", ISOTROPIC), in_channels=1)
    hidden = torch.zeros(1, 2, 2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"must hide 6 blocks, got \[0\]"):
        sparse_stages(encoder, torch.zeros(1, 1, 8, 8, 8), hidden, num_hidden=6)


def test_an_unknown_stage_is_refused() -> None:
    encoder = build_encoder(encoder_config("residual", ISOTROPIC), in_channels=1)
    encoder.stages[1] = nn.Conv3d(3, 4, 3, 2, 1)
    with pytest.raises(ValueError, match="no sparse walk is known for a Conv3d"):
        sparse_stages(encoder, torch.zeros(1, 1, 8, 8, 8), masks(1, (2, 2, 2), 6), num_hidden=6)
