from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from voxelbridge.core.errors import VoxelbridgeError
from voxelbridge.core.train.distributed import World
from voxelbridge.core.train.steps import (
    StepResult,
    _FiniteWatch,
    freeze,
    move,
    step_seed,
    train_steps,
)

WORLD = World(torch.device("cpu"))


class Regression(nn.Module):
    """Two linear layers with dropout; the loss has two parts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(3, 4)
        self.head = nn.Linear(4, 1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        out = self.head(self.dropout(self.encoder(batch["x"])))
        fit = (out - batch["y"]).square().mean()
        size = 0.1 * out.square().mean()
        return {"total": fit + size, "fit": fit, "size": size}


def batches(first: int, last: int, *, size: int = 4) -> Iterator[dict[str, Tensor]]:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(size, 3, generator=generator)
        yield {"x": x, "y": x.sum(dim=1, keepdim=True)}


def steps(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    stream: Any,
    *,
    first_step: int = 0,
    last_step: int = 6,
    clip_norm: float | None = None,
    **changed: Any,
) -> Iterator[StepResult]:
    settings: dict[str, Any] = {
        "learning_rate": lambda step: 0.1 / (step + 1),
        "precision": "fp32",
        "accumulation_steps": 1,
        "seed": 7,
    }
    return train_steps(
        objective,
        stream,
        optimizer,
        world=WORLD,
        first_step=first_step,
        steps=last_step,
        clip_norm=clip_norm,
        **(settings | changed),
    )


def sgd(objective: nn.Module, momentum: float = 0.9) -> torch.optim.Optimizer:
    return torch.optim.SGD(objective.parameters(), lr=1.0, momentum=momentum)


def test_steps_are_plain_sgd() -> None:
    objective, reference = Regression(), Regression()
    objective.dropout.p = reference.dropout.p = 0.0
    results = list(steps(objective, sgd(objective), batches(0, 6), clip_norm=0.5))
    optimizer = sgd(reference)
    for step, batch in enumerate(batches(0, 6)):
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        optimizer.zero_grad()
        losses = reference(batch)
        losses["total"].backward()
        norm = nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        optimizer.step()
        assert results[step].step == step
        assert results[step].learning_rate == 0.1 / (step + 1)
        torch.testing.assert_close(results[step].losses, losses, rtol=0, atol=0)
        torch.testing.assert_close(results[step].gradient_norm, norm)
    torch.testing.assert_close(objective.state_dict(), reference.state_dict())


def test_losses_are_detached() -> None:
    objective = Regression()
    result = next(steps(objective, sgd(objective), batches(0, 6)))
    assert all(not loss.requires_grad for loss in result.losses.values())
    assert set(result.losses) == {"total", "fit", "size"}


def test_resumed_steps_repeat_dropout_exactly() -> None:
    whole = Regression()
    straight = [r.losses["total"].item() for r in steps(whole, sgd(whole), batches(0, 6))]
    half = Regression()
    optimizer = sgd(half)
    first = [r.losses["total"].item() for r in steps(half, optimizer, batches(0, 3), last_step=3)]
    torch.rand(17)  # whatever happens between two starts
    second = [r.losses["total"].item() for r in steps(half, optimizer, batches(3, 6), first_step=3)]
    assert first + second == straight
    torch.testing.assert_close(half.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_accumulation_equals_one_large_batch() -> None:
    large, small = Regression(), Regression()
    large.dropout.p = small.dropout.p = 0.0
    whole = list(batches(0, 6, size=8))
    halves = [{k: v[i : i + 4] for k, v in batch.items()} for batch in whole for i in (0, 4)]
    a = list(steps(large, sgd(large), whole, clip_norm=1.0))
    b = list(steps(small, sgd(small), halves, clip_norm=1.0, accumulation_steps=2))
    torch.testing.assert_close(small.state_dict(), large.state_dict())
    torch.testing.assert_close([r.losses for r in b], [r.losses for r in a])


def test_frozen_parts_do_not_move_and_thaw_on_time() -> None:
    objective = Regression()
    before = objective.encoder.weight.detach().clone()
    moved = []
    for _ in steps(
        objective,
        torch.optim.AdamW(objective.parameters(), weight_decay=0.5),
        batches(0, 6),
        frozen_parts=lambda step: ("encoder",) if step < 3 else (),
    ):
        moved.append(not torch.equal(before, objective.encoder.weight))
    assert moved == [False, False, False, True, True, True]


def test_unknown_frozen_part_is_an_error() -> None:
    with pytest.raises(AttributeError, match="neck"):
        freeze(Regression(), ["neck"], trainable=[])


def test_parameters_that_never_train_stay_so_after_a_frozen_phase() -> None:
    objective = Regression()
    objective.head.bias.requires_grad_(False)
    list(
        steps(
            objective,
            sgd(objective),
            batches(0, 6),
            frozen_parts=lambda step: ("encoder",) if step < 3 else (),
        )
    )
    assert not objective.head.bias.requires_grad
    assert objective.encoder.weight.requires_grad


def test_nan_loss_names_the_step_and_every_part_and_leaves_the_weights_alone() -> None:
    objective = Regression()
    poisoned = list(batches(0, 6))
    poisoned[3]["x"][0] = float("nan")
    results = steps(objective, sgd(objective), poisoned)
    assert [next(results).step for _ in range(3)] == [0, 1, 2]
    kept = [p.detach().clone() for p in objective.parameters()]
    with pytest.raises(VoxelbridgeError, match=r"step 3: .*\(total nan, fit nan, size nan\)"):
        next(results)
    assert all(torch.equal(a, b) for a, b in zip(kept, objective.parameters(), strict=True))


class SteepRoot(nn.Module):
    """A finite loss with an infinite gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        return {"total": (self.weight * batch).sqrt()}


