import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from voxelbridge.core.errors import CheckpointError
from voxelbridge.core.files import sha256_of
from voxelbridge.core.train.resume import (
    TrainingState,
    load_state,
    remove_leftovers,
    save_state,
    stop_on_signals,
    stored_states,
)


def state(step: int) -> TrainingState:
    optimizer = {"state": {0: {"momentum_buffer": torch.full((3,), 0.5)}}, "param_groups": []}
    meters = [{"sums": {"total": 0.1}, "counts": {"total": 2}}]
    return TrainingState(step, {"weight": torch.full((3,), float(step))}, optimizer, meters)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_state_is_read_back_as_it_was(tmp_path: Path) -> None:
    save_state(tmp_path, state(5))
    loaded = load_state(tmp_path)
    assert loaded is not None
    assert loaded.step == 5
    assert loaded.meters == state(5).meters
    torch.testing.assert_close(loaded.model, state(5).model, rtol=0, atol=0)
    momentum = loaded.optimizer["state"][0]["momentum_buffer"]
    assert torch.equal(momentum, torch.full((3,), 0.5))


def test_only_the_newest_state_is_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_state(tmp_path, state(step))
    assert names(tmp_path) == ["state-00000003.pt", "state.json"]


def test_the_newest_states_are_kept_and_named_with_their_hashes(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_state(tmp_path, state(step), keep=3)
    kept = ["state-00000004.pt", "state-00000003.pt", "state-00000002.pt"]
    assert names(tmp_path) == [*sorted(kept), "state.json"]
    stored = stored_states(tmp_path)
    assert [(s.step, s.file) for s in stored] == list(zip((4, 3, 2), kept, strict=True))
    assert all(s.sha256 == sha256_of(tmp_path / s.file) for s in stored)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [*sorted(kept), "state.json"]


def test_damaged_newest_state_names_the_older_one_which_is_taken_once_it_is_deleted(
    tmp_path: Path,
) -> None:
    for step in (1, 2, 3):
        save_state(tmp_path, state(step), keep=2)
    newest = tmp_path / "state-00000003.pt"
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"delete it: the run then .* state-00000002\.pt"):
        load_state(tmp_path)
    newest.unlink()
    loaded = load_state(tmp_path)
    assert loaded is not None
    assert loaded.step == 2
    save_state(tmp_path, state(3), keep=2)
    assert [s.step for s in stored_states(tmp_path)] == [3, 2]


def test_no_state_is_none(tmp_path: Path) -> None:
    assert load_state(tmp_path) is None
    assert load_state(tmp_path / "missing") is None


@pytest.mark.parametrize("position", [0.001, 0.3, 0.6, 0.999])
def test_one_flipped_bit_is_found(tmp_path: Path, position: float) -> None:
    save_state(tmp_path, state(5))
    path = tmp_path / "state-00000005.pt"
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"state-00000005\.pt: changed or damaged"):
        load_state(tmp_path)


def test_missing_state_file_is_named(tmp_path: Path) -> None:
    save_state(tmp_path, state(5))
    (tmp_path / "state-00000005.pt").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_state(tmp_path)


def test_file_outside_the_folder_is_refused(tmp_path: Path) -> None:
    save_state(tmp_path, state(5))
    pointer = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps({**pointer, "file": "../state-00000005.pt"}))
    with pytest.raises(CheckpointError, match="states in this folder"):
        load_state(tmp_path)


def test_newer_schema_is_refused(tmp_path: Path) -> None:
    save_state(tmp_path, state(5))
    pointer = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps({**pointer, "schema": 3}))
    with pytest.raises(CheckpointError, match="schema 3, this version reads 2"):
        load_state(tmp_path)


def test_pickled_code_does_not_run(tmp_path: Path) -> None:
    import hashlib

    save_state(tmp_path, state(5))
    path = tmp_path / "state-00000005.pt"
    marker = tmp_path / "ran"
    hostile = f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()
    path.write_bytes(hostile)
    pointer = json.loads((tmp_path / "state.json").read_text())
    pointer["sha256"] = hashlib.sha256(hostile).hexdigest()
    (tmp_path / "state.json").write_text(json.dumps(pointer))
    with pytest.raises(CheckpointError, match="not a training state"):
        load_state(tmp_path)
    assert not marker.exists()


class KilledError(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("point", range(1, 6))
def test_killed_at_any_point_of_a_save_leaves_a_readable_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: int
) -> None:
    # The points are the renames and deletions of a save, before and after each.
    save_state(tmp_path, state(1))
    count = 0

    def counted(original):
        def call(self, *args, **kwargs):
            nonlocal count
            if self.name.startswith((".partial", "state-0")):
                count += 1
                if count == point:
                    raise KilledError
            return original(self, *args, **kwargs)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", counted(Path.replace))
        patched.setattr(Path, "unlink", counted(Path.unlink))
        try:
            save_state(tmp_path, state(2))
            finished = True
        except KilledError:
            finished = False
    remove_leftovers(tmp_path)
    loaded = load_state(tmp_path)
    assert loaded is not None
    assert loaded.step in ((2,) if finished else (1, 2))
    assert names(tmp_path) == [f"state-{loaded.step:08d}.pt", "state.json"]


def test_kill_points_cover_the_whole_save(tmp_path: Path) -> None:
    assert not finished_save_needs_more_than(tmp_path, 5)


def finished_save_needs_more_than(folder: Path, points: int) -> bool:
    calls = 0
    originals = Path.replace, Path.unlink

    def replace(self, target):
        nonlocal calls
        calls += 1
        return originals[0](self, target)

    def unlink(self, missing_ok=False):
        nonlocal calls
        calls += 1
        return originals[1](self, missing_ok=missing_ok)

    save_state(folder, state(1))
    patch = pytest.MonkeyPatch()
    patch.setattr(Path, "replace", replace)
    patch.setattr(Path, "unlink", unlink)
    save_state(folder, state(2))
    patch.undo()
    return calls > points


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signal_only_sets_the_request(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert not stop.is_set
        os.kill(os.getpid(), number)
        assert stop.is_set
        assert stop.signal == number
    assert signal.getsignal(number) is before


def test_second_interrupt_stops_at_once() -> None:
    with stop_on_signals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_forked_worker_dies_of_sigterm_and_ignores_the_others() -> None:
    code = """
import os, signal, time
from voxelbridge.core.train.resume import stop_on_signals
def sleeping_child(seconds):
    ready, started = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(started, b".")
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.05)
        os._exit(7)
    os.read(ready, 1)
    return child
def status(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
with stop_on_signals() as stop:
    child = sleeping_child(0.5)
    os.kill(child, signal.SIGUSR1)
    os.kill(child, signal.SIGINT)
    assert status(child) == 7
    child = sleeping_child(30)
    os.kill(child, signal.SIGTERM)
    assert status(child) == 128 + signal.SIGTERM
    assert not stop.is_set
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)
