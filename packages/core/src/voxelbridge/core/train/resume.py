"""Training state on disk, and signals that ask for it.

Layout: RUN/checkpoints/state-STEP.pt (what torch.save writes) and RUN/checkpoints/state.json
(`schema`, `step`, `file`, `sha256`). state.json is replaced last and names the file that counts, so
a process killed at any moment leaves the previous state or the new one. The hash is verified
before anything is read.

Signals: SIGTERM and SIGUSR1 end the training after the step in progress, with the state saved and
exit status 0 (a batch system's notice that time is up; the same command goes on). The first Ctrl-C
does the same with exit status 130; a second one stops at once, without saving.
"""

import hashlib
import io
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from voxelbridge.core.errors import CheckpointError
from voxelbridge.core.files import (
    atomic_write,
    read_json,
    remove_partial_files,
    sha256_of,
    write_json,
)

STATE_SCHEMA = 1
POINTER = "state.json"
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@dataclass(frozen=True)
class TrainingState:
    """Everything a run needs to go on exactly where it was."""

    step: int  # finished optimizer steps = the next step's number
    model: dict[str, Any]  # Any: state_dict of the objective, its heads included
    optimizer: dict[str, Any]  # Any: the optimizer's state_dict
    meters: list[dict[str, Any]]  # Any: `Meter.state()` of every rank


def save_state(folder: Path, state: TrainingState) -> None:
    """Writes `state` to `folder`, then removes the previous one."""
    target = folder / f"state-{state.step:08d}.pt"
    with atomic_write(target) as temporary:
        torch.save(vars(state), temporary)
        digest = sha256_of(temporary)
    pointer = {"schema": STATE_SCHEMA, "step": state.step, "file": target.name, "sha256": digest}
    write_json(folder / POINTER, pointer)
    _remove_others(folder, target.name)


def load_state(folder: Path) -> TrainingState | None:
    """The state in `folder`, tensors on the CPU; None where none was ever completed.

    A changed, missing or newer file is a CheckpointError.
    """
    if not (folder / POINTER).exists():
        return None
    pointer = _read_pointer(folder / POINTER)
    path = folder / pointer["file"]
    advice = "restore the file from a backup, or delete the folder of the run to start again"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); {advice}") from error
    if hashlib.sha256(content).hexdigest() != pointer["sha256"]:
        raise CheckpointError(f"{path}: changed or damaged since it was saved; {advice}")
    try:
        tree = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)  # noqa: TID251
        return TrainingState(**tree)
    except Exception as error:  # torch.load fails with ten kinds of exceptions
        raise CheckpointError(f"{path}: not a training state ({error}); {advice}") from error


def remove_leftovers(folder: Path) -> None:
    """Deletes what a killed process left half-done in `folder` (by the owner of the run only)."""
    remove_partial_files(folder)
    pointer = folder / POINTER
    _remove_others(folder, _read_pointer(pointer)["file"] if pointer.exists() else "")


class StopRequest:
    """Whether and by which signal this process was asked to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @property
    def is_set(self) -> bool:
        """Whether a signal has arrived."""
        return self.signal is not None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Inside the block SIGTERM, SIGUSR1 and the first Ctrl-C only set the yielded request.

    Processes forked inside the block (data workers) keep the usual meaning of SIGTERM and ignore
    the other two: their parent tells them when to stop.
    """
    request = StopRequest()
    owner = os.getpid()

    def handle(number: int, _: FrameType | None) -> None:
        received = signal.Signals(number)
        if os.getpid() != owner:
            if received is signal.SIGTERM:
                os._exit(128 + number)
            return
        if received is signal.SIGINT and request.signal is signal.SIGINT:
            raise KeyboardInterrupt
        request.signal = received

    previous = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _read_pointer(path: Path) -> dict[str, Any]:  # Any: checked JSON
    pointer = read_json(path)
    if not isinstance(pointer, dict) or pointer.get("schema") != STATE_SCHEMA:
        schema = pointer.get("schema") if isinstance(pointer, dict) else None
        raise CheckpointError(f"{path}: schema {schema}, this version reads {STATE_SCHEMA}")
    keys_are_there = {"file", "sha256", "step"} <= pointer.keys()
    if not keys_are_there or Path(pointer["file"]).name != pointer["file"]:
        raise CheckpointError(f"{path}: expected step, file and sha256 of a state in this folder")
    return pointer


def _remove_others(folder: Path, kept: str) -> None:
    for path in folder.glob("state-*.pt"):
        if path.name != kept:
            path.unlink(missing_ok=True)
