"""The training objective on many data sets: a batch in, the loss and its part per data set out.

Letters: K channels of an output layer, n targets of a head, d h w voxels of a level.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from voxelbridge.pretrain_sup.label_space import Head, LabelSpace, encode_target
from voxelbridge.pretrain_sup.losses import (
    JointSample,
    Reduction,
    head_loss,
    joint_loss,
    level_weights,
    over_samples,
)
from voxelbridge.pretrain_sup.model import SegmentationNetwork

if TYPE_CHECKING:  # the batches' module reads files, which takes libraries that this one does not
    from voxelbridge.pretrain_sup.batches import SegmentationBatch


class MultiTalentObjective(nn.Module):
    """A `SegmentationBatch` -> "total" = "ce" + "dice", and the mean loss of each data set in it.

    "total" is the loss of the whole job's batch as `reduction` says, cut into `ranks` x
    `accumulation_steps` equal parts. The entry of a data set is a mean over its own samples of this
    batch, whatever the reduction. Every rank must call it equally often while it is training; in
    eval mode each call stands alone.
    """

    absent_parts = True  # most batches lack the stems and heads of some data sets

    def __init__(
        self,
        network: SegmentationNetwork,
        space: LabelSpace,
        *,
        reduction: Reduction,
        deep_supervision: bool = True,
        supervise_coarsest: bool = False,
        ranks: int = 1,
        accumulation_steps: int = 1,
    ) -> None:
        super().__init__()
        self.network = network
        self._space = space
        self._heads = {head.name: head for head in space.heads}
        levels = len(network.level_strides)
        finest = (1.0, *(0.0,) * (levels - 1))
        weights = level_weights(levels, coarsest=supervise_coarsest)
        self._weights = weights if deep_supervision else finest
        self._reduction: Reduction = reduction
        self._ranks = ranks
        self._parts = ranks * accumulation_steps

    def forward(self, batch: "SegmentationBatch") -> dict[str, Tensor]:
        return self.losses(self.logits(batch), batch)

    def logits(self, batch: "SegmentationBatch") -> list[list[Tensor]]:
        """Per sample (K, d, h, w) of the output layer of its head, finest level first."""
        layers = [self._space.layer_of(self._heads[name]) for name in batch["heads"]]
        return self.network(batch["images"], batch["datasets"], layers)

    def losses(
        self, logits: Sequence[Sequence[Tensor]], batch: "SegmentationBatch"
    ) -> dict[str, Tensor]:
        """The losses of a batch whose logits are given."""
        heads = [self._heads[name] for name in batch["heads"]]
        match self._space.layout:
            case "per_dataset":
                return self._per_dataset(logits, heads, batch)
            case "joint":
                return self._joint(logits, heads, batch)

    def _per_dataset(
        self,
        logits: Sequence[Sequence[Tensor]],
        heads: Sequence[Head],
        batch: "SegmentationBatch",
    ) -> dict[str, Tensor]:
        losses = []
        for levels, head, segmentation in zip(logits, heads, batch["segmentations"], strict=True):
            target, annotated = encode_target(head, segmentation)
            losses.append(head_loss(levels, target, head, self._weights, annotated=annotated))
        parts = self._parts if self.training else 1
        named = over_samples(losses, reduction=self._reduction, parts=parts)
        for dataset, members in _members(batch["datasets"]).items():
            own = torch.stack([losses[index]["total"] for index in members])
            named[dataset] = own.mean().detach()
        return named

    def _joint(
        self,
        logits: Sequence[Sequence[Tensor]],
        heads: Sequence[Head],
        batch: "SegmentationBatch",
    ) -> dict[str, Tensor]:
        samples = []
        for levels, head, segmentation in zip(logits, heads, batch["segmentations"], strict=True):
            target, annotated = encode_target(head, segmentation)
            channels = self._space.channels_of(head)
            samples.append(JointSample(levels, channels, target, annotated))
        parts, ranks = (self._parts, self._ranks) if self.training else (1, 1)
        losses = joint_loss(
            samples, self._weights, ranks=ranks, reduction=self._reduction, parts=parts
        )
        scale = parts if self._reduction == "sum" else 1 / len(samples)
        ce, dice = losses.pop("ce_per_channel") / scale, losses.pop("dice_per_channel")
        for dataset, members in _members(batch["datasets"]).items():
            (head,) = self._space.heads_of(dataset)
            own = self._space.channels_of(head)
            losses[dataset] = ce[own].sum() / len(members) + dice[own].sum()
        return losses


def _members(datasets: Sequence[str]) -> dict[str, list[int]]:
    """Numbers of the samples of each data set."""
    members: dict[str, list[int]] = {}
    for index, dataset in enumerate(datasets):
        members.setdefault(dataset, []).append(index)
    return members
