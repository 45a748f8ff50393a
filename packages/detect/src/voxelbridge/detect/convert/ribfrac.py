"""RibFrac: rib fractures of chest CT, one label value per fracture, types in spreadsheets.

Layout: the extracted zips anywhere below SRC: `RibFracN-image.nii.gz`, `RibFracN-label.nii.gz`
and `ribfrac-{train-info-1,train-info-2,val-info}.csv` (`public_id,label_id,label_code`).
"""

import csv
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, assert_never

import numpy as np

from voxelbridge.core.data.image_io import read_grid
from voxelbridge.core.data.raw_problems import few_of
from voxelbridge.core.errors import DataError
from voxelbridge.detect.convert.label_maps import read_label_map
from voxelbridge.detect.convert.raw_writer import (
    ConversionReport,
    InstanceMap,
    NoObjects,
    RawDatasetWriter,
    SplitName,
)
from voxelbridge.detect.convert.splits import patient_folds

NAME = "ribfrac"
FILE = re.compile(r"(?P<case>RibFrac\d+)-(?P<role>image|label)\.nii(\.gz)?")
COLUMNS = ("public_id", "label_id", "label_code")
VALIDATION_IDS = range(421, 501)  # of the official release; 501-660 are the unlabelled test images
FIRST_TEST_ID = 501
TYPES = ("displaced", "non-displaced", "buckle", "segmental", "undefined")
UNDEFINED_CODE = -1

Classes = Literal["fracture", "types"]
Codes = Mapping[int, int]  # label id -> label code


@dataclass
class _Files:
    images: dict[str, Path] = field(default_factory=dict)
    labels: dict[str, Path] = field(default_factory=dict)
    doubled: dict[str, str] = field(default_factory=dict)  # case -> both paths


def convert(
    src: Path,
    out: Path,
    *,
    seed: int = 0,
    workers: int = 2,
    classes: Classes = "fracture",
) -> ConversionReport:
    """Converts train and validation; the official validation images become the test set.

    `classes="fracture"` makes every labelled fracture class 0, whatever its code. "types" gives
    the codes 1 to 4 and -1 (undefined) the classes 0 to 4, and then needs the spreadsheets.
    """
    files = _find_files(src)
    tables = _read_tables(src)
    rows = {case: codes for table in tables.values() for case, codes in table.items()}
    unlabelled = [
        case
        for case in files.images
        if case not in files.labels and case not in rows and _number(case) >= FIRST_TEST_ID
    ]
    cases = sorted({*files.images, *files.labels, *rows} - set(unlabelled), key=_number)
    if not cases:
        raise DataError(f"{src}: no RibFracN-image.nii.gz with a label; extract the zips below it")
    validation = {case for path, table in tables.items() if "val" in path.name for case in table}
    splits: dict[str, SplitName] = {
        case: "test" if case in validation or _number(case) in VALIDATION_IDS else "train"
        for case in cases
    }
    writer = RawDatasetWriter(
        out,
        name=NAME,
        channel_names=("CT",),
        class_names=_class_names(classes),
        settings={"seed": seed, "classes": classes},
    )
    failures = writer.convert_each(
        partial(_convert_case, writer, files, rows, splits, classes), splits, workers=workers
    )
    notes = [f"{len(unlabelled)} test images have no labels and were not converted"]
    train = {case: case for case, split in splits.items() if split == "train"}
    return writer.finish(
        patient_folds(train, seed=seed),
        failures=failures,
        notes=notes if unlabelled else [],
        only=cases,
    )


def _class_names(classes: Classes) -> tuple[str, ...]:
    match classes:
        case "fracture":
            return ("fracture",)
        case "types":
            return TYPES
        case _:
            assert_never(classes)


def _number(case_id: str) -> int:
    return int(case_id.removeprefix("RibFrac"))


def _find_files(src: Path) -> _Files:
    found = _Files()
    for path in sorted(src.rglob("RibFrac*")):  # ._RibFrac... of macOS does not match
        parts = FILE.fullmatch(path.name)
        if parts is None or not path.is_file():
            continue
        of_role = found.images if parts["role"] == "image" else found.labels
        before = of_role.setdefault(parts["case"], path)
        if before != path:
            found.doubled[parts["case"]] = f"{before} and {path}"
    return found


