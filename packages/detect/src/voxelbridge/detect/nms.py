"""Greedy non-maximum suppression, exact, in blocks of vectorised overlaps on any device."""

import torch
from torch import Tensor

from voxelbridge.detect.boxes import box_iou

_BLOCK = 256  # boxes decided at once; larger blocks waste overlaps with boxes already dropped
_COLUMNS_ON_CPU = 512  # boxes compared with a block at once: larger matrices leave the cache


@torch.no_grad()
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Rows that survive, by descending score (ties in row order); (N, 6), (N,) -> (M,) int64.

    Going down the scores, a box is dropped when its IoU with a box kept before exceeds the
    threshold; an IoU equal to it is kept. A box of volume 0 overlaps nothing.
    """
    order = scores.sort(descending=True, stable=True).indices
    kept = []
    while len(order):
        block, rest = order[:_BLOCK], order[_BLOCK:]
        block = block[_survivors(boxes[block], iou_threshold)]
        kept.append(block)
        if len(rest):
            rest = rest[~_suppressed(boxes[block], boxes[rest], iou_threshold)]
        order = rest
    return torch.cat(kept) if kept else order


@torch.no_grad()
def batched_nms(boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float) -> Tensor:
    """`nms` inside each class; rows of all classes by descending score (ties in row order)."""
    kept = [labels.new_zeros(0)]
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().squeeze(1)
        kept.append(rows[nms(boxes[rows], scores[rows], iou_threshold)])
    rows = torch.cat(kept).sort().values
    return rows[scores[rows].sort(descending=True, stable=True).indices]


def _survivors(boxes: Tensor, iou_threshold: float) -> Tensor:
    """Which of the boxes, given by descending score, greedy suppression keeps; (N, 6) -> bool (N,).

    A box survives when no surviving better box overlaps it. Putting in the last answer for
    "surviving" and repeating settles the best boxes first, each round at least one more, and ends
    where nothing changes: at the greedy answer.
    """
    overlaps = (box_iou(boxes, boxes) > iou_threshold).triu(diagonal=1)  # row suppresses column
    keep = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    while True:
        settled = ~(overlaps & keep[:, None]).any(dim=0)
        if torch.equal(settled, keep):
            return keep
        keep = settled


def _suppressed(kept: Tensor, boxes: Tensor, iou_threshold: float) -> Tensor:
    columns = _COLUMNS_ON_CPU if boxes.device.type == "cpu" else len(boxes)
    parts = [(box_iou(kept, part) > iou_threshold).any(dim=0) for part in boxes.split(columns)]
    return torch.cat(parts)
