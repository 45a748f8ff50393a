"""Learning rate and frozen parts as pure functions of the step."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, field_validator
from pydantic_core.core_schema import ValidationInfo

from voxelbridge.core.config import Config

RAMP_START = 1e-6  # learning rate at the first step of each linear ramp (nnDetection)


class FrozenPhase(Config):
    """A leading phase in which the named parts of the network stay as they are.

    `parts` are dotted module names of the trained module, such as "encoder". The learning rate
    climbs linearly over the phase; afterwards everything trains and the warm-up begins.
    """

    steps: PositiveInt
    parts: tuple[str, ...] = Field(min_length=1)


class PolySchedule(Config):
    """peak * (1 - t / T) ** power after an optional frozen phase and a linear warm-up.

    t counts from the end of the warm-up, T is the number of steps from there to the end of the
    run; at the last step the rate is still above zero. Source: nnU-Net's poly rule, taken per
    step where nnU-Net and nnssl change the rate once per epoch of 250 steps.
    """

    name: Literal["poly"] = "poly"
    steps: PositiveInt  # optimizer steps of the whole run, all phases together
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    power: Annotated[float, Field(gt=0)] = 0.9
    frozen: FrozenPhase | None = None

    @field_validator("warmup_steps", "frozen")
    @classmethod
    def _leaves_steps_to_train(
        cls, value: int | FrozenPhase | None, info: ValidationInfo
    ) -> int | FrozenPhase | None:
        warmup = value if isinstance(value, int) else info.data.get("warmup_steps", 0)
        frozen = value.steps if isinstance(value, FrozenPhase) else 0
        steps = info.data.get("steps")
        if steps is not None and warmup + frozen >= steps:
            raise ValueError(
                f"warm-up ({warmup}) and frozen phase ({frozen}) take all {steps} steps of the run"
            )
        return value


@dataclass(frozen=True)
class Tail:
    """The last `steps` steps of a run, which leave the schedule: weights are averaged there.

    The decay ends where the tail begins. In it the rate climbs in `every_steps` steps from `low`
    towards `high`, then starts again at `low`.
    """

    steps: int
    every_steps: int
    low: float
    high: float


@dataclass(frozen=True)
class Scheme:
    """What one attempt of a run follows, from its step 0 to `schedule.steps`."""

    schedule: PolySchedule
    peak: float  # learning rate at the end of the warm-up
    tail: Tail | None = None

    def learning_rate(self, step: int) -> float:
        """Learning rate of optimizer step `step`."""
        return learning_rate_at(self.schedule, step, peak=self.peak, tail=self.tail)

    def frozen_parts(self, step: int) -> tuple[str, ...]:
        """Names of the parts that do not train at `step`."""
        return frozen_parts_at(self.schedule, step)


def learning_rate_at(
    schedule: PolySchedule, step: int, *, peak: float, tail: Tail | None = None
) -> float:
    """Learning rate of optimizer step `step` (from 0); `peak` is the optimizer's own `lr`."""
    decay_end = schedule.steps - (tail.steps if tail else 0)
    if tail and step >= decay_end:
        share = (step - decay_end) % tail.every_steps / tail.every_steps
        return tail.low + (tail.high - tail.low) * share
    frozen = schedule.frozen.steps if schedule.frozen else 0
    if step < frozen:
        return _ramp(step, frozen, peak)
    step -= frozen
    if step < schedule.warmup_steps:
        return _ramp(step, schedule.warmup_steps, peak)
    step -= schedule.warmup_steps
    decay_steps = decay_end - frozen - schedule.warmup_steps
    return peak * (1 - step / decay_steps) ** schedule.power


def frozen_parts_at(schedule: PolySchedule, step: int) -> tuple[str, ...]:
    """Names of the parts that do not train at `step` (from 0)."""
    if schedule.frozen is None or step >= schedule.frozen.steps:
        return ()
    return schedule.frozen.parts


def due(every_steps: int, step: int) -> bool:
    """Whether something done every so many steps is due after step `step` (from 0)."""
    return (step + 1) % every_steps == 0


def _ramp(step: int, steps: int, peak: float) -> float:
    start = min(RAMP_START, peak)
    return start + (peak - start) * step / steps
