"""The restart rule: when it acts, what begins again, and that no SIGKILL changes what it does."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from voxelbridge.core.files import write_json
from voxelbridge.core.train import resume
from voxelbridge.core.train.averaging import EMA, NoAveraging, WeightAveraging
from voxelbridge.core.train.distributed import World
from voxelbridge.core.train.loop import Training, open_training
from voxelbridge.core.train.metrics import read_attempts, read_metrics
from voxelbridge.core.train.optim import AdamW, build_optimizer
from voxelbridge.core.train.restart import RestartRule, RestartWatch, check_scheme
from voxelbridge.core.train.schedule import FrozenPhase, PolySchedule
from voxelbridge.core.train.settings import TrainingSettings

SCHEDULE = PolySchedule(steps=14, warmup_steps=2, frozen=FrozenPhase(steps=3, parts=("body",)))
RULE = RestartRule(
    after_steps=6, min_improvement=1.5, window_steps=2, warmup_steps=4, lr=1e-3, max_restarts=1
)  # no loss can fall by 150 %


class Objective(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 1)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.seen += 1
        noise = torch.rand(())  # of the step's own stream
        return {"total": (self.head(self.body(x)) - 1).square().mean() * (1 + noise)}


def batches(first: int, passes: int) -> Iterator[Tensor]:
    for number in range(first, passes):
        yield torch.randn(3, 4, generator=torch.Generator().manual_seed(number))


def train(
    run: Path,
    *,
    rule: RestartRule | None = RULE,
    schedule: PolySchedule = SCHEDULE,
    lr: float = 1e-2,
    each: Callable[[Training], None] = lambda _: None,
    values: Callable[[int], dict[str, float]] = lambda _: {},
    averaging: NoAveraging | EMA | WeightAveraging = EMA(decay=0.9),  # noqa: B008 - frozen
) -> Objective:
    """Trains to the end; the result has the averaged weights."""
    objective = Objective()
    settings = TrainingSettings(
        patch_size=(1, 1, 1), batch_size=3, log_every_steps=1, checkpoint_every_steps=2,
        schedule=schedule, optim=AdamW(lr=lr, amsgrad=True), keep_checkpoints=2,
    )  # fmt: skip
    with open_training(
        run, settings, kind="toy", world=World(torch.device("cpu")), stop=resume.StopRequest(),
        objective=objective, optimizer=build_optimizer(settings.optim, objective), facts={},
        arguments={}, averaging=averaging, restart=rule,
    ) as training:  # fmt: skip
        for result in training.steps(batches):
            each(training)
            if found := values(result.step):
                training.log(found)
        assert training.is_finished
        with training.averaged():
            final = Objective()
            final.load_state_dict(objective.state_dict())
    return final


def test_restarted_run_is_a_run_of_the_modified_schedule_from_the_same_weights(
    tmp_path: Path,
) -> None:
    restarted = train(tmp_path / "restarted")
    modified = PolySchedule(steps=11, warmup_steps=4)
    plain = train(tmp_path / "plain", rule=None, schedule=modified, lr=1e-3)
    torch.testing.assert_close(restarted.state_dict(), plain.state_dict(), rtol=0, atol=0)
    first, second = read_attempts(tmp_path / "restarted" / "metrics.jsonl")
    expected = read_metrics(tmp_path / "plain" / "metrics.jsonl")
    failed_again = second[5].pop("improvement")
    assert failed_again < 1.5
    assert second == [{**record, "attempt": 1} for record in expected]
    assert read_metrics(tmp_path / "restarted" / "metrics.jsonl")[0]["attempt"] == 1
    assert [record["step"] for record in first] == list(range(6))
    assert first[-1]["restart"] == 1
    losses = [record["loss"] for record in first]
    improvement = 1 - (losses[4] + losses[5]) / (losses[0] + losses[1])
    assert first[-1]["improvement"] == pytest.approx(improvement)
    assert not any("restart" in record for record in [*first[:-1], *second])


def test_bound_is_kept_and_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, rule=RULE.model_copy(update={"max_restarts": 2}))
    assert [len(records) for records in read_attempts(tmp_path / "metrics.jsonl")] == [6, 6, 11]
    out = capsys.readouterr().out
    assert out.count("RESTART 1 of at most 2") == out.count("RESTART 2 of at most 2") == 1
    assert out.count("WARNING: restart rule after step 5") == 1
    assert "still too little after 2 restarts" in out


def test_run_that_improves_is_left_alone(tmp_path: Path) -> None:
    rule = RULE.model_copy(update={"min_improvement": 1e-9, "window_steps": 3})
    with_rule = train(tmp_path / "rule", rule=rule)
    without = train(tmp_path / "none", rule=None)
    torch.testing.assert_close(with_rule.state_dict(), without.state_dict(), rtol=0, atol=0)
    assert len(read_attempts(tmp_path / "rule" / "metrics.jsonl")) == 1


def test_metric_of_the_validation_counts_from_its_first_value_to_its_last(tmp_path: Path) -> None:
    rule = RULE.model_copy(
        update={"metric": "val_map_0.10", "goal": "increase", "min_improvement": 0.2}
    )
    figures = {1: 0.1, 3: 0.9, 5: 0.29, 7: 0.0}

    def values(step: int) -> dict[str, float]:
        return {"val_map_0.10": figures[step]} if step in figures else {}

    train(tmp_path / "a", rule=rule, values=values)
    assert len(read_attempts(tmp_path / "a" / "metrics.jsonl")) == 2
    figures[5] = 0.31
    train(tmp_path / "b", rule=rule, values=values)
    assert len(read_attempts(tmp_path / "b" / "metrics.jsonl")) == 1


def test_metric_that_never_came_is_told_and_nothing_restarts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rule = RULE.model_copy(update={"metric": "val_map_0.10", "goal": "increase"})
    train(tmp_path, rule=rule)
    assert "WARNING: restart rule after step 5: val_map_0.10 was not recorded twice" in (
        capsys.readouterr().out
    )


def test_losses_are_averaged_over_the_ranks_before_they_are_judged() -> None:
    """Each rank alone would decide otherwise than both together."""
    rule = RestartRule(after_steps=2, window_steps=1, min_improvement=0.3)
    watches = [RestartWatch(rule), RestartWatch(rule)]
    for watch, losses in zip(watches, ([1.0, 0.2], [1.0, 1.4]), strict=True):
        for step, loss in enumerate(losses):
            watch.add(step, torch.tensor(loss), {})
    states = [watch.state() for watch in watches]

    class Both(World):
        def gather(self, value: Any) -> list[Any]:
            del value
            return states

    judgements = [watch.judge(Both(torch.device("cpu"))) for watch in watches]
    assert judgements[0] == judgements[1]
    assert judgements[0] is not None
    assert judgements[0].improvement == pytest.approx(0.2)
    assert not judgements[0].sufficient


def killed(work: Callable[[], object]) -> int:
    """Runs `work` in a process of its own, one thread; 0, or the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(run: Path, attempt: int, step: int) -> None:
    """Dies in a step, with what came before it recorded but not saved."""

    def each(training: Training) -> None:
        if (training.attempt, training.next_step) == (attempt, step):
            die()

    train(run, each=each)


