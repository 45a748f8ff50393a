"""The two spreadsheets of Duke-Breast-Cancer-MRI, and the files that they name on this disk."""

import csv
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from zipfile import BadZipFile

from openpyxl import load_workbook

from voxelbridge.core.data.raw_problems import few_of
from voxelbridge.core.errors import DataError
from voxelbridge.core.progress import track

BOXES_TABLE = "Annotation_Boxes"
MAPPING_TABLE = "Breast-Cancer-MRI-filepath_filename-mapping"
PATIENT = "Patient ID"
ROWS, COLUMNS = ("Start Row", "End Row"), ("Start Column", "End Column")
SLICES = ("Start Slice", "End Slice")
ORIGINAL, CLASSIC, DESCRIPTIVE = "original_path_and_filename", "classic_path", "descriptive_path"

Cells = Mapping[str, object]  # a line of a table: numbers or text by column name


@dataclass(frozen=True)
class SliceBox:
    """A box as the table gives it: first and last row, column and slice, counted from 1."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    slices: tuple[int, int]


@dataclass(frozen=True, slots=True)
class SliceFile:
    """Number of a slice in its sequence, and its file in the two folder layouts of TCIA."""

    number: int
    classic: str
    descriptive: str


def read_boxes(src: Path) -> dict[str, list[SliceBox]]:
    """The boxes of each patient; DataError with the line for a cell that is no box."""
    boxes: dict[str, list[SliceBox]] = {}
    with _open_table(src, BOXES_TABLE, (PATIENT, *ROWS, *COLUMNS, *SLICES)) as (path, lines):
        for line, cells in lines:
            if cells[PATIENT] in (None, ""):
                continue
            ends = [(_whole(cells[a]), _whole(cells[b])) for a, b in (ROWS, COLUMNS, SLICES)]
            good = [(a, b) for a, b in ends if a is not None and b is not None and 1 <= a <= b]
            if len(good) < 3:
                raise DataError(
                    f"{path}: line {line}: {ends} is no box; expected 1 <= start <= end"
                )
            boxes.setdefault(str(cells[PATIENT]).strip(), []).append(SliceBox(*good))
    if not boxes:
        raise DataError(f"{path}: no boxes")
    return dict(sorted(boxes.items()))


def read_mapping(
    src: Path, *, patients: Collection[str], sequences: Collection[str]
) -> dict[tuple[str, str], list[SliceFile]]:
    """The files of each (patient, sequence) that is asked for, by slice number."""
    mapped: dict[tuple[str, str], list[SliceFile]] = {}
    with _open_table(src, MAPPING_TABLE, (ORIGINAL, CLASSIC)) as (path, lines):
        for line, cells in track(lines, description="reading the file mapping"):
            parts = PurePosixPath(str(cells[ORIGINAL] or "").replace("\\", "/")).parts
            # DICOM_Images/Breast_MRI_001/post_1/Breast_MRI_001_post_1_005.dcm
            if len(parts) < 3 or parts[-2] not in sequences or parts[-3] not in patients:
                continue
            number = re.search(r"(\d+)$", PurePosixPath(parts[-1]).stem)
            if number is None:
                raise DataError(f"{path}: line {line}: no slice number in {parts[-1]!r}")
            slices = mapped.setdefault((parts[-3], parts[-2]), [])
            classic, descriptive = cells[CLASSIC] or "", cells.get(DESCRIPTIVE) or ""
            slices.append(SliceFile(int(number[1]), str(classic), str(descriptive)))
    for slices in mapped.values():
        slices.sort(key=lambda item: item.number)
    return mapped


def series_files(collection: Path, slices: Sequence[SliceFile], name: str) -> list[Path]:
    """The files of a sequence on this disk, in slice order; DataError for what is missing.

    Instance numbers in file names are compared as numbers: downloads pad them differently.
    """
    numbers = [item.number for item in slices]
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise DataError(f"sequence {name}: slice numbers of the mapping have gaps or repeat")
    for paths in ([item.classic for item in slices], [item.descriptive for item in slices]):
        places = [_place(text) for text in paths]
        parents = {place.parent for place in places}
        folder = collection / places[0].parent
        if len(parents) == 1 and len(places[0].parts) > 1 and folder.is_dir():
            return _by_number(folder, [place.name for place in places], name)
    raise DataError(
        f"sequence {name}: no folder {_place(slices[0].classic).parent} in {collection}"
    )


def _by_number(folder: Path, names: Sequence[str], sequence: str) -> list[Path]:
    present: dict[tuple[int, ...], Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if (first := present.setdefault(_key(path.name), path)) is not path:
            raise DataError(f"sequence {sequence}: {first.name} and {path.name} are one instance")
    if missing := [name for name in names if _key(name) not in present]:
        raise DataError(f"sequence {sequence}: no file {few_of(missing)} in {folder}")
    return [present[_key(name)] for name in names]


def _key(name: str) -> tuple[int, ...]:
    return tuple(int(digits) for digits in re.findall(r"\d+", PurePosixPath(name).stem))


def _place(text: str) -> PurePosixPath:
    """A path of the mapping below the collection's folder; doubled slashes are its own slips."""
    parts = [part for part in text.replace("\\", "/").split("/") if part]
    if ".." in parts:
        raise DataError(f"path {text!r} of the mapping leads out of the collection")
    if parts and not parts[0].startswith("Breast"):
        parts = parts[1:]  # the collection itself
    if parts:  # the descriptive layout writes some patients without their first underscore
        parts[0] = re.sub(r"^BreastMRI_?(\d+)$", r"Breast_MRI_\1", parts[0])
    return PurePosixPath(*parts)


def _whole(cell: object) -> int | None:
    try:
        value = float(str(cell))
    except ValueError:
        return None
    return int(value) if value.is_integer() else None


def _find_table(src: Path, name: str) -> Path:
    for ending in ("xlsx", "csv"):
        for folder in (src, src.parent):
            for pattern in (f"{name}*.{ending}", f"*/{name}*.{ending}"):
                if folder == src.parent and pattern.startswith("*/"):
                    continue
                if found := sorted(folder.glob(pattern)):
                    return found[0]
    raise DataError(f"{src}: no {name}.xlsx (or .csv) in it, below it or beside it")


@contextmanager
def _open_table(
    src: Path, name: str, columns: Sequence[str]
) -> Iterator[tuple[Path, Iterator[tuple[int, Cells]]]]:
    """The path of a table and its lines (from 2) by column name; a workbook is read as a stream."""
    path = _find_table(src, name)
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8-sig") as stream:
            yield path, _lines(path, iter(csv.reader(stream)), columns)
        return
    try:
        book = load_workbook(path, read_only=True, data_only=True)
    except (BadZipFile, KeyError, ValueError) as error:
        raise DataError(f"{path}: not an Excel workbook ({error})") from error
    try:
        rows = book.worksheets[0].iter_rows(values_only=True)
        yield path, _lines(path, iter(rows), columns)
    finally:
        book.close()


def _lines(
    path: Path, rows: Iterator[Sequence[object]], columns: Sequence[str]
) -> Iterator[tuple[int, Cells]]:
    header = [str(cell or "").strip() for cell in next(rows, ())]
    if missing := [name for name in columns if name not in header]:
        raise DataError(f"{path}: no column {few_of(missing)}; the first line is {few_of(header)}")
    for line, row in enumerate(rows, start=2):
        if any(cell not in (None, "") for cell in row):
            yield line, dict(zip(header, (*row, *[None] * len(header)), strict=False))
