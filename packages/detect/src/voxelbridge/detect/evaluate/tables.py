"""Boxes of a whole data set and their CSV files: cases, ground truth, predictions.

Everything a file can have wrong is found here and named with file and line (the header is line 1),
so that the evaluation itself can trust its input. The format: docs/formats/predictions.md.
"""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.errors import DataError
from voxelbridge.core.files import atomic_write

CASE_COLUMN = "case_id"
BOX_COLUMNS = ("z0", "y0", "x0", "z1", "y1", "x1")
GROUND_TRUTH_COLUMNS = (CASE_COLUMN, "label", *BOX_COLUMNS)
PREDICTION_COLUMNS = (CASE_COLUMN, "label", "score", *BOX_COLUMNS)
MAX_LABEL = 9_999  # a larger one is a typing error, not a class

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, eq=False)
class BoxTable:
    """Boxes of all cases: predictions, or objects where there are no scores.

    case_index (N,) int64 row of the case in cases.csv; labels (N,) int64 0-based classes;
    boxes (N, 6) float64 voxel edges of the original image, z y x, end >= start;
    scores (N,) float64, or None for objects. Rows keep the order of the file: ties depend on it.
    """

    case_index: NDArray[np.int64]
    labels: NDArray[np.int64]
    boxes: NDArray[np.float64]
    scores: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        rows = len(self.boxes)
        shapes = [self.case_index.shape, self.labels.shape]
        if self.scores is not None:
            shapes.append(self.scores.shape)
        if self.boxes.shape != (rows, 6) or any(shape != (rows,) for shape in shapes):
            raise ValueError(f"box table: boxes {self.boxes.shape} with columns {shapes}")
        if (self.boxes[:, 3:] < self.boxes[:, :3]).any() or not np.isfinite(self.boxes).all():
            raise ValueError("box table: boxes must be finite and not inverted")
        if self.scores is not None and not np.isfinite(self.scores).all():
            raise ValueError("box table: scores must be finite")
        if rows and min(self.case_index.min(), self.labels.min()) < 0:
            raise ValueError("box table: case indices and labels must be 0 or more")

    def __len__(self) -> int:
        return len(self.boxes)

    @classmethod
    def from_cases(
        cls,
        boxes: Sequence[Any],  # Any: arrays or CPU tensors
        labels: Sequence[Any],
        *,
        scores: Sequence[Any] | None = None,
    ) -> Self:
        """One table from what each case holds, in the order of the cases; (n, 6), (n,), (n,)."""
        counts = [len(part) for part in labels]
        return cls(
            case_index=np.repeat(np.arange(len(counts), dtype=np.int64), counts),
            labels=_concatenate(labels, np.int64, (0,)),
            boxes=_concatenate(boxes, np.float64, (0, 6)),
            scores=None if scores is None else _concatenate(scores, np.float64, (0,)),
        )


def read_cases(path: Path) -> list[str]:
    """The evaluated cases in order; a repeated or an empty name, or no case, is a DataError."""
    cases: dict[str, int] = {}
    for line, row in read_rows(path, (CASE_COLUMN,)):
        name = row[0]
        if not name:
            raise line_error(path, line, "an empty case_id")
        if name in cases:
            raise line_error(
                path, line, f"case {name!r} is listed twice (first on line {cases[name]}); drop one"
            )
        cases[name] = line
    if not cases:
        raise DataError(f"{path}: no cases, only a header; list every evaluated case")
    return list(cases)


def read_ground_truth(
    path: Path, cases: Sequence[str], *, num_classes: int | None = None
) -> BoxTable:
    """The objects of all cases. A label of `num_classes` or more is an error where it is given."""
    return _read_boxes(path, cases, GROUND_TRUTH_COLUMNS, num_classes)


def read_predictions(
    path: Path, cases: Sequence[str], *, num_classes: int | None = None
) -> BoxTable:
    """The scored boxes of all cases. Equal rows are legal."""
    return _read_boxes(path, cases, PREDICTION_COLUMNS, num_classes)


def write_cases(path: Path, cases: Sequence[str]) -> None:
    """Writes cases.csv."""
    _write(path, (CASE_COLUMN,), [[name] for name in cases])


def write_ground_truth(path: Path, table: BoxTable, *, cases: Sequence[str]) -> None:
    """Writes ground_truth.csv; numbers read back are bit for bit the same."""
    _write(
        path,
        GROUND_TRUTH_COLUMNS,
        [
            [cases[case], label, *box]
            for case, label, box in zip(
                table.case_index.tolist(), table.labels.tolist(), table.boxes.tolist(), strict=True
            )
        ],
    )


def write_predictions(path: Path, table: BoxTable, *, cases: Sequence[str]) -> None:
    """Writes predictions.csv; numbers read back are bit for bit the same."""
    if table.scores is None:
        raise ValueError("predictions need scores")
    _write(
        path,
        PREDICTION_COLUMNS,
        [
            [cases[case], label, score, *box]
            for case, label, score, box in zip(
                table.case_index.tolist(),
                table.labels.tolist(),
                table.scores.tolist(),
                table.boxes.tolist(),
                strict=True,
            )
        ],
    )


