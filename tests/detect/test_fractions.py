"""Fractions of the training patients: nested, whole patients, never without an object."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelbridge.detect.fractions import share_of_cases

CASES = [f"c{number:02d}" for number in range(40)]
PATIENTS = {case: f"p{number // 2:02d}" for number, case in enumerate(CASES)}  # two cases each


def share(fraction: float, seed: int = 0, with_objects: tuple[str, ...] = ("c07",)) -> list[str]:
    return share_of_cases(
        CASES, PATIENTS, fraction=fraction, seed=seed, with_objects=with_objects
    ).case_ids


@settings(deadline=None, max_examples=40)
@given(
    small=st.floats(0.001, 1), large=st.floats(0.001, 1), seed=st.integers(0, 2**32 - 1),
    annotated=st.integers(0, 39),
)  # fmt: skip
def test_fractions_are_nested_and_hold_whole_patients_with_an_object(
    small: float, large: float, seed: int, annotated: int
) -> None:
    name = CASES[annotated]
    few, many = (share(f, seed, (name,)) for f in sorted((small, large)))
    assert set(few) <= set(many)
    assert name in few
    patients = {PATIENTS[case] for case in few}
    assert len(few) == 2 * len(patients)
    assert len(patients) == max(1, round(min(small, large) * 20))


def test_the_whole_is_every_case_in_its_order_and_seeds_differ() -> None:
    assert share(1.0) == CASES
    assert share(0.1) == [case for case in CASES if case in share(0.1)]
    assert len({tuple(share(0.3, seed)) for seed in range(5)}) > 1
    assert share(0.3) == share(0.3)


def test_patients_do_not_depend_on_the_order_of_the_cases() -> None:
    turned = share_of_cases(
        CASES[::-1], PATIENTS, fraction=0.3, seed=4, with_objects=["c30", "c01"]
    )
    assert sorted(turned.case_ids) == share(0.3, 4, ("c30", "c01"))
    assert (turned.num_patients, turned.of_patients) == (6, 20)


@pytest.mark.parametrize("fraction", [0.01, 0.5])
def test_without_any_object_a_share_is_still_drawn(fraction: float) -> None:
    assert len(share(fraction, with_objects=())) == 2 * max(1, round(20 * fraction))
