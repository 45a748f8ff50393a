"""AP and FROC of a table of detections: the object that metrics.json holds.

Rules of nnDetection's evaluator (commit 97a58f3), which the paper's numbers come from
(arXiv 2509.15947, section 3), and the convention `clean` that mends its treatment of absent classes
and of detectors without a hit. The format: docs/formats/predictions.md.
Letters: K classes, T IoU thresholds.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from voxelbridge.core.errors import ConfigError
from voxelbridge.core.files import write_json
from voxelbridge.detect.evaluate.assign import MAX_DETECTIONS, check_cases
from voxelbridge.detect.evaluate.bootstrap import intervals
from voxelbridge.detect.evaluate.case_level import CaseRanking
from voxelbridge.detect.evaluate.histogram import bin_edges, score_histogram
from voxelbridge.detect.evaluate.measures import RANGE, Convention, Measures, threshold_key
from voxelbridge.detect.evaluate.operating_points import OperatingPoint, operating_point
from voxelbridge.detect.evaluate.ranked import Floats, Ints
from voxelbridge.detect.evaluate.size_strata import SizeStrata
from voxelbridge.detect.evaluate.standings import Standings, Values
from voxelbridge.detect.evaluate.tables import BoxTable, read_predictions

SCHEMA = 1


def compute_metrics(
    cases: Sequence[str],
    ground_truth: BoxTable,
    predictions: BoxTable,
    *,
    num_classes: int | None = None,
    convention: Convention = "clean",
    measures: Measures | None = None,
    spacings: Floats | None = None,
    bootstrap: int = 0,
    seed: int = 0,
    show_progress: bool = False,
) -> dict[str, Any]:  # Any: a JSON object
    """The metrics.json object: AP and FROC per class and together, `bootstrap` resamples of images.

    `num_classes` None: 1 + the largest label in either table. `spacings` (cases, 3) in mm z y x
    make sizes millimetres. `show_progress` prints while it resamples.
    """
    check_cases(cases, ground_truth, predictions)
    if predictions.scores is None:
        raise ValueError("predictions need scores")
    largest = max((int(t.labels.max()) for t in (ground_truth, predictions) if len(t)), default=0)
    classes = largest + 1 if num_classes is None else num_classes
    if largest >= classes:
        raise ValueError(f"label {largest} of {classes} classes")
    measures = measures or Measures()
    tables = (ground_truth, predictions)
    standings = Standings(len(cases), classes, *tables, measures=measures, convention=convention)
    points = _operating_points(standings)
    rankings = [
        CaseRanking(*tables, num_cases=len(cases), label=label) for label in (None, *range(classes))
    ]
    strata = (
        SizeStrata(standings, *tables, sizes=measures.sizes, spacings=spacings)
        if measures.sizes
        else None
    )
    once = np.ones(len(cases), dtype=np.int64)
    values = standings.values(once)
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "convention": convention,
        "num_cases": len(cases),
        "num_classes": classes,
        "num_objects": len(ground_truth),
        "num_predictions": len(predictions),
        "max_detections": MAX_DETECTIONS,
        "iou_thresholds": list(measures.ap),
        "iou_range": list(RANGE) if measures.ap_range else [],
        "fppi": list(measures.fppi),
        "counts": standings.counts(predictions),
        "ap": _ap(values),
        "froc": _froc(values, standings),
        "operating_points": {
            key: {
                "pooled": [point.to_json(once) for point in pooled],
                "per_class": {
                    str(label): [point.to_json(once) for point in each]
                    for label, each in enumerate(per_class)
                },
            }
            for key, (pooled, *per_class) in points.items()
        },
        "score_histogram": _histograms(standings, predictions.scores),
        "case_level": _case_level(rankings, once),
    }
    if strata is not None:
        result["sizes"] = strata.to_json(once)
    if bootstrap:
        result["bootstrap"] = intervals(
            standings,
            points={key: pooled for key, (pooled, *_) in points.items()},
            cases=rankings,
            strata=strata,
            samples=bootstrap,
            seed=seed,
            show_progress=show_progress,
        )
    return result


def evaluate_files(
    ground_truth: Path,
    predictions: Path,
    *,
    output: Path,
    cases: Path | None = None,
    num_classes: int | None = None,
    convention: Convention = "clean",
    measures: Measures | None = None,
    bootstrap: int = 0,
    seed: int = 0,
    workers: int = 2,
    plots: Path | None = None,
) -> dict[str, Any]:  # Any: a JSON object
    """Reads truth and predictions, writes metrics.json to `output` and returns its content.

    `ground_truth` is a table, a raw data set or a store; `cases` may be left out where `read_truth`
    finds them. `plots` names a folder for the curves. Nothing is written where a table has an
    error.
    """
    # Training computes metrics too, on machines without the libraries that read images.
    from voxelbridge.detect.evaluate.plots import write_plots
    from voxelbridge.detect.evaluate.sources import read_truth

    if num_classes is not None and num_classes < 1:
        raise ConfigError(f"--num-classes: got {num_classes}, expected at least 1")
    if bootstrap < 0:
        raise ConfigError(f"--bootstrap: got {bootstrap}, expected 0 (none) or more resamples")
    for table in (ground_truth, predictions, cases):
        if table is not None and output.resolve() == table.resolve():
            raise ConfigError(f"--output: {output} is one of the tables; name another file")
    truth = read_truth(
        ground_truth, predictions=predictions, cases=cases, num_classes=num_classes, workers=workers
    )
    found = read_predictions(predictions, truth.cases, num_classes=truth.num_classes)
    content = compute_metrics(
        truth.cases,
        truth.objects,
        found,
        num_classes=truth.num_classes,
        convention=convention,
        measures=measures,
        spacings=truth.spacings,
        bootstrap=bootstrap,
        seed=seed,
        show_progress=True,
    )
    if plots is not None:
        write_plots(plots, truth.cases, truth.objects, found, metrics=content)
    write_json(output, content)
    return content


def _ap(values: Values) -> dict[str, Any]:
    return {
        key: {
            "map": _number(values["map"][key]),
            "per_class": {str(label): _number(v) for label, v in enumerate(each)},
        }
        for key, each in values["ap_per_class"].items()
    }


def _froc(values: Values, standings: Standings) -> dict[str, Any]:
    def single(label: int, sensitivity: Floats) -> dict[str, Any] | None:
        absent = not standings.classes[label].objects_per_case.any()
        return None if absent and not standings.nndetection else _curve(sensitivity)

    return {
        key: {
            "pooled": _curve(values["sensitivity"][key]),
            "per_class": {str(label): single(label, each) for label, each in enumerate(per_class)},
        }
        for key, per_class in values["sensitivity_per_class"].items()
    }


def _operating_points(standings: Standings) -> dict[str, list[list[OperatingPoint]]]:
    """By IoU key the points of all classes together, then of each class."""
    return {
        threshold_key(t): [
            [
                operating_point(ranked, standings.row_of[t], rate=rate)
                for rate in standings.measures.operating_rates
            ]
            for ranked in (standings.pooled, *standings.classes)
        ]
        for t in standings.measures.froc
    }


def _histograms(standings: Standings, scores: Floats) -> dict[str, Any]:
    edges = bin_edges(scores)
    return {
        "edges": edges.tolist(),
        **{
            threshold_key(t): {
                "pooled": score_histogram(standings.pooled, standings.row_of[t], edges),
                "per_class": {
                    str(label): score_histogram(ranked, standings.row_of[t], edges)
                    for label, ranked in enumerate(standings.classes)
                },
            }
            for t in standings.measures.froc
        },
    }


def _case_level(rankings: Sequence[CaseRanking], weights: Ints) -> dict[str, Any]:
    pooled, *per_class = (each.to_json(_number(each.area(weights))) for each in rankings)
    return {"pooled": pooled, "per_class": dict(zip(map(str, range(len(per_class))), per_class,
                                                    strict=True))}  # fmt: skip


def _curve(sensitivity: Floats) -> dict[str, Any]:
    return {
        "sensitivity": [_number(value) for value in sensitivity],
        "mean": _number(sensitivity.mean()),
    }


def _number(value: float | Floats) -> float | None:
    return None if np.isnan(value) else float(value)
