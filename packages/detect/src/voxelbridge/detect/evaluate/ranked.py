"""Ranked predictions with what they hit: AP and FROC of all images, or of a resample of them.

A resample is a weight per image, how often it was drawn; its predictions and objects count that
often, copies of a prediction stand beside each other. Letters: K kept predictions by descending
score, T IoU thresholds.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from voxelbridge.detect.evaluate.assign import Assignment
from voxelbridge.detect.evaluate.average_precision import average_precision_of_hits
from voxelbridge.detect.evaluate.froc import FPPI, last_of_each_score, sensitivity_at_rates
from voxelbridge.detect.evaluate.tables import BoxTable

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class RankedHits:
    """The kept predictions of one class, or of all classes together.

    case_index (K,) image of each prediction; ends: positions of the last of each run of equal
    scores; hits: per threshold the positions of the true positives; objects_per_case (images,).
    """

    case_index: Ints
    ends: Ints
    hits: tuple[Ints, ...]
    objects_per_case: Ints

    @classmethod
    def of(
        cls,
        assignment: Assignment,
        ground_truth: BoxTable,
        predictions: BoxTable,
        *,
        num_cases: int,
        label: int | None = None,
    ) -> Self:
        """The predictions and objects of class `label`; None: of all classes."""
        assert predictions.scores is not None
        kept, found, objects = assignment.kept, assignment.found, ground_truth.case_index
        if label is not None:
            mine = predictions.labels[kept] == label
            kept, found = kept[mine], found[:, mine]
            objects = objects[ground_truth.labels == label]
        return cls(
            case_index=predictions.case_index[kept],
            ends=last_of_each_score(predictions.scores[kept]),
            hits=tuple(np.flatnonzero(row >= 0) for row in found),
            objects_per_case=np.bincount(objects, minlength=num_cases),
        )

    def average_precisions(self, weights: Ints) -> Floats:
        """AP at every threshold, (T,); NaN where the resample has no object."""
        objects = int(self.objects_per_case @ weights)
        if objects == 0:
            return np.full(len(self.hits), np.nan)
        each = weights[self.case_index]
        counted = np.cumsum(each)
        return np.array(
            [
                average_precision_of_hits(np.cumsum(each[hits]), counted[hits], objects)
                for hits in self.hits
            ]
        )

    def sensitivities(self, threshold: int, weights: Ints, *, nan_without_hit: bool) -> Floats:
        """Sensitivity at the seven FROC rates, (7,), at threshold number `threshold`.

        NaN where the resample has no object; with `nan_without_hit` also where it has predictions
        of which none is a true positive, otherwise 0 there.
        """
        objects = int(self.objects_per_case @ weights)
        if objects == 0:
            return np.full(len(FPPI), np.nan)
        hits = self.hits[threshold]
        each = weights[self.case_index]
        counted = np.cumsum(each)[self.ends]
        true = np.concatenate([[0], np.cumsum(each[hits])])
        if true[-1] == 0:
            undefined = nan_without_hit and len(counted) > 0 and counted[-1] > 0
            return np.full(len(FPPI), np.nan if undefined else 0.0)
        true = true[np.searchsorted(hits, self.ends, side="right")]
        images = int(weights.sum())
        return sensitivity_at_rates(
            np.concatenate([[0.0], (counted - true) / images]),
            np.concatenate([[0.0], true / objects]),
        )
