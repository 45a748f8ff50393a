"""Figures of methods in the same resamples of each data set's images, from tables of boxes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.core.progress import track
from voxelbridge.detect.evaluate.bootstrap import draws, most_copies
from voxelbridge.detect.evaluate.measures import RANGE_KEY, Measures, threshold_key
from voxelbridge.detect.evaluate.standings import Standings
from voxelbridge.detect.evaluate.tables import (
    BoxTable,
    read_cases,
    read_ground_truth,
    read_predictions,
)
from voxelbridge.detect.ranking import Values

Collected = dict[str, dict[str, dict[str, Values]]]  # measure, data set, method
_MEASURE = re.compile(r"(map|froc)_(range|[01](?:\.[0-9]+)?)")


@dataclass(frozen=True)
class Entry:
    """The tables of one training of a method, tested on a data set; `where` is said in errors."""

    dataset: str
    method: str
    ground_truth: Path
    predictions: Path
    cases: Path
    seed: str = ""
    where: str = ""


@dataclass(frozen=True)
class Measure:
    """What is ranked by: `name` as typed, the figure and its key in the resampled values."""

    name: str
    figure: Literal["map", "froc"]
    key: str
    threshold: float | None  # None: the range


@dataclass(eq=False)
class _Unit:
    """Boxes of every case of a data set by one model, or by the models of a cross-validation."""

    where: str
    cases: list[str]
    ground_truth: BoxTable
    predictions: BoxTable


def parse_measure(text: str) -> Measure:
    """`map_0.10`, `froc_0.30`, `map_range`; ConfigError for another one."""
    match = _MEASURE.fullmatch(text)
    if match is None or text == "froc_range":
        raise ConfigError(
            f"--measure: got {text!r}, expected map_range, or map_ or froc_ with an IoU, "
            "such as map_0.10"
        )
    figure: Literal["map", "froc"] = "map" if match[1] == "map" else "froc"
    if match[2] == "range":
        return Measure(text, figure, RANGE_KEY, None)
    threshold = float(match[2])
    if not 0 < threshold <= 1:
        raise ConfigError(f"--measure: got {text!r}, expected an IoU above 0 and up to 1")
    return Measure(text, figure, threshold_key(threshold), threshold)


def bootstrap(
    entries: Sequence[Entry], *, measures: Sequence[Measure], samples: int, seed: int
) -> Collected:
    """Figures of `entries` in `samples` resamples of the images, the same for all methods.

    Several trainings of one method: those on different cases (folds of a cross-validation) are
    put together, those on the same cases (seeds) are averaged in every resample.
    """
    if samples < 1:
        raise ConfigError(f"--samples: got {samples}, expected 1 at least")
    collected: Collected = {measure.name: {} for measure in measures}
    grouped: dict[str, dict[str, list[Entry]]] = {}
    for entry in entries:
        grouped.setdefault(entry.dataset, {}).setdefault(entry.method, []).append(entry)
    jobs = [(dataset, method) for dataset, methods in grouped.items() for method in methods]
    first: dict[str, _Unit] = {}
    for dataset, method in track(jobs, description="bootstrap"):
        units = _units(grouped[dataset][method])
        reference = first.setdefault(dataset, units[0])
        for unit in units:
            _check_same(dataset, reference, unit)
        parts = [_bootstrap_unit(unit, measures, samples=samples, seed=seed) for unit in units]
        for number, measure in enumerate(measures):
            chosen = [part[number] for part in parts]
            collected[measure.name].setdefault(dataset, {})[method] = Values(
                float(np.mean([each.value for each in chosen])),
                np.mean([each.samples for each in chosen], axis=0),
            )
    return collected


def _bootstrap_unit(
    unit: _Unit, measures: Sequence[Measure], *, samples: int, seed: int
) -> list[Values]:
    wanted = {
        figure: tuple(sorted({m.threshold for m in measures
                              if m.figure == figure and m.threshold is not None}))
        for figure in ("map", "froc")
    }  # fmt: skip
    asked = Measures(
        ap=wanted["map"],
        ap_range=any(measure.threshold is None for measure in measures),
        froc=wanted["froc"],
        sizes=None,
    )
    tables = (unit.ground_truth, unit.predictions)
    classes = 1 + max((int(table.labels.max()) for table in tables if len(table)), default=0)
    count = len(unit.cases)
    standings = Standings(count, classes, *tables, measures=asked, convention="clean")
    full = standings.values(np.ones(count, dtype=np.int64), per_class=False)
    standings.allow_copies(most_copies(count, samples=samples, seed=seed))
    found = np.empty((len(measures), samples))
    for row, weights in enumerate(draws(count, samples=samples, seed=seed)):
        values = standings.values(weights, per_class=False)
        found[:, row] = [float(values[measure.figure][measure.key]) for measure in measures]
    return [
        Values(float(full[measure.figure][measure.key]), part)
        for measure, part in zip(measures, found, strict=True)
    ]


def _units(entries: Sequence[Entry]) -> list[_Unit]:
    """One unit per training, or per seed where the trainings of a seed have different cases."""
    by_seed: dict[str, list[_Unit]] = {}
    seen: dict[Path, str] = {}
    for entry in entries:
        if (other := seen.setdefault(entry.predictions.absolute(), entry.where)) != entry.where:
            raise DataError(
                f"{entry.where}: data set {entry.dataset}, method {entry.method}: the predictions "
                f"{entry.predictions} are there already ({other}); drop one"
            )
        cases = read_cases(entry.cases)
        truth = read_ground_truth(entry.ground_truth, cases)
        predictions = read_predictions(entry.predictions, cases)
        unit = _Unit(entry.where, cases, truth, predictions)
        by_seed.setdefault(entry.seed, []).append(unit)
    units: list[_Unit] = []
    for of_seed in by_seed.values():
        if all(set(unit.cases) == set(of_seed[0].cases) for unit in of_seed):
            units += of_seed
        else:
            units.append(_pooled(of_seed, entries[0]))
    return units


def _pooled(units: Sequence[_Unit], entry: Entry) -> _Unit:
    names = [name for unit in units for name in unit.cases]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(
            f"data set {entry.dataset}, method {entry.method}: case {twice} is in several of its "
            "tables, but not all have the same cases; give folds of one cross-validation, or equal "
            "cases"
        )
    starts = np.cumsum([0, *(len(unit.cases) for unit in units)])
    truths = [unit.ground_truth for unit in units]
    found = [unit.predictions for unit in units]
    return _Unit(units[0].where, names, _join(truths, starts), _join(found, starts))


def _join(tables: Sequence[BoxTable], starts: np.ndarray) -> BoxTable:
    scores = [table.scores for table in tables if table.scores is not None]
    return BoxTable(
        np.concatenate([t.case_index + start for t, start in zip(tables, starts, strict=False)]),
        np.concatenate([table.labels for table in tables]),
        np.concatenate([table.boxes for table in tables]),
        np.concatenate(scores) if scores else None,
    )


def _check_same(dataset: str, first: _Unit, unit: _Unit) -> None:
    """Brings `unit` into the order of the first one's cases; other cases or objects are errors."""
    if unit is first:
        return
    if odd := sorted(set(first.cases) ^ set(unit.cases)):
        owner, other = (first, unit) if odd[0] in first.cases else (unit, first)
        raise DataError(
            f"data set {dataset}: case {odd[0]} is evaluated by {owner.where}, but not by "
            f"{other.where} ({len(odd)} such); all methods need the same cases"
        )
    rows = {name: row for row, name in enumerate(first.cases)}
    new = np.array([rows[name] for name in unit.cases], dtype=np.int64)
    unit.cases = first.cases
    unit.ground_truth = _reordered(unit.ground_truth, new)
    unit.predictions = _reordered(unit.predictions, new)
    if not np.array_equal(_sorted_rows(first.ground_truth), _sorted_rows(unit.ground_truth)):
        raise DataError(
            f"data set {dataset}: {unit.where} has other objects than {first.where}; all methods "
            "need the same ground truth"
        )


def _reordered(table: BoxTable, new: np.ndarray) -> BoxTable:
    return BoxTable(new[table.case_index], table.labels, table.boxes, table.scores)


def _sorted_rows(table: BoxTable) -> np.ndarray:
    rows = np.column_stack([table.case_index, table.labels, table.boxes])
    return rows[np.lexsort(rows.T[::-1])]
