"""The restart rule: a run that does not improve begins again, with another warm-up.

arXiv 2509.15947, appendix C.3: "If model performance did not improve sufficiently within a
predefined number of iterations", training was restarted with 10,000 steps of warm-up of the whole
network to a learning rate of 1e-4. The rule is judged once per attempt, at a fixed step, on values
of all ranks; whatever a run was interrupted by, it decides the same.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from voxelbridge.core.config import Config
from voxelbridge.core.train.averaging import EMA, NoAveraging, WeightAveraging, tail_of
from voxelbridge.core.train.distributed import World
from voxelbridge.core.train.metrics import Meter, mean_of_meters
from voxelbridge.core.train.schedule import PolySchedule, Scheme
from voxelbridge.core.train.steps import freeze

TRAINING_LOSS = "loss"


class RestartRule(Config):
    """When an attempt counts as failed, and what the next one follows.

    `metric` "loss" compares the mean training loss of the first `window_steps` steps with that of
    the last ones before `after_steps`; a value of the validation (`val_...`) compares the first one
    of the attempt with the last one so far. The improvement is (first - last) / |first| for
    "decrease" and last - first for "increase" (an mAP, which begins at 0).
    """

    after_steps: PositiveInt  # of an attempt: then it is judged
    min_improvement: Annotated[float, Field(gt=0)]
    metric: str = TRAINING_LOSS
    goal: Literal["decrease", "increase"] = "decrease"
    window_steps: PositiveInt = 500
    warmup_steps: PositiveInt = 10_000  # of the whole network, nothing frozen
    lr: Annotated[float, Field(gt=0)] = 1e-4
    max_restarts: PositiveInt = 1

    @model_validator(mode="after")
    def _can_be_judged(self) -> "RestartRule":
        if self.metric == TRAINING_LOSS and self.goal == "increase":
            raise ValueError('metric "loss" improves by a decrease; goal: got "increase"')
        if self.metric == TRAINING_LOSS and 2 * self.window_steps > self.after_steps:
            raise ValueError(
                f"two windows of {self.window_steps} steps do not fit into after_steps "
                f"{self.after_steps}"
            )
        if "_map" in self.metric and self.goal == "decrease":
            raise ValueError(f'{self.metric} improves by an increase; goal: got "decrease"')
        if self.metric != TRAINING_LOSS and not self.metric.startswith("val_"):
            raise ValueError(f'metric: got {self.metric}, expected "loss" or a "val_..." value')
        return self


@dataclass(frozen=True)
class Judgement:
    """What an attempt's `metric` was first and last, and whether that is enough."""

    first: float
    last: float
    improvement: float
    sufficient: bool


class RestartWatch:
    """What one rank has seen of the rule's metric in the attempt under way."""

    def __init__(self, rule: RestartRule) -> None:
        self._rule = rule
        self.restart()

    def restart(self) -> None:
        """Forgets what was seen: a new attempt begins."""
        self._windows = {"first": Meter(), "last": Meter()}
        self._values: list[float] = []  # of the validation: the first and the last one

    def add(self, step: int, total: Tensor, logged: Mapping[str, float]) -> None:
        """Takes in one step: its training loss and what the validation said, if there was one."""
        rule = self._rule
        if step >= rule.after_steps:
            return
        if rule.metric == TRAINING_LOSS:
            if step < rule.window_steps:
                self._windows["first"].add({TRAINING_LOSS: total})
            elif step >= rule.after_steps - rule.window_steps:
                self._windows["last"].add({TRAINING_LOSS: total})
        elif rule.metric in logged:
            self._values = [*self._values[:1], float(logged[rule.metric])]

    def is_due(self, step: int) -> bool:
        """Whether the attempt is judged after step `step`."""
        return step + 1 == self._rule.after_steps

    def judge(self, world: World) -> Judgement | None:
        """The same answer on every rank, which all must ask; None where two values are missing.

        Losses are means over the ranks; a validation's values are those of rank 0.
        """
        states = world.gather(self.state())
        if self._rule.metric == TRAINING_LOSS:
            means = [mean_of_meters([s[name] for s in states]) for name in ("first", "last")]
            values = [mean[TRAINING_LOSS] for mean in means if mean]
        else:
            values = states[0]["values"]
        if len(values) < 2:
            return None
        first, last = values
        improvement = last - first
        if self._rule.goal == "decrease":
            improvement = -improvement / max(abs(first), torch.finfo(torch.float32).tiny)
        return Judgement(first, last, improvement, improvement >= self._rule.min_improvement)

    def state(self) -> dict[str, Any]:  # Any: JSON-like tree
        """What `load_state` continues from."""
        windows = {name: meter.state() for name, meter in self._windows.items()}
        return {**windows, "values": list(self._values)}

    def load_state(self, state: Mapping[str, Any]) -> None:  # Any: as `state` gives it
        """Continues from what `state` returned."""
        for name, meter in self._windows.items():
            meter.load_state(state[name])
        self._values = [float(value) for value in state["values"]]


