"""Losses and pseudo Dice on the fixed validation patches, per data set."""

import torch
from torch import Tensor

from voxelbridge.core.train.distributed import World
from voxelbridge.core.train.metrics import Meter
from voxelbridge.core.train.steps import autocast, evaluating, move
from voxelbridge.pretrain_sup.batches import MultiDatasetSampler, SegmentationBatch
from voxelbridge.pretrain_sup.config import MultiTalentConfig
from voxelbridge.pretrain_sup.label_space import Head, LabelSpace, encode_target
from voxelbridge.pretrain_sup.objective import MultiTalentObjective

Counts = dict[str, list[list[int]]]  # head -> overlap, predicted and true voxels of each target


@torch.no_grad()
def validate(
    objective: MultiTalentObjective,
    sampler: MultiDatasetSampler,
    config: MultiTalentConfig,
    world: World,
) -> dict[str, float]:
    """Means over the fixed validation patches; every rank must call it.

    `val_loss`, `val_ce` and `val_dice`, and per data set `val_<name>`, its loss, and
    `val_<name>.dice`, its pseudo Dice: over the voxels of all its patches together, mean of the
    targets that have any.
    """
    meter, counts = Meter(), {}
    space = sampler.space
    with evaluating(objective):
        for index in range(world.rank, config.validation_patches, world.size):
            batch: SegmentationBatch = move(sampler.validation_batch(index), world.device)
            with autocast(world.device, config.precision):
                logits = objective.logits(batch)
                meter.add(objective.losses(logits, batch))
            head = space.head(batch["heads"][0])
            finest = logits[0][0][space.channels_of(head)]
            found = target_counts(head, finest, batch["segmentations"][0]).tolist()
            counts[head.name] = _sum(counts.get(head.name), found)
    means = meter.means(world)
    losses = {"val_loss" if name == "total" else f"val_{name}": v for name, v in means.items()}
    return losses | pseudo_dice(space, world.gather(counts))


def target_counts(head: Head, logits: Tensor, segmentation: Tensor) -> Tensor:
    """(3, n) int64: overlap, predicted and true voxels of the n targets of `head`.

    Logits (K, D, H, W) of the head, label ids (D, H, W); voxels that are not annotated do not
    count.
    """
    target, annotated = encode_target(head, segmentation)
    if head.regions:
        predicted = (logits > 0) & annotated
        axes = (-3, -2, -1)
        return torch.stack([m.sum(axes) for m in (predicted & target, predicted, target)])
    number = len(head.targets) + 1
    true, predicted = target[annotated], logits.argmax(dim=0)[annotated]
    groups = (true[true == predicted], predicted, true)
    return torch.stack([torch.bincount(group, minlength=number)[1:] for group in groups])


def pseudo_dice(space: LabelSpace, of_ranks: list[Counts]) -> dict[str, float]:
    """`val_<name>.dice` of every data set that has a target with a voxel."""
    counts: Counts = {}
    for of_rank in of_ranks:
        for head, found in of_rank.items():
            counts[head] = _sum(counts.get(head), found)
    values: dict[str, list[float]] = {}
    for head in space.heads:
        for overlap, predicted, true in zip(*counts.get(head.name, [[], [], []]), strict=True):
            if true:
                values.setdefault(head.dataset, []).append(2 * overlap / (predicted + true))
    return {f"val_{name}.dice": sum(dice) / len(dice) for name, dice in values.items()}


def _sum(first: list[list[int]] | None, second: list[list[int]]) -> list[list[int]]:
    if first is None:
        return second
    return [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(first, second, strict=True)]
