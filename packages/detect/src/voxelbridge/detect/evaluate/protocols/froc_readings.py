"""FROC as the programs of LUNA16 and PN9 read it: two readings, and resamples of the scans.

Letters: E entries (detected nodules and false marks), N scans, P points of a curve, R rates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, assert_never

import numpy as np
from numpy.typing import NDArray

from voxelbridge.detect.evaluate.bootstrap import draws
from voxelbridge.detect.evaluate.froc import FPPI, last_of_each_score

SCHEMA = 1
CONFIDENCE = 0.95

Reading = Literal["interpolated", "next"]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class RankedMarks:
    """What a FROC curve is drawn from, by descending score.

    scan (E,) row in the list of scans; true (E,) a detected nodule, else a false mark; ends:
    positions of the last of each run of equal scores; nodules_per_scan (N,), the missed ones too.
    """

    scan: Ints
    true: Flags
    ends: Ints
    nodules_per_scan: Ints

    @classmethod
    def of(cls, scores: Floats, true: Flags, scan: Ints, nodules_per_scan: Ints) -> Self:
        """From entries in any order."""
        order = np.argsort(-scores, kind="stable")
        return cls(scan[order], true[order], last_of_each_score(scores[order]), nodules_per_scan)

    def curve(self, weights: Ints | None = None) -> tuple[Floats, Floats]:
        """False marks per scan and sensitivity, (P,) each; scan n counts `weights[n]` times.

        The points of scikit-learn's roc_curve: one per score, without those in the middle of three
        equal steps, (0, 0) in front. Only zeros where no nodule is detected.
        """
        drawn = np.ones(len(self.nodules_per_scan), dtype=np.int64) if weights is None else weights
        each = drawn[self.scan]
        true = np.cumsum(each * self.true)[self.ends]
        false = np.cumsum(each * ~self.true)[self.ends]
        seen = np.diff(true + false, prepend=0) > 0  # else a score that no drawn scan has
        true, false = true[seen], false[seen]
        if len(true) > 2:
            corner = (np.diff(true, 2) != 0) | (np.diff(false, 2) != 0)
            kept = np.concatenate([[True], corner, [True]])
            true, false = true[kept], false[kept]
        true = np.concatenate([[0], true]).astype(np.float64)
        false = np.concatenate([[0], false]).astype(np.float64)
        if true[-1] == 0:
            return np.zeros(1), np.zeros(1)
        # Not simplified: key rates are met exactly or not as in the programs, rounding included.
        rates = false / false[-1] * false[-1] / drawn.sum() if false[-1] else np.zeros(len(false))
        found = true / true[-1] * true[-1] / float(self.nodules_per_scan @ drawn)
        return rates, found

    def sensitivities(
        self, reading: Reading, *, rates: Sequence[float] = FPPI, weights: Ints | None = None
    ) -> Floats:
        """Sensitivity at each rate, (R,); zeros where no nodule is detected."""
        return read_curve(*self.curve(weights), reading=reading, rates=rates)


def read_curve(
    fppi: Floats, sensitivity: Floats, *, reading: Reading, rates: Sequence[float] = FPPI
) -> Floats:
    """Sensitivity of a curve at false-positive rates; (P,) x 2 -> (R,).

    "interpolated": linear between points, of points at one rate the last. "next": at the first
    point at the rate or beyond, of equal ones the last. Both keep the last value behind the end.
    """
    wanted = np.asarray(rates, dtype=np.float64)
    match reading:
        case "interpolated":
            return np.interp(wanted, fppi, sensitivity)
        case "next":
            first = np.minimum(np.searchsorted(fppi, wanted, side="left"), len(fppi) - 1)
            return sensitivity[np.searchsorted(fppi, fppi[first], side="right") - 1]
        case _:
            assert_never(reading)


def bootstrap(
    ranked: RankedMarks, reading: Reading, *, samples: int, seed: int
) -> dict[str, Any]:  # Any: a JSON object
    """Mean and 95 % interval at every rate and of the score, the scans drawn with replacement.

    Resamples without a nodule have no sensitivity and are left out (`undefined` counts them).
    """
    drawn = [
        ranked.sensitivities(reading, weights=weights)
        for weights in draws(len(ranked.nodules_per_scan), samples=samples, seed=seed)
        if ranked.nodules_per_scan @ weights > 0
    ]
    return summary(np.array(drawn).reshape(-1, len(FPPI)), samples=samples, seed=seed)


def summary(values: Floats, *, samples: int, seed: int) -> dict[str, Any]:  # Any: a JSON object
    """Mean, low and high of resampled sensitivities, (S, R), and of their mean over the rates.

    The bounds are the resamples at position floor(p S) in ascending order, as LUNA16 takes them.
    """
    content: dict[str, Any] = {
        "samples": samples,
        "seed": seed,
        "undefined": samples - len(values),
    }
    columns = np.column_stack([values, values.mean(axis=1)]) if len(values) else None
    if columns is None:
        return {**content, "score": None, "mean": None, "low": None, "high": None}
    ascending = np.sort(columns, axis=0)
    tail = (1.0 - CONFIDENCE) / 2.0
    rows = {
        "mean": columns.mean(axis=0),
        "low": ascending[int(tail * len(values))],
        "high": ascending[min(int((1.0 - tail) * len(values)), len(values) - 1)],
    }
    return {
        **content,
        "score": {name: float(row[-1]) for name, row in rows.items()},
        **{name: row[:-1].tolist() for name, row in rows.items()},
    }


def protocol_json(
    protocol: str,
    sensitivity: Floats,
    *,
    fppi: Sequence[float],
    counts: Mapping[str, int],
    facts: Mapping[str, Any],
) -> dict[str, Any]:  # Any: JSON values
    """The object every protocol writes; the score is the mean sensitivity."""
    names = (
        "true_positives", "false_positives", "missed", "candidates", "ignored", "duplicates",
    )  # fmt: skip
    return {
        "schema": SCHEMA,
        "protocol": protocol,
        "score": float(np.mean(sensitivity)),
        "fppi": list(fppi),
        "sensitivity": [float(value) for value in sensitivity],
        "counts": {name: int(counts[name]) for name in names},
        **facts,
    }
