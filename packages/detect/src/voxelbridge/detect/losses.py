"""Detection and segmentation losses as pure functions, computed in float32 also under autocast.

Element losses come back unreduced, so that the caller states the reduction; nothing is weighted.
Letters: N anchors or boxes, K foreground classes, C channels with the background first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from voxelbridge.core.train.distributed import sum_over_ranks
from voxelbridge.detect.boxes import at_least_float32, paired_giou

GIOU_EPS = 1e-7  # nnDetection: only on the enclosing volume


def one_hot_labels(labels: Tensor, num_classes: int, *, smoothing: float = 0.0) -> Tensor:
    """Targets of K independent sigmoids; (N,) int64 -> (N, K) float32.

    Label -1 (background) gives a row without a one. With `smoothing` e, every entry is e / (K + 1)
    and the one becomes 1 - e (nnDetection's form).
    """
    classes = torch.arange(num_classes, device=labels.device)
    one_hot = (labels[:, None] == classes).float()
    if smoothing == 0.0:
        return one_hot
    return torch.where(one_hot > 0, 1.0 - smoothing, smoothing / (num_classes + 1))


def sigmoid_focal_loss(
    logits: Tensor, targets: Tensor, *, gamma: float = 1.0, alpha: float | None = 0.75
) -> Tensor:
    """Focal loss (arXiv 1708.02002, equation 5) per element; (N, K), (N, K) of 0 and 1 -> (N, K).

    Defaults are those of the paper (arXiv 2509.15947). `alpha` weighs ones and 1 - alpha zeros;
    None: no weighting. Smoothed targets are not meant for it.
    """
    targets = targets.to(torch.bool)
    logits = at_least_float32(logits)
    toward = torch.where(targets, logits, -logits)  # large where the prediction is right
    # Through logarithms: 1 - p rounds to 0 for confident predictions, and its power has then no
    # finite gradient for gamma below 1.
    focus = torch.exp(gamma * F.logsigmoid(-toward))
    loss = -F.logsigmoid(toward) * focus
    if alpha is None:
        return loss
    return torch.where(targets, alpha * loss, (1.0 - alpha) * loss)


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of sigmoids per element, targets in [0, 1]; (N, K), (N, K) -> (N, K)."""
    logits = at_least_float32(logits)
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")


def l1_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Absolute difference per element; (N, 6), (N, 6) -> (N, 6)."""
    return (at_least_float32(predicted) - at_least_float32(target)).abs()


def smooth_l1_loss(predicted: Tensor, target: Tensor, *, beta: float) -> Tensor:
    """Per element quadratic below `beta` and linear above (Huber / beta); beta 0 is L1."""
    return F.smooth_l1_loss(
        at_least_float32(predicted), at_least_float32(target), reduction="none", beta=beta
    )


def giou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """1 - generalised IoU per pair of boxes, in [0, 2); (N, 6), (N, 6) -> (N,).

    Differs from nnDetection, whose loss is minus the GIoU: the same gradient, one less per pair.
    """
    return 1.0 - paired_giou(predicted, target, eps=GIOU_EPS)


def soft_dice_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    batch_dice: bool = True,
    include_background: bool = False,
    smooth_numerator: float = 1e-5,
    smooth_denominator: float = 1e-5,
    over_ranks: bool = False,
) -> Tensor:
    """1 - mean soft Dice of the softmax; (B, C, D, H, W), (B, D, H, W) int64 -> scalar.

    `batch_dice` adds up the batch before the ratio is taken, otherwise each image has its own
    ratio; with `over_ranks` the batch is that of all ranks, which all must call. A class without
    voxels costs 1 and, with `smooth_numerator` 0, has no gradient.
    """
    probabilities = at_least_float32(logits).softmax(dim=1)
    one_hot = torch.zeros_like(probabilities).scatter_(1, labels[:, None], 1.0)
    if not include_background:
        probabilities, one_hot = probabilities[:, 1:], one_hot[:, 1:]
    axes = (0, 2, 3, 4) if batch_dice else (2, 3, 4)
    overlap = (probabilities * one_hot).sum(axes)
    total = probabilities.sum(axes) + one_hot.sum(axes)
    if over_ranks and batch_dice:
        overlap, total = sum_over_ranks(torch.stack([overlap, total])).unbind()
    dice = (2 * overlap + smooth_numerator) / (total + smooth_denominator)
    return 1.0 - dice.mean()


def cross_entropy(logits: Tensor, labels: Tensor, *, top_fraction: float = 1.0) -> Tensor:
    """Mean softmax cross entropy; (B, C, ...), (B, ...) int64 -> scalar.

    With `top_fraction` below 1 only that share of the elements, the costliest, is averaged.
    """
    losses = F.cross_entropy(at_least_float32(logits), labels, reduction="none")
    if top_fraction >= 1.0:
        return losses.mean()
    count = max(int(losses.numel() * top_fraction), 1)
    return losses.flatten().topk(count, sorted=False).values.mean()