def test_infinite_gradient_stops_before_the_weights_change() -> None:
    objective = SteepRoot()
    with pytest.raises(VoxelbridgeError, match=r"step 0: .*gradient_norm (inf|nan)"):
        next(steps(objective, sgd(objective), [torch.tensor(1.0)]))
    assert objective.weight == 0


def test_late_reading_reports_the_first_bad_step() -> None:
    watch = _FiniteWatch(torch.device("cpu"))
    watch._reads_at_once = False  # as on a GPU
    for step, value in enumerate((1.0, 2.0, float("inf"), float("nan"), 1.0)):
        watch.check(step, {"total": torch.tensor(value), "box": torch.tensor(float(step))})
        watch.check(step, {"gradient_norm": torch.tensor(value)})
    with pytest.raises(VoxelbridgeError, match=r"step 2: .*\(total inf, box 2\)"):
        watch.raise_if_found()


def test_late_reading_of_sound_steps_raises_nothing() -> None:
    watch = _FiniteWatch(torch.device("cpu"))
    watch._reads_at_once = False
    watch.raise_if_found()
    watch.check(0, {"total": torch.tensor(1.0)})
    watch.raise_if_found()


def test_step_seeds_differ_by_seed_rank_and_step() -> None:
    seeds = {step_seed(s, r, t) for s in range(4) for r in range(4) for t in range(50)}
    assert len(seeds) == 800


def test_move_keeps_the_shape_of_a_batch() -> None:
    batch = {"image": torch.ones(2), "targets": [(torch.zeros(1), torch.ones(1))]}
    moved = move(batch, torch.device("meta"))
    assert moved["image"].is_meta
    assert isinstance(moved["targets"][0], tuple)
    assert moved["targets"][0][1].is_meta


def test_move_leaves_names_and_numbers_as_they_are() -> None:
    batch = {
        "datasets": ["kits", "lits"],
        "images": [torch.ones(1, 2), torch.ones(4, 3)],  # ragged
        "case": None,
        "spacing": (1.0, 2),
    }
    moved = move(batch, torch.device("meta"))
    assert [image.is_meta for image in moved.pop("images")] == [True, True]
    assert moved == {"datasets": ["kits", "lits"], "case": None, "spacing": (1.0, 2)}


class PerDataset(nn.Module):
    """The loss of one data set: the batch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        loss = self.weight * batch["x"]
        return {"total": loss, batch["name"]: loss}


def test_loss_of_one_part_only_is_not_divided_by_all_parts() -> None:
    objective = PerDataset()
    stream = [{"x": torch.tensor(value), "name": name} for value, name in ((1.0, "a"), (3.0, "b"))]
    result = next(steps(objective, sgd(objective), stream, last_step=1, accumulation_steps=2))
    assert {name: float(loss) for name, loss in result.losses.items()} == {
        "total": 2.0, "a": 1.0, "b": 3.0,
    }  # fmt: skip


def test_late_reading_forgets_nothing_over_many_sets_of_names() -> None:
    watch = _FiniteWatch(torch.device("cpu"))
    watch._reads_at_once = False
    for step in range(200):
        watch.check(step, {"total": torch.tensor(1.0), f"head {step}": torch.tensor(0.0)})
        assert len(watch._found) <= 64
    for step in (200, 201):
        watch.check(step, {"total": torch.tensor(float("nan")), f"head {step}": torch.tensor(0.0)})
    with pytest.raises(VoxelbridgeError, match=r"step 200: .*\(total nan, head 200 0\)"):
        watch.raise_if_found()


def test_bf16_autocast_reaches_the_objective() -> None:
    class Records(Regression):
        dtype: torch.dtype | None = None

        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            self.dtype = self.encoder(batch["x"]).dtype
            return super().forward(batch)

    objective = Records()
    next(steps(objective, sgd(objective), batches(0, 1), last_step=1, precision="bf16"))
    assert objective.dtype == torch.bfloat16
    assert objective.encoder.weight.dtype == torch.float32
