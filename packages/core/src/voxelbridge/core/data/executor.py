"""One function over many cases in parallel; a case that fails or dies never takes others down.

Every case runs in a forked process of its own, which may use so much memory and so much time. A
decoder that crashes on a strange file, or eats memory, ends that process and costs one line.
"""

import ctypes
import faulthandler
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from typing import Any, Generic, TypeVar

from threadpoolctl import threadpool_limits

from voxelbridge.core.errors import DataError, VoxelbridgeError
from voxelbridge.core.progress import track

A = TypeVar("A")
R = TypeVar("R")

# Address space that a case may add. A CT of 1024 x 1024 x 1200 voxels needs 16 GiB for the stored
# integers, three float32 copies and the compressed result; twice that would be a machine's all.
DEFAULT_MEMORY_LIMIT = 24 << 30
DEFAULT_TIMEOUT_S = 1800.0  # the largest CT takes a minute or two
AHEAD_PER_WORKER = 8  # cases past the slowest: bounds how many results wait for their turn
OUTSIDE_WORKERS = 64  # submissions in flight when an outside executor does the work
LOOK_EVERY_S = 1.0  # how soon a child is missed whose pipe is still held open by another process
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)


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
    memory_limit: int | None = DEFAULT_MEMORY_LIMIT,
    timeout_s: float | None = DEFAULT_TIMEOUT_S,
) -> Iterator[Done[A, R] | Failed[A]]:
    """Yields the outcome of `function(item)` for every item, in the order of `items`.

    Each case runs in a process of its own (at most `workers` at once, one torch thread each), so a
    crash, a kill or a leak of memory ends with its case, and so does one that adds more than
    `memory_limit` bytes of address space or runs longer than `timeout_s`. `workers=0` runs in this
    process, without limits. With `executor` (dask's, for instance) the cases are submitted there
    and run in such processes below its workers; then `function` must be picklable. Results always
    must be; they wait in memory until their turn.
    """
    listed = list(items)
    limits = _Limits(memory_limit, timeout_s)
    if executor is not None:
        finished = _with_executor(function, listed, executor, limits)
    elif workers == 0:
        finished = ((n, _attempt(function, item)) for n, item in enumerate(listed))
    else:
        finished = _with_processes(function, listed, workers, limits)
    waiting: dict[int, Done[A, R] | Failed[A]] = {}
    due = 0
    for number, outcome in track(finished, description=description, total=len(listed)):
        waiting[number] = outcome
        while due in waiting:
            yield waiting.pop(due)
            due += 1


def isolated(
    function: Callable[..., R],
    *arguments: Any,  # Any: whatever the function takes
    memory_limit: int | None = DEFAULT_MEMORY_LIMIT,
    timeout_s: float | None = DEFAULT_TIMEOUT_S,
) -> R:
    """`function(*arguments)` computed in a forked process with limits, as in `map_cases`.

    Raises what the function raised if that is a VoxelbridgeError, else a DataError: another
    exception by type and text, a crash by its signal, a limit by its value. It does not name the
    file; the caller does.
    """
    call = _Call(function, arguments)
    outcome = _attempt_isolated(call, "", _Limits(memory_limit, timeout_s))
    if isinstance(outcome, Failed):
        raise outcome.error
    return outcome.value


@dataclass(frozen=True)
class _Limits:
    memory: int | None  # bytes of address space beyond those of the parent
    seconds: float | None


@dataclass(frozen=True)
class _Call(Generic[R]):
    """A call with all its arguments, as a function of the (empty) item."""

    function: Callable[..., R]
    arguments: tuple[Any, ...]

    def __call__(self, _item: str) -> R:
        return self.function(*self.arguments)


@dataclass
class _Child(Generic[A]):
    """A running case: its process and the end of the pipe on which the outcome arrives."""

    item: A
    pid: int
    receiver: Connection
    limits: _Limits
    deadline: float | None  # on the monotonic clock
    status: int | None = None  # exit code, or minus the signal, once it was reaped

    def has_ended(self) -> bool:
        """Whether the process is over; reaps it then."""
        if self.status is None:
            self._reap(os.WNOHANG)
        return self.status is not None

    def end(self) -> None:
        """Kills the process if it still runs, and lets go of it."""
        if not self.has_ended():
            os.kill(self.pid, signal.SIGKILL)
            self._reap(0)
        self.receiver.close()

    def _reap(self, options: int) -> None:
        try:
            pid, status = os.waitpid(self.pid, options)
        except ChildProcessError:  # the surrounding program ignores SIGCHLD
            self.status = 0
            return
        if pid == self.pid:
            self.status = os.waitstatus_to_exitcode(status)


def _attempt(
    function: Callable[[A], R], item: A, limits: _Limits | None = None
) -> Done[A, R] | Failed[A]:
    try:
        return Done(item, function(item))
    except VoxelbridgeError as error:
        return Failed(item, error)
    except MemoryError:
        limit = limits and limits.memory
        bound = f"more than {limit / (1 << 30):.3g} GiB" if limit else "more than there is"
        return _failed(item, f"it needs {bound} of memory; damaged, or too large for this machine")
    except Exception as error:  # reported with its case; the other cases go on
        return _failed(item, f"{type(error).__name__}: {error}")


def _attempt_isolated(
    function: Callable[[A], R], item: A, limits: _Limits
) -> Done[A, R] | Failed[A]:
    child = _start(function, item, limits)
    try:
        while (outcome := _outcome_of(child)) is None:
            wait_for_any([child.receiver], timeout=_patience([child]))
    finally:
        child.end()
    return outcome


