"""Where cases run: specs that cannot be meant, and a real cluster that loses a worker."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from voxelbridge.core.data.case_store import CaseStore, CaseStoreWriter
from voxelbridge.core.data.cluster import open_executor
from voxelbridge.core.data.executor import Done, Failed, map_cases
from voxelbridge.core.data.volume import Grid
from voxelbridge.core.errors import ConfigError, DataError

SHAPE = (1, 24, 24, 24)


def test_local_means_no_executor() -> None:
    with open_executor("local") as executor:
        assert executor is None


@pytest.mark.parametrize("spec", ["", "dask", "dask:", "dask: ", "ray:host", "LOCAL", "tcp://h:1"])
def test_unknown_spec_is_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match="expected 'local' or 'dask:ADDRESS'"):
        open_executor(spec).__enter__()


def test_missing_dask_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ConfigError, match=r"voxelbridge-core\[cluster\]"):
        open_executor("dask:tcp://localhost:8786").__enter__()


@pytest.mark.slow
@pytest.mark.parametrize("address", ["tcp://127.0.0.1:{port}", "nonsense://x", "a:b:c"])
def test_unreachable_scheduler_is_one_line_in_time(address: str) -> None:
    pytest.importorskip("distributed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = time.monotonic()
    with pytest.raises(DataError, match="no dask scheduler answers") as caught:
        open_executor(f"dask:{address.format(port=port)}").__enter__()
    assert time.monotonic() - start < 20
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_worker_killed_in_mid_run_costs_no_case(tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    cases = [f"case{number:02d}" for number in range(16)]
    alone = tmp_path / "alone"
    for case in cases:
        write_noise(CaseStoreWriter(alone), case)
    CaseStoreWriter(alone).finish()
    shared_store = tmp_path / "cluster"
    with _cluster(tmp_path, num_workers=2) as (address, workers), open_executor(address) as pool:
        assert pool is not None
        killer = threading.Thread(target=_kill_when, args=(shared_store / "cases", workers[0]))
        killer.start()
        outcomes = list(
            map_cases(
                partial(_slow_noise, CaseStoreWriter(shared_store)),
                cases,
                workers=0,
                description="cluster",
                executor=pool,
            )
        )
        killer.join()
        assert workers[0].poll() == -signal.SIGKILL
        assert workers[1].poll() is None
    assert [outcome.item for outcome in outcomes] == cases
    assert [str(outcome.error) for outcome in outcomes if isinstance(outcome, Failed)] == []
    CaseStoreWriter(shared_store).finish()
    assert CaseStore.open(shared_store).digest == CaseStore.open(alone).digest


@pytest.mark.slow
def test_case_that_kills_its_process_does_not_kill_the_workers(tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    with _cluster(tmp_path, num_workers=1) as (address, workers), open_executor(address) as pool:
        outcomes = list(
            map_cases(
                _poison, ["a", "crash", "b", "hang"], workers=0, description="x", executor=pool,
                timeout_s=2.0,
            )
        )  # fmt: skip
        assert workers[0].poll() is None
    assert [type(outcome) for outcome in outcomes] == [Done, Failed, Done, Failed]
    errors = [str(outcome.error) for outcome in outcomes if isinstance(outcome, Failed)]
    assert errors[0] == "crash: its process crashed (SIGSEGV); the file is probably damaged"
    assert errors[1] == "hang: took longer than 2 s and was stopped"


def write_noise(writer: CaseStoreWriter, case_id: str) -> None:
    """One case whose content depends on its name alone."""
    image = np.random.default_rng(int(case_id[-2:])).normal(size=SHAPE).astype(np.float32)
    grid = Grid.from_parts(SHAPE[1:], (1.0, 1.0, 1.0))
    writer.write_case(case_id, image, grid=grid, boxes=[], labels=[])


def _slow_noise(writer: CaseStoreWriter, case_id: str) -> None:
    time.sleep(0.3)
    write_noise(writer, case_id)


def _poison(item: str) -> str:
    match item:
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "hang":
            time.sleep(60)
        case _:
            pass
    return item


def _kill_when(folder: Path, worker: "subprocess.Popen[bytes]") -> None:
    """Kills the worker once a few cases are done, so that others are on it."""
    until = time.monotonic() + 40
    while time.monotonic() < until and len(list(folder.glob("*.json"))) < 4:
        time.sleep(0.05)
    worker.kill()
    worker.wait()


@contextlib.contextmanager
def _cluster(
    folder: Path, *, num_workers: int
) -> Iterator[tuple[str, list["subprocess.Popen[bytes]"]]]:
    """A scheduler and workers as processes of their own, gone when the block ends."""
    described = folder / "scheduler.json"
    processes: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str) -> None:
        with (folder / f"{arguments[0]}{len(processes)}.log").open("wb") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "distributed.cli.dask_" + arguments[0], *arguments[1:]],
                    cwd=Path(__file__).parents[3],  # where workers import this module from
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )

    try:
        start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
              "--scheduler-file", str(described))  # fmt: skip
        for _ in range(num_workers):
            start("worker", "--scheduler-file", str(described), "--no-nanny", "--nthreads", "1",
                  "--no-dashboard", "--local-directory", str(folder))  # fmt: skip
        yield f"dask:{_address_of(described, processes)}", processes[1:]
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def _address_of(described: Path, processes: list["subprocess.Popen[bytes]"]) -> str:
    from distributed import Client

    until = time.monotonic() + 40
    while not described.exists() and time.monotonic() < until:
        assert processes[0].poll() is None, described.parent
        time.sleep(0.1)
    address = json.loads(described.read_text())["address"]
    with Client(address, timeout=20, set_as_default=False) as client:
        client.wait_for_workers(len(processes) - 1, timeout=40)
    return address
