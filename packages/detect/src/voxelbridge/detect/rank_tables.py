"""The tables of `vb-detect rank`, in three forms told apart by their columns (docs/ranking.md).

Tables of boxes, from which the figures are computed here; figures of single cases; finished
figures of resamples.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from voxelbridge.core.errors import DataError
from voxelbridge.detect.evaluate.bootstrap import draws
from voxelbridge.detect.evaluate.tables import read_text
from voxelbridge.detect.rank_bootstrap import Collected, Entry, Measure, bootstrap
from voxelbridge.detect.ranking import Values

Form = Literal["boxes", "cases", "samples"]

FORM_COLUMNS: Mapping[Form, tuple[str, ...]] = {
    "boxes": ("dataset", "method", "ground_truth", "predictions", "cases"),
    "cases": ("dataset", "method", "case_id", "value"),
    "samples": ("dataset", "method", "sample", "value"),
}
OPTIONAL_COLUMNS = ("fold", "seed")  # of the form "boxes"
TABLE_MEASURE = "value"  # what a table of single figures measures


@dataclass
class _Rows:
    entries: dict[str, list[Entry]] = field(default_factory=dict)
    numbers: dict[tuple[str, Form], dict[str, dict[str, float]]] = field(default_factory=dict)


def method_names(tables: Sequence[Path]) -> tuple[str, ...]:
    """The methods of `tables`, without opening what they point to."""
    rows = _Rows()
    for table in tables:
        _read(table, rows)
    of_boxes = [entry.method for of_set in rows.entries.values() for entry in of_set]
    of_numbers = [method for of_set in rows.numbers.values() for method in of_set]
    return tuple(dict.fromkeys([*of_boxes, *of_numbers]))


def collect(
    tables: Sequence[Path], *, measures: Sequence[Measure], samples: int, seed: int
) -> Collected:
    """The figures of all methods on all data sets of `tables`.

    A table of single figures has one measure, called "value", and cannot be mixed with tables of
    boxes. DataError in one line for everything that a table can have wrong.
    """
    rows = _Rows()
    for table in tables:
        _read(table, rows)
    if rows.entries and rows.numbers:
        raise DataError(
            f"{tables[0]} and the others: tables of boxes and of single figures are mixed; rank "
            "them one after the other"
        )
    if rows.entries:
        entries = [entry for of_set in rows.entries.values() for entry in of_set]
        return bootstrap(entries, measures=measures, samples=samples, seed=seed)
    found: dict[str, dict[str, Values]] = {}
    for (dataset, form), of_set in rows.numbers.items():
        if dataset in found:
            raise DataError(f"data set {dataset}: is in tables of two forms; keep one")
        found[dataset] = _from_numbers(dataset, form, of_set, samples=samples, seed=seed)
    return {TABLE_MEASURE: found}


def _from_numbers(
    dataset: str,
    form: Form,
    methods: Mapping[str, Mapping[str, float]],
    *,
    samples: int,
    seed: int,
) -> dict[str, Values]:
    """Figures of single cases or of resamples, brought into one order."""
    first = next(iter(methods))
    names = list(methods[first])
    for method, values in methods.items():
        if odd := sorted(set(names) ^ set(values)):
            owner, other = (first, method) if odd[0] in methods[first] else (method, first)
            kind = "case" if form == "cases" else "sample"
            raise DataError(
                f"data set {dataset}: {kind} {odd[0]} is there for {owner}, but not for {other} "
                f"({len(odd)} such); all methods need the same {kind}s"
            )
    table = np.array([[values[name] for name in names] for values in methods.values()])  # (M, N)
    if form == "cases":
        counts = np.array(list(draws(len(names), samples=samples, seed=seed)))  # (S, N)
        # One product per method: equal figures then give equal means to the last bit, and ties.
        resampled = np.array([counts @ row for row in table]) / len(names)
    else:
        resampled = table
    means = table.mean(axis=1)
    return {
        method: Values(float(mean), row)
        for method, mean, row in zip(methods, means, resampled, strict=True)
    }


def _read(path: Path, rows: _Rows) -> None:
    header, body = _fields(path)
    form = _form(path, header)
    if not body:
        raise DataError(f"{path}: only a header; expected a row per method and data set")
    columns = FORM_COLUMNS[form]
    for line, fields in body:
        where = f"{path}, line {line}"
        row = dict(zip(header, fields, strict=True))
        for column in columns:
            if not row[column]:
                raise DataError(f"{where}: {column} is empty")
        dataset, method = row["dataset"], row["method"]
        if form == "boxes":
            folder = path.parent
            rows.entries.setdefault(dataset, []).append(
                Entry(
                    dataset, method, folder / row["ground_truth"], folder / row["predictions"],
                    folder / row["cases"], seed=row.get("seed", ""), where=where,
                )
            )  # fmt: skip
            continue
        name = row[columns[2]]
        values = rows.numbers.setdefault((dataset, form), {}).setdefault(method, {})
        if name in values:
            raise DataError(
                f"{where}: {columns[2]} {name} of method {method} on {dataset} is there twice; "
                "drop one"
            )
        values[name] = _number(where, row["value"])


def _number(where: str, text: str) -> float:
    try:
        value = float(text) if "_" not in text else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{where}: value: got {text!r}, expected a finite number")
    return value


def _form(path: Path, header: Sequence[str]) -> Form:
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise DataError(f"{path}, line 1: column {twice[0]!r} is there twice; drop one")
    for form, columns in FORM_COLUMNS.items():
        allowed = {*columns, *(OPTIONAL_COLUMNS if form == "boxes" else ())}
        if set(columns) <= set(header):
            if unknown := [name for name in header if name not in allowed]:
                raise DataError(
                    f"{path}, line 1: unknown column {unknown[0]!r}; expected {','.join(columns)}"
                )
            return form
    wanted = "; ".join(",".join(columns) for columns in FORM_COLUMNS.values())
    raise DataError(
        f"{path}, line 1: got the columns {','.join(header)}, expected one of: {wanted}"
    )


def _fields(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    header: list[str] | None = None
    body: list[tuple[int, list[str]]] = []
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        for fields in reader:
            values = [each.strip() for each in fields]
            if not any(values):
                continue
            if header is None:
                header = values
            elif len(values) != len(header):
                raise DataError(
                    f"{path}, line {reader.line_num}: got {len(values)} fields, expected "
                    f"{len(header)} as in line 1"
                )
            else:
                body.append((reader.line_num, values))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not valid CSV ({error})") from error
    if header is None:
        raise DataError(f"{path}: empty; expected a header line")
    return header, body
