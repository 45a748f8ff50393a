"""The tables of a study as the paper's: architectures and initialisations by data set.

arXiv 2509.15947, tables 2 and 3. Figures in percent, the best of each architecture bold, the best
of all underlined, both by what is printed, so that equal figures look equal. Trainings that differ
in fold or seed alone are averaged.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from voxelbridge.detect.paper_results import mean_ranks
from voxelbridge.detect.rank_bootstrap import Measure, parse_measure
from voxelbridge.detect.rank_figures import measure_text
from voxelbridge.detect.ranking import Ranking
from voxelbridge.detect.study_cells import CellKey, CellResult
from voxelbridge.detect.table_text import DASH, TextCell, TextTable

DIGITS = 2
PLUS_MINUS = "\N{PLUS-MINUS SIGN}"
MEAN_HEAD, RANK_HEAD = "mean", "rank"


@dataclass(frozen=True)
class Figure:
    """A cell of a table: a share (not percent), or a rank. `values` of the single trainings.

    `value` None: missing. `deviation`: standard deviation (n - 1) of several trainings.
    """

    value: float | None
    values: tuple[float, ...] = ()
    deviation: float | None = None
    bold: bool = False
    underlined: bool = False


@dataclass(frozen=True)
class Block:
    """The columns of one measure: a figure per row for each column, see `columns`."""

    measure: str
    columns: tuple[str, ...]  # data sets, then mean and, where there is one, rank
    figures: tuple[tuple[Figure, ...], ...]


@dataclass(frozen=True)
class StudyTable:
    """Rows (architecture, initialisation) and their blocks; `missing` names cells without figure.

    `details` are further names of each row, under `detail_heads`.
    """

    rows: tuple[tuple[str, str], ...]
    blocks: tuple[Block, ...]
    missing: tuple[str, ...]
    detail_heads: tuple[str, ...] = ()
    details: tuple[tuple[str, ...], ...] = ()


def study_table(
    cells: Sequence[CellResult],
    *,
    measures: Sequence[str] = ("map_0.10", "froc_0.10"),
    planned: Sequence[CellKey] = (),
    rankings: Mapping[str, Ranking] | None = None,
    rank_inside: bool = False,
    detail_heads: Sequence[str] = (),
    details: Mapping[tuple[str, str], Sequence[str]] | None = None,
) -> StudyTable:
    """The table of `cells`.

    `planned`: every cell of the study; gives the order of rows and data sets and tells what is
    missing. `rankings` by measure give the rank column (methods called architecture/
    initialisation). `rank_inside` instead ranks the figures inside each architecture (table 2; a
    missing one is last). `details` say more of each row, under `detail_heads`.
    """
    keys = list(planned) + [cell.key for cell in cells]
    rows = _rows(keys)
    datasets = tuple(dict.fromkeys(key.dataset for key in keys))
    parsed = [parse_measure(measure) for measure in measures]
    blocks = tuple(
        _block(cells, measure, rows, datasets, (rankings or {}).get(measure.name), rank_inside)
        for measure in parsed
    )
    more = details or {}
    return StudyTable(
        rows,
        blocks,
        _missing(cells, parsed, rows, datasets, planned),
        tuple(detail_heads),
        tuple(tuple(more.get(row, [""] * len(detail_heads))) for row in rows),
    )


def text_table(
    table: StudyTable, *, caption: str, names: Mapping[str, str] | None = None
) -> TextTable:
    """What to print; `names`: what data sets, architectures, initialisations are called there."""
    shown = names or {}
    name_heads = ("architecture", "initialisation", *table.detail_heads)
    heads = [*name_heads]
    groups = [("", len(name_heads))]
    for block in table.blocks:
        heads += [shown.get(column, column) for column in block.columns]
        groups.append((measure_text(block.measure), len(block.columns)))
    rows = []
    for index, (architecture, initialisation) in enumerate(table.rows):
        cells = [TextCell(shown.get(name, name)) for name in (architecture, initialisation)]
        cells += [TextCell(text) for text in table.details[index]]
        for block in table.blocks:
            for column, figure in zip(block.columns, block.figures[index], strict=True):
                cells.append(_text_cell(figure, scale=1 if column == RANK_HEAD else 100))
        rows.append(cells)
    notes = ["percent; the best of an architecture bold, the best of all underlined"]
    counts = sorted({len(f.values) for b in table.blocks for r in b.figures for f in r if f.values})
    if counts[-1:] > [1]:
        some = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
        notes.append(f"mean {PLUS_MINUS} standard deviation of {some} trainings")
    if table.missing:
        notes.append(f"missing: {', '.join(table.missing)}")
    return TextTable(caption, groups, heads, rows, len(name_heads), notes)


def study_csv(table: StudyTable) -> str:
    """The table with all digits: shares, not percent; an empty field where a figure is missing."""
    heads = ["architecture", "initialisation", *table.detail_heads]
    for block in table.blocks:
        for column in block.columns:
            name = f"{block.measure}:{column}"
            heads += [name] if column in (MEAN_HEAD, RANK_HEAD) else [name, f"{name}:std"]
    rows = []
    for index, row in enumerate(table.rows):
        fields: list[Any] = [*row, *table.details[index]]
        for block in table.blocks:
            for column, figure in zip(block.columns, block.figures[index], strict=True):
                fields.append(figure.value)
                if column not in (MEAN_HEAD, RANK_HEAD):
                    fields.append(figure.deviation)
        rows.append(fields)
    return csv_text(heads, rows)


def csv_text(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """CSV of `rows` under `heads`; None is an empty field."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows(rows)
    return text.getvalue()


