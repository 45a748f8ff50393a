"""What became of every prediction and every object: hit, missed, false and why; the worst first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from voxelbridge.detect.evaluate.assign import assign, paired_iou
from voxelbridge.detect.evaluate.tables import BoxTable

FALSE = -1  # in `matched`: a false positive
NOT_COUNTED = -2  # in `matched`: beyond the best 100 of its case and class

Reason = Literal["", "duplicate", "wrong class", "poor overlap", "nothing there"]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Arm:
    """One evaluated detector: its training records and what it found in which cases.

    `records` are the lines of metrics.jsonl, `metrics` the metrics.json object; `cases` name the
    rows that the tables' `case_index` counts. `folds`: the records of each run where several
    tested the cases.
    """

    name: str
    records: Sequence[Mapping[str, Any]]  # Any: parsed JSON
    metrics: Mapping[str, Any]
    cases: Sequence[str]
    ground_truth: BoxTable
    predictions: BoxTable
    folds: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Outcomes:
    """The assignment of one arm at one IoU threshold; P predictions, G objects.

    order: rows of the counted predictions by descending score, as the metrics rank them;
    matched (P,): row of the object that a prediction found, FALSE or NOT_COUNTED;
    found_by (G,): row of the prediction that found an object, -1 where it was missed;
    reasons (P,): of false positives.
    """

    order: NDArray[np.int64]
    matched: NDArray[np.int64]
    found_by: NDArray[np.int64]
    reasons: list[Reason]


@dataclass(frozen=True)
class Finding:
    """One error: a missed object (`score` None) or a false positive."""

    kind: Literal["missed", "false"]
    row: int  # in its table
    case_index: int
    label: int
    box: tuple[float, ...]
    score: float | None
    reason: Reason


def assess(ground_truth: BoxTable, predictions: BoxTable, *, iou: float) -> Outcomes:
    """Who found what, by the rule of the metrics."""
    assignment = assign(ground_truth, predictions, iou_thresholds=[iou])
    found = assignment.found[0]
    matched = np.full(len(predictions), NOT_COUNTED, dtype=np.int64)
    matched[assignment.kept] = found
    found_by = np.full(len(ground_truth), -1, dtype=np.int64)
    found_by[found[found >= 0]] = assignment.kept[found >= 0]
    return Outcomes(
        order=assignment.kept,
        matched=matched,
        found_by=found_by,
        reasons=_reasons(ground_truth, predictions, matched, iou),
    )


def worst_errors(
    ground_truth: BoxTable, predictions: BoxTable, outcomes: Outcomes, *, limit: int
) -> list[Finding]:
    """Missed objects, the largest first, then false positives by score; at most `limit`."""
    assert predictions.scores is not None
    sizes = np.prod(ground_truth.boxes[:, 3:] - ground_truth.boxes[:, :3], axis=1)
    missed = np.flatnonzero(outcomes.found_by < 0)
    missed = missed[np.argsort(-sizes[missed], kind="stable")]
    false = outcomes.order[outcomes.matched[outcomes.order] == FALSE]
    errors = [_finding("missed", row, ground_truth, None, "") for row in missed[:limit].tolist()]
    for row in false[: max(0, limit - len(errors))].tolist():
        score = float(predictions.scores[row])
        errors.append(_finding("false", row, predictions, score, outcomes.reasons[row]))
    return errors


def score_at_rate(predictions: BoxTable, outcomes: Outcomes, *, rate: float, images: int) -> float:
    """The lowest score of a prediction that leaves at most `rate` false positives per image.

    Without such a prediction: just above the highest score, or 0 where there is none at all.
    """
    assert predictions.scores is not None
    if not len(predictions):
        return 0.0
    false = np.sort(predictions.scores[outcomes.matched == FALSE])[::-1]
    allowed = int(rate * images + 1e-9)
    barred = false[allowed] if len(false) > allowed else -np.inf
    usable = predictions.scores[predictions.scores > barred]
    highest = float(predictions.scores.max())
    return float(usable.min()) if len(usable) else float(np.nextafter(highest, np.inf))


def _finding(
    kind: Literal["missed", "false"], row: int, table: BoxTable, score: float | None, reason: Reason
) -> Finding:
    return Finding(
        kind=kind,
        row=row,
        case_index=int(table.case_index[row]),
        label=int(table.labels[row]),
        box=tuple(table.boxes[row].tolist()),
        score=score,
        reason=reason,
    )


def _reasons(
    ground_truth: BoxTable, predictions: BoxTable, matched: NDArray[np.int64], iou: float
) -> list[Reason]:
    reasons: list[Reason] = [""] * len(predictions)
    objects_of: dict[int, Sequence[int]] = {
        case: np.flatnonzero(ground_truth.case_index == case).tolist()
        for case in np.unique(ground_truth.case_index).tolist()
    }
    for row in np.flatnonzero(matched == FALSE).tolist():
        objects = np.array(objects_of.get(int(predictions.case_index[row]), []), dtype=np.int64)
        box = np.broadcast_to(predictions.boxes[row], (len(objects), 6))
        overlap = np.nan_to_num(paired_iou(box, ground_truth.boxes[objects]))
        same = ground_truth.labels[objects] == predictions.labels[row]
        reasons[row] = _reason(overlap, same, iou)
    return reasons


def _reason(overlap: Floats, same: NDArray[np.bool_], iou: float) -> Reason:
    if (overlap[same] >= iou).any():
        return "duplicate"  # its object was taken by a prediction of higher score
    if (overlap[~same] >= iou).any():
        return "wrong class"
    if (overlap > 0).any():
        return "poor overlap"
    return "nothing there"
