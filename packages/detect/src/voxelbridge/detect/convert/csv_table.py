"""Tables of nodule centres or boxes as people write them: column names, separators, errors."""

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from voxelbridge.core.errors import DataError
from voxelbridge.detect.evaluate.tables import read_text

# Names are compared in lower case without anything but letters and digits.
CASE = (
    "caseid", "case", "seriesuid", "seriesinstanceuid", "seriesid", "series", "imageid",
    "imagename", "image", "filename", "file", "scanid", "scan", "name", "subjectid", "subject",
    "patientid", "patient", "pid", "id",
)  # fmt: skip
PATIENT = ("patientid", "patient", "subjectid", "subject")
LABEL = ("label", "class", "classname", "classid", "category", "type", "noduleclass")
DIAMETER = ("diametermm", "diameter", "diam", "diammm", "maxdiameter", "maxdiametermm")
BOX_EDGES = ("z0", "y0", "x0", "z1", "y1", "x1")  # our own tables: voxel edges

Shape = Literal["sphere", "box", "corners", "edges"]
DELIMITERS = (",", ";", "\t")


@dataclass(frozen=True)
class Row:
    """One object: where it was read, its six numbers and its label.

    `shape` tells what they are: "sphere" x, y, z, diameter (three times); "box" x, y, z and sizes
    along x, y, z; "corners" x, y, z of both ends; "edges" z0, y0, x0, z1, y1, x1 in voxel edges.
    """

    line: int
    shape: Shape
    values: tuple[float, float, float, float, float, float]
    label: str


@dataclass(frozen=True)
class Table:
    """The rows of each case in the order of the file, and the patients it names."""

    rows: Mapping[str, Sequence[Row]]
    patients: Mapping[str, str]


