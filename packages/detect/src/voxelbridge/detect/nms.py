"""Greedy non-maximum suppression, exact, in blocks of vectorised overlaps on any device."""

import torch
from torch import Tensor

from voxelbridge.detect.boxes import box_iou

_BLOCK = 256  # boxes decided at once; larger blocks waste overlaps with boxes already dropped
_PART = 256  # boxes looked at before asking whether there are enough survivors
_COLUMNS_ON_CPU = 512  # boxes compared with a block at once: larger matrices leave the cache


@torch.no_grad()
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, *, limit: int | None = None) -> Tensor:
    """Rows that survive, by descending score (ties in row order); (N, 6), (N,) -> (M,) int64.

    Going down the scores, a box is dropped when its IoU with a box kept before exceeds the
    threshold; an IoU equal to it is kept. A box of volume 0 overlaps nothing.
    With `limit` only so many of the best survivors are looked for.
    """
    order = scores.sort(descending=True, stable=True).indices
    kept = order[:0]
    # With a limit the rest is looked at in parts: most of it is never needed.
    for part in order.split(_PART if limit is not None else max(len(order), 1)):
        if limit is not None and len(kept) >= limit:
            break
        if len(kept):
            part = part[~_suppressed(boxes[kept], boxes[part], iou_threshold)]
        kept = torch.cat([kept, _greedy(boxes, part, iou_threshold)])
    return kept[:limit]


@torch.no_grad()
def batched_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    iou_threshold: float,
    *,
    limit: int | None = None,
) -> Tensor:
    """`nms` inside each class; rows of all classes by descending score (ties in row order).

    `limit` counts over all classes.
    """
    kept = [labels.new_zeros(0)]
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().squeeze(1)
        kept.append(rows[nms(boxes[rows], scores[rows], iou_threshold, limit=limit)])
    rows = torch.cat(kept).sort().values
    return rows[scores[rows].sort(descending=True, stable=True).indices][:limit]


def survivors(boxes: Tensor, iou_threshold: float) -> Tensor:
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


def best_rows(scores: Tensor, count: int) -> Tensor:
    """Rows of the `count` highest scores, best first, ties in row order; (N,) -> (count,)."""
    rows = torch.arange(len(scores), device=scores.device)
    if 0 < count < len(scores):
        # topk alone leaves the order of ties open; sorting everything is far slower than topk.
        limit = scores.topk(count).values[-1]
        rows = (scores >= limit).nonzero().squeeze(1)
    return rows[scores[rows].sort(descending=True, stable=True).indices][:count]


def _greedy(boxes: Tensor, order: Tensor, iou_threshold: float) -> Tensor:
    """Of the rows `order`, best first, those that survive each other."""
    kept = [order[:0]]
    while len(order):
        block, order = order[:_BLOCK], order[_BLOCK:]
        block = block[survivors(boxes[block], iou_threshold)]
        kept.append(block)
        if len(order):
            order = order[~_suppressed(boxes[block], boxes[order], iou_threshold)]
    return torch.cat(kept)


def _suppressed(kept: Tensor, boxes: Tensor, iou_threshold: float) -> Tensor:
    columns = _COLUMNS_ON_CPU if boxes.device.type == "cpu" else len(boxes)
    parts = [(box_iou(kept, part) > iou_threshold).any(dim=0) for part in boxes.split(columns)]
    return torch.cat(parts)
