"""The losses of Retina U-Net: named, unweighted; the weights are applied once, in the objective.

nnDetection v2's settings (arXiv 2509.15947, section 2.1): focal loss over all anchors (mean over
classes, sum over anchors) and L1 on the deltas of positive anchors, both divided by a moving
average of the number of positive anchors; Dice and cross-entropy of foreground against background.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from voxelbridge.detect.box_coder import encode
from voxelbridge.detect.detections import Targets
from voxelbridge.detect.losses import sigmoid_focal_loss, soft_dice_loss
from voxelbridge.detect.matching import match_atss
from voxelbridge.detect.retina_unet import RetinaOutput

BIAS_CORRECTED_STEPS = 5000  # nnDetection v2; later the correction is below float precision


class PositiveAnchorAverage(nn.Module):
    """Moving average of the number of positive anchors, corrected for its start at zero.

    The buffers travel in the training state, so that a resumed run divides by the same numbers.
    """

    average: Tensor
    steps: Tensor

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("average", torch.zeros((), dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, num_positive: Tensor) -> Tensor:
        """The divisor after this step's count, at least 1."""
        if self.training:
            self.steps += 1
            self.average.mul_(self.decay).add_((1 - self.decay) * num_positive)
        corrected_steps = self.steps.clamp(1, BIAS_CORRECTED_STEPS)
        corrected = self.average / (1 - self.decay ** corrected_steps.double())
        return corrected.clamp(min=1.0).float()


class RetinaCriterion(nn.Module):
    """Losses `classification`, `box`, `segmentation_ce`, `segmentation_dice` of one batch."""

    def __init__(
        self,
        *,
        candidates: int,
        focal_gamma: float,
        focal_alpha: float,
        normalizer_decay: float,
    ) -> None:
        super().__init__()
        self.candidates = candidates
        self.focal_gamma = focal_gamma
        self.focal_alpha = focal_alpha
        self.normalizer = PositiveAnchorAverage(normalizer_decay)

    def forward(
        self, output: RetinaOutput, targets: Sequence[Targets], foreground: Tensor | None
    ) -> dict[str, Tensor]:
        """`foreground` (B, D, H, W) bool; None leaves the segmentation losses out."""
        anchors = output.anchors.boxes()  # (N, 6)
        matches = [
            match_atss(target.boxes, output.anchors, candidates=self.candidates)
            for target in targets
        ]  # each (N,): background or the row of a box
        divisor = self.normalizer(sum_of([(match >= 0).sum() for match in matches]))
        classification, box = [], []
        for index, (match, target) in enumerate(zip(matches, targets, strict=True)):
            positive = (match >= 0).nonzero().squeeze(1)
            rows = match[positive]
            hot = torch.zeros_like(output.logits[index], dtype=torch.float32)
            hot[positive, target.labels[rows]] = 1.0
            focal = sigmoid_focal_loss(
                output.logits[index], hot, gamma=self.focal_gamma, alpha=self.focal_alpha
            )
            classification.append(focal.mean(dim=1).sum())
            wanted = encode(target.boxes[rows], anchors[positive])
            box.append((output.deltas[index, positive].float() - wanted).abs().sum())
        losses = {
            "classification": sum_of(classification) / divisor,
            "box": sum_of(box) / divisor,
        }
        if output.segmentation is not None and foreground is not None:
            logits = output.segmentation.float()
            losses["segmentation_ce"] = F.cross_entropy(logits, foreground.long())
            losses["segmentation_dice"] = soft_dice_loss(
                logits, foreground.long(), smooth_numerator=0.0
            )
        return losses


def sum_of(values: Sequence[Tensor]) -> Tensor:
    """Sum of scalar tensors."""
    return torch.stack(list(values)).sum()
