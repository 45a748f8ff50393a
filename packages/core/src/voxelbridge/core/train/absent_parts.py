"""Gradients of parts that only some batches use: the stems and heads of several data sets.

DistributedDataParallel waits for a gradient of every parameter, or, told to search, gives those
without one a gradient of zero: then weight decay and momentum move what no rank has used. An
objective that declares `absent_parts = True` is run bare instead, and after the backward pass its
gradients are averaged here: sum over the ranks / ranks, a rank without one counting as zero, and
None stays None where no rank has one, so that the optimizer leaves the parameter and its momentum
as they are. The exchange does not overlap with the backward pass; it costs one reading of the
gradients per step, also with `accumulation_steps`.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from voxelbridge.core.train.distributed import World

BUCKET_BYTES = 64 * 2**20  # gradients that travel in one exchange, and the memory that takes


@runtime_checkable
class AbsentParts(Protocol):
    """An objective some of whose parameters take no part in some steps."""

    absent_parts: bool


def lacks_parts(objective: nn.Module) -> bool:
    """Whether `objective` declares that parts of it may be absent from a step."""
    return isinstance(objective, AbsentParts) and objective.absent_parts


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter], world: World) -> None:
    """Replaces every gradient by its mean over the ranks; every rank must call it.

    `parameters` are the same on all ranks, in the same order.
    """
    if world.size == 1:
        return
    present = world.any_of([parameter.grad is not None for parameter in parameters])
    used = [p for p, is_present in zip(parameters, present, strict=True) if is_present]
    for bucket in _buckets(used):
        flat = torch.cat([_gradient(parameter).flatten() for parameter in bucket])
        dist.all_reduce(flat)  # nccl on a GPU, gloo on a CPU
        flat /= world.size
        for parameter, mean in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(mean.view(parameter.shape))


@torch.no_grad()
def same_weights(module: nn.Module, world: World) -> None:
    """Gives every rank the parameters and buffers of rank 0, as DistributedDataParallel does."""
    if world.size == 1:
        return
    for tensor in (*module.parameters(), *module.buffers()):
        dense = tensor.detach().contiguous()
        dist.broadcast(dense, src=0)
        tensor.copy_(dense)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        nbytes = parameter.numel() * parameter.element_size()
        other = bool(bucket) and bucket[0].dtype != parameter.dtype
        if bucket and (other or size + nbytes > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += nbytes
    if bucket:
        yield bucket
