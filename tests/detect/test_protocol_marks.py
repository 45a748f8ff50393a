import csv
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_curve

from voxelbridge.core.command_line import run_app
from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.detect.cli import app
from voxelbridge.detect.evaluate.bootstrap import draws
from voxelbridge.detect.evaluate.protocols.luna16 import evaluate_luna16
from voxelbridge.detect.evaluate.protocols.pn9 import evaluate_pn9, pid_of

RATES = (0.125, 0.25, 0.5, 1, 2, 4, 8)
Row = tuple[Any, ...]  # scan, x, y, z, diameter or probability


class PlainProgram:
    """The programs of LUNA16 and PN9 written out with loops, entry lists and scikit-learn."""

    def __init__(
        self, scans: list[str], nodules: list[Row], excluded: list[Row], marks: list[Row],
        *, limit: int = 100, slack: float = 0.0,
    ) -> None:  # fmt: skip
        self.scans = scans
        self.entries: list[tuple[str, int, float, bool]] = []  # scan, true, score, missed
        self.counts = dict.fromkeys(
            ("true_positives", "false_positives", "missed", "candidates", "ignored", "duplicates"),
            0,
        )
        for scan in scans:
            mine = [mark for mark in marks if mark[0] == scan]
            if len(mine) > limit:
                threshold = sorted((mark[4] for mark in mine), reverse=True)[limit] - slack
                mine = [mark for mark in mine if mark[4] > threshold][:limit]
            self.counts["candidates"] += len(mine)
            pool = list(range(len(mine)))
            for finding, is_nodule in [(f, True) for f in nodules] + [(f, False) for f in excluded]:
                if finding[0] == scan:
                    self._visit(finding, is_nodule, mine, pool)
            for number in pool:
                self.counts["false_positives"] += 1
                self.entries.append((scan, 0, mine[number][4], False))

    def _visit(self, finding: Row, is_nodule: bool, mine: list[Row], pool: list[int]) -> None:
        radius = (10.0 if finding[4] < 0 else finding[4]) / 2
        hits = []
        for number, mark in enumerate(mine):
            distance = sum((a - b) ** 2 for a, b in zip(finding[1:4], mark[1:4], strict=True))
            if distance < radius**2:
                hits.append(number)
        for number in hits:
            if number in pool:
                pool.remove(number)
                self.counts["ignored"] += not is_nodule
        if not is_nodule:
            return
        self.counts["missed" if not hits else "true_positives"] += 1
        self.counts["duplicates"] += max(len(hits) - 1, 0)
        best = max((mine[number][4] for number in hits), default=-1e9)
        self.entries.append((finding[0], 1, best, not hits))

    def curve(self, drawn: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Each drawn scan brings its entries, a scan drawn twice brings them twice."""
        entries = [e for scan in drawn for e in self.entries if e[0] == scan]
        kept = [e for e in entries if not e[3]]
        detected = sum(e[1] for e in kept)
        if not detected:
            return np.zeros(1), np.zeros(1)
        true, score = [e[1] for e in kept], [e[2] for e in kept]
        if detected == len(kept):
            with pytest.warns(match="No negative samples"):
                _, tpr, _ = roc_curve(true, score)
            fps = np.zeros(len(tpr))
        else:
            fpr, tpr, _ = roc_curve(true, score)
            fps = fpr * (len(kept) - detected) / len(self.scans)
        return fps, tpr * detected / sum(e[1] for e in entries)

    def sensitivities(self, reading: str, drawn: list[str] | None = None) -> list[float]:
        fps, sens = self.curve(self.scans if drawn is None else drawn)
        if reading == "interpolated":
            return np.interp(RATES, fps, sens).tolist()
        values = []
        for rate in RATES:
            beyond = [fp for fp in fps if fp >= rate]
            last = [n for n, fp in enumerate(fps) if beyond and fp == min(beyond)] or [-1]
            values.append(float(sens[last[-1]]))
        return values


class Luna:
    """Writes the four tables and runs the command's function on them."""

    columns = ("seriesuid", "coordX", "coordY", "coordZ")

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, column: str, rows: list[Row]) -> Path:
        path = self.folder / name
        with path.open("w", newline="") as stream:
            csv.writer(stream).writerows([(*self.columns, column), *rows])
        return path

    def run(
        self, scans: list[str], nodules: list[Row], excluded: list[Row], marks: list[Row],
        **options: Any,
    ) -> dict[str, Any]:  # fmt: skip
        listed = self.folder / "seriesuids.csv"
        listed.write_text("".join(f"{scan}\n" for scan in scans))
        output = self.folder / "metrics.json"
        content = evaluate_luna16(
            self.write("annotations.csv", "diameter_mm", nodules),
            self.write("annotations_excluded.csv", "diameter_mm", excluded),
            scans=listed,
            predictions=self.write("marks.csv", "probability", marks),
            output=output,
            **options,
        )
        assert json.loads(output.read_text()) == content
        return content


