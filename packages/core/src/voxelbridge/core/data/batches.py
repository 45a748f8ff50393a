"""Training batches by step number: the same batches for any number of workers, from any step on."""

import atexit
import random
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from voxelbridge.core.errors import DataError, VoxelbridgeError

T = TypeVar("T")
MakeBatch = Callable[[int, np.random.Generator], T]

PREFETCHED_PER_WORKER = 2  # batches that wait while the model computes


class WorkerTracebackError(Exception):
    """Where in the worker an error arose; the cause of the error that the caller sees."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def step_batches(
    make_batch: MakeBatch[T],
    *,
    seed: int,
    first_step: int,
    steps: int,
    workers: int,
    rank: int = 0,
) -> Iterator[T]:
    """Yields `make_batch(step, rng)` for the steps first_step .. steps - 1, in order.

    The batch of a step depends on (seed, rank, step) alone: `rng` is derived from them, and the
    global streams of numpy, torch and Python are set from them around each call. With `workers` > 0
    the batches are made in forked processes while the caller computes, two per worker in advance;
    with 0 they are made here, and the caller's own global streams are left as they were.

    An error of `make_batch` arrives here as one line with the step (a VoxelbridgeError keeps its
    type and text, the case's name with it); a worker killed from outside is a DataError.
    """
    if not 0 <= first_step <= steps or workers < 0:
        raise ValueError(f"first_step {first_step}, steps {steps}, workers {workers}")
    source = _StepDataset(make_batch, seed, rank)
    if workers == 0:
        for step in range(first_step, steps):
            with _global_streams_restored():
                outcome = source[step]
            yield _value(outcome)
        return
    loader: DataLoader[_Made[T] | _Failure] = DataLoader(
        source,
        batch_size=None,
        sampler=range(first_step, steps),
        num_workers=min(workers, max(1, steps - first_step)),
        prefetch_factor=PREFETCHED_PER_WORKER,
        multiprocessing_context="fork",
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # or the loader would draw from the caller's torch stream
    )
    # The workers ignore SIGTERM, with which multiprocessing would end them at exit: whatever ends
    # this process, they are let go before that.
    running = [iter(loader)]
    atexit.register(running.clear)
    step = first_step
    try:
        for step in range(first_step, steps):  # noqa: B007 - the error names the step
            yield _value(next(running[0]))
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"batch of step {step}: a loader process was killed (out of memory?); "
            "use fewer workers or a smaller patch_size"
        ) from error
    finally:
        atexit.unregister(running.clear)
        running.clear()  # ends the workers now, not when the collector comes by


@dataclass(frozen=True)
class _Made(Generic[T]):
    value: T


@dataclass(frozen=True)
class _Failure:
    step: int
    kind: type[VoxelbridgeError]
    message: str
    trace: str


class _StepDataset(Dataset, Generic[T]):
    def __init__(self, make_batch: MakeBatch[T], seed: int, rank: int) -> None:
        self.make_batch = make_batch
        self.seed = seed
        self.rank = rank

    def __getitem__(self, step: int) -> "_Made[T] | _Failure":
        own, numpy_seed, torch_seed = np.random.SeedSequence([self.seed, self.rank, step]).spawn(3)
        random.seed(int(numpy_seed.generate_state(2)[1]))
        np.random.seed(numpy_seed.generate_state(1))  # noqa: NPY002, TID251 - libraries draw from it
        torch.manual_seed(int(torch_seed.generate_state(1, np.uint64)[0]) >> 1)
        try:
            return _Made(self.make_batch(step, np.random.default_rng(own)))
        except Exception as error:  # carried to the caller, where it is raised
            known = isinstance(error, VoxelbridgeError)
            return _Failure(
                step,
                type(error) if known else DataError,
                str(error) if known else f"{type(error).__name__}: {error}",
                traceback.format_exc(),
            )


def _value(outcome: "_Made[T] | _Failure") -> T:
    match outcome:
        case _Made(value):
            return value
        case _Failure():
            first_line = outcome.message.splitlines()[0] if outcome.message else "no reason given"
            error = outcome.kind(f"batch of step {outcome.step}: {first_line}")
            raise error from WorkerTracebackError(outcome.trace)


def _start_worker(_worker: int) -> None:
    # The training process alone decides when to stop: a signal to the whole process group must
    # reach it as "save and end", not as "a loader process was killed".
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _global_streams_restored() -> Iterator[None]:
    python_state = random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
