import pytest
import torch
from torch import Tensor, nn

from voxelbridge.core.arch.encoder import build_encoder
from voxelbridge.core.arch.presets import RESENC_SMALL
from voxelbridge.core.errors import VoxelbridgeError
from voxelbridge.core.train.distributed import World
from voxelbridge.core.train.steps import train_steps
from voxelbridge.pretrain_ssl.methods.mae import MAE

pytestmark = pytest.mark.gpu


def batch(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    hidden = torch.rand(2, 4, 4, 4, generator=generator) < 0.75
    return {"image": torch.randn(2, 1, 32, 32, 32, generator=generator), "hidden": hidden}


def run(device: str, precision: str, steps: int = 5) -> list[float]:
    torch.manual_seed(0)
    world = World(torch.device(device))
    objective: nn.Module = MAE(block_size=8).build(build_encoder(RESENC_SMALL, in_channels=1))
    objective.to(world.device)
    optimizer = torch.optim.SGD(objective.parameters(), lr=1e-2, momentum=0.9)
    results = train_steps(
        objective, map(batch, range(steps)), optimizer, world=world, learning_rate=lambda _: 1e-2,
        first_step=0, steps=steps, precision="bf16" if precision == "bf16" else "fp32",
        clip_norm=12.0, accumulation_steps=1, seed=0,
    )  # fmt: skip
    return [result.losses["total"].item() for result in results]


def test_gpu_trains_like_the_cpu() -> None:
    expected = run("cpu", "fp32")
    assert run("cuda", "fp32") == pytest.approx(expected, rel=1e-2)
    assert run("cuda", "bf16") == pytest.approx(expected, rel=5e-2)


class Spoiled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"total": (self.weight * x).square()}


def test_nan_on_the_gpu_is_found_at_the_next_reading_with_its_step() -> None:
    world = World(torch.device("cuda"))
    objective = Spoiled().to(world.device)
    values = [torch.tensor(x) for x in (1.0, 2.0, float("nan"), 1.0)]
    results = train_steps(
        objective, values, torch.optim.SGD(objective.parameters()), world=world,
        learning_rate=lambda _: 0.1, first_step=0, steps=4, precision="fp32", clip_norm=None,
        accumulation_steps=1, seed=0,
    )  # fmt: skip
    seen = [next(results) for _ in range(4)]
    with pytest.raises(VoxelbridgeError, match=r"step 2: .*total nan"):
        seen[-1].require_finite()
