"""One process, or one per rank under `torchrun`: who am I, what do all ranks agree on.

Start several ranks with `torchrun --nproc-per-node N -m -- voxelbridge.<part>.cli train ...`;
nothing else changes. DistributedDataParallel averages gradients over nccl (GPU) or gloo (CPU).
Decisions and log values go over a gloo group of their own, so that they never wait for the GPU.
Only rank 0 writes files.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import get_node_local_rank
from torch.nn.parallel import DistributedDataParallel

from voxelbridge.core.errors import ConfigError

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)  # a dead rank ends the others after this

DeviceChoice = Literal["auto", "cpu", "cuda"]


@dataclass
class World:
    """This process among all ranks of the job; `control` is the gloo group of decisions."""

    device: torch.device
    rank: int = 0
    size: int = 1
    control: Any = None  # Any: torch's process group type is private

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on at least one rank; every rank must ask."""
        return self.any_of([flag])[0]

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """`any` for several flags in one exchange; as many on every rank."""
        if self.size == 1:
            return list(flags)
        values = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.control)
        return [bool(value) for value in values.tolist()]

    def gather(self, value: T) -> list[T]:
        """The `value` of every rank, by rank; every rank must call it. Small plain objects only."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size  # Any: filled by torch
        dist.all_gather_object(values, value, group=self.control)
        return values

    def synchronised(self, module: nn.Module) -> nn.Module:
        """`module`, wrapped so that the gradients of its `forward` are averaged over the ranks.

        Parameters that do not require gradients now are left out: wrap again when that changes,
        after the old wrapper is gone.
        """
        if self.size == 1:
            return module
        gc.collect()  # an old wrapper in a reference cycle would reduce every gradient twice
        on_gpu = self.device.type == "cuda"
        return DistributedDataParallel(module, device_ids=[self.device] if on_gpu else None)


@contextmanager
def join_world(device: DeviceChoice) -> Iterator[World]:
    """The world of this process: alone, or one rank of the job that `torchrun` started."""
    torch.backends.cudnn.benchmark = True  # patches keep their size: the search pays off at once
    if not dist.is_torchelastic_launched():
        yield World(choose_device(device))
        return
    chosen = choose_device(device, index=get_node_local_rank())
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=TIMEOUT)
    control = dist.new_group(backend="gloo", timeout=TIMEOUT)
    world = World(chosen, dist.get_rank(), dist.get_world_size(), control)
    del control
    try:
        yield world
        world.gather(None)  # a rank that left early would cut the others' last exchange
    finally:
        # A group that is alive when the interpreter ends aborts the process now and then: its
        # threads are still running. So the last references go here, before the groups do.
        world.control = None
        gc.collect()
        dist.destroy_process_group()


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum of `values` over all ranks, with gradients to every rank's own; every rank must call it.

    Where all ranks put the sum to the same use and their gradients are averaged afterwards
    (DistributedDataParallel), the result is the gradient of one process that has all the data.
    Without `torchrun`, or as the only rank, `values` themselves.
    """
    if not dist.is_available() or not dist.is_initialized():
        return values
    total = _SumOverRanks.apply(values)
    assert isinstance(total, Tensor)
    return total


def num_ranks() -> int:
    """Ranks of the job that this process belongs to."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _SumOverRanks(torch.autograd.Function):
    # torch.distributed.nn has the same, deprecated from torch 2.13 on

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:  # noqa: ARG004 - torch gives its context
        total = values.detach().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Tensor:  # noqa: ARG004
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total


def choose_device(choice: DeviceChoice, *, index: int = 0) -> torch.device:
    """The torch device for `auto` (a GPU if there is one), `cpu` or `cuda`."""
    match choice:
        case "cpu":
            return torch.device("cpu")
        case "auto" if not torch.cuda.is_available():
            return torch.device("cpu")
        case "auto" | "cuda":
            if torch.cuda.device_count() <= index:
                raise ConfigError(
                    f"device cuda: this machine has {torch.cuda.device_count()} usable GPUs, "
                    f"{index + 1} needed; use --device cpu"
                )
            return torch.device("cuda", index)
