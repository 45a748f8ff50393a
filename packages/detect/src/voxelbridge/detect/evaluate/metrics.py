"""AP and FROC of a table of detections: the object that metrics.json holds.

Rules of nnDetection's evaluator (commit 97a58f3), which the paper's numbers come from
(arXiv 2509.15947, section 3), and the convention `clean` that mends its treatment of absent classes
and of detectors without a hit. The format: docs/formats/predictions.md.
Letters: K classes, T IoU thresholds.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.errors import ConfigError
from voxelbridge.core.files import write_json
from voxelbridge.core.progress import track
from voxelbridge.detect.evaluate.assign import MAX_DETECTIONS, Assignment, assign, check_cases
from voxelbridge.detect.evaluate.average_precision import precision_recall
from voxelbridge.detect.evaluate.froc import FPPI, froc_points
from voxelbridge.detect.evaluate.ranked import Floats, Ints, RankedHits
from voxelbridge.detect.evaluate.tables import (
    BoxTable,
    read_cases,
    read_ground_truth,
    read_predictions,
)

Convention = Literal["clean", "nndetection"]

SCHEMA = 1
AP_THRESHOLDS = {"0.10": 0.1, "0.30": 0.3, "0.50": 0.5}
FROC_THRESHOLDS = {"0.10": 0.1, "0.30": 0.3}
RANGE_KEY = "0.10:0.50:0.05"
RANGE = tuple(float(t) for t in np.linspace(0.1, 0.5, 9))
INTERVAL = (2.5, 97.5)  # percentiles of a 95 % interval

_THRESHOLDS = (*AP_THRESHOLDS.values(), *RANGE)
_RANGE_START = len(AP_THRESHOLDS)


def compute_metrics(
    cases: Sequence[str],
    ground_truth: BoxTable,
    predictions: BoxTable,
    *,
    num_classes: int | None = None,
    convention: Convention = "clean",
    bootstrap: int = 0,
    seed: int = 0,
    show_progress: bool = False,
) -> dict[str, Any]:  # Any: a JSON object
    """The metrics.json object: AP and FROC per class and together, `bootstrap` resamples of images.

    `num_classes` None: 1 + the largest label in either table. `show_progress` prints while it
    resamples.
    """
    check_cases(cases, ground_truth, predictions)
    if predictions.scores is None:
        raise ValueError("predictions need scores")
    largest = max((int(t.labels.max()) for t in (ground_truth, predictions) if len(t)), default=0)
    classes = largest + 1 if num_classes is None else num_classes
    if largest >= classes:
        raise ValueError(f"label {largest} of {classes} classes")
    assignment = assign(ground_truth, predictions, iou_thresholds=_THRESHOLDS)
    study = _Study(len(cases), classes, ground_truth, predictions, assignment, convention)
    weights = np.ones(len(cases), dtype=np.int64)
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "convention": convention,
        "num_cases": len(cases),
        "num_classes": classes,
        "num_objects": len(ground_truth),
        "num_predictions": len(predictions),
        "max_detections": MAX_DETECTIONS,
        "iou_thresholds": list(AP_THRESHOLDS.values()),
        "iou_range": list(RANGE),
        "fppi": list(FPPI),
        "counts": study.counts(predictions),
        "ap": study.ap(weights),
        "froc": study.froc(weights),
    }
    if bootstrap:
        result["bootstrap"] = _bootstrap(study, bootstrap, seed, show_progress)
    return result


def precision_recall_curve(
    cases: Sequence[str],
    ground_truth: BoxTable,
    predictions: BoxTable,
    *,
    label: int,
    iou_threshold: float,
) -> tuple[Floats, Floats, Floats]:
    """Recall, precision and score after each kept prediction of a class, by descending score.

    Three empty arrays where the class has no object.
    """
    check_cases(cases, ground_truth, predictions)
    hit, scores, objects = _ranked_flags(ground_truth, predictions, iou_threshold, label)
    if objects == 0:
        return np.zeros(0), np.zeros(0), np.zeros(0)
    recall, precision = precision_recall(hit, objects)
    return recall, precision, scores


def froc_curve(
    cases: Sequence[str],
    ground_truth: BoxTable,
    predictions: BoxTable,
    *,
    iou_threshold: float,
    label: int | None = None,
) -> tuple[Floats, Floats, Floats]:
    """False positives per image, sensitivity and score at each point, from (0, 0) at infinity on.

    `label` None: all classes pooled under one score threshold. Three empty arrays where there is no
    object.
    """
    check_cases(cases, ground_truth, predictions)
    hit, scores, objects = _ranked_flags(ground_truth, predictions, iou_threshold, label)
    if objects == 0:
        return np.zeros(0), np.zeros(0), np.zeros(0)
    return froc_points(hit, scores, num_objects=objects, num_images=len(cases))


def evaluate_files(
    ground_truth: Path,
    predictions: Path,
    *,
    cases: Path,
    output: Path,
    num_classes: int | None = None,
    convention: Convention = "clean",
    bootstrap: int = 0,
    seed: int = 0,
) -> dict[str, Any]:  # Any: a JSON object
    """Reads the three tables, writes metrics.json to `output` and returns its content.

    Nothing is written where a table has an error.
    """
    if num_classes is not None and num_classes < 1:
        raise ConfigError(f"--num-classes: got {num_classes}, expected at least 1")
    if bootstrap < 0:
        raise ConfigError(f"--bootstrap: got {bootstrap}, expected 0 (none) or more resamples")
    for table in (ground_truth, predictions, cases):
        if output.resolve() == table.resolve():
            raise ConfigError(f"--output: {output} is one of the tables; name another file")
    names = read_cases(cases)
    content = compute_metrics(
        names,
        read_ground_truth(ground_truth, names, num_classes=num_classes),
        read_predictions(predictions, names, num_classes=num_classes),
        num_classes=num_classes,
        convention=convention,
        bootstrap=bootstrap,
        seed=seed,
        show_progress=True,
    )
    write_json(output, content)
    return content


class _Study:
    """Ranked hits of every class and of all, and the numbers of the images or of a resample."""

    def __init__(
        self,
        num_cases: int,
        num_classes: int,
        ground_truth: BoxTable,
        predictions: BoxTable,
        assignment: Assignment,
        convention: Convention,
    ) -> None:
        self.num_cases = num_cases
        self.nndetection = convention == "nndetection"
        self.pooled, *self.classes = (
            RankedHits.of(assignment, ground_truth, predictions, num_cases=num_cases, label=label)
            for label in (None, *range(num_classes))
        )

    def counts(self, predictions: BoxTable) -> dict[str, Any]:
        """Objects, predictions and true positives of each class."""
        return {
            str(label): {
                "objects": int(ranked.objects_per_case.sum()),
                "predictions": int((predictions.labels == label).sum()),
                "predictions_after_cut": len(ranked.case_index),
                "true_positives": {
                    key: len(hits) for key, hits in zip(AP_THRESHOLDS, ranked.hits, strict=False)
                },
            }
            for label, ranked in enumerate(self.classes)
        }

    def ap_values(self, weights: Ints) -> dict[str, Floats]:
        """Per threshold key the AP of each class, (K,); an absent class is NaN, or -1 there."""
        values = np.array([ranked.average_precisions(weights) for ranked in self.classes])  # (K, T)
        if self.nndetection:
            values = np.where(np.isnan(values), -1.0, values)
        single = {key: values[:, column] for column, key in enumerate(AP_THRESHOLDS)}
        return {**single, RANGE_KEY: values[:, _RANGE_START:].mean(axis=1)}

    def froc_values(self, threshold: int, weights: Ints, ranked: RankedHits) -> Floats:
        """Sensitivities of one curve, (7,); without objects NaN, or 0 there."""
        if self.nndetection and not ranked.objects_per_case @ weights:
            return np.zeros(len(FPPI))
        return ranked.sensitivities(threshold, weights, nan_without_hit=self.nndetection)

    def ap(self, weights: Ints) -> dict[str, Any]:
        return {
            key: {
                "map": _number(_mean_of_present(values)),
                "per_class": {str(label): _number(v) for label, v in enumerate(values)},
            }
            for key, values in self.ap_values(weights).items()
        }

    def froc(self, weights: Ints) -> dict[str, Any]:
        return {
            key: {
                "pooled": _curve(self.froc_values(row, weights, self.pooled)),
                "per_class": {
                    str(label): self._class_curve(row, weights, ranked)
                    for label, ranked in enumerate(self.classes)
                },
            }
            for row, key in enumerate(FROC_THRESHOLDS)
        }

    def _class_curve(self, row: int, weights: Ints, ranked: RankedHits) -> dict[str, Any] | None:
        if not self.nndetection and not ranked.objects_per_case.any():
            return None
        return _curve(self.froc_values(row, weights, ranked))


def _bootstrap(study: _Study, samples: int, seed: int, show_progress: bool) -> dict[str, Any]:
    """95 % percentile intervals over resamples of the images, drawn with replacement."""
    rng = np.random.default_rng(seed)
    maps: dict[str, list[float]] = {key: [] for key in (*AP_THRESHOLDS, RANGE_KEY)}
    frocs: dict[str, list[float]] = {key: [] for key in FROC_THRESHOLDS}
    rounds = range(samples)
    for _ in track(rounds, description="bootstrap") if show_progress else rounds:
        drawn = rng.integers(0, study.num_cases, study.num_cases)
        weights = np.bincount(drawn, minlength=study.num_cases)
        for key, values in study.ap_values(weights).items():
            maps[key].append(_mean_of_present(values))
        for row, key in enumerate(FROC_THRESHOLDS):
            frocs[key].append(float(study.froc_values(row, weights, study.pooled).mean()))
    return {
        "samples": samples,
        "seed": seed,
        "map": {key: _interval(values) for key, values in maps.items()},
        "froc": {key: _interval(values) for key, values in frocs.items()},
    }


def _ranked_flags(
    ground_truth: BoxTable, predictions: BoxTable, iou_threshold: float, label: int | None
) -> tuple[NDArray[np.bool_], Floats, int]:
    """Hit flags and scores by descending score, and the number of objects, of a class or all."""
    if predictions.scores is None:
        raise ValueError("predictions need scores")
    assignment = assign(ground_truth, predictions, iou_thresholds=[iou_threshold])
    kept, hit = assignment.kept, assignment.found[0] >= 0
    if label is None:
        return hit, predictions.scores[kept], len(ground_truth)
    mine = predictions.labels[kept] == label
    objects = int((ground_truth.labels == label).sum())
    return hit[mine], predictions.scores[kept[mine]], objects


def _mean_of_present(values: Floats) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else float("nan")


def _curve(sensitivity: Floats) -> dict[str, Any]:
    return {
        "sensitivity": [_number(value) for value in sensitivity],
        "mean": _number(sensitivity.mean()),
    }


def _interval(values: Sequence[float]) -> list[float | None]:
    finite = np.array(values)[~np.isnan(values)]
    if not len(finite):
        return [None, None]
    return [float(bound) for bound in np.percentile(finite, INTERVAL)]


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