@pytest.fixture
def luna(tmp_path: Path) -> Luna:
    return Luna(tmp_path)


def made_up(seed: int, *, marks_per_scan: int = 60, levels: int = 8) -> list[Any]:
    """Scans, nodules, excluded findings and marks with many ties, overlaps and hits at the edge."""
    rng = random.Random(seed)
    scans = [f"s{number}" for number in range(rng.randint(1, 5))]
    everywhere = [*scans, "elsewhere"]

    def point() -> tuple[float, ...]:
        return tuple(float(rng.randint(0, 12)) for _ in range(3))

    nodules = [(rng.choice(everywhere), *point(), rng.choice([2, 4, 6, -1])) for _ in range(9)]
    excluded = [(rng.choice(everywhere), *point(), rng.choice([-1, 6, 8])) for _ in range(9)]
    marks = [
        (rng.choice(everywhere), *point(), rng.randint(0, levels) / levels)
        for _ in range(rng.randint(0, marks_per_scan * len(scans)))
    ]
    return [scans, nodules, excluded, marks]


@pytest.mark.parametrize("seed", range(12))
def test_luna16_is_the_programs_score_on_random_marks(luna: Luna, seed: int) -> None:
    tables = made_up(seed, marks_per_scan=150)
    plain = PlainProgram(*tables)
    for reading in ("interpolated", "next"):
        content = luna.run(*tables, reading=reading)
        assert content["counts"] == plain.counts
        np.testing.assert_allclose(content["sensitivity"], plain.sensitivities(reading), rtol=1e-12)
        assert content["score"] == pytest.approx(np.mean(plain.sensitivities(reading)))


def test_luna16_resamples_are_evaluations_of_the_drawn_scans(luna: Luna) -> None:
    tables = made_up(3)
    scans, plain = tables[0], PlainProgram(*tables)
    for reading in ("interpolated", "next"):
        content = luna.run(*tables, reading=reading, samples=40, seed=5)["bootstrap"]
        values = []
        for weights in draws(len(scans), samples=40, seed=5):
            drawn = [scan for scan, n in zip(scans, weights, strict=True) for _ in range(n)]
            if any(e[1] for scan in drawn for e in plain.entries if e[0] == scan):
                values.append(plain.sensitivities(reading, drawn))
        ordered = np.sort(values, axis=0)
        assert content["undefined"] == 40 - len(values)
        np.testing.assert_allclose(content["mean"], np.mean(values, axis=0), rtol=1e-12)
        np.testing.assert_allclose(content["low"], ordered[int(0.025 * len(values))], rtol=1e-12)
        np.testing.assert_allclose(content["high"], ordered[int(0.975 * len(values))], rtol=1e-12)
        assert content["score"]["mean"] == pytest.approx(np.mean(values))


def test_luna16_radius_is_strict(luna: Luna) -> None:
    nodule = ("a", 0, 0, 0, 6)
    assert luna.run(["a"], [nodule], [], [("a", 3, 0, 0, 0.5)])["counts"]["false_positives"] == 1
    inside = luna.run(["a"], [nodule], [], [("a", 2.9999999, 0, 0, 0.5)])
    assert inside["counts"]["true_positives"] == 1
    assert inside["score"] == 1.0


