"""Anchor sizes that fit the objects of a data set.

nnDetection's objective (arXiv 2106.00817, section 3): the mean over objects of the best
intersection over union with any anchor, all boxes centred on one point; base sizes are searched as
whole numbers and doubled with the stride of each level. Search here is scipy's differential
evolution on the CPU.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import differential_evolution

# Per level, one tuple of edge lengths (voxels) for each of the axes z, y, x.
AnchorSizes = tuple[tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]], ...]
Strides = Sequence[tuple[int, int, int]]

BASE_SIZES = (4, 8, 16)  # voxels at stride 4: nnDetection's start of the search
MAX_OBJECTS = 1000  # more change the mean by less than the search's own tolerance
GENERATIONS = 60


def default_anchor_sizes(strides: Strides, sizes_per_axis: int = 3) -> AnchorSizes:
    """Sizes without a data set: 4, 8, 16 voxels at stride 4, scaled with each level's stride."""
    sizes = BASE_SIZES[:sizes_per_axis]
    base = [tuple(size * stride / 4 for size in sizes) for stride in strides[0]]
    return _scaled(base, strides)


def plan_anchor_sizes(
    object_sizes: NDArray[np.float64], strides: Strides, *, sizes_per_axis: int = 3, seed: int = 0
) -> AnchorSizes:
    """The sizes of highest mean best overlap with `object_sizes` (N, 3), edge lengths in voxels.

    `strides` are voxels per cell of each head level, finest first. Cost grows with objects times
    anchors; beyond 1,000 objects a seeded sample is used. No object: the default sizes.
    """
    if len(object_sizes) == 0:
        return default_anchor_sizes(strides, sizes_per_axis)
    rng = np.random.default_rng(seed)
    sizes = np.asarray(object_sizes, dtype=np.float64)
    if len(sizes) > MAX_OBJECTS:
        sizes = sizes[rng.choice(len(sizes), MAX_OBJECTS, replace=False)]
    largest = np.maximum(sizes.max(axis=0), 2.0)
    start = [size for axis in default_anchor_sizes(strides, sizes_per_axis)[0] for size in axis]
    bounds = [(1.0, max(float(np.ceil(largest[axis])), 2.0)) for axis in range(3)]
    per_parameter = [bounds[axis] for axis in range(3) for _ in range(sizes_per_axis)]

    def negative_overlap(parameters: NDArray[np.float64]) -> float:
        return -mean_best_overlap(sizes, _from_parameters(parameters, strides, sizes_per_axis))

    clipped = [float(np.clip(v, *bound)) for v, bound in zip(start, per_parameter, strict=True)]
    result = differential_evolution(
        negative_overlap,
        per_parameter,
        integrality=[True] * len(per_parameter),
        x0=np.round(clipped),
        popsize=6,
        maxiter=GENERATIONS,
        polish=False,
        rng=rng,
    )
    return _from_parameters(result.x, strides, sizes_per_axis)


def mean_best_overlap(object_sizes: NDArray[np.float64], anchor_sizes: AnchorSizes) -> float:
    """Mean over objects of the best IoU with any anchor, all centred on one point; in [0, 1]."""
    anchors = np.concatenate([_combinations(level) for level in anchor_sizes])  # (A, 3)
    shared = np.minimum(object_sizes[:, None], anchors[None]).prod(axis=2)  # (N, A)
    union = object_sizes.prod(axis=1)[:, None] + anchors.prod(axis=1)[None] - shared
    return float((shared / union).max(axis=1).mean())


def _combinations(level: tuple[tuple[float, ...], ...]) -> NDArray[np.float64]:
    return np.stack(np.meshgrid(*level, indexing="ij"), axis=-1).reshape(-1, 3).astype(np.float64)


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
