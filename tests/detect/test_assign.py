import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelbridge.detect.evaluate.assign import assign, paired_iou, true_positive_flags
from voxelbridge.detect.evaluate.tables import BoxTable

CASES = ["a", "b"]


def table(rows: list[tuple[int, int, list[float]]], scores: list[float] | None = None) -> BoxTable:
    """A table from (case, label, box) rows."""
    return BoxTable(
        case_index=np.array([case for case, _, _ in rows], dtype=np.int64),
        labels=np.array([label for _, label, _ in rows], dtype=np.int64),
        boxes=np.array([box for _, _, box in rows], dtype=np.float64).reshape(-1, 6),
        scores=None if scores is None else np.array(scores, dtype=np.float64),
    )


def cube(start: float, size: float = 4.0) -> list[float]:
    return [start, 0.0, 0.0, start + size, size, size]


def flags(truth: BoxTable, found: BoxTable, iou: float = 0.1) -> tuple[list[bool], list[int]]:
    hits, matched = true_positive_flags(CASES, truth, found, iou_threshold=iou)
    return hits.tolist(), matched.tolist()


def test_the_better_score_takes_the_object_and_the_duplicate_is_false() -> None:
    truth = table([(0, 0, cube(0))])
    found = table([(0, 0, cube(0)), (0, 0, cube(1))], [0.4, 0.9])
    assert flags(truth, found) == ([False, True], [1])


def test_tied_scores_go_in_row_order() -> None:
    truth = table([(0, 0, cube(0))])
    found = table([(0, 0, cube(1)), (0, 0, cube(0))], [0.5, 0.5])
    assert flags(truth, found) == ([True, False], [0])


def test_of_equal_overlaps_the_later_object_is_taken() -> None:
    truth = table([(0, 0, cube(-2)), (0, 0, cube(2))])
    found = table([(0, 0, cube(0))], [0.5])
    assert flags(truth, found) == ([True], [-1, 0])


def test_an_overlap_equal_to_the_threshold_counts() -> None:
    truth = table([(0, 0, [0, 0, 0, 1, 1, 2])])
    found = table([(0, 0, [0, 0, 0, 1, 1, 1])], [0.5])
    assert flags(truth, found, iou=0.5) == ([True], [0])
    assert flags(truth, found, iou=0.5000001) == ([False], [-1])
    assert flags(truth, truth_with_score(truth), iou=1.0) == ([True], [0])


def truth_with_score(truth: BoxTable) -> BoxTable:
    return BoxTable(truth.case_index, truth.labels, truth.boxes, np.ones(len(truth)))


def test_other_cases_and_other_classes_never_match() -> None:
    truth = table([(0, 0, cube(0))])
    found = table([(1, 0, cube(0)), (0, 1, cube(0))], [0.9, 0.8])
    assert flags(truth, found) == ([False, False], [-1])


def test_boxes_without_volume_never_match() -> None:
    flat = [1.0, 1.0, 1.0, 1.0, 3.0, 3.0]
    truth = table([(0, 0, flat), (0, 0, cube(0))])
    found = table([(0, 0, flat)], [0.9])
    assert flags(truth, found) == ([False], [-1, -1])


def test_only_the_best_hundred_of_each_case_and_class_take_part() -> None:
    rows = [(0, label, cube(500.0 + number)) for label in (0, 1) for number in range(100)]
    scores = [0.9] * 200
    rows += [(0, 0, cube(0)), (1, 0, cube(0)), (0, 2, cube(0))]
    scores += [0.5, 0.5, 0.5]
    truth = table([(0, 0, cube(0)), (1, 0, cube(0)), (0, 2, cube(0))])
    hits, matched = flags(truth, table(rows, scores))
    assert hits == [False] * 201 + [True, True]
    assert matched == [-1, 201, 202]