def _read_boxes(
    path: Path, cases: Sequence[str], columns: tuple[str, ...], num_classes: int | None
) -> BoxTable:
    rank = {name: index for index, name in enumerate(cases)}
    limit = MAX_LABEL + 1 if num_classes is None else num_classes
    case_index: list[int] = []
    labels: list[int] = []
    numbers: list[list[float]] = []
    for line, row in read_rows(path, columns):
        name, label, *texts = row
        if name not in rank:
            raise line_error(path, line, f"case {_short(name)} is not in the list of cases")
        case_index.append(rank[name])
        labels.append(_label(path, line, label, limit))
        values = finite_numbers(path, line, columns[2:], texts)
        _check_box(path, line, values[-6:])
        numbers.append(values)
    table = np.array(numbers, dtype=np.float64).reshape(len(numbers), len(columns) - 2)
    return BoxTable(
        case_index=np.array(case_index, dtype=np.int64),
        labels=np.array(labels, dtype=np.int64),
        boxes=np.ascontiguousarray(table[:, -6:]),
        scores=table[:, 0].copy() if "score" in columns else None,
    )


def _check_box(path: Path, line: int, box: list[float]) -> None:
    for axis, low, high in zip("zyx", box[:3], box[3:], strict=True):
        if high < low:
            raise line_error(
                path, line, f"inverted box: {axis}1 = {high!r} is less than {axis}0 = {low!r}"
            )


def _label(path: Path, line: int, text: str, limit: int) -> int:
    if not (text.isascii() and text.isdigit()):
        raise line_error(path, line, f"label: got {_short(text)}, expected a whole number from 0")
    digits = text.lstrip("0") or "0"
    if len(digits) > len(str(MAX_LABEL)) or int(digits) >= limit:
        raise line_error(
            path, line, f"label: got {_short(text)}, expected at most {limit - 1} ({limit} classes)"
        )
    return int(digits)


def finite_numbers(path: Path, line: int, columns: Sequence[str], texts: list[str]) -> list[float]:
    """The finite numbers of one row."""
    try:
        values = [float(text) for text in texts]
        if all(map(math.isfinite, values)) and "_" not in "".join(texts):
            return values
    except ValueError:
        pass
    column, text = next(
        pair for pair in zip(columns, texts, strict=True) if not _is_finite_number(pair[1])
    )
    raise line_error(path, line, f"{column}: got {_short(text)}, expected a finite number")


def _is_finite_number(text: str) -> bool:
    try:
        return math.isfinite(float(text)) and "_" not in text  # Python alone reads 1_000
    except ValueError:
        return False


def read_text(path: Path) -> str:
    """The UTF-8 text of a table or a list, without a byte order mark; DataError if it has none."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    content = content.removeprefix(_BYTE_ORDER_MARK)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise line_error(path, line, "not UTF-8 text; save it as UTF-8") from error


def read_rows(path: Path, columns: tuple[str, ...]) -> list[tuple[int, list[str]]]:
    """Line number and the fields of `columns` of every row after the header."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    rows: list[tuple[int, list[str]]] = []
    picks: list[int] | None = None
    header: list[str] = []
    empty_line: int | None = None
    line = 0
    try:
        for fields in reader:
            first, line = line + 1, reader.line_num
            values = [field.strip() for field in fields]
            if picks is None:
                header, picks = values, _columns(path, values, columns)
            elif not values:
                empty_line = empty_line or first
            elif empty_line is not None:
                raise line_error(path, empty_line, "an empty line inside the table; remove it")
            elif len(values) != len(header):
                raise line_error(
                    path, first, f"got {len(values)} fields, expected {len(header)} as in line 1"
                )
            else:
                rows.append((first, [values[pick] for pick in picks]))
    except csv.Error as error:
        raise line_error(path, line + 1, f"not valid CSV ({error})") from error
    if picks is None:
        raise line_error(path, 1, f"the file is empty, expected the header {','.join(columns)}")
    return rows


def _columns(path: Path, header: list[str], columns: tuple[str, ...]) -> list[int]:
    doubled = sorted({name for name in header if header.count(name) > 1})
    if doubled:
        raise line_error(path, 1, f"column {doubled[0]!r} is there twice; drop one")
    missing = [name for name in columns if name not in header]
    if missing:
        raise line_error(
            path,
            1,
            f"missing column {', '.join(missing)}: got {_short(','.join(header))}, "
            f"expected {','.join(columns)}",
        )
    return [header.index(name) for name in columns]


def _write(path: Path, columns: tuple[str, ...], rows: Sequence[Sequence[object]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")  # floats are written with repr
    writer.writerow(columns)
    writer.writerows(rows)
    with atomic_write(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8", newline="")


def _concatenate(parts: Sequence[Any], dtype: type, empty: tuple[int, ...]) -> NDArray[Any]:
    arrays = [np.asarray(part, dtype=dtype) for part in parts]
    return np.concatenate([np.zeros(empty, dtype=dtype), *arrays])


def line_error(path: Path, line: int, problem: str) -> DataError:
    """The error of a table: file, line (the header is line 1) and what is wrong."""
    return DataError(f"{path}, line {line}: {problem}")


def _short(text: str) -> str:
    shown = text if len(text) <= 60 else f"{text[:57]}..."
    return repr(shown)
