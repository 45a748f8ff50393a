"""What the case viewer of a report is given: cases with pictures, tables, who found what."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from voxelbridge.detect.evaluate.froc import FPPI
from voxelbridge.detect.evaluate.tables import BoxTable
from voxelbridge.detect.report_images import (
    CASE_BUDGET_MIN,
    IMAGE_BUDGET,
    CaseImage,
    case_pictures,
    pictures_size,
)
from voxelbridge.detect.report_outcomes import FALSE, Arm, Outcomes, score_at_rate

SCHEMA = 1
DEFAULT_RATE = 1.0  # false positives per image at which the viewer starts
NO_IMAGE = "No picture of this case was given."
NO_ROOM = "No picture: the page has room only for the cases with the most errors."
NEIGHBOURS = range(1, 9)  # slices on both sides of wanted ones, where there is room
MAX_PLANES = 400  # asked for per case; the budget cuts far earlier


def viewer_content(
    arms: Sequence[Arm],
    outcomes: Sequence[Mapping[str, Outcomes]],
    case_images: Sequence[CaseImage],
    class_names: Sequence[str],
) -> dict[str, Any]:
    """The JSON block of the page; case numbers count `cases`, the union of all arms' cases."""
    cases = list(dict.fromkeys(case for arm in arms for case in arm.cases))
    numbers = {case: number for number, case in enumerate(cases)}
    keys = list(outcomes[0])
    first = [outcome[keys[0]] for outcome in outcomes]
    thresholds = [
        score_at_rate(arm.predictions, outcome, rate=DEFAULT_RATE, images=len(arm.cases))
        for arm, outcome in zip(arms, first, strict=True)
    ]
    return {
        "schema": SCHEMA,
        "classes": list(class_names),
        "iou": keys,
        "fppi": list(FPPI),
        "cases": _case_entries(cases, arms, first, thresholds, case_images),
        "arms": [
            _arm_content(arm, of_arm, threshold, numbers)
            for arm, of_arm, threshold in zip(arms, outcomes, thresholds, strict=True)
        ],
    }


def _arm_content(
    arm: Arm, outcomes: Mapping[str, Outcomes], threshold: float, numbers: Mapping[str, int]
) -> dict[str, Any]:
    return {
        "name": arm.name,
        "cases": [numbers[case] for case in arm.cases],
        "default_score": threshold,
        "truth": _table_content(arm, arm.ground_truth, numbers),
        "predictions": _table_content(arm, arm.predictions, numbers),
        "matched": {key: outcome.matched.tolist() for key, outcome in outcomes.items()},
        "reasons": {key: outcome.reasons for key, outcome in outcomes.items()},
    }


def _table_content(arm: Arm, table: BoxTable, numbers: Mapping[str, int]) -> dict[str, Any]:
    of_row = [numbers[case] for case in arm.cases]
    content: dict[str, Any] = {
        "case": [of_row[int(index)] for index in table.case_index],
        "label": table.labels.tolist(),
        "box": table.boxes.tolist(),
    }
    return content if table.scores is None else {**content, "score": table.scores.tolist()}


def _case_entries(
    cases: Sequence[str],
    arms: Sequence[Arm],
    outcomes: Sequence[Outcomes],
    thresholds: Sequence[float],
    case_images: Sequence[CaseImage],
) -> list[dict[str, Any]]:
    """Every case, those with the most errors first in line for the budget of pictures."""
    images = {image.case_id: image for image in case_images}
    planes = {case: _wanted_planes(case, arms, outcomes, thresholds) for case in cases}
    errors = {
        case: sum(_errors_of(case, *one) for one in zip(arms, outcomes, thresholds, strict=True))
        for case in cases
    }
    pictured = sorted((case for case in cases if case in images), key=lambda case: -errors[case])
    budget = max(CASE_BUDGET_MIN, IMAGE_BUDGET // max(1, len(pictured)))
    entries: dict[str, dict[str, Any]] = {
        case: {"id": case, "pictures": None, "left_out": 0, "note": NO_IMAGE} for case in cases
    }
    spent = 0
    for case in pictured:
        if spent + CASE_BUDGET_MIN > IMAGE_BUDGET:
            entries[case]["note"] = NO_ROOM
            continue
        room = min(budget, IMAGE_BUDGET - spent)
        wanted = planes[case][:MAX_PLANES]
        around = [(0, z + d) for k in NEIGHBOURS for d in (-k, k) for axis, z in wanted if not axis]
        pictures = case_pictures(images[case], wanted, extra=around, budget=room)
        spent += pictures_size(pictures.content)
        entries[case] |= {"pictures": pictures.content, "left_out": pictures.left_out, "note": ""}
    return [entries[case] for case in cases]


def _errors_of(case: str, arm: Arm, outcome: Outcomes, threshold: float) -> int:
    if case not in arm.cases:
        return 0
    number = list(arm.cases).index(case)
    scores = arm.predictions.scores
    assert scores is not None
    missed = (arm.ground_truth.case_index == number) & (outcome.found_by < 0)
    false = (arm.predictions.case_index == number) & (outcome.matched == FALSE)
    return int(missed.sum()) + int((false & (scores >= threshold)).sum())


def _wanted_planes(
    case: str,
    arms: Sequence[Arm],
    outcomes: Sequence[Outcomes],
    thresholds: Sequence[float],
) -> list[tuple[int, int]]:
    """Planes through box centres, most important first: objects, shown predictions, the rest."""
    truths, shown, across, hidden = [], [], [], []
    for arm, outcome, threshold in zip(arms, outcomes, thresholds, strict=True):
        number = list(arm.cases).index(case) if case in arm.cases else -1
        truth = arm.ground_truth.boxes[arm.ground_truth.case_index == number]
        truths += [(0, _middle(box, 0)) for box in truth]
        across += [(axis, _middle(box, axis)) for box in truth for axis in (1, 2)]
        scores = arm.predictions.scores
        assert scores is not None
        order = outcome.order[arm.predictions.case_index[outcome.order] == number]
        for row in order.tolist():
            box = arm.predictions.boxes[row]
            if scores[row] >= threshold:
                shown.append((0, _middle(box, 0)))
                across += [(axis, _middle(box, axis)) for axis in (1, 2)]
            else:
                hidden.append((0, _middle(box, 0)))
    return list(dict.fromkeys([*truths, *shown, *across, *hidden]))


def _middle(box: NDArray[Any], axis: int) -> int:
    """The voxel in which a box's centre lies; the lower one where it lies between two."""
    return max(0, math.ceil((box[axis] + box[axis + 3]) / 2) - 1)
