"""A training of a few linear layers through `open_training`: resumed, stopped, killed.

This file is also the program that is killed:

    python test_loop.py RUN STEPS [KEY=JSON ...]

`slow_write=SECONDS` lets every state take that long between its bytes and its name.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.core.files import sha256_of
from voxelbridge.core.train import resume
from voxelbridge.core.train.distributed import World, join_world
from voxelbridge.core.train.loop import Training, open_training, report_stop
from voxelbridge.core.train.metrics import read_metrics
from voxelbridge.core.train.optim import SGD, build_optimizer
from voxelbridge.core.train.placement import place_objective
from voxelbridge.core.train.schedule import PolySchedule
from voxelbridge.core.train.settings import TrainingSettings


class Objective(nn.Module):
    """Two heads over one trunk; where `absent` is set a batch uses one of them."""

    def __init__(self, *, absent: bool = False) -> None:
        super().__init__()
        self.absent_parts = absent
        self.trunk = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3))
        self.heads = nn.ModuleDict({"a": nn.Linear(16, 1), "b": nn.Linear(16, 1)})

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        features = self.trunk(batch["x"])
        names = [batch["head"]] if self.absent_parts else list(self.heads)
        losses = {name: self.heads[name](features).square().mean() for name in names}
        return {"total": torch.stack(list(losses.values())).sum(), **losses}


def settings(steps: int, **changed: Any) -> TrainingSettings:
    values: dict[str, Any] = {
        "patch_size": (1, 1, 1),
        "batch_size": 4,
        "schedule": PolySchedule(steps=steps),
        "optim": SGD(lr=1e-2, momentum=0.9),
        "log_every_steps": 3,
        "checkpoint_every_steps": 4,
    }
    return TrainingSettings(**(values | changed))


def batches(training: Training, rank: int, *, pause: float) -> Iterator[dict[str, Any]]:
    for number in range(training.first_pass, training.passes):
        time.sleep(pause)
        generator = torch.Generator().manual_seed(10 * number + rank)
        yield {"x": torch.randn(2, 8, generator=generator), "head": "ab"[(number + rank) % 2]}


def train(
    run: Path,
    config: TrainingSettings,
    *,
    world: World,
    absent: bool = False,
    pause: float = 0.0,
    dry_run: bool = False,
    stop: resume.StopRequest | None = None,
) -> tuple[Objective, Training]:
    torch.manual_seed(0)
    objective = Objective(absent=absent)
    place_objective(objective, config, world.device)
    optimizer = build_optimizer(config.optim, objective)
    with open_training(
        run, config, kind="toy", world=world, stop=stop or resume.StopRequest(),
        objective=objective, optimizer=optimizer, facts={}, arguments={}, dry_run=dry_run,
    ) as training:  # fmt: skip
        for _ in training.steps(batches(training, world.rank, pause=pause)):
            pass
    return objective, training


WORLD = World(torch.device("cpu"))
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def states(run: Path) -> list[int]:
    return [state.step for state in resume.stored_states(run / "checkpoints")]


def test_run_in_two_parts_equals_a_run_in_one(tmp_path: Path) -> None:
    stop = resume.StopRequest()
    whole, _ = train(tmp_path / "whole", settings(12), world=WORLD)

    class StopAtFive(resume.StopRequest):
        asked = 0

        @property
        def is_set(self) -> bool:
            self.asked += 1
            return self.asked == 5

    config = settings(12)
    _, first = train(tmp_path / "parts", config, world=WORLD, stop=StopAtFive())
    assert (first.next_step, first.is_finished) == (5, False)
    assert states(tmp_path / "parts") == [5]
    parts, second = train(tmp_path / "parts", config, world=WORLD, stop=stop)
    assert second.first_step == 5
    assert second.is_finished
    records = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts")]
    assert records[0] == records[1]
    torch.testing.assert_close(parts.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_losses_of_some_steps_only_are_recorded_and_resumed(tmp_path: Path) -> None:
    train(tmp_path / "run", settings(9), world=WORLD, absent=True)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [set(record) >= {"a", "b", "loss"} for record in records] == [True] * 3


def test_keep_checkpoints_keeps_the_newest_states(tmp_path: Path) -> None:
    train(tmp_path, settings(14, keep_checkpoints=3), world=WORLD)
    assert states(tmp_path) == [14, 12, 8]


def test_minutes_between_states_are_kept_by_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def clock() -> float:
        return now

    monkeypatch.setattr("voxelbridge.core.train.loop.time.monotonic", clock)
    config = settings(10, checkpoint_every_steps=1000, checkpoint_every_minutes=1.5)
    torch.manual_seed(0)
    objective = Objective()
    optimizer = build_optimizer(config.optim, objective)
    saved = []
    with open_training(
        tmp_path, config, kind="toy", world=WORLD, stop=resume.StopRequest(), objective=objective,
        optimizer=optimizer, facts={}, arguments={},
    ) as training:  # fmt: skip
        for result in training.steps(batches(training, 0, pause=0)):
            now += 31.0  # seconds
            assert training._files is not None
            training._files.states.wait()
            saved.append((result.step, states(tmp_path)))
    # 90 seconds are over after steps 2, 5 and 8; the next step sees the state.
    assert saved[3] == (3, [3])
    assert saved[6] == (6, [6])
    assert saved[9] == (9, [9])
    assert states(tmp_path) == [10]


def test_state_that_cannot_be_written_ends_the_run_in_one_line_and_keeps_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = torch.save, 0

    def full_disk(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OSError(28, "No space left on device")
        original(*arguments)

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(DataError, match=r"state-00000008\.pt: .*No space left"):
        train(tmp_path, settings(100), world=WORLD, pause=0.002)
    assert states(tmp_path) == [4]
    files = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert files == ["state-00000004.pt", "state.json"]


def test_failed_last_state_does_not_hide_the_error_that_ended_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full_disk(*_: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full_disk)
    objective = Objective()
    config = settings(100)
    optimizer = build_optimizer(config.optim, objective)

    def crash() -> None:
        with open_training(
            tmp_path, config, kind="toy", world=WORLD, stop=resume.StopRequest(),
            objective=objective, optimizer=optimizer, facts={}, arguments={},
        ) as training:  # fmt: skip
            for result in training.steps(batches(training, 0, pause=0)):
                if result.step == 4:  # the state of step 4 is on its way
                    raise ConfigError("from the body")

    with pytest.raises((ConfigError, DataError)) as caught:
        crash()
    if isinstance(caught.value, ConfigError):
        assert "the last training state was not saved: " in capsys.readouterr().out
    else:  # the thread was faster than the step
        assert "is the disk full?" in str(caught.value)


def test_dry_run_measures_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(1_000_000, keep_checkpoints=2)
    _, training = train(tmp_path / "run", config, world=WORLD, dry_run=True, pause=0.05)
    assert not (tmp_path / "run").exists()
    assert not training.is_finished
    assert training.next_step == 2
    estimate = training.estimate
    assert estimate is not None
    numbers = sum(p.numel() for p in Objective().parameters())
    assert estimate.state_bytes == 2 * 4 * numbers  # weights and momentum
    assert 0.05 <= estimate.wait_seconds < 0.5
    assert 0 < estimate.step_seconds < 0.5
    assert estimate.peak_bytes > 50 * 2**20  # torch alone
    out = capsys.readouterr().out
    assert "for 1,000,000 steps" in out
    assert "(2 kept)" in out


def test_waiting_for_batches_is_told_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, settings(3), world=WORLD, pause=0.1)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("waited for batches in ")
    assert float(last.split()[4].rstrip("%")) > 50


def start(run: Path, steps: int, *more: str, ranks: int = 1) -> "subprocess.Popen[bytes]":
    launcher = TORCHRUN if ranks == 2 else ()
    words = [sys.executable, *launcher, __file__, str(run), str(steps), *more]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_until(fact: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 300
    while not fact():
        assert process.poll() is None, f"ended with {process.poll()}"
        assert time.monotonic() < deadline
        time.sleep(0.001)


def is_writing(run: Path) -> bool:
    return any((run / "checkpoints").glob(".partial-*-state-*.pt"))


@pytest.mark.long
@pytest.mark.slow
def test_killed_while_a_state_is_written_goes_on_bit_identically(tmp_path: Path) -> None:
    whole, _ = train(tmp_path / "whole", settings(40), world=WORLD)
    killed = tmp_path / "killed"
    process = start(killed, 40, "slow_write=0.3", "pause=0.02")
    wait_until(lambda: states(killed) == [8], process)
    wait_until(lambda: is_writing(killed), process)
    process.kill()
    process.wait()
    assert is_writing(killed)  # half-done; the state before it counts
    assert states(killed) == [8]
    assert start(killed, 40).wait() == 0
    assert not is_writing(killed)
    assert read_metrics(killed / "metrics.jsonl") == read_metrics(
        tmp_path / "whole" / "metrics.jsonl"
    )
    weights = torch.load(f"{killed}.0.pt", weights_only=True)  # noqa: TID251
    torch.testing.assert_close(weights, dict(whole.state_dict()), rtol=0, atol=0)


@pytest.mark.long
@pytest.mark.slow
def test_two_killed_ranks_go_on_bit_identically(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = start(whole, 30, ranks=2)
    process = start(killed, 30, "pause=0.03", ranks=2)
    wait_until(lambda: max(states(killed), default=0) >= 8, process)
    for rank in (0, 1):
        os.kill(int(Path(f"{killed}.{rank}.pid").read_text()), signal.SIGKILL)
    assert process.wait(timeout=300) != 0
    assert 8 <= states(killed)[0] < 30
    assert undisturbed.wait(timeout=300) == 0
    assert start(killed, 30, ranks=2).wait(timeout=300) == 0
    assert read_metrics(killed / "metrics.jsonl") == read_metrics(whole / "metrics.jsonl")
    weights = [
        torch.load(f"{run}.{rank}.pt", weights_only=True)  # noqa: TID251
        for run in (whole, killed)
        for rank in (0, 1)
    ]
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=0, atol=0)


def main() -> None:
    torch.set_num_threads(1)
    run, steps, *more = sys.argv[1:]
    options = {name: json.loads(value) for name, value in (text.split("=") for text in more)}
    slow_write = options.pop("slow_write", 0.0)

    def slow_hash(path: Path) -> str:
        time.sleep(slow_write)
        return sha256_of(path)

    own = {name: options.pop(name) for name in ("absent", "pause") if name in options}
    with (
        mock.patch.object(resume, "sha256_of", slow_hash),
        join_world("cpu") as world,
        resume.stop_on_signals() as stop,
    ):
        Path(f"{run}.{world.rank}.pid").write_text(str(os.getpid()))
        config = settings(int(steps), **options)
        objective, training = train(Path(run), config, world=world, stop=stop, **own)
        if training.is_finished:
            torch.save(objective.state_dict(), f"{run}.{world.rank}.pt")
        report_stop(training)


if __name__ == "__main__":
    main()
