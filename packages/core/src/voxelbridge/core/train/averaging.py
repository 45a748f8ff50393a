"""Averages of the weights over the steps of a training, off by default.

What is validated and written at the end is then the average; the training itself goes on with its
own weights. Averaged are the parameters; buffers (running counts and statistics) are those of the
last step. A parameter that did not change, such as a frozen one, keeps its bits.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Literal, assert_never

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from voxelbridge.core.config import Config
from voxelbridge.core.train.schedule import Tail

Rate = Annotated[float, Field(gt=0)]


class NoAveraging(Config):
    """The weights of the last step are the result."""

    name: Literal["none"] = "none"


class EMA(Config):
    """Exponential moving average after every step: mean = d * mean + (1 - d) * weights.

    d is min(decay, (1 + n) / (10 + n)) at the n-th update, so that the first weights are forgotten
    early too.
    """

    name: Literal["ema"] = "ema"
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999


class WeightAveraging(Config):
    """Plain mean of the weights at the begin of the last `last_steps` steps and every so many.

    With `rates` (low, high) the learning rate leaves the schedule there and climbs from low towards
    high between two snapshots; the schedule's decay then ends where this begins. Source: arXiv
    1803.05407, as nnDetection (arXiv 2106.00817) has it: 11 snapshots over 10 epochs.
    """

    name: Literal["swa"] = "swa"
    last_steps: PositiveInt
    every_steps: PositiveInt
    rates: tuple[Rate, Rate] | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> "WeightAveraging":
        if self.last_steps % self.every_steps:
            raise ValueError(
                f"last_steps {self.last_steps} must be a multiple of every_steps {self.every_steps}"
            )
        if self.rates and self.rates[0] > self.rates[1]:
            raise ValueError(f"rates {list(self.rates)}: expected the lower one first")
        return self


Averaging = Annotated[NoAveraging | EMA | WeightAveraging, Field(discriminator="name")]


def tail_of(averaging: NoAveraging | EMA | WeightAveraging) -> Tail | None:
    """The end of a run in which the learning rate is the averaging's."""
    match averaging:
        case WeightAveraging(last_steps=steps, every_steps=every, rates=(low, high)):
            return Tail(steps, every, low, high)
        case _:
            return None


class Averager:
    """The average of the parameters of `objective` over a run of `steps` steps, on their device.

    Its values depend on the weights alone, so they are the same on every rank.
    """

    def __init__(
        self,
        averaging: NoAveraging | EMA | WeightAveraging,
        objective: nn.Module,
        *,
        steps: int,
    ) -> None:
        self._averaging = averaging
        self._objective = objective
        self._steps = steps
        self.count = 0  # weights in the average
        self._mean: dict[str, Tensor] = {}

    @torch.no_grad()
    def after_steps(self, finished: int) -> None:
        """Takes the weights into the average where they count, after so many finished steps."""
        match self._averaging:
            case NoAveraging():
                return
            case EMA(decay=decay):
                self._add(1 - min(decay, (1 + self.count) / (10 + self.count)))
            case WeightAveraging(last_steps=last, every_steps=every):
                into = finished - (self._steps - last)
                if into >= 0 and into % every == 0:
                    self._add(1 / (self.count + 1))
            case _:
                assert_never(self._averaging)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The objective with the average inside the block, where there is one already."""
        if self.count == 0:
            yield
            return
        own = {name: parameter.detach().clone() for name, parameter in self._parameters()}
        self._fill(self._mean)
        try:
            yield
        finally:
            self._fill(own)

    def restart(self, *, steps: int) -> None:
        """Forgets the average; the run now takes `steps` steps from here."""
        self._steps, self.count, self._mean = steps, 0, {}

    def state(self) -> dict[str, Any]:  # Any: a tree of tensors and numbers
        """What `load_state` continues from; empty where nothing is averaged yet."""
        return {"count": self.count, "mean": dict(self._mean)} if self.count else {}

    def load_state(self, state: Mapping[str, Any]) -> None:  # Any: as `state` gives it
        """Continues from what `state` returned; ValueError where it is of another network."""
        if not state:
            return
        mean: dict[str, Tensor] = state["mean"]
        shapes = {name: parameter.shape for name, parameter in self._parameters()}
        if {name: tensor.shape for name, tensor in mean.items()} != shapes:
            raise ValueError("the averaged weights are those of another network")
        self.count = int(state["count"])
        self._mean = {
            name: torch.empty_like(parameter).copy_(mean[name])
            for name, parameter in self._parameters()
        }

    @property
    def nbytes(self) -> int:
        """Bytes of the average in a training state."""
        if isinstance(self._averaging, NoAveraging):
            return 0
        return sum(parameter.nbytes for _, parameter in self._parameters())

    def _parameters(self) -> list[tuple[str, Tensor]]:
        return [(name, p.detach()) for name, p in self._objective.named_parameters()]

    def _add(self, share: float) -> None:
        for name, weights in self._parameters():
            if self.count == 0:
                self._mean[name] = weights.clone()
            else:
                # mean + share * (weights - mean): equal weights stay as they are to the bit
                self._mean[name].lerp_(weights, share)
        self.count += 1

    @torch.no_grad()
    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters():
            parameter.copy_(values[name])
