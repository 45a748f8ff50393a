"""Both detectors in the phase with a frozen encoder: memory, one process, two ranks, resuming."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from voxelbridge.core.train.averaging import EMA, Averager
from voxelbridge.core.train.distributed import World
from voxelbridge.core.train.optim import SGD, AdamW, build_optimizer
from voxelbridge.core.train.schedule import FrozenPhase, PolySchedule, frozen_parts_at
from voxelbridge.core.train.steps import StepResult, train_steps
from voxelbridge.detect.batches import DetectionBatch
from voxelbridge.detect.build import build_detector, build_objective, load_detect_config
from voxelbridge.detect.detections import Targets

PRESETS = ("retunet_small", "defdetr_small")
SIZE = 16
SCHEDULE = PolySchedule(steps=4, frozen=FrozenPhase(steps=2, parts=("detector.encoder",)))


def objective_of(preset: str) -> nn.Module:
    torch.manual_seed(0)
    config = load_detect_config(preset)
    return build_objective(build_detector(config, in_channels=1, num_classes=1), config)


def batch(step: int, images: slice = slice(None)) -> DetectionBatch:
    generator = torch.Generator().manual_seed(step)
    image = torch.randn(2, 1, SIZE, SIZE, SIZE, generator=generator)
    box = torch.tensor([[2.0, 3.0, 4.0, 8.0, 10.0, 12.0]])
    targets = tuple(
        Targets(boxes=box + i, labels=torch.zeros(1, dtype=torch.int64)) for i in (0, 1)
    )
    return DetectionBatch(image[images], targets[images], foreground=image[images, 0] > 1)


def steps(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    world: World,
    images: slice = slice(None),
    first: int = 0,
    last: int = 4,
) -> Iterator[StepResult]:
    return train_steps(
        objective, (batch(step, images) for step in range(first, last)), optimizer, world=world,
        learning_rate=lambda _: 1e-3, first_step=first, steps=last, precision="fp32",
        clip_norm=1.0, accumulation_steps=1, seed=0,
        frozen_parts=lambda step: frozen_parts_at(SCHEDULE, step),
    )  # fmt: skip


def adamw(objective: nn.Module) -> torch.optim.Optimizer:
    return build_optimizer(AdamW(weight_decay=0.1, amsgrad=True), objective)


@pytest.mark.parametrize("preset", PRESETS)
def test_frozen_encoder_keeps_nothing_and_moves_nothing(preset: str) -> None:
    objective = objective_of(preset)
    encoder = objective.get_submodule("detector.encoder")
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    kept: list[int] = []
    calls: list[saved_tensors_hooks] = []

    def keep(tensor: Tensor) -> Tensor:
        kept[-1] += tensor.nbytes
        return tensor

    def enter(*_: object) -> None:
        kept.append(0)
        calls.append(saved_tensors_hooks(keep, lambda tensor: tensor))
        calls[-1].__enter__()

    encoder.register_forward_pre_hook(enter)
    encoder.register_forward_hook(lambda *_: calls[-1].__exit__())
    for result in steps(objective, adamw(objective), world=World(torch.device("cpu"))):
        frozen = result.step < 2
        assert len(kept) == result.step + 1  # one forward pass of the encoder in each step
        assert (kept[-1] == 0) is frozen
        assert all((p.grad is None) is frozen for p in encoder.parameters())
        after = encoder.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before) is frozen


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("optim", [SGD(momentum=0.9, weight_decay=0.1), AdamW(weight_decay=0.1)])
def test_momentum_from_before_and_an_average_move_no_bit_of_a_frozen_encoder(
    preset: str, optim: SGD | AdamW
) -> None:
    objective, world = objective_of(preset), World(torch.device("cpu"))
    optimizer = build_optimizer(optim, objective)
    for _ in steps(objective, optimizer, world=world, first=2, last=3):  # everything trains
        pass
    encoder = objective.get_submodule("detector.encoder")
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    assert all(len(optimizer.state[parameter]) > 0 for parameter in encoder.parameters())
    averager = Averager(EMA(decay=0.9), objective, steps=4)
    averager.after_steps(0)
    for result in steps(objective, optimizer, world=world, last=2):
        averager.after_steps(result.step + 1)
        with averager.applied():
            averaged = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
        for state in (averaged, encoder.state_dict()):
            assert all(torch.equal(before[name], state[name]) for name in before)


@pytest.mark.parametrize("preset", PRESETS)
def test_resuming_inside_the_phase_and_at_its_end_repeats_every_bit(preset: str) -> None:
    world = World(torch.device("cpu"))
    whole = objective_of(preset)
    straight = [r.losses["total"].item() for r in steps(whole, adamw(whole), world=world)]
    for cut in (1, 2):
        half = objective_of(preset)
        optimizer = adamw(half)
        first = [r.losses["total"].item() for r in steps(half, optimizer, world=world, last=cut)]
        resumed = objective_of(preset)
        resumed.load_state_dict(half.state_dict())
        again = adamw(resumed)
        again.load_state_dict(optimizer.state_dict())
        second = [r.losses["total"].item() for r in steps(resumed, again, world=world, first=cut)]
        assert first + second == straight
        torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


RANK = """
import json, sys
sys.path.insert(0, sys.argv[1])
from test_frozen_phase import PRESETS, adamw, objective_of, steps
import torch
torch.set_num_threads(1)
from voxelbridge.core.train.distributed import join_world
facts = {}
with join_world("cpu") as world:
    for preset in PRESETS:
        objective = objective_of(preset)
        encoder = objective.get_submodule("detector.encoder")
        before = [p.detach().clone() for p in encoder.parameters()]
        moved, losses, own = [], [], slice(world.rank, world.rank + 1)
        for result in steps(objective, adamw(objective), world=world, images=own):
            moved.append(any(not torch.equal(a, b) for a, b in zip(before, encoder.parameters())))
            losses.append(result.losses["total"].item())
        sums = [p.double().sum().item() for p in objective.parameters()]
        facts[preset] = {"moved": moved, "losses": losses, "sums": sums}
    with open(f"{sys.argv[2]}/{world.rank}.json", "w") as stream:
        json.dump(facts, stream)
"""


@pytest.mark.long
@pytest.mark.slow
def test_two_ranks_agree_before_and_after_the_encoder_thaws(
    two_ranks: Callable[[str], list[Any]],
) -> None:
    ranks = two_ranks(RANK)
    for preset in PRESETS:
        assert ranks[0][preset]["moved"] == [False, False, True, True]
        assert ranks[0][preset]["sums"] == ranks[1][preset]["sums"]
    # Deformable DETR divides by the objects of all ranks: two halves are one whole batch.
    objective = objective_of("defdetr_small")
    world = World(torch.device("cpu"))
    whole = [r.losses["total"].item() for r in steps(objective, adamw(objective), world=world)]
    halves = zip(*(rank["defdetr_small"]["losses"] for rank in ranks), strict=True)
    assert [sum(pair) / 2 for pair in halves] == pytest.approx(whole, rel=1e-4)
