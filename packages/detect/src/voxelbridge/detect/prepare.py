"""From a raw data set to a case store: fingerprint, plan, arrays, folds, ground-truth tables.

Written to STORE: fingerprint.json, plan.json, cases/, index.jsonl, splits.json, and for evaluation
in the original images' voxel edges cases.csv and ground_truth.csv (test_cases.csv and
test_ground_truth.csv where `imagesTs` has labels).
"""

import sys
import zlib
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.data.case_store import CaseStoreWriter
from voxelbridge.core.data.dataset import RawCase, RawDataset
from voxelbridge.core.data.executor import Done, Failed, map_cases
from voxelbridge.core.data.foreground import foreground_samples
from voxelbridge.core.data.image_io import read_grid
from voxelbridge.core.data.preprocess import crop_mapping, labels_to_stored, preprocess
from voxelbridge.core.data.raw_objects import RawObjects
from voxelbridge.core.data.volume import Volume
from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.core.files import read_json, write_json
from voxelbridge.detect.evaluate.tables import BoxTable, write_cases, write_ground_truth
from voxelbridge.detect.plan import (
    FILE_NAME as PLAN_FILE,
)
from voxelbridge.detect.plan import (
    CaseFingerprint,
    Plan,
    SpacingRule,
    make_plan,
    read_plan,
    write_plan,
)
from voxelbridge.detect.splits import Split, make_splits, write_splits

INTENSITY_SAMPLES = 1000  # per case and channel
FINGERPRINT_FILE = "fingerprint.json"

T = TypeVar("T")
Box = tuple[float, float, float, float, float, float]
CaseObjects = tuple[str, Sequence[Box], Sequence[int]]  # case id, original boxes, labels


def prepare(
    dataset: Path,
    store: Path,
    *,
    rule: SpacingRule = "default",
    workers: int = 2,
    spacing_mm: tuple[float, float, float] | None = None,
    only: Collection[str] | None = None,
) -> None:
    """Prepares the training cases of the raw data set at `dataset`; what is done is skipped.

    `only` names the cases to take (None: all of imagesTr).

    A case that fails is named in one line on stderr and left out; the others are stored, and a
    DataError at the end counts the failures.
    """
    raw = RawDataset.open(dataset)
    cases = [case for case in raw.cases if only is None or case.case_id in only]
    fingerprints, failed = _each(_fingerprint, cases, workers, "reading cases")
    plan = make_plan(
        fingerprints,
        rule=rule,
        channel_names=raw.channel_names,
        class_names=raw.class_names,
        spacing_mm=spacing_mm,
    )
    _keep_plan(store, plan)
    write_json(
        store / FINGERPRINT_FILE,
        {"schema": 1, "cases": [case.model_dump(mode="json") for case in fingerprints]},
    )
    good = {case.case_id for case in fingerprints}
    writer = CaseStoreWriter(store)
    writer.remove_leftovers()
    waiting = [c for c in cases if c.case_id in good and not writer.is_done(c.case_id)]
    _, failed_later = _each(partial(_store_case, writer, plan), waiting, workers, "preprocessing")
    stored = sorted(good - set(failed_later))
    if not stored:
        raise DataError(f"{dataset}: no case could be prepared; see the lines above")
    writer.finish(only=stored)
    write_splits(store, _splits(raw, stored))
    write_tables(
        store, [(c.case_id, c.boxes, c.labels) for c in fingerprints if c.case_id in stored]
    )
    labelled = [case for case in raw.test_cases if case.has_labels]
    if labelled:
        failed += write_tables_of(store, labelled, prefix="test_", workers=workers)
    if failed:
        raise DataError(
            f"{dataset}: {len(failed)} of {len(cases)} cases could not be prepared "
            f"({', '.join(failed[:5])}{', ...' if len(failed) > 5 else ''}); "
            f"the other {len(stored)} are in {store}"
        )


def write_tables_of(
    folder: Path, cases: Sequence[RawCase], *, prefix: str = "", workers: int = 2
) -> list[str]:
    """cases.csv and ground_truth.csv of labelled raw cases; returns the ids of unreadable ones."""
    objects, failed = _each(_objects, cases, workers, "reading labels")
    write_tables(folder, objects, prefix=prefix)
    return failed


def write_tables(folder: Path, objects: Sequence[CaseObjects], *, prefix: str = "") -> None:
    """cases.csv and ground_truth.csv; boxes in voxel edges of the original images."""
    names = [case_id for case_id, _, _ in objects]
    table = BoxTable.from_cases(
        [np.asarray(boxes, dtype=np.float64).reshape(-1, 6) for _, boxes, _ in objects],
        [np.asarray(labels, dtype=np.int64) for _, _, labels in objects],
    )
    write_cases(folder / f"{prefix}cases.csv", names)
    write_ground_truth(folder / f"{prefix}ground_truth.csv", table, cases=names)


