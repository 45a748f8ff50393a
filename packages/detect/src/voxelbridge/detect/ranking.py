"""Who ranks where: methods ranked in every resample of the images of every data set.

arXiv 2509.15947, section 2.4 and figures 2 and 3: 1,000 resamples of the images; in each one the
methods are ranked, and the ranks of all data sets are put together. Rank 1 is the best; equal
figures share the mean of their ranks. Letters: S resamples, D data sets, M methods.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.errors import ConfigError, DataError

INTERVAL = (2.5, 97.5)  # percentiles
USUAL_BASELINES = ("default", "none-default")
SEPARATOR = "/"  # of the two parts of a method's name: architecture/initialisation

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Values:
    """A method's figure on a data set, larger is better: of all images, and of every resample (S,).

    NaN where a resample has no object.
    """

    value: float
    samples: Floats


@dataclass(frozen=True, eq=False)
class Difference:
    """How much better than its baseline a method is: on all images, and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Placing:
    """Ranks of all methods, (M,) each, over the resamples of one data set or of all of them.

    `shares` (M, M): how often method m has place p, p from 0; equal figures share their places.
    `low` and `high` are the 2.5th and the 97.5th percentile of the ranks.
    """

    mean: Floats
    low: Floats
    high: Floats
    shares: Floats


@dataclass(frozen=True, eq=False)
class Ranking:
    """Ranks of `methods` on `datasets`; the arrays are in the order of these names.

    values (D, M) of all images; samples: of each data set (S, M), resamples without an object left
    out; baselines: index of each method's baseline, None where it has none.
    """

    datasets: tuple[str, ...]
    methods: tuple[str, ...]
    values: Floats
    samples: tuple[Floats, ...]
    baselines: tuple[int | None, ...]

    @cached_property
    def per_dataset(self) -> tuple[Placing, ...]:
        """The ranks on each data set."""
        return tuple(_placing([rank_rows(samples)], [samples]) for samples in self.samples)

    @cached_property
    def overall(self) -> Placing:
        """The ranks on all data sets together; each data set counts the same."""
        return _placing([rank_rows(samples) for samples in self.samples], self.samples)

    @property
    def order(self) -> list[int]:
        """Indices of the methods, the best mean rank first; ties by name."""
        return sorted(
            range(len(self.methods)), key=lambda m: (self.overall.mean[m], self.methods[m])
        )

    @property
    def means(self) -> Floats:
        """Mean of each method's figure over the data sets, (M,)."""
        return self.values.mean(axis=0)

    def difference(self, method: int, *, dataset: int | None = None) -> Difference | None:
        """Method minus its baseline on one data set, or the mean over all; None: no baseline."""
        baseline = self.baselines[method]
        if baseline is None:
            return None
        chosen = range(len(self.datasets)) if dataset is None else [dataset]
        parts = [self.samples[d] for d in chosen]
        shortest = min(len(part) for part in parts)
        gaps = [part[:shortest, method] - part[:shortest, baseline] for part in parts]
        low, high = np.percentile(np.mean(gaps, axis=0), INTERVAL)
        values = self.values[list(chosen)]
        value = float((values[:, method] - values[:, baseline]).mean())
        return Difference(value, float(low), float(high))

    def interval(self, method: int, dataset: int) -> tuple[float, float]:
        """95 % interval of a method's figure on a data set."""
        low, high = np.percentile(self.samples[dataset][:, method], INTERVAL)
        return float(low), float(high)


def rank(
    values: Mapping[str, Mapping[str, Values]],
    *,
    baseline: str | None = None,
) -> Ranking:
    """Ranks the methods from `values[data set][method]`.

    `baseline`: a method, or the initialisation that is the baseline of each architecture where
    methods are called architecture/initialisation; None takes `default` or `none-default` if
    there is one. DataError where a method is missing on a data set or the resamples do not fit.
    """
    methods = tuple(dict.fromkeys(name for of_set in values.values() for name in of_set))
    if len(methods) < 2:
        raise DataError(f"ranking: got {len(methods)} method, expected two at least")
    for dataset, of_set in values.items():
        for method in methods:
            if method not in of_set:
                raise DataError(
                    f"data set {dataset}: method {method} is missing; every method needs a result "
                    "on every data set: add it or leave the method or the data set out"
                )
    samples = tuple(_stack(dataset, of_set, methods) for dataset, of_set in values.items())
    full = np.array([[of_set[name].value for name in methods] for of_set in values.values()])
    return Ranking(tuple(values), methods, full, samples, baselines(methods, baseline))


def rank_rows(samples: Floats) -> Floats:
    """Rank of every method in every resample, (S, M) -> (S, M): 1 the largest, ties the mean."""
    from scipy.stats import rankdata

    return np.asarray(rankdata(-samples, method="average", axis=1), dtype=np.float64)


