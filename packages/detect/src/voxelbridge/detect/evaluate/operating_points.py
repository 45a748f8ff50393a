"""Operating points: the score threshold that keeps the false positives per image within a rate."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from voxelbridge.detect.evaluate.ranked import Floats, Ints, RankedHits

RATE_NAMES = ("fppi", "sensitivity", "precision")


@dataclass(frozen=True, eq=False)
class OperatingPoint:
    """What is seen with the scores at `threshold` or above; None: nothing can be let through.

    per case, (N,): found objects, false positives, objects.
    """

    wanted_fppi: float
    threshold: float | None
    found: Ints
    false: Ints
    objects: Ints

    def rates(self, weights: Ints) -> Floats:
        """False positives per image, sensitivity, precision, (3,); NaN: not defined."""
        found, false, objects = (
            int(count @ weights) for count in (self.found, self.false, self.objects)
        )
        return np.array(
            [
                false / int(weights.sum()),
                found / objects if objects else np.nan,
                found / (found + false) if found + false else np.nan,
            ]
        )

    def to_json(self, weights: Ints) -> dict[str, Any]:
        """The object of metrics.json."""
        rates = {
            name: None if np.isnan(rate) else rate
            for name, rate in zip(RATE_NAMES, self.rates(weights).tolist(), strict=True)
        }
        return {"wanted_fppi": self.wanted_fppi, "threshold": self.threshold, **rates}


def operating_point(ranked: RankedHits, threshold: int, *, rate: float) -> OperatingPoint:
    """The lowest score whose predictions give at most `rate` false positives per image.

    Predictions of equal score pass together or not at all, so no line is drawn between the points
    of the curve, as FROC does.
    """
    images = len(ranked.objects_per_case)
    hit = np.zeros(len(ranked.rows), dtype=bool)
    hit[ranked.hits[threshold]] = True
    false_so_far = np.cumsum(~hit)[ranked.ends]
    passing = int(np.searchsorted(false_so_far / images, rate, side="right"))
    last = int(ranked.ends[passing - 1]) if passing else -1
    cases, hit = ranked.case_index[: last + 1], hit[: last + 1]
    return OperatingPoint(
        wanted_fppi=rate,
        threshold=float(ranked.scores[last]) if passing else None,
        found=np.bincount(cases[hit], minlength=images),
        false=np.bincount(cases[~hit], minlength=images),
        objects=ranked.objects_per_case,
    )
