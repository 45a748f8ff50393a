"""The standing of a detector: ranked hits of every class, and its figures under weighted images.

Everything that can be known once is made once; `values` is then array arithmetic, fast enough for
thousands of resamples. Letters: N images, K classes, T IoU thresholds, R rates.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from voxelbridge.detect.evaluate.assign import assign
from voxelbridge.detect.evaluate.measures import (
    RANGE,
    RANGE_KEY,
    Convention,
    Measures,
    threshold_key,
)
from voxelbridge.detect.evaluate.ranked import Floats, Ints, RankedHits, WeighedHits
from voxelbridge.detect.evaluate.tables import BoxTable

Values = Mapping[str, Mapping[str, Floats]]


class Standings:
    """Ranked hits of every class and of all, and the numbers of the images or of a resample."""

    def __init__(
        self,
        num_cases: int,
        num_classes: int,
        ground_truth: BoxTable,
        predictions: BoxTable,
        *,
        measures: Measures,
        convention: Convention,
    ) -> None:
        self.num_cases = num_cases
        self.measures = measures
        self.nndetection = convention == "nndetection"
        thresholds = measures.thresholds
        assignment = assign(ground_truth, predictions, iou_thresholds=thresholds)
        self.pooled, *self.classes = (
            RankedHits.of(assignment, ground_truth, predictions, num_cases=num_cases, label=label)
            for label in (None, *range(num_classes))
        )
        self.row_of = {threshold: row for row, threshold in enumerate(thresholds)}
        self._fitted = self.classes

    def counts(self, predictions: BoxTable) -> dict[str, Any]:
        """Objects, predictions and true positives of each class."""
        return {
            str(label): {
                "objects": int(ranked.objects_per_case.sum()),
                "predictions": int((predictions.labels == label).sum()),
                "predictions_after_cut": len(ranked.rows),
                "true_positives": {
                    threshold_key(threshold): len(ranked.hits[self.row_of[threshold]])
                    for threshold in self.measures.ap
                },
            }
            for label, ranked in enumerate(self.classes)
        }

    def values(self, weights: Ints, *, per_class: bool = True) -> Values:
        """The figures where image n counts `weights[n]` times; NaN: not defined.

        By IoU key: "map" (), "ap_per_class" (K,), "sensitivity" (R,) pooled, "froc" () its mean,
        with `per_class` also "sensitivity_per_class" (K, R).
        """
        pooled = self.pooled.weigh(weights)
        classes = [ranked.weigh(weights) for ranked in self._fitted]
        ap = self._ap(classes)
        froc = {key: self._froc(t, pooled) for key, t in self._froc_rows().items()}
        values: dict[str, dict[str, Floats]] = {
            "map": {key: mean_of_present(each) for key, each in ap.items()},
            "ap_per_class": ap,
            "sensitivity": froc,
            "froc": {key: np.asarray(each.mean()) for key, each in froc.items()},
        }
        if per_class:
            values["sensitivity_per_class"] = {
                key: np.array([self._froc(t, one) for one in classes])
                for key, t in self._froc_rows().items()
            }
        return values

    def allow_copies(self, most: int) -> None:
        """Makes `values` exact for weights up to `most` where scores tie."""
        self._fitted = [ranked.with_copies(most) for ranked in self.classes]

    def curve(self, threshold: int, weighed: WeighedHits) -> Floats:
        """Sensitivities at the FROC rates of any ranking, (R,), at threshold number `threshold`."""
        return weighed.sensitivities(
            threshold, self.measures.fppi, nan_without_hit=self.nndetection
        )

    def _ap(self, classes: Sequence[WeighedHits]) -> dict[str, Floats]:
        """Per threshold key the AP of each class, (K,); an absent class is NaN, or -1 there."""
        values = np.array([one.average_precisions() for one in classes])  # (K, T)
        if self.nndetection:
            values = np.where(np.isnan(values), -1.0, values)
        single = {threshold_key(t): values[:, self.row_of[t]] for t in self.measures.ap}
        if self.measures.ap_range:
            columns = [self.row_of[t] for t in RANGE]
            single[RANGE_KEY] = values[:, columns].mean(axis=1)
        return single

    def _froc_rows(self) -> dict[str, int]:
        return {threshold_key(t): self.row_of[t] for t in self.measures.froc}

    def _froc(self, threshold: int, weighed: WeighedHits) -> Floats:
        if self.nndetection and not weighed.num_objects:
            return np.zeros(len(self.measures.fppi))
        return self.curve(threshold, weighed)


def mean_of_present(values: Floats) -> Floats:
    """Mean of the numbers that are defined; NaN where none is."""
    present = values[~np.isnan(values)]
    return np.asarray(present.mean() if len(present) else np.nan)
