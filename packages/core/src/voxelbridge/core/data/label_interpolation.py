"""Label maps by linear votes: nnU-Net's rule, computed only where neighbours differ.

nnU-Net (batchgenerators' `resize_segmentation`, order 1) interpolates one 0/1 volume per label and
takes the label with the largest value. Between eight equal voxels the answer is known, so only
output voxels whose eight neighbours differ are computed, and only for the labels among the eight:
the time follows the objects' surface, not the number of labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.intp]
Doubles = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Taps:
    """Where the output positions of one axis lie between input voxels; all arrays (new,).

    Indices count from a border voxel put before the first one, so that none is outside.
    """

    low: Ints  # the voxel at or before the position; the one after is low + 1
    weight_low: Doubles
    weight_high: Doubles
    nearest: Ints  # a position half-way takes the later one


@lru_cache(maxsize=16)
def linear_taps(old: int, new: int) -> Taps:
    """Taps of linear interpolation over equal outer edges of an axis with one border voxel added.

    Computed with the roundings of `scipy.ndimage.zoom`, step by step: ties between labels are
    settled by the last bit, and nnU-Net's answer to them is the reference.
    """
    position: Doubles = (np.arange(new, dtype=np.float64) + 0.5) * (old / new) - 0.5
    low = np.floor(position).astype(np.intp)
    weight_low: Doubles = 1.0 - (position - low)
    return Taps(low + 1, weight_low, 1.0 - weight_low, nearest_picks(old, new) + 1)


def nearest_picks(old: int, new: int) -> Ints:
    """(new,) index of the nearest voxel for each output position, rounded as scipy does."""
    position: Doubles = (np.arange(new, dtype=np.float64) + 0.5) * (old / new) - 0.5
    return np.clip(np.floor(position + 0.5), 0, old - 1).astype(np.intp)


def resample_labels_linear(
    array: NDArray[Any], shape: Sequence[int], *, nearest_axis: int | None = None
) -> NDArray[Any]:
    """(D, H, W) -> shape: at each voxel the label with the largest trilinear weight; type kept.

    Equal weights: the label of the nearest voxel if it is among the equals, otherwise the smallest
    of them. `nearest_axis` takes the nearest slice along that axis instead (nnU-Net's rule for
    anisotropic volumes). The numbers are those of batchgenerators' `resize_segmentation(order=1)`
    as of 0.25.5; older releases wrote every label above one half, the later over the earlier.
    """
    if array.ndim != 3:
        raise ValueError(f"label map must be (D, H, W), got {array.shape}")
    if tuple(shape) == array.shape:
        return array
    axes = [linear_taps(old, new) for old, new in zip(array.shape, shape, strict=True)]
    if nearest_axis is not None:
        axes[nearest_axis] = _nearest_only(axes[nearest_axis])
    padded = np.pad(array, 1, mode="edge")
    out = np.empty(tuple(shape), dtype=array.dtype)
    z = axes[0]
    start = 0
    while start < len(z.low):  # output slices between the same two input slices share the work
        stop = start + 1
        while stop < len(z.low) and z.low[stop] == z.low[start]:
            stop += 1
        _vote(padded, axes, range(start, stop), out)
        start = stop
    return out


@dataclass(frozen=True, eq=False)
class _Mixed:
    """Output voxels of one slice whose neighbours differ: n positions in c cells of the input."""

    row: Ints  # (n,) output row and column
    column: Ints
    cell: Ints  # (n,) which cell each lies in
    labels: NDArray[Any]  # (8, c) the cells' corners, z slowest, x fastest


def _nearest_only(taps: Taps) -> Taps:
    ones = np.ones(len(taps.nearest))
    return Taps(taps.nearest, ones, np.zeros_like(ones), taps.nearest)


def _vote(array: NDArray[Any], axes: Sequence[Taps], slices: range, out: NDArray[Any]) -> None:
    z, y, x = axes
    below = z.low[slices[0]]
    alone = all(z.weight_high[number] == 0.0 for number in slices)
    first, second = array[below], array[below if alone else below + 1]
    plain = first[np.ix_(y.low, x.low)]
    mixed = _find_mixed(first, second, y, x)
    if mixed is None:
        out[slices.start : slices.stop] = plain
        return
    # cells with two labels need one sum per side; the few with more are done in full
    smallest, largest = mixed.labels.min(axis=0), mixed.labels.max(axis=0)
    is_large = mixed.labels == largest  # (8, c)
    two = (is_large | (mixed.labels == smallest)).all(axis=0)
    of_two = two[mixed.cell]
    simple, complex_ = np.flatnonzero(of_two), np.flatnonzero(~of_two)
    large_corner = is_large.astype(np.float64)[:, mixed.cell[simple]]  # (8, n)
    small_label, large_label = smallest[mixed.cell[simple]], largest[mixed.cell[simple]]
    for number in slices:
        plane = out[number]
        plane[...] = plain
        weights = _corner_weights(z, number, y, x, mixed, simple)
        large = _sum_in_order(weights * large_corner)
        small = _sum_in_order(weights - weights * large_corner)
        winner = np.where(large > small, large_label, small_label)
        row, column = mixed.row[simple], mixed.column[simple]
        tie = np.flatnonzero(large == small)
        winner[tie] = array[z.nearest[number], y.nearest[row[tie]], x.nearest[column[tie]]]
        plane[row, column] = winner
        if len(complex_):
            row, column = mixed.row[complex_], mixed.column[complex_]
            plane[row, column] = _winner_of_many(
                mixed.labels[:, mixed.cell[complex_]],
                _corner_weights(z, number, y, x, mixed, complex_),
                array[z.nearest[number], y.nearest[row], x.nearest[column]],
            )


def _find_mixed(first: NDArray[Any], second: NDArray[Any], y: Taps, x: Taps) -> _Mixed | None:
    # (H, W) labels of two neighbouring slices; cell (i, j) spans rows i, i + 1, columns j, j + 1
    differs = first != second
    rows = differs.copy()
    rows[:, :-1] |= differs[:, 1:]
    rows[:, :-1] |= first[:, :-1] != first[:, 1:]
    cells = rows.copy()
    cells[:-1] |= rows[1:]
    cells[:-1] |= first[:-1] != first[1:]
    if not cells.any():
        return None
    row, column = np.nonzero(cells[np.ix_(y.low, x.low)])
    if len(row) == 0:
        return None
    used, cell = np.unique(y.low[row] * first.shape[1] + x.low[column], return_inverse=True)
    i, j = np.divmod(used, first.shape[1])
    labels = np.stack(
        [plane[r, c] for plane in (first, second) for r in (i, i + 1) for c in (j, j + 1)]
    )
    return _Mixed(row, column, cell.reshape(-1), labels)


def _corner_weights(z: Taps, number: int, y: Taps, x: Taps, mixed: _Mixed, which: Ints) -> Doubles:
    # (8, n), multiplied in the order z, y, x as scipy does
    row, column = mixed.row[which], mixed.column[which]
    weights = np.empty((8, len(which)))
    wx = (x.weight_low[column], x.weight_high[column])
    for a, wz in enumerate((z.weight_low[number], z.weight_high[number])):
        for b, wy in enumerate((y.weight_low, y.weight_high)):
            wzy = (wz * wy)[row]
            for c in range(2):
                np.multiply(wzy, wx[c], out=weights[4 * a + 2 * b + c])
    return weights


def _sum_in_order(terms: Doubles) -> Doubles:
    # (8, n) -> (n,), added one after the other as scipy does: numpy's own sum may pair them
    total = terms[0].copy()
    for term in terms[1:]:
        total += term
    return total


def _winner_of_many(labels: NDArray[Any], weights: Doubles, nearest: NDArray[Any]) -> NDArray[Any]:
    # labels and weights (8, n); nearest (n,)
    best = np.full(labels.shape[1], -1.0)
    winner = np.zeros(labels.shape[1], dtype=labels.dtype)
    near = np.zeros(labels.shape[1])
    for corner in range(8):
        same = labels == labels[corner]
        score = np.minimum(_sum_in_order(weights * same), 1.0)
        better = (score > best) | ((score == best) & (labels[corner] < winner))
        winner = np.where(better, labels[corner], winner)
        best = np.maximum(best, score)
        near = np.where(labels[corner] == nearest, score, near)
    return np.where(near == best, nearest, winner)
