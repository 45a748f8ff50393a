"""Losses of Deformable DETR: one-to-one matching for each decoder block and for the proposals.

arXiv 2010.04159 with the settings of nnDetection v2 (arXiv 2509.15947): focal classification, L1
and generalised IoU, each divided by the number of objects of the batch (mean over ranks).
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from voxelbridge.core.train.distributed import num_ranks, sum_over_ranks
from voxelbridge.detect.boxes import box_giou, centre_size_to_edges, edges_to_centre_size
from voxelbridge.detect.deform_transformer import Stage, TransformerOutput
from voxelbridge.detect.detections import Targets
from voxelbridge.detect.losses import giou_loss, l1_loss, sigmoid_focal_loss

COST_EPS = 1e-8
PARTS = ("classification", "l1", "giou")


class DETRCriterion(nn.Module):
    """Unweighted losses of one batch: of the answer, `aux_*` and `proposal_*`.

    `aux_*` adds up the decoder blocks before the last. Costs weigh the matching only.
    """

    def __init__(
        self,
        *,
        focal_gamma: float,
        focal_alpha: float,
        class_cost: float,
        l1_cost: float,
        giou_cost: float,
    ) -> None:
        super().__init__()
        self.focal_gamma, self.focal_alpha = focal_gamma, focal_alpha
        self.class_cost, self.l1_cost, self.giou_cost = class_cost, l1_cost, giou_cost

    def forward(
        self, output: TransformerOutput, targets: Sequence[Targets], shape: Sequence[int]
    ) -> dict[str, Tensor]:
        """`shape` (D, H, W) is the patch, in whose voxel edges the targets are."""
        extent = output.proposals.boxes.new_tensor([*shape, *shape])
        wanted = [edges_to_centre_size(target.boxes / extent) for target in targets]
        labels = [target.labels for target in targets]
        count = extent.new_tensor(float(sum(map(len, targets))))
        if self.training:  # the mean of the ranks' losses is then the loss of the job's batch
            count = sum_over_ranks(count).clamp(min=1) / num_ranks()
        else:
            count = count.clamp(min=1)
        proposals = Stage(
            output.proposals.logits[:, output.valid], output.proposals.boxes[:, output.valid]
        )
        per_block = [self._losses(block, wanted, labels, count) for block in output.blocks]
        losses = dict(per_block[-1])
        for part in PARTS:
            earlier = [block[part] for block in per_block[:-1]]
            losses[f"aux_{part}"] = torch.stack(earlier).sum() if earlier else 0 * losses[part]
        first = self._losses(proposals, wanted, labels, count)
        return losses | {f"proposal_{part}": first[part] for part in PARTS}

    def _losses(
        self, stage: Stage, wanted: Sequence[Tensor], labels: Sequence[Tensor], count: Tensor
    ) -> dict[str, Tensor]:
        hot = torch.zeros_like(stage.logits, dtype=torch.float32)
        predicted, matched = [], []
        for image, (boxes, classes) in enumerate(zip(wanted, labels, strict=True)):
            rows, columns = self.match(stage.logits[image], stage.boxes[image], boxes, classes)
            hot[image, rows, classes[columns]] = 1.0
            predicted.append(stage.boxes[image, rows])
            matched.append(boxes[columns])
        found, truth = torch.cat(predicted), torch.cat(matched)
        focal = sigmoid_focal_loss(
            stage.logits, hot, gamma=self.focal_gamma, alpha=self.focal_alpha
        )
        overlap = giou_loss(centre_size_to_edges(found), centre_size_to_edges(truth))
        return {
            "classification": focal.sum() / count,
            "l1": l1_loss(found, truth).sum() / count,
            "giou": overlap.sum() / count,
        }

    @torch.no_grad()
    def match(
        self, logits: Tensor, boxes: Tensor, wanted: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rows of predictions and of objects that belong together, the cheapest one to one.

        (Q, K), (Q, 6), (N, 6), (N,) -> two (min(Q, N),) int64. The assignment itself runs on the
        CPU.
        """
        if len(wanted) == 0:
            none = torch.zeros(0, dtype=torch.int64, device=logits.device)
            return none, none
        p = logits.float().sigmoid()[:, labels]  # (Q, N)
        gamma, alpha = self.focal_gamma, self.focal_alpha
        positive = alpha * (1 - p) ** gamma * -(p + COST_EPS).log()
        negative = (1 - alpha) * p**gamma * -(1 - p + COST_EPS).log()
        distance = torch.cdist(boxes.float(), wanted.float(), p=1)
        overlap = box_giou(centre_size_to_edges(boxes.float()), centre_size_to_edges(wanted))
        cost = self.class_cost * (positive - negative)
        cost = cost + self.l1_cost * distance - self.giou_cost * overlap
        rows, columns = cheapest_pairs(cost.cpu().numpy())
        return (
            torch.as_tensor(rows, dtype=torch.int64, device=logits.device),
            torch.as_tensor(columns, dtype=torch.int64, device=logits.device),
        )


def cheapest_pairs(cost: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns of the cheapest one-to-one assignment of a (Q, N) matrix."""
    from scipy.optimize import linear_sum_assignment  # the losses load without it

    return linear_sum_assignment(cost)
