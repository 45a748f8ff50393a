"""A copy of modules that follows them as an exponential moving average."""

from copy import deepcopy
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class MomentumTeacher(nn.Module):
    """Copies of `students` whose tensors are buffers: saved with the state, seen by no optimizer.

    The first `update` copies the students, every further one moves each tensor t to
    momentum * t + (1 - momentum) * student. What the copies hold before it means nothing.
    """

    started: Tensor

    def __init__(self, *students: nn.Module, momentum: float) -> None:
        super().__init__()
        self.parts = nn.ModuleList(with_buffers(deepcopy(student)) for student in students)
        self.momentum = momentum
        self.register_buffer("started", torch.zeros(()))  # 0 or 1

    @torch.no_grad()
    def update(self, *students: nn.Module) -> None:
        """Follows `students`, in the order of the constructor; does not wait for the device."""
        share = 1 - self.momentum * self.started  # of the student
        for part, student in zip(self.parts, students, strict=True):
            mine = dict(part.named_buffers())
            for name, theirs in student.named_parameters():
                mine[name].lerp_(theirs, share)
        self.started.fill_(1)


def with_buffers(module: M) -> M:
    """`module`, with every parameter turned into a buffer of the same name, in place."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach())
    return module
