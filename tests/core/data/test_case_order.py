from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelbridge.core.data.case_order import (
    BLOCK,
    CaseOrder,
    Stratum,
    group_cases,
    weighted_strata,
)
from voxelbridge.core.errors import ConfigError


def alone(name: str, count: int, weight: float = 1.0) -> Stratum:
    return Stratum(name, weight, tuple((f"{name}{number}",) for number in range(count)))


def test_all_cases_come_once_before_any_comes_again() -> None:
    order = CaseOrder([alone("a", 7)], seed=3)
    drawn = [order.case(index) for index in range(28)]
    for turn in range(4):
        assert sorted(drawn[7 * turn : 7 * turn + 7]) == [f"a{number}" for number in range(7)]
    assert len({tuple(drawn[7 * turn : 7 * turn + 7]) for turn in range(4)}) > 1


@given(
    weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9),
    blocks=st.integers(1, 4),
    seed=st.integers(0, 5),
)
@settings(deadline=None, max_examples=25)
def test_shares_are_exact_to_one_sample_after_every_block(
    weights: list[float], blocks: int, seed: int
) -> None:
    strata = [alone(f"s{n}_", 3, weight) for n, weight in enumerate(weights)]
    order = CaseOrder(strata, seed=seed)
    counts = np.zeros(len(weights))
    for index in range(blocks * BLOCK):
        counts[order.draw(index)[0]] += 1
    assert counts.sum() == blocks * BLOCK
    assert np.abs(counts - order.shares * blocks * BLOCK).max() <= 1.0 + 1e-6


def test_visits_of_a_stratum_are_numbered_without_gaps() -> None:
    order = CaseOrder([alone("a", 3, 0.7), alone("b", 5, 2.0), alone("c", 2, 1e-3)], seed=0)
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for index in range(2 * BLOCK + 100):
        stratum, visit = order.draw(index)
        seen[stratum].append(visit)
    assert {number: visits == list(range(len(visits))) for number, visits in seen.items()} == {
        0: True,
        1: True,
        2: True,
    }


def test_a_sample_is_the_same_whatever_was_asked_before() -> None:
    strata = [alone("a", 3, 0.7), alone("b", 5, 2.0)]
    straight = CaseOrder(strata, seed=4)
    expected = {index: straight.case(index) for index in range(3 * BLOCK)}
    resumed = CaseOrder(strata, seed=4)
    for index in (2 * BLOCK + 17, 3, BLOCK, 3 * BLOCK - 1, 0):
        assert resumed.case(index) == expected[index]
    other = CaseOrder(strata, seed=5)
    assert [other.case(index) for index in range(50)] != [expected[i] for i in range(50)]


def test_square_root_rule_holds_within_one_percent_over_100_000_draws() -> None:
    sizes = {"large": 400, "middle": 100, "small": 4}
    members = {name: tuple((f"{name}{n}",) for n in range(size)) for name, size in sizes.items()}
    order = CaseOrder(weighted_strata(members, exponent=0.5, weights={}), seed=1)
    counts = Counter(order.strata[order.draw(index)[0]].name for index in range(100_000))
    for name, size in sizes.items():
        assert counts[name] / 100_000 == pytest.approx(size**0.5 / 32, rel=0.01)


def test_members_of_a_group_take_turns() -> None:
    order = CaseOrder([Stratum("s", 1.0, (("p1_a", "p1_b", "p1_c"), ("p2",)))], seed=0)
    drawn = [order.case(index) for index in range(60)]
    counts = Counter(drawn)
    assert counts == {"p1_a": 10, "p1_b": 10, "p1_c": 10, "p2": 30}
    firsts = [case for case in drawn if case != "p2"]
    assert all(len(set(firsts[3 * k : 3 * k + 3])) == 3 for k in range(10))


def test_groups_are_sorted_and_a_case_without_group_is_alone() -> None:
    assert group_cases(["c", "b", "a"], {"a": "p", "c": "p"}) == (("b",), ("a", "c"))


def test_weight_factors_leave_out_and_refuse_unknown_names() -> None:
    members = {"a": (("a1",), ("a2",)), "b": (("b1",),)}
    strata = weighted_strata(members, exponent=1.0, weights={"b": 4.0})
    assert [(s.name, s.weight) for s in strata] == [("a", 2.0), ("b", 4.0)]
    assert [s.name for s in weighted_strata(members, exponent=0.0, weights={"a": 0})] == ["b"]
    with pytest.raises(ConfigError, match="no case belongs to 'c'; there are a, b"):
        weighted_strata(members, exponent=1.0, weights={"c": 1.0})
    with pytest.raises(ConfigError, match="no case is left"):
        weighted_strata(members, exponent=1.0, weights={"a": 0, "b": 0})


def test_wrong_strata_are_refused() -> None:
    with pytest.raises(ValueError, match="no case"):
        Stratum("a", 1.0, ())
    with pytest.raises(ValueError, match="weight"):
        Stratum("a", 0.0, (("x",),))
    with pytest.raises(ValueError, match="different names"):
        CaseOrder([alone("a", 1), alone("a", 2)], seed=0)