def test_of_tied_scores_at_the_cut_the_earlier_rows_stay() -> None:
    rows = [(0, 0, cube(500.0 + number)) for number in range(99)]
    rows += [(0, 0, cube(0)), (0, 0, cube(20))]
    truth = table([(0, 0, cube(0)), (0, 0, cube(20))])
    hits, matched = flags(truth, table(rows, [0.5] * 101))
    assert hits == [False] * 99 + [True, False]
    assert matched == [99, -1]


def test_empty_tables_give_empty_answers() -> None:
    none, scored = table([]), table([], [])
    some = table([(0, 0, cube(0))])
    assert flags(none, scored) == ([], [])
    assert flags(some, scored) == ([], [-1])
    assert flags(none, truth_with_score(some)) == ([False], [])


def test_a_case_beyond_the_list_is_refused() -> None:
    with pytest.raises(ValueError, match="case index 5"):
        true_positive_flags(CASES, table([(5, 0, cube(0))]), table([], []), iou_threshold=0.1)


def plain_matches(truth: BoxTable, found: BoxTable, threshold: float) -> dict[int, int]:
    """Object row of each true positive row, case by case, class by class, one by one."""
    assert found.scores is not None
    scores = found.scores.tolist()
    matches = {}
    for case in range(len(CASES)):
        for label in range(3):
            mine = [
                row
                for row in range(len(found))
                if found.case_index[row] == case and found.labels[row] == label
            ]
            mine = sorted(mine, key=lambda row: -scores[row])[:100]
            free = [
                row
                for row in range(len(truth))
                if truth.case_index[row] == case and truth.labels[row] == label
            ]
            for row in mine:
                best, best_iou = None, threshold
                for target in free:
                    iou = paired_iou(found.boxes[[row]], truth.boxes[[target]])[0]
                    if iou >= best_iou:
                        best, best_iou = target, iou
                if best is not None:
                    matches[row] = best
                    free.remove(best)
    return matches


ROWS = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.integers(0, 2),
        st.tuples(*[st.integers(0, 3)] * 3, *[st.integers(0, 3)] * 3).map(
            lambda v: [float(x) for x in (*v[:3], v[0] + v[3], v[1] + v[4], v[2] + v[5])]
        ),
    ),
    max_size=20,
)


@settings(max_examples=100, deadline=None)
@given(objects=ROWS, boxes=ROWS, seed=st.integers(0, 99), threshold=st.sampled_from([0.1, 0.25, 1]))
def test_assignment_equals_the_plain_loop_with_ties_and_equal_overlaps(
    objects: list, boxes: list, seed: int, threshold: float
) -> None:
    scores = np.random.default_rng(seed).integers(0, 4, len(boxes)) / 4
    truth, found = table(objects), table(boxes, scores.tolist())
    # Thresholds must not disturb one another.
    assignment = assign(truth, found, iou_thresholds=[0.1, 0.25, 1.0])
    row = [0.1, 0.25, 1.0].index(threshold)
    matches = {
        int(kept): int(target)
        for kept, target in zip(assignment.kept, assignment.found[row], strict=True)
        if target >= 0
    }
    assert matches == plain_matches(truth, found, threshold)
    keys = [(-scores[kept], found.case_index[kept], kept) for kept in assignment.kept]
    assert keys == sorted(keys)


def test_crowded_cases_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    low = rng.integers(0, 12, (150, 3))
    boxes = np.concatenate([low, low + rng.integers(1, 6, (150, 3))], axis=1).astype(np.float64)
    found = BoxTable(np.arange(150) % 2, np.zeros(150, np.int64), boxes, rng.random(150))
    moved = np.add(boxes[::-1][:60], 0.5, dtype=np.float64)
    truth = BoxTable(found.case_index[:60], found.labels[:60], moved)
    whole = assign(truth, found, iou_thresholds=[0.1, 0.3])
    monkeypatch.setattr("voxelbridge.detect.evaluate.assign._PAIRS_AT_ONCE", 40)
    parts = assign(truth, found, iou_thresholds=[0.1, 0.3])
    assert np.array_equal(whole.found, parts.found)
    assert (whole.found >= 0).any()