def killed_while_writing(run: Path, name: str, *, pointer: bool) -> None:
    """Dies with the state `name` written, before or after it counts."""
    original = write_json

    def write(path: Path, content: dict[str, Any]) -> None:
        found = content["file"] == name
        if found and not pointer:
            die()
        original(path, content)
        if found:
            die()

    with mock.patch.object(resume, "write_json", write):
        train(run)


def killed_between_weights_and_state(run: Path) -> None:
    """Dies when everything is back at the start, with the old state on the disk."""
    original = Training._begin_again

    def begin(training: Training) -> None:
        original(training)
        die()

    with mock.patch.object(Training, "_begin_again", begin):
        train(run)


KILLS: tuple[Callable[[Path], None], ...] = (
    lambda run: killed_at(run, 0, 2),  # frozen phase
    lambda run: killed_at(run, 0, 4),  # warm-up
    lambda run: killed_at(run, 0, 5),  # the step that is judged
    killed_between_weights_and_state,
    lambda run: killed_while_writing(run, "state-00000000-restart-1.pt", pointer=False),
    lambda run: killed_while_writing(run, "state-00000000-restart-1.pt", pointer=True),
    lambda run: killed_at(run, 1, 0),
    lambda run: killed_while_writing(run, "state-00000002-restart-1.pt", pointer=False),
    lambda run: killed_at(run, 1, 3),
    lambda run: killed_at(run, 1, 10),
)


def test_sigkill_around_a_restart_changes_nothing(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    records = read_attempts(tmp_path / "whole" / "metrics.jsonl")
    once = tmp_path / "once"
    for kill in KILLS:  # one after the other, in one run
        assert killed(lambda kill=kill: kill(once)) == signal.SIGKILL
    last = train(once)
    torch.testing.assert_close(last.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert read_attempts(once / "metrics.jsonl") == records


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"after_steps": 11}, "after_steps 11: must be below"),
        ({"warmup_steps": 11}, "restarted run has 11 steps"),
    ],
)
def test_rule_that_does_not_fit_the_schedule_is_refused(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_scheme(SCHEDULE, NoAveraging(), RULE.model_copy(update=rule))


def test_averaging_that_leaves_no_decay_is_refused() -> None:
    with pytest.raises(ValueError, match="take all 14 steps"):
        check_scheme(SCHEDULE, WeightAveraging(last_steps=9, every_steps=3), None)


@pytest.mark.parametrize(
    "wrong",
    [
        {"goal": "increase"},
        {"window_steps": 4},
        {"metric": "giou"},
        {"metric": "val_map_0.10"},
    ],
)
def test_rule_that_cannot_be_judged_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"goal: got|do not fit|expected"):
        RestartRule(**({"after_steps": 6, "min_improvement": 0.1, "window_steps": 2} | wrong))
