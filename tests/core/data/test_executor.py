"""Many cases in parallel: a bad one is told apart, the others arrive."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from voxelbridge.core.data.executor import AHEAD_PER_WORKER, Done, Failed, map_cases
from voxelbridge.core.errors import ConfigError, DataError


def _work(item: str) -> np.ndarray:
    match item:
        case "bad":
            raise DataError("case bad: no label")
        case "bug":
            raise ZeroDivisionError("division by zero")
        case "config":
            raise ConfigError("wrong setting")
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exits":
            os._exit(3)
        case "slow":
            time.sleep(0.3)
        case _:
            pass
    return np.full((300, 300), len(item))


def _lambda_result(item: str) -> object:
    return lambda: item


ITEMS = ["slow", "a", "bad", "killed", "bug", "config", "exits", "bb", "ccc"]


def test_dead_and_failing_cases_leave_the_others_alone() -> None:
    outcomes = list(map_cases(_work, ITEMS, workers=2, description="cases"))
    assert [outcome.item for outcome in outcomes] == ITEMS
    errors = {o.item: o.error for o in outcomes if isinstance(o, Failed)}
    values = {o.item: o.value for o in outcomes if isinstance(o, Done)}
    assert sorted(values) == ["a", "bb", "ccc", "slow"]
    assert (values["ccc"] == 3).all()
    assert str(errors["bad"]) == "case bad: no label"
    assert isinstance(errors["config"], ConfigError)
    assert str(errors["bug"]) == "bug: ZeroDivisionError: division by zero"
    assert "killed by SIGKILL" in str(errors["killed"])
    assert "ended with status 3" in str(errors["exits"])


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_order_and_results_do_not_depend_on_the_workers(workers: int) -> None:
    items = ["slow", "a", "bad", "bb"]
    outcomes = list(map_cases(_work, items, workers=workers, description="cases"))
    assert [o.item for o in outcomes] == items
    assert [isinstance(o, Done) for o in outcomes] == [True, True, False, True]


def test_outside_executor_is_used() -> None:
    with ThreadPoolExecutor(2) as executor:
        outcomes = list(
            map_cases(_work, ["slow", "a", "bad"], workers=0, description="x", executor=executor)
        )
    assert [type(o) for o in outcomes] == [Done, Done, Failed]


def test_executor_that_loses_a_case_reports_it() -> None:
    class Losing(ThreadPoolExecutor):
        def submit(self, function, /, *arguments, **options):
            return super().submit(_raise_runtime_error)

    with Losing(1) as executor:
        (outcome,) = map_cases(_work, ["a"], workers=0, description="x", executor=executor)
    assert isinstance(outcome, Failed)
    assert "lost by the executor" in str(outcome.error)


def _raise_runtime_error() -> None:
    raise RuntimeError("worker died")


def test_result_that_cannot_be_pickled_is_a_failure_of_its_case() -> None:
    (outcome,) = map_cases(_lambda_result, ["a"], workers=1, description="x")
    assert isinstance(outcome, Failed)
    assert "cannot be returned" in str(outcome.error)


def test_slow_case_bounds_how_far_the_others_run_ahead(tmp_path: Path) -> None:
    def work(item: int) -> int:
        if item == 0:
            time.sleep(0.6)
        else:
            (tmp_path / str(item)).touch()
        return len(list(tmp_path.iterdir()))

    first = next(map_cases(work, range(200), workers=2, description="x"))
    assert isinstance(first, Done)
    assert 1 <= first.value <= AHEAD_PER_WORKER * 2


def test_no_cases_give_nothing() -> None:
    assert list(map_cases(_work, [], workers=2, description="x")) == []


def test_cases_run_at_the_same_time() -> None:
    start = time.monotonic()
    list(map_cases(_work, ["slow"] * 6, workers=6, description="x"))
    assert time.monotonic() - start < 1.5


def _threads(item: int) -> int:
    return torch.get_num_threads()


def test_each_case_has_one_torch_thread() -> None:
    outcomes = list(map_cases(_threads, [0, 1], workers=2, description="x"))
    assert [o.value for o in outcomes if isinstance(o, Done)] == [1, 1]


def test_leaving_early_ends_the_processes() -> None:
    outcomes = map_cases(_work, ["a", *["slow"] * 5], workers=2, description="x")
    assert isinstance(next(outcomes), Done)
    outcomes.close()  # type: ignore[attr-defined]  # a generator behind the Iterator type


def test_progress_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    list(map_cases(_work, ["a", "bb"], workers=0, description="preparing"))
    captured = capsys.readouterr()
    assert "preparing: 2" in captured.out
    assert captured.err == ""
