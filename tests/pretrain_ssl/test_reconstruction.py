import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from voxelbridge.pretrain_ssl.reconstruction import (
    hide,
    masked_mse,
    masked_mse_outside,
    visible_means,
)


def upsample(hidden: Tensor, factors: tuple[int, int, int]) -> Tensor:
    voxels = hidden[:, None]
    for axis, factor in enumerate(factors):
        voxels = voxels.repeat_interleave(factor, axis + 2)
    return voxels


def slow_masked_mse(prediction: Tensor, image: Tensor, hidden: Tensor) -> Tensor:
    size = zip(image.shape[2:], hidden.shape[1:], strict=True)
    z, y, x = (edge // blocks for edge, blocks in size)
    mask = upsample(hidden, (z, y, x)).expand_as(image)
    return (prediction.double() - image.double())[mask].square().mean()


@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 2),
    grid=st.tuples(*[st.integers(1, 3)] * 3),
    block=st.tuples(*[st.integers(1, 3)] * 3),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=20)
def test_loss_and_gradient_equal_the_slow_reference(
    batch: int,
    channels: int,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, channels, *(g * b for g, b in zip(grid, block, strict=True)))
    image = torch.randn(shape, generator=generator)
    prediction = torch.randn(shape, generator=generator, requires_grad=True)
    hidden = torch.rand((batch, *grid), generator=generator) < 0.6
    hidden[0, 0, 0, 0] = True
    reference = prediction.detach().requires_grad_()
    loss, expected = (
        masked_mse(prediction, image, hidden),
        slow_masked_mse(reference, image, hidden),
    )
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(prediction.grad, reference.grad, rtol=1e-5, atol=1e-7)


def test_loss_of_a_large_patch_is_exact_in_float32() -> None:
    image, prediction = torch.randn(1, 1, 96, 96, 96), torch.randn(1, 1, 96, 96, 96)
    hidden = torch.rand(1, 6, 6, 6) < 0.75
    expected = slow_masked_mse(prediction, image, hidden).item()
    assert masked_mse(prediction, image, hidden).item() == pytest.approx(expected, rel=1e-6)


def test_loss_is_float32_for_a_bf16_prediction() -> None:
    prediction = torch.full((1, 1, 4, 4, 4), 1.0, dtype=torch.bfloat16, requires_grad=True)
    loss = masked_mse(prediction, torch.zeros(1, 1, 4, 4, 4), torch.ones(1, 2, 2, 2).bool())
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == 1.0
    assert prediction.grad is not None
    assert prediction.grad.dtype == torch.bfloat16


def test_visible_voxels_do_not_count_even_if_not_finite() -> None:
    hidden = torch.tensor([[[[True, False]]]])
    prediction = torch.tensor([[[[[1.0, float("nan")]]]]], requires_grad=True)
    loss = masked_mse(prediction, torch.zeros(1, 1, 1, 1, 2), hidden)
    loss.backward()
    assert loss.item() == 1.0
    assert prediction.grad is not None
    assert prediction.grad.flatten().tolist() == [2.0, 0.0]


def test_hidden_voxels_become_zero_and_the_image_stays() -> None:
    image = torch.randn(2, 1, 8, 8, 8)
    before = image.clone()
    hidden = torch.rand(2, 2, 2, 2) < 0.5
    visible = hide(image, hidden)
    mask = upsample(hidden, (4, 4, 4))
    assert torch.equal(visible, image * ~mask)
    assert torch.equal(image, before)


def test_loss_of_a_batch_without_hidden_blocks_is_zero() -> None:
    image = torch.randn(1, 1, 4, 4, 4)
    prediction = torch.randn(1, 1, 4, 4, 4, requires_grad=True)
    loss = masked_mse(prediction, image, torch.zeros(1, 2, 2, 2).bool())
    loss.backward()
    assert loss.item() == 0
    assert prediction.grad is not None
    assert not prediction.grad.any()


def test_visible_means_are_those_of_the_gathered_voxels_of_each_patch_and_channel() -> None:
    image = torch.randn(3, 2, 4, 8, 4)
    hidden = torch.rand(3, 2, 2, 2) < 0.6
    hidden[:, 0, 0, 0] = False
    visible = ~upsample(hidden, (2, 4, 2))[:, 0]
    means = visible_means(image, hidden)
    assert means.shape == (3, 2, 1, 1, 1)
    for sample in range(3):
        for channel in range(2):
            expected = image[sample, channel].double()[visible[sample]].mean()
            assert means[sample, channel].item() == pytest.approx(expected.item(), rel=1e-5)


def test_visible_means_do_not_look_at_hidden_voxels() -> None:
    image = torch.zeros(1, 1, 2, 2, 4)
    image[..., 2:] = float("nan")
    hidden = torch.tensor([[[[False, True]]]])
    assert visible_means(image, hidden).item() == 0


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_excluded_voxels_count_neither_in_the_loss_nor_in_its_gradient(share: float) -> None:
    torch.manual_seed(0)
    image = torch.randn(2, 2, 4, 4, 4)
    prediction = torch.randn(2, 2, 4, 4, 4, requires_grad=True)
    hidden = torch.rand(2, 2, 2, 2) < 0.7
    excluded = torch.rand(2, 4, 4, 4) < share
    counted = (upsample(hidden, (2, 2, 2)) & ~excluded[:, None]).expand_as(image)
    loss = masked_mse_outside(prediction, image, hidden, excluded)
    loss.backward()
    number = max(int(counted.sum()), 1)  # everything excluded gives 0, not 0/0
    difference = torch.where(counted, prediction.detach() - image, 0)
    assert loss.item() == pytest.approx(difference.square().sum().item() / number, rel=1e-5)
    torch.testing.assert_close(prediction.grad, 2 * difference / number)


def test_excluded_voxels_do_not_count_even_if_not_finite() -> None:
    image = torch.tensor([[[[[0.0, torch.nan, 0.0, 0.0]]]]])
    prediction = torch.tensor([[[[[1.0, 0.0, torch.inf, 7.0]]]]], requires_grad=True)
    hidden = torch.tensor([[[[True, True, True, False]]]])
    excluded = torch.tensor([[[[False, True, True, True]]]])
    loss = masked_mse_outside(prediction, image, hidden, excluded)
    loss.backward()
    assert loss.item() == 1.0
    assert prediction.grad is not None
    assert prediction.grad.flatten().tolist() == [2.0, 0.0, 0.0, 0.0]
