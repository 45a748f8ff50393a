import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelbridge.detect.evaluate.froc import FPPI, froc_points, sensitivity_at_rates


def sensitivities(flags: list[bool], scores: list[float], objects: int, images: int) -> list[float]:
    fppi, sensitivity, _ = froc_points(
        np.array(flags, dtype=bool),
        np.array(scores, dtype=np.float64),
        num_objects=objects,
        num_images=images,
    )
    return sensitivity_at_rates(fppi, sensitivity).tolist()


def plain_sensitivities(
    flags: list[bool], scores: list[float], objects: int, images: int
) -> list[float]:
    points = [(0.0, 0.0)]
    for score in sorted(set(scores), reverse=True):
        above = [flag for flag, other in zip(flags, scores, strict=True) if other >= score]
        points.append(((len(above) - sum(above)) / images, sum(above) / objects))
    result = []
    for rate in FPPI:
        before = [point for point in points if point[0] <= rate][-1]
        after = [point for point in points if point[0] > rate]
        if after and before[0] < rate:
            part = (rate - before[0]) / (after[0][0] - before[0])
            result.append(before[1] + part * (after[0][1] - before[1]))
        else:
            result.append(before[1])
    return result


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 12), st.booleans()), max_size=60),
    images=st.integers(1, 9),
    missed=st.integers(0, 3),
)
def test_sensitivities_equal_the_plain_rule_with_ties(
    rows: list[tuple[int, bool]], images: int, missed: int
) -> None:
    rows = sorted(rows, key=lambda row: -row[0])
    scores, flags = [score / 12 for score, _ in rows], [flag for _, flag in rows]
    objects = max(sum(flags) + missed, 1)
    expected = plain_sensitivities(flags, scores, objects, images)
    assert sensitivities(flags, scores, objects, images) == pytest.approx(expected, abs=1e-12)


def test_measured_values_of_tiny_detectors() -> None:
    assert sensitivities([True], [0.9], 1, 1) == [1.0] * 7
    assert sensitivities([False, True], [0.9, 0.5], 1, 1) == [0, 0, 0, 1, 1, 1, 1]
    assert sensitivities([True, False], [0.9, 0.5], 1, 1) == [1.0] * 7
    assert sensitivities([], [], 3, 2) == [0.0] * 7


def test_without_errors_the_final_sensitivity_holds_everywhere() -> None:
    assert sensitivities([True, True], [0.9, 0.8], 4, 5) == [0.5] * 7


def test_tied_scores_make_one_point_and_a_slope() -> None:
    # One hit and one error at the same score: nothing in between but the straight line.
    assert sensitivities([True, False], [0.5, 0.5], 1, 1) == pytest.approx(
        [0.125, 0.25, 0.5, 1, 1, 1, 1]
    )


def test_the_highest_point_at_a_rate_counts() -> None:
    flags = [False, True, True, False]
    assert sensitivities(flags, [0.9, 0.8, 0.7, 0.6], 4, 8)[0] == 0.5


def test_the_curve_starts_with_nothing_detected() -> None:
    fppi, sensitivity, scores = froc_points(
        np.array([True, False]), np.array([0.7, 0.2]), num_objects=2, num_images=4
    )
    assert fppi.tolist() == [0, 0, 0.25]
    assert sensitivity.tolist() == [0, 0.5, 0.5]
    assert scores.tolist() == [np.inf, 0.7, 0.2]
