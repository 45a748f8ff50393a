"""From a raw data set to a case store: fingerprint, plan, arrays, folds, ground-truth tables.

Written to STORE: fingerprint.json, plan.json, cases/, index.jsonl, splits.json, and for evaluation
in the original images' voxel edges cases.csv and ground_truth.csv (test_cases.csv and
test_ground_truth.csv where `imagesTs` has labels).
"""

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.data.case_store import CaseStoreWriter
from voxelbridge.core.data.cluster import open_executor
from voxelbridge.core.data.dataset import RawCase, RawDataset
from voxelbridge.core.data.executor import Done, Failed, map_cases
from voxelbridge.core.data.foreground import class_locations, samples_per_case
from voxelbridge.core.data.preprocess import crop_mapping, labels_to_stored, preprocess
from voxelbridge.core.data.provenance import Provenance, content_hashes
from voxelbridge.core.data.resample import resampled_shape
from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.core.files import read_json
from voxelbridge.detect.evaluate.tables import BoxTable, write_cases, write_ground_truth
from voxelbridge.detect.fingerprint import (
    CASES_FILE,
    CaseFingerprint,
    FingerprintCache,
    measure_case,
    write_fingerprint,
)
from voxelbridge.detect.fingerprint import FILE_NAME as FINGERPRINT_FILE
from voxelbridge.detect.plan import FILE_NAME as PLAN_FILE
from voxelbridge.detect.plan import Plan, make_plan, read_plan, write_plan
from voxelbridge.detect.plan_request import PlanRequest, PlanRule, parse_request
from voxelbridge.detect.splits import Split, make_splits, write_splits

NAMES_IN_ERROR = 10
LARGEST_TABLE = 1 << 20  # ids above this are looked up by search instead

A = TypeVar("A")
T = TypeVar("T")
Box = tuple[float, float, float, float, float, float]
CaseObjects = tuple[str, Sequence[Box], Sequence[int]]  # case id, original boxes, labels


@dataclass(frozen=True)
class Prepared:
    """What `prepare` left in the store."""

    plan: Plan
    num_cases: int
    num_new: int  # of them, preprocessed by this call
    num_objects: int


@dataclass(frozen=True)
class _Work:
    """What has to do the work: here, or an executor of a cluster."""

    workers: int
    executor: Executor | None

    def each(
        self, function: Callable[[A], T], items: Sequence[A], description: str
    ) -> Iterator[tuple[A, T | None]]:
        """Every item with its result; None where it failed, which is told on stderr."""
        outcomes = map_cases(
            function, items, workers=self.workers, description=description, executor=self.executor
        )
        for outcome in outcomes:
            match outcome:
                case Done(item=item, value=value):
                    yield item, value
                case Failed(item=item, error=error):
                    print(f"error: {error}", file=sys.stderr)
                    yield item, None


@dataclass(frozen=True)
class _Source:
    """A raw case and what other files of the data set say about it."""

    case: RawCase
    dataset: str
    patient: str | None
    origin_ids: tuple[str, ...]

    @property
    def case_id(self) -> str:
        return self.case.case_id


def prepare(
    dataset: Path,
    store: Path,
    *,
    rule: PlanRule = "default",
    request: PlanRequest | None = None,
    workers: int = 2,
    executor: str = "local",
    spacing_mm: tuple[float, float, float] | None = None,
    only: Collection[str] | None = None,
) -> Prepared:
    """Prepares the training cases of the raw data set at `dataset`; what is done is skipped.

    `request` says how to plan (None: by `rule` and `spacing_mm`); `only` names the cases to take
    (None: all of imagesTr); `executor` is "local" or "dask:ADDRESS".

    A case that fails is named in one line on stderr and left out; the others are stored, and a
    DataError at the end counts and names the failures.
    """
    request = request or parse_request(rule, spacing_mm=spacing_mm)
    raw = RawDataset.open(dataset)
    raw.require_things()
    cases = [case for case in raw.cases if only is None or case.case_id in only]
    with open_executor(executor) as opened:
        return _prepare(raw, cases, store, request, _Work(workers, opened))


