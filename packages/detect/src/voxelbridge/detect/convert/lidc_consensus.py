"""From the outlines of up to four readers to one mask per nodule.

Readings are grouped into nodules because every reader numbers nodules alone; a voxel belongs to a
nodule when at least half of the four readers include it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, assert_never

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

from voxelbridge.detect.convert.lidc_readings import Contour, Reading

NUM_READERS = 4
THRESHOLD = 0.5  # share of the four readers
MALIGNANT = 3.0  # mean score from which a nodule is malignant

MalignancyRule = Literal["nndetection", "mean-of-readers"]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class VoxelMask:
    """A mask (d, h, w) that lies at voxel `start` (z, y, x) of a larger volume."""

    start: IntArray
    array: NDArray[np.bool_]

    @property
    def stop(self) -> IntArray:
        return self.start + self.array.shape


def reading_masks(reading: Reading, slices: Sequence[int]) -> tuple[VoxelMask, VoxelMask]:
    """The nodule of a reading and all that the reader touched; `slices`: index of each contour.

    The nodule leaves out the outlines, which lie outside it, and the holes (inclusion FALSE). What
    was touched keeps both outlines and holes: it tells whether two readings mean the same thing.
    """
    points = np.concatenate([contour.points for contour in reading.contours])
    x0, y0 = points.min(axis=0)
    x1, y1 = points.max(axis=0) + 1
    z0, z1 = min(slices), max(slices) + 1
    start = np.array([z0, y0, x0], dtype=np.int64)
    nodule = np.zeros((z1 - z0, y1 - y0, x1 - x0), dtype=bool)
    touched, holes = nodule.copy(), nodule.copy()
    for contour, index in zip(reading.contours, slices, strict=True):
        inside, outline = fill_contour(contour, (y0, x0), nodule.shape[1:])
        if contour.inclusion:
            nodule[index - z0] |= inside
            touched[index - z0] |= inside | outline
        else:
            holes[index - z0] |= inside
    return VoxelMask(start, nodule & ~holes), VoxelMask(start, touched)


def fill_contour(
    contour: Contour, start: tuple[int, int], shape: tuple[int, ...]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Pixels strictly inside a closed outline, and pixels on it: two (h, w) from row, column start.

    Even-odd rule on pixel centres; a centre on a line between two points is on the outline.
    """
    corners = contour.points[:, ::-1] - np.asarray(start)  # (P, 2) row, column
    steps = np.roll(corners, -1, axis=0) - corners
    (y0, x0), (dy, dx) = corners.T, steps.T  # (P,)
    # Where each edge passes a row: pixels before that column have it on their right.
    rows = np.arange(shape[0])[:, None]
    row, edge = np.nonzero((y0 <= rows) != (y0 + dy <= rows))
    across = x0[edge] * abs(dy[edge]) + dx[edge] * (row - y0[edge]) * np.sign(dy[edge])
    column = np.clip(-(-across // abs(dy[edge])), 0, shape[1])  # rounded up, in whole numbers
    passed = np.zeros((shape[0], shape[1] + 1), dtype=np.int64)
    np.add.at(passed, (row, column), 1)
    inside = np.cumsum(passed[:, :0:-1], axis=1)[:, ::-1] % 2 == 1
    # The pixel centres on an edge divide it into as many parts as its steps have in common.
    parts = np.maximum(np.gcd(dy, dx), 1)
    which = np.repeat(np.arange(len(parts)), parts)
    nth = np.arange(len(which)) - np.repeat(np.cumsum(parts) - parts, parts)
    outline = np.zeros(shape, dtype=bool)
    outline[
        y0[which] + nth * dy[which] // parts[which], x0[which] + nth * dx[which] // parts[which]
    ] = True
    return inside & ~outline, outline


def group_readings(
    readings: Sequence[Reading],
    masks: Sequence[VoxelMask],
    *,
    spacing_mm: Sequence[float],
    tolerance_mm: float,
) -> list[list[int]]:
    """Indices of the readings of each nodule; `masks` hold what each reader touched.

    Readings that overlap or lie within `tolerance_mm` are linked. Links are taken from the largest
    overlap (Dice) to the largest distance; one is passed over when the nodule would then hold two
    readings of one reader or more than four. A reader who splits a lesion thus leaves one part
    alone.
    """
    links = _links(masks, np.asarray(spacing_mm, dtype=float), tolerance_mm)
    groups = [[index] for index in range(len(readings))]
    group_of = list(range(len(readings)))
    for a, b in links:
        first, second = sorted((group_of[a], group_of[b]))
        together = groups[first] + groups[second]
        if first == second or not _may_be_one(readings, together):
            continue
        groups[first], groups[second] = together, []
        for index in together:
            group_of[index] = first
    return [sorted(group) for group in groups if group]


def consensus(masks: Sequence[VoxelMask]) -> VoxelMask | None:
    """Voxels that at least half of the four readers include; None when there are none.

    Readers without a reading of the nodule count as empty masks.
    """
    start = np.min([mask.start for mask in masks], axis=0)
    stop = np.max([mask.stop for mask in masks], axis=0)
    votes = np.zeros(stop - start, dtype=np.int8)
    for mask in masks:
        votes[_inside(mask, start)] += mask.array
    kept = votes >= THRESHOLD * NUM_READERS
    return VoxelMask(start, kept) if kept.any() else None


def is_malignant(scores: Sequence[int | None], rule: MalignancyRule) -> bool:
    """Whether the mean of the readers' scores (1 to 5) reaches 3.

    "nndetection" divides by four whoever did not outline the nodule: its quirk, and the published
    classes. "mean-of-readers" divides by the readers who gave a score.
    """
    given = [score for score in scores if score is not None]
    match rule:
        case "nndetection":
            return sum(given) / NUM_READERS >= MALIGNANT
        case "mean-of-readers":
            return bool(given) and sum(given) / len(given) >= MALIGNANT
        case _:
            assert_never(rule)


def _links(
    masks: Sequence[VoxelMask], spacing: NDArray[np.float64], tolerance_mm: float
) -> list[tuple[int, int]]:
    found: list[tuple[float, float, int, int]] = []
    for a, first in enumerate(masks):
        for b in range(a + 1, len(masks)):
            second = masks[b]
            gap = np.maximum(first.start - second.stop, second.start - first.stop) + 1
            if (np.maximum(gap, 0) * spacing > tolerance_mm).any():
                continue
            dice = _dice(first, second)
            distance = 0.0 if dice > 0 else _distance_mm(first, second, spacing)
            if distance <= tolerance_mm:
                found.append((-dice, distance, a, b))
    return [(a, b) for _, _, a, b in sorted(found)]


def _dice(first: VoxelMask, second: VoxelMask) -> float:
    start, stop = np.maximum(first.start, second.start), np.minimum(first.stop, second.stop)
    if (stop <= start).any():
        return 0.0
    shared = np.logical_and(_part(first, start, stop), _part(second, start, stop)).sum()
    return 2.0 * float(shared) / float(first.array.sum() + second.array.sum())


def _distance_mm(first: VoxelMask, second: VoxelMask, spacing: NDArray[np.float64]) -> float:
    points = [(np.argwhere(mask.array) + mask.start) * spacing for mask in (first, second)]
    if not all(len(listed) for listed in points):
        return np.inf
    return float(KDTree(points[0]).query(points[1])[0].min())


def _part(mask: VoxelMask, start: IntArray, stop: IntArray) -> NDArray[np.bool_]:
    return mask.array[
        tuple(slice(a, b) for a, b in zip(start - mask.start, stop - mask.start, strict=True))
    ]


def _inside(mask: VoxelMask, start: IntArray) -> tuple[slice, ...]:
    low = mask.start - start
    return tuple(slice(a, a + n) for a, n in zip(low, mask.array.shape, strict=True))


def _may_be_one(readings: Sequence[Reading], group: Sequence[int]) -> bool:
    if len(group) > NUM_READERS:
        return False
    known = [readings[index].reader for index in group if readings[index].reader is not None]
    return len(set(known)) == len(known)