def read_table(path: Path) -> Table:
    """Reads a table; `,`, `;` or tab separate, a byte order mark and decimal commas are taken.

    Each row is an object; a row with a case and all its numbers empty says that the case has none.
    DataError naming file and line (the header is line 1) of what cannot be used.
    """
    text = read_text(path)
    header_line = re.split(r"[\r\n]", text, maxsplit=1)[0]
    delimiter = max(DELIMITERS, key=header_line.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    header = next(reader, None)
    if not header:
        raise DataError(f"{path}: empty; expected a header line")
    columns = _columns(path, header)
    rows: dict[str, list[Row]] = {}
    patients: dict[str, str] = {}
    for cells in reader:
        if not any(cell.strip() for cell in cells):
            continue
        line = reader.line_num
        if len(cells) != len(header):
            raise DataError(f"{path}: line {line}: {len(cells)} fields, the header {len(header)}")
        case = cells[columns.case].strip()
        if not case:
            raise DataError(f"{path}: line {line}: no case in column {header[columns.case]!r}")
        patient = "" if columns.patient is None else cells[columns.patient].strip()
        if patient and patients.setdefault(case, patient) != patient:
            raise DataError(f"{path}: line {line}: case {case} has two patients")
        of_case = rows.setdefault(case, [])
        numbers = [cells[index].strip() for index in columns.values]
        if any(numbers):
            label = "" if columns.label is None else cells[columns.label].strip()
            values = _values(numbers, columns.shape, f"{path}: line {line}", delimiter)
            of_case.append(Row(line, columns.shape, values, label))
    return Table(rows, patients)


@dataclass(frozen=True)
class _Columns:
    case: int
    patient: int | None
    label: int | None
    shape: Shape
    values: tuple[int, ...]  # three and one for a sphere, else six


def _columns(path: Path, header: Sequence[str]) -> _Columns:
    names = [re.sub(r"[^a-z0-9]", "", name.lower()) for name in header]
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise DataError(f"{path}: columns {', '.join(twice)} are there twice")
    case = _first(names, CASE)
    if case is None:
        raise DataError(
            f"{path}: no column for the case; expected case_id, seriesuid, image or the like, "
            f"got {', '.join(header)}"
        )
    patient = _first(names, PATIENT)
    shape, values = _shape(path, names, header)
    label = _first(names, LABEL)
    return _Columns(case, None if patient == case else patient, label, shape, values)


def _shape(
    path: Path, names: Sequence[str], header: Sequence[str]
) -> tuple[Shape, tuple[int, ...]]:
    if (edges := _all(names, [(name,) for name in BOX_EDGES])) is not None:
        return "edges", edges
    centre = _all(names, [_centre_names(axis) for axis in "xyz"])
    sizes = _all(names, [_size_names(axis) for axis in "xyz"])
    diameter = _first(names, DIAMETER)
    low, high = ("min", "start", "1"), ("max", "end", "stop", "2")
    corners = _all(names, [_corner_names(axis, end) for end in (low, high) for axis in "xyz"])
    if centre is not None and sizes is not None:
        return "box", (*centre, *sizes)
    if corners is not None:
        return "corners", corners
    if centre is not None and diameter is not None:
        return "sphere", (*centre, diameter)
    raise DataError(
        f"{path}: columns {', '.join(header)}: expected x, y, z with diameter_mm or with sizes "
        "(w, h, d), or xmin ... zmax, or z0, y0, x0, z1, y1, x1"
    )


def _centre_names(axis: str) -> tuple[str, ...]:
    plain = (f"coord{axis}", f"{axis}coord", f"center{axis}", f"centre{axis}", f"{axis}center")
    more = (f"{axis}centre", f"c{axis}", f"{axis}mm", f"pos{axis}", f"world{axis}", f"{axis}world")
    return (*plain, *more, f"coord{axis}mm", f"center{axis}mm", f"centroid{axis}", axis)


def _size_names(axis: str) -> tuple[str, ...]:
    word = {"x": ("w", "width"), "y": ("h", "height"), "z": ("d", "depth")}[axis]
    sized = (f"w{axis}", f"size{axis}", f"{axis}size", f"d{axis}", f"s{axis}", f"extent{axis}")
    diameters = (f"diameter{axis}", f"diam{axis}", f"{axis}diameter")
    names = (*sized, *diameters, *word)
    return (*names, *(f"{name}mm" for name in names))


def _corner_names(axis: str, ends: Sequence[str]) -> tuple[str, ...]:
    names = [
        (f"{axis}{end}", f"{end}{axis}") if end.isalpha() else (f"{axis}{end}",) for end in ends
    ]
    flat = [name for pair in names for name in pair]
    return (*flat, *(f"{name}mm" for name in flat))


def _first(names: Sequence[str], wanted: Sequence[str]) -> int | None:
    return next((names.index(name) for name in wanted if name in names), None)


def _all(names: Sequence[str], wanted: Sequence[Sequence[str]]) -> tuple[int, ...] | None:
    found = [_first(names, choices) for choices in wanted]
    return tuple(index for index in found if index is not None) if None not in found else None


def _values(
    texts: Sequence[str], shape: Shape, where: str, delimiter: str
) -> tuple[float, float, float, float, float, float]:
    numbers = []
    for text in texts:
        # In tables separated by semicolons, a comma is the decimal point of many languages.
        plain = text.replace(",", ".") if delimiter == ";" else text
        try:
            value = float(plain) if "_" not in plain else math.nan
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise DataError(f"{where}: {text!r} is not a finite number")
        numbers.append(value)
    x, y, z, *rest = numbers
    a, b, c = rest * 3 if shape == "sphere" else rest
    sizes = (a, b, c) if shape in ("sphere", "box") else (a - x, b - y, c - z)
    if min(sizes) <= 0:
        what = "size or diameter" if shape in ("sphere", "box") else "end must lie behind start;"
        raise DataError(f"{where}: {what} {list(sizes)} must be positive")
    return x, y, z, a, b, c