def write_tables_of(
    folder: Path, cases: Sequence[RawCase], *, prefix: str = "", workers: int = 2
) -> list[str]:
    """cases.csv and ground_truth.csv of labelled raw cases; returns the ids of unreadable ones."""
    return _write_tables_of(folder, cases, _Work(workers, None), prefix=prefix)


def write_tables(folder: Path, objects: Sequence[CaseObjects], *, prefix: str = "") -> None:
    """cases.csv and ground_truth.csv; boxes in voxel edges of the original images."""
    names = [case_id for case_id, _, _ in objects]
    table = BoxTable.from_cases(
        [np.asarray(boxes, dtype=np.float64).reshape(-1, 6) for _, boxes, _ in objects],
        [np.asarray(labels, dtype=np.int64) for _, _, labels in objects],
    )
    write_cases(folder / f"{prefix}cases.csv", names)
    write_ground_truth(folder / f"{prefix}ground_truth.csv", table, cases=names)


def describe(prepared: Prepared, store: Path) -> str:
    """A small table for the person who prepared the store."""
    plan = prepared.plan
    overlap = "none (no objects)" if plan.anchor_overlap is None else f"{plan.anchor_overlap:.2f}"
    rows = {
        "cases": f"{prepared.num_cases} ({prepared.num_new} new)",
        "objects": f"{prepared.num_objects} of {len(plan.class_names)} classes",
        "spacing": f"{_by(plan.spacing_mm)} mm (z y x)",
        "median image": f"{_by(plan.median_shape)} voxels",
        "patch": f"{_by(plan.patch_size)} voxels, {len(plan.strides)} stages",
        "anchors": f"mean best overlap {overlap}",
        "memory": ", ".join(f"{name} {gib:g} GiB" for name, gib in plan.memory_gib.items())
        + " for a training step",
    }
    lines = [f"  {name:<13}{text}" for name, text in rows.items()]
    notes = [f"  note: {note}" for note in plan.notes]
    return "\n".join([f"{store}: plan {plan.rule}", *lines, *notes])


def _prepare(
    raw: RawDataset, cases: Sequence[RawCase], store: Path, request: PlanRequest, work: _Work
) -> Prepared:
    fingerprints, failed = _fingerprints(store, cases, work)
    plan = make_plan(
        fingerprints, request, channel_names=raw.channel_names, class_names=raw.class_names
    )
    plan = _keep_plan(store, plan, fingerprints)
    write_fingerprint(store, fingerprints)
    writer = CaseStoreWriter(store, patch_size=plan.patch_size)
    writer.remove_leftovers()
    good = {case.case_id for case in fingerprints}
    waiting = [
        _Source(case, raw.name, raw.groups.get(case.case_id), raw.origins.get(case.case_id, ()))
        for case in cases
        if case.case_id in good and not writer.is_done(case.case_id)
    ]
    done = work.each(partial(_store_case, writer, plan), waiting, "preprocessing")
    failed += [item.case_id for item, result in done if result is None]
    stored = sorted(good - set(failed))
    if not stored:
        raise DataError(f"{raw.folder}: no case could be prepared; see the lines above")
    writer.finish(only=stored)
    write_splits(store, _splits(raw, stored))
    kept = set(stored)
    of_store = [case for case in fingerprints if case.case_id in kept]
    write_tables(store, [_objects_of(case) for case in of_store])
    labelled = [case for case in raw.test_cases if case.has_labels]
    bad_tests = _write_tables_of(store, labelled, work, prefix="test_") if labelled else []
    if failed or bad_tests:
        raise DataError(_failures(raw, store, cases, failed, bad_tests))
    return Prepared(
        plan=plan,
        num_cases=len(stored),
        num_new=len(waiting),
        num_objects=sum(len(case.labels) for case in of_store),
    )


