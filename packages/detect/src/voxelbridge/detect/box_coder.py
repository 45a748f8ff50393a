"""Boxes as differences to anchors, the form a network regresses, and back.

A delta is (dz, dy, dx, sz, sy, sx): the shift of the centre in units of the anchor's size and the
logarithm of the size ratio, all without further weights (arXiv 1506.01497, section 3.1.2).
"""

import math

import torch
from torch import Tensor

from voxelbridge.detect.boxes import at_least_float32, box_centers, box_sizes

MAX_LOG_RATIO = math.log(1000 / 16)  # a wild size prediction early in training must not overflow


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Deltas that turn `anchors` into `boxes`; (N, 6), (N, 6) -> (N, 6). Sides must exceed 0."""
    sizes = box_sizes(anchors)
    shift = (box_centers(boxes) - box_centers(anchors)) / sizes
    return torch.cat([shift, torch.log(box_sizes(boxes) / sizes)], dim=-1)


def decode(deltas: Tensor, anchors: Tensor) -> Tensor:
    """Boxes that `deltas` make of `anchors`; (N, 6), (N, 6) -> (N, 6).

    A size grows at most by exp(MAX_LOG_RATIO); it may shrink without limit.
    """
    deltas = at_least_float32(deltas)
    sizes = box_sizes(anchors)
    centers = box_centers(anchors) + deltas[..., :3] * sizes
    half = torch.exp(deltas[..., 3:].clamp(max=MAX_LOG_RATIO)) * sizes / 2
    return torch.cat([centers - half, centers + half], dim=-1)
