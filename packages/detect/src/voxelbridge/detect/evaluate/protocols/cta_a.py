"""The score of CTA-A as the paper describes it: FROC of boxes at IoU 0.3 (arXiv 2509.15947, A.2).

The data set's own program has no FROC: docs/protocols.md.
"""

from pathlib import Path
from typing import Any

import numpy as np

from voxelbridge.core.errors import ConfigError
from voxelbridge.core.files import write_json
from voxelbridge.detect.evaluate.bootstrap import resampled
from voxelbridge.detect.evaluate.froc import FPPI
from voxelbridge.detect.evaluate.measures import Measures, threshold_key
from voxelbridge.detect.evaluate.metrics import compute_metrics
from voxelbridge.detect.evaluate.protocols.froc_readings import protocol_json, summary
from voxelbridge.detect.evaluate.protocols.marks import check_arguments
from voxelbridge.detect.evaluate.sources import read_truth
from voxelbridge.detect.evaluate.tables import read_predictions

PROTOCOL = "CTA-A protocol as described by the paper"
IOU = 0.3


def evaluate_cta_a(
    ground_truth: Path,
    predictions: Path,
    *,
    output: Path,
    cases: Path | None = None,
    num_classes: int | None = None,
    samples: int = 0,
    seed: int = 0,
    workers: int = 2,
) -> dict[str, Any]:  # Any: a JSON object
    """Reads truth and predictions as `evaluate` does, writes the score to `output`, returns it.

    Several classes are thrown together as in `evaluate`'s pooled FROC. `samples` resamples of the
    cases give 95 % intervals.
    """
    check_arguments(output, ground_truth, predictions, cases, bootstrap=samples)
    if num_classes is not None and num_classes < 1:
        raise ConfigError(f"--num-classes: got {num_classes}, expected at least 1")
    truth = read_truth(
        ground_truth, predictions=predictions, cases=cases, num_classes=num_classes, workers=workers
    )
    found = read_predictions(predictions, truth.cases, num_classes=truth.num_classes)
    measures = Measures(ap=(IOU,), ap_range=False, froc=(IOU,), sizes=None)
    key = threshold_key(IOU)
    metrics = compute_metrics(
        truth.cases, truth.objects, found, num_classes=truth.num_classes, measures=measures
    )
    classes = metrics["counts"].values()
    hits = sum(each["true_positives"][key] for each in classes)
    candidates = sum(each["predictions_after_cut"] for each in classes)
    facts: dict[str, Any] = {
        "iou": IOU,
        "num_cases": len(truth.cases),
        "num_objects": len(truth.objects),
        "dropped": {"over_limit": len(found) - candidates},
    }
    if samples:
        drawn = resampled(
            truth.cases, truth.objects, found, num_classes=metrics["num_classes"],
            samples=samples, seed=seed, measures=measures,
        )["sensitivity"][key]  # fmt: skip
        defined = drawn[~np.isnan(drawn).any(axis=1)]  # a resample without objects has none
        facts["bootstrap"] = summary(defined, samples=samples, seed=seed)
    values = metrics["froc"][key]["pooled"]["sensitivity"]
    content = protocol_json(
        PROTOCOL,
        np.array([value or 0.0 for value in values]),  # None: no object at all
        fppi=FPPI,
        counts={
            "true_positives": hits,
            "false_positives": candidates - hits,
            "missed": len(truth.objects) - hits,
            "candidates": candidates,
            "ignored": 0,
            "duplicates": 0,
        },
        facts=facts,
    )
    write_json(output, content)
    return content