def _failures(
    raw: RawDataset,
    store: Path,
    cases: Sequence[RawCase],
    failed: Sequence[str],
    bad_tests: Sequence[str],
) -> str:
    text = f"{raw.folder}: "
    if failed:
        text += f"{len(failed)} of {len(cases)} cases could not be prepared ({_few(failed)})"
    if bad_tests:
        text += " and " if failed else ""
        text += f"the labels of {len(bad_tests)} test cases could not be read ({_few(bad_tests)})"
    return f"{text}; the other {len(cases) - len(failed)} are in {store}"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMES_IN_ERROR]) + (", ..." if len(names) > NAMES_IN_ERROR else "")


def _fingerprints(
    store: Path, cases: Sequence[RawCase], work: _Work
) -> tuple[list[CaseFingerprint], list[str]]:
    """Fingerprints in the order of `cases` and the ids of unreadable ones; reads only new files."""
    count = samples_per_case(len(cases))
    cache = FingerprintCache(store / CASES_FILE)
    found: dict[str, CaseFingerprint] = {}
    failed: list[str] = []
    waiting = []
    for case in cases:
        known = cache.find(case, num_samples=count)
        if known is None:
            waiting.append(case)
        else:
            found[case.case_id] = known
    measure = partial(measure_case, num_samples=count)
    try:
        for case, result in work.each(measure, waiting, "reading cases"):
            if result is None:
                failed.append(case.case_id)
            else:
                cache.add(case, result)
                found[case.case_id] = result
    finally:
        cache.close()
    return [found[case.case_id] for case in cases if case.case_id in found], failed


def _splits(raw: RawDataset, stored: Sequence[str]) -> list[Split]:
    """The data set's own folds (cases that could not be stored left out), or ours."""
    if raw.splits is None:
        return make_splits(stored, raw.groups)
    kept = set(stored)
    return [
        {side: [case for case in fold[side] if case in kept] for side in ("train", "val")}
        for fold in raw.splits
    ]


def _write_tables_of(
    folder: Path, cases: Sequence[RawCase], work: _Work, *, prefix: str
) -> list[str]:
    outcomes = list(work.each(_read_objects, cases, "reading labels"))
    write_tables(folder, [value for _, value in outcomes if value is not None], prefix=prefix)
    return [case.case_id for case, value in outcomes if value is None]


def _read_objects(case: RawCase) -> CaseObjects:
    objects = case.read_objects(case.read_grid())
    return (
        case.case_id,
        [_six(box) for box in objects.boxes],
        [int(label) for label in objects.labels],
    )


def _objects_of(case: CaseFingerprint) -> CaseObjects:
    return (
        case.case_id,
        [_six(box) for box in case.boxes],
        [int(label) for label in case.labels],
    )


def _store_case(writer: CaseStoreWriter, plan: Plan, source: _Source) -> bool:
    # Large arrays are let go as early as possible: the peak of this function, times the workers,
    # is what preparing needs.
    case = source.case
    objects = case.read_objects(case.read_grid())
    boxes, labels, ids = objects.boxes, objects.labels, objects.ids
    instances = None if objects.instances is None else _numbered(objects.instances, ids)
    ids = np.arange(1, len(ids) + 1)
    del objects
    volume = case.read_image()
    provenance = Provenance(
        source.patient, source.origin_ids, content_hashes(volume), dataset=source.dataset
    )
    mapping = crop_mapping(volume, boxes=boxes)
    if instances is not None:
        shape = resampled_shape(mapping.crop_shape, mapping.stored_grid.spacing_mm, plan.spacing_mm)
        start = mapping.crop_start
        crop_box = (*start, *(a + b for a, b in zip(start, mapping.crop_shape, strict=True)))
        target = type(mapping).build(mapping.original_grid, crop_box=crop_box, stored_shape=shape)
        instances = labels_to_stored(
            instances, target, resampling=plan.resampling, spacing_mm=plan.spacing_mm
        )
    prepared = preprocess(
        volume,
        mapping,
        spacing_mm=plan.spacing_mm,
        normalization=plan.normalization,
        resampling=plan.resampling,
    )
    del volume
    writer.write_case(
        case.case_id,
        prepared.image,
        grid=prepared.mapping.stored_grid,
        boxes=prepared.mapping.boxes_to_stored(boxes),
        labels=labels,
        mapping=prepared.mapping,
        instances=instances,
        provenance=provenance,
        locations=None if instances is None else _locations(instances, ids, labels),
        extra={
            "original_boxes": boxes.tolist(),
            "normalization": [scheme.model_dump(mode="json") for scheme in plan.normalization],
            "channel_names": list(plan.channel_names),
            "class_names": list(plan.class_names),
        },
    )
    return True