def _failed(item: A, what: str) -> Failed[A]:
    """A failure in one line that names the case once."""
    name = f"case {item.case_id}" if hasattr(item, "case_id") else str(item)  # type: ignore[attr-defined]
    text = " ".join(what.split())
    return Failed(item, DataError(f"{name}: {text}" if name else text))


def _with_processes(
    function: Callable[[A], R], items: list[A], workers: int, limits: _Limits
) -> Iterator[tuple[int, Done[A, R] | Failed[A]]]:
    running: dict[int, _Child[A]] = {}  # by the number of the item
    upcoming = 0

    def start() -> None:
        nonlocal upcoming
        slowest = min(running, default=upcoming)
        last = min(len(items), slowest + AHEAD_PER_WORKER * workers)
        while len(running) < workers and upcoming < last:
            running[upcoming] = _start(function, items[upcoming], limits)
            upcoming += 1

    try:
        while True:
            start()
            if not running:
                return
            children = list(running.values())
            wait_for_any([child.receiver for child in children], timeout=_patience(children))
            for number, child in list(running.items()):
                if (outcome := _outcome_of(child)) is not None:
                    del running[number]
                    child.end()
                    start()  # the next case runs while the caller works on this one
                    yield number, outcome
    finally:
        for child in running.values():
            child.end()


def _start(function: Callable[[A], R], item: A, limits: _Limits) -> _Child[A]:
    # Forked, because the function and its data need then no import and no copy in the child; by
    # os.fork, because multiprocessing refuses children to a daemon, which dask's workers are.
    receiver, sender = Pipe(duplex=False)
    sys.stdout.flush()  # or the child would write what waits there once more
    sys.stderr.flush()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            receiver.close()
            _run_case(function, item, sender, limits, parent)
            status = 0
        finally:
            os._exit(status)
    sender.close()  # or the end of a dead child would never be seen
    deadline = None if limits.seconds is None else time.monotonic() + limits.seconds
    return _Child(item, pid, receiver, limits, deadline)


def _run_case(
    function: Callable[[A], R], item: A, sender: Connection, limits: _Limits, parent: int
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _die_with(parent)
    _use_one_thread()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is told in one line by the parent
    faulthandler.disable()
    if limits.memory is not None:
        _limit_memory(limits.memory)
    outcome = _attempt(function, item, limits)
    try:
        sender.send(outcome)
    except Exception as error:  # what cannot be pickled is a failure of this case
        sender.send(_failed(item, f"result cannot be returned: {error}"))
    sys.stdout.flush()
    sys.stderr.flush()


def _use_one_thread() -> None:
    """The cases are the parallelism; and forked thread pools would hang."""
    threadpool_limits(1)
    if (torch := sys.modules.get("torch")) is not None:  # importing it here would cost seconds
        torch.set_num_threads(1)


def _die_with(parent: int) -> None:
    """Lets the kernel end this process when its parent is killed (Linux; elsewhere it runs on)."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it was killed before the call
        os._exit(1)


def _limit_memory(budget: int) -> None:
    statm = Path("/proc/self/statm")
    if not statm.exists():  # only Linux tells the size, and only Linux keeps to the limit
        return
    now = int(statm.read_text().split()[0]) * resource.getpagesize()
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    known = [limit for limit in (before, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([now + budget, *known]), hard))


def _patience(children: Iterable[_Child[Any]]) -> float:
    """Seconds to wait before the children are looked at again."""
    now = time.monotonic()
    left = [child.deadline - now for child in children if child.deadline is not None]
    return max(0.0, min([LOOK_EVERY_S, *left]))


def _outcome_of(child: _Child[A]) -> "Done[A, Any] | Failed[A] | None":
    """The outcome of a child that sent it, died or took too long; None while it works."""
    ended = child.has_ended()  # asked first: what it sent before its end is in the pipe by then
    if child.receiver.poll():
        try:
            return child.receiver.recv()
        except (EOFError, OSError):
            child.end()  # it died before it sent all
        except Exception as error:  # a result that can be packed but not unpacked
            return _failed(child.item, f"result cannot be returned: {error}")
    elif not ended:
        if child.deadline is None or time.monotonic() < child.deadline:
            return None
        return _failed(child.item, f"took longer than {child.limits.seconds:g} s and was stopped")
    return _failed(child.item, f"its process {_cause_of_death(child)}")


def _cause_of_death(child: _Child[Any]) -> str:
    code = child.status or 0
    if code >= 0:
        return f"ended with status {code}"
    number = signal.Signals(-code)
    if number in CRASHES:
        return f"crashed ({number.name}); the file is probably damaged"
    hint = "; out of memory? use fewer workers" if number == signal.SIGKILL else ""
    return f"was killed by {number.name}{hint}"


def _with_executor(
    function: Callable[[A], R], items: list[A], executor: Executor, limits: _Limits
) -> Iterator[tuple[int, Done[A, R] | Failed[A]]]:
    running: dict[Future[Done[A, R] | Failed[A]], int] = {}
    upcoming = 0
    try:
        while True:
            slowest = min(running.values(), default=upcoming)
            last = min(len(items), slowest + AHEAD_PER_WORKER * OUTSIDE_WORKERS)
            while len(running) < OUTSIDE_WORKERS and upcoming < last:
                future = executor.submit(_attempt_isolated, function, items[upcoming], limits)
                running[future] = upcoming
                upcoming += 1
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                number = running.pop(future)
                error = future.exception()
                if error is None:
                    yield number, future.result()
                else:  # the executor lost the case (a worker died)
                    yield number, _failed(items[number], f"lost by the executor: {error}")
    finally:
        for future in running:
            future.cancel()
