"""Own results beside table 3 of arXiv 2509.15947."""

from collections.abc import Sequence
from dataclasses import dataclass

from voxelbridge.detect.paper_results import MEASURES, Paper
from voxelbridge.detect.rank_figures import measure_text
from voxelbridge.detect.study_cells import CellResult
from voxelbridge.detect.study_tables import csv_text, study_table
from voxelbridge.detect.table_text import DASH, TextCell, TextTable

MINUS = "\N{MINUS SIGN}"
# Parts of names, in lower case without anything but letters and digits.
PAPER_DATASETS = {
    "pancreas": "D01", "ribfrac": "D02", "kits": "D03", "lidc": "D04", "duke": "D05",
    "luna": "D06", "pn9": "D07", "ctaa": "D08",
}  # fmt: skip
PAPER_ARCHITECTURES = {
    "retunet": "retunet", "retinaunet": "retunet", "defdetr": "defdetr",
    "resencretunet": "resenc_retunet", "resencdefdetr": "resenc_defdetr",
}  # fmt: skip
PAPER_INITIALISATIONS = {
    "nonedefault": "none-default", "default": "none-default", "nonefixed": "none-fixed",
    "fixed": "none-fixed", "mt": "mt", "multitalent": "mt", "voco": "voco", "mae": "mae",
    "s3d": "s3d", "sparkmae": "s3d", "mg": "mg", "modelsgenesis": "mg",
}  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """An own figure beside the paper's, both in percent."""

    architecture: str
    initialisation: str
    dataset: str
    measure: str
    own: float
    paper: float

    @property
    def difference(self) -> float:
        """Own minus printed, in percentage points."""
        return self.own - self.paper


def compare_with_paper(
    cells: Sequence[CellResult], paper: Paper
) -> tuple[list[Compared], list[str]]:
    """Own figures beside those of table 3, and a line for each that the paper does not have.

    Data sets, architectures and initialisations are known by their names: D01 or pancreas,
    retunet, none-default or default, mt or multitalent, ...
    """
    table = study_table(cells)
    compared, notes = [], []
    datasets = table.blocks[0].columns[:-1]  # without the mean
    for index, row in enumerate(table.rows):
        names = (
            PAPER_ARCHITECTURES.get(_plain(row[0])),
            PAPER_INITIALISATIONS.get(_plain(row[1])),
        )
        printed = next(
            (each for each in paper.table3 if (each.architecture, each.initialisation) == names),
            None,
        )
        if printed is None:
            notes.append(f"{'/'.join(row)}: table 3 has no such row")
            continue
        for block, measure in zip(table.blocks, MEASURES, strict=True):
            for dataset, figure in zip(datasets, block.figures[index], strict=False):
                column = paper_dataset(dataset)
                if figure.value is not None and column is not None:
                    compared.append(
                        Compared(
                            *row, dataset, block.measure, own=100 * figure.value,
                            paper=printed.values[measure][column],
                        )
                    )  # fmt: skip
    notes += [
        f"{name}: table 3 has no such data set" for name in datasets if paper_dataset(name) is None
    ]
    return compared, notes


def paper_dataset(name: str) -> str | None:
    """D01 to D08 for a data set's name, None for one that the paper does not have."""
    plain = _plain(name)
    for part, key in PAPER_DATASETS.items():
        own = key.lower()
        if part in plain or plain == own or name.lower().startswith((f"{own}_", f"{own}-")):
            return key
    return None


def comparison_text(
    compared: Sequence[Compared], notes: Sequence[str], *, caption: str
) -> TextTable:
    """What to print of a comparison: own, printed and their difference, side by side."""
    heads = ["architecture", "initialisation", "data set"]
    measures = list(dict.fromkeys(each.measure for each in compared))
    groups = [("", 3), *((measure_text(measure), 3) for measure in measures)]
    heads += ["own", "paper", "difference"] * len(measures)
    by_row: dict[tuple[str, str, str], dict[str, Compared]] = {}
    for each in compared:
        key = (each.architecture, each.initialisation, each.dataset)
        by_row.setdefault(key, {})[each.measure] = each
    rows = []
    for key, found in by_row.items():
        cells = [TextCell(name) for name in key]
        for measure in measures:
            each = found.get(measure)
            if each is None:
                cells += [TextCell(DASH)] * 3
                continue
            gap = f"{each.difference:+.2f}".replace("-", MINUS)
            cells += [TextCell(f"{each.own:.2f}"), TextCell(f"{each.paper:.2f}")]
            cells.append(TextCell(gap))
        rows.append(cells)
    return TextTable(caption, groups, heads, rows, 3, ["percent", *notes])


def comparison_csv(compared: Sequence[Compared]) -> str:
    """A row for each figure, in percent."""
    heads = ["architecture", "initialisation", "dataset", "measure", "own", "paper", "difference"]
    rows = [
        [c.architecture, c.initialisation, c.dataset, c.measure, c.own, c.paper, c.difference]
        for c in compared
    ]
    return csv_text(heads, rows)


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())
