"""The leading phase in which a part does not train: what it keeps, what it leaves alone."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from voxelbridge.core.arch.config import EncoderConfig
from voxelbridge.core.arch.encoder import build_encoder
from voxelbridge.core.arch.presets import PLAIN_SMALL, RESENC_SMALL
from voxelbridge.core.train.distributed import World
from voxelbridge.core.train.resume import TrainingState, load_state, save_state
from voxelbridge.core.train.steps import StepResult, autocast, freeze, train_steps

WORLD = World(torch.device("cpu"))
FROZEN_STEPS = 3
Build = Callable[[nn.Module], torch.optim.Optimizer]


class Objective(nn.Module):
    """A real encoder under a head that reads all its maps; records what a step keeps."""

    def __init__(self, config: EncoderConfig = PLAIN_SMALL) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = build_encoder(config, in_channels=1)
        self.head = nn.ModuleList(nn.Linear(c, 2) for c in self.encoder.channels)
        self.forwards = 0
        self.kept_bytes = 0  # for the encoder's backward pass, in the last step

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        self.forwards += 1
        self.kept_bytes = 0

        def keep(tensor: Tensor) -> Tensor:
            self.kept_bytes += tensor.nbytes
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            maps = self.encoder(image)
        return {"total": self.loss(maps)}

    def loss(self, maps: Sequence[Tensor]) -> Tensor:
        answers = [h(m.mean((2, 3, 4))) for h, m in zip(self.head, maps, strict=True)]
        return torch.stack([(a.float() - 1).square().mean() for a in answers]).sum()


class Statistics(nn.Module):
    """A part with running statistics and dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.Dropout(0.5))
        self.head = nn.Conv3d(4, 1, 1)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"total": self.head(self.encoder(image)).square().mean()}


def images(first: int, last: int) -> Iterator[Tensor]:
    for step in range(first, last):
        yield torch.randn(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(step))


def adamw(objective: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(objective.parameters(), lr=1.0, weight_decay=0.5, amsgrad=True)


def sgd(objective: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        objective.parameters(), lr=1.0, momentum=0.9, nesterov=True, weight_decay=0.1
    )


def steps(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    first: int = 0,
    last: int = 6,
) -> Iterator[StepResult]:
    return train_steps(
        objective, images(first, last), optimizer, world=WORLD,
        learning_rate=lambda step: 0.01 / (step + 1), first_step=first, steps=last,
        precision="fp32", clip_norm=1.0, accumulation_steps=1, seed=3,
        frozen_parts=lambda step: ("encoder",) if step < FROZEN_STEPS else (),
    )  # fmt: skip


def copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("config", [PLAIN_SMALL, RESENC_SMALL])
def test_frozen_encoder_keeps_no_tensor_for_a_backward_pass(config: EncoderConfig) -> None:
    objective = Objective(config)
    kept = [objective.kept_bytes for _ in steps(objective, sgd(objective))]
    assert kept[:FROZEN_STEPS] == [0, 0, 0]
    # Training keeps at least its input for every convolution.
    assert min(kept[FROZEN_STEPS:]) > 4 * 2 * 16**3 * config.features[0]
    assert objective.forwards == 6


def test_frozen_encoder_keeps_nothing_under_autocast_either() -> None:
    objective = Objective()
    parameters = list(objective.parameters())
    kept = []
    for parts in (("encoder",), ()):
        freeze(objective, parts, trainable=parameters)
        with autocast(torch.device("cpu"), "bf16"):
            objective(next(images(0, 1)))
        kept.append(objective.kept_bytes)
    assert kept[0] == 0
    assert kept[1] > 0


def test_frozen_step_holds_no_gradients_and_no_optimizer_state_of_the_part() -> None:
    objective = Objective()
    optimizer = adamw(objective)
    for result in steps(objective, optimizer):
        frozen = result.step < FROZEN_STEPS
        for parameter in objective.encoder.parameters():
            assert (parameter.grad is None) is frozen
            assert (parameter in optimizer.state) is not frozen
        assert all(p.grad is not None for p in objective.head.parameters())


@pytest.mark.parametrize("build", [adamw, sgd])
def test_weight_decay_leaves_frozen_weights_alone(build: Build) -> None:
    objective = Objective()
    before = copies(objective.encoder)
    head = copies(objective.head)
    for result in steps(objective, build(objective)):
        after = objective.encoder.state_dict()
        same = [torch.equal(before[name], after[name]) for name in before]
        assert all(same) if result.step < FROZEN_STEPS else not any(same)
    assert not any(torch.equal(head[n], t) for n, t in objective.head.state_dict().items())


def test_running_statistics_and_dropout_of_a_frozen_part_rest_until_it_thaws() -> None:
    objective = Statistics()
    before = copies(objective.encoder)
    for result in steps(objective, adamw(objective)):
        # what a validation between two steps does
        objective.eval()
        objective.train()
        after = objective.encoder.state_dict()
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == (set() if result.step < FROZEN_STEPS else set(before))
    # The losses of the frozen phase are those of the part in inference.
    again = Statistics()
    first = next(steps(again, adamw(again)))
    with torch.no_grad():
        expected = Statistics().eval()(next(images(0, 1)))
    torch.testing.assert_close(first.losses, expected)


@pytest.mark.parametrize("build", [adamw, sgd])
@pytest.mark.parametrize("cut", [2, FROZEN_STEPS, 4])
def test_resuming_inside_the_phase_and_across_its_end_repeats_every_bit(
    build: Build, cut: int, tmp_path: Path
) -> None:
    whole = Objective()
    whole_optimizer = build(whole)
    straight = [r.losses["total"].item() for r in steps(whole, whole_optimizer)]

    half = Objective()
    optimizer = build(half)
    first = [r.losses["total"].item() for r in steps(half, optimizer, last=cut)]
    save_state(tmp_path, TrainingState(cut, half.state_dict(), optimizer.state_dict(), []))
    state = load_state(tmp_path)
    assert state is not None
    resumed = Objective()
    optimizer = build(resumed)
    resumed.load_state_dict(state.model)
    optimizer.load_state_dict(state.optimizer)
    second = [r.losses["total"].item() for r in steps(resumed, optimizer, first=state.step)]

    assert first + second == straight
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    expected = whole_optimizer.state_dict()["state"]
    torch.testing.assert_close(optimizer.state_dict()["state"], expected, rtol=0, atol=0)


def test_frozen_phase_equals_training_the_head_on_finished_features() -> None:
    objective, reference = Objective(), Objective()
    for _ in steps(objective, adamw(objective), last=FROZEN_STEPS):
        pass
    optimizer = adamw(reference.head)
    for step, image in enumerate(images(0, FROZEN_STEPS)):
        optimizer.param_groups[0]["lr"] = 0.01 / (step + 1)
        optimizer.zero_grad()
        with torch.no_grad():
            maps = reference.encoder(image)
        reference.loss(maps).backward()
        nn.utils.clip_grad_norm_(reference.head.parameters(), 1.0)
        optimizer.step()
    torch.testing.assert_close(objective.state_dict(), reference.state_dict())
