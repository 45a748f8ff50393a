"""Where the truth comes from: a CSV table, a raw data set, or a prepared store's tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from voxelbridge.core.data.case_index import INDEX_NAME
from voxelbridge.core.data.case_store import CaseStore
from voxelbridge.core.data.dataset import RawCase, RawDataset
from voxelbridge.core.data.executor import Failed, map_cases
from voxelbridge.core.data.raw_problems import few_of
from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.detect.evaluate.ranked import Floats
from voxelbridge.detect.evaluate.tables import BoxTable, read_cases, read_ground_truth

CASES_TABLE, TRUTH_TABLE = "cases.csv", "ground_truth.csv"
TEST_PREFIX = "test_"  # of a store's tables: the data set's imagesTs


@dataclass(frozen=True, eq=False)
class Truth:
    """The evaluated cases, their objects in voxel edges of the original images, and what is known.

    spacings (cases, 3) mm z y x or None; num_classes None: as the tables show.
    """

    cases: list[str]
    objects: BoxTable
    spacings: Floats | None = None
    num_classes: int | None = None


def read_truth(
    source: Path,
    *,
    predictions: Path,
    cases: Path | None = None,
    num_classes: int | None = None,
    workers: int = 2,
) -> Truth:
    """The truth about the cases listed in the file `cases`.

    Without it: those of cases.csv beside the predictions; else the labelled imagesTs of a data set
    or, if there are none, its imagesTr; else cases.csv beside a table. A listed case that the
    source lacks or has no labels for is a DataError.
    """
    beside = predictions.parent / CASES_TABLE
    if cases is None and beside.is_file():
        cases = beside
    names = None if cases is None else read_cases(cases)
    if not source.is_dir():
        return _of_table(source, names, num_classes)
    if (source / INDEX_NAME).is_file():
        return _of_store(source, names, cases, num_classes)
    return _of_raw(source, names, cases, num_classes, workers)


def _of_table(path: Path, names: list[str] | None, num_classes: int | None) -> Truth:
    if names is None:
        beside = path.parent / CASES_TABLE
        if not beside.is_file():
            raise ConfigError(
                f"--cases: not given, and there is no {CASES_TABLE} beside the predictions or "
                f"{path}; name the table of all evaluated cases"
            )
        names = read_cases(beside)
    table = read_ground_truth(path, names, num_classes=num_classes)
    return Truth(names, table, None, num_classes)


def _of_raw(
    folder: Path,
    names: list[str] | None,
    listed_in: Path | None,
    num_classes: int | None,
    workers: int,
) -> Truth:
    dataset = RawDataset.open(folder)
    known = {case.case_id: case for case in (*dataset.cases, *dataset.test_cases)}
    if names is None:
        tests = [case.case_id for case in dataset.test_cases if case.has_labels]
        names = tests or [case.case_id for case in dataset.cases if case.has_labels]
    _check_known(names, known, folder, listed_in)
    if bare := [name for name in names if not known[name].has_labels]:
        raise DataError(
            f"{folder}: no labels of {few_of(bare)}, which {listed_in or 'the data set'} lists"
        )
    boxes, labels, spacings = [], [], []
    for outcome in map_cases(
        _read_case, [known[name] for name in names], workers=workers, description="reading labels"
    ):
        if isinstance(outcome, Failed):
            raise DataError(f"{folder}: {outcome.error}")
        case_boxes, case_labels, spacing = outcome.value
        boxes.append(case_boxes)
        labels.append(case_labels)
        spacings.append(spacing)
    table = BoxTable.from_cases(boxes, labels)
    _check_classes(table, names, folder, num_classes)
    return Truth(names, table, np.array(spacings), num_classes or len(dataset.class_names))


def _read_case(case: RawCase) -> tuple[Floats, list[int], tuple[float, float, float]]:
    grid = case.read_grid()
    objects = case.read_objects(grid)
    return objects.boxes.astype(np.float64), objects.labels.tolist(), grid.spacing_mm


def _of_store(
    folder: Path, names: list[str] | None, listed_in: Path | None, num_classes: int | None
) -> Truth:
    tables: list[tuple[list[str], BoxTable]] = []
    for prefix in (TEST_PREFIX, ""):
        if (folder / f"{prefix}{CASES_TABLE}").is_file():
            own = read_cases(folder / f"{prefix}{CASES_TABLE}")
            tables.append((own, read_ground_truth(folder / f"{prefix}{TRUTH_TABLE}", own)))
    if not tables:
        raise DataError(f"{folder}: a store without {CASES_TABLE}; only `vb-detect prepare` "
                        "writes the tables that an evaluation needs")  # fmt: skip
    if names is None:
        names = tables[0][0]
    _check_known(names, {name: None for own, _ in tables for name in own}, folder, listed_in)
    table = _gathered(names, tables)
    _check_classes(table, names, folder, num_classes)
    return Truth(names, table, _stored_spacings(folder, names), num_classes)


def _stored_spacings(folder: Path, names: Sequence[str]) -> Floats | None:
    """Spacings of the original images; None where a case, such as a test case, is not stored."""
    store = CaseStore.open(folder, verify="never")
    if not set(names) <= {record.case_id for record in store.cases}:
        return None
    return np.array([store.details(name).mapping.original_grid.spacing_mm for name in names])


def _gathered(names: Sequence[str], tables: Sequence[tuple[list[str], BoxTable]]) -> BoxTable:
    """The rows of the named cases, in the order of the tables."""
    place = {name: number for number, name in enumerate(names)}
    index = [
        np.array([place.get(name, -1) for name in own], dtype=np.int64)[table.case_index]
        for own, table in tables
    ]
    keep = [rows >= 0 for rows in index]
    return BoxTable(
        case_index=np.concatenate([rows[mine] for rows, mine in zip(index, keep, strict=True)]),
        labels=np.concatenate([t.labels[m] for (_, t), m in zip(tables, keep, strict=True)]),
        boxes=np.concatenate([t.boxes[m] for (_, t), m in zip(tables, keep, strict=True)]),
    )


def _check_known(
    names: Sequence[str], known: Mapping[str, object], folder: Path, listed_in: Path | None
) -> None:
    for line, name in enumerate(names, start=2):
        if name not in known:
            raise DataError(f"{listed_in}, line {line}: case {name!r} is not in {folder}")
    if not names:
        raise DataError(f"{folder}: no labelled case to evaluate")


def _check_classes(
    table: BoxTable, names: Sequence[str], folder: Path, num_classes: int | None
) -> None:
    beyond = np.flatnonzero(table.labels >= (num_classes or np.inf))
    if len(beyond):
        row = int(beyond[0])
        raise DataError(
            f"{folder}, case {names[int(table.case_index[row])]}: class {table.labels[row]}, "
            f"expected at most {(num_classes or 0) - 1} as --num-classes says"
        )