def _read_tables(src: Path) -> dict[Path, dict[str, dict[int, int]]]:
    """Per spreadsheet the fractures of each case it lists; a healthy case has an empty dict."""
    tables: dict[Path, dict[str, dict[int, int]]] = {}
    for path in sorted(src.rglob("ribfrac-*info*.csv")):
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
                raise DataError(f"{path}: no column {few_of(missing)}; expected {COLUMNS}")
            tables[path] = _cases_of_rows(path, reader)
    return tables


def _cases_of_rows(path: Path, rows: Iterable[dict[str, str]]) -> dict[str, dict[int, int]]:
    cases: dict[str, dict[int, int]] = {}
    for line, row in enumerate(rows, start=2):
        try:
            case, label, code = row["public_id"], int(row["label_id"]), int(row["label_code"])
        except (TypeError, ValueError):
            shown = ",".join(str(row[name]) for name in COLUMNS)
            raise DataError(f"{path}: line {line}: {shown!r} is not a name and two ids") from None
        if re.fullmatch(r"RibFrac\d+", case) is None:
            raise DataError(f"{path}: line {line}: public_id {case!r}, expected RibFracN")
        codes = cases.setdefault(case, {})
        if label == 0:  # the row of the background
            continue
        if codes.setdefault(label, code) != code:
            raise DataError(f"{path}: line {line}: label {label} of {case} has two codes")
        if code not in (UNDEFINED_CODE, *range(len(TYPES))):
            raise DataError(f"{path}: line {line}: label_code {code}, expected -1 or 0 to 4")
    return cases


def _convert_case(
    writer: RawDatasetWriter,
    files: _Files,
    rows: Mapping[str, Codes],
    splits: Mapping[str, SplitName],
    classes: Classes,
    case_id: str,
) -> None:
    if case_id in files.doubled:
        raise DataError(f"case {case_id}: two files of one name: {files.doubled[case_id]}")
    for role, of_role in (("image", files.images), ("label", files.labels)):
        if case_id not in of_role:
            raise DataError(f"case {case_id}: no file {case_id}-{role}.nii.gz")
    image = files.images[case_id]
    labels = read_label_map(files.labels[case_id], read_grid(image))
    present = [int(value) for value in np.unique(labels) if value != 0]
    if present and present[0] < 0:
        raise DataError(f"{files.labels[case_id]}: negative label {present[0]}")
    of_label, notes = _classes_of(present, rows.get(case_id), classes)
    array = np.where(np.isin(labels, list(of_label)), labels, 0)
    writer.add_case(
        case_id,
        [image],
        objects=InstanceMap(array, of_label) if of_label else NoObjects(),
        patient=case_id,
        origins=[f"{NAME}:{case_id}"],
        split=splits[case_id],
        notes=notes,
    )


def _classes_of(
    present: list[int], codes: Codes | None, classes: Classes
) -> tuple[dict[int, int], list[str]]:
    """Class of each label value that is an object, and what does not agree with the rows."""
    notes = []
    if codes is None:
        notes.append("no row in any ribfrac-*-info-*.csv")
        codes = {}
    elif without_row := sorted(set(present) - set(codes)):
        notes.append(f"labels {few_of(without_row)} have no row, kept as fractures")
    if without_voxel := sorted(set(codes) - set(present)):
        notes.append(f"labels {few_of(without_voxel)} have a row and no voxel, left out")
    background = [label for label in present if codes.get(label) == 0]
    if background:
        notes.append(f"labels {few_of(background)} have the code 0 (no fracture), left out")
    kept = [label for label in present if label not in background]
    match classes:
        case "fracture":
            return dict.fromkeys(kept, 0), notes
        case "types":
            code_of = {label: codes.get(label, UNDEFINED_CODE) for label in kept}
            return {
                label: len(TYPES) - 1 if code == UNDEFINED_CODE else code - 1
                for label, code in code_of.items()
            }, notes
        case _:
            assert_never(classes)
