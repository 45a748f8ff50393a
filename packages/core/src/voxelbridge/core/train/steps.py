"""The loop as a generator: one optimizer step per iteration; everything else is the caller's.

Finite check: on a CPU the losses are checked before the backward pass and the gradient norm before
the weights change. On a GPU reading a value each step would stall the device, so the first step
with a value that is not finite is remembered there; `StepResult.require_finite()` reads it. Whoever
logs or saves calls it first, and the generator does at its end.

Randomness inside the network (dropout, drawn points) comes from torch's global stream, which is
seeded anew for every step from (seed, rank, step): a resumed run needs no saved random state.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from voxelbridge.core.errors import VoxelbridgeError
from voxelbridge.core.train.absent_parts import average_gradients, lacks_parts, same_weights
from voxelbridge.core.train.cpu_bfloat16 import run_fragile_convolutions_in_float32
from voxelbridge.core.train.distributed import World

MemoryFormat = Literal["auto", "contiguous", "channels_last_3d"]

GRADIENT_NORM = "gradient_norm"
_NAME_SETS = 64  # sets of names that the watch keeps apart before it reads what it has
_MODEL_STREAM = 1  # keeps the network's random stream apart from the batches' streams


class NonFiniteError(VoxelbridgeError):
    """A loss or a gradient became NaN or infinite."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave: detached losses ("total" and its parts) on their device."""

    step: int  # from 0
    losses: dict[str, Tensor]
    gradient_norm: Tensor  # global L2 norm before clipping
    learning_rate: float
    require_finite: Callable[[], None]  # raises NonFiniteError; waits for a GPU


