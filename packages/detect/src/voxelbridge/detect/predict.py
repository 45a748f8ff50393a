"""From a volume to boxes: windows over the image, one network pass each, merged results.

nnDetection's inference (arXiv 2106.00817 and its code, defaults): per window the best boxes after
suppression; per model and mirroring suppression across windows with trust by the window's centre;
between models and mirrored copies weighted box clustering. Boxes of mirrored windows come back by
`size - edge`, which is exact for voxel edges.
Shapes: C channels, D H W voxels of the stored (resampled) grid.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from voxelbridge.core.tiles import padded_tiles, read_window
from voxelbridge.core.train.steps import autocast
from voxelbridge.detect.boxes import flip_boxes
from voxelbridge.detect.config import DetectConfig, PostProcessing
from voxelbridge.detect.detections import Detections
from voxelbridge.detect.postprocess import (
    merge_models,
    merge_tiles,
    select_detections,
    tile_center_weights,
)

Axes = tuple[int, ...]


class Proposer(Protocol):
    """A detector, as far as prediction is concerned."""

    def candidates(self, patches: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Per patch boxes (A, 6) in voxel edges and class probabilities (A, K)."""
        ...


def mirrorings(count: int) -> list[Axes]:
    """The first `count` of the eight mirrorings of a volume, the unmirrored one first.

    0 and 1 mean no mirroring; 4 mirror the in-plane axes y and x; 8 all axes.
    """
    in_plane = [(), (1,), (2,), (1, 2)]
    everything = [*in_plane, (0,), (0, 1), (0, 2), (0, 1, 2)]
    return everything[: max(count, 1)]


@torch.no_grad()
def detect_in_patches(
    detector: Proposer, patches: Tensor, post: PostProcessing
) -> list[Detections]:
    """Boxes of each patch (B, C, D, H, W) in its voxel edges, best first."""
    depth, height, width = patches.shape[2:]
    return [
        select_detections(
            boxes,
            probabilities,
            shape=(depth, height, width),
            top_k=post.candidates_per_patch,
            score_threshold=post.min_score,
            min_side=post.min_size,
            nms_iou=post.patch_iou,
            max_detections=post.boxes_per_patch,
        )
        for boxes, probabilities in detector.candidates(patches)
    ]


@torch.no_grad()
def predict_volume(
    detectors: Sequence[tuple[Proposer, DetectConfig]],
    image: NDArray[np.float32],
    *,
    device: torch.device,
    num_mirrorings: int = 1,
) -> Detections:
    """Boxes of a normalised volume (C, D, H, W), best first, in its voxel edges, on the CPU.

    Several detectors and mirrorings are one ensemble. Time grows with windows x mirrorings x
    detectors; memory with one window and the boxes found.
    """
    shape = (image.shape[1], image.shape[2], image.shape[3])
    merged: list[Detections] = []
    weights: list[Tensor] = []
    for detector, config in detectors:
        for axes in mirrorings(num_mirrorings):
            found, trust = _detect_in_windows(detector, config, image, axes=axes, device=device)
            post = config.post_processing
            kept, weight = merge_tiles(
                found,
                trust,
                shape=shape,
                score_threshold=post.min_score,
                min_side=post.min_size,
                nms_iou=post.model_iou,
                max_detections=post.boxes_per_case,
            )
            merged.append(kept)
            weights.append(weight)
    if len(merged) == 1:
        result = merged[0]
    else:
        post = detectors[0][1].post_processing
        result = merge_models(
            merged, weights, iou_threshold=post.ensemble_iou, score_threshold=post.min_score
        )
    return result.select(result.scores.sort(descending=True, stable=True).indices)


def _detect_in_windows(
    detector: Proposer,
    config: DetectConfig,
    image: NDArray[np.float32],
    *,
    axes: Axes,
    device: torch.device,
) -> tuple[Detections, Tensor]:
    """Boxes of all windows in coordinates of the volume, and their trust by place in the window."""
    size = config.patch_size
    parts: list[Detections] = []
    trusts: list[Tensor] = []
    starts = list(padded_tiles(image.shape[1:], size))
    for first in range(0, len(starts), config.batch_size):
        group = starts[first : first + config.batch_size]
        stacked = np.stack([read_window(image, start, size) for start in group])
        patches = torch.from_numpy(stacked).to(device)
        flipped = patches.flip([2 + axis for axis in axes]) if axes else patches
        with autocast(device, config.precision):
            found = detect_in_patches(detector, flipped, config.post_processing)
        for start, detections in zip(group, found, strict=True):
            boxes = flip_boxes(detections.boxes.cpu(), size, axes=axes)
            trusts.append(tile_center_weights(boxes, size))
            offset = torch.tensor((*start, *start), dtype=torch.float32)
            parts.append(
                Detections(
                    boxes=boxes + offset,
                    scores=detections.scores.cpu(),
                    labels=detections.labels.cpu(),
                )
            )
    together = Detections(
        boxes=torch.cat([part.boxes for part in parts]),
        scores=torch.cat([part.scores for part in parts]),
        labels=torch.cat([part.labels for part in parts]),
    )
    return together, torch.cat(trusts)
