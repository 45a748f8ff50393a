"""The losses of Retina U-Net: named, unweighted; the weights are applied once, in the objective.

nnDetection v2 (arXiv 2509.15947, section 2.1): focal loss over all anchors (mean over classes, sum
over anchors) and L1 on the deltas of positive anchors, both divided by a moving average of the
number of positive anchors; Dice and cross-entropy of foreground against background.
nnDetection v0.1 (arXiv 2106.00817): binary cross-entropy over few anchors of the batch, mined among
the hard negatives, and generalised IoU of the boxes of the sampled positive ones.
Letters: B patches, N anchors of a patch, K classes.
"""

from collections.abc import Sequence
from typing import assert_never

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from voxelbridge.core.train.distributed import num_ranks, sum_over_ranks
from voxelbridge.detect.box_coder import decode, encode
from voxelbridge.detect.config import RetinaUNetConfig
from voxelbridge.detect.detections import Targets
from voxelbridge.detect.losses import (
    binary_cross_entropy,
    giou_loss,
    sigmoid_focal_loss,
    soft_dice_loss,
)
from voxelbridge.detect.matching import match_atss
from voxelbridge.detect.negatives import sample_hard_negatives
from voxelbridge.detect.retina_unet import RetinaOutput

BIAS_CORRECTED_STEPS = 5000  # nnDetection v2; later the correction is below float precision


