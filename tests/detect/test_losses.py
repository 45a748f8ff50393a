import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from voxelbridge.detect.box_coder import decode, encode
from voxelbridge.detect.losses import (
    binary_cross_entropy,
    cross_entropy,
    giou_loss,
    l1_loss,
    one_hot_labels,
    sigmoid_focal_loss,
    smooth_l1_loss,
    soft_dice_loss,
)

BOXES = torch.tensor([[0.0, 0, 0, 4, 5, 6], [2.0, 2, 2, 9, 4, 7]])


def plain_focal(logit: float, target: int, gamma: float, alpha: float | None) -> float:
    p = 1 / (1 + math.exp(-logit))
    right = p if target else 1 - p
    weight = 1.0 if alpha is None else (alpha if target else 1 - alpha)
    return -weight * (1 - right) ** gamma * math.log(right)


@settings(max_examples=40, deadline=None)
@given(
    logit=st.floats(-8, 8),
    target=st.integers(0, 1),
    gamma=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    alpha=st.sampled_from([None, 0.25, 0.75]),
)
def test_focal_loss_and_gradient_equal_the_plain_formula(
    logit: float, target: int, gamma: float, alpha: float | None
) -> None:
    x = torch.tensor([[logit]], dtype=torch.float64, requires_grad=True)
    loss = sigmoid_focal_loss(x, torch.tensor([[target]]), gamma=gamma, alpha=alpha)
    assert loss.item() == pytest.approx(plain_focal(logit, target, gamma, alpha), rel=1e-9)
    step = 1e-5
    difference = plain_focal(logit + step, target, gamma, alpha) - plain_focal(
        logit - step, target, gamma, alpha
    )
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert gradient.item() == pytest.approx(difference / (2 * step), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_loss_of_extreme_logits_has_finite_gradients(gamma: float) -> None:
    logits = torch.tensor([[-300.0, -90.0, -20.0, 20.0, 90.0, 300.0]] * 2, requires_grad=True)
    targets = torch.tensor([[1.0] * 6, [0.0] * 6])
    loss = sigmoid_focal_loss(logits, targets, gamma=gamma)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_focal_loss_without_focus_is_cross_entropy() -> None:
    logits = torch.linspace(-5, 5, 12).reshape(4, 3)
    targets = one_hot_labels(torch.tensor([-1, 0, 1, 2]), 3)
    focal = sigmoid_focal_loss(logits, targets, gamma=0.0, alpha=None)
    torch.testing.assert_close(focal, binary_cross_entropy(logits, targets))


def test_background_has_no_one() -> None:
    expected = [[0, 0], [1, 0], [0, 1]]
    assert one_hot_labels(torch.tensor([-1, 0, 1]), 2).tolist() == expected


def test_giou_loss_of_equal_boxes_is_zero_and_of_distant_boxes_almost_two() -> None:
    assert giou_loss(BOXES, BOXES).tolist() == pytest.approx([0, 0], abs=1e-6)
    assert giou_loss(BOXES, BOXES + 1000).min().item() > 1.99


def test_a_dice_class_without_voxels_and_numerator_has_no_gradient() -> None:
    logits = torch.randn(
        (1, 2, 3, 3, 3), generator=torch.Generator().manual_seed(0), requires_grad=True
    )
    loss = soft_dice_loss(logits, torch.zeros((1, 3, 3, 3), dtype=torch.int64), smooth_numerator=0)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 1.0
    assert gradient.abs().max().item() == 0.0


def plain_dice(logits: Tensor, labels: Tensor, batch_dice: bool, background: bool) -> float:
    probabilities = torch.softmax(logits.double(), 1)
    groups = [range(len(labels))] if batch_dice else [[image] for image in range(len(labels))]
    scores = []
    for group in groups:
        for channel in range(0 if background else 1, logits.shape[1]):
            overlap = total = 0.0
            for image in group:
                wanted = (labels[image] == channel).double()
                overlap += (probabilities[image, channel] * wanted).sum().item()
                total += (probabilities[image, channel].sum() + wanted.sum()).item()
            scores.append((2 * overlap + 1e-5) / (total + 1e-5))
    return 1 - sum(scores) / len(scores)


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("background", [True, False])
def test_dice_equals_the_plain_loop(batch_dice: bool, background: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn((2, 3, 4, 3, 2), generator=generator)
    labels = torch.randint(0, 3, (2, 4, 3, 2), generator=generator)
    loss = soft_dice_loss(logits, labels, batch_dice=batch_dice, include_background=background)
    expected = plain_dice(logits, labels, batch_dice, background)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_gradients_pass_gradcheck() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn((2, 3, 2, 2, 2), generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (2, 2, 2, 2), generator=generator)
    flat = logits.reshape(-1, 3).clone().requires_grad_()
    hot = one_hot_labels(torch.randint(-1, 3, (16,), generator=generator), 3)
    boxes = BOXES.double().requires_grad_()
    other = BOXES.flip(0).double() + 0.3
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: soft_dice_loss(x, labels), (logits,))
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, labels), (logits,))
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, labels, top_fraction=0.3), (logits,))
    assert torch.autograd.gradcheck(lambda x: sigmoid_focal_loss(x, hot), (flat,))
    assert torch.autograd.gradcheck(lambda x: binary_cross_entropy(x, hot), (flat,))
    assert torch.autograd.gradcheck(lambda x: giou_loss(x, other), (boxes,))
    assert torch.autograd.gradcheck(lambda x: l1_loss(x, other), (boxes,))
    assert torch.autograd.gradcheck(lambda x: smooth_l1_loss(x, other, beta=0.5), (boxes,))


