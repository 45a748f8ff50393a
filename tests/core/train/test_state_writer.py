from collections import OrderedDict
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from torch import nn

from voxelbridge.core.errors import DataError
from voxelbridge.core.train import state_writer
from voxelbridge.core.train.resume import TrainingState, load_state, save_state, stored_states
from voxelbridge.core.train.state_writer import StateWriter


class HeldBack:
    """Lets `save_state` begin only after `go`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = Event()
        self.begun = Event()
        monkeypatch.setattr(state_writer, "save_state", self)

    def __call__(self, *arguments: Any, **named: Any) -> None:
        self.begun.set()
        assert self.go.wait(10)
        save_state(*arguments, **named)


def state(step: int, weight: torch.Tensor) -> TrainingState:
    buffers: dict[str, Any] = {"state": {0: {"momentum_buffer": weight}}, "param_groups": [{}]}
    return TrainingState(step, {"weight": weight}, buffers, [{"sums": {}, "counts": {}}])


def test_snapshot_is_not_changed_by_what_comes_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldBack(monkeypatch)
    weight = torch.full((3,), 1.0)
    with StateWriter(tmp_path) as writer:
        saved = state(1, weight)
        writer.save(saved)
        weight.fill_(2.0)
        saved.optimizer["param_groups"][0]["lr"] = 5.0
        held.go.set()
    loaded = load_state(tmp_path)
    assert loaded is not None
    assert loaded.model["weight"].tolist() == [1.0, 1.0, 1.0]
    assert loaded.optimizer["state"][0]["momentum_buffer"].tolist() == [1.0, 1.0, 1.0]
    assert loaded.optimizer["param_groups"] == [{}]


def test_next_save_waits_for_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldBack(monkeypatch)
    held.go.set()
    weight = torch.zeros(3)
    with StateWriter(tmp_path, keep=9) as writer:
        for step in range(1, 6):
            writer.save(state(step, weight))
            weight += 1
    assert [s.step for s in stored_states(tmp_path)] == [5, 4, 3, 2, 1]
    for stored in stored_states(tmp_path):
        tree = torch.load(tmp_path / stored.file, weights_only=True)  # noqa: TID251
        assert tree["model"]["weight"].tolist() == [stored.step - 1.0] * 3


def test_layout_and_versions_of_a_module_are_kept(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4))
    module.to(memory_format=torch.channels_last_3d)  # pyright: ignore[reportCallIssue] torch's stubs miss it
    with StateWriter(tmp_path) as writer:
        writer.save(TrainingState(1, module.state_dict(), {}, []))
    loaded = load_state(tmp_path)
    assert loaded is not None
    assert isinstance(loaded.model, OrderedDict)
    assert loaded.model["0.weight"].stride() == module.get_parameter("0.weight").stride()
    assert vars(loaded.model)["_metadata"] == vars(module.state_dict())["_metadata"]
    torch.testing.assert_close(dict(loaded.model), dict(module.state_dict()), rtol=0, atol=0)


def test_values_that_appear_later_or_change_their_shape_are_written(tmp_path: Path) -> None:
    with StateWriter(tmp_path) as writer:
        for step, tree in enumerate(({}, {"a": torch.ones(2)}, {"a": torch.ones(3)}), start=1):
            writer.save(TrainingState(step, tree, {}, []))
    loaded = load_state(tmp_path)
    assert loaded is not None
    assert loaded.model["a"].tolist() == [1.0, 1.0, 1.0]


def test_records_are_flushed_before_the_state(tmp_path: Path) -> None:
    seen: list[int] = []

    def before() -> None:
        seen.append(len(stored_states(tmp_path)))

    with StateWriter(tmp_path, before=before) as writer:
        writer.save(state(1, torch.zeros(1)))
    assert seen == [0]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
    ],
)
def test_failure_is_raised_once_and_the_state_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    writer = StateWriter(tmp_path)
    writer.save(state(1, torch.zeros(1)))
    writer.wait()

    def fail(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", fail)
        writer.save(state(2, torch.zeros(1)))
        with pytest.raises(DataError, match=r"state-00000002\.pt: cannot be written"):
            writer.wait()
    writer.raise_if_failed()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["state-00000001.pt", "state.json"]
    loaded = load_state(tmp_path)
    assert loaded is not None
    assert loaded.step == 1
    writer.save(state(3, torch.zeros(1)))
    writer.wait()
    assert [s.step for s in stored_states(tmp_path)] == [3]


def test_asking_for_failures_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = HeldBack(monkeypatch)
    with StateWriter(tmp_path) as writer:
        writer.save(state(1, torch.zeros(1)))
        assert held.begun.wait(10)
        writer.raise_if_failed()
        assert stored_states(tmp_path) == []
        held.go.set()
    assert len(stored_states(tmp_path)) == 1


@pytest.mark.gpu
def test_snapshot_of_a_gpu_is_of_the_moment_of_the_save(tmp_path: Path) -> None:
    weight = torch.ones(2**26, device="cuda")
    with StateWriter(tmp_path) as writer:
        for step in range(1, 4):
            writer.save(state(step, weight))
            weight += 1  # in the same stream, behind the copy
    loaded = load_state(tmp_path)
    assert loaded is not None
    assert loaded.model["weight"].unique().tolist() == [3.0]
