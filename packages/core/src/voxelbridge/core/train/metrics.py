"""Means of losses between two log records, and the `metrics.jsonl` file they go to."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.core.files import atomic_write
from voxelbridge.core.train.distributed import World

Record = dict[str, float]


class Meter:
    """Running means of named values; sums stay on the values' device until they are read.

    The mean of a name is over the additions in which it occurred (the loss of a data set: over the
    steps that had a patch of it). Sums are float64 and travel in the training state, so that a
    killed and resumed run writes the same means as an undisturbed one.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Adds one set of scalars; the names may differ from one addition to the next."""
        for name, value in values.items():
            term = value.detach().double()
            self._sums[name] = self._sums[name] + term if name in self._sums else term
            self._counts[name] = self._counts.get(name, 0) + 1

    def means(self, world: World) -> Record:
        """Means over all additions of all ranks since the last reset (one device sync)."""
        return mean_of_meters(world.gather(self.state()))

    def reset(self) -> None:
        """Forgets everything added so far."""
        self._sums, self._counts = {}, {}

    def state(self) -> dict[str, Any]:  # Any: JSON-like tree
        """Sums and counts by name as plain numbers; reading them waits for the device once."""
        values = torch.stack(list(self._sums.values())).tolist() if self._sums else []
        sums = dict(zip(self._sums, values, strict=True))
        return {"sums": sums, "counts": dict(self._counts)}

    def load_state(self, state: Mapping[str, Any]) -> None:  # Any: as `state` gives it
        """Continues from what `state` returned."""
        self._counts = {name: int(count) for name, count in state["counts"].items()}
        self._sums = {
            name: torch.tensor(value, dtype=torch.float64) for name, value in state["sums"].items()
        }


def mean_of_meters(states: list[dict[str, Any]]) -> Record:  # Any: as `Meter.state` gives it
    """Means over several ranks' `Meter.state()`; empty when nothing was added."""
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for state in states:
        for name, value in state["sums"].items():
            sums[name] = sums.get(name, 0.0) + value
            counts[name] = counts.get(name, 0) + state["counts"][name]
    return {name: sums[name] / counts[name] for name in sums}


class MetricsFile:
    """Appends one JSON object per logged step; a torn last line of a killed run is cut off.

    After a resume a step can occur twice: its last record counts. After a restart the steps begin
    at 0 again, in records that say which `attempt` they are of.
    """

    def __init__(self, path: Path) -> None:
        _cut_torn_tail(path)
        self._path = path
        self._stream = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, float]) -> None:
        """Appends one record and hands it to the operating system."""
        line = json.dumps(dict(record), allow_nan=False) + "\n"
        try:
            self._stream.write(line)
            self._stream.flush()
        except OSError as error:
            raise DataError(f"{self._path}: cannot be written ({error.strerror})") from error

    def flush_to_disk(self) -> None:
        """Waits until the records are on the disk; a state saved afterwards never outruns them."""
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()


class TensorBoard:
    """The same records as TensorBoard scalars, for whoever installed the `track` extra."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "--tensorboard: tensorboard is not installed; install voxelbridge-core[track]"
            ) from error
        self._writer = SummaryWriter(str(folder))

    def write(self, record: Mapping[str, float]) -> None:
        """Adds every value of one record at its step."""
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(record["step"]))

    def add_picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        """Adds a picture (H, W, 3)."""
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Writes what is pending and closes the file."""
        self._writer.close()


def read_metrics(path: Path) -> list[Record]:
    """The records of a `metrics.jsonl`, the last one of each step, in the order of the steps.

    Of a run that was restarted, those of the attempt that it was last in (`read_attempts`: all).
    """
    attempts = read_attempts(path)
    return attempts[-1] if attempts else []


def read_attempts(path: Path) -> list[list[Record]]:
    """As `read_metrics` for every attempt of a run, in their order; one where none was restarted.

    An attempt after the one that the last line is of was taken back and is left out.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        attempts: dict[int, dict[int, Record]] = {}
        last = 0
        for record in map(json.loads, lines):
            last = int(record.get("attempt", 0))
            attempts.setdefault(last, {})[record["step"]] = record
        return [
            [record for _, record in sorted(records.items())]
            for attempt, records in sorted(attempts.items())
            if attempt <= last
        ]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a metrics file ({error})") from error


def _cut_torn_tail(path: Path) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    while lines and not _is_record(lines[-1]):
        lines.pop()
    whole = b"".join(lines)
    if whole != content:
        with atomic_write(path) as temporary:
            temporary.write_bytes(whole)


def _is_record(line: bytes) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