def test_everything_is_float32_under_autocast() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn((1, 2, 3, 3, 3), generator=generator)
    labels = torch.randint(0, 2, (1, 3, 3, 3), generator=generator)
    flat, hot = logits.reshape(-1, 2), one_hot_labels(torch.tensor([-1, 0, 1]).repeat(9), 2)
    deltas = encode(BOXES, BOXES.flip(0))
    losses: list[Callable[[torch.dtype], Tensor]] = [
        lambda t: soft_dice_loss(logits.to(t), labels),
        lambda t: cross_entropy(logits.to(t), labels),
        lambda t: sigmoid_focal_loss(flat.to(t), hot),
        lambda t: binary_cross_entropy(flat.to(t), hot),
        lambda t: l1_loss(deltas.to(t), deltas),
        lambda t: smooth_l1_loss(deltas.to(t), deltas, beta=1.0),
        lambda t: giou_loss(decode(deltas.to(t), BOXES.flip(0)), BOXES),
    ]
    for loss in losses:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low, full = loss(torch.bfloat16), loss(torch.float32)
        assert low.dtype == full.dtype == torch.float32
        assert torch.equal(full, loss(torch.float32))


def test_losses_equal_the_reference(boxops) -> None:
    golden = boxops("losses")
    predicted, target = golden.boxes("reg_pred"), golden.boxes("reg_target")
    labels = golden.tensor("cls_target") - 1  # there 0 is background
    logits, hot = golden.tensor("cls_logits"), one_hot_labels(labels, 3)
    smooth = one_hot_labels(labels, 3, smoothing=0.1)
    giou = giou_loss(predicted, target) - 1  # there the loss is minus the GIoU
    torch.testing.assert_close(-giou, golden.tensor("giou_per_pair"), rtol=1e-5, atol=1e-6)
    focal2 = sigmoid_focal_loss(logits, hot, gamma=2.0, alpha=None)
    focal2_alpha = sigmoid_focal_loss(logits, hot, gamma=2.0, alpha=0.25)
    softmax_target = golden.tensor("cls_target")
    for computed, name in (
        (giou.sum(), "giou_loss_sum"),
        (giou.mean(), "giou_loss_mean"),
        (smooth_l1_loss(predicted, target, beta=1.0).sum(), "smooth_l1_beta1_sum"),
        (smooth_l1_loss(predicted, target, beta=1 / 9).mean(), "smooth_l1_beta_1_9_mean"),
        (smooth_l1_loss(predicted, target, beta=0.0).sum(), "smooth_l1_beta0_sum"),
        (l1_loss(predicted, target).sum(), "smooth_l1_beta0_sum"),
        (binary_cross_entropy(logits, hot).mean(), "bce_mean"),
        (binary_cross_entropy(logits, hot).sum(), "bce_sum"),
        (binary_cross_entropy(logits, smooth).mean(), "bce_mean_smooth_0_1"),
        (focal2.sum(), "focal_sum_gamma2"),
        (focal2_alpha.sum(), "focal_sum_gamma2_alpha_0_25"),
        (sigmoid_focal_loss(logits, hot).sum(), "focal_sum_gamma1_alpha_0_75"),
        (cross_entropy(golden.tensor("softmax_logits"), softmax_target), "softmax_ce_mean"),
    ):
        torch.testing.assert_close(computed, golden.tensor(name), rtol=1e-5, atol=1e-5, msg=name)


def test_segmentation_losses_equal_the_reference(boxops) -> None:
    golden = boxops("losses")
    logits, labels = golden.tensor("seg_logits"), golden.tensor("seg_target")
    foreground = (labels > 0).long()
    four = golden.tensor("seg4_logits")
    for computed, name in (
        (soft_dice_loss(logits, foreground), "seg_dice_batch"),
        (soft_dice_loss(logits, foreground, batch_dice=False), "seg_dice_per_image"),
        (soft_dice_loss(logits, foreground, include_background=True), "seg_dice_batch_with_bg"),
        (soft_dice_loss(logits, torch.zeros_like(labels)), "seg_dice_batch_empty_target"),
        (cross_entropy(logits, foreground), "seg_ce"),
        (cross_entropy(logits, foreground, top_fraction=0.1), "seg_ce_top_0_1"),
        (0.5 * cross_entropy(logits, foreground), "segmenter_seg_ce"),
        (0.5 * soft_dice_loss(logits, foreground), "segmenter_seg_dice"),
        (soft_dice_loss(four, labels), "seg4_dice_batch"),
        (cross_entropy(four, labels), "seg4_ce"),
    ):
        torch.testing.assert_close(computed, golden.tensor(name), rtol=1e-5, atol=1e-6, msg=name)