class PositiveAnchorAverage(nn.Module):
    """Moving average of the number of positive anchors, corrected for its start at zero.

    The buffers travel in the training state, so that a resumed run divides by the same numbers.
    While training the count is that of all ranks, which all must call.
    """

    average: Tensor
    steps: Tensor

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("average", torch.zeros((), dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, num_positive: Tensor) -> Tensor:
        """The divisor after this step's count, at least 1; while training divided by the ranks.

        The mean of the ranks' losses is then the loss of the job's batch.
        """
        if self.training:
            self.steps += 1
            everywhere = sum_over_ranks(num_positive.detach())
            self.average.mul_(self.decay).add_((1 - self.decay) * everywhere)
        corrected_steps = self.steps.clamp(1, BIAS_CORRECTED_STEPS)
        corrected = self.average / (1 - self.decay ** corrected_steps.double())
        divisor = corrected.clamp(min=1.0).float()
        return divisor / num_ranks() if self.training else divisor


class RetinaCriterion(nn.Module):
    """Losses `classification`, `box`, `segmentation_ce`, `segmentation_dice` of one batch."""

    def __init__(self, config: RetinaUNetConfig) -> None:
        super().__init__()
        self.config = config
        self.normalizer = PositiveAnchorAverage(config.normalizer_decay)

    def forward(
        self, output: RetinaOutput, targets: Sequence[Targets], foreground: Tensor | None
    ) -> dict[str, Tensor]:
        """`foreground` (B, D, H, W) bool; None leaves the segmentation losses out.

        While training all ranks must call, and the losses are parts of those of the job's batch:
        their mean over the ranks is what one process gets for it (mined negatives, which every rank
        draws among its own anchors, excepted).
        """
        matches = [
            match_atss(target.boxes, output.anchors, candidates=self.config.atss_candidates)
            for target in targets
        ]  # each (N,): background or the row of a box
        hot = [
            class_targets(match, target, logits.shape[1])
            for match, target, logits in zip(matches, targets, output.logits, strict=True)
        ]
        match self.config.classification_loss:
            case "focal":
                positives = [(match >= 0).nonzero().squeeze(1) for match in matches]
                divisor = self.normalizer(sum_of([(match >= 0).sum() for match in matches]))
                classification = self._focal(output.logits, hot) / divisor
            case "hard_negatives":
                positives, negatives = self._sample(output.logits, matches)
                divisor = output.deltas.new_tensor(max(sum(map(len, positives)), 1)).float()
                classification = sampled_cross_entropy(output.logits, hot, positives, negatives)
            case _:
                assert_never(self.config.classification_loss)
        losses = {
            "classification": classification,
            "box": self._box(output, targets, matches, positives) / divisor,
        }
        if output.segmentation is not None and self._everywhere(foreground, output.segmentation):
            assert foreground is not None
            logits, smoothing = output.segmentation.float(), self.config.dice_smoothing
            losses["segmentation_ce"] = F.cross_entropy(logits, foreground.long())
            losses["segmentation_dice"] = soft_dice_loss(
                logits,
                foreground.long(),
                smooth_numerator=smoothing,
                over_ranks=self.training,
            )
        return losses

    def _everywhere(self, foreground: Tensor | None, like: Tensor) -> bool:
        """Whether all ranks have masks: a batch with a patch without one has none (`collate`)."""
        here = foreground is not None
        if not self.training or num_ranks() == 1:
            return here
        return bool(sum_over_ranks(like.new_tensor(float(here))) == num_ranks())

    def _focal(self, logits: Tensor, hot: Sequence[Tensor]) -> Tensor:
        """Mean over classes, sum over all anchors."""
        gamma, alpha = self.config.focal_gamma, self.config.focal_alpha
        return sum_of(
            [
                sigmoid_focal_loss(patch, wanted, gamma=gamma, alpha=alpha).mean(dim=1).sum()
                for patch, wanted in zip(logits, hot, strict=True)
            ]
        )

    def _sample(
        self, logits: Tensor, matches: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Rows of the sampled positive and negative anchors of each patch."""
        settings = self.config.hard_negatives
        positive = torch.stack(list(matches)).flatten() >= 0  # (B * N,)
        # Seeded from the stream that a resumed run repeats; validation draws the same each time.
        seed = int(torch.randint(2**31, ())) if self.training else 0
        drawn = sample_hard_negatives(
            positive,
            ~positive,
            foreground_probability=logits.detach().float().sigmoid().amax(dim=2).flatten(),
            num_samples=settings.anchors_per_image * len(matches),
            positive_fraction=settings.positive_fraction,
            pool_factor=settings.pool_factor,
            generator=torch.Generator(logits.device).manual_seed(seed),
        )
        positives, negatives = (_per_patch(rows, *logits.shape[:2]) for rows in drawn)
        return positives, negatives

    def _box(
        self,
        output: RetinaOutput,
        targets: Sequence[Targets],
        matches: Sequence[Tensor],
        positives: Sequence[Tensor],
    ) -> Tensor:
        """Sum over the positive anchors."""
        anchors = output.anchors.boxes()  # (N, 6)
        losses = []
        for deltas, target, match, rows in zip(
            output.deltas, targets, matches, positives, strict=True
        ):
            wanted, predicted = target.boxes[match[rows]], deltas[rows].float()
            match self.config.box_loss:
                case "l1":
                    loss = (predicted - encode(wanted, anchors[rows])).abs()
                case "giou":
                    loss = giou_loss(decode(predicted, anchors[rows]), wanted)
                case _:
                    assert_never(self.config.box_loss)
            losses.append(loss.sum())
        return sum_of(losses)


def class_targets(match: Tensor, target: Targets, num_classes: int) -> Tensor:
    """One-hot classes (N, K) float32 of matched anchors, zeros for background."""
    hot = torch.zeros((len(match), num_classes), dtype=torch.float32, device=match.device)
    positive = (match >= 0).nonzero().squeeze(1)
    hot[positive, target.labels[match[positive]]] = 1.0
    return hot


def sampled_cross_entropy(
    logits: Tensor, hot: Sequence[Tensor], positives: Sequence[Tensor], negatives: Sequence[Tensor]
) -> Tensor:
    """Mean binary cross-entropy over the sampled anchors of all patches and the classes."""
    rows = [torch.cat(both) for both in zip(positives, negatives, strict=True)]
    chosen = torch.cat([patch[row] for patch, row in zip(logits, rows, strict=True)])
    wanted = torch.cat([patch[row] for patch, row in zip(hot, rows, strict=True)])
    return binary_cross_entropy(chosen, wanted).sum() / max(chosen.numel(), 1)


def sum_of(values: Sequence[Tensor]) -> Tensor:
    """Sum of scalar tensors."""
    return torch.stack(list(values)).sum()


def _per_patch(rows: Tensor, patches: int, anchors: int) -> list[Tensor]:
    """Rows of the whole batch (B * N,) as rows of each patch (N,)."""
    patch = rows // anchors
    return [rows[patch == index] - index * anchors for index in range(patches)]
