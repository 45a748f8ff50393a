"""How well one mask meets another: Dice and distances of their surfaces in millimetres."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, find_objects
from scipy.spatial import KDTree

Box = tuple[slice, slice, slice]

PERCENTILE = 95.0


@dataclass(frozen=True)
class MaskScores:
    """None: not defined. Both masks empty: all three; one empty: Dice 0, no distance."""

    reference_voxels: int
    predicted_voxels: int
    dice: float | None
    assd_mm: float | None  # average symmetric surface distance
    hd95_mm: float | None  # 95th percentile Hausdorff distance


def compare_masks(
    reference: NDArray[np.bool_], predicted: NDArray[np.bool_], spacing_mm: Sequence[float]
) -> MaskScores:
    """Scores of two masks (D, H, W) on one grid with spacing (z, y, x).

    A surface is the set of voxels with a face neighbour outside the mask (or outside the image); a
    distance is that of voxel centres. `assd_mm` is the mean over the voxels of both surfaces of the
    distance to the other; `hd95_mm` the larger of the two directions' 95th percentiles.
    """
    overlap = int(np.count_nonzero(reference & predicted))
    volumes = int(np.count_nonzero(reference)), int(np.count_nonzero(predicted))
    if volumes == (0, 0):
        return MaskScores(0, 0, None, None, None)
    dice = 2 * overlap / sum(volumes)
    if 0 in volumes:
        return MaskScores(*volumes, dice, None, None)
    first, second = (_surface_mm(mask, spacing_mm) for mask in (reference, predicted))
    there, back = KDTree(second).query(first)[0], KDTree(first).query(second)[0]
    assd = float((there.sum() + back.sum()) / (len(there) + len(back)))
    hd95 = float(max(np.percentile(there, PERCENTILE), np.percentile(back, PERCENTILE)))
    return MaskScores(*volumes, dice, assd, hd95)


def compare_labels(
    reference: NDArray[np.integer[Any]],
    predicted: NDArray[np.integer[Any]],
    targets: Sequence[Sequence[int]],
    spacing_mm: Sequence[float],
    *,
    uncounted: Sequence[int] = (),
) -> list[MaskScores]:
    """Scores of every target (its label ids) of two label maps (D, H, W).

    Voxels whose reference is in `uncounted` or below 0 are left out of both maps.
    """
    counted = (reference >= 0) & ~np.isin(reference, list(uncounted))
    maps = [np.where(counted, labels, 0).clip(min=0) for labels in (reference, predicted)]
    boxes = [find_objects(labels) for labels in maps]
    scores = []
    for ids in targets:
        found = [of_map[n - 1] for of_map in boxes for n in ids if n <= len(of_map)]
        box = _around([one for one in found if one is not None])
        masks = [np.isin(labels[box], list(ids)) for labels in maps]
        scores.append(compare_masks(masks[0], masks[1], spacing_mm))
    return scores


def _surface_mm(mask: NDArray[np.bool_], spacing_mm: Sequence[float]) -> NDArray[np.float64]:
    """(N, 3) centres of the surface voxels in millimetres along the array axes."""
    surface = mask & ~binary_erosion(mask)  # what lies outside the array counts as outside
    return np.argwhere(surface) * np.asarray(spacing_mm, dtype=np.float64)


def _around(boxes: Sequence[Box]) -> Box:
    """The box of all `boxes`; empty where there is none."""
    if not boxes:
        return slice(0, 0), slice(0, 0), slice(0, 0)
    z, y, x = (
        slice(min(b[axis].start for b in boxes), max(b[axis].stop for b in boxes))
        for axis in range(3)
    )
    return z, y, x