def place_shares(samples: Floats) -> Floats:
    """How often each method has each place, (S, M) -> (M, M); k equal ones have 1/k of k places."""
    from scipy.stats import rankdata

    count = samples.shape[1]
    first = rankdata(-samples, method="min", axis=1).astype(np.int64)  # (S, M)
    last = rankdata(-samples, method="max", axis=1).astype(np.int64)
    places = np.arange(1, count + 1)
    inside = (places >= first[..., None]) & (places <= last[..., None])  # (S, M, M)
    return (inside / (last - first + 1)[..., None]).mean(axis=0)


def baselines(methods: Sequence[str], baseline: str | None) -> tuple[int | None, ...]:
    """Index of each method's baseline; `baseline` as in `rank`. ConfigError if there is none."""
    rows = {name: index for index, name in enumerate(methods)}
    for wanted in USUAL_BASELINES if baseline is None else (baseline,):
        if wanted in rows:
            return (rows[wanted],) * len(methods)
        found = tuple(
            rows.get(f"{name.rpartition(SEPARATOR)[0]}{SEPARATOR}{wanted}") for name in methods
        )
        if any(index is not None for index in found):
            return found
    if baseline is None:
        return (None,) * len(methods)
    raise ConfigError(f"--baseline: got {baseline!r}, expected one of {', '.join(methods)}")


def ranking_rows(ranking: Ranking) -> list[dict[str, Any]]:
    """One flat row for each method on all data sets (`dataset` "(all)"), then on each of them.

    Best mean rank first; None: no baseline, or no interval of the mean of several data sets.
    """
    rows: list[dict[str, Any]] = []
    for dataset, placing in ((None, ranking.overall), *enumerate(ranking.per_dataset)):
        order = sorted(ranking.order, key=lambda m: placing.mean[m])
        for method in order:
            rows.append(_row(ranking, placing, method, dataset))
    return rows


def _row(ranking: Ranking, placing: Placing, method: int, dataset: int | None) -> dict[str, Any]:
    gap = ranking.difference(method, dataset=dataset)
    baseline = ranking.baselines[method]
    if dataset is None:
        value, low, high = float(ranking.means[method]), None, None
    else:
        value = float(ranking.values[dataset, method])
        low, high = ranking.interval(method, dataset)
    return {
        "dataset": "(all)" if dataset is None else ranking.datasets[dataset],
        "method": ranking.methods[method],
        "mean_rank": float(placing.mean[method]),
        "rank_low": float(placing.low[method]),
        "rank_high": float(placing.high[method]),
        "first_share": float(placing.shares[method, 0]),
        "value": value,
        "value_low": low,
        "value_high": high,
        "baseline": None if baseline is None else ranking.methods[baseline],
        "difference": None if gap is None else gap.value,
        "difference_low": None if gap is None else gap.low,
        "difference_high": None if gap is None else gap.high,
    }


def _placing(ranks: Sequence[Floats], samples: Sequence[Floats]) -> Placing:
    """Over data sets of equal weight, whatever their number of resamples."""
    bounds = np.array(
        [_quantiles([part[:, m] for part in ranks]) for m in range(ranks[0].shape[1])]
    )
    return Placing(
        mean=np.mean([part.mean(axis=0) for part in ranks], axis=0),
        low=bounds[:, 0],
        high=bounds[:, 1],
        shares=np.mean([place_shares(part) for part in samples], axis=0),
    )


def _quantiles(parts: Sequence[Floats]) -> Floats:
    """The percentiles of INTERVAL of all parts together, each part of the same weight."""
    if len({len(part) for part in parts}) == 1:
        return np.percentile(np.concatenate(parts), INTERVAL)
    weights = np.concatenate([np.full(len(part), 1 / len(part)) for part in parts])
    return np.percentile(
        np.concatenate(parts), INTERVAL, method="inverted_cdf", weights=weights / len(parts)
    )


def _stack(dataset: str, of_set: Mapping[str, Values], methods: Sequence[str]) -> Floats:
    """The resamples of all methods, (S, M), without those that have no object."""
    lengths = {name: len(of_set[name].samples) for name in methods}
    if len(set(lengths.values())) > 1:
        few, many = min(lengths, key=lengths.__getitem__), max(lengths, key=lengths.__getitem__)
        raise DataError(
            f"data set {dataset}: {few} has {lengths[few]} resamples, {many} has {lengths[many]}; "
            "all methods need the same resamples"
        )
    samples = np.column_stack([of_set[name].samples for name in methods])
    undefined = np.isnan(samples)
    mixed = undefined.any(axis=1) & ~undefined.all(axis=1)
    if mixed.any():
        row = int(np.flatnonzero(mixed)[0])
        name = methods[int(np.flatnonzero(undefined[row])[0])]
        raise DataError(
            f"data set {dataset}: resample {row} of {name} is not a number, but of others it is; "
            "all methods need the same resamples of the same objects"
        )
    defined = samples[~undefined.any(axis=1)]
    full = np.array([of_set[name].value for name in methods])
    if not len(defined) or not np.isfinite(defined).all() or not np.isfinite(full).all():
        raise DataError(
            f"data set {dataset}: no finite figures to rank (no objects?); leave it out"
        )
    return defined
