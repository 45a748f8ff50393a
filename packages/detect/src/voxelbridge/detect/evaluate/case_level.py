"""Is there an object in this case at all: the area under the ROC curve of cases.

A case's score is the highest score of its predictions; a case without any ranks below all others.
Letters: N cases.
"""

from typing import Any

import numpy as np

from voxelbridge.detect.evaluate.ranked import Floats, Ints
from voxelbridge.detect.evaluate.tables import BoxTable


class CaseRanking:
    """Cases by descending score with their truth, of one class (`label`) or of all."""

    def __init__(
        self,
        ground_truth: BoxTable,
        predictions: BoxTable,
        *,
        num_cases: int,
        label: int | None = None,
    ) -> None:
        assert predictions.scores is not None
        mine = slice(None) if label is None else predictions.labels == label
        scores = np.full(num_cases, -np.inf)
        np.maximum.at(scores, predictions.case_index[mine], predictions.scores[mine])
        objects = slice(None) if label is None else ground_truth.labels == label
        positive = np.zeros(num_cases, dtype=bool)
        positive[ground_truth.case_index[objects]] = True
        self._order = np.argsort(scores, kind="stable")
        ascending = scores[self._order]
        self._starts = np.flatnonzero(np.append(True, ascending[1:] != ascending[:-1]))
        self._positive = positive

    def area(self, weights: Ints) -> Floats:
        """Chance that a case with objects outranks one without, ties half; (), NaN: no pair."""
        positive = weights * self._positive
        negative = weights - positive
        pairs = int(positive.sum()) * int(negative.sum())
        if pairs == 0:
            return np.asarray(np.nan)
        with_object = np.add.reduceat(positive[self._order], self._starts)
        without = np.add.reduceat(negative[self._order], self._starts)
        below = np.cumsum(without) - without
        return np.asarray((with_object @ (2 * below + without)) / (2 * pairs))

    def to_json(self, area: float | None) -> dict[str, Any]:
        """The object of metrics.json."""
        positive = int(self._positive.sum())
        return {
            "auc": area,
            "cases_with_objects": positive,
            "cases_without": len(self._positive) - positive,
        }
