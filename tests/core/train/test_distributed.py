import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from voxelbridge.core.errors import ConfigError
from voxelbridge.core.train.distributed import World, choose_device, join_world
from voxelbridge.core.train.steps import train_steps


class Objective(nn.Module):
    """Encoder and head; the loss is the mean over the batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(3, 4)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"total": self.head(self.encoder(x)).square().mean()}


def batch(step: int) -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(step))


def run_steps(objective: nn.Module, world: World, batches: list[Tensor]) -> list[float]:
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1, momentum=0.9)
    results = train_steps(
        objective, batches, optimizer, world=world, learning_rate=lambda _: 0.1, first_step=0,
        steps=6, precision="fp32", clip_norm=1.0, accumulation_steps=1, seed=0,
        frozen_parts=lambda step: ("encoder",) if step < 3 else (),
    )  # fmt: skip
    return [result.losses["total"].item() for result in results]


RANK = """
import json, sys
sys.path.insert(0, sys.argv[1])
from test_distributed import Objective, batch, run_steps
import torch
torch.set_num_threads(1)
from voxelbridge.core.train.distributed import join_world
with join_world("cpu") as world:
    objective = Objective()
    own = [batch(step)[2 * world.rank : 2 * world.rank + 2] for step in range(6)]
    losses = run_steps(objective, world, own)
    agreed = [world.any(world.rank == 1), world.any(False)]
    weights = [p.flatten().tolist() for p in objective.parameters()]
    content = {"losses": losses, "agreed": agreed, "weights": weights, "size": world.size}
    with open(f"{sys.argv[2]}/{world.rank}.json", "w") as stream:
        json.dump(content, stream)
    assert world.gather(world.rank) == [0, 1]
"""


@pytest.mark.slow
def test_two_ranks_train_like_one_process_on_both_halves(tmp_path: Path) -> None:
    # The encoder is frozen for three steps: its gradients must be averaged afterwards as well.
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    subprocess.run(
        [*launcher, "--nproc-per-node", "2", script, str(Path(__file__).parent), str(tmp_path)],
        check=True,
        timeout=400,
        capture_output=True,
    )
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [rank["size"] for rank in ranks] == [2, 2]
    assert [rank["agreed"] for rank in ranks] == [[True, False]] * 2
    assert ranks[0]["weights"] == ranks[1]["weights"]
    objective = Objective()
    losses = run_steps(objective, World(torch.device("cpu")), [batch(step) for step in range(6)])
    for expected, *parts in zip(losses, *(rank["losses"] for rank in ranks), strict=True):
        assert sum(parts) / 2 == pytest.approx(expected, rel=1e-5)
    for expected, found in zip(objective.parameters(), ranks[0]["weights"], strict=True):
        torch.testing.assert_close(torch.tensor(found), expected.detach().flatten())


def test_one_process_is_its_own_world() -> None:
    with join_world("cpu") as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert world.any(True)
        assert not world.any(False)
        assert world.gather("x") == ["x"]
        module = nn.Linear(1, 1)
        assert world.synchronised(module) is module


def test_device_that_is_not_there_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match="device cuda: this machine has 0 usable GPUs"):
        choose_device("cuda")
