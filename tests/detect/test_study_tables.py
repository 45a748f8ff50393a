"""Tables of a study: averages, bold and underlined figures, ties, gaps, four kinds of text."""

import csv
import io
from pathlib import Path

import pytest

from voxelbridge.detect.paper_comparison import (
    MINUS,
    compare_with_paper,
    comparison_csv,
    comparison_text,
    paper_dataset,
)
from voxelbridge.detect.paper_results import load_paper
from voxelbridge.detect.protocol_figures import (
    OwnScore,
    Published,
    load_published,
    protocol_bars,
)
from voxelbridge.detect.study_cells import CellKey, CellResult
from voxelbridge.detect.study_tables import Figure, study_csv, study_table, text_table
from voxelbridge.detect.table_text import DASH, TextCell, TextTable, to_html, to_latex, to_markdown


def cell(
    dataset: str,
    architecture: str,
    initialisation: str,
    value: float | None,
    *,
    seed: int = 0,
) -> CellResult:
    """A finished cell whose mAP and FROC are `value`."""
    key = CellKey(dataset, architecture, initialisation, fold=0, seed=seed)
    metrics = {"ap": {"0.10": {"map": value}}, "froc": {"0.10": {"pooled": {"mean": value}}}}
    return CellResult(key, metrics, Path("nowhere"))


def figure(table: object, row: tuple[str, str], column: str) -> Figure:
    """The mAP figure of a row in a column."""
    block = table.blocks[0]  # type: ignore[attr-defined]  # a StudyTable
    return block.figures[table.rows.index(row)][block.columns.index(column)]  # type: ignore[attr-defined]  # as above


@pytest.fixture
def cells() -> list[CellResult]:
    """Two architectures, three data sets; `a/mae` and `b/mae` print the same on D01."""
    return [
        cell("D01", "a", "none", 0.50), cell("D01", "a", "mae", 0.60001),
        cell("D01", "b", "none", 0.40), cell("D01", "b", "mae", 0.60004),
        cell("D02", "a", "none", 0.70, seed=0), cell("D02", "a", "none", 0.74, seed=1),
        cell("D02", "a", "mae", 0.71), cell("D02", "b", "none", 0.30),
        cell("D03", "a", "none", 0.20), cell("D03", "a", "mae", 0.20),
        cell("D03", "b", "none", None), cell("D03", "b", "mae", 0.10),
    ]  # fmt: skip


def test_best_of_an_architecture_is_bold_and_best_of_all_underlined(
    cells: list[CellResult],
) -> None:
    table = study_table(cells)
    marks = {
        row: (figure(table, row, "D01").bold, figure(table, row, "D01").underlined)
        for row in table.rows
    }
    assert marks == {
        ("a", "none"): (False, False), ("a", "mae"): (True, True),  # equal as printed
        ("b", "none"): (False, False), ("b", "mae"): (True, True),
    }  # fmt: skip
    ties = [figure(table, ("a", name), "D03") for name in ("none", "mae")]
    assert all(each.bold and each.underlined for each in ties)


def test_trainings_are_averaged_and_gaps_named(cells: list[CellResult]) -> None:
    table = study_table(cells)
    both = figure(table, ("a", "none"), "D02")
    assert both.value == pytest.approx(0.72)
    assert both.deviation == pytest.approx(0.0282842712)
    assert both.bold
    assert figure(table, ("a", "none"), "mean").value == pytest.approx((0.5 + 0.72 + 0.2) / 3)
    assert figure(table, ("b", "mae"), "D02").value is None
    assert figure(table, ("b", "mae"), "mean").value is None
    assert table.missing == (
        "D02/b/mae",
        "D03/b/none/fold_0_seed_0 (map_0.10, froc_0.10 not defined or not measured)",
    )
    planned = [each.key for each in cells] + [CellKey("D02", "b", "mae", fold=0, seed=0)]
    assert study_table(cells, planned=planned).missing[0] == "D02/b/mae/fold_0_seed_0"


def test_ranks_inside_an_architecture_are_those_of_table_2() -> None:
    paper = load_paper()
    rows = [row for row in paper.table2 if row.architecture in ("retunet", "resenc_defdetr")]
    cells, printed = [], []
    for number, row in enumerate(rows):
        printed.append(row.map_mean_rank)
        for dataset, value in zip(paper.datasets, row.map, strict=False):
            if value is not None:
                cells.append(cell(dataset, row.architecture, f"v{number}", value / 100))
    planned = [CellKey("D01", row.architecture, f"v{n}", 0, 0) for n, row in enumerate(rows)]
    table = study_table(cells, measures=["map_0.10"], planned=planned, rank_inside=True)
    ranks = [figure(table, row, "rank").value for row in table.rows]
    assert ranks == printed
    assert [figure(table, row, "rank").bold for row in table.rows] == [0, 0, 0, 1, 0, 1]


