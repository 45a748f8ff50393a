"""What a folder of predictions gives to the report page: of `predict`, or tested out of fold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.data.case_store import CaseStore
from voxelbridge.core.data.image_io import read_grid, read_image
from voxelbridge.core.data.mapping import StoredToOriginal
from voxelbridge.core.data.volume import Reorientation, reorientation_to_lps
from voxelbridge.core.errors import DataError
from voxelbridge.core.files import read_json
from voxelbridge.core.train.metrics import Record, read_metrics
from voxelbridge.detect.cross_validation import MANIFEST_FILE as OUT_OF_FOLD_FILE
from voxelbridge.detect.cross_validation import METRICS_FILE
from voxelbridge.detect.evaluate.metrics import compute_metrics
from voxelbridge.detect.evaluate.tables import (
    BoxTable,
    read_cases,
    read_ground_truth,
    read_predictions,
)
from voxelbridge.detect.held_out import recorded_store
from voxelbridge.detect.plan import FILE_NAME as PLAN_FILE
from voxelbridge.detect.plan import read_plan
from voxelbridge.detect.prediction_folder import MANIFEST_FILE
from voxelbridge.detect.report_images import CaseImage
from voxelbridge.detect.report_outcomes import Arm

PREDICTIONS = "predictions.csv"
METRICS = "metrics.jsonl"


@dataclass(frozen=True, eq=False)
class ArmSource:
    """An arm with what the page shows beside it; `grid` is equal where boxes can be compared."""

    arm: Arm
    class_names: Sequence[str]
    images: Mapping[str, CaseImage]
    grid: str
    notes: Sequence[str] = ()


def read_arm(folder: Path, ground_truth: Path) -> ArmSource:
    """The arm in `folder`; DataError for tables that neither command wrote."""
    if (folder / MANIFEST_FILE).is_file():
        return _predicted(folder, ground_truth)
    if (folder / OUT_OF_FOLD_FILE).is_file():
        return _out_of_fold(folder, ground_truth)
    raise DataError(
        f"{folder}: holds {PREDICTIONS} but neither {MANIFEST_FILE} nor {OUT_OF_FOLD_FILE}, which "
        "tell where it comes from; take a folder of `vb-detect predict` or `out-of-fold`, or "
        "measure the table alone by `vb-detect evaluate`"
    )


def _predicted(folder: Path, ground_truth: Path) -> ArmSource:
    """Boxes and images in LPS order, whatever the files' own axis order is."""
    class_names, runs, cases = _stated(folder / MANIFEST_FILE, "class_names", "runs", "cases")
    files = {name: Path(paths[0]) for name, paths in cases.items()}
    orders = {
        name: reorientation_to_lps(read_grid(file))
        for name, file in files.items()
        if file.is_file()
    }
    images = {
        name: CaseImage(name, partial(_load, files[name], order)) for name, order in orders.items()
    }
    run = Path(runs[0]) / METRICS
    arm = _arm(folder, ground_truth, num_classes=len(class_names))
    arm = replace(
        arm,
        records=read_metrics(run) if run.is_file() else [],
        ground_truth=_moved(arm.ground_truth, arm.cases, orders),
        predictions=_moved(arm.predictions, arm.cases, orders),
    )
    return ArmSource(arm, class_names, images, grid="original")


def _out_of_fold(folder: Path, ground_truth: Path) -> ArmSource:
    """Boxes and images on the grid of the store; without it boxes alone, as in the tables."""
    tested, digest = _stated(folder / OUT_OF_FOLD_FILE, "runs", "store")
    runs = {each["fold"]: _place(folder, Path(each["run"])) for each in tested}
    (num_classes,) = _stated(folder / METRICS_FILE, "num_classes")
    planned = [run for run in runs.values() if (run / PLAN_FILE).is_file()]
    class_names = (
        read_plan(planned[0]).class_names
        if planned
        else [f"class {label}" for label in range(num_classes)]
    )
    arm = _arm(folder, ground_truth, num_classes=num_classes)
    arm = replace(arm, folds=_fold_records(runs))
    store = _store_of(list(runs.values()), digest)
    if store is None:
        note = f"{folder.name}: no pictures, the store of its runs is not where they found it"
        return ArmSource(arm, class_names, {}, grid="original", notes=[note])
    mappings = {name: store.details(name).mapping for name in arm.cases}
    images = {name: CaseImage(name, partial(_load_stored, store, name)) for name in arm.cases}
    arm = replace(
        arm,
        ground_truth=_moved(arm.ground_truth, arm.cases, mappings),
        predictions=_moved(arm.predictions, arm.cases, mappings),
    )
    note = f"{folder.name}: every case tested by a run that did not see it; shown as it is stored"
    return ArmSource(arm, class_names, images, grid=f"store {store.digest[:12]}", notes=[note])


def _arm(folder: Path, ground_truth: Path, *, num_classes: int) -> Arm:
    """The tables as they are, and their figures."""
    cases = read_cases(folder / "cases.csv")
    objects = read_ground_truth(ground_truth, cases)
    predictions = read_predictions(folder / PREDICTIONS, cases)
    metrics = compute_metrics(cases, objects, predictions, num_classes=num_classes)
    return Arm(folder.name, [], metrics, cases, objects, predictions)


def _stated(path: Path, *keys: str) -> list[Any]:  # Any: JSON
    content = read_json(path)
    for key in keys:
        if not isinstance(content, dict) or key not in content:
            raise DataError(f"{path}: says nothing of {key}; take a folder that vb-detect wrote")
    return [content[key] for key in keys]


def _place(folder: Path, run: Path) -> Path:
    """Where a run lies: as the command was given it, or beside its results."""
    return run if run.is_dir() else folder / run.name


def _fold_records(runs: Mapping[int, Path]) -> dict[str, Sequence[Record]]:
    return {
        f"fold {fold}": read_metrics(run / METRICS)
        for fold, run in sorted(runs.items())
        if (run / METRICS).is_file()
    }


def _store_of(runs: Sequence[Path], digest: str) -> CaseStore | None:
    for run in runs:
        place = recorded_store(run) if run.is_dir() else None
        if place is not None and place.is_dir():
            store = CaseStore.open(place)
            if store.digest == digest:
                return store
    return None


def _moved(
    table: BoxTable, cases: Sequence[str], ways: Mapping[str, Reorientation | StoredToOriginal]
) -> BoxTable:
    """The boxes in LPS order, or on the stored grid."""
    boxes = table.boxes.copy()
    for index, name in enumerate(cases):
        rows = np.flatnonzero(table.case_index == index)
        if not len(rows) or name not in ways:
            continue
        match ways[name]:
            case Reorientation() as order:
                boxes[rows] = order.apply_boxes(boxes[rows])
            case StoredToOriginal() as mapping:
                boxes[rows] = mapping.boxes_to_stored(boxes[rows])
    return replace(table, boxes=boxes)


def _load(path: Path, order: Reorientation) -> tuple[NDArray[Any], tuple[float, float, float]]:
    volume = order.apply_volume(read_image(path))
    return volume.array, volume.grid.spacing_mm


def _load_stored(store: CaseStore, case_id: str) -> tuple[NDArray[Any], tuple[float, float, float]]:
    return store.read_image(case_id), store.details(case_id).grid.spacing_mm
