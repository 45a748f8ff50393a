"""Averaged weights against plain formulas, frozen parts, and their place in the training state."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from voxelbridge.core.train.averaging import EMA, Averager, Averaging, WeightAveraging
from voxelbridge.core.train.distributed import World
from voxelbridge.core.train.loop import Training, open_training
from voxelbridge.core.train.metrics import read_metrics
from voxelbridge.core.train.optim import SGD, build_optimizer
from voxelbridge.core.train.resume import StopRequest
from voxelbridge.core.train.schedule import FrozenPhase, PolySchedule
from voxelbridge.core.train.settings import TrainingSettings

STEPS = 12
SWA = WeightAveraging(last_steps=4, every_steps=2, rates=(1e-4, 1e-2))


class Objective(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"total": (self.head(self.norm(self.body(x))) - 1).square().mean()}


def batches(training: Training) -> Iterator[Tensor]:
    for number in range(training.first_pass, training.passes):
        yield torch.randn(3, 4, generator=torch.Generator().manual_seed(number))


def train(
    run: Path, averaging: Averaging, *, stop_after: int = STEPS
) -> tuple[Objective, list[dict[str, Tensor]], dict[str, Tensor]]:
    """The objective, its weights after every step, and what would be written at the end."""
    objective = Objective()
    settings = TrainingSettings(
        patch_size=(1, 1, 1), batch_size=3, log_every_steps=1, checkpoint_every_steps=1,
        schedule=PolySchedule(
            steps=STEPS, warmup_steps=2, frozen=FrozenPhase(steps=3, parts=("body",))
        ),
        optim=SGD(lr=0.1, momentum=0.9),
    )  # fmt: skip
    weights = []
    with open_training(
        run, settings, kind="toy", world=World(torch.device("cpu")), stop=StopRequest(),
        objective=objective, optimizer=build_optimizer(settings.optim, objective), facts={},
        arguments={}, averaging=averaging,
    ) as training:  # fmt: skip
        for result in training.steps(batches(training)):
            weights.append({name: t.clone() for name, t in objective.state_dict().items()})
            with training.averaged():
                training.log({"val_norm": objective.head.weight.norm().item()})
            if result.step + 1 == stop_after < STEPS:
                break
        with training.averaged():
            written = {name: t.clone() for name, t in objective.state_dict().items()}
    return objective, weights, written


def test_mean_is_that_of_the_weights_where_the_tail_begins_and_after_each_cycle(
    tmp_path: Path,
) -> None:
    objective, weights, written = train(tmp_path, SWA)
    taken = [weights[finished - 1] for finished in (8, 10, 12)]
    for name, _ in objective.named_parameters():
        mean = torch.stack([snapshot[name].double() for snapshot in taken]).mean(0)
        torch.testing.assert_close(written[name].double(), mean, rtol=1e-6, atol=1e-7)
        assert not torch.equal(written[name], weights[-1][name])
    for name, buffer in objective.named_buffers():
        assert torch.equal(written[name], buffer)
    assert torch.equal(objective.head.weight, weights[-1]["head.weight"])  # put back
    rates = [record["learning_rate"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert rates[8:] == pytest.approx([1e-4, 5.05e-3] * 2)
    assert rates[5] == 0.1  # the decay begins
    assert rates[7] == pytest.approx(0.1 * (1 / 3) ** 0.9)  # and would end at step 8


def test_moving_average_follows_its_formula_and_is_what_is_validated(tmp_path: Path) -> None:
    _, weights, written = train(tmp_path, EMA(decay=0.5))
    expected = weights[0]["head.weight"].double()
    norms = [expected.norm().item()]
    for count, snapshot in enumerate(weights[1:], start=1):
        decay = min(0.5, (1 + count) / (10 + count))
        expected = decay * expected + (1 - decay) * snapshot["head.weight"].double()
        norms.append(expected.norm().item())
    torch.testing.assert_close(written["head.weight"].double(), expected, rtol=1e-6, atol=1e-7)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["val_norm"] for record in records] == pytest.approx(norms, rel=1e-6)


@pytest.mark.parametrize(
    "averaging", [EMA(decay=0.9), WeightAveraging(last_steps=9, every_steps=1)]
)
def test_weights_that_did_not_change_keep_their_bits(averaging: Averaging) -> None:
    layer = nn.Linear(300, 50)
    averager = Averager(averaging, layer, steps=9)
    with torch.no_grad():
        for step in range(9):
            averager.after_steps(step + 1)
            layer.bias.add_(0.1)
    before = layer.weight.clone()
    with averager.applied():
        assert torch.equal(layer.weight, before)
        assert not torch.equal(layer.bias, layer.bias + 0.1)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("cut", [2, 8, 9, 11])
@pytest.mark.parametrize("averaging", [SWA, EMA(decay=0.9)])
def test_average_is_resumed_to_the_bit(averaging: Averaging, cut: int, tmp_path: Path) -> None:
    _, _, whole = train(tmp_path / "whole", averaging)
    train(tmp_path / "parts", averaging, stop_after=cut)
    _, _, parts = train(tmp_path / "parts", averaging)
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)
    records = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts")]
    assert records[0] == records[1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"last_steps": 5, "every_steps": 2},
        {"last_steps": 4, "every_steps": 2, "rates": (1e-2, 1e-4)},
    ],
)
def test_averaging_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be a multiple|lower one first"):
        WeightAveraging(**wrong)
