"""How far a study is: the matrix with states, steps and the time that is left."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from voxelbridge.core.files import read_json
from voxelbridge.core.run import CONFIG_FILE
from voxelbridge.detect.study.jobs import Job, Plan
from voxelbridge.detect.study.markers import LOG, Markers, State
from voxelbridge.detect.study.matrix import Cell, config_of
from voxelbridge.detect.study.steps import steps_of_run
from voxelbridge.detect.study.tasks import Kind, Train
from voxelbridge.detect.study_cells import CellKey

SCHEMA = 1
DASH = "-"


@dataclass(frozen=True)
class CellStatus:
    """One cell: its jobs with their states in order, the steps of its training."""

    key: CellKey
    state: State
    jobs: dict[Kind, State]
    steps: int
    of_steps: int
    seconds_left: float | None  # None: nothing like it has run yet


@dataclass(frozen=True)
class StudyStatus:
    """All cells, and the failed jobs with their error and log."""

    folder: Path
    cells: tuple[CellStatus, ...]
    failed: tuple[tuple[str, str, Path], ...]
    job_counts: dict[State, int]
    seconds_left: float | None  # of work, one job after the other; None: unknown for some

    def count(self, state: State) -> int:
        """Cells in a state."""
        return sum(cell.state == state for cell in self.cells)


def study_status(plan: Plan) -> StudyStatus:
    """What the folders say now; nothing is written."""
    markers = Markers(plan)
    clock = _Clock(plan, markers)
    cells = tuple(_cell(plan, cell, markers, clock) for cell in plan.cells)
    states: dict[str, State] = {name: markers.state(name) for name in plan.jobs}
    counts: dict[State, int] = {}
    for state in states.values():
        counts[state] = counts.get(state, 0) + 1
    failed = tuple(
        (name, markers.error(name) or "no message", markers.folder(name) / LOG)
        for name, state in states.items()
        if state == "failed"
    )
    open_jobs = [plan.jobs[name] for name, state in states.items() if state != "done"]
    left = clock.left(open_jobs)
    return StudyStatus(plan.study.folder, cells, failed, counts, left)


def describe(plan: Plan, status: StudyStatus) -> str:
    """The matrix for a person: rows architecture and initialisation, columns data sets."""
    config = plan.study.config
    rows = list(dict.fromkeys((c.key.architecture, c.key.initialisation) for c in status.cells))
    table = [["", "", *config.datasets]]
    for row in rows:
        texts = [
            _text([c for c in status.cells if (c.key.architecture, c.key.initialisation) == row
                   and c.key.dataset == dataset])
            for dataset in config.datasets
        ]  # fmt: skip
        table.append([*row, *texts])
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    ]
    states: tuple[State, ...] = ("done", "running", "waiting", "failed", "blocked")
    counts = ", ".join(f"{status.count(state)} {state}" for state in states)
    lines += ["", f"{len(status.cells)} cells: {counts}"]
    jobs = sum(status.job_counts.values())
    lines.append(f"{status.job_counts.get('done', 0)} of {jobs} jobs are done")
    is_done = status.job_counts.get("done", 0) == jobs
    if status.seconds_left is not None and not is_done:
        lines.append(f"about {_duration(status.seconds_left)} of work left, job after job")
    elif not is_done:
        lines.append("time left: not known before every kind of job has run once")
    if status.failed:
        lines.append("failed:")
        lines += [f"  {name}: {error}\n    log: {log}" for name, error, log in status.failed]
    return "\n".join(lines)


def as_json(status: StudyStatus) -> str:
    """The same as one JSON object; docs/formats/study.md."""
    content: dict[str, Any] = {  # Any: JSON values
        "schema": SCHEMA,
        "folder": str(status.folder),
        "cells": [
            {
                "dataset": cell.key.dataset,
                "architecture": cell.key.architecture,
                "initialisation": cell.key.initialisation,
                "fold": cell.key.fold,
                "seed": cell.key.seed,
                "state": cell.state,
                "jobs": cell.jobs,
                "steps": cell.steps,
                "of_steps": cell.of_steps,
                "seconds_left": _rounded(cell.seconds_left),
            }
            for cell in status.cells
        ],
        "jobs": status.job_counts,
        "failed": [
            {"job": name, "error": error, "log": str(log)} for name, error, log in status.failed
        ],
        "seconds_left": _rounded(status.seconds_left),
    }
    return json.dumps(content, indent=2)


class _Clock:
    """What jobs of a kind took so far, and from it what the open ones will take."""

    def __init__(self, plan: Plan, markers: Markers) -> None:
        self._markers = markers
        self._cells = {cell.key: cell for cell in plan.cells}
        self._steps: dict[tuple[str, tuple[str, ...]], int] = {}
        self._durations: dict[tuple[str, ...], list[float]] = {}
        for job in plan.jobs.values():
            marker = markers.done(job.id)
            if marker is None:
                continue
            seconds = float(marker["seconds"])
            if isinstance(job.task, Train):
                if not marker.get("steps"):
                    continue
                seconds /= marker["steps"]
            for key in self._keys(job):
                self._durations.setdefault(key, []).append(seconds)

    def steps(self, cell: Cell, run: Path) -> int:
        """All steps of a cell's training: of its run, where it has begun."""
        if (run / CONFIG_FILE).is_file():
            return int(read_json(run / CONFIG_FILE)["schedule"]["steps"])
        key = (cell.preset, cell.settings[:-1])
        if key not in self._steps:
            self._steps[key] = config_of(cell).schedule.steps
        return self._steps[key]

    def left(self, jobs: Sequence[Job]) -> float | None:
        """Seconds of all these jobs together; None where one of them cannot be told."""
        parts = [self._left(job) for job in jobs]
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None

    def _left(self, job: Job) -> float | None:
        is_running = self._markers.state(job.id) == "running"
        started = self._markers.started(job.id)
        elapsed = None
        if is_running and started is not None:
            elapsed = time.time() - datetime.fromisoformat(started["started"]).timestamp()
        if not isinstance(job.task, Train):
            usual = self._usual(job)
            return usual if usual is None or elapsed is None else max(0.0, usual - elapsed)
        run = Path(job.task.run)
        reached = steps_of_run(run)
        left = max(0, self.steps(self._cells[job.cells[0]], run) - reached)
        per_step = None
        if elapsed is not None and started is not None:
            own = reached - (started.get("steps") or 0)
            per_step = elapsed / own if own > 0 else None
        per_step = per_step or self._usual(job)
        return None if per_step is None else left * per_step

    def _usual(self, job: Job) -> float | None:
        """What the most similar finished jobs took on average; of trainings, per step."""
        for key in self._keys(job):
            if key in self._durations:
                return fmean(self._durations[key])
        return None

    def _keys(self, job: Job) -> list[tuple[str, ...]]:
        """From like in everything to like in kind. Trainings of another architecture do not count:
        their steps are of another length."""
        first = job.cells[0]
        if job.kind == "train":
            return [("train", first.dataset, first.architecture), ("train", first.architecture)]
        keys: list[tuple[str, ...]] = [(job.kind, first.dataset), (job.kind,)]
        if job.kind in ("sweep", "predict"):
            keys.insert(0, (job.kind, first.dataset, first.architecture))
        return keys


