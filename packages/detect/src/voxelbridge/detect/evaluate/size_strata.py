"""Results by the size of objects.

FROC of a stratum: its objects found, against all false positives. AP of a stratum: predictions that
find an object of another size are left out, and of the false positives those count whose own size
lies in the stratum. Letters: N images, P predictions, G objects, B strata, K classes, R rates.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from voxelbridge.detect.evaluate.measures import SizeMeasure, Sizes, threshold_key
from voxelbridge.detect.evaluate.ranked import Floats, Ints, RankedHits
from voxelbridge.detect.evaluate.standings import Standings, mean_of_present
from voxelbridge.detect.evaluate.tables import BoxTable


class SizeStrata:
    """The strata of one evaluation; `spacings` (N, 3) in mm z y x, None: sizes in voxels."""

    def __init__(
        self,
        standings: Standings,
        ground_truth: BoxTable,
        predictions: BoxTable,
        *,
        sizes: Sizes,
        spacings: Floats | None,
    ) -> None:
        self._standings = standings
        self._sizes = sizes
        self._in_mm = spacings is not None
        true_sizes = box_sizes(ground_truth, sizes.measure, spacings)
        edges = _terciles(true_sizes) if sizes.edges is None else list(sizes.edges)
        self.edges = edges
        self._stratum = np.searchsorted(edges, true_sizes, side="right")  # (G,)
        of_predictions = np.searchsorted(
            edges, box_sizes(predictions, sizes.measure, spacings), side="right"
        )  # (P,)
        cases = standings.num_cases
        self._objects = [
            [
                np.bincount(ground_truth.case_index[mine & inside], minlength=cases)
                for mine in self._masks(ground_truth)
            ]
            for inside in (self._stratum == number for number in range(len(edges) + 1))
        ]  # by stratum, then all classes and each class: (N,)
        thresholds = {threshold_key(t): standings.row_of[t] for t in standings.measures.froc}
        self._pooled = {
            key: self._rankings([standings.pooled], row, None, first=0)
            for key, row in thresholds.items()
        }
        self._classes = {
            key: self._rankings(standings.classes, row, of_predictions, first=1)
            for key, row in thresholds.items()
        }
        self._fitted = self._classes

    def values(self, weights: Ints) -> Mapping[str, Mapping[str, Floats]]:
        """By IoU key: "sensitivity" (B, R), "froc" (B,), "map" (B,), "ap_per_class" (B, K)."""
        curves = {
            key: np.array(
                [self._standings.curve(0, one[0].weigh(weights)) for one in strata]
            )
            for key, strata in self._pooled.items()
        }  # fmt: skip
        aps = {
            key: np.array(
                [
                    [one.weigh(weights).average_precisions()[0] for one in ranked]
                    for ranked in strata
                ]
            )
            for key, strata in self._fitted.items()
        }
        return {
            "sensitivity": curves,
            "froc": {key: value.mean(axis=1) for key, value in curves.items()},
            "map": {key: np.array([mean_of_present(row) for row in v]) for key, v in aps.items()},
            "ap_per_class": aps,
        }

    def allow_copies(self, most: int) -> None:
        """Makes `values` exact for weights up to `most` where scores tie."""
        self._fitted = {
            key: [[one.with_copies(most) for one in ranked] for ranked in strata]
            for key, strata in self._classes.items()
        }

    def to_json(self, weights: Ints) -> dict[str, Any]:
        """The object of metrics.json."""
        values = self.values(weights)
        bounds = [0.0, *self.edges, None]
        unit = {"volume": "mm^3", "longest-side": "mm"} if self._in_mm else {"volume": "voxels"}
        return {
            "measure": self._sizes.measure,
            "unit": unit.get(self._sizes.measure, "voxels"),
            "edges": self.edges,
            "strata": [
                {
                    "from": bounds[number],
                    "below": bounds[number + 1],
                    "num_objects": int(self._objects[number][0].sum()),
                    "ap": {
                        key: {
                            "map": _number(values["map"][key][number]),
                            "per_class": {
                                str(label): _number(value)
                                for label, value in enumerate(values["ap_per_class"][key][number])
                            },
                        }
                        for key in values["map"]
                    },
                    "froc": {
                        key: {
                            "sensitivity": [_number(v) for v in values["sensitivity"][key][number]],
                            "mean": _number(values["froc"][key][number]),
                        }
                        for key in values["froc"]
                    },
                }
                for number in range(len(self.edges) + 1)
            ],
        }

    def _masks(self, ground_truth: BoxTable) -> list[np.ndarray[Any, np.dtype[np.bool_]]]:
        labels = range(len(self._standings.classes))
        every = np.ones(len(ground_truth), dtype=bool)
        return [every, *(ground_truth.labels == label for label in labels)]

    def _rankings(
        self,
        rankings: list[RankedHits],
        threshold: int,
        of_predictions: Ints | None,
        *,
        first: int,
    ) -> list[list[RankedHits]]:
        """By stratum, each ranking without the hits of other strata; see the top for the errors."""
        result: list[list[RankedHits]] = []
        for number in range(len(self.edges) + 1):
            part: list[RankedHits] = []
            for position, ranked in enumerate(rankings):
                keep = np.ones(len(ranked.rows), dtype=bool)
                if of_predictions is not None:
                    keep = of_predictions[ranked.rows] == number
                keep[ranked.hits[threshold]] = self._stratum[ranked.targets[threshold]] == number
                objects = self._objects[number][first + position]
                part.append(ranked.restricted(threshold, keep, objects))
            result.append(part)
        return result


def box_sizes(table: BoxTable, measure: SizeMeasure, spacings: Floats | None) -> Floats:
    """Volume or longest side of each box, in voxels or, with `spacings`, in mm; (rows,)."""
    sides = table.boxes[:, 3:] - table.boxes[:, :3]
    if spacings is not None:
        sides = sides * spacings[table.case_index]
    return sides.prod(axis=1) if measure == "volume" else sides.max(axis=1)


def _terciles(sizes: Floats) -> list[float]:
    """Ascending edges that part the objects in three; fewer where sizes coincide, [] for none."""
    if not len(sizes):
        return []
    ordered = np.sort(sizes)
    edges = {float(ordered[len(sizes) * part // 3]) for part in (1, 2)}
    return sorted(edge for edge in edges if edge > ordered[0])


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
