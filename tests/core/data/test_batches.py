"""Batches by step number: determinism, errors, killed workers, overlap."""

import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from voxelbridge.core.data.batches import step_batches
from voxelbridge.core.data.case_store import CaseStore, CaseStoreWriter
from voxelbridge.core.data.patches import uniform_start
from voxelbridge.core.data.volume import Grid
from voxelbridge.core.errors import CheckpointError, DataError


@dataclass
class Batch:
    step: int
    own: torch.Tensor
    numpy_global: float
    torch_global: torch.Tensor
    python_global: float


def _draw(step: int, rng: np.random.Generator) -> Batch:
    return Batch(
        step,
        torch.from_numpy(rng.normal(size=3)),
        float(np.random.rand()),  # noqa: NPY002 - the global stream is the subject
        torch.rand(2),
        random.random(),
    )


def _key(batch: Batch) -> tuple[object, ...]:
    return (
        batch.step,
        *batch.own.tolist(),
        batch.numpy_global,
        *batch.torch_global.tolist(),
        batch.python_global,
    )


def _keys(*, seed: int = 7, first: int = 0, steps: int = 6, workers: int = 0, rank: int = 0):
    return [
        _key(batch)
        for batch in step_batches(
            _draw, seed=seed, first_step=first, steps=steps, workers=workers, rank=rank
        )
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(workers: int) -> None:
    assert _keys(workers=workers) == _keys(workers=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_resumed_at_a_step_equal_the_tail(workers: int) -> None:
    assert _keys(first=4, workers=workers) == _keys()[4:]


def test_all_streams_differ_between_steps_ranks_and_seeds() -> None:
    rows = [*_keys(workers=2), *_keys(rank=1, workers=2), *_keys(seed=8, workers=2)]
    for column in range(1, len(rows[0])):
        assert len({row[column] for row in rows}) == len(rows)


@pytest.mark.parametrize("workers", [0, 2])
def test_callers_global_streams_are_left_alone(workers: int) -> None:
    def streams() -> tuple[float, ...]:
        return float(np.random.rand()), float(torch.rand(())), random.random()  # noqa: NPY002

    np.random.seed(3)  # noqa: NPY002, TID251
    torch.manual_seed(3)
    random.seed(3)
    expected = streams()
    np.random.seed(3)  # noqa: NPY002, TID251
    torch.manual_seed(3)
    random.seed(3)
    _keys(workers=workers)
    assert streams() == expected


def test_nothing_is_left_to_do_at_the_last_step() -> None:
    assert _keys(first=6, workers=2) == []
    assert _keys(first=6, workers=0) == []


def test_wrong_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="first_step"):
        _keys(first=7)
    with pytest.raises(ValueError, match="workers"):
        _keys(workers=-1)


@pytest.mark.parametrize("workers", [0, 2])
def test_error_in_a_batch_names_step_and_case_in_one_line(workers: int) -> None:
    def make(step: int, rng: np.random.Generator) -> int:
        if step == 3:
            raise CheckpointError("case LIDC-0421: file changed\nsecond line")
        return step

    batches = step_batches(make, seed=0, first_step=0, steps=9, workers=workers)
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(CheckpointError) as caught:
        next(batches)
    assert str(caught.value) == "batch of step 3: case LIDC-0421: file changed"


def test_programming_error_in_a_worker_keeps_its_traceback_as_cause() -> None:
    def make(step: int, rng: np.random.Generator) -> int:
        return 1 // step

    with pytest.raises(DataError, match="step 0: ZeroDivisionError") as caught:
        list(step_batches(make, seed=0, first_step=0, steps=2, workers=1))
    assert "return 1 // step" in str(caught.value.__cause__)


def test_killed_worker_ends_in_an_error() -> None:
    def make(step: int, rng: np.random.Generator) -> int:
        if step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return step

    start = time.monotonic()
    with pytest.raises(DataError, match="loader process was killed"):
        list(step_batches(make, seed=0, first_step=0, steps=9, workers=2))
    assert time.monotonic() - start < 30


def test_signals_to_the_process_group_do_not_end_the_workers() -> None:
    def make(step: int, rng: np.random.Generator) -> int:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(os.getpid(), number)
        return step

    assert list(step_batches(make, seed=0, first_step=0, steps=4, workers=2)) == [0, 1, 2, 3]


def test_workers_end_when_the_caller_stops_early() -> None:
    def make(step: int, rng: np.random.Generator) -> int:
        return os.getpid()

    batches = step_batches(make, seed=0, first_step=0, steps=100, workers=2)
    workers = {next(batches) for _ in range(4)}
    assert os.getpid() not in workers
    batches.close()  # type: ignore[attr-defined]  # a generator behind the Iterator type
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_batches_are_made_while_the_caller_computes() -> None:
    pause = 0.1

    def make(step: int, rng: np.random.Generator) -> int:
        time.sleep(pause)
        return step

    start = time.monotonic()
    for _ in step_batches(make, seed=0, first_step=0, steps=12, workers=1):
        time.sleep(pause)
    assert time.monotonic() - start < 12 * 2 * pause * 0.85  # one after the other takes 2.4 s


def test_patches_from_a_store_in_forked_workers(tmp_path: Path) -> None:
    writer = CaseStoreWriter(tmp_path, patch_size=(16, 16, 16))
    image = np.random.default_rng(0).normal(size=(1, 40, 40, 40)).astype(np.float32)
    writer.write_case(
        "a", image, grid=Grid.from_parts((40, 40, 40), (1, 1, 1)), boxes=[], labels=[]
    )
    writer.finish()
    store = CaseStore.open(tmp_path)
    store.read_image("a")  # blosc2 has worked in this process before the fork

    def make(step: int, rng: np.random.Generator) -> torch.Tensor:
        start = uniform_start(rng, (40, 40, 40), (16, 16, 16))
        return torch.from_numpy(store.read_patch("a", start, (16, 16, 16)))

    here = list(step_batches(make, seed=1, first_step=0, steps=8, workers=0))
    there = list(step_batches(make, seed=1, first_step=0, steps=8, workers=2))
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
