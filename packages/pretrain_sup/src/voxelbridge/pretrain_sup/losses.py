"""Losses of partially labelled segmentation, in float32 (or wider) whatever autocast says.

Letters: K channels of an output, n targets of a head, d h w voxels of a level. Levels are listed
finest first. A target with no voxel in what a Dice is taken over has no Dice gradient, as in the
peers, whose Dice has no smoothing either; it costs 0 here where they add a constant.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from voxelbridge.core.train.distributed import sum_over_ranks
from voxelbridge.pretrain_sup.label_space import Head

DICE_FLOOR = 1e-7  # of a Dice's denominator: 0 / 0 becomes 0

Reduction = Literal["sum", "mean"]


def level_weights(levels: int, *, coarsest: bool = False) -> tuple[float, ...]:
    """Weights 1, 1/2, 1/4, ... of deep supervision, normalised to a sum of 1.

    The coarsest of several levels gets 0 unless `coarsest` (nnU-Net and both MultiTalent versions).
    """
    if levels < 1:
        raise ValueError(f"at least one level, got {levels}")
    weights = [0.5**level for level in range(levels)]
    if not coarsest and levels > 1:
        weights[-1] = 0.0
    return tuple(weight / sum(weights) for weight in weights)


def head_loss(
    logits_per_level: Sequence[Tensor],
    target: Tensor,
    head: Head,
    weights_per_level: Sequence[float],
    *,
    annotated: Tensor | None = None,
) -> dict[str, Tensor]:
    """Loss of one sample on its head: `total` = `ce` + `dice`, each summed over weighted levels.

    Logits (K, d, h, w) per level; `target` and `annotated` as from `encode_target`, at the finest
    level's size, brought to the coarser ones by the nearest voxel. Softmax heads: cross entropy and
    Dice without the background (`annotated` is not needed, -1 says it). Regions: mean binary cross
    entropy and Dice. Both leave voxels out that are not annotated; without any the loss is 0.
    `dice` is the mean over all targets of 1 - Dice, where targets without a voxel add 0. Levels of
    weight 0 are not looked at.
    """
    ce, dice = _zero(logits_per_level[0]), _zero(logits_per_level[0])
    for _, level, weight in _weighted(logits_per_level, weights_per_level):
        size = level.shape[-3:]
        at_level = nearest(target, size)
        counted = _counted(at_level, annotated, size, head)
        with torch.autocast(level.device.type, enabled=False):
            logits = at_least_float32(level)
            if head.regions:
                parts = _region_loss(logits, at_level, counted)
            else:
                parts = _softmax_loss(logits, at_level, counted)
            ce, dice = ce + weight * parts[0], dice + weight * parts[1]
    return {"total": ce + dice, "ce": ce, "dice": dice}


def over_samples(
    losses: Sequence[Mapping[str, Tensor]], *, reduction: Reduction, parts: int = 1
) -> dict[str, Tensor]:
    """Losses of samples as the loss of the batch: their sum, or their mean, over the whole job.

    `parts`: into how many parts of equal length the job's batch is cut whose gradients are averaged
    (ranks x accumulation steps); a sum is multiplied by it, so that it does not depend on it.
    """
    scale = parts if reduction == "sum" else 1 / len(losses)
    return {key: torch.stack([loss[key] for loss in losses]).sum() * scale for key in losses[0]}


@dataclass(frozen=True)
class JointSample:
    """One sample of the joint layout.

    Logits (K, d, h, w) of the whole output layer per level; `channels` are those that the sample's
    data set annotates; `target` (n, D, H, W) bool and `annotated` (D, H, W) bool as from
    `encode_target`, n = number of `channels`.
    """

    logits_per_level: Sequence[Tensor]
    channels: slice
    target: Tensor
    annotated: Tensor


def joint_loss(
    samples: Sequence[JointSample],
    weights_per_level: Sequence[float],
    *,
    ranks: int = 1,
    reduction: Reduction = "sum",
    parts: int = 1,
) -> dict[str, Tensor]:
    """Loss of a batch on one sigmoid per data set and target: `total` = `ce` + `dice`.

    arXiv 2303.14444: sums, not means, over targets, so that the number of targets does not change
    what one of them weighs. `ce`: mean binary cross entropy over the voxels of a sample, summed
    over its annotated targets and reduced over the samples as in `over_samples`. `dice`: sum over
    targets of 1 - Dice, whose sums run over all samples that annotate the target, of all `ranks`
    (every rank must call); a target without a voxel adds 0. `ce_per_channel` and `dice_per_channel`
    (K,), without a gradient, are what each channel adds to the two.
    Channels that a sample does not annotate get gradients that are exactly 0.
    """
    first = samples[0].logits_per_level[0]
    scale = parts if reduction == "sum" else 1 / len(samples)
    channels = first.shape[-4]
    ce, sums, used = _zero(first).expand(channels), [], []
    for number, _, weight in _weighted(samples[0].logits_per_level, weights_per_level):
        of_level = torch.zeros(3, channels, dtype=ce.dtype, device=ce.device)
        for sample in samples:
            level = sample.logits_per_level[number][sample.channels]
            size = level.shape[-3:]
            target, counted = nearest(sample.target, size), nearest(sample.annotated, size)
            with torch.autocast(level.device.type, enabled=False):
                logits = at_least_float32(level)
                costs = weight * scale * _binary_cross_entropy(logits, target, counted)
                ce = ce + _placed(costs, sample.channels, channels)
                found = _dice_sums(logits.sigmoid(), target, counted)
                of_level = of_level + _placed(found, sample.channels, channels)
        sums.append(of_level)
        used.append(weight)
    everywhere = torch.stack(sums)  # (L, 3, K)
    if ranks > 1:
        everywhere = sum_over_ranks(everywhere)
    per_level = torch.stack([_missing_dice(*level) for level in everywhere])  # (L, K)
    dice = (per_level * per_level.new_tensor(used)[:, None]).sum(0)
    return {
        "total": ce.sum() + dice.sum(),
        "ce": ce.sum(),
        "dice": dice.sum(),
        "ce_per_channel": ce.detach(),
        "dice_per_channel": dice.detach(),
    }


def nearest(values: Tensor, size: Sequence[int]) -> Tensor:
    """(..., D, H, W) at another size by the voxel nearest to each new centre; the later in a tie.

    As nnU-Net brings label maps to coarser levels ("nearest-exact").
    """
    if tuple(values.shape[-3:]) == tuple(size):
        return values
    for axis, (old, new) in enumerate(zip(values.shape[-3:], size, strict=True)):
        centres = (torch.arange(new, device=values.device) * 2 + 1) * old
        values = values.index_select(values.ndim - 3 + axis, centres // (2 * new))
    return values


def at_least_float32(values: Tensor) -> Tensor:
    """`values` as float32, or as they are where they are wider."""
    return values if values.dtype == torch.float64 else values.float()


def _zero(logits: Tensor) -> Tensor:
    return torch.zeros((), dtype=at_least_float32(logits[:0]).dtype, device=logits.device)


def _weighted(
    levels: Sequence[Tensor], weights: Sequence[float]
) -> list[tuple[int, Tensor, float]]:
    """Number, logits and weight of every level that counts."""
    if len(levels) != len(weights):
        raise ValueError(f"{len(levels)} levels and {len(weights)} weights")
    pairs = enumerate(zip(levels, weights, strict=True))
    return [(number, level, weight) for number, (level, weight) in pairs if weight > 0]


def _counted(target: Tensor, annotated: Tensor | None, size: Sequence[int], head: Head) -> Tensor:
    """(d, h, w) bool: where the loss looks."""
    if not head.regions:
        return target >= 0
    if annotated is None:
        raise ValueError(f"head {head.name} has regions: its loss needs `annotated`")
    return nearest(annotated, size)


def _softmax_loss(logits: Tensor, target: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    log_probabilities = logits.log_softmax(dim=0)
    classes = target.clamp(min=0)[None]
    costs = -log_probabilities.gather(0, classes)[0]
    ce = _mean(costs, counted)
    one_hot = torch.zeros_like(logits, dtype=torch.bool).scatter_(0, classes, True)
    sums = _dice_sums(log_probabilities[1:].exp(), one_hot[1:] & counted, counted)
    return ce, _missing_dice(*sums).mean()


def _region_loss(logits: Tensor, target: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    ce = _binary_cross_entropy(logits, target, counted).mean()
    return ce, _missing_dice(*_dice_sums(logits.sigmoid(), target, counted)).mean()


def _binary_cross_entropy(logits: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """(n,) mean over the counted voxels."""
    costs = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="none")
    return _mean(costs, counted)


def _mean(costs: Tensor, counted: Tensor) -> Tensor:
    """Mean over the last three axes where `counted`; 0 without such a voxel."""
    # where, not a product: what does not count must not matter even if it is not finite
    total = torch.where(counted, costs, 0.0).sum(dim=(-3, -2, -1))
    return total / counted.sum().clamp(min=1)


def _dice_sums(probabilities: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """(3, n): overlap, predicted and true volume of each target over the counted voxels."""
    axes = (-3, -2, -1)
    target = target & counted
    overlap = torch.where(target, probabilities, 0.0).sum(axes)
    predicted = torch.where(counted, probabilities, 0.0).sum(axes)
    return torch.stack((overlap, predicted, target.sum(axes).to(predicted.dtype)))


def _missing_dice(overlap: Tensor, predicted: Tensor, true: Tensor) -> Tensor:
    """(n,) 1 - Dice of targets that have a voxel, 0 for the others."""
    dice = 2 * overlap / (predicted + true).clamp(min=DICE_FLOOR)
    return torch.where(true > 0, 1.0 - dice, 0.0)


def _placed(values: Tensor, channels: slice, count: int) -> Tensor:
    """(..., n) at `channels` of (..., count), 0 elsewhere."""
    return F.pad(values, (channels.start, count - channels.stop))