@pytest.mark.parametrize(("x", "hit"), [(4.99, True), (5.0, False)])
def test_luna16_diameter_of_minus_1_is_10_mm(luna: Luna, x: float, hit: bool) -> None:
    found = luna.run(["a"], [("a", 0, 0, 0, -1)], [], [("a", x, 0, 0, 0.5)])["counts"]
    assert found["true_positives"] == hit
    beside = luna.run(["a"], [("a", 99, 0, 0, 5)], [("a", 0, 0, 0, -1)], [("a", x, 0, 0, 0.5)])
    assert (beside["counts"]["ignored"], beside["counts"]["false_positives"]) == (hit, not hit)


def test_luna16_drops_all_marks_that_tie_with_the_101st(luna: Luna) -> None:
    nodule = ("a", 0, 0, 0, 2)
    better = [("a", 50, 0, 0, 0.9)] * 98
    tied = [("a", 0, 0, 0, 0.5)] * 3  # places 99 to 101
    cut = luna.run(["a"], [nodule], [], [*tied, *better])
    assert (cut["counts"]["candidates"], cut["counts"]["missed"]) == (98, 1)
    assert cut["dropped"]["over_limit"] == 3
    whole = luna.run(["a"], [nodule], [], [*tied[:2], *better])  # 100 marks: no cut
    assert (whole["counts"]["candidates"], whole["counts"]["missed"]) == (100, 0)
    distinct = luna.run(["a"], [nodule], [], [("a", 0, 0, 0, 0.4), *tied, *better[:97]])
    assert distinct["counts"]["candidates"] == 100


def test_luna16_mark_in_two_nodules_finds_both(luna: Luna) -> None:
    counts = luna.run(["a"], [("a", 0, 0, 0, 6), ("a", 2, 0, 0, 6)], [], [("a", 1, 0, 0, 0.5)])
    assert counts["counts"] == {
        "true_positives": 2, "false_positives": 0, "missed": 0, "candidates": 1, "ignored": 0,
        "duplicates": 0,
    }  # fmt: skip
    assert counts["score"] == 1.0


def test_luna16_best_of_several_marks_counts_and_the_others_are_duplicates(luna: Luna) -> None:
    marks = [("a", 0, 0, 0, 0.2), ("a", 1, 0, 0, 0.9), ("a", 9, 9, 9, 0.5)]
    content = luna.run(["a"], [("a", 0, 0, 0, 6)], [], marks)
    assert (content["counts"]["duplicates"], content["counts"]["false_positives"]) == (1, 1)
    assert content["score"] == 1.0  # found at 0.9, before the false mark


def test_luna16_marks_on_excluded_findings_are_ignored(luna: Luna) -> None:
    nodules, excluded = [("a", 0, 0, 0, 6)], [("a", 4, 0, 0, 6)]
    counts = luna.run(["a"], nodules, excluded, [("a", 5, 0, 0, 0.9), ("a", 2, 0, 0, 0.5)])
    assert counts["counts"]["ignored"] == 1  # the second mark is in both: it finds the nodule
    assert counts["counts"]["true_positives"] == 1
    assert counts["score"] == 1.0


def test_luna16_marks_and_findings_of_unknown_scans_are_dropped(luna: Luna) -> None:
    nodule, mark = ("a", 0, 0, 0, 6), ("a", 0, 0, 0, 0.5)
    alone = luna.run(["a", "b"], [nodule], [], [mark])
    extra = luna.run(
        ["a", "b"], [nodule, ("x", 0, 0, 0, 6)], [], [("x", 0, 0, 0, 0.9), mark, ("x", 9, 9, 9, 1)]
    )
    assert extra["dropped"]["unknown_scans"] == 2
    assert {**extra, "dropped": None} == {**alone, "dropped": None}


