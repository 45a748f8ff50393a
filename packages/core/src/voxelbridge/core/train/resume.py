"""Training state on disk, and signals that ask for it.

Layout: RUN/checkpoints/state-STEP.pt (what torch.save writes; state-STEP-restart-N.pt after the
N-th restart) and RUN/checkpoints/state.json (`schema`, `step`, `file`, `sha256`, `attempt`, and the
same of the `older` states that are kept, newest first). state.json is replaced last and names the
files that count, so a process killed at any moment leaves the previous state or the new one. The
hash is verified before anything is read. A damaged newest state is an error that names the older
one; whoever deletes the damaged file goes on from that one.

Signals: SIGTERM and SIGUSR1 end the training after the step in progress, with the state saved and
exit status 0 (a batch system's notice that time is up; the same command goes on). The first Ctrl-C
does the same with exit status 130; a second one stops at once, without saving.
"""

import hashlib
import io
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from voxelbridge.core.errors import CheckpointError, DataError
from voxelbridge.core.files import (
    atomic_write,
    read_json,
    remove_partial_files,
    sha256_of,
    write_json,
)

STATE_SCHEMA = 2
POINTER = "state.json"
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@dataclass(frozen=True)
class TrainingState:
    """Everything a run needs to go on exactly where it was."""

    step: int  # finished optimizer steps = the next step's number
    model: dict[str, Any]  # Any: state_dict of the objective, its heads included
    optimizer: dict[str, Any]  # Any: the optimizer's state_dict
    meters: list[dict[str, Any]]  # Any: `Meter.state()` of every rank
    attempt: int = 0  # restarts so far; `step` counts from the last one
    averaging: dict[str, Any] = field(default_factory=dict)  # Any: `Averager.state()`
    watches: list[dict[str, Any]] = field(default_factory=list)  # Any: `RestartWatch.state()`s


@dataclass(frozen=True)
class StoredState:
    """One state that `state.json` names; `step` is `TrainingState.step`."""

    step: int
    file: str
    sha256: str
    attempt: int = 0  # `TrainingState.attempt`


def save_state(folder: Path, state: TrainingState, *, keep: int = 1) -> None:
    """Writes `state` to `folder`, then removes all but the `keep` newest; DataError if it cannot.

    What was there before stays valid until the new state is complete.
    """
    older = stored_states(folder)
    # Each attempt has its names: a state that counts is never written over by another one.
    restarted = f"-restart-{state.attempt}" if state.attempt else ""
    target = folder / f"state-{state.step:08d}{restarted}.pt"
    with atomic_write(target) as temporary:
        try:
            torch.save(vars(state), temporary)
        except RuntimeError as error:  # torch's writer does not tell what the system said
            reason = str(error).splitlines()[0]
            raise DataError(f"{target}: cannot be written, is the disk full? ({reason})") from error
        digest = sha256_of(temporary)
    newest = StoredState(state.step, target.name, digest, state.attempt)
    now = (state.attempt, state.step)
    kept = [s for s in older if (s.attempt, s.step) < now and (folder / s.file).exists()]
    older = kept[: keep - 1]
    pointer = {"schema": STATE_SCHEMA, **asdict(newest), "older": [asdict(s) for s in older]}
    write_json(folder / POINTER, pointer)
    _remove_others(folder, [newest, *older])


def load_state(folder: Path) -> TrainingState | None:
    """The newest state in `folder`, tensors on the CPU; None where none was ever completed.

    A changed or newer file is a CheckpointError. One that was deleted is passed over for the next
    older state that is kept; if none is left, that is a CheckpointError too.
    """
    states = stored_states(folder)
    if not states:
        return None
    present = [state for state in states if (folder / state.file).exists()]
    newest, *older = present or states
    advice = "restore the file from a backup, or delete the folder of the run to start again"
    if older:
        advice = (
            f"restore the file from a backup, or delete it: the run then goes on from "
            f"{older[0].file}"
        )
    path = folder / newest.file
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); {advice}") from error
    if hashlib.sha256(content).hexdigest() != newest.sha256:
        raise CheckpointError(f"{path}: changed or damaged since it was saved; {advice}")
    try:
        tree = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)  # noqa: TID251
        return TrainingState(**tree)
    except Exception as error:  # torch.load fails with ten kinds of exceptions
        raise CheckpointError(f"{path}: not a training state ({error}); {advice}") from error


def stored_states(folder: Path) -> list[StoredState]:
    """What `state.json` in `folder` names, newest first; empty where there is none."""
    pointer = folder / POINTER
    return _read_pointer(pointer) if pointer.exists() else []


def remove_leftovers(folder: Path) -> None:
    """Deletes what a killed process left half-done in `folder` (by the owner of the run only)."""
    remove_partial_files(folder)
    _remove_others(folder, stored_states(folder))


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


def _read_pointer(path: Path) -> list[StoredState]:
    pointer = read_json(path)
    if not isinstance(pointer, dict) or pointer.get("schema") != STATE_SCHEMA:
        schema = pointer.get("schema") if isinstance(pointer, dict) else None
        raise CheckpointError(f"{path}: schema {schema}, this version reads {STATE_SCHEMA}")
    try:
        states = [
            StoredState(entry["step"], entry["file"], entry["sha256"], entry.get("attempt", 0))
            for entry in (pointer, *pointer["older"])
        ]
        inside = all(Path(state.file).name == state.file for state in states)
    except (KeyError, TypeError):
        inside, states = False, []
    if not inside:
        raise CheckpointError(f"{path}: expected step, file and sha256 of states in this folder")
    return states


def _remove_others(folder: Path, kept: Sequence[StoredState]) -> None:
    names = {state.file for state in kept}
    for path in folder.glob("state-*.pt"):
        if path.name not in names:
            path.unlink(missing_ok=True)
