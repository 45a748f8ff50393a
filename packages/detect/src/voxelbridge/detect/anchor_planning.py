"""Anchor sizes that fit the objects of a data set.

nnDetection's objective (arXiv 2106.00817, section 3): the mean over objects of the best
intersection over union with any anchor, all boxes centred on one point; base sizes are searched as
whole numbers and doubled with the stride of each level. Search here is scipy's differential
evolution on the CPU.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Per level, one tuple of edge lengths (voxels) for each of the axes z, y, x.
AnchorSizes = tuple[tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]], ...]
Strides = Sequence[tuple[int, int, int]]

BASE_SIZES = (4, 8, 16)  # voxels at stride 4: nnDetection's start of the search
MAX_OBJECTS = 1000  # more change the mean by less than the search's own tolerance
GENERATIONS = 60
TYPICAL_PERCENTILES = (0.5, 99.5)  # nnDetection: sizes outside, on any axis, do not count


def default_anchor_sizes(strides: Strides, sizes_per_axis: int = 3) -> AnchorSizes:
    """Sizes without a data set: 4, 8, 16 voxels at stride 4, scaled with each level's stride."""
    sizes = BASE_SIZES[:sizes_per_axis]
    base = [tuple(size * stride / 4 for size in sizes) for stride in strides[0]]
    return _scaled(base, strides)


def plan_anchor_sizes(
    object_sizes: NDArray[np.float64], strides: Strides, *, sizes_per_axis: int = 3, seed: int = 0
) -> AnchorSizes:
    """The sizes of highest mean best overlap with `object_sizes` (N, 3), edge lengths in voxels.

    `strides` are voxels per cell of each head level, finest first. Outliers are left out. Cost
    grows with objects times anchors; beyond 1,000 objects a seeded sample is used. No object: the
    default sizes.
    """
    # Here and not above: scipy.optimize takes a second and 50 MB that preparing has no use for.
    from scipy.optimize import differential_evolution

    if len(object_sizes) == 0:
        return default_anchor_sizes(strides, sizes_per_axis)
    rng = np.random.default_rng(seed)
    sizes = typical_sizes(np.asarray(object_sizes, dtype=np.float64))
    if len(sizes) > MAX_OBJECTS:
        sizes = sizes[rng.choice(len(sizes), MAX_OBJECTS, replace=False)]
    largest = np.maximum(sizes.max(axis=0), 2.0)
    start = [size for axis in default_anchor_sizes(strides, sizes_per_axis)[0] for size in axis]
    bounds = [(1.0, max(float(np.ceil(largest[axis])), 2.0)) for axis in range(3)]
    per_parameter = [bounds[axis] for axis in range(3) for _ in range(sizes_per_axis)]

    def negative_overlaps(parameters: NDArray[np.float64]) -> NDArray[np.float64]:
        return -_mean_overlaps(sizes, parameters, strides, sizes_per_axis)

    clipped = [float(np.clip(v, *bound)) for v, bound in zip(start, per_parameter, strict=True)]
    result = differential_evolution(
        negative_overlaps,
        per_parameter,
        integrality=[True] * len(per_parameter),
        x0=np.round(clipped),
        popsize=6,
        maxiter=GENERATIONS,
        polish=False,
        vectorized=True,
        updating="deferred",
        rng=rng,
    )
    return _from_parameters(result.x, strides, sizes_per_axis)


def mean_best_overlap(object_sizes: NDArray[np.float64], anchor_sizes: AnchorSizes) -> float:
    """Mean over objects of the best IoU with any anchor, all centred on one point; in [0, 1]."""
    best = np.zeros(len(object_sizes))
    for level in anchor_sizes:
        z, y, x = (np.array([level[axis]], dtype=np.float64) for axis in range(3))
        best = np.maximum(best, _best_overlaps(object_sizes, z, y, x)[0])
    return float(best.mean())


def typical_sizes(sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """The rows of (N, 3) within the 0.5th to 99.5th percentile on every axis, ends included.

    Equal sizes and small numbers lose nothing: a percentile is always one of the sizes here.
    """
    low = np.percentile(sizes, TYPICAL_PERCENTILES[0], axis=0, method="lower")
    high = np.percentile(sizes, TYPICAL_PERCENTILES[1], axis=0, method="higher")
    inside = ((sizes >= low) & (sizes <= high)).all(axis=1)
    return sizes[inside] if inside.any() else sizes


def _best_overlaps(
    objects: NDArray[np.float64],
    z: NDArray[np.float64],
    y: NDArray[np.float64],
    x: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Best overlap of each of N objects with all combinations of sizes; (P, S) each -> (P, N)."""
    a, b, c = (
        np.minimum(objects[None, :, axis, None], sizes[:, None])
        for axis, sizes in enumerate((z, y, x))
    )  # what is shared on each axis: (P, N, S)
    shared = a[:, :, :, None, None] * b[:, :, None, :, None] * c[:, :, None, None, :]
    volumes = z[:, :, None, None] * y[:, None, :, None] * x[:, None, None, :]  # (P, S, S, S)
    union = objects.prod(axis=1)[None, :, None, None, None] + volumes[:, None] - shared
    return (shared / union).max(axis=(2, 3, 4))


def _mean_overlaps(
    objects: NDArray[np.float64],
    parameters: NDArray[np.float64],
    strides: Strides,
    sizes_per_axis: int,
) -> NDArray[np.float64]:
    """`mean_best_overlap` of P candidates at once; parameters (3 * S, P) -> (P,)."""
    base = np.round(parameters).T.reshape(-1, 3, sizes_per_axis)  # (P, 3, S)
    best = np.zeros((len(base), len(objects)))
    for stride in strides:
        z, y, x = (base[:, axis] * (stride[axis] / strides[0][axis]) for axis in range(3))
        best = np.maximum(best, _best_overlaps(objects, z, y, x))
    return best.mean(axis=1)


def _from_parameters(
    parameters: NDArray[np.float64], strides: Strides, sizes_per_axis: int
) -> AnchorSizes:
    rows = np.sort(np.round(parameters).reshape(3, sizes_per_axis), axis=1)
    return _scaled([tuple(float(size) for size in row) for row in rows], strides)


def _scaled(base: Sequence[tuple[float, ...]], strides: Strides) -> AnchorSizes:
    levels = []
    for stride in strides:
        ratios = [stride[axis] / strides[0][axis] for axis in range(3)]
        z, y, x = (tuple(size * ratios[axis] for size in base[axis]) for axis in range(3))
        levels.append((z, y, x))
    return tuple(levels)
