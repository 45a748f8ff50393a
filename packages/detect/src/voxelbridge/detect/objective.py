"""What is trained: a detector with its losses, weighted once into the total."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from voxelbridge.detect.config import DeformableDETRConfig, RetinaUNetConfig
from voxelbridge.detect.deformable_detr import DeformableDETR
from voxelbridge.detect.detr_criterion import DETRCriterion
from voxelbridge.detect.retina_criterion import RetinaCriterion
from voxelbridge.detect.retina_unet import RetinaUNet

if TYPE_CHECKING:  # networks alone need no data libraries
    from voxelbridge.detect.batches import DetectionBatch


class RetinaObjective(nn.Module):
    """forward(batch) -> the criterion's named losses, unweighted, and their weighted "total".

    Losses come from `forward` because only that is synchronised between ranks.
    """

    def __init__(
        self, detector: RetinaUNet, criterion: RetinaCriterion, config: RetinaUNetConfig
    ) -> None:
        super().__init__()
        self.detector = detector
        self.criterion = criterion
        half = config.segmentation_weight / 2  # nnDetection: half cross-entropy, half Dice
        self.weights = {
            "classification": config.class_weight,
            "box": config.box_weight,
            "segmentation_ce": half,
            "segmentation_dice": half,
        }
        self.segments = config.segmentation_weight > 0

    def forward(self, batch: "DetectionBatch") -> dict[str, Tensor]:
        output = self.detector(batch.image, segment=self.segments)
        losses: dict[str, Tensor] = self.criterion(output, batch.targets, batch.foreground)
        if self.segments and "segmentation_ce" not in losses:
            # Steps with and without voxel labels have the same names, so that means can be taken.
            zero = 0.0 * output.segmentation.float().sum()
            losses |= {"segmentation_ce": zero, "segmentation_dice": zero}
        total = _weighted(losses, self.weights)
        # DistributedDataParallel waits for a gradient of every parameter.
        for parameter in self.detector.idle_parameters(segment=self.segments):
            total = total + 0.0 * parameter.sum()
        return {"total": total, **losses}


class DETRObjective(nn.Module):
    """As `RetinaObjective`: losses `classification`, `l1`, `giou`, of each `aux_*`, `proposal_*`.

    Losses of earlier decoder blocks and of the proposals weigh as much as those of the answer.
    """

    def __init__(
        self, detector: DeformableDETR, criterion: DETRCriterion, config: DeformableDETRConfig
    ) -> None:
        super().__init__()
        self.detector = detector
        self.criterion = criterion
        self.weights = {
            f"{stage}{part}": weight
            for stage in ("", "aux_", "proposal_")
            for part, weight in (
                ("classification", config.class_weight),
                ("l1", config.l1_weight),
                ("giou", config.giou_weight),
            )
        }

    def forward(self, batch: "DetectionBatch") -> dict[str, Tensor]:
        output = self.detector(batch.image)
        losses: dict[str, Tensor] = self.criterion(output, batch.targets, batch.image.shape[2:])
        total = _weighted(losses, self.weights)
        for parameter in self.detector.idle_parameters():  # see RetinaObjective
            total = total + 0.0 * parameter.sum()
        return {"total": total, **losses}


Objective = RetinaObjective | DETRObjective


def _weighted(losses: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    return torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
