"""From raw network outputs to few boxes: selection in one patch, merging of tiles and of models.

Follows nnDetection (commit 97a58f3, its defaults) in every step and order.
Letters: A anchors or queries, K classes, N boxes.
"""

from collections.abc import Sequence
from typing import Literal, assert_never

import torch
from torch import Tensor

from voxelbridge.detect.boxes import box_centers, clip_boxes, has_min_side
from voxelbridge.detect.detections import Detections
from voxelbridge.detect.nms import batched_nms, best_rows
from voxelbridge.detect.wbc import weighted_box_clustering


@torch.no_grad()
def select_detections(
    boxes: Tensor,
    probabilities: Tensor,
    *,
    shape: Sequence[int],
    top_k: int = 10_000,
    score_threshold: float = 0.0,
    min_side: float = 0.01,
    nms_iou: float = 0.6,
    max_detections: int = 100,
) -> Detections:
    """The best boxes of one patch; (A, 6), (A, K) -> at most `max_detections`, best first.

    Clip to the patch of `shape`; the min(top_k, A) best (box, class) pairs; score above the
    threshold; every side at least `min_side` voxels; suppression inside each class. Ties keep the
    order of anchors, then classes.
    """
    return suppress_candidates(
        *best_candidates(boxes, probabilities, top_k=top_k),
        shape=shape,
        score_threshold=score_threshold,
        min_side=min_side,
        nms_iou=nms_iou,
        max_detections=max_detections,
    )


def best_candidates(
    boxes: Tensor, probabilities: Tensor, *, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The min(top_k, A) best pairs of (A, 6), (A, K): boxes, scores and labels, best first."""
    num_classes = probabilities.shape[1]
    flat = probabilities.float().flatten()
    order = best_rows(flat, min(top_k, len(boxes)))
    return boxes[order // num_classes].float(), flat[order], order % num_classes


def suppress_candidates(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    *,
    shape: Sequence[int],
    score_threshold: float,
    min_side: float,
    nms_iou: float,
    max_detections: int,
) -> Detections:
    """What `select_detections` keeps of candidates (N,) that are given best first."""
    boxes = clip_boxes(boxes, shape)
    kept = (scores > score_threshold) & has_min_side(boxes, min_side)
    candidates = Detections(boxes=boxes[kept], scores=scores[kept], labels=labels[kept])
    keep = batched_nms(
        candidates.boxes, candidates.scores, candidates.labels, nms_iou, limit=max_detections
    )
    return candidates.select(keep)


def tile_center_weights(boxes: Tensor, tile_shape: Sequence[int]) -> Tensor:
    """How much a box found in a tile counts, by its centre; (N, 6) in tile coordinates -> (N,).

    1 up to half of the way from the middle to a corner, then falling linearly to 0.5 in the corner:
    objects at the border of a tile are seen in part only.
    """
    middle = boxes.new_tensor(tile_shape) / 2
    distance = (box_centers(boxes) - middle).norm(dim=1) / middle.norm()
    return 1.0 - (distance - 0.5).clamp(min=0)


@torch.no_grad()
def merge_tiles(
    detections: Detections,
    weights: Tensor,
    *,
    shape: Sequence[int],
    top_k: int = 1000,
    score_threshold: float = 0.0,
    min_side: float = 0.01,
    nms_iou: float = 0.1,
    suppression: Literal["weighted", "plain"] = "weighted",
    max_detections: int = 100,
) -> tuple[Detections, Tensor]:
    """What one model (under one mirroring) found in all tiles of an image, and weights (N,) for it.

    Boxes in coordinates of the whole image of `shape`, weights (N,) of `tile_center_weights`.
    "weighted": boxes compete by score * weight, and then all weights are 1. "plain": they compete
    by score and keep their weights. Scores stay as they are.
    """
    kept = best_rows(detections.scores, top_k)
    kept = kept[detections.scores[kept] > score_threshold]
    clipped = clip_boxes(detections.boxes[kept], shape)
    kept_sides = has_min_side(clipped, min_side)
    kept, clipped = kept[kept_sides], clipped[kept_sides]
    weights = weights[kept]
    found = Detections(
        boxes=clipped, scores=detections.scores[kept], labels=detections.labels[kept]
    )
    match suppression:
        case "weighted":
            rank, weights = found.scores * weights, torch.ones_like(weights)
        case "plain":
            rank = found.scores
        case _:
            assert_never(suppression)
    keep = batched_nms(found.boxes, rank, found.labels, nms_iou, limit=max_detections)
    return found.select(keep), weights[keep]


@torch.no_grad()
def merge_models(
    detections: Sequence[Detections],
    weights: Sequence[Tensor],
    *,
    top_k: int = 1000,
    iou_threshold: float = 0.5,
    score_threshold: float = 0.0,
) -> Detections:
    """One answer from several (model, mirroring) pairs: weighted box clustering of what each found.

    Each of the pairs, also one that found nothing, counts as expected to see every object. The
    result is ordered by class, then by the best member of each cluster, not by score.
    """
    if not detections:
        raise ValueError("merge_models needs at least one set of detections")
    together = Detections(
        boxes=torch.cat([found.boxes for found in detections]),
        scores=torch.cat([found.scores for found in detections]),
        labels=torch.cat([found.labels for found in detections]),
    )
    best = best_rows(together.scores, top_k)
    chosen = together.select(best)
    return weighted_box_clustering(
        chosen,
        torch.cat(list(weights))[best],
        iou_threshold=iou_threshold,
        expected=torch.full_like(chosen.scores, float(len(detections))),
        score_threshold=score_threshold,
    )
