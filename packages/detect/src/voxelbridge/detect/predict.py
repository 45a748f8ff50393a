"""From a volume to boxes: windows over the image, one network pass each, merged results.

nnDetection's inference (arXiv 2106.00817 and its code, defaults): per window the best boxes after
suppression; per model and mirroring suppression across windows with trust by the window's centre;
between models and mirrored copies weighted box clustering. Boxes of mirrored windows come back by
`size - edge`, which is exact for voxel edges.
Shapes: B windows, C channels, D H W voxels of the stored (resampled) grid, A anchors or queries,
K classes, N boxes.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from voxelbridge.core.errors import DataError
from voxelbridge.core.tiles import Sliceable, Triple, padded_tiles, read_window
from voxelbridge.core.train.steps import autocast
from voxelbridge.detect.boxes import flip_boxes
from voxelbridge.detect.config import DetectConfig, PostProcessing
from voxelbridge.detect.detections import Detections
from voxelbridge.detect.nms import best_rows
from voxelbridge.detect.postprocess import (
    best_candidates,
    merge_models,
    merge_tiles,
    suppress_candidates,
    tile_center_weights,
)
from voxelbridge.detect.retina_unet import RetinaUNet

OVERLAP = 0.5  # of neighbouring windows, in each axis
WINDOWS_PER_PASS = 4  # nnDetection
PATCH_MIN_SIDE = 0.01  # voxels; nnDetection. `min_size` acts when proposals are merged: it is swept

Axes = tuple[int, ...]


class Proposer(Protocol):
    """A detector, as far as prediction is concerned."""

    def candidates(self, patches: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Per patch boxes (A, 6) in voxel edges and class probabilities (A, K)."""
        ...


@dataclass(frozen=True, eq=False)
class Proposals:
    """What one (model, mirroring) pair found in all windows of a case, not yet merged.

    Boxes in voxels of the stored grid (not clipped to it), best first, on the CPU; weights (N,) say
    how far each box is to be trusted by its place in its window.
    """

    detections: Detections
    weights: Tensor

    @classmethod
    def join(cls, parts: Sequence[Self], *, top_k: int) -> Self:
        """The `top_k` best of several, ties in their order; of none, no box."""
        together = Detections(
            boxes=torch.cat([torch.zeros(0, 6), *(part.detections.boxes for part in parts)]),
            scores=torch.cat([torch.zeros(0), *(part.detections.scores for part in parts)]),
            labels=torch.cat(
                [torch.zeros(0, dtype=torch.int64), *(part.detections.labels for part in parts)]
            ),
        )
        best = best_rows(together.scores, top_k)
        weights = torch.cat([torch.zeros(0), *(part.weights for part in parts)])
        return cls(together.select(best), weights[best])


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
    """Boxes of each patch (B, C, D, H, W) in its voxel edges, best first, on the CPU.

    Raises DataError where the network's output is not finite.
    """
    top_k, (depth, height, width) = post.candidates_per_patch, patches.shape[2:]
    match detector:
        case RetinaUNet():
            best = detector.best_candidates(patches, top_k=top_k)
        case _:
            found = detector.candidates(patches)
            best = [best_candidates(*candidates, top_k=top_k) for candidates in found]
    return [
        suppress_candidates(
            boxes,
            scores,
            labels,
            shape=(depth, height, width),
            score_threshold=post.min_score,
            min_side=PATCH_MIN_SIDE,
            nms_iou=post.patch_iou,
            max_detections=post.boxes_per_patch,
        )
        for boxes, scores, labels in _to_cpu(best)
    ]


def propose(
    detector: Proposer,
    config: DetectConfig,
    image: Sliceable,
    *,
    device: torch.device,
    num_mirrorings: int = 1,
    overlap: float = OVERLAP,
    window_batch: int = WINDOWS_PER_PASS,
) -> list[Proposals]:
    """What `detector` finds in a normalised volume (C, D, H, W), per mirroring.

    Every window is read once; memory holds two passes' windows and the boxes kept. The post-
    processing's `model_top_k` best boxes of each mirroring stay.
    """
    size, post = config.patch_size, config.post_processing
    views = mirrorings(num_mirrorings)
    found: list[list[Proposals]] = [[] for _ in views]
    starts = list(padded_tiles(image.shape[1:], size, overlap=overlap))
    for group, windows in _window_batches(image, starts, size, count=window_batch):
        patches = torch.from_numpy(windows).to(device)
        for parts, axes in zip(found, views, strict=True):
            view = patches.flip([2 + axis for axis in axes]) if axes else patches
            with autocast(device, config.precision):
                detections = detect_in_patches(detector, view, post)
            parts += [
                _in_volume(own, start, size, axes)
                for own, start in zip(detections, group, strict=True)
            ]
            if sum(len(part.weights) for part in parts) > 16 * post.model_top_k:
                parts[:] = [Proposals.join(parts, top_k=post.model_top_k)]
    return [Proposals.join(parts, top_k=post.model_top_k) for parts in found]


