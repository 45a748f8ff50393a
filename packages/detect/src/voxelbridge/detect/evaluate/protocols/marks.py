"""Marks (points with a probability) against spheres: what the protocols of LUNA16 and PN9 share.

Letters: N marks, F findings.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.core.files import read_json
from voxelbridge.detect.evaluate.froc import FPPI
from voxelbridge.detect.evaluate.protocols.froc_readings import (
    Flags,
    Floats,
    Ints,
    RankedMarks,
    Reading,
    bootstrap,
    protocol_json,
)
from voxelbridge.detect.evaluate.tables import (
    finite_numbers,
    line_error,
    read_cases,
    read_rows,
    read_text,
)

UNKNOWN_DIAMETER_MM = 10.0  # stands for a negative one


@dataclass(frozen=True, eq=False)
class Marks:
    """Marks of listed scans: scan (N,) row in the list, centres (N, 3) mm, probabilities (N,).

    Rows keep the order of the file: it decides which marks a cut keeps. unknown: how many marks of
    scans that are not listed were left out.
    """

    scan: Ints
    centres: Floats
    probabilities: Floats
    unknown: int = 0


@dataclass(frozen=True, eq=False)
class Findings:
    """Spheres: scan (F,) row in the list, centres (F, 3) mm, diameters (F,) mm."""

    scan: Ints
    centres: Floats
    diameters: Floats

    @classmethod
    def none(cls) -> "Findings":
        return cls(np.zeros(0, dtype=np.int64), np.zeros((0, 3)), np.zeros(0))


@dataclass(frozen=True)
class Cut:
    """At most `limit` marks of a scan: of more, those above the next best minus `slack`.

    They are taken in the order of the file until the limit is reached. Without slack, marks that
    tie with the first one too many are all dropped.
    """

    limit: int
    slack: float = 0.0

    def kept(self, probabilities: Floats) -> Ints:
        """Positions of the marks of one scan that stay, ascending."""
        surplus = len(probabilities) - self.limit
        if surplus <= 0:
            return np.arange(len(probabilities))
        threshold = np.partition(probabilities, surplus - 1)[surplus - 1] - self.slack
        return np.flatnonzero(probabilities > threshold)[: self.limit]


@dataclass(frozen=True, eq=False)
class Matched:
    """The entries of the FROC curve and what became of the marks."""

    ranked: RankedMarks
    counts: Mapping[str, int]
    over_limit: int


def match_marks(
    marks: Marks, included: Findings, excluded: Findings, *, num_scans: int, cut: Cut
) -> Matched:
    """Which nodules are found with which score, and which marks are false.

    A mark hits a finding when it lies nearer than its radius. A nodule scores as its best hit; its
    other hits are duplicates. One mark may hit several nodules. Of the marks that hit no nodule,
    those on an excluded finding are ignored and the others are false.
    """
    scores: list[Floats] = []
    true: list[Flags] = []
    scan: list[Ints] = []
    names = ("true_positives", "false_positives", "candidates", "ignored", "duplicates")
    counts: dict[str, int] = dict.fromkeys(names, 0)
    of_marks, of_included, of_excluded = (
        _rows_of_scans(rows, num_scans) for rows in (marks.scan, included.scan, excluded.scan)
    )
    for number in range(num_scans):
        mine = of_marks[number]
        mine = mine[cut.kept(marks.probabilities[mine])]
        if not len(mine):
            continue
        found = _inside(marks.centres[mine], included, of_included[number])  # (nodules, marks)
        beside = _inside(marks.centres[mine], excluded, of_excluded[number]).any(axis=0)
        probabilities = marks.probabilities[mine]
        hit, used = found.any(axis=1), found.any(axis=0)
        false = ~(used | beside)
        best = np.where(found[hit], probabilities, -np.inf).max(axis=1)
        scores += [best, probabilities[false]]
        true += [np.ones(len(best), dtype=bool), np.zeros(int(false.sum()), dtype=bool)]
        scan.append(np.full(len(best) + int(false.sum()), number))
        counts["true_positives"] += len(best)
        counts["false_positives"] += int(false.sum())
        counts["candidates"] += len(mine)
        counts["ignored"] += int((beside & ~used).sum())
        counts["duplicates"] += int(found.sum()) - len(best)
    counts["missed"] = len(included.scan) - counts["true_positives"]
    ranked = RankedMarks.of(
        np.concatenate([np.zeros(0), *scores]),
        np.concatenate([np.zeros(0, dtype=bool), *true]),
        np.concatenate([np.zeros(0, dtype=np.int64), *scan]),
        np.bincount(included.scan, minlength=num_scans),
    )
    return Matched(ranked, counts, over_limit=len(marks.scan) - counts["candidates"])


def score_marks(
    protocol: str,
    marks: Marks,
    included: Findings,
    excluded: Findings,
    *,
    num_scans: int,
    cut: Cut,
    reading: Reading,
    samples: int,
    seed: int,
) -> dict[str, Any]:  # Any: a JSON object
    """What a protocol of marks writes: its score, and with `samples` above 0 its intervals."""
    matched = match_marks(marks, included, excluded, num_scans=num_scans, cut=cut)
    facts: dict[str, Any] = {
        "reading": reading,
        "num_scans": num_scans,
        "num_nodules": len(included.scan),
        "dropped": {"over_limit": matched.over_limit, "unknown_scans": marks.unknown},
    }
    if samples:
        facts["bootstrap"] = bootstrap(matched.ranked, reading, samples=samples, seed=seed)
    sensitivity = matched.ranked.sensitivities(reading)
    return protocol_json(protocol, sensitivity, fppi=FPPI, counts=matched.counts, facts=facts)


def read_scans(path: Path, *, key: Callable[[str], str] = str) -> dict[str, int]:
    """The evaluated scans: `key` of each name and its place; one a line, no header.

    A name listed twice, a header, more than one column and an empty list are DataErrors.
    """
    scans: dict[str, int] = {}
    places: dict[str, int] = {}
    for line, text in enumerate(read_text(path).splitlines(), start=1):
        name = text.strip().strip('"')
        if not name:
            continue
        if "," in name or ";" in name:
            raise line_error(path, line, f"got {name[:60]!r}, expected one name a line")
        if name.lower() in ("seriesuid", "pid", "case_id"):
            raise line_error(path, line, f"{name!r} is a header, and this list has none; drop it")
        if key(name) in scans:
            raise line_error(
                path, line, f"scan {name!r} is listed twice (first on line {places[key(name)]})"
            )
        scans[key(name)], places[key(name)] = len(scans), line
    if not scans:
        raise DataError(f"{path}: no scans; expected one name a line")
    return scans


def read_findings(
    path: Path, scans: Mapping[str, int], columns: tuple[str, ...], *, key: Callable[[str], str]
) -> Findings:
    """Spheres of listed scans; `columns` name the scan, x, y, z and the diameter in mm."""
    scan, numbers, _ = _read(path, scans, columns, key)
    return Findings(scan, np.ascontiguousarray(numbers[:, :3]), numbers[:, 3].copy())


def read_marks(
    source: Path,
    scans: Mapping[str, int],
    columns: tuple[str, ...],
    *,
    key: Callable[[str], str],
    case_key: Callable[[str], str],
) -> Marks:
    """Marks of listed scans: a table, or a folder that `vb-detect predict` wrote.

    `columns` name the scan, x, y, z and the probability. Of a folder, a mark is the centre of a box
    in LPS mm with its score, and `case_key` makes scans and case_ids comparable.
    """
    if not source.is_dir():
        scan, numbers, unknown = _read(source, scans, columns, key)
        return Marks(scan, np.ascontiguousarray(numbers[:, :3]), numbers[:, 3].copy(), unknown)
    names, centres, probabilities = marks_from_predictions(source)
    by_case = {case_key(name): row for name, row in scans.items()}
    rows = np.array([by_case.get(case_key(name), -1) for name in names], dtype=np.int64)
    listed = rows >= 0
    return Marks(rows[listed], centres[listed], probabilities[listed], int((~listed).sum()))


def marks_from_predictions(folder: Path) -> tuple[list[str], Floats, Floats]:
    """Case, centre in LPS mm (N, 3) and score (N,) of every box in a folder of `vb-detect predict`.

    All classes together. Boxes come case by case in the order of cases.csv, best first.
    """
    names: list[str] = []
    centres: list[list[float]] = []
    scores: list[float] = []
    for case in read_cases(folder / "cases.csv"):
        path = folder / f"{case}.json"
        content = read_json(path)
        try:
            boxes = [(*map(float, row["box_mm"][:3]), float(row["score"]))
                     for row in content["boxes"]]  # fmt: skip
            table = np.array(boxes, dtype=np.float64).reshape(len(boxes), 4)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}: no boxes in world coordinates ({error}); take a folder of "
                "`vb-detect predict`"
            ) from error
        if not np.isfinite(table).all():
            raise DataError(f"{path}: a centre or a score is not a finite number")
        names += [case] * len(boxes)
        centres += table[:, :3].tolist()
        scores += table[:, 3].tolist()
    return names, np.array(centres).reshape(len(names), 3), np.array(scores)


def check_arguments(output: Path, *inputs: Path | None, bootstrap: int = 0) -> None:
    """ConfigError where the output is one of the inputs, or the resamples are negative."""
    if bootstrap < 0:
        raise ConfigError(f"--bootstrap: got {bootstrap}, expected 0 (none) or more resamples")
    for path in inputs:
        if path is not None and output.resolve() == path.resolve():
            raise ConfigError(f"--output: {output} is one of the inputs; name another file")


def _read(
    path: Path, scans: Mapping[str, int], columns: tuple[str, ...], key: Callable[[str], str]
) -> tuple[Ints, Floats, int]:
    rows: list[int] = []
    numbers: list[list[float]] = []
    unknown = 0
    for line, (name, *texts) in read_rows(path, columns):
        values = finite_numbers(path, line, columns[1:], texts)
        row = scans.get(key(name))
        if row is None:
            unknown += 1
            continue
        rows.append(row)
        numbers.append(values)
    table = np.array(numbers, dtype=np.float64).reshape(len(rows), len(columns) - 1)
    return np.array(rows, dtype=np.int64), table, unknown


def _rows_of_scans(scan: Ints, num_scans: int) -> list[Ints]:
    """Positions of each scan, in the order of the file."""
    order = np.argsort(scan, kind="stable")
    bounds = np.searchsorted(scan[order], np.arange(1, num_scans))
    return np.split(order, bounds)


def _inside(centres: Floats, findings: Findings, rows: Ints) -> Flags:
    """Whether marks (M, 3) lie strictly inside the spheres of `rows`; (rows, M)."""
    offsets = findings.centres[rows][:, None] - centres
    diameters = findings.diameters[rows]
    radii = np.where(diameters < 0, UNKNOWN_DIAMETER_MM, diameters) / 2
    squares = offsets * offsets
    distances = squares[..., 0] + squares[..., 1] + squares[..., 2]
    return distances < (radii * radii)[:, None]
