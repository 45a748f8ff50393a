"""Which anchors learn which object: ATSS (arXiv 1912.02424, section 3.2) on anchor locations.

All anchors of a location share one centre, so the nearest anchors of a level are the anchors of
the nearest locations. Only these candidates are ever compared with the objects: time and memory
grow with objects x candidates, not with objects x anchors.
Letters: N objects, K candidates of an object, A anchors per location.
"""

import math

import torch
from torch import Tensor

from voxelbridge.detect.anchors import AnchorGrid, AnchorLevel
from voxelbridge.detect.boxes import box_centers, paired_iou, points_in_boxes

BACKGROUND = -1
CENTER_MARGIN = 0.01  # voxels a centre must lie inside an object to count as inside
_CHUNK = 1024  # objects compared at once: bounds memory at about 20 MB for 4 levels of 27 anchors


@torch.no_grad()
def match_atss(
    boxes: Tensor, grid: AnchorGrid, *, candidates: int = 4, center_in_box: bool = False
) -> Tensor:
    """The row of the object each anchor is to learn, or BACKGROUND; (N, 6) -> (anchors,) int64.

    Per object and level the `candidates` nearest locations (Euclidean distance of the centres; on
    equal distance the location that comes first in C order) give all their anchors as candidates.
    An object takes its candidates whose IoU reaches mean + unbiased standard deviation over the
    candidates of all levels; there is no forced match. So an object that overlaps none of its
    candidates takes all of them (the threshold is 0), and one with a single candidate takes none.
    With `center_in_box` the anchor's centre must also lie inside the object. An anchor that several
    objects take goes to the one of highest IoU, on equal IoU to the one of the lowest row.
    """
    claims = [
        _claims(part, first, grid, candidates, center_in_box)
        for first, part in zip(
            range(0, len(boxes), _CHUNK), boxes.float().split(_CHUNK), strict=False
        )
    ]
    matched = torch.full((grid.num_anchors,), BACKGROUND, dtype=torch.int64, device=boxes.device)
    if not claims:
        return matched
    anchor, iou, row = (torch.cat(parts) for parts in zip(*claims, strict=True))
    best = iou.new_full(matched.shape, -1.0).scatter_reduce_(0, anchor, iou, "amax")
    won = iou == best[anchor]
    last = torch.full_like(matched, len(boxes))
    first_row = last.scatter_reduce(0, anchor[won], row[won], "amin")
    return torch.where(first_row < len(boxes), first_row, matched)


def nearest_locations(points: Tensor, level: AnchorLevel, *, count: int) -> Tensor:
    """C-order indices of the `count` locations nearest to each point; (N, 3) -> (N, k), near first.

    k = min(count, locations of the level). Of equally near locations the first in C order comes
    first. Only the `count` nearest cells of each axis can be among them, so that a point is
    compared with at most count^3 locations.
    """
    squares, index = [], []
    for axis, centers in enumerate(level.centers):
        # float64: voxel edges and cell centres are short binary numbers, so ties stay exact.
        distance = (points[:, axis, None].double() - centers.double()) ** 2  # (N, cells)
        order = distance.sort(dim=1, stable=True).indices[:, :count].sort(dim=1).values
        index.append(order)
        squares.append(distance.gather(1, order))
    z, y, x = squares
    distance = (z[:, :, None, None] + y[:, None, :, None] + x[:, None, None, :]).flatten(1)
    rows, columns = len(level.centers[1]), len(level.centers[2])
    location = (
        (index[0][:, :, None, None] * rows + index[1][:, None, :, None]) * columns
        + index[2][:, None, None, :]
    ).flatten(1)
    nearest = distance.sort(dim=1, stable=True).indices[:, :count]
    return location.gather(1, nearest)


def _claims(
    boxes: Tensor, first_row: int, grid: AnchorGrid, candidates: int, center_in_box: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Anchor index, IoU and object row of everything the objects of one chunk take."""
    index, anchors = _candidates(boxes, grid, candidates)  # (N, K), (N, K, 6)
    iou = paired_iou(anchors, boxes[:, None, :])
    threshold = iou.mean(dim=1, keepdim=True) + _unbiased_std(iou)
    taken = iou >= threshold
    if center_in_box:
        taken &= points_in_boxes(box_centers(anchors), boxes[:, None, :], margin=CENTER_MARGIN)
    row, column = taken.nonzero(as_tuple=True)
    return index[row, column], iou[row, column], row + first_row


def _candidates(boxes: Tensor, grid: AnchorGrid, count: int) -> tuple[Tensor, Tensor]:
    centers = box_centers(boxes)
    index, anchors, offset = [], [], 0
    for level in grid.levels:
        near = nearest_locations(centers, level, count=count)  # (N, k)
        per_location = level.anchors_per_location
        within = torch.arange(per_location, device=boxes.device)
        index.append((near[:, :, None] * per_location + within).flatten(1) + offset)
        at = _location_centers(near, level)[:, :, None, :]  # (N, k, 1, 3)
        half = level.sizes / 2
        anchors.append(torch.cat([at - half, at + half], dim=-1).flatten(1, 2))
        offset += level.num_anchors
    return torch.cat(index, dim=1), torch.cat(anchors, dim=1)


def _location_centers(locations: Tensor, level: AnchorLevel) -> Tensor:
    z, y, x = level.centers
    plane = len(y) * len(x)
    parts = (
        z[locations // plane],
        y[locations % plane // len(x)],
        x[locations % len(x)],
    )
    return torch.stack(parts, dim=-1)


def _unbiased_std(iou: Tensor) -> Tensor:
    if iou.shape[1] == 1:  # undefined; torch would warn on its way to the same NaN
        return torch.full_like(iou, math.nan)
    return iou.std(dim=1, keepdim=True)
