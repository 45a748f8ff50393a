"""Deformable attention as its formula reads: loops, float64, no gradient. The slow truth."""

import itertools
import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def attention_by_loops(
    value: Array, shapes: Array, locations: Array, weights: Array
) -> NDArray[np.float64]:
    """(N, Q, M*D) from the layouts of `deformable_attention_3d`; minutes for real sizes."""
    batch, _, heads, channels = value.shape
    queries, levels, points = weights.shape[1], weights.shape[3], weights.shape[4]
    starts = np.concatenate([[0], np.cumsum(np.prod(shapes, axis=1))]).astype(int)
    out = np.zeros((batch, queries, heads, channels))
    for n, q, m, lvl, p in itertools.product(*map(range, (batch, queries, heads, levels, points))):
        level = value[n, starts[lvl] : starts[lvl + 1], m].reshape(*shapes[lvl].astype(int), -1)
        out[n, q, m] += weights[n, q, m, lvl, p] * trilinear(level, locations[n, q, m, lvl, p])
    return out.reshape(batch, queries, heads * channels)


def trilinear(level: Array, location: Array) -> Array:
    """The value (D channels) of a level (D, H, W, channels) at a location (x, y, z) in [0, 1]."""
    sizes = level.shape[:3]
    index = [float(location[2 - axis]) * sizes[axis] - 0.5 for axis in range(3)]
    if not all(-1 < c < size for c, size in zip(index, sizes, strict=True)):
        return np.zeros(level.shape[3])
    low = [math.floor(c) for c in index]
    total = np.zeros(level.shape[3])
    for corner in itertools.product((0, 1), repeat=3):
        cell = [first + step for first, step in zip(low, corner, strict=True)]
        if all(0 <= i < size for i, size in zip(cell, sizes, strict=True)):
            parts = [
                c - first if step else 1 - (c - first)
                for c, first, step in zip(index, low, corner, strict=True)
            ]
            total += math.prod(parts) * level[tuple(cell)]
    return total
