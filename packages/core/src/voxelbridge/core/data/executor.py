"""One function over many cases in parallel; a case that fails or dies never takes others down."""

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

import torch

from voxelbridge.core.errors import DataError, VoxelbridgeError
from voxelbridge.core.progress import track

A = TypeVar("A")
R = TypeVar("R")

AHEAD_PER_WORKER = 8  # cases past the slowest: bounds how many results wait for their turn
OUTSIDE_WORKERS = 64  # submissions in flight when an outside executor does the work


@dataclass(frozen=True)
class Done(Generic[A, R]):
    """A case that worked and what the function returned."""

    item: A
    value: R


@dataclass(frozen=True)
class Failed(Generic[A]):
    """A case that failed, and why: a VoxelbridgeError as raised, others by type and text."""

    item: A
    error: VoxelbridgeError


def map_cases(
    function: Callable[[A], R],
    items: Iterable[A],
    *,
    workers: int,
    description: str,
    executor: Executor | None = None,
) -> Iterator[Done[A, R] | Failed[A]]:
    """Yields the outcome of `function(item)` for every item, in the order of `items`.

    Each case runs in a process of its own (at most `workers` at once, one torch thread each), so a
    crash, a kill or a leak of memory ends with its case. `workers=0` runs in this process. With
    `executor` (dask's, for instance) the cases are submitted there instead. `function` and its
    results must be picklable; results wait in memory until their turn.
    """
    listed = list(items)
    if executor is not None:
        finished = _with_executor(function, listed, executor)
    elif workers == 0:
        finished = ((n, _attempt(function, item)) for n, item in enumerate(listed))
    else:
        finished = _with_processes(function, listed, workers)
    waiting: dict[int, Done[A, R] | Failed[A]] = {}
    due = 0
    for number, outcome in track(finished, description=description, total=len(listed)):
        waiting[number] = outcome
        while due in waiting:
            yield waiting.pop(due)
            due += 1


def _attempt(function: Callable[[A], R], item: A) -> Done[A, R] | Failed[A]:
    try:
        return Done(item, function(item))
    except VoxelbridgeError as error:
        return Failed(item, error)
    except Exception as error:  # reported with its case; the other cases go on
        return Failed(item, DataError(f"{item}: {type(error).__name__}: {error}"))


def _with_processes(
    function: Callable[[A], R], items: list[A], workers: int
) -> Iterator[tuple[int, Done[A, R] | Failed[A]]]:
    # Forked, because the function and its data need then no import and no copy in the child.
    context = multiprocessing.get_context("fork")
    running: dict[Connection, tuple[int, BaseProcess]] = {}
    upcoming = 0
    try:
        while True:
            slowest = min((number for number, _ in running.values()), default=upcoming)
            last = min(len(items), slowest + AHEAD_PER_WORKER * workers)
            while len(running) < workers and upcoming < last:
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=_run_case, args=(function, items[upcoming], sender)
                )
                process.start()
                sender.close()  # or the end of a dead child would never be seen
                running[receiver] = (upcoming, process)
                upcoming += 1
            if not running:
                return
            for ready in wait_for_any(list(running)):
                assert isinstance(ready, Connection)
                number, process = running.pop(ready)
                yield number, _collect(items[number], ready, process)
    finally:
        for _, process in running.values():
            process.kill()
            process.join()


def _run_case(function: Callable[[A], R], item: A, sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)  # the cases are the parallelism; forked thread pools would hang
    outcome = _attempt(function, item)
    try:
        sender.send(outcome)
    except Exception as error:  # what cannot be pickled is a failure of this case
        sender.send(Failed(item, DataError(f"{item}: result cannot be returned: {error}")))


def _collect(item: A, receiver: Connection, process: BaseProcess) -> "Done[A, Any] | Failed[A]":
    try:
        outcome = receiver.recv()
    except EOFError:
        outcome = None
    receiver.close()
    process.join()
    if outcome is not None:
        return outcome
    code = process.exitcode or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    hint = "; out of memory? use fewer workers" if code == -signal.SIGKILL else ""
    return Failed(item, DataError(f"{item}: its process {how}{hint}"))


def _with_executor(
    function: Callable[[A], R], items: list[A], executor: Executor
) -> Iterator[tuple[int, Done[A, R] | Failed[A]]]:
    running: dict[Future[Done[A, R] | Failed[A]], int] = {}
    remaining = iter(enumerate(items))
    while True:
        while len(running) < OUTSIDE_WORKERS and (following := next(remaining, None)) is not None:
            number, item = following
            running[executor.submit(_attempt, function, item)] = number
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            number = running.pop(future)
            error = future.exception()
            if error is None:
                yield number, future.result()
            else:  # the executor lost the case (a worker died)
                lost = DataError(f"{items[number]}: lost by the executor: {error}")
                yield number, Failed(items[number], lost)
