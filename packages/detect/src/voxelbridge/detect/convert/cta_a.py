"""CTA-A (GLIA-Net's release, Zenodo 6801398): intracranial aneurysms as connected components.

Layout: NIfTI images and masks, and tables with the columns
`subset,id,hospital,cta_img_file,aneurysm_seg_file`, whose paths are relative to the table.
Mask values above 1 (treated or ruptured) count as aneurysms.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, assert_never

from voxelbridge.core.data.foreground import instances_from_semantic
from voxelbridge.core.data.image_io import read_grid
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

NAME = "cta-a"
COLUMNS = ("subset", "id", "cta_img_file", "aneurysm_seg_file")  # hospital is not needed

Subset = Literal["train", "internal", "external"]
TestSet = Literal["internal", "external"]


@dataclass(frozen=True)
class Row:
    """One line of a table: what it says and where it stands."""

    case_id: str
    subset: Subset
    table: Path
    line: int
    image: str
    mask: str


def convert(
    src: Path,
    out: Path,
    *,
    seed: int = 0,
    workers: int = 2,
    test_set: TestSet = "internal",
) -> ConversionReport:
    """Converts the training and the internal test images.

    `test_set="external"` converts the external test images alone instead: they come from other
    hospitals, and the published figures never pool them with the internal ones.
    """
    rows = _read_rows(src)
    wanted = _wanted(test_set)
    splits: dict[str, SplitName] = {
        case: wanted[row.subset] for case, row in rows.items() if row.subset in wanted
    }
    if not splits:
        raise DataError(f"{src}: the tables list no case of the {test_set} images")
    writer = RawDatasetWriter(
        out,
        name=NAME if test_set == "internal" else f"{NAME}-external",
        channel_names=("CTA",),
        class_names=("aneurysm",),
        settings={"seed": seed, "test_set": test_set},
    )
    failures = writer.convert_each(
        partial(_convert_case, writer, src, rows, splits), splits, workers=workers
    )
    notes = [
        f"{count} {subset} images are not part of this data set"
        for subset in ("train", "internal", "external")
        if subset not in wanted and (count := sum(row.subset == subset for row in rows.values()))
    ]
    train = {case: case for case, split in splits.items() if split == "train"}
    return writer.finish(
        patient_folds(train, seed=seed), failures=failures, notes=notes, only=list(splits)
    )


def subset_of(text: str) -> Subset | None:
    """The part of the data that a table's `subset` cell names; None if it names none."""
    words = text.strip().lower()
    if "ext" in words:
        return "external"
    if "train" in words:
        return "train"
    if any(word in words for word in ("int", "test", "eval", "val")):
        return "internal"
    return None


def _wanted(test_set: TestSet) -> dict[Subset, SplitName]:
    match test_set:
        case "internal":
            return {"train": "train", "internal": "test"}
        case "external":
            return {"external": "test"}
        case _:
            assert_never(test_set)


def _read_rows(src: Path) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for table in sorted(src.rglob("*.csv")):
        if table.name.startswith("."):
            continue
        with table.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            if not set(COLUMNS) <= set(reader.fieldnames or ()):
                continue  # another table of the download
            for line, cells in enumerate(reader, start=2):
                row = _row(table, line, cells)
                if (first := rows.setdefault(row.case_id, row)) is not row:
                    raise DataError(
                        f"{table}: line {line}: case {row.case_id} is listed before "
                        f"({first.table}, line {first.line})"
                    )
    if not rows:
        raise DataError(f"{src}: no table with the columns {', '.join(COLUMNS)} and a row")
    return rows


def _row(table: Path, line: int, cells: Mapping[str, str | None]) -> Row:
    values = {name: (cells[name] or "").strip() for name in COLUMNS}
    if not values["id"]:
        raise DataError(f"{table}: line {line}: no id")
    subset = subset_of(values["subset"])
    if subset is None:
        raise DataError(
            f"{table}: line {line}: subset {values['subset']!r}, expected train, an internal or "
            "an external test set"
        )
    return Row(
        values["id"], subset, table, line, values["cta_img_file"], values["aneurysm_seg_file"]
    )


def _convert_case(
    writer: RawDatasetWriter,
    src: Path,
    rows: Mapping[str, Row],
    splits: Mapping[str, SplitName],
    case_id: str,
) -> None:
    row = rows[case_id]
    image = _locate(src, row, row.image, "cta_img_file")
    mask = _locate(src, row, row.mask, "aneurysm_seg_file")
    labels = read_label_map(mask, read_grid(image))
    if labels.size and int(labels.min()) < 0:
        raise DataError(f"{mask}: negative label {int(labels.min())}")
    # The whole foreground is labelled at once: a touching part of another value is no new object.
    instances, _ = instances_from_semantic((labels > 0).view("u1"), (1,), min_voxels=1)
    classes = dict.fromkeys(range(1, int(instances.max()) + 1), 0)
    writer.add_case(
        case_id,
        [image],
        objects=InstanceMap(instances, classes) if classes else NoObjects(),
        patient=case_id,  # the tables name no patients
        origins=[f"{NAME}:{case_id}"],
        split=splits[case_id],
    )


def _locate(src: Path, row: Row, cell: str, column: str) -> Path:
    """The file a cell names, relative to the table or to `src`, and never outside `src`."""
    where = f"case {row.case_id}: {row.table.name} line {row.line}"
    if not cell:
        raise DataError(f"{where}: no {column}")
    relative = Path(cell.replace("\\", "/"))
    for base in (row.table.parent, src):
        path = base / relative
        if path.is_file():
            if not path.resolve().is_relative_to(src.resolve()):
                raise DataError(f"{where}: {column} {cell!r} lies outside {src}")
            return path
    raise DataError(f"{where}: {column} {cell!r} is no file")
