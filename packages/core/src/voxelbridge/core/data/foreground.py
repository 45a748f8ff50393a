"""What is inside a volume: the box of non-zero voxels, objects of label maps, intensities."""

from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

MIN_OBJECT_VOXELS = 10  # smaller components of a semantic map are specks of the annotation
FULL_CONNECTIVITY = np.ones((3, 3, 3), dtype=bool)  # 26 neighbours: touching at a corner is one
MAX_DENSE_ID = 100_000  # above this, ids are renumbered first: find_objects allocates per id


def nonzero_box(image: NDArray[Any]) -> NDArray[np.int64]:
    """Tight box (6,) in voxel edges around voxels other than 0 in any channel of (C, D, H, W).

    An image of zeros gives the whole volume.
    """
    bounds = _bounds(np.any(image != 0, axis=0, keepdims=True)[0])
    return np.array([0, 0, 0, *image.shape[1:]]) if bounds is None else bounds


def instances_from_semantic(
    label_map: NDArray[Any],
    ids: Collection[int],
    *,
    min_voxels: int = MIN_OBJECT_VOXELS,
) -> tuple[NDArray[np.int32], int]:
    """Objects of a semantic map: 26-connected components of the union of `ids`, numbered from 1.

    Returns the instance map (D, H, W) and how many components were left out because they have
    fewer than `min_voxels` voxels. Numbers follow the first voxel in array order.
    """
    mask = np.isin(label_map, list(ids))
    instances = np.zeros(mask.shape, dtype=np.int32)
    bounds = _bounds(mask)
    if bounds is None:
        return instances, 0
    inside = _slices(bounds)  # labelling only the box of the objects is most of the speed
    components = np.empty(mask[inside].shape, dtype=np.int32)
    ndimage.label(mask[inside], structure=FULL_CONNECTIVITY, output=components)
    count = int(components.max())
    sizes = np.bincount(components.ravel(), minlength=count + 1)
    kept = sizes >= min_voxels
    kept[0] = False
    numbers = np.where(kept, np.cumsum(kept), 0).astype(np.int32)
    instances[inside] = numbers[components]
    return instances, count - int(kept.sum())


def boxes_from_instances(
    instance_map: NDArray[Any],
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Ids (N,) above 0 in ascending order and their tight boxes (N, 6) in voxel edges.

    Parts of one id that do not touch are one object, boxed by their largest extent.
    """
    bounds = _bounds(instance_map > 0)
    if bounds is None:
        return np.zeros(0, dtype=np.int64), np.zeros((0, 6), dtype=np.float32)
    inside = np.maximum(instance_map[_slices(bounds)], 0)  # negative values mark "ignore"
    if inside.max() > MAX_DENSE_ID:
        ids, dense = np.unique(inside, return_inverse=True)
        found = ndimage.find_objects(dense.reshape(inside.shape) + int(ids[0] != 0))
        ids = ids[ids > 0].astype(np.int64)
        spans = [found[n] for n in range(len(found) - len(ids), len(found))]
    else:
        found = ndimage.find_objects(inside.astype(np.int32, copy=False))
        ids = np.array([n + 1 for n, span in enumerate(found) if span is not None], dtype=np.int64)
        spans = [span for span in found if span is not None]
    edges = [[*(part.start for part in span), *(part.stop for part in span)] for span in spans]
    return ids, (np.array(edges) + np.tile(bounds[:3], 2)).astype(np.float32)


def foreground_samples(
    image: NDArray[Any], mask: NDArray[np.bool_], *, count: int, rng: np.random.Generator
) -> NDArray[np.float32]:
    """`count` intensities of (D, H, W) drawn with replacement where `mask` is True; or (0,)."""
    values = image[mask]
    if values.size == 0:
        return np.zeros(0, dtype=np.float32)
    return rng.choice(values, size=count, replace=True).astype(np.float32)


def _bounds(mask: NDArray[np.bool_]) -> NDArray[np.int64] | None:
    low, high = [], []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        used = np.flatnonzero(mask.any(axis=others))
        if used.size == 0:
            return None
        low.append(int(used[0]))
        high.append(int(used[-1]) + 1)
    return np.array([*low, *high], dtype=np.int64)


def _slices(bounds: NDArray[np.int64]) -> tuple[slice, slice, slice]:
    z, y, x = (slice(int(bounds[a]), int(bounds[a + 3])) for a in range(3))
    return z, y, x
