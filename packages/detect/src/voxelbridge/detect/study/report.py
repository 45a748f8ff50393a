"""What a study found: tables, ranks and figures in one folder.

table.md .csv .tex .html     rows architecture and initialisation, columns data sets
comparison.md .csv           own figures beside the paper's (`--compare paper`)
ranking.csv .json, ranks_*   as `vb-detect rank` writes them
index.html                   all of it on one page that loads nothing
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from voxelbridge.core.errors import DataError
from voxelbridge.core.files import atomic_write
from voxelbridge.core.report.page import Section, html_page, png_figure
from voxelbridge.detect.paper_comparison import (
    compare_with_paper,
    comparison_csv,
    comparison_text,
)
from voxelbridge.detect.paper_results import load_paper
from voxelbridge.detect.rank_files import figure_caption, write_ranking
from voxelbridge.detect.study.jobs import Plan
from voxelbridge.detect.study.markers import Markers
from voxelbridge.detect.study_cells import CellResult, read_cells
from voxelbridge.detect.study_ranking import rank_cells
from voxelbridge.detect.study_tables import study_csv, study_table, text_table
from voxelbridge.detect.table_text import TextTable, to_html, to_latex, to_markdown

MEASURES = ("map_0.10", "froc_0.10")


def write_report(plan: Plan, out: Path, *, with_paper: bool, samples: int) -> list[str]:
    """Writes the report of the finished cells to `out`; returns what a person should know.

    Cells that are missing stand in the table as such and are named. DataError where none is
    finished.
    """
    cells, notes = finished_cells(plan)
    if not cells:
        raise DataError(f"{plan.results}: no cell is finished; see `vb-detect study status`")
    study = plan.study.config
    rankings = {}
    if study.ranks == "bootstrap":
        present = {cell.key.initialisation for cell in cells}
        baseline = study.baseline if study.baseline in present else None
        rankings, more = rank_cells(cells, measures=MEASURES, samples=samples, baseline=baseline)
        notes += more
    planned = [cell.key for cell in plan.cells]
    table = study_table(
        cells, measures=MEASURES, planned=planned, rankings=rankings,
        rank_inside=study.ranks == "inside",
    )  # fmt: skip
    title = f"Study {plan.study.source.stem}"
    caption = f"{title}: {len(cells)} of {len(planned)} cells"
    text = text_table(table, caption=caption, names=display_names(plan))
    written = _write_table(out, "table", text, study_csv(table))
    sections = [Section("table", "Table", to_html(text))]
    if with_paper:
        compared, remarks = compare_with_paper(cells, load_paper())
        beside = comparison_text(compared, remarks, caption="Beside table 3 of arXiv 2509.15947")
        written += _write_table(out, "comparison", beside, comparison_csv(compared))
        sections.append(Section("comparison", "Beside the paper", to_html(beside)))
    if rankings:
        files = write_ranking(out, rankings, facts={"samples": samples, "seed": 0})
        written += files
        pictures = [path for path in files if path.suffix == ".png"]
        sections.append(Section("ranks", "Ranks", _figures(pictures)))
    if notes:
        items = "".join(f"<li>{escape(note)}</li>" for note in notes)
        sections.append(Section("notes", "Notes", f"<ul>{items}</ul>"))
    page = html_page(
        title,
        sections,
        lede=escape(f"{len(cells)} of {len(planned)} cells are finished."),
        facts={"resamplings": str(samples), "baseline": study.baseline or "none"},
        distribution="voxelbridge-detect",
    )
    written.append(_write(out / "index.html", page))
    lines = [f"note: {note}" for note in notes]
    if table.missing:
        lines.append(f"missing: {', '.join(table.missing)}")
    return [*lines, f"{len(cells)} of {len(planned)} cells; {len(written)} files in {out}"]


def finished_cells(plan: Plan) -> tuple[list[CellResult], list[str]]:
    """The results that are of the study as it is stated now, and a line on those that are not."""
    if not plan.results.is_dir():
        return [], []
    markers = Markers(plan)
    found, stale = [], 0
    for cell in read_cells(plan.results):
        jobs = plan.of_cell.get(cell.key)
        if jobs is not None and markers.done(jobs[-1]) is not None:
            found.append(cell)
        else:
            stale += 1
    notes = []
    if stale:
        notes.append(
            f"{stale} results in {plan.results} are left out: the file does not state their cells, "
            "or states them otherwise now"
        )
    order = {cell.key: number for number, cell in enumerate(plan.cells)}
    return sorted(found, key=lambda cell: order[cell.key]), notes


def display_names(plan: Plan) -> dict[str, str]:
    """What data sets, architectures and initialisations are called in tables."""
    config = plan.study.config
    stated = {**config.datasets, **config.architectures, **config.initialisations}
    return {key: part.name for key, part in stated.items() if part.name}


def _write_table(out: Path, name: str, table: TextTable, csv: str) -> list[Path]:
    return [
        _write(out / f"{name}.md", to_markdown(table)),
        _write(out / f"{name}.csv", csv),
        _write(out / f"{name}.tex", to_latex(table, label=f"tab:{name}")),
        _write(out / f"{name}.html", to_html(table)),
    ]


def _write(path: Path, text: str) -> Path:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")
    return path


def _figures(pictures: Sequence[Path]) -> str:
    captions = [(path, figure_caption(path.stem)) for path in pictures]
    return "".join(png_figure(path, caption, alt=caption) for path, caption in captions)