@pytest.mark.parametrize("reading", ["interpolated", "next"])
@pytest.mark.parametrize("marks", [[], [("a", 50, 0, 0, 0.5)], [("a", 4, 0, 0, 0.5)]])
def test_luna16_is_zero_without_a_true_positive(luna: Luna, marks: list[Row], reading: str) -> None:
    content = luna.run(
        ["a"], [("a", 0, 0, 0, 6)], [("a", 4, 0, 0, 2)], marks, reading=reading, samples=3
    )
    assert content["score"] == 0
    assert content["sensitivity"] == [0] * 7
    assert content["bootstrap"]["high"] == [0] * 7


def test_luna16_without_a_nodule_is_zero(luna: Luna) -> None:
    content = luna.run(["a"], [], [], [("a", 0, 0, 0, 0.5)], samples=2)
    assert content["score"] == 0
    assert content["bootstrap"]["undefined"] == 2
    assert content["bootstrap"]["mean"] is None


def test_scans_without_marks_count_in_the_rate(luna: Luna) -> None:
    marks = [("a", 9, 9, 9, 0.9), ("a", 0, 0, 0, 0.5)]  # one false mark before the hit
    one = luna.run(["a"], [("a", 0, 0, 0, 6)], [], marks)["sensitivity"]
    eight = luna.run(list("abcdefgh"), [("a", 0, 0, 0, 6)], [], marks)["sensitivity"]
    assert one == [0, 0, 0, 1, 1, 1, 1]
    assert eight == [1] * 7


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10_000), shuffle=st.randoms(use_true_random=False))
def test_order_of_rows_matters_only_for_the_cut_of_pn9(
    tmp_path_factory: pytest.TempPathFactory, seed: int, shuffle: random.Random
) -> None:
    luna = Luna(tmp_path_factory.mktemp("order"))
    scans, *tables = made_up(seed, marks_per_scan=130)
    straight = luna.run(scans, *tables)
    for table in tables:
        shuffle.shuffle(table)
    assert luna.run(scans, *tables) == straight


