"""Confidence intervals: the images drawn again with replacement, many times.

Who found what is known once; a resample is a weight per image and costs array arithmetic alone.
Letters: S resamples, N images.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from voxelbridge.core.progress import track
from voxelbridge.detect.evaluate.assign import check_cases
from voxelbridge.detect.evaluate.case_level import CaseRanking
from voxelbridge.detect.evaluate.measures import Convention, Measures
from voxelbridge.detect.evaluate.operating_points import RATE_NAMES, OperatingPoint
from voxelbridge.detect.evaluate.ranked import Floats, Ints
from voxelbridge.detect.evaluate.size_strata import SizeStrata
from voxelbridge.detect.evaluate.standings import Standings
from voxelbridge.detect.evaluate.tables import BoxTable

INTERVAL = (2.5, 97.5)  # percentiles of a 95 % interval

Samples = Mapping[str, Mapping[str, Floats]]  # as Standings.values, each with S in front


def draws(num_cases: int, *, samples: int, seed: int) -> Iterator[Ints]:
    """How often each image was drawn, (N,), resample by resample."""
    rng = np.random.default_rng(seed)
    for _ in range(samples):
        drawn = rng.integers(0, num_cases, num_cases)
        yield np.bincount(drawn, minlength=num_cases)


def resampled(
    cases: Sequence[str],
    ground_truth: BoxTable,
    predictions: BoxTable,
    *,
    num_classes: int,
    samples: int,
    seed: int = 0,
    measures: Measures | None = None,
    convention: Convention = "clean",
) -> Samples:
    """The figures of every resample: "map" and "froc" by IoU key, (S,), and what they are made of.

    "ap_per_class" (S, K) and "sensitivity" (S, rates) come too; NaN where a resample has no object.
    Equal `seed` and number of cases give equal resamples, so detectors can be compared pair by
    pair on the same images.
    """
    check_cases(cases, ground_truth, predictions)
    standings = Standings(
        len(cases),
        num_classes,
        ground_truth,
        predictions,
        measures=measures or Measures(),
        convention=convention,
    )
    standings.allow_copies(most_copies(len(cases), samples=samples, seed=seed))
    stacked = _Stacked()
    for weights in draws(len(cases), samples=samples, seed=seed):
        stacked.add(standings.values(weights, per_class=False))
    return stacked.arrays()


def most_copies(num_cases: int, *, samples: int, seed: int) -> int:
    """How often an image is drawn at most in any of the resamples."""
    return max(int(weights.max()) for weights in draws(num_cases, samples=samples, seed=seed))


def intervals(
    standings: Standings,
    *,
    points: Mapping[str, Sequence[OperatingPoint]],
    cases: Sequence[CaseRanking],
    strata: SizeStrata | None,
    samples: int,
    seed: int,
    show_progress: bool,
) -> dict[str, Any]:
    """The `bootstrap` object of metrics.json; `cases`: of all classes, then of each class."""
    most = most_copies(standings.num_cases, samples=samples, seed=seed)
    standings.allow_copies(most)
    stacked, by_size = _Stacked(), _Stacked()
    if strata is not None:
        strata.allow_copies(most)
    rounds = draws(standings.num_cases, samples=samples, seed=seed)
    if show_progress:
        rounds = track(rounds, description="bootstrap", total=samples)
    for weights in rounds:
        values = standings.values(weights)
        classes = {key: each.mean(axis=1) for key, each in values["sensitivity_per_class"].items()}
        found = {key: np.array([p.rates(weights) for p in some]) for key, some in points.items()}
        areas = np.array([ranking.area(weights) for ranking in cases])
        stacked.add(values)
        stacked.add({"froc_per_class": classes, "points": found, "cases": {"auc": areas}})
        if strata is not None:
            by_size.add(strata.values(weights))
    content = {"samples": samples, "seed": seed, **_to_json(stacked.intervals())}
    if strata is not None:
        sizes = by_size.intervals()
        content["sizes"] = {name: _by_key(sizes[name]) for name in ("map", "froc")}
    return content


class _Stacked:
    """Figures of one resample after the other, by name and IoU key."""

    def __init__(self) -> None:
        self._parts: dict[tuple[str, str], list[Floats]] = {}

    def add(self, values: Mapping[str, Mapping[str, Floats]]) -> None:
        for name, by_key in values.items():
            for key, value in by_key.items():
                self._parts.setdefault((name, key), []).append(value)

    def arrays(self) -> Samples:
        result: dict[str, dict[str, Floats]] = {}
        for (name, key), parts in self._parts.items():
            result.setdefault(name, {})[key] = np.stack(parts)
        return result

    def intervals(self) -> Samples:
        """Both bounds behind: (..., 2)."""
        return {
            name: {key: _interval(values) for key, values in by_key.items()}
            for name, by_key in self.arrays().items()
        }


def _to_json(bounds: Samples) -> dict[str, Any]:
    auc = bounds["cases"]["auc"]
    return {
        "map": _by_key(bounds["map"]),
        "froc": _by_key(bounds["froc"]),
        "ap_per_class": {key: _by_label(each) for key, each in bounds["ap_per_class"].items()},
        "froc_per_class": {key: _by_label(each) for key, each in bounds["froc_per_class"].items()},
        "sensitivity": _by_key(bounds["sensitivity"]),
        "operating_points": {
            key: [dict(zip(RATE_NAMES, _nested(point), strict=True)) for point in each]
            for key, each in bounds["points"].items()
        },
        "case_level": {"pooled": _nested(auc[0]), "per_class": _by_label(auc[1:])},
    }


def _by_key(bounds: Mapping[str, Floats]) -> dict[str, Any]:
    return {key: _nested(each) for key, each in bounds.items()}


def _by_label(bounds: Floats) -> dict[str, Any]:
    return {str(label): _nested(each) for label, each in enumerate(bounds)}


def _nested(values: Floats) -> list[Any]:
    """Nested lists with None for NaN."""
    if values.ndim > 1:
        return [_nested(each) for each in values]
    return [None if np.isnan(value) else float(value) for value in values]


def _interval(values: Floats) -> Floats:
    """The percentiles of what is defined, along the first axis; (S, ...) -> (..., 2)."""
    columns = values.reshape(len(values), -1)
    bounds = np.full((columns.shape[1], 2), np.nan)
    for row, column in enumerate(columns.T):
        defined = column[~np.isnan(column)]
        if len(defined):
            bounds[row] = np.percentile(defined, INTERVAL)
    return bounds.reshape(*values.shape[1:], 2)