def _cell(plan: Plan, cell: Cell, markers: Markers, clock: _Clock) -> CellStatus:
    jobs = [plan.jobs[name] for name in plan.of_cell[cell.key]]
    states: dict[Kind, State] = {job.kind: markers.state(job.id) for job in jobs}
    run = next(Path(job.task.run) for job in jobs if isinstance(job.task, Train))
    total = clock.steps(cell, run)
    reached = total if states["train"] == "done" else min(total, steps_of_run(run))
    open_jobs = [job for job in jobs if markers.state(job.id) != "done"]
    return CellStatus(
        cell.key, _together(list(states.values())), states, reached, total, clock.left(open_jobs)
    )


def _together(states: Sequence[State]) -> State:
    if all(state == "done" for state in states):
        return "done"
    order: tuple[State, ...] = ("running", "failed", "blocked")
    for state in order:
        if state in states:
            return state
    return "waiting"


def _text(cells: Sequence[CellStatus]) -> str:
    """One place of the matrix: a single training, or how far several are."""
    if not cells:
        return DASH
    if len(cells) > 1:
        done = sum(cell.state == "done" for cell in cells)
        others: list[State] = [state for state in ("running", "failed", "blocked")
                               if any(cell.state == state for cell in cells)]  # fmt: skip
        counts = [f"{sum(c.state == state for c in cells)} {state}" for state in others]
        steps = sum(cell.steps for cell in cells) / max(1, sum(cell.of_steps for cell in cells))
        counts += [f"{steps:.0%}"] if done < len(cells) and steps else []
        return ", ".join([f"{done}/{len(cells)} done", *counts])
    cell = cells[0]
    part = f" {cell.steps / max(1, cell.of_steps):.0%}" if cell.state != "done" else ""
    if cell.state in ("running", "failed"):
        kinds = [kind for kind, state in cell.jobs.items() if state == cell.state]
        return f"{cell.state}: {kinds[0]}{part if kinds[0] == 'train' else ''}"
    return f"{cell.state}{part if cell.steps else ''}"


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)


def _duration(seconds: float) -> str:
    for length, unit in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
