"""What a training will need, measured on its first steps: time, memory, disk."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")

GIB = 2**30
GB = 10**9
_UNITS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"))
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Estimate:
    """Measured figures of one optimizer step, and what the whole run makes of them."""

    step_seconds: float  # computing, the batch at hand
    wait_seconds: float  # waiting for the batch, its preparation where there are no workers
    steps: int  # of the whole run
    peak_bytes: int  # GPU: allocated by torch; CPU: of the whole process; the largest rank's
    state_bytes: int  # one training state
    kept: int = 1  # training states on the disk

    def describe(self) -> str:
        """One line for people."""
        kept = f" ({self.kept} kept)" if self.kept > 1 else ""
        return (
            f"one step {_seconds(self.step_seconds)} + {_seconds(self.wait_seconds)} waiting for "
            f"its batch, about {_duration(self.step_seconds * self.steps)} for {self.steps:,} "
            f"steps if loading keeps up; peak memory {self.peak_bytes / GIB:.1f} GiB; "
            f"state on disk {self.state_bytes * self.kept / GB:.2g} GB{kept}"
        )


class StepClock:
    """Times steps on `device` and the waiting for their batches."""

    def __init__(self, device: torch.device) -> None:
        self.waited = 0.0  # seconds in which `timed` waited, all steps together
        self._device = device

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """`batches`, with the time they take counted."""
        stream = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                batch = next(stream)
            except StopIteration:
                return
            finally:
                self.waited += time.perf_counter() - start
            yield batch

    def measured(self, results: Iterator[T]) -> Iterator[tuple[T, float, float]]:
        """Each of `results` with the seconds computed and waited for it; waits for the device."""
        while True:
            waited = self.waited
            start = time.perf_counter()
            try:
                result = next(results)
            except StopIteration:
                return
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            elapsed = time.perf_counter() - start
            waited = self.waited - waited
            yield result, elapsed - waited, waited


def reset_peak_memory(device: torch.device) -> None:
    """Starts a new measurement of the highest memory use, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        # Linux: the high-water mark of the resident set. A locked-down container may forbid it;
        # the peak then counts from the start of the process.
        with suppress(OSError):
            _CLEAR.write_text("5")


def peak_memory(device: torch.device) -> int:
    """Bytes used at most since `reset_peak_memory`: by torch on a GPU, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        if "VmHWM" in fields:
            return int(fields["VmHWM"].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def state_size(objective: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors in a training state, as it is after the first step."""
    return _nbytes(objective.state_dict()) + _nbytes(optimizer.state_dict())


def _nbytes(tree: Any) -> int:  # Any: a tree of dicts, sequences and leaves
    match tree:
        case Tensor():
            return tree.nbytes
        case Mapping():
            return sum(_nbytes(value) for value in tree.values())
        case list() | tuple():
            return sum(_nbytes(value) for value in tree)
        case _:
            return 0


def _seconds(value: float) -> str:
    return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"


def _duration(seconds: float) -> str:
    for length, unit in _UNITS:
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