def _rows(keys: Sequence[CellKey]) -> tuple[tuple[str, str], ...]:
    """Architectures as they first appear, in each its initialisations as they first appear."""
    found = dict.fromkeys((key.architecture, key.initialisation) for key in keys)
    order = list(dict.fromkeys(architecture for architecture, _ in found))
    return tuple(sorted(found, key=lambda row: order.index(row[0])))


def _value(cell: CellResult, measure: Measure) -> float | None:
    """The cell's figure; None where it is not defined or was not measured."""
    if measure.figure == "map":
        return cell.metrics["ap"].get(measure.key, {}).get("map")
    return cell.metrics["froc"].get(measure.key, {}).get("pooled", {}).get("mean")


def _block(
    cells: Sequence[CellResult],
    measure: Measure,
    rows: Sequence[tuple[str, str]],
    datasets: tuple[str, ...],
    ranking: Ranking | None,
    rank_inside: bool,
) -> Block:
    found: dict[tuple[str, str, str], list[float]] = {}
    for cell in cells:
        value = _value(cell, measure)
        if value is not None:
            key = (cell.key.architecture, cell.key.initialisation, cell.key.dataset)
            found.setdefault(key, []).append(value)
    columns = [[_averaged(found.get((*row, dataset), ())) for row in rows] for dataset in datasets]
    columns.append([_mean(figures) for figures in zip(*columns, strict=True)])
    names = [*datasets, MEAN_HEAD]
    marked = [_marked(column, rows, largest=True, scale=100) for column in columns]
    ranks = _inside_ranks(columns[:-1], rows) if rank_inside else _ranks(ranking, rows)
    if ranks is not None:
        marked.append(_marked(ranks, rows, largest=False, scale=1))
        names.append(RANK_HEAD)
    return Block(measure.name, tuple(names), tuple(zip(*marked, strict=True)))


def _averaged(values: Sequence[float]) -> Figure:
    if not values:
        return Figure(None)
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Figure(float(np.mean(values)), tuple(values), deviation)


def _mean(figures: Sequence[Figure]) -> Figure:
    """The mean over the data sets, missing where one of them is."""
    values = [figure.value for figure in figures if figure.value is not None]
    return Figure(float(np.mean(values)) if len(values) == len(figures) else None)


def _ranks(ranking: Ranking | None, rows: Sequence[tuple[str, str]]) -> list[Figure] | None:
    if ranking is None:
        return None
    means = dict(zip(ranking.methods, ranking.overall.mean.tolist(), strict=True))
    return [Figure(means.get("/".join(row))) for row in rows]


def _inside_ranks(
    columns: Sequence[Sequence[Figure]], rows: Sequence[tuple[str, str]]
) -> list[Figure]:
    """Mean rank over the data sets among the rows of the same architecture; missing is last."""
    values = np.array(
        [[-np.inf if f.value is None else f.value for f in column] for column in columns]
    ).T  # (rows, data sets)
    result = np.zeros(len(rows))
    for architecture in {row[0] for row in rows}:
        inside = [index for index, row in enumerate(rows) if row[0] == architecture]
        result[inside] = mean_ranks(values[inside])
    return [Figure(float(value)) for value in result]


def _marked(
    column: Sequence[Figure], rows: Sequence[tuple[str, str]], *, largest: bool, scale: float
) -> list[Figure]:
    """Bold where no other row of the architecture is better as printed, underlined: none of all."""
    sign = 1 if largest else -1
    shown = [
        None if figure.value is None else sign * round(scale * figure.value, DIGITS)
        for figure in column
    ]
    best: dict[str, float] = {}
    for (architecture, _), value in zip(rows, shown, strict=True):
        if value is not None:
            best[architecture] = max(value, best.get(architecture, value))
    top = max(best.values(), default=None)
    return [
        replace(figure, bold=value == best[row[0]], underlined=value == top)
        if value is not None
        else figure
        for figure, row, value in zip(column, rows, shown, strict=True)
    ]


def _missing(
    cells: Sequence[CellResult],
    measures: Sequence[Measure],
    rows: Sequence[tuple[str, str]],
    datasets: Sequence[str],
    planned: Sequence[CellKey],
) -> tuple[str, ...]:
    """Planned cells that are not there; else data sets that a row lacks; figures not defined."""
    finished = {cell.key for cell in cells}
    missing = [str(key) for key in planned if key not in finished]
    if not planned:
        there = {(key.architecture, key.initialisation, key.dataset) for key in finished}
        missing = [
            f"{dataset}/{'/'.join(row)}"
            for row in rows
            for dataset in datasets
            if (*row, dataset) not in there
        ]
    for cell in cells:
        lacking = [m.name for m in measures if _value(cell, m) is None]
        if lacking:
            missing.append(f"{cell.key} ({', '.join(lacking)} not defined or not measured)")
    return tuple(missing)


def _text_cell(figure: Figure, *, scale: float) -> TextCell:
    if figure.value is None:
        return TextCell(DASH)
    deviation = ""
    if figure.deviation is not None:
        deviation = f"{PLUS_MINUS}{scale * figure.deviation:.{DIGITS}f}"
    text = f"{scale * figure.value:.{DIGITS}f}"
    return TextCell(text, figure.bold, figure.underlined, deviation)
