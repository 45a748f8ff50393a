"""SIGKILL in every phase of a detector's training, then the same command: nothing is different."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from voxelbridge.core.files import write_json
from voxelbridge.core.train import resume
from voxelbridge.core.train.loop import Training
from voxelbridge.core.train.metrics import read_attempts
from voxelbridge.detect.prepare import prepare
from voxelbridge.detect.train import train

SETTINGS = (
    "patch_size=[16,16,16]", "schedule.steps=8", "schedule.warmup_steps=2",
    "schedule.frozen.steps=2", 'schedule.frozen.parts=["detector.encoder"]', "log_every_steps=1",
    "checkpoint_every_steps=2", "validation_batches=1", "validate_every_steps=2",
    # No loss falls by 150 %: the attempt fails after 5 steps, the next one has 6.
    'restart={"after_steps":5,"window_steps":2,"min_improvement":1.5,"warmup_steps":2}',
    'averaging={"name":"swa","last_steps":2,"every_steps":1,"rates":[1e-5,1e-3]}',
)  # fmt: skip
FILES = ("detector.safetensors", "best.safetensors")


def work(preset: str, store: Path, run: Path) -> None:
    train(preset, store=store, run=run, overrides=SETTINGS, device="cpu", workers=0)


def in_a_process(task: Callable[[], object]) -> int:
    """Runs `task` in a process of its own with one thread; the signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            task()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def dying_in_step(attempt: int, step: int) -> Any:
    """The step is trained and validated, nothing of it recorded."""
    original = Training._judge

    def judge(training: Training, result: Any) -> None:
        if (training.attempt, result.step) == (attempt, step):
            os.kill(os.getpid(), signal.SIGKILL)
        original(training, result)

    return mock.patch.object(Training, "_judge", judge)


def dying_while_writing(name: str) -> Any:
    """The state's file is there, `state.json` names the one before it."""
    original = write_json

    def write(path: Path, content: dict[str, Any]) -> None:
        if content["file"] == name:
            os.kill(os.getpid(), signal.SIGKILL)
        original(path, content)

    return mock.patch.object(resume, "write_json", write)


def dying_in_the_restart() -> Any:
    """The initial weights are back, the failed attempt's state is on the disk."""
    original = Training._begin_again

    def begin(training: Training) -> None:
        original(training)
        os.kill(os.getpid(), signal.SIGKILL)

    return mock.patch.object(Training, "_begin_again", begin)


def kills() -> list[Any]:
    return [
        dying_in_step(0, 1),  # frozen phase
        dying_while_writing("state-00000002.pt"),
        dying_in_step(0, 3),  # warm-up
        dying_in_the_restart(),
        dying_while_writing("state-00000000-restart-1.pt"),
        dying_in_step(1, 1),  # warm-up of the second attempt
        dying_in_step(1, 3),  # decay
        dying_in_step(1, 5),  # the weights are being averaged
    ]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("preset", ["retunet_small", "defdetr_small"])
def test_killed_in_every_phase_goes_on_to_the_same_losses_and_weights(
    raw_dataset: Path, tmp_path: Path, preset: str
) -> None:
    store, whole, broken = tmp_path / "store", tmp_path / "whole", tmp_path / "broken"
    prepare(raw_dataset, store, workers=0)
    assert in_a_process(lambda: work(preset, store, whole)) == 0
    for death in kills():
        with death:
            assert in_a_process(lambda: work(preset, store, broken)) == signal.SIGKILL
    assert in_a_process(lambda: work(preset, store, broken)) == 0
    attempts = read_attempts(whole / "metrics.jsonl")
    assert [len(records) for records in attempts] == [5, 6]
    assert attempts[0][-1]["restart"] == 1
    assert read_attempts(broken / "metrics.jsonl") == attempts
    for name in FILES:
        first, second = (run / "checkpoints" / name for run in (whole, broken))
        assert first.read_bytes() == second.read_bytes(), name
