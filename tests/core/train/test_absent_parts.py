"""Averaged gradients of parts that only some batches use; also the program of each rank."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from voxelbridge.core.train import absent_parts
from voxelbridge.core.train.absent_parts import average_gradients, lacks_parts
from voxelbridge.core.train.distributed import World, join_world
from voxelbridge.core.train.steps import train_steps

WORLD = World(torch.device("cpu"))
STEPS, PARTS = 4, 2  # PARTS: accumulation
# Data sets of the four samples of each step; ranks and parts take them in order. Head "d" has no
# sample at all, "c" none after the first step.
DATASETS = ("abca", "aaab", "bbbb", "abab")


class Objective(nn.Module):
    """A stem and a head per data set around one trunk; the loss is the mean over the samples."""

    absent_parts = True

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stems = nn.ModuleDict({name: nn.Linear(3, 4) for name in "abcd"})
        self.trunk = nn.Conv3d(4, 4, 1)
        self.heads = nn.ModuleDict({name: nn.Linear(4, 2) for name in "abcd"})

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        losses = []
        for name, x in zip(batch["datasets"], batch["x"], strict=True):
            features = self.trunk(self.stems[name](x)[:, None, None, None]).flatten()
            losses.append(self.heads[name](features).square().mean())
        return {"total": torch.stack(losses).mean()}


def samples(step: int, first: int, last: int) -> dict[str, Any]:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
    return {"datasets": list(DATASETS[step][first:last]), "x": list(x[first:last])}


def train(objective: nn.Module, world: World, batches: list[Any], parts: int) -> list[Any]:
    """The gradients of every step, as lists; None for none."""
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    seen = []
    for _ in train_steps(
        objective, batches, optimizer, world=world, learning_rate=lambda _: 0.1, first_step=0,
        steps=STEPS, precision="fp32", clip_norm=None, accumulation_steps=parts, seed=0,
    ):  # fmt: skip
        seen.append(
            {
                name: None if p.grad is None else p.grad.flatten().tolist()
                for name, p in objective.named_parameters()
            }
        )
    return seen


def run_rank(out: Path) -> None:
    torch.set_num_threads(1)
    absent_parts.BUCKET_BYTES = 100  # several buckets
    with join_world("cpu") as world:
        objective = Objective()
        if world.rank == 1:
            nn.init.zeros_(objective.trunk.weight)  # rank 0's weights count
        parts = [(2 * world.rank + i, 2 * world.rank + i + 1) for i in range(PARTS)]
        own = [samples(step, *part) for step in range(STEPS) for part in parts]
        gradients = train(objective, world, own, PARTS)
        weights = {name: p.flatten().tolist() for name, p in objective.named_parameters()}
        content = {"gradients": gradients, "weights": weights}
        (out / f"{world.rank}.json").write_text(json.dumps(content))


@pytest.mark.long
@pytest.mark.slow
def test_two_ranks_average_like_one_process_with_the_joined_batch(tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    subprocess.run(
        [sys.executable, *launcher, __file__, str(tmp_path)],
        check=True,
        timeout=400,
        capture_output=True,
    )
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    objective = Objective()
    before = {name: p.detach().clone() for name, p in objective.named_parameters()}
    gradients = train(objective, WORLD, [samples(step, 0, 4) for step in range(STEPS)], 1)
    for step, (expected, found) in enumerate(zip(gradients, ranks[0]["gradients"], strict=True)):
        for name, gradient in expected.items():
            used = name.split(".")[1] in DATASETS[step] or name.startswith("trunk")
            assert (gradient is not None) == used == (found[name] is not None), (step, name)
            if used:
                assert found[name] == pytest.approx(gradient, rel=1e-5, abs=1e-7), (step, name)
    for name, weight in objective.named_parameters():
        found = torch.tensor(ranks[0]["weights"][name]).view(weight.shape)
        torch.testing.assert_close(found, weight.detach(), rtol=1e-5, atol=1e-6)
        if ".d." in name:
            assert torch.equal(found, before[name])


def test_parts_that_no_batch_uses_stay_as_they_are() -> None:
    objective = Objective()
    before = {name: p.detach().clone() for name, p in objective.named_parameters()}
    weights = []
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in train_steps(
        objective, [samples(step, 0, 4) for step in range(STEPS)], optimizer, world=WORLD,
        learning_rate=lambda _: 0.1, first_step=0, steps=STEPS, precision="fp32", clip_norm=1.0,
        accumulation_steps=1, seed=0,
    ):  # fmt: skip
        weights.append({name: p.detach().clone() for name, p in objective.named_parameters()})
    for name, parameter in objective.named_parameters():
        if ".d." in name:
            assert torch.equal(parameter, before[name])
            assert parameter not in optimizer.state
        if ".c." in name:  # used in the first step alone: momentum does not carry it on
            assert not torch.equal(weights[0][name], before[name])
            assert torch.equal(weights[3][name], weights[0][name])


def test_one_process_keeps_its_gradients() -> None:
    objective = Objective()
    objective(samples(0, 0, 4))["total"].backward()
    gradient = objective.trunk.weight.grad
    average_gradients(list(objective.parameters()), WORLD)
    assert objective.trunk.weight.grad is gradient
    assert objective.heads["d"].weight.grad is None


def test_only_an_objective_that_declares_it_lacks_parts() -> None:
    objective = Objective()
    assert lacks_parts(objective)
    objective.absent_parts = False
    assert not lacks_parts(objective)
    assert not lacks_parts(nn.Linear(1, 1))


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
