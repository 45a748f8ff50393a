import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelbridge.core.config import validate
from voxelbridge.core.errors import ConfigError
from voxelbridge.core.train.schedule import (
    FrozenPhase,
    PolySchedule,
    due,
    frozen_parts_at,
    learning_rate_at,
)


def test_poly_without_warmup_follows_the_formula() -> None:
    schedule = PolySchedule(steps=1000)
    for step in (0, 1, 250, 999):
        expected = 1e-2 * (1 - step / 1000) ** 0.9
        assert learning_rate_at(schedule, step, peak=1e-2) == pytest.approx(expected, rel=1e-12)


def test_poly_counts_from_the_end_of_the_warmup() -> None:
    # nnDetection measured: 4,000 warm-up steps of 125,000, step 60,000 has 5.716e-3
    schedule = PolySchedule(steps=125_000, warmup_steps=4_000)
    assert learning_rate_at(schedule, 4_000, peak=1e-2) == 1e-2
    assert learning_rate_at(schedule, 60_000, peak=1e-2) == pytest.approx(5.716e-3, rel=1e-4)


def test_warmup_climbs_linearly_from_the_ramp_start() -> None:
    schedule = PolySchedule(steps=100, warmup_steps=10)
    assert learning_rate_at(schedule, 0, peak=1e-2) == 1e-6
    assert learning_rate_at(schedule, 5, peak=1e-2) == pytest.approx((1e-6 + 1e-2) / 2)


def test_frozen_phase_has_its_own_ramp_before_the_warmup() -> None:
    frozen = FrozenPhase(steps=20, parts=("encoder",))
    schedule = PolySchedule(steps=100, warmup_steps=10, frozen=frozen)
    rates = [learning_rate_at(schedule, step, peak=1.0) for step in range(100)]
    assert rates[0] == rates[20] == 1e-6
    assert rates[19] == pytest.approx(19 / 20, rel=1e-5)
    assert rates[30] == 1.0
    assert frozen_parts_at(schedule, 19) == ("encoder",)
    assert frozen_parts_at(schedule, 20) == ()


@given(steps=st.integers(1, 500), data=st.data(), peak=st.floats(1e-8, 10), power=st.floats(0.1, 3))
@settings(deadline=None, max_examples=50)
def test_rate_is_positive_and_never_above_the_peak(
    steps: int, data: st.DataObject, peak: float, power: float
) -> None:
    warmup = data.draw(st.integers(0, steps - 1))
    schedule = PolySchedule(steps=steps, warmup_steps=warmup, power=power)
    for step in range(steps):
        assert 0 < learning_rate_at(schedule, step, peak=peak) <= peak


@pytest.mark.parametrize(
    "tree",
    [
        {"steps": 10, "warmup_steps": 10},
        {"steps": 10, "frozen": {"steps": 10, "parts": ["encoder"]}},
        {"steps": 10, "warmup_steps": 5, "frozen": {"steps": 5, "parts": ["encoder"]}},
    ],
)
def test_phases_that_take_the_whole_run_are_refused(tree: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="take all 10 steps"):
        validate(PolySchedule, tree, where="x.toml")


def test_due_counts_finished_steps() -> None:
    assert [step for step in range(10) if due(4, step)] == [3, 7]
