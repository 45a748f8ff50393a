"""Which prediction finds which object: greedy by score, case by case and class by class.

The rule of nnDetection (commit 97a58f3). Letters: P predictions, K kept predictions, G objects,
T IoU thresholds, R pairs of a kept prediction and an object of its case and class.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from voxelbridge.detect.evaluate.tables import BoxTable

MAX_DETECTIONS = 100  # best predictions kept per case AND class
_LARGEST_THRESHOLD = 1 - 1e-10  # equal boxes must reach an IoU threshold of 1 despite rounding
_PAIRS_AT_ONCE = 500_000  # bounds memory to some 100 MB however crowded the cases are

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Assignment:
    """Kept predictions by descending score, and the object each finds at each threshold.

    kept (K,) rows of the prediction table; ties are in the order of cases, then of rows;
    found (T, K) row of the object in its table, -1 for a false positive.
    """

    kept: Ints
    found: Ints


def assign(
    ground_truth: BoxTable,
    predictions: BoxTable,
    *,
    iou_thresholds: Sequence[float],
    max_detections: int = MAX_DETECTIONS,
) -> Assignment:
    """Each kept prediction takes the free object of largest IoU that reaches the threshold.

    Of each case and class the `max_detections` best predictions are kept (ties in row order) and
    go in this order; an IoU equal to the threshold counts; of equal IoUs the later object row is
    taken. Every threshold is assigned from scratch. Boxes of volume 0 never match.
    """
    assert predictions.scores is not None
    kept, rank = _keep_best(predictions, max_detections)
    thresholds = np.minimum(np.asarray(iou_thresholds, dtype=np.float64), _LARGEST_THRESHOLD)
    position, target, iou = _overlapping_pairs(
        ground_truth, predictions, kept, min_iou=float(thresholds.min())
    )
    found = np.full((len(thresholds), len(kept)), -1, dtype=np.int64)
    taken = np.zeros((len(thresholds), len(ground_truth)), dtype=bool)
    # All predictions of one rank belong to different cases or classes and cannot compete: they are
    # decided together. Inside a prediction's pairs the last one that is free is the one to take.
    order = np.lexsort((target, iou, position, rank[position]))
    position, target, iou = position[order], target[order], iou[order]
    reaches = iou >= thresholds[:, None]  # (T, R)
    starts = np.searchsorted(rank[position], np.arange(max_detections + 1))
    for first, last in itertools.pairwise(starts.tolist()):
        if first == last:
            continue
        part = slice(first, last)
        free = reaches[:, part] & ~taken[:, target[part]]
        choice = np.where(free, np.arange(first, last), -1)
        heads = np.flatnonzero(np.diff(position[part], prepend=-1))
        choice = np.maximum.reduceat(choice, heads, axis=1)  # (T, predictions of this rank)
        at, column = np.nonzero(choice >= 0)
        pair = choice[at, column]
        found[at, position[pair]] = target[pair]
        taken[at, target[pair]] = True
    by_score = np.lexsort((kept, predictions.case_index[kept], -predictions.scores[kept]))
    return Assignment(kept=kept[by_score], found=found[:, by_score])


def true_positive_flags(
    cases: Sequence[str],
    ground_truth: BoxTable,
    predictions: BoxTable,
    *,
    iou_threshold: float,
) -> tuple[NDArray[np.bool_], Ints]:
    """Row by row which predictions are true positives (P,), and who found each object (G,).

    A prediction beyond the best 100 of its case and class is False. For an object: the row of the
    prediction that found it, -1 where it was missed.
    """
    check_cases(cases, ground_truth, predictions)
    assignment = assign(ground_truth, predictions, iou_thresholds=[iou_threshold])
    hit = assignment.found[0] >= 0
    flags = np.zeros(len(predictions), dtype=bool)
    flags[assignment.kept[hit]] = True
    matched = np.full(len(ground_truth), -1, dtype=np.int64)
    matched[assignment.found[0][hit]] = assignment.kept[hit]
    return flags, matched


def check_cases(cases: Sequence[str], *tables: BoxTable) -> None:
    """A ValueError where a table names a case beyond the list."""
    for table in tables:
        if len(table) and int(table.case_index.max()) >= len(cases):
            raise ValueError(f"case index {table.case_index.max()} of {len(cases)} cases")


def paired_iou(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """IoU of boxes that correspond, float64; (R, 6), (R, 6) -> (R,); NaN for two of volume 0."""
    # Axis by axis, first to last: thresholds are hit exactly, so the order of roundings counts.
    intersection: NDArray[np.float64] = np.ones(len(a))
    volume_a: NDArray[np.float64] = np.ones(len(a))
    volume_b: NDArray[np.float64] = np.ones(len(a))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        for axis in range(3):
            low = np.maximum(a[:, axis], b[:, axis])
            high = np.minimum(a[:, axis + 3], b[:, axis + 3])
            intersection = intersection * np.maximum(high - low, 0.0)
            volume_a = volume_a * (a[:, axis + 3] - a[:, axis])
            volume_b = volume_b * (b[:, axis + 3] - b[:, axis])
        return intersection / (volume_a + volume_b - intersection)


def _keep_best(predictions: BoxTable, count: int) -> tuple[Ints, Ints]:
    """Rows of the best `count` of each case and class, grouped, and their rank in the group."""
    assert predictions.scores is not None
    order = np.lexsort((-predictions.scores, predictions.labels, predictions.case_index))
    case, label = predictions.case_index[order], predictions.labels[order]
    new_group = np.ones(len(order), dtype=bool)
    new_group[1:] = (case[1:] != case[:-1]) | (label[1:] != label[:-1])
    position = np.arange(len(order))
    rank = position - np.maximum.accumulate(np.where(new_group, position, 0))
    keep = rank < count
    return order[keep], rank[keep]


def _overlapping_pairs(
    ground_truth: BoxTable, predictions: BoxTable, kept: Ints, *, min_iou: float
) -> tuple[Ints, Ints, NDArray[np.float64]]:
    """Kept position, object row and IoU of all pairs of one case and class that reach `min_iou`."""
    labels = 1 + max(
        int(table.labels.max()) if len(table) else 0 for table in (ground_truth, predictions)
    )
    object_group = ground_truth.case_index * labels + ground_truth.labels
    objects = np.argsort(object_group, kind="stable")
    object_group = object_group[objects]
    group = predictions.case_index[kept] * labels + predictions.labels[kept]
    first = np.searchsorted(object_group, group, side="left")
    count = np.searchsorted(object_group, group, side="right") - first
    parts = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    for part in _chunks(count):
        position = np.repeat(part, count[part])
        within = np.arange(len(position)) - np.repeat(
            np.cumsum(count[part]) - count[part], count[part]
        )
        target = objects[first[position] + within]
        iou = paired_iou(predictions.boxes[kept[position]], ground_truth.boxes[target])
        reached = iou >= min_iou
        parts.append((position[reached], target[reached], iou[reached]))
    positions, targets, ious = zip(*parts, strict=True)
    return np.concatenate(positions), np.concatenate(targets), np.concatenate(ious)


def _chunks(count: Ints) -> list[Ints]:
    """The positions that have pairs, in runs of about `_PAIRS_AT_ONCE` pairs."""
    with_pairs = np.flatnonzero(count)
    run = np.cumsum(count[with_pairs]) // _PAIRS_AT_ONCE
    return np.split(with_pairs, np.flatnonzero(np.diff(run)) + 1) if len(with_pairs) else []
