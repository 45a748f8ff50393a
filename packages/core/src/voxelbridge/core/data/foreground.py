"""What is inside a volume: box of non-zero voxels, objects and places of labels, intensities."""

import math
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

MIN_OBJECT_VOXELS = 10  # smaller components of a semantic map are specks of the annotation
FULL_CONNECTIVITY = np.ones((3, 3, 3), dtype=bool)  # 26 neighbours: touching at a corner is one
MIN_LOCATIONS = 10_000  # nnU-Net's numbers for its class locations, and its seed
LOCATION_FRACTION = 0.01
LOCATION_SEED = 1234
# Intensities kept over all cases: figures at the 0.5th percentile rest on thousands of them, and
# 100 000 cases stay below 50 MB.
TOTAL_SAMPLES = 2_000_000
MIN_SAMPLES, MAX_SAMPLES = 100, 20_000  # per case and channel
SLAB_VOXELS = 1 << 20  # looked at together: bounds the memory to some tens of MiB
MAX_DENSE_ID = 100_000  # above this, ids are renumbered first: find_objects allocates per id


def nonzero_box(image: NDArray[Any]) -> NDArray[np.int64]:
    """Tight box (6,) in voxel edges around voxels other than 0 in any channel of (C, D, H, W).

    An image of zeros gives the whole volume. Holes need no filling, as nnU-Net fills them: a hole
    never reaches beyond the voxels around it. Read from the outside in, so that an image without a
    border of zeros costs next to nothing.
    """
    found = [bounds for channel in image if (bounds := _bounds(channel)) is not None]
    if not found:
        return np.array([0, 0, 0, *image.shape[1:]])
    boxes = np.stack(found)
    return np.concatenate([boxes[:, :3].min(axis=0), boxes[:, 3:].max(axis=0)])


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


def class_locations(
    label_map: NDArray[Any],
    ids: Collection[int],
    *,
    at_least: int = MIN_LOCATIONS,
    fraction: float = LOCATION_FRACTION,
    seed: int = LOCATION_SEED,
) -> dict[int, NDArray[np.int32]]:
    """Voxels (N, 3) z, y, x of each label in `ids`, drawn evenly without repeats, in array order.

    N is nnU-Net's number: all voxels up to `at_least`, beyond it `at_least` or `fraction` of the
    voxels, whichever is more. A label without voxels has (0, 3). A label's voxels depend on the
    map and the seed alone, not on the other ids. Background is no location: 0 is refused.
    """
    wanted = np.array(sorted({int(label) for label in ids}), dtype=np.int64)
    if len(wanted) == 0:
        return {}
    if wanted[0] < 1:
        raise ValueError(f"locations are of labels above 0, got {wanted[0]}")
    flat = np.ascontiguousarray(label_map).reshape(-1)
    starts = range(0, flat.size, SLAB_VOXELS)
    counts = np.zeros((len(starts), len(wanted)), dtype=np.int64)  # slab by label
    for row, start in zip(counts, starts, strict=True):
        _, numbers = _class_numbers(flat[start : start + SLAB_VOXELS], wanted)
        row[:] = np.bincount(numbers, minlength=len(wanted) + 1)[1:]
    ranks = [
        _draw_ranks(int(total), at_least, fraction, np.random.default_rng([seed, int(label)]))
        for label, total in zip(wanted, counts.sum(axis=0), strict=True)
    ]  # of all voxels of a label in array order, which to take
    seen = np.cumsum(counts, axis=0) - counts
    taken: list[list[NDArray[np.int64]]] = [[] for _ in wanted]
    for number, start in enumerate(starts):
        if not counts[number].any():
            continue
        where, classes = _class_numbers(flat[start : start + SLAB_VOXELS], wanted)
        order = where[np.argsort(classes, kind="stable")] + start
        ends = len(order) - np.cumsum(counts[number][::-1])[::-1] + counts[number]
        for index in np.flatnonzero(counts[number]):
            first, count = seen[number, index], counts[number, index]
            low, high = np.searchsorted(ranks[index], [first, first + count])
            group = order[ends[index] - count : ends[index]]
            taken[index].append(group[ranks[index][low:high] - first])
    return {
        int(label): _positions(parts, label_map.shape)
        for label, parts in zip(wanted, taken, strict=True)
    }


def samples_per_case(num_cases: int) -> int:
    """Intensities to draw per case and channel: many of few cases, fewer of many."""
    return min(max(TOTAL_SAMPLES // max(num_cases, 1), MIN_SAMPLES), MAX_SAMPLES)


def foreground_samples(
    image: NDArray[Any], mask: NDArray[np.bool_], *, count: int, rng: np.random.Generator
) -> NDArray[np.float32]:
    """`count` intensities of (D, H, W) drawn with replacement where `mask` is True; or (0,)."""
    values = image[mask]
    if values.size == 0:
        return np.zeros(0, dtype=np.float32)
    return rng.choice(values, size=count, replace=True).astype(np.float32)


def _class_numbers(
    labels: NDArray[Any], wanted: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.unsignedinteger[Any]]]:
    # Where labels (n,) are not 0, and there 1 + the index into the ascending `wanted`, 0 for others
    where = np.flatnonzero(labels)
    values = labels[where]
    number_type = np.uint16 if len(wanted) < 2**16 - 1 else np.uint32  # 16 bits: sorted by counting
    if wanted[-1] > MAX_DENSE_ID:
        place = np.minimum(np.searchsorted(wanted, values), len(wanted) - 1)
        return where, np.where(wanted[place] == values, place + 1, 0).astype(number_type)
    last = int(wanted[-1]) + 1
    if values.dtype not in (np.uint8, np.uint16):
        values = np.clip(values.astype(np.int64), 0, last)
    table = np.zeros(max(last + 1, 2**16), dtype=number_type)
    table[wanted] = np.arange(1, len(wanted) + 1)
    return where, table[values]


def _draw_ranks(
    total: int, at_least: int, fraction: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    number = max(min(at_least, total), math.ceil(total * fraction))
    if number == total:
        return np.arange(total)
    return np.sort(rng.choice(total, number, replace=False, shuffle=False))


def _positions(parts: list[NDArray[np.int64]], shape: tuple[int, ...]) -> NDArray[np.int32]:
    if not parts:
        return np.zeros((0, 3), dtype=np.int32)
    return np.stack(np.unravel_index(np.concatenate(parts), shape), axis=1).astype(np.int32)


def _bounds(array: NDArray[Any]) -> NDArray[np.int64] | None:
    # (6,) around the voxels other than 0 (NaN is one) of (D, H, W), or None
    box = [0, 0, 0, *array.shape]
    for axis in range(3):  # each axis within what the earlier ones left: the slow x last
        inside = array[box[0] : box[3], box[1] : box[4], box[2] : box[5]]
        planes = np.moveaxis(inside, axis, 0)
        low = next((n for n, plane in enumerate(planes) if plane.any()), None)
        if low is None:
            return None
        box[axis + 3] = next(n for n in range(len(planes), 0, -1) if planes[n - 1].any())
        box[axis] = low
    return np.array(box, dtype=np.int64)


def _slices(bounds: NDArray[np.int64]) -> tuple[slice, slice, slice]:
    z, y, x = (slice(int(bounds[a]), int(bounds[a + 3])) for a in range(3))
    return z, y, x