def train_steps(
    objective: nn.Module,
    batches: Iterable[Any],  # Any: a batch is whatever `objective` takes
    optimizer: torch.optim.Optimizer,
    *,
    world: World,
    learning_rate: Callable[[int], float],
    first_step: int,
    steps: int,
    precision: Literal["fp32", "bf16"],
    clip_norm: float | None,
    accumulation_steps: int,
    seed: int,
    frozen_parts: Callable[[int], tuple[str, ...]] = lambda _: (),
) -> Iterator[StepResult]:
    """Trains steps first_step .. steps - 1 and yields after each of them.

    `objective(batch)` returns named scalar losses with the one to minimise under "total"; it is
    the bare module, wrapped here for several ranks unless it may lack parts (`absent_parts`): then
    its gradients are averaged after the backward pass. `batches` gives `accumulation_steps` items
    per step. `frozen_parts(step)` names the submodules that do not train at a step: they run as in
    inference, keep nothing for a backward pass where their input needs no gradient, and neither
    weight decay nor running statistics move them.
    """
    trainable = [p for p in objective.parameters() if p.requires_grad]
    stream = iter(batches)
    watch = _FiniteWatch(world.device)
    frozen: tuple[str, ...] = ()
    synchronised: nn.Module | None = None
    if lacks_parts(objective):
        same_weights(objective, world)
    for step in range(first_step, steps):
        if synchronised is None or frozen_parts(step) != frozen:
            frozen = frozen_parts(step)
            freeze(objective, frozen, trainable=trainable)
            synchronised = None
            synchronised = objective if lacks_parts(objective) else world.synchronised(objective)
            objective.train()
        for name in frozen:  # at every step: a validation in between ends with train()
            objective.get_submodule(name).eval()
        rate = learning_rate(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        parts = [next(stream) for _ in range(accumulation_steps)]
        torch.manual_seed(step_seed(seed, world.rank, step))
        losses = _forward_and_backward(synchronised, parts, step, world.device, precision, watch)
        if lacks_parts(objective):
            average_gradients(trainable, world)
        norm = _clip(objective, clip_norm)
        watch.check(step, {**losses, GRADIENT_NORM: norm})
        optimizer.step()
        yield StepResult(step, losses, norm, rate, watch.raise_if_found)
    watch.raise_if_found()


def freeze(module: nn.Module, parts: Sequence[str], *, trainable: Sequence[nn.Parameter]) -> None:
    """Makes `trainable` parameters train, except those of the named submodules (dotted names)."""
    for parameter in trainable:
        parameter.requires_grad_(True)
    for name in parts:
        module.get_submodule(name).requires_grad_(False)


def step_seed(seed: int, rank: int, step: int) -> int:
    """The seed of the network's random stream at one step of one rank."""
    sequence = np.random.SeedSequence((seed, _MODEL_STREAM, rank, step))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def move(batch: Any, device: torch.device) -> Any:  # Any: nested batch in, the same shape out
    """`batch` with its tensors on `device`: tensors, mappings, sequences, things with `.to`.

    Everything else (names, numbers, None) stays as it is.
    """
    if isinstance(batch, Mapping):
        return {name: move(value, device) for name, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(move(value, device) for value in batch)
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    return batch.to(device) if hasattr(batch, "to") else batch


def place(
    module: nn.Module,
    device: torch.device,
    precision: Literal["fp32", "bf16"],
    *,
    memory_format: MemoryFormat = "auto",
) -> nn.Module:
    """Moves `module` to `device`, its weights in the given memory layout.

    `auto` is channels last on a CPU in float32, else contiguous: a small detector's step took
    0.21 s instead of 0.33 s on two cores. In bf16 the same layout is slower there, and on a GPU
    cuDNN chooses by itself.
    """
    module.to(device)
    automatic = memory_format == "auto" and device.type == "cpu" and precision == "fp32"
    if automatic or memory_format == "channels_last_3d":
        module.to(memory_format=torch.channels_last_3d)  # pyright: ignore[reportCallIssue] torch's stubs miss it
    if device.type == "cpu" and precision == "bf16":
        run_fragile_convolutions_in_float32(module)
    return module


def autocast(device: torch.device, precision: Literal["fp32", "bf16"]) -> torch.autocast:
    """The autocast region of training and validation."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module in inference mode inside the block, training again afterwards."""
    module.eval()
    try:
        yield
    finally:
        module.train()


def _forward_and_backward(
    objective: nn.Module,
    parts: list[Any],  # Any: batches
    step: int,
    device: torch.device,
    precision: Literal["fp32", "bf16"],
    watch: "_FiniteWatch",
) -> dict[str, Tensor]:
    occurrences: dict[str, list[Tensor]] = {}
    for index, part in enumerate(parts):
        is_last = index + 1 == len(parts)
        with _synchronising(objective, is_last):
            with autocast(device, precision):
                losses: dict[str, Tensor] = objective(move(part, device))
            detached = {name: loss.detach() for name, loss in losses.items()}
            watch.check(step, detached)
            (losses["total"] / len(parts)).backward()
        for name, loss in detached.items():
            occurrences.setdefault(name, []).append(loss)
    return {name: _mean(values) for name, values in occurrences.items()}


def _mean(values: list[Tensor]) -> Tensor:
    mean = values[0] / len(values)
    for value in values[1:]:
        mean = mean + value / len(values)
    return mean


def _synchronising(objective: nn.Module, is_last: bool) -> AbstractContextManager[None]:
    # Only the last part's backward pass averages the gradients over the ranks.
    if is_last or not isinstance(objective, DistributedDataParallel):
        return nullcontext()
    return objective.no_sync()


def _clip(module: nn.Module, clip_norm: float | None) -> Tensor:
    parameters = [p for p in module.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if clip_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    return norm


class _FiniteWatch:
    """Finds the first step with a value that is not finite; reads it late on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._reads_at_once = device.type == "cpu"
        self._found: dict[tuple[str, ...], tuple[Tensor, Tensor, Tensor]] = {}

    def check(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Remembers `values` if one of them is not finite and none was before."""
        stacked = torch.stack([value.detach().float() for value in values.values()])
        bad = ~torch.isfinite(stacked).all()
        if self._reads_at_once:
            if bad:
                _raise(step, values, stacked)
            return
        names = tuple(values)
        if names not in self._found:
            if len(self._found) >= _NAME_SETS:
                self.raise_if_found()
            never = torch.full((), -1, device=stacked.device, dtype=torch.int64)
            self._found[names] = (bad, torch.where(bad, step, never), stacked)
            return
        found, first, kept = self._found[names]
        is_first = bad & ~found
        first = torch.where(is_first, step, first)
        self._found[names] = (found | bad, first, torch.where(is_first, stacked, kept))

    def raise_if_found(self) -> None:
        """Raises for the earliest remembered step; waits for the device once."""
        if not self._found:
            return
        first = torch.stack([first for _, first, _ in self._found.values()]).tolist()
        found = [
            (step, names, kept)
            for step, (names, (_, _, kept)) in zip(first, self._found.items(), strict=True)
            if step >= 0
        ]
        if found:
            step, names, kept = min(found, key=lambda entry: entry[0])
            _raise(step, names, kept)
        self._found.clear()


def _raise(step: int, names: Iterable[str], values: Tensor) -> None:
    parts = ", ".join(
        f"{name} {value:.6g}" for name, value in zip(names, values.tolist(), strict=True)
    )
    raise NonFiniteError(
        f"step {step}: a loss or gradient is not finite ({parts}); the last saved state is intact: "
        "lower optim.lr, use precision fp32 or check the images"
    )
