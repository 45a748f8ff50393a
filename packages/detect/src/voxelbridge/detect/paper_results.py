"""Tables 1 to 3 of arXiv 2509.15947 as printed, and what in them does not fit together."""

import itertools
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

import numpy as np

MeasureName = Literal["map", "froc"]
MEASURES: tuple[MeasureName, ...] = ("map", "froc")
MEAN, MEAN_RANK = "mean", "mean_rank"
ROUNDING = 0.005 + 1e-9  # half of the last printed digit
RANK_ROUNDING = 0.005 + 1e-9
MEASURE_TEXT: Mapping[MeasureName, str] = {"map": "mAP", "froc": "FROC"}


@dataclass(frozen=True)
class PaperRow:
    """A row of table 3 in percent. `values[measure]` has a key per data set, "mean", "mean_rank".

    `bold[measure]`: the keys that are printed in bold.
    """

    architecture: str
    initialisation: str
    printed: str
    values: Mapping[MeasureName, Mapping[str, float]]
    bold: Mapping[MeasureName, tuple[str, ...]]

    @property
    def name(self) -> str:
        """`architecture/initialisation`."""
        return f"{self.architecture}/{self.initialisation}"


@dataclass(frozen=True)
class AblationRow:
    """A row of table 2 in percent; None: out of memory, or not printed."""

    architecture: str
    transfer: str
    spacing: str
    patch: int
    lr: float
    map: tuple[float | None, ...]
    map_mean: float | None
    map_mean_rank: float
    stem: Mapping[str, float]


@dataclass(frozen=True)
class Claim:
    """A sentence about table 3 as pairs of rows, of which the first is said to be the better."""

    where: str
    says: str
    measure: MeasureName
    column: str
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Paper:
    """The tables; `datasets` D01 to D08; `remarks`: contradictions that no table shows."""

    source: str
    datasets: tuple[str, ...]
    table1: tuple[Mapping[str, Any], ...]  # Any: texts and numbers, see the file
    table2: tuple[AblationRow, ...]
    table3: tuple[PaperRow, ...]
    claims: tuple[Claim, ...]
    remarks: tuple[str, ...]

    def row(self, name: str) -> PaperRow:
        """The row of table 3 called `architecture/initialisation`."""
        return next(row for row in self.table3 if row.name == name)


def load_paper() -> Paper:
    """The tables as they are shipped (docs/paper_results.toml is a copy)."""
    text = (files("voxelbridge.detect") / "paper_results.toml").read_text(encoding="utf-8")
    content = tomllib.loads(text)
    datasets = tuple(content["table3"]["datasets"])
    return Paper(
        source=content["source"],
        datasets=datasets,
        table1=tuple(content["table1"]["rows"]),
        table2=tuple(_ablation(row) for row in content["table2"]["rows"]),
        table3=tuple(_row(row, datasets) for row in content["table3"]["rows"]),
        claims=tuple(
            Claim(**{**claim, "pairs": tuple((a, b) for a, b in claim["pairs"])})
            for claim in content["claims"]
        ),
        remarks=tuple(f"{each['where']}: {each['says']}" for each in content["remarks"]),
    )


def inconsistencies(paper: Paper) -> list[str]:
    """What does not fit together, a line each: means, ranks, bold marks, then the text."""
    return [
        *_wrong_means(paper),
        *_wrong_ablation_ranks(paper),
        *_odd_mean_ranks(paper),
        *_wrong_bold(paper),
        *_stems(paper),
        *_failed_claims(paper),
        *paper.remarks,
    ]


def mean_ranks(cells: np.ndarray) -> np.ndarray:
    """Mean over the columns of each row's rank in them, 1 the largest, ties the mean rank."""
    from scipy.stats import rankdata

    return np.asarray(rankdata(-cells, axis=0).mean(axis=1))


def _wrong_means(paper: Paper) -> Iterator[str]:
    """Means that are not the mean of their cells, to the rounding."""
    for row in paper.table2:
        cells = [value for value in row.map if value is not None]
        if row.map_mean is not None and abs(np.mean(cells) - row.map_mean) > ROUNDING:
            yield f"table 2, {row.architecture}: mean {row.map_mean}, cells {np.mean(cells):.4f}"
    for row, measure in itertools.product(paper.table3, MEASURES):
        values = row.values[measure]
        mean = float(np.mean([values[key] for key in paper.datasets]))
        if abs(mean - values[MEAN]) > ROUNDING:
            yield (
                f"table 3, {row.name}: {MEASURE_TEXT[measure]} mean {values[MEAN]:.2f}, "
                f"the cells have {mean:.4f}"
            )