def _splits(raw: RawDataset, stored: Sequence[str]) -> list[Split]:
    """The data set's own folds (cases that could not be stored left out), or ours."""
    if raw.splits is None:
        return make_splits(stored, raw.groups)
    return [
        {side: [case for case in fold[side] if case in stored] for side in ("train", "val")}
        for fold in raw.splits
    ]


def _each(
    function: Callable[[RawCase], T], cases: Sequence[RawCase], workers: int, description: str
) -> tuple[list[T], list[str]]:
    """Results in the order of `cases`, and the ids of the failed ones, each reported on stderr."""
    results: list[T] = []
    failed: list[str] = []
    for outcome in map_cases(function, cases, workers=workers, description=description):
        match outcome:
            case Done(value=value):
                results.append(value)
            case Failed(item=item, error=error):
                print(f"error: {error}", file=sys.stderr)
                failed.append(item.case_id)
    return results, failed


def _objects(case: RawCase) -> CaseObjects:
    objects = case.read_objects(read_grid(case.image_paths[0]))
    return (
        case.case_id,
        [_six(box) for box in objects.boxes],
        [int(label) for label in objects.labels],
    )


def _fingerprint(case: RawCase) -> CaseFingerprint:
    volume, objects = _read(case)
    mapping = crop_mapping(volume, boxes=objects.boxes)
    grid = mapping.stored_grid
    boxes = mapping.boxes_to_stored(objects.boxes)
    sizes = (boxes[:, 3:] - boxes[:, :3]) * np.asarray(grid.spacing_mm)
    mask = _object_mask(objects, volume.grid.shape)
    rng = np.random.default_rng(zlib.crc32(case.case_id.encode()))
    return CaseFingerprint(
        case_id=case.case_id,
        shape=grid.shape,
        spacing_mm=grid.spacing_mm,
        boxes=tuple(_six(box) for box in objects.boxes),
        object_sizes_mm=tuple((float(z), float(y), float(x)) for z, y, x in sizes),
        labels=tuple(int(label) for label in objects.labels),
        intensity_samples=tuple(
            tuple(
                float(value)
                for value in foreground_samples(channel, mask, count=INTENSITY_SAMPLES, rng=rng)
            )
            for channel in volume.array
        ),
    )


def _store_case(writer: CaseStoreWriter, plan: Plan, case: RawCase) -> None:
    volume, objects = _read(case)
    mapping = crop_mapping(volume, boxes=objects.boxes)
    prepared = preprocess(
        volume, mapping, spacing_mm=plan.spacing_mm, normalization=plan.normalization
    )
    instances = objects.instances
    writer.write_case(
        case.case_id,
        prepared.image,
        grid=prepared.mapping.stored_grid,
        boxes=prepared.mapping.boxes_to_stored(objects.boxes),
        labels=objects.labels,
        mapping=prepared.mapping,
        instances=None if instances is None else labels_to_stored(instances, prepared.mapping),
        extra={
            "original_boxes": objects.boxes.tolist(),
            "normalization": [scheme.model_dump(mode="json") for scheme in plan.normalization],
            "channel_names": list(plan.channel_names),
            "class_names": list(plan.class_names),
        },
    )


def _six(box: NDArray[np.float32]) -> Box:
    z0, y0, x0, z1, y1, x1 = (float(edge) for edge in box)
    return z0, y0, x0, z1, y1, x1


def _read(case: RawCase) -> tuple[Volume, RawObjects]:
    volume = case.read_image()
    return volume, case.read_objects(volume.grid)


def _object_mask(objects: RawObjects, shape: Sequence[int]) -> NDArray[np.bool_]:
    """Voxels of objects on the file's grid; without objects all voxels."""
    if objects.instances is not None and len(objects.boxes):
        return objects.instances > 0
    mask = np.zeros(tuple(shape), dtype=bool)
    for box in objects.boxes:
        z0, y0, x0 = (max(int(np.floor(edge)), 0) for edge in box[:3])
        z1, y1, x1 = (int(np.ceil(edge)) for edge in box[3:])
        mask[z0:z1, y0:y1, x0:x1] = True
    return mask if mask.any() else np.ones(tuple(shape), dtype=bool)


def _keep_plan(store: Path, plan: Plan) -> None:
    """Writes the plan, or checks that a store begun earlier has the same one."""
    path = store / PLAN_FILE
    if not path.exists():
        write_plan(store, plan)
        return
    before: dict[str, Any] = read_json(path)
    if read_plan(store) != plan:
        now = plan.model_dump(mode="json", by_alias=True)
        keys = [key for key in now if before.get(key) != now[key]]
        raise ConfigError(
            f"{store}: begun with another plan (different: {', '.join(keys)}); the data or the "
            "options changed: take an empty store folder"
        )