def _numbered(instances: NDArray[np.int32], ids: NDArray[np.int64]) -> NDArray[Any]:
    """The map with the object of row n numbered n + 1, in the smallest type that holds that.

    So a patch of the stored map alone tells which rows it shows. `ids` ascend.
    """
    kind = np.min_scalar_type(len(ids))
    if len(ids) and ids[-1] > LARGEST_TABLE:
        return np.searchsorted(ids, instances, side="right").astype(kind)
    table = np.zeros(int(instances.max(initial=0)) + 1, dtype=kind)
    table[ids] = np.arange(1, len(ids) + 1)
    return table[instances]


def _locations(
    instances: NDArray[Any], ids: NDArray[np.int64], labels: NDArray[np.int64]
) -> Mapping[int, NDArray[np.int32]]:
    """Voxels of each class that the case has, by its index."""
    if len(ids) == 0:
        return {}
    class_of = np.zeros(int(max(ids.max(), instances.max(initial=0))) + 1, dtype=np.uint16)
    class_of[ids] = labels + 1
    found = class_locations(class_of[instances], {int(label) + 1 for label in labels})
    return {number - 1: places for number, places in found.items()}


def _six(box: NDArray[np.float32]) -> Box:
    z0, y0, x0, z1, y1, x1 = (float(edge) for edge in box)
    return z0, y0, x0, z1, y1, x1


def _by(values: Sequence[float]) -> str:
    return " x ".join(f"{value:.4g}" for value in values)


def _keep_plan(store: Path, plan: Plan, cases: Sequence[CaseFingerprint]) -> Plan:
    """Writes the plan and returns it, or returns the one that the store was begun with.

    That one stays when cases came since, for instance repaired ones; anything else that changes
    the plan is refused, since stored cases would not fit it.
    """
    if not (store / PLAN_FILE).exists():
        write_plan(store, plan)
        return plan
    before = read_plan(store)
    if before == plan:
        return before
    changed = _changed_cases(store, cases)
    same_request = _request_of(before) == _request_of(plan)
    if same_request and not changed:
        print(f"{store}: keeps its plan, which was made from {before.num_cases} cases")
        return before
    now, then = (p.model_dump(mode="json", by_alias=True) for p in (plan, before))
    keys = [key for key in now if then.get(key) != now[key]]
    cause = f"cases changed since: {_few(changed)}" if same_request else "the options changed"
    raise ConfigError(
        f"{store}: begun with another plan (different: {', '.join(keys)}); {cause}; take an "
        "empty store folder"
    )


def _request_of(plan: Plan) -> tuple[Any, ...]:
    return (
        plan.rule,
        plan.gpu_memory_gib,
        plan.overrides,
        plan.resampling,
        plan.channel_names,
        plan.class_names,
    )


def _changed_cases(store: Path, cases: Sequence[CaseFingerprint]) -> list[str]:
    """Cases that were measured before and are now different."""
    path = store / FINGERPRINT_FILE
    if not path.exists():
        return []
    before = {case["case_id"]: case["digest"] for case in read_json(path)["cases"]}
    return [
        case.case_id for case in cases if before.get(case.case_id, case.digest()) != case.digest()
    ]