def merge_proposals(
    proposals: Sequence[Proposals], shape: Sequence[int], post: PostProcessing
) -> Detections:
    """Boxes of a case of `shape` (D, H, W), best first: inside each pair, then across the pairs.

    Each of `proposals`, the pairs of models and mirrorings, counts as expected to see every object.
    """
    merged = [
        merge_tiles(
            pair.detections,
            pair.weights,
            shape=shape,
            top_k=post.model_top_k,
            score_threshold=post.model_min_score,
            min_side=post.min_size,
            nms_iou=post.model_iou,
            suppression=post.suppression,
            max_detections=post.boxes_per_case,
        )
        for pair in proposals
    ]
    result = merge_models(
        [found for found, _ in merged],
        [weights for _, weights in merged],
        top_k=post.ensemble_top_k,
        iou_threshold=post.ensemble_iou,
        score_threshold=post.ensemble_min_score,
    )
    return result.select(result.scores.sort(descending=True, stable=True).indices)


def predict_volume(
    detectors: Sequence[tuple[Proposer, DetectConfig]],
    image: Sliceable,
    *,
    device: torch.device,
    num_mirrorings: int = 1,
    overlap: float = OVERLAP,
    window_batch: int = WINDOWS_PER_PASS,
) -> Detections:
    """Boxes of a normalised volume (C, D, H, W), best first, in its voxel edges, on the CPU.

    Several detectors and mirrorings are one ensemble, merged by the first one's post-processing;
    patch sizes may differ. Time grows with windows x mirrorings x detectors; memory with the
    windows of two passes and the boxes found.
    """
    proposals = [
        pair
        for detector, config in detectors
        for pair in propose(
            detector,
            config,
            image,
            device=device,
            num_mirrorings=num_mirrorings,
            overlap=overlap,
            window_batch=window_batch,
        )
    ]
    return merge_proposals(proposals, image.shape[1:], detectors[0][1].post_processing)


def _window_batches(
    image: Sliceable, starts: Sequence[Triple], size: Triple, *, count: int
) -> Iterator[tuple[tuple[Triple, ...], NDArray[np.float32]]]:
    """Groups of starts with their windows (B, C, *size); the next group is read meanwhile."""

    def read(group: tuple[Triple, ...]) -> NDArray[np.float32]:
        windows = np.empty((len(group), image.shape[0], *size), dtype=np.float32)
        for window, start in zip(windows, group, strict=True):
            window[:] = read_window(image, start, size)
        return windows

    groups = [tuple(starts[first : first + count]) for first in range(0, len(starts), count)]
    with ThreadPoolExecutor(max_workers=1) as reader:
        ahead = reader.submit(read, groups[0])
        for group, following in zip(groups, [*groups[1:], None], strict=True):
            windows = ahead.result()
            if following is not None:
                ahead = reader.submit(read, following)
            yield group, windows


def _in_volume(found: Detections, start: Triple, size: Triple, axes: Axes) -> Proposals:
    """Boxes of a mirrored window in coordinates of the volume, with their trust."""
    boxes = flip_boxes(found.boxes, size, axes=axes)
    offset = torch.tensor((*start, *start), dtype=torch.float32)
    return Proposals(
        Detections(boxes=boxes + offset, scores=found.scores, labels=found.labels),
        tile_center_weights(boxes, size),
    )


def _to_cpu(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Candidates of several patches on the CPU, in one transfer."""
    together = torch.cat(
        [
            torch.cat([boxes, scores[:, None], labels[:, None].float()], 1)
            for boxes, scores, labels in parts
        ]
    ).cpu()
    if not together.sum().isfinite():
        raise DataError("the network's output is not finite; check the image and the run")
    rows = together.split([len(scores) for _, scores, _ in parts])
    return [(part[:, :6], part[:, 6], part[:, 7].long()) for part in rows]
