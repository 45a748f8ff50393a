"""Whole curves of a detector: precision against recall, sensitivity against false positives."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from voxelbridge.detect.evaluate.assign import assign, check_cases
from voxelbridge.detect.evaluate.average_precision import precision_recall
from voxelbridge.detect.evaluate.froc import froc_points
from voxelbridge.detect.evaluate.ranked import Floats
from voxelbridge.detect.evaluate.tables import BoxTable


def precision_recall_curve(
    cases: Sequence[str],
    ground_truth: BoxTable,
    predictions: BoxTable,
    *,
    label: int,
    iou_threshold: float,
) -> tuple[Floats, Floats, Floats]:
    """Recall, precision and score after each kept prediction of a class, by descending score.

    Three empty arrays where the class has no object.
    """
    check_cases(cases, ground_truth, predictions)
    hit, scores, objects = _ranked_flags(ground_truth, predictions, iou_threshold, label)
    if objects == 0:
        return np.zeros(0), np.zeros(0), np.zeros(0)
    recall, precision = precision_recall(hit, objects)
    return recall, precision, scores


def froc_curve(
    cases: Sequence[str],
    ground_truth: BoxTable,
    predictions: BoxTable,
    *,
    iou_threshold: float,
    label: int | None = None,
) -> tuple[Floats, Floats, Floats]:
    """False positives per image, sensitivity and score at each point, from (0, 0) at infinity on.

    `label` None: all classes pooled under one score threshold. Three empty arrays where there is no
    object.
    """
    check_cases(cases, ground_truth, predictions)
    hit, scores, objects = _ranked_flags(ground_truth, predictions, iou_threshold, label)
    if objects == 0:
        return np.zeros(0), np.zeros(0), np.zeros(0)
    return froc_points(hit, scores, num_objects=objects, num_images=len(cases))


def _ranked_flags(
    ground_truth: BoxTable, predictions: BoxTable, iou_threshold: float, label: int | None
) -> tuple[NDArray[np.bool_], Floats, int]:
    """Hit flags and scores by descending score, and the number of objects, of a class or all."""
    if predictions.scores is None:
        raise ValueError("predictions need scores")
    assignment = assign(ground_truth, predictions, iou_thresholds=[iou_threshold])
    kept, hit = assignment.kept, assignment.found[0] >= 0
    if label is None:
        return hit, predictions.scores[kept], len(ground_truth)
    mine = predictions.labels[kept] == label
    objects = int((ground_truth.labels == label).sum())
    return hit[mine], predictions.scores[kept[mine]], objects
