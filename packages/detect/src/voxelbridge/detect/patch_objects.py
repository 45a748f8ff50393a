"""Which objects a patch holds, and their boxes: exact ones moved along, others by their voxels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from voxelbridge.core.data.augment import SpatialParams
from voxelbridge.core.data.patches import boxes_in_patch

MIN_VISIBLE_VOXELS = 1.0  # per axis: less of an object cannot be seen in a patch
CUT_TOLERANCE = 1e-3  # voxels outside the patch that do not make an object a cut one
Triple = tuple[int, int, int]


@dataclass(frozen=True)
class CaseObjects:
    """What sampling needs of one case: its shape and its objects, in voxels of the stored grid."""

    shape: Triple
    boxes: NDArray[np.float32]  # (N, 6)
    labels: NDArray[np.int64]  # (N,)
    has_instances: bool


@dataclass(frozen=True, eq=False)
class PatchObjects:
    """The objects of a case in one patch, before anybody has looked at the patch's voxels.

    Row n of the case has the number n + 1 in the instance map.
    """

    boxes: NDArray[np.float32]  # (M, 6) voxel edges of the patch, cut by it: these are final
    rows: NDArray[np.int64]  # (M,) of the case
    uncertain: NDArray[np.int64]  # (K,) rows to be boxed by the voxels that the patch has of them
    labels: NDArray[np.int64]  # (N,) of all rows of the case

    def boxed(
        self, ids: NDArray[np.int64], tight: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Boxes and labels of all objects of the patch, in the order of the case's rows.

        `ids` (I,) ascending are the numbers in the patch's instance map, `tight` (I, 6) their
        boxes; an uncertain object without a number there is not in the patch.
        """
        found = np.isin(ids - 1, self.uncertain)
        rows = np.concatenate([self.rows, ids[found] - 1])
        order = np.argsort(rows)
        return np.concatenate([self.boxes, tight[found]])[order], self.labels[rows[order]]


def objects_in_patch(
    case: CaseObjects, whole: NDArray[np.float64], params: SpatialParams
) -> PatchObjects:
    """The objects of `case` in a patch; `whole` (N, 6) are their boxes there, not yet cut by it.

    Where the case has voxel labels, rotated objects and those that the patch cuts are uncertain.
    Of rotated ones that are all: a box may have missed the corner of its object.
    """
    if not case.has_instances:
        boxes, rows = crop_boxes(whole, (0, 0, 0), params.patch_size)
        return PatchObjects(boxes, rows, rows[:0], case.labels)
    boxes, rows = boxes_in_patch(whole, (0, 0, 0), params.patch_size)
    if not params.axis_aligned:
        return PatchObjects(boxes[:0], rows[:0], np.arange(len(whole)), case.labels)
    size = np.asarray(params.patch_size, dtype=np.float64)
    outside = np.concatenate([-whole[rows, :3], whole[rows, 3:] - size], axis=1)
    cut = (outside > CUT_TOLERANCE).any(axis=1)
    return PatchObjects(boxes[~cut], rows[~cut], rows[cut], case.labels)


def crop_boxes(
    boxes: ArrayLike, start: Sequence[int], size: Sequence[int]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Visible parts (M, 6) of boxes (N, 6) in a patch, in its voxel edges, and their rows (M,).

    Slices thinner than a voxel (and than the object itself) are left out: nobody can see them.
    """
    visible, rows = boxes_in_patch(boxes, start, size)
    edges = np.asarray(boxes, dtype=np.float64).reshape(-1, 6)
    whole = edges[rows, 3:] - edges[rows, :3]
    seen = visible[:, 3:] - visible[:, :3] >= np.minimum(MIN_VISIBLE_VOXELS, whole) - 1e-4
    kept = np.flatnonzero(seen.all(axis=1))
    return visible[kept], rows[kept]
