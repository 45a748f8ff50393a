"""Which predicted instances of a scan find which fractures, by RibFrac's overlap of components.

Letters: P predicted instances, numbered from 1.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

MIN_IOU = 0.2  # exclusive


@dataclass(frozen=True, eq=False)
class ScanMatch:
    """iou (P,): the best overlap of instance 1, 2, ...; fracture (P,): whose, 0 of none.

    num_fractures and P are the largest numbers in the maps.
    """

    num_fractures: int
    iou: NDArray[np.float64]
    fracture: NDArray[np.int64]


def match_scan(truth: NDArray[Any], prediction: NDArray[Any]) -> ScanMatch:
    """Instance maps (X, Y, Z) of whole numbers from 0, in the order of axes of the files.

    Each component of the overlap of both foregrounds is one meeting of the two instances at its
    first voxel; its overlap is its size over the size of the component of the union around it. Of
    several meetings of one pair the last counts, and of equal overlaps the lower fracture number.
    """
    num_predicted = int(prediction.max(initial=0))
    iou = np.zeros(num_predicted)
    fracture = np.zeros(num_predicted, dtype=np.int64)
    meetings = _meetings(truth, prediction) if num_predicted else {}
    for (instance, number), overlap in sorted(meetings.items()):
        if overlap > iou[instance - 1]:
            iou[instance - 1], fracture[instance - 1] = overlap, number
    return ScanMatch(int(truth.max(initial=0)), iou, fracture)


def _meetings(truth: NDArray[Any], prediction: NDArray[Any]) -> dict[tuple[int, int], float]:
    """(instance, fracture): overlap."""
    either = (truth > 0) | (prediction > 0)
    box = ndimage.find_objects(either.astype(np.uint8))[0]
    truth, prediction = truth[box], prediction[box]
    touching = np.ones((3, 3, 3), dtype=bool)
    union = np.zeros(truth.shape, dtype=np.int32)
    overlap = np.zeros_like(union)
    ndimage.label(either[box], structure=touching, output=union)
    ndimage.label((truth > 0) & (prediction > 0), structure=touching, output=overlap)
    sizes = np.bincount(union.ravel())
    voxels = np.flatnonzero(overlap)
    _, first, counts = np.unique(overlap.ravel()[voxels], return_index=True, return_counts=True)
    found: dict[tuple[int, int], float] = {}
    for start in np.argsort(first):  # the order in which the program meets the components
        at = np.unravel_index(voxels[first[start]], overlap.shape)
        pair = (int(prediction[at]), int(truth[at]))
        found[pair] = float(counts[start] / sizes[union[at]])
    return found
