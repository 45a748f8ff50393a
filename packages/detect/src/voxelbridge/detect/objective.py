"""What is trained: a detector with its losses, weighted once into the total."""

import torch
from torch import Tensor, nn

from voxelbridge.detect.batches import DetectionBatch
from voxelbridge.detect.config import RetinaUNetConfig
from voxelbridge.detect.retina_criterion import RetinaCriterion
from voxelbridge.detect.retina_unet import RetinaUNet


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

    def forward(self, batch: DetectionBatch) -> dict[str, Tensor]:
        output = self.detector(batch.image, segment=self.segments)
        losses: dict[str, Tensor] = self.criterion(output, batch.targets, batch.foreground)
        if self.segments and "segmentation_ce" not in losses:
            # Steps with and without voxel labels have the same names, so that means can be taken.
            zero = 0.0 * output.segmentation.float().sum()
            losses |= {"segmentation_ce": zero, "segmentation_dice": zero}
        total = torch.stack([self.weights[name] * loss for name, loss in losses.items()]).sum()
        # DistributedDataParallel waits for a gradient of every parameter.
        for parameter in self.detector.idle_parameters(segment=self.segments):
            total = total + 0.0 * parameter.sum()
        return {"total": total, **losses}