def test_markdown_csv_latex_and_html_of_a_table(cells: list[CellResult]) -> None:
    table = study_table(cells)
    text = text_table(table, caption="A_B & 50 %", names={"mae": "MAE", "D01": "pancreas"})
    markdown = to_markdown(text)
    assert "| architecture | initialisation | mAP@0.1 pancreas |" in markdown
    assert "| a | none | 50.00 | **<u>72.00</u>** ±2.83 | **<u>20.00</u>** |" in markdown
    assert f"|  | MAE | **<u>60.00</u>** | {DASH} | **10.00** | {DASH} |" in markdown
    assert "missing: D02/b/mae" in markdown
    rows = list(csv.DictReader(io.StringIO(study_csv(table))))
    assert float(rows[0]["map_0.10:D02:std"]) == pytest.approx(0.0282842712)
    assert rows[3]["map_0.10:D02"] == ""
    latex = to_latex(text, label="tab:study one")
    assert r"\caption{A\_B \& 50 \%}" in latex
    assert r"\label{tab:study-one}" in latex
    assert r"\textbf{\underline{60.00}}" in latex
    assert r"{\tiny $\pm$2.83}" in latex
    body = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert {line.count(" & ") for line in body[1:]} == {9}
    assert latex.count("{") == latex.count("}")
    html = to_html(text)
    assert "<strong><u>60.00</u></strong>" in html
    assert "A_B &amp; 50 %" in html
    assert html.count("<tr>") == 2 + 4


def test_names_are_escaped_everywhere() -> None:
    row = [TextCell("a|b_<x>&"), TextCell("1.0", bold=True)]
    table = TextTable("c", [("", 1), ("m|n", 1)], ["x", "y"], [row], 1)
    assert r"| a\|b\_\<x\>& | **1.0** |" in to_markdown(table)
    assert r"a|b\_\textless{}x\textgreater{}\& & \textbf{1.0} \\" in to_latex(table, label="t")
    assert "a|b_&lt;x&gt;&amp;" in to_html(table)
    with pytest.raises(ValueError, match="2 columns in groups, 1 heads"):
        TextTable("c", [("", 2)], ["x"], [], 1)


def test_own_figures_stand_beside_the_papers() -> None:
    cells = [
        cell("D01_pancreas", "resenc_defdetr", "mae", 0.75),
        cell("luna16", "retunet", "default", 0.8),
        cell("D01_pancreas", "other", "mae", 0.5),
        cell("phantoms", "retunet", "default", 0.9),
    ]
    compared, notes = compare_with_paper(cells, load_paper())
    found = {(each.dataset, each.measure): (each.own, each.paper) for each in compared}
    assert found == {
        ("D01_pancreas", "map_0.10"): (75.0, 74.50),
        ("D01_pancreas", "froc_0.10"): (75.0, 80.00),
        ("luna16", "map_0.10"): (80.0, 82.70),
        ("luna16", "froc_0.10"): (80.0, 84.69),
    }
    assert notes == [
        "other/mae: table 3 has no such row", "phantoms: table 3 has no such data set",
    ]  # fmt: skip
    text = to_markdown(comparison_text(compared, notes, caption="c"))
    row = "| luna16 | 80.00 | 82.70 | -2.70 | 80.00 | 84.69 | -4.69 |"
    assert row.replace("-", MINUS) in text
    assert len(comparison_csv(compared).splitlines()) == 5
    assert paper_dataset("Task08_KiTS21") == "D03"
    assert paper_dataset("D010") is None


def test_published_scores_say_their_source(tmp_path: Path) -> None:
    published = load_published()
    assert all(each.source and 0 < each.value < 1 for each in published)
    other = tmp_path / "other.toml"
    other.write_text('[[baselines]]\nprotocol = "pn9"\nname = "x"\nvalue = 60.1\nsource = "y"\n')
    with pytest.raises(Exception, match=r"got the value 60.1, expected a share") as caught:
        load_published(other)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_protocol_bars_are_drawn_with_the_published_ones_of_the_protocol(tmp_path: Path) -> None:
    own = {"luna16-8-1-1": [OwnScore("mine", 0.9, (0.88, 0.92))], "pn9": [OwnScore("mine", 0.7)]}
    published = [Published("luna16", "theirs", 0.842, "print")]
    written = protocol_bars(own, published, tmp_path / "bars")
    assert [path.suffix for path in written] == [".png", ".pdf", ".svg"]
    drawn = (tmp_path / "bars.svg").read_text()
    assert "<!-- theirs -->" in drawn
    assert "<!-- 84.2 -->" in drawn