def _wrong_ablation_ranks(paper: Paper) -> Iterator[str]:
    """Mean ranks of table 2 that are not those of the printed cells inside the architecture."""
    for rows in _by_architecture(paper.table2).values():
        cells = np.array([[-np.inf if v is None else v for v in row.map] for row in rows])
        for row, mean in zip(rows, mean_ranks(cells), strict=True):
            if abs(mean - row.map_mean_rank) > RANK_ROUNDING:
                yield (
                    f"table 2, {row.architecture}: mean rank {row.map_mean_rank}, "
                    f"the cells have {mean:.4f}"
                )


def _odd_mean_ranks(paper: Paper) -> Iterator[str]:
    """Mean ranks of table 3: they cannot be recomputed, but they must have the sum of all ranks."""
    count, datasets = len(paper.table3), len(paper.datasets)
    for measure in MEASURES:
        printed = np.array([row.values[measure][MEAN_RANK] for row in paper.table3])
        name = f"table 3, {MEASURE_TEXT[measure]} mean ranks"
        expected = count * (count + 1) / 2
        if abs(printed.sum() - expected) > count * RANK_ROUNDING:
            yield (
                f"{name}: they add up to {printed.sum():.2f}, but the ranks of {count} methods "
                f"to {expected:g}"
            )
        ninths = _are_multiples(printed, datasets + 1)
        eighths = _are_multiples(printed, datasets)
        if (ninths & ~eighths).any():
            yield (
                f"{name}: {int(ninths.sum())} of {count} are multiples of 1/{datasets + 1}, "
                f"{int((eighths & ~ninths).sum())} of 1/{datasets} alone; there are {datasets} "
                "data sets"
            )


def _wrong_bold(paper: Paper) -> Iterator[str]:
    """Cells in bold that are not the best of their architecture, and best ones that are not."""
    columns = (*paper.datasets, MEAN, MEAN_RANK)
    groups = _by_architecture(paper.table3)
    for (architecture, rows), measure, column in itertools.product(
        groups.items(), MEASURES, columns
    ):
        values = [row.values[measure][column] for row in rows]
        best = min(values) if column == MEAN_RANK else max(values)
        winners = {row.initialisation for row in rows if row.values[measure][column] == best}
        bold = {row.initialisation for row in rows if column in row.bold[measure]}
        if bold != winners:
            yield (
                f"table 3, {architecture}, {MEASURE_TEXT[measure]} {column}: bold is "
                f"{', '.join(sorted(bold)) or 'nothing'}, the best is "
                f"{', '.join(sorted(winners))}"
            )


def _stems(paper: Paper) -> Iterator[str]:
    """Section 3 says that the stem of four channels is the best."""
    for row in paper.table2:
        if row.stem and max(row.stem, key=row.stem.__getitem__) != "four_channels":
            best = max(row.stem, key=row.stem.__getitem__)
            yield (
                f"section 3: the four-channel stem performed best; table 2, {row.architecture}: "
                f"{best} {row.stem[best]:.2f}, four_channels {row.stem['four_channels']:.2f}"
            )


def _failed_claims(paper: Paper) -> Iterator[str]:
    for claim in paper.claims:
        failed = []
        for first, second in claim.pairs:
            better = paper.row(first).values[claim.measure][claim.column]
            worse = paper.row(second).values[claim.measure][claim.column]
            if better >= worse if claim.column == MEAN_RANK else better <= worse:
                failed.append(f"{first} {better:.2f}, {second} {worse:.2f}")
        if failed:
            yield (
                f"{claim.where}: {claim.says}; table 3, {MEASURE_TEXT[claim.measure]} "
                f"{claim.column}: {'; '.join(failed)}"
            )


def _are_multiples(values: np.ndarray, parts: int) -> np.ndarray:
    """Which values are whole multiples of 1/`parts`, to the rounding."""
    return np.abs(values - np.round(values * parts) / parts) <= RANK_ROUNDING


def _by_architecture(rows: Sequence[Any]) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = {}
    for row in rows:
        groups.setdefault(row.architecture, []).append(row)
    return groups


def _row(row: Mapping[str, Any], datasets: Sequence[str]) -> PaperRow:
    values: dict[MeasureName, Mapping[str, float]] = {
        measure: {
            **dict(zip(datasets, row[measure], strict=True)),
            MEAN: row[f"{measure}_mean"],
            MEAN_RANK: row[f"{measure}_mean_rank"],
        }
        for measure in MEASURES
    }
    return PaperRow(
        architecture=row["architecture"],
        initialisation=row["initialisation"],
        printed=row["printed"],
        values=values,
        bold={measure: tuple(row[f"{measure}_bold"]) for measure in MEASURES},
    )


def _ablation(row: Mapping[str, Any]) -> AblationRow:
    return AblationRow(
        architecture=row["architecture"],
        transfer=row["transfer"],
        spacing=row["spacing"],
        patch=row["patch"],
        lr=row["lr"],
        map=tuple(None if value == "OOM" else value for value in row["map"]),
        map_mean=row.get("map_mean"),
        map_mean_rank=row["map_mean_rank"],
        stem=row.get("stem", {}),
    )
