"""Geometry of axis-aligned 3D boxes: volumes, overlaps, clipping, mirroring.

Boxes are (N, 6) = (z0, y0, x0, z1, y1, x1) in voxel edges, half-open: an object in the voxels 3..5
of an axis is (3, 6), its size is 3, and mirroring an image of length S maps an edge x to S - x.
Half-precision input is computed in float32 (also under autocast), float64 stays float64.
Letters: N, M boxes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def box_centers(boxes: Tensor) -> Tensor:
    """Centres of boxes; (N, 6) -> (N, 3), z y x."""
    boxes = at_least_float32(boxes)
    return (boxes[..., :3] + boxes[..., 3:]) / 2


def box_sizes(boxes: Tensor) -> Tensor:
    """Side lengths of boxes; (N, 6) -> (N, 3), z y x."""
    boxes = at_least_float32(boxes)
    return boxes[..., 3:] - boxes[..., :3]


def centre_size_to_edges(boxes: Tensor) -> Tensor:
    """(..., 6) as centre and size, z y x each -> edges."""
    centre, half = boxes[..., :3], boxes[..., 3:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def edges_to_centre_size(boxes: Tensor) -> Tensor:
    """(..., 6) as edges -> centre and size, z y x each."""
    low, high = boxes[..., :3], boxes[..., 3:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def box_volume(boxes: Tensor) -> Tensor:
    """Volumes of boxes; (N, 6) -> (N,)."""
    return _product(box_sizes(boxes))


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Pairwise IoU; (N, 6), (M, 6) -> (N, M). Two boxes of volume 0 give NaN, so they never match.

    Empty inputs give an empty matrix.
    """
    return paired_iou(a[:, None, :], b[None, :, :])


def box_giou(a: Tensor, b: Tensor, *, eps: float = 0.0) -> Tensor:
    """Pairwise generalised IoU (arXiv 1902.09630); (N, 6), (M, 6) -> (N, M), in (-1, 1].

    `eps` is added to the volume of the enclosing box only.
    """
    return paired_giou(a[:, None, :], b[None, :, :], eps=eps)


def paired_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of boxes that correspond; (..., 6), (..., 6) broadcast together -> (...)."""
    intersection, union = _intersection_and_union(at_least_float32(a), at_least_float32(b))
    return intersection / union


def paired_giou(a: Tensor, b: Tensor, *, eps: float = 0.0) -> Tensor:
    """Generalised IoU of boxes that correspond; (..., 6), (..., 6) broadcast together -> (...)."""
    a, b = at_least_float32(a), at_least_float32(b)
    intersection, union = _intersection_and_union(a, b)
    low = torch.minimum(a[..., :3], b[..., :3])
    high = torch.maximum(a[..., 3:], b[..., 3:])
    enclosing = _product(high - low) + eps
    return intersection / union - (enclosing - union) / enclosing


def clip_boxes(boxes: Tensor, shape: Sequence[int]) -> Tensor:
    """Boxes cut to an image of `shape` (z, y, x); a box outside becomes flat at the border."""
    limit = boxes.new_tensor([*shape, *shape])
    return torch.minimum(boxes.clamp(min=0), limit)


def flip_boxes(boxes: Tensor, shape: Sequence[int], *, axes: Sequence[int]) -> Tensor:
    """Boxes in an image of `shape` mirrored along `axes` (0 z, 1 y, 2 x)."""
    flipped = boxes.clone()
    for axis in axes:
        flipped[:, axis] = shape[axis] - boxes[:, axis + 3]
        flipped[:, axis + 3] = shape[axis] - boxes[:, axis]
    return flipped


def permute_box_axes(boxes: Tensor, axes: Sequence[int]) -> Tensor:
    """Boxes in a transposed image: axis k of the result is axis `axes[k]` of the input."""
    return boxes[:, [*axes, *(axis + 3 for axis in axes)]]


def has_min_side(boxes: Tensor, min_side: float) -> Tensor:
    """Whether every side is at least `min_side` voxels; (N, 6) -> (N,) bool."""
    return (box_sizes(boxes) >= min_side).all(dim=-1)


def points_in_boxes(points: Tensor, boxes: Tensor, *, margin: float = 0.0) -> Tensor:
    """Whether points lie deeper than `margin` inside boxes; (..., 3), (..., 6) -> (...) bool."""
    depth = torch.minimum(points - boxes[..., :3], boxes[..., 3:] - points)
    return depth.amin(dim=-1) > margin


def at_least_float32(values: Tensor) -> Tensor:
    """The tensor itself, or as float32 where it is half precision or integer."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _intersection_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    # Axis by axis on contiguous coordinates: far faster than a last dimension of length 3.
    a_z0, a_y0, a_x0, a_z1, a_y1, a_x1 = _coordinates(a)
    b_z0, b_y0, b_x0, b_z1, b_y1, b_x1 = _coordinates(b)
    z = (torch.minimum(a_z1, b_z1) - torch.maximum(a_z0, b_z0)).clamp(min=0)
    y = (torch.minimum(a_y1, b_y1) - torch.maximum(a_y0, b_y0)).clamp(min=0)
    x = (torch.minimum(a_x1, b_x1) - torch.maximum(a_x0, b_x0)).clamp(min=0)
    intersection = z * y * x
    return intersection, box_volume(a) + box_volume(b) - intersection


def _coordinates(boxes: Tensor) -> tuple[Tensor, ...]:
    return boxes.movedim(-1, 0).contiguous().unbind(0)


def _product(sizes: Tensor) -> Tensor:
    # Written out because torch.prod has a slow gradient (it divides by each factor).
    return sizes[..., 0] * sizes[..., 1] * sizes[..., 2]
