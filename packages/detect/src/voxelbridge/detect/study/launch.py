"""Where the processes of jobs run: on this machine, or on the workers of a dask cluster."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from voxelbridge.core.data.cluster import LOCAL, open_executor
from voxelbridge.detect.study.markers import LOG

PERFORM = "voxelbridge.detect.study.perform"


class Launcher(Protocol):
    """Starts the process of a job; the future holds its exit status."""

    slots: int | None  # jobs at once; None: as many as the executor takes

    def start(self, folder: Path) -> "Future[int]": ...

    def terminate(self) -> None:
        """Asks the processes to save and end, where that is not done by the stop file."""
        ...

    def kill(self) -> None:
        """Ends the processes at once."""
        ...


class LocalLauncher:
    """Processes of this machine, in the group of this one: a signal to the group meets all."""

    def __init__(self, pool: Executor, slots: int, gpus: tuple[str, ...]) -> None:
        self.slots: int | None = slots
        self._pool = pool
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._free_gpus = list(gpus)

    def start(self, folder: Path) -> "Future[int]":
        """One thread waits for the process."""
        return self._pool.submit(self._run, folder)

    def terminate(self) -> None:
        """SIGTERM to all."""
        with self._lock:
            for process in self._processes:
                process.terminate()

    def kill(self) -> None:
        """SIGKILL to all."""
        with self._lock:
            for process in self._processes:
                process.kill()

    def _run(self, folder: Path) -> int:
        with self._lock:
            gpu = self._free_gpus.pop(0) if self._free_gpus else None
        command = _command(folder)
        if gpu is not None:  # by `env`, so that this process's environment is handed on as it is
            command = ["env", f"CUDA_VISIBLE_DEVICES={gpu}", *command]
        try:
            with (folder / LOG).open("ab") as log:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
                )
            with self._lock:
                self._processes.add(process)
            try:
                return process.wait()
            finally:
                with self._lock:
                    self._processes.discard(process)
        finally:
            if gpu is not None:
                with self._lock:
                    self._free_gpus.append(gpu)


class ExecutorLauncher:
    """Processes of an executor's workers, which see the same folders under the same paths."""

    def __init__(self, executor: Executor) -> None:
        self.slots: int | None = None
        self._executor = executor

    def start(self, folder: Path) -> "Future[int]":
        """One task of the executor."""
        return self._executor.submit(run_process, str(folder))

    def terminate(self) -> None:
        """Nothing: the workers' processes watch the stop file."""

    def kill(self) -> None:
        """Nothing: they are not ours."""


@contextmanager
def open_launcher(executor: str, *, jobs: int, gpus: tuple[str, ...] = ()) -> Iterator[Launcher]:
    """The launcher of "local" or "dask:ADDRESS"."""
    if executor == LOCAL:
        slots = len(gpus) or jobs
        with ThreadPoolExecutor(max_workers=slots) as pool:
            yield LocalLauncher(pool, slots, gpus)
        return
    with open_executor(executor) as opened:
        assert opened is not None
        yield ExecutorLauncher(opened)


def run_process(folder: str) -> int:
    """Does the job of `folder` in a process of its own, waits, and returns its exit status."""
    with (Path(folder) / LOG).open("ab") as log:
        done = subprocess.run(
            _command(Path(folder)), stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    return done.returncode


def _command(folder: Path) -> list[str]:
    return [sys.executable, "-m", PERFORM, str(folder)]
