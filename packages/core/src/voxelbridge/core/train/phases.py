"""What a training does when: the phases of its schedule, of the averaging and of a restart."""

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from voxelbridge.core.train.averaging import EMA, NoAveraging, WeightAveraging
from voxelbridge.core.train.restart import RestartRule, scheme_of
from voxelbridge.core.train.schedule import PolySchedule, Scheme


@dataclass(frozen=True)
class Phase:
    """Neighbouring steps of one attempt that follow one rule; the last step belongs to it."""

    attempt: int
    name: str  # "frozen warm-up", "warm-up", "decay", "decay, averaged", "averaging"
    first_step: int
    last_step: int
    first_rate: float
    last_rate: float
    highest_rate: float
    frozen: tuple[str, ...]  # parts that do not train
    averaged: str  # which weights go into the average: "no", "every step", "after steps ..."

    @property
    def steps(self) -> int:
        """Number of steps."""
        return self.last_step - self.first_step + 1

    def facts(self, *, epoch_steps: int) -> dict[str, Any]:  # Any: JSON values
        """The phase as a table row, with its length in epochs of so many steps."""
        return {**asdict(self), "steps": self.steps, "epochs": self.steps / epoch_steps}


def phases_of(
    schedule: PolySchedule,
    *,
    lr: float,
    averaging: NoAveraging | EMA | WeightAveraging,
    restart: RestartRule | None,
) -> list[Phase]:
    """The phases of the run as it is meant, then those of the attempt after a restart, if any.

    Every rate is what `learning_rate_at` gives for that step: a table of what will happen.
    """
    phases: list[Phase] = []
    for attempt in range(2 if restart else 1):
        scheme = scheme_of(schedule, lr=lr, averaging=averaging, restart=restart, attempt=attempt)
        edges = _edges(scheme, averaging)
        for (name, first), (_, end) in pairwise([*edges, ("", scheme.schedule.steps)]):
            if first < end:
                phases.append(_phase(attempt, name, first, end, scheme, averaging))
    return phases


def describe_phases(phases: list[Phase], *, epoch_steps: int) -> str:
    """The phases as a table for people."""
    rows = [("phase", "steps", "first - last", "epochs", "learning rate", "frozen", "averaged")]
    for phase in phases:
        rates = f"{phase.first_rate:.4g} -> {phase.last_rate:.4g}"
        if phase.highest_rate > max(phase.first_rate, phase.last_rate):
            rates += f" (at most {phase.highest_rate:.4g})"
        rows.append(
            (
                f"restart: {phase.name}" if phase.attempt else phase.name,
                f"{phase.steps:,}",
                f"{phase.first_step:,} - {phase.last_step:,}",
                f"{phase.steps / epoch_steps:.4g}",
                rates,
                ", ".join(phase.frozen) or "-",
                phase.averaged,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _edges(scheme: Scheme, averaging: NoAveraging | EMA | WeightAveraging) -> list[tuple[str, int]]:
    """Name and first step of each phase."""
    schedule = scheme.schedule
    frozen = schedule.frozen.steps if schedule.frozen else 0
    edges = [("frozen warm-up", 0), ("warm-up", frozen), ("decay", frozen + schedule.warmup_steps)]
    if isinstance(averaging, WeightAveraging):
        name = "averaging" if scheme.tail else "decay, averaged"
        edges.append((name, schedule.steps - averaging.last_steps))
    return edges


def _phase(
    attempt: int,
    name: str,
    first: int,
    end: int,
    scheme: Scheme,
    averaging: NoAveraging | EMA | WeightAveraging,
) -> Phase:
    last = end - 1
    start, stop = scheme.learning_rate(first), scheme.learning_rate(last)
    highest = max(start, stop)
    if name == "averaging" and scheme.tail:  # the top of a cycle
        highest = max(highest, scheme.learning_rate(first + scheme.tail.every_steps - 1))
    averaged = "no"
    match averaging:
        case EMA(decay=decay):
            averaged = f"after every step, decay {decay:g}"
        case WeightAveraging(last_steps=last_steps, every_steps=every) if name in (
            "averaging",
            "decay, averaged",
        ):
            averaged = f"before it and after every {every:,} steps, {last_steps // every + 1} times"
        case _:
            pass
    frozen = scheme.frozen_parts(first)
    return Phase(attempt, name, first, last, start, stop, highest, frozen, averaged)