class StartingPoint:
    """The network and its optimizer as they were before the first step; the copy is on the CPU."""

    def __init__(self, objective: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._trainable = [p for p in objective.parameters() if p.requires_grad]
        self._weights = {
            name: tensor.detach().to("cpu", copy=True)
            for name, tensor in objective.state_dict().items()
        }
        self._optimizer = copy.deepcopy(optimizer.state_dict())

    def restore(self, objective: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Puts them back, to the bit; everything trains."""
        freeze(objective, (), trainable=self._trainable)
        optimizer.zero_grad(set_to_none=True)
        objective.load_state_dict(self._weights)
        optimizer.load_state_dict(copy.deepcopy(self._optimizer))


def verdict(rule: RestartRule, judgement: Judgement | None, step: int, attempt: int) -> str:
    """What the restart rule says of an attempt, as one line."""
    start = f"restart rule after step {step}: {rule.metric}"
    if judgement is None:
        return f"WARNING: {start} was not recorded twice; the attempt cannot be judged, going on"
    values = (
        f"{judgement.first:.4g} -> {judgement.last:.4g}, improvement {judgement.improvement:.3g} "
        f"of {rule.min_improvement:g} asked for"
    )
    if judgement.sufficient:
        return f"{start} {values}: enough, going on"
    if attempt < rule.max_restarts:
        return (
            f"{start} {values}: RESTART {attempt + 1} of at most {rule.max_restarts} from the "
            f"initial weights, {rule.warmup_steps:,} steps of warm-up to {rule.lr:g}"
        )
    return (
        f"WARNING: {start} {values}: still too little after {attempt} restarts, the bound; going "
        "on, but this training has probably failed"
    )


def scheme_of(
    schedule: PolySchedule,
    *,
    lr: float,
    averaging: NoAveraging | EMA | WeightAveraging,
    restart: RestartRule | None,
    attempt: int,
) -> Scheme:
    """What attempt 0 follows, or an attempt after a restart.

    The latter has no frozen phase and as many steps as the first one has after its own.
    """
    if attempt == 0 or restart is None:
        return Scheme(schedule, lr, tail_of(averaging))
    frozen = schedule.frozen.steps if schedule.frozen else 0
    again = PolySchedule(
        steps=schedule.steps - frozen, warmup_steps=restart.warmup_steps, power=schedule.power
    )
    return Scheme(again, restart.lr, tail_of(averaging))


def check_scheme(
    schedule: PolySchedule,
    averaging: NoAveraging | EMA | WeightAveraging,
    restart: RestartRule | None,
) -> None:
    """ValueError where averaging or restart rule do not fit into the schedule's steps."""
    frozen = schedule.frozen.steps if schedule.frozen else 0
    last = averaging.last_steps if isinstance(averaging, WeightAveraging) else 0
    if last and frozen + schedule.warmup_steps + last >= schedule.steps:
        raise ValueError(
            f"averaging.last_steps {last}, the warm-up ({schedule.warmup_steps}) and the frozen "
            f"phase ({frozen}) take all {schedule.steps} steps of the run"
        )
    if restart is None:
        return
    if restart.after_steps >= schedule.steps - frozen:
        raise ValueError(
            f"restart.after_steps {restart.after_steps}: must be below the "
            f"{schedule.steps - frozen} steps of a restarted run"
        )
    if restart.warmup_steps + last >= schedule.steps - frozen:
        raise ValueError(
            f"restart.warmup_steps {restart.warmup_steps}: a restarted run has "
            f"{schedule.steps - frozen} steps in all"
        )
