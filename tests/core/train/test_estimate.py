import mmap
import time
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from voxelbridge.core.train.estimate import (
    Estimate,
    StepClock,
    peak_memory,
    reset_peak_memory,
    state_size,
)

CPU = torch.device("cpu")


def test_line_of_the_paper_scale() -> None:
    estimate = Estimate(
        1.9, 0.1, 1_000_000, peak_bytes=int(17.3 * 2**30), state_bytes=820_000_000, kept=1
    )
    assert estimate.describe() == (
        "one step 1.9 s + 0.1 s waiting for its batch, about 22 days for 1,000,000 steps if "
        "loading keeps up; peak memory 17.3 GiB; state on disk 0.82 GB"
    )


@pytest.mark.parametrize(
    ("seconds", "steps", "text"),
    [
        (0.05, 60, "3 s for 60"),
        (0.5, 600, "5 minutes"),
        (1.0, 36000, "10 hours"),
        (25, 9000, "3 d"),
    ],
)
def test_unit_of_the_duration_fits_its_length(seconds: float, steps: int, text: str) -> None:
    line = Estimate(seconds, 0.0, steps, peak_bytes=0, state_bytes=1, kept=3).describe()
    assert f"about {text}" in line
    assert line.endswith("(3 kept)")


def test_waiting_and_computing_are_told_apart() -> None:
    clock = StepClock(CPU)

    def batches() -> Iterator[int]:
        for number in range(2):
            time.sleep(0.05)
            yield number

    def results() -> Iterator[int]:
        for number in clock.timed(batches()):
            time.sleep(0.02)
            yield number

    measured = list(clock.measured(results()))
    assert [result for result, _, _ in measured] == [0, 1]
    for _, computed, waited in measured:
        assert waited >= 0.05
        assert computed >= 0.02
    assert clock.waited == pytest.approx(sum(waited for _, _, waited in measured), abs=0.01)


def test_peak_memory_counts_what_is_gone_again() -> None:
    reset_peak_memory(CPU)
    before = peak_memory(CPU)
    with mmap.mmap(-1, 200 * 2**20) as pages:  # malloc may have so much at hand already
        for _ in range(200):
            pages.write(bytes(2**20))
    assert peak_memory(CPU) - before > 150 * 2**20


def test_state_size_is_what_the_tensors_take() -> None:
    module = nn.Linear(10, 10)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    assert state_size(module, optimizer) == 440
    module(torch.ones(1, 10)).sum().backward()
    optimizer.step()
    assert state_size(module, optimizer) == 880
