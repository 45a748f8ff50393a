"""Weighted box clustering: overlapping boxes of several models or tiles become one average box.

After arXiv 1811.08661 (section 2.3) in the form that nnDetection uses. Letters: N boxes,
M clusters.
"""

import torch
from torch import Tensor

from voxelbridge.detect.boxes import box_iou, box_volume
from voxelbridge.detect.detections import Detections
from voxelbridge.detect.nms import survivors

_BLOCK = 128  # boxes decided at once


@torch.no_grad()
def weighted_box_clustering(
    detections: Detections,
    weights: Tensor,
    *,
    iou_threshold: float,
    expected: Tensor,
    score_threshold: float = 0.0,
    missing_weight: float = 1.0,
    weigh_by_volume: bool = False,
) -> Detections:
    """One box per cluster, class by class (labels ascending), in the order of the best members.

    Repeatedly the box of highest score and all remaining boxes of its class whose IoU with it
    exceeds the threshold form a cluster. With m = IoU * weight (* volume with `weigh_by_volume`),
    the box is the mean weighted by m * score, and the score is sum(m * score) / (sum(m) +
    missing * mean(m) * missing_weight), where missing = max(0, mean expected - members): boxes that
    expected sources did not find pull the score down. Clusters whose score does not exceed
    `score_threshold` (0 or more) are left out, boxes of volume 0 too.
    weights, expected (N,): weight of each box, number of sources that could have found it.
    """
    if score_threshold < 0:
        raise ValueError(f"score_threshold: got {score_threshold}, expected 0 or more")
    parts = []
    for label in detections.labels.unique().tolist():
        rows = (detections.labels == label).nonzero().squeeze(1)
        rows = rows[box_volume(detections.boxes[rows]) > 0]
        rows = rows[detections.scores[rows].sort(descending=True, stable=True).indices]
        mass = weights[rows] * (box_volume(detections.boxes[rows]) if weigh_by_volume else 1.0)
        boxes, scores = _clusters(
            detections.boxes[rows],
            detections.scores[rows],
            mass=mass,
            iou_threshold=iou_threshold,
            expected=expected[rows],
            missing_weight=missing_weight,
        )
        keep = scores > score_threshold
        parts.append((boxes[keep], scores[keep], torch.full_like(rows[: keep.sum()], label)))
    if not parts:
        return Detections.empty(detections.boxes.device)
    boxes, scores, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    return Detections(boxes=boxes, scores=scores, labels=labels)


def _clusters(
    boxes: Tensor,
    scores: Tensor,
    *,
    mass: Tensor,
    iou_threshold: float,
    expected: Tensor,
    missing_weight: float,
) -> tuple[Tensor, Tensor]:
    """Boxes (M, 6) and scores (M,) of the clusters of one class, rows given by descending score."""
    cluster, iou = _assign(boxes, iou_threshold)
    count = int(cluster.max()) + 1 if len(cluster) else 0
    # float64, so that a box alone in its cluster comes out as it went in
    mass, scores = mass.double() * iou.double(), scores.double()

    def per_cluster(values: Tensor) -> Tensor:
        return values.new_zeros(count).index_add_(0, cluster, values)

    members = per_cluster(torch.ones_like(mass))
    total = per_cluster(mass)
    missing = (per_cluster(expected.to(mass)) / members - members).clamp(min=0)
    scored = per_cluster(mass * scores)
    score = scored / (total + missing * total / members * missing_weight)
    weighted = boxes.double() * (mass * scores)[:, None]
    sums = weighted.new_zeros((count, 6)).index_add_(0, cluster, weighted)
    # A cluster of score 0 has no mean box; its NaN goes with the score threshold.
    return (sums / scored[:, None]).to(boxes), score.to(boxes)


def _assign(boxes: Tensor, iou_threshold: float) -> tuple[Tensor, Tensor]:
    """Cluster number of each box and its IoU with the cluster's best box; best boxes first.

    The best boxes of clusters are those that greedy suppression keeps; every other box belongs to
    the first of them that it overlaps.
    """
    cluster = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    overlap = boxes.new_zeros(len(boxes))
    remaining = torch.arange(len(boxes), device=boxes.device)
    number = 0
    while len(remaining):
        block = remaining[:_BLOCK]
        seeds = survivors(boxes[block], iou_threshold).nonzero().squeeze(1)
        iou = box_iou(boxes[block[seeds]], boxes[remaining])  # (seeds, remaining)
        member = iou > iou_threshold
        member[torch.arange(len(seeds)), seeds] = True
        found, first = member.any(dim=0), member.int().argmax(dim=0)
        taken = remaining[found]
        cluster[taken] = number + first[found]
        overlap[taken] = iou.gather(0, first[None])[0, found]
        remaining = remaining[~found]
        number += len(seeds)
    return cluster, overlap
