"""The objective on its device, with what the settings ask for: layout, recomputation, compiler."""

import shutil
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from voxelbridge.core.errors import ConfigError
from voxelbridge.core.train.settings import TrainingSettings
from voxelbridge.core.train.steps import place

_COMPILERS = ("g++", "c++", "clang++", "gcc", "cc", "clang")


@runtime_checkable
class StagedEncoder(Protocol):
    """A module with resolution stages, finest first, as the encoders of `core.arch`."""

    stages: nn.ModuleList

    @property
    def strides(self) -> tuple[tuple[int, int, int], ...]: ...


def place_objective(objective: nn.Module, settings: TrainingSettings, device: torch.device) -> None:
    """Makes `objective` ready for `train_steps`; its state dict keeps its names.

    Before the optimizer is built. ConfigError where the settings ask for what is not there.
    """
    place(objective, device, settings.precision, memory_format=settings.memory_format)
    if settings.activation_checkpointing:
        recompute_activations(objective, stages=settings.activation_checkpointing)
    if settings.compile:
        if not any(shutil.which(name) for name in _COMPILERS):
            raise ConfigError("compile: no C++ compiler found; install g++, or set compile=false")
        objective.compile()


def recompute_activations(module: nn.Module, *, stages: int) -> None:
    """The `stages` finest stages of each encoder in `module` keep only their input for backward.

    Their forward runs a second time in the backward pass, with the same random numbers and the
    same autocast: gradients stay the same to the bit on a CPU. A stage must not depend on state
    that changes between the two runs. ConfigError for more stages than an encoder has.
    """
    encoders = [part for part in module.modules() if isinstance(part, StagedEncoder)]
    counts = [len(encoder.stages) for encoder in encoders]
    if not counts or stages > min(counts):
        found = f"an encoder of {min(counts)} stages" if counts else "no encoder with stages"
        raise ConfigError(f"activation_checkpointing: got {stages}, the network has {found}")
    for encoder in encoders:
        for stage in encoder.stages[:stages]:
            stage.forward = _Recomputed(stage.forward)


def is_recomputed(stage: nn.Module) -> bool:
    """Does `stage` recompute its activations? Whoever walks its parts must do so itself."""
    return isinstance(stage.forward, _Recomputed)


class _Recomputed:
    """Calls `forward` so that only its input is kept; a bound method, so that copies fit too."""

    def __init__(self, forward: Any) -> None:  # Any: a stage's bound `forward`
        self.forward = forward

    def __call__(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.forward(x)
        output = checkpoint(self.forward, x, use_reentrant=False)
        assert isinstance(output, Tensor)
        return output
