import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelbridge.detect.evaluate.average_precision import average_precision, precision_recall


def plain_average_precision(flags: list[bool], num_objects: int) -> float:
    recalls, precisions, hits = [], [], 0
    for number, flag in enumerate(flags, start=1):
        hits += flag
        recalls.append(hits / num_objects)
        precisions.append(hits / number)
    sampled = []
    for point in np.linspace(0, 1, 101):
        reached = [i for i, recall in enumerate(recalls) if recall >= point]
        sampled.append(max(precisions[reached[0] :]) if reached else 0.0)
    return sum(sampled) / 101


@settings(max_examples=100, deadline=None)
@given(flags=st.lists(st.booleans(), max_size=40), missed=st.integers(0, 5))
def test_average_precision_equals_the_plain_rule(flags: list[bool], missed: int) -> None:
    objects = max(sum(flags) + missed, 1)
    computed = average_precision(np.array(flags, dtype=bool), objects)
    assert computed == pytest.approx(plain_average_precision(flags, objects), abs=1e-12)


def test_all_objects_found_without_error_give_one() -> None:
    assert average_precision(np.ones(7, dtype=bool), 7) == 1.0


def test_part_of_the_objects_found_without_error_counts_the_recall_points_reached() -> None:
    # 1/3 is reached by the points 0.00 to 0.33, 2 of 5 by 0.00 to 0.40.
    assert average_precision(np.ones(1, dtype=bool), 3) == pytest.approx(34 / 101)
    assert average_precision(np.ones(2, dtype=bool), 5) == pytest.approx(41 / 101)


def test_a_recall_of_nine_tenths_reaches_its_point() -> None:
    # In float32, 9/10 falls short of the recall point 0.9.
    assert average_precision(np.ones(9, dtype=bool), 10) == pytest.approx(91 / 101)


def test_no_prediction_and_no_hit_give_zero() -> None:
    assert average_precision(np.zeros(0, dtype=bool), 4) == 0.0
    assert average_precision(np.zeros(9, dtype=bool), 4) == 0.0


def test_an_early_error_halves_a_single_hit() -> None:
    assert average_precision(np.array([False, True]), 1) == pytest.approx(0.5)


def test_precision_and_recall_follow_the_predictions() -> None:
    recall, precision = precision_recall(np.array([True, False, True]), 4)
    assert recall.tolist() == [0.25, 0.25, 0.5]
    assert precision.tolist() == pytest.approx([1, 1 / 2, 2 / 3])