def test_luna16_centres_of_the_real_annotations_score_exactly_1(
    shared: Path, tmp_path: Path
) -> None:
    folder = shared / "data" / "luna16_protocol"
    with (folder / "annotations.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    submission = tmp_path / "submission.csv"
    with submission.open("w", newline="") as stream:  # columns in another order
        writer = csv.writer(stream)
        writer.writerow(["probability", "coordZ", "coordX", "seriesuid", "coordY"])
        for number, row in enumerate(rows):
            names = ("coordZ", "coordX", "seriesuid", "coordY")
            writer.writerow([(number % 7) / 7, *(row[name] for name in names)])
    content = evaluate_luna16(
        folder / "annotations.csv", folder / "annotations_excluded.csv",
        scans=folder / "seriesuids.csv", predictions=submission, output=tmp_path / "m.json",
    )  # fmt: skip
    assert content["score"] == 1.0
    assert content["sensitivity"] == [1.0] * 7
    assert (content["num_scans"], content["counts"]["true_positives"]) == (888, 1186)


def test_luna16_takes_the_boxes_of_a_predict_folder(luna: Luna) -> None:
    out = luna.folder / "out"
    out.mkdir()
    (out / "cases.csv").write_text("case_id\n1_2\n1_3\n")
    box = {"label": 0, "score": 0.75, "box_mm": [-41.0, 18.0, -133.0, 9, 9, 9]}
    (out / "1_2.json").write_text(json.dumps({"boxes": [box]}))
    (out / "1_3.json").write_text(json.dumps({"boxes": []}))
    luna.run(["1.2"], [("1.2", -41, 18, -132, 4)], [], [])
    tables = {name: luna.folder / f"{name}.csv" for name in ("annotations", "seriesuids")}
    content = evaluate_luna16(
        tables["annotations"], luna.folder / "annotations_excluded.csv",
        scans=tables["seriesuids"], predictions=out, output=luna.folder / "m.json",
    )  # fmt: skip
    assert content["score"] == 1.0
    (out / "1_3.json").write_text("{}")
    with pytest.raises(DataError, match=r"1_3\.json: no boxes in world coordinates"):
        evaluate_luna16(
            tables["annotations"], luna.folder / "annotations_excluded.csv",
            scans=tables["seriesuids"], predictions=out, output=luna.folder / "m.json",
        )  # fmt: skip


def write_pn9(folder: Path, scans: list[str], nodules: list[Row], marks: list[Row]) -> list[Path]:
    columns = ("pid", "center_x", "center_y", "center_z")
    paths = []
    for name, column, rows in (("a.csv", "diameter", nodules), ("m.csv", "probability", marks)):
        paths.append(folder / name)
        with paths[-1].open("w", newline="") as stream:
            csv.writer(stream).writerows([(*columns, column), *rows])
    paths.append(folder / "test.txt")
    paths[-1].write_text("\n".join(scans))
    return paths


def run_pn9(folder: Path, *tables: Any, **options: Any) -> dict[str, Any]:
    nodules, marks, scans = write_pn9(folder, *tables)
    output = folder / "metrics.json"
    return evaluate_pn9(nodules, scans=scans, predictions=marks, output=output, **options)


@pytest.mark.parametrize("seed", range(4))
def test_pn9_is_the_programs_score_on_random_marks(tmp_path: Path, seed: int) -> None:
    scans, nodules, _, marks = made_up(seed + 50, marks_per_scan=600)
    plain = PlainProgram(scans, nodules, [], marks, limit=300, slack=1e-8)
    for reading in ("interpolated", "next"):
        content = run_pn9(tmp_path, scans, nodules, marks, reading=reading)
        assert content["counts"] == plain.counts
        np.testing.assert_allclose(content["sensitivity"], plain.sensitivities(reading), rtol=1e-12)


def test_pn9_reads_the_next_point_unless_told_and_keeps_the_last_value(tmp_path: Path) -> None:
    nodules = [("1", 10 * n, 0, 0, 4) for n in range(4)]
    marks = [("1", 0, 0, 0, 0.9), ("1", 99, 0, 0, 0.8), ("1", 99, 0, 0, 0.7), ("1", 10, 0, 0, 0.6)]
    found = run_pn9(tmp_path, ["1"], nodules, marks)
    assert found["reading"] == "next"
    # (0, 1/4), (2, 1/4), (2, 2/4); the point at one false mark is thinned out
    assert found["sensitivity"] == [0.5] * 7
    linear = run_pn9(tmp_path, ["1"], nodules, marks, reading="interpolated")
    assert linear["sensitivity"] == [0.25] * 4 + [0.5] * 3


def test_pn9_cut_takes_tied_marks_in_the_order_of_the_file(tmp_path: Path) -> None:
    nodules = [("1", 0, 0, 0, 4)]
    far, hit = ("1", 99, 0, 0, 0.5), ("1", 0, 0, 0, 0.5)
    first = run_pn9(tmp_path, ["1"], nodules, [hit, *[far] * 300])["counts"]
    last = run_pn9(tmp_path, ["1"], nodules, [*[far] * 300, hit])["counts"]
    assert (first["candidates"], first["true_positives"]) == (300, 1)
    assert (last["candidates"], last["true_positives"]) == (300, 0)


@pytest.mark.parametrize("pids", [("0012", "12", "0012"), ("12", "12.0", "0012"), ("x1",) * 3])
def test_pn9_pids_agree_with_and_without_zeros(tmp_path: Path, pids: tuple[str, str, str]) -> None:
    listed, annotated, marked = pids
    content = run_pn9(tmp_path, [listed], [(annotated, 0, 0, 0, 4)], [(marked, 0, 0, 0, 0.5)])
    assert content["score"] == 1.0
    assert (pid_of("000"), pid_of("0a"), pid_of("1.5")) == ("0", "0a", "1.5")


ERRORS = [
    ("marks.csv", "seriesuid,coordX,coordY,coordZ\n", "line 1: missing column probability"),
    ("marks.csv", "seriesuid,coordX,coordY,coordZ,probability\na,1,2,3,nan\n", "line 2: probabil"),
    ("marks.csv", "seriesuid,coordX,coordY,coordZ,probability\na,1,2,3,.5\na,1,2\n", "line 3: got"),
    ("annotations.csv", "seriesuid,coordX,coordY,coordZ,diameter_mm\na,1,2,x,4\n", "line 2: coord"),
    ("annotations_excluded.csv", "", "line 1: the file is empty"),
    ("seriesuids.csv", "a\nb\na\n", "line 3: scan 'a' is listed twice"),
    ("seriesuids.csv", "seriesuid\na\n", "line 1: 'seriesuid' is a header"),
    ("seriesuids.csv", "a,1\n", "line 1: got 'a,1'"),
    ("seriesuids.csv", "\n", "no scans"),
]


@pytest.mark.parametrize(("name", "text", "message"), ERRORS)
def test_errors_name_file_and_line_and_write_nothing(
    luna: Luna, name: str, text: str, message: str
) -> None:
    luna.run(["a"], [], [], [])
    (luna.folder / "metrics.json").unlink()
    (luna.folder / name).write_text(text)
    names = ("annotations.csv", "annotations_excluded.csv", "seriesuids.csv", "marks.csv")
    annotations, excluded, scans, marks = (luna.folder / each for each in names)
    output = luna.folder / "metrics.json"
    with pytest.raises(DataError, match=message) as caught:
        evaluate_luna16(annotations, excluded, scans=scans, predictions=marks, output=output)
    assert name in str(caught.value)
    assert not output.exists()
    with pytest.raises(ConfigError, match="is one of the inputs"):
        evaluate_luna16(annotations, excluded, scans=scans, predictions=marks, output=marks)


def test_commands_write_the_score_and_say_what_was_dropped(
    luna: Luna, capsys: pytest.CaptureFixture[str]
) -> None:
    luna.run(["a"], [("a", 0, 0, 0, 4)], [], [("a", 0, 0, 0, 0.5), ("x", 0, 0, 0, 0.5)])
    files = ("annotations.csv", "annotations_excluded.csv", "seriesuids.csv", "marks.csv")
    options = ("--annotations", "--excluded", "--scans", "--predictions")
    pairs = [part for name, file in zip(options, files, strict=True)
             for part in (name, str(luna.folder / file))]  # fmt: skip
    output = luna.folder / "cli.json"
    rest = ["--output", str(output), "--reading", "next", "--bootstrap", "5"]
    with pytest.raises(SystemExit) as end:
        run_app(app, ["evaluate-luna16", *pairs, *rest])
    assert not end.value.code
    content = json.loads(output.read_text())
    assert (content["score"], content["reading"]) == (1.0, "next")
    printed = capsys.readouterr().out
    assert "1 marks dropped: scans that are not listed" in printed
    assert "score 1.000000, 1 of 1 found" in printed
    (luna.folder / "marks.csv").write_text("seriesuid,coordX,coordY,coordZ,probability\na,0,0\n")
    with pytest.raises(SystemExit) as end:
        run_app(app, ["evaluate-luna16", *pairs, *rest])
    assert end.value.code == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert "marks.csv, line 2: got 3 fields, expected 5" in errors[0]


@pytest.mark.slow
def test_luna16_takes_a_hundred_thousand_marks_in_seconds(luna: Luna) -> None:
    import time

    rng = np.random.default_rng(0)
    scans = [f"s{number}" for number in range(888)]
    numbers = rng.integers(0, 888, 100_000).tolist()
    values = np.round(rng.random((100_000, 4)), 4) * [200, 200, 200, 1]
    marks = [(scans[n], *row) for n, row in zip(numbers, values.tolist(), strict=True)]
    nodules = [(scans[n], *row[:3], 9) for n, row in zip(numbers[:1200], values, strict=False)]
    start = time.process_time()
    content = luna.run(scans, nodules, [], marks, samples=20)
    assert time.process_time() - start < 10
    assert content["counts"]["candidates"] <= 88_800
