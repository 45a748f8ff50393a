"""Collects from folders of predictions what the report page shows."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from voxelbridge.core.data.image_io import read_grid, read_image
from voxelbridge.core.data.volume import Reorientation, reorientation_to_lps
from voxelbridge.core.errors import DataError
from voxelbridge.core.files import read_json
from voxelbridge.core.train.metrics import read_metrics
from voxelbridge.detect.evaluate.metrics import compute_metrics
from voxelbridge.detect.evaluate.tables import (
    BoxTable,
    read_cases,
    read_ground_truth,
    read_predictions,
)
from voxelbridge.detect.predict_cases import MANIFEST_FILE
from voxelbridge.detect.report import Arm, CaseImage, write_report

PREDICTIONS = "predictions.csv"
GROUND_TRUTH = "ground_truth.csv"
BASELINE = "scratch"


def report_folder(
    folder: Path,
    output: Path,
    *,
    ground_truth: Path | None = None,
    pretraining_run: Path | None = None,
    title: str | None = None,
    facts: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Writes the page for the predictions in `folder`, or in each of its sub-folders (arms).

    A run directory counts by its own `predictions/`. The objects come from `ground_truth` or from
    a ground_truth.csv in the arm's folder or above it. Everything is shown in LPS order, whatever
    the files' own axis order is.
    """
    folders = find_arms(folder)
    table = ground_truth or _find_ground_truth(folders[0])
    arms: list[Arm] = []
    images: dict[str, CaseImage] = {}
    class_names: Sequence[str] = ()
    for path in folders:
        manifest = read_json(path / MANIFEST_FILE)
        class_names = manifest["class_names"]
        orders = _axis_orders(manifest["cases"])
        arms.append(_arm(path, table, manifest, orders))
        for name, order in orders.items():
            source = Path(manifest["cases"][name][0])
            images[name] = CaseImage(name, partial(_load, source, order))
    records = read_metrics(pretraining_run / "metrics.jsonl") if pretraining_run else []
    write_report(
        output,
        title=title or folder.resolve().name,
        arms=arms,
        pretraining_records=records,
        case_images=[images[name] for name in arms[0].cases if name in images],
        class_names=class_names,
        facts=facts or {"predictions": str(folder), "ground truth": str(table)},
        notes=notes,
    )


def find_arms(folder: Path) -> list[Path]:
    """Folders with predictions: `folder`, its `predictions/`, or its sub-folders.

    Sub-folders are sorted by name, `scratch` first: the baseline that the others are compared to.
    """
    for candidate in (folder, folder / "predictions"):
        if (candidate / PREDICTIONS).is_file():
            return [candidate]
        found = [path.parent for path in candidate.glob(f"*/{PREDICTIONS}")]
        found.sort(key=lambda path: (path.name != BASELINE, path.name))
        if found:
            return found
    raise DataError(
        f"{folder}: no {PREDICTIONS} in it or in its sub-folders; "
        "run `vb-detect predict RUN --images DIR --out RUN/predictions` first"
    )


def _find_ground_truth(arm: Path) -> Path:
    for place in (arm, *arm.resolve().parents[:3]):
        if (place / GROUND_TRUTH).is_file():
            return place / GROUND_TRUTH
    raise DataError(f"{arm}: no {GROUND_TRUTH} beside the predictions; name it by --ground-truth")


def _arm(
    path: Path, ground_truth: Path, manifest: Mapping[str, Any], orders: Mapping[str, Reorientation]
) -> Arm:
    cases = read_cases(path / "cases.csv")
    objects = read_ground_truth(ground_truth, cases)
    predictions = read_predictions(path / PREDICTIONS, cases)
    metrics = compute_metrics(cases, objects, predictions, num_classes=len(manifest["class_names"]))
    run = Path(manifest["runs"][0]) / "metrics.jsonl"
    return Arm(
        name=path.name,
        records=read_metrics(run) if run.is_file() else [],
        metrics=metrics,
        cases=cases,
        ground_truth=_to_lps(objects, cases, orders),
        predictions=_to_lps(predictions, cases, orders),
    )


def _axis_orders(cases: Mapping[str, Sequence[str]]) -> dict[str, Reorientation]:
    """The way to LPS order of every case whose image is still there."""
    return {
        name: reorientation_to_lps(read_grid(Path(paths[0])))
        for name, paths in cases.items()
        if Path(paths[0]).is_file()
    }


def _to_lps(table: BoxTable, cases: Sequence[str], orders: Mapping[str, Reorientation]) -> BoxTable:
    boxes = table.boxes.copy()
    for index, name in enumerate(cases):
        rows = np.flatnonzero(table.case_index == index)
        if len(rows) and name in orders:
            boxes[rows] = orders[name].apply_boxes(boxes[rows])
    return replace(table, boxes=boxes)


def _load(path: Path, order: Reorientation) -> tuple[np.ndarray, tuple[float, float, float]]:
    volume = order.apply_volume(read_image(path))
    return volume.array, volume.grid.spacing_mm
