"""Many cases in parallel: a bad one is told apart, the others arrive."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from voxelbridge.core.data.executor import (
    AHEAD_PER_WORKER,
    Done,
    Failed,
    isolated,
    map_cases,
)
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


def test_the_next_case_runs_while_the_caller_works_on_this_one(tmp_path: Path) -> None:
    def begin(item: str) -> str:
        (tmp_path / item).touch()
        return item

    begun = []
    for _ in map_cases(begin, ["a", "b", "c"], workers=1, description="cases"):
        end = time.monotonic() + 20
        while len(list(tmp_path.iterdir())) < min(len(begun) + 2, 3) and time.monotonic() < end:
            time.sleep(0.01)
        begun.append(sorted(path.name for path in tmp_path.iterdir()))
    assert begun == [["a", "b"], ["a", "b", "c"], ["a", "b", "c"]]


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


MEGABYTE = 1 << 20


def _hungry(megabytes: int) -> int:
    return int(np.ones(megabytes * MEGABYTE, dtype=np.uint8).sum())


@dataclass(frozen=True)
class _Case:
    case_id: str
    path: str = "/somewhere/long"


def test_case_that_needs_too_much_memory_ends_alone() -> None:
    outcomes = list(
        map_cases(_hungry, [1, 400, 2], workers=2, description="x", memory_limit=200 * MEGABYTE)
    )
    assert [type(outcome) for outcome in outcomes] == [Done, Failed, Done]
    assert isinstance(outcomes[1], Failed)
    assert "400: it needs more than 0.195 GiB of memory" in str(outcomes[1].error)


def test_case_that_takes_too_long_is_stopped_and_named_once() -> None:
    def work(case: _Case) -> str:
        if case.case_id == "slow":
            time.sleep(30)
        return case.case_id

    start = time.monotonic()
    items = [_Case("a"), _Case("slow"), _Case("b")]
    outcomes = list(map_cases(work, items, workers=1, description="x", timeout_s=0.5))
    assert time.monotonic() - start < 10
    assert [type(outcome) for outcome in outcomes] == [Done, Failed, Done]
    assert isinstance(outcomes[1], Failed)
    assert str(outcomes[1].error) == "case slow: took longer than 0.5 s and was stopped"


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT])
def test_crash_is_told_by_its_signal(number: signal.Signals) -> None:
    def work(item: str) -> None:
        os.kill(os.getpid(), number)

    (outcome,) = map_cases(work, ["a"], workers=1, description="x")
    assert isinstance(outcome, Failed)
    expected = f"a: its process crashed ({number.name}); the file is probably damaged"
    assert str(outcome.error) == expected


def test_error_of_several_lines_becomes_one() -> None:
    def work(item: str) -> None:
        raise RuntimeError("first\n  second")

    (outcome,) = map_cases(work, ["a"], workers=1, description="x")
    assert isinstance(outcome, Failed)
    assert str(outcome.error) == "a: RuntimeError: first second"


def test_isolated_call_gives_the_value_or_the_error() -> None:
    assert isolated(divmod, 7, 2) == (3, 1)
    with pytest.raises(DataError, match=r"^case bad: no label$"):
        isolated(_work, "bad")
    with pytest.raises(ConfigError):
        isolated(_work, "config")
    with pytest.raises(DataError, match=r"^ZeroDivisionError: division by zero$"):
        isolated(_work, "bug")
    with pytest.raises(DataError, match=r"^its process was killed by SIGKILL"):
        isolated(_work, "killed")
    with pytest.raises(DataError, match="of memory"):
        isolated(_hungry, 400, memory_limit=200 * MEGABYTE)
    with pytest.raises(DataError, match=r"longer than 0\.2 s"):
        isolated(time.sleep, 30, timeout_s=0.2)


def test_isolated_call_inside_a_case_works() -> None:
    def work(item: str) -> np.ndarray:
        return isolated(_work, item)

    outcomes = list(map_cases(work, ["a", "killed", "bb"], workers=2, description="x"))
    assert [type(outcome) for outcome in outcomes] == [Done, Failed, Done]


def test_memory_limit_leaves_the_caller_alone() -> None:
    isolated(_work, "a", memory_limit=10 * MEGABYTE)
    assert _hungry(50) == 50 * MEGABYTE


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel call exists on Linux only")
def test_children_of_a_killed_parent_end_too(tmp_path: Path) -> None:
    program = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from voxelbridge.core.data.executor import isolated\n"
        "def work(path):\n"
        "    Path(path).write_text(str(os.getpid()))\n"
        "    time.sleep(60)\n"
        "isolated(work, sys.argv[1])\n"
    )
    noted = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", program, str(noted)])
    until = time.monotonic() + 30
    while not (noted.exists() and noted.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    child = int(noted.read_text())
    parent.kill()
    parent.wait()
    until = time.monotonic() + 5
    while _runs(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _runs(child)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
