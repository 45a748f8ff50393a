import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.detect.evaluate.assign import true_positive_flags
from voxelbridge.detect.evaluate.curves import froc_curve, precision_recall_curve
from voxelbridge.detect.evaluate.measures import RANGE, Convention, Measures, requested
from voxelbridge.detect.evaluate.metrics import (
    compute_metrics,
    evaluate_files,
)
from voxelbridge.detect.evaluate.plots import write_plots
from voxelbridge.detect.evaluate.tables import (
    BoxTable,
    read_cases,
    read_ground_truth,
    read_predictions,
)

RATES = (0.125, 0.25, 0.5, 1, 2, 4, 8)
Row = tuple[int, int, float, tuple[float, ...]]


class PlainEvaluator:
    """The evaluation rule written out with loops, as slow and as plain as possible."""

    def __init__(self, cases: int, objects: list[Row], boxes: list[Row], nndetection: bool) -> None:
        self.cases, self.objects, self.boxes = cases, objects, boxes
        self.nndetection = nndetection

    def iou(self, a: tuple[float, ...], b: tuple[float, ...]) -> float:
        inter = volume_a = volume_b = 1.0
        for axis in range(3):
            inter *= max(min(a[axis + 3], b[axis + 3]) - max(a[axis], b[axis]), 0.0)
            volume_a *= a[axis + 3] - a[axis]
            volume_b *= b[axis + 3] - b[axis]
        union = volume_a + volume_b - inter
        return inter / union if union else math.nan

    def matches(self, case: int, label: int, threshold: float) -> list[tuple[float, bool]]:
        boxes = [row for row in self.boxes if row[:2] == (case, label)]
        boxes = sorted(boxes, key=lambda row: -row[2])[:100]
        free = [row for row in self.objects if row[:2] == (case, label)]
        result = []
        for row in boxes:
            best, highest = None, threshold
            for index, target in enumerate(free):
                overlap = self.iou(row[3], target[3])
                if overlap >= highest:
                    best, highest = index, overlap
            if best is not None:
                del free[best]
            result.append((row[2], best is not None))
        return result

    def count(self, labels: list[int]) -> int:
        return sum(row[1] in labels for row in self.objects)

    def ap(self, label: int, threshold: float) -> float | None:
        if not self.count([label]):
            return -1.0 if self.nndetection else None
        ranked = [m for case in range(self.cases) for m in self.matches(case, label, threshold)]
        ranked = sorted(ranked, key=lambda match: -match[0])
        recall, precision, hits = [], [], 0
        for number, (_, hit) in enumerate(ranked, start=1):
            hits += hit
            recall.append(hits / self.count([label]))
            precision.append(hits / number)
        values = []
        for point in np.linspace(0, 1, 101):
            first = next((i for i, r in enumerate(recall) if r >= point), None)
            values.append(0.0 if first is None else max(precision[first:]))
        return sum(values) / 101

    def froc(self, labels: list[int], threshold: float) -> list[float | None]:
        objects = self.count(labels)
        if not objects:
            return [0.0 if self.nndetection else None] * 7
        every = [
            m
            for case in range(self.cases)
            for label in labels
            for m in self.matches(case, label, threshold)
        ]
        if self.nndetection and every and not any(hit for _, hit in every):
            return [None] * 7
        x, y = [0.0], [0.0]
        for score in sorted({score for score, _ in every}, reverse=True):
            above = [hit for other, hit in every if other >= score]
            x.append((len(above) - sum(above)) / self.cases)
            y.append(sum(above) / objects)
        return [float(np.interp(rate, x, y)) for rate in RATES]

    def expected(self, classes: int) -> dict[str, Any]:
        labels = list(range(classes))
        ap = {}
        for key, thresholds in {
            "0.10": [0.1],
            "0.30": [0.3],
            "0.50": [0.5],
            "0.10:0.50:0.05": list(RANGE),
        }.items():
            per_class: list[float | None] = []
            for label in labels:
                values = [self.ap(label, threshold) for threshold in thresholds]
                numbers = [value for value in values if value is not None]
                per_class.append(sum(numbers) / len(numbers) if numbers else None)
            present = [value for value in per_class if value is not None]
            ap[key] = {
                "map": sum(present) / len(present) if present else None,
                "per_class": {str(label): per_class[label] for label in labels},
            }
        froc = {}
        for key, threshold in {"0.10": 0.1, "0.30": 0.3}.items():
            single = {
                str(label): None
                if not self.count([label]) and not self.nndetection
                else with_mean(self.froc([label], threshold))
                for label in labels
            }
            pooled = with_mean(self.froc(labels, threshold))
            froc[key] = {"pooled": pooled, "per_class": single}
        return {"ap": ap, "froc": froc}


def with_mean(values: list[float | None]) -> dict[str, Any]:
    numbers = [value for value in values if value is not None]
    mean = sum(numbers) / 7 if len(numbers) == 7 else None
    return {"sensitivity": values, "mean": mean}


def tables(objects: list[Row], boxes: list[Row]) -> tuple[BoxTable, BoxTable]:
    truth, found = (
        BoxTable(
            case_index=np.array([row[0] for row in rows], dtype=np.int64),
            labels=np.array([row[1] for row in rows], dtype=np.int64),
            boxes=np.array([row[3] for row in rows], dtype=np.float64).reshape(-1, 6),
            scores=np.array([row[2] for row in rows], dtype=np.float64) if scored else None,
        )
        for rows, scored in ((objects, False), (boxes, True))
    )
    return truth, found


def assert_close(expected: Any, got: Any, path: str = "") -> None:
    """Compares nested JSON: the keys of `expected`, numbers to 1e-12, null only with null."""
    match expected:
        case dict():
            assert set(expected) <= set(got), path
            for key in expected:
                assert_close(expected[key], got[key], f"{path}/{key}")
        case list():
            assert len(expected) == len(got), path
            for index, (a, b) in enumerate(zip(expected, got, strict=True)):
                assert_close(a, b, f"{path}/{index}")
        case float() | int():
            assert got is not None, path
            assert got == pytest.approx(expected, abs=1e-12), path
        case _:
            assert got == expected, path


@st.composite
def tables_with_ties(draw: st.DrawFn) -> tuple[int, list[Row], list[Row]]:
    """Small whole coordinates and few scores: ties, equal overlaps, flat boxes, duplicates."""
    cases = draw(st.integers(1, 4))
    whole = st.integers(0, 3)
    box = st.tuples(whole, whole, whole, whole, whole, whole).map(
        lambda v: (v[0], v[1], v[2], v[0] + v[3], v[1] + v[4], v[2] + v[5])
    )
    label = st.sampled_from(draw(st.sampled_from([[0], [0, 2], [0, 1, 2]])))
    score = st.integers(0, 5).map(lambda number: number / 5)
    row = st.tuples(st.integers(0, cases - 1), label, score, box)
    return cases, draw(st.lists(row, max_size=12)), draw(st.lists(row, max_size=30))


@settings(max_examples=60, deadline=None)
@given(data=tables_with_ties(), nndetection=st.booleans(), more=st.integers(0, 1))
def test_metrics_equal_the_plain_evaluator(
    data: tuple[int, list[Row], list[Row]], nndetection: bool, more: int
) -> None:
    cases, objects, boxes = data
    classes = 1 + max((row[1] for row in objects + boxes), default=0) + more
    got = compute_metrics(
        [str(case) for case in range(cases)],
        *tables(objects, boxes),
        num_classes=classes if more else None,
        convention="nndetection" if nndetection else "clean",
    )
    assert_close(PlainEvaluator(cases, objects, boxes, nndetection).expected(classes), got)
    json.dumps(got, allow_nan=False)


def test_more_than_a_hundred_boxes_per_class_equal_the_plain_evaluator() -> None:
    rng = np.random.default_rng(3)

    def rows(count: int) -> list[Row]:
        low = rng.integers(0, 20, (count, 3))
        high = low + rng.integers(1, 6, (count, 3))
        return [
            (int(case), int(label), float(score), (*map(float, a), *map(float, b)))
            for case, label, score, a, b in zip(
                rng.integers(0, 2, count),
                rng.integers(0, 2, count),
                rng.integers(0, 50, count) / 50,
                low,
                high,
                strict=True,
            )
        ]

    objects, boxes = rows(40), rows(500)
    got = compute_metrics(["a", "b"], *tables(objects, boxes))
    assert_close(PlainEvaluator(2, objects, boxes, False).expected(2), got)
    assert got["counts"]["0"]["predictions_after_cut"] <= 200


@pytest.mark.parametrize("convention", ["clean", "nndetection"])  # equal: every class is there
@pytest.mark.parametrize("name", ["m01_single_class", "m02_multi_class"])
def test_metrics_equal_the_reference(
    shared: Path, tmp_path: Path, name: str, convention: Convention
) -> None:
    folder = shared / "golden" / "metrics" / name
    output = tmp_path / "metrics.json"
    evaluate_files(
        folder / "ground_truth.csv",
        folder / "predictions.csv",
        cases=folder / "cases.csv",
        output=output,
        convention=convention,
    )
    expected = json.loads((folder / "expected.json").read_text())
    del expected["name"], expected["description"]
    assert_close(expected, json.loads(output.read_text()))


OBJECT: Row = (0, 0, 1.0, (0, 0, 0, 4, 4, 4))
MISS: Row = (0, 0, 0.5, (50, 50, 50, 54, 54, 54))


def test_an_absent_class_is_null_and_left_out_or_minus_one_and_averaged() -> None:
    truth, found = tables([OBJECT], [OBJECT])
    clean = compute_metrics(["a"], truth, found, num_classes=2)
    assert clean["ap"]["0.10"] == {"map": 1.0, "per_class": {"0": 1.0, "1": None}}
    assert clean["froc"]["0.10"]["per_class"]["1"] is None
    peer = compute_metrics(["a"], truth, found, num_classes=2, convention="nndetection")
    assert peer["ap"]["0.10"] == {"map": 0.0, "per_class": {"0": 1.0, "1": -1.0}}
    assert peer["froc"]["0.10"]["per_class"]["1"] == {"sensitivity": [0.0] * 7, "mean": 0.0}


def test_without_a_hit_the_froc_is_zero_or_undefined() -> None:
    truth, found = tables([OBJECT], [MISS])
    clean = compute_metrics(["a"], truth, found)
    assert clean["froc"]["0.10"]["pooled"] == {"sensitivity": [0.0] * 7, "mean": 0.0}
    peer = compute_metrics(["a"], truth, found, convention="nndetection")
    assert peer["froc"]["0.10"]["pooled"] == {"sensitivity": [None] * 7, "mean": None}


def test_without_predictions_everything_is_zero_in_both_conventions() -> None:
    truth, found = tables([OBJECT], [])
    for convention in ("clean", "nndetection"):
        metrics = compute_metrics(["a"], truth, found, convention=convention)
        assert metrics["ap"]["0.10"]["map"] == 0.0
        assert metrics["froc"]["0.10"]["pooled"]["mean"] == 0.0


def test_without_any_object_the_metrics_are_null_and_stay_json() -> None:
    metrics = compute_metrics(["a", "b"], *tables([], [MISS]), bootstrap=5)
    assert metrics["num_objects"] == 0
    assert metrics["ap"]["0.10"]["map"] is None
    assert metrics["froc"]["0.10"]["pooled"] == {"sensitivity": [None] * 7, "mean": None}
    assert metrics["bootstrap"]["map"]["0.10"] == [None, None]
    peer = compute_metrics(["a"], *tables([], [MISS]), convention="nndetection")
    assert peer["ap"]["0.10"]["map"] == -1.0
    assert peer["froc"]["0.10"]["pooled"]["mean"] == 0.0


def test_the_number_of_classes_follows_the_largest_label_in_either_table() -> None:
    other: Row = (0, 3, 0.5, (0, 0, 0, 1, 1, 1))
    assert compute_metrics(["a"], *tables([OBJECT], [other]))["num_classes"] == 4
    assert compute_metrics(["a"], *tables([], []))["num_classes"] == 1
    with pytest.raises(ValueError, match="label 3 of 2 classes"):
        compute_metrics(["a"], *tables([OBJECT], [other]), num_classes=2)


def test_cases_without_boxes_count_as_images() -> None:
    truth, found = tables([OBJECT], [MISS, (0, 0, 0.4, OBJECT[3])])
    few = compute_metrics(["a"], truth, found)["froc"]["0.10"]["pooled"]["sensitivity"]
    many = compute_metrics([*"abcdefgh"], truth, found)["froc"]["0.10"]["pooled"]["sensitivity"]
    assert few == [0, 0, 0, 1, 1, 1, 1]
    assert many == [1.0] * 7


def random_data(cases: int) -> tuple[list[str], BoxTable, BoxTable]:
    rng = np.random.default_rng(1)
    objects: list[Row] = []
    boxes: list[Row] = []
    for case in range(cases):
        for _ in range(rng.integers(0, 3)):
            low = rng.random(3) * 50
            box = np.concatenate([low, low + 5])
            objects.append((case, int(rng.integers(0, 2)), 1.0, tuple(box.tolist())))
            moved = box + rng.normal(0, 1.2)
            boxes.append((case, objects[-1][1], float(rng.random()), tuple(moved.tolist())))
        low = rng.random(3) * 50
        boxes.append((case, 0, float(rng.random()), (*low.tolist(), *(low + 4).tolist())))
    return [str(case) for case in range(cases)], *tables(objects, boxes)


def test_bootstrap_is_seeded_and_its_intervals_hold_the_estimate() -> None:
    data = random_data(40)
    first = compute_metrics(*data, bootstrap=200, seed=1)
    assert first == compute_metrics(*data, bootstrap=200, seed=1)
    other = compute_metrics(*data, bootstrap=200, seed=2)
    assert first["bootstrap"]["map"] != other["bootstrap"]["map"]
    assert first["bootstrap"]["samples"] == 200
    for key, (low, high) in first["bootstrap"]["map"].items():
        assert low < first["ap"][key]["map"] < high
    for key, (low, high) in first["bootstrap"]["froc"].items():
        assert low < first["froc"][key]["pooled"]["mean"] < high


def test_a_resample_equals_the_evaluation_of_the_repeated_images() -> None:
    names, truth, found = random_data(12)
    # The intervals of one resample are its value: evaluate the same images written out.
    metrics = compute_metrics(names, truth, found, bootstrap=1, seed=4)
    drawn = np.sort(np.random.default_rng(4).integers(0, 12, 12))

    def repeated(table: BoxTable) -> BoxTable:
        parts = [np.flatnonzero(table.case_index == case) for case in drawn]
        rows = np.concatenate(parts)
        counts = [len(part) for part in parts]
        return BoxTable(
            case_index=np.repeat(np.arange(12), counts),
            labels=table.labels[rows],
            boxes=table.boxes[rows],
            scores=None if table.scores is None else table.scores[rows],
        )

    written = compute_metrics(names, repeated(truth), repeated(found))
    for key in ("0.10", "0.30", "0.50", "0.10:0.50:0.05"):
        expected = [written["ap"][key]["map"]] * 2
        assert metrics["bootstrap"]["map"][key] == pytest.approx(expected, abs=1e-12)
    for key in ("0.10", "0.30"):
        expected = [written["froc"][key]["pooled"]["mean"]] * 2
        assert metrics["bootstrap"]["froc"][key] == pytest.approx(expected, abs=1e-12)


def test_curves_end_where_the_metrics_say() -> None:
    names, truth, found = random_data(20)
    recall, precision, scores = precision_recall_curve(
        names, truth, found, label=0, iou_threshold=0.1
    )
    counts = compute_metrics(names, truth, found)["counts"]["0"]
    assert len(recall) == len(precision) == len(scores) == counts["predictions_after_cut"]
    assert recall[-1] == counts["true_positives"]["0.10"] / counts["objects"]
    assert (np.diff(scores) <= 0).all()
    fppi, sensitivity, thresholds = froc_curve(names, truth, found, iou_threshold=0.1)
    assert (fppi[0], sensitivity[0], thresholds[0]) == (0, 0, np.inf)
    assert (np.diff(fppi) >= 0).all()
    assert (np.diff(sensitivity) >= 0).all()
    one, _, _ = froc_curve(names, truth, found, iou_threshold=0.1, label=1)
    assert len(one) < len(fppi)


def test_curves_of_an_absent_class_are_empty() -> None:
    truth, found = tables([OBJECT], [MISS])
    curve = precision_recall_curve(["a"], truth, found, label=1, iou_threshold=0.1)
    assert [len(values) for values in curve] == [0, 0, 0]
    curve = froc_curve(["a"], truth, found, iou_threshold=0.1, label=1)
    assert [len(values) for values in curve] == [0, 0, 0]


def write_tables(folder: Path, *, predictions: str) -> dict[str, Path]:
    header = "z0,y0,x0,z1,y1,x1"
    contents = {
        "cases": "case_id\na\nb\n",
        "ground_truth": f"case_id,label,{header}\na,0,0,0,0,4,4,4\n",
        "predictions": f"case_id,label,score,{header}\n{predictions}",
    }
    paths = {name: folder / f"{name}.csv" for name in contents}
    for name, text in contents.items():
        paths[name].write_text(text)
    return paths


def test_evaluate_files_writes_the_metrics(tmp_path: Path) -> None:
    paths = write_tables(tmp_path, predictions="a,0,0.9,0,0,0,4,4,4\n")
    output = tmp_path / "out" / "metrics.json"
    metrics = evaluate_files(
        paths["ground_truth"], paths["predictions"], cases=paths["cases"], output=output
    )
    assert json.loads(output.read_text()) == metrics
    assert metrics["schema"] == 1
    assert metrics["ap"]["0.10"]["map"] == 1.0
    cases = read_cases(paths["cases"])
    truth = read_ground_truth(paths["ground_truth"], cases)
    assert compute_metrics(cases, truth, read_predictions(paths["predictions"], cases)) == metrics


@pytest.mark.parametrize(
    ("predictions", "options", "error", "message"),
    [
        ("a,0,nan,0,0,0,4,4,4\n", {}, DataError, "predictions.csv, line 2: score"),
        ("a,2,0.5,0,0,0,4,4,4\n", {"num_classes": 2}, DataError, "line 2: label"),
        ("", {"num_classes": 0}, ConfigError, "--num-classes"),
        ("", {"bootstrap": -1}, ConfigError, "--bootstrap"),
    ],
)
def test_nothing_is_written_on_an_error(
    tmp_path: Path, predictions: str, options: dict, error: type[Exception], message: str
) -> None:
    paths = write_tables(tmp_path, predictions=predictions)
    output = tmp_path / "metrics.json"
    with pytest.raises(error, match=message):
        evaluate_files(
            paths["ground_truth"],
            paths["predictions"],
            cases=paths["cases"],
            output=output,
            **options,
        )
    assert sorted(tmp_path.iterdir()) == sorted(paths.values())


def test_the_output_never_replaces_a_table(tmp_path: Path) -> None:
    paths = write_tables(tmp_path, predictions="")
    with pytest.raises(ConfigError, match="one of the tables"):
        evaluate_files(
            paths["ground_truth"],
            paths["predictions"],
            cases=paths["cases"],
            output=paths["predictions"],
        )


def rows_in(table: BoxTable, order: np.ndarray, cases: np.ndarray | None = None) -> BoxTable:
    """The rows in another order; `cases` gives every case another place in the list."""
    index = table.case_index if cases is None else cases[table.case_index]
    return BoxTable(
        case_index=index[order],
        labels=table.labels[order],
        boxes=table.boxes[order],
        scores=None if table.scores is None else table.scores[order],
    )


@settings(max_examples=30, deadline=None)
@given(data=tables_with_ties(), seed=st.integers(0, 2**20))
def test_rows_of_different_cases_may_be_mixed_in_any_way(
    data: tuple[int, list[Row], list[Row]], seed: int
) -> None:
    cases, objects, boxes = data
    rng = np.random.default_rng(seed)
    names = [str(case) for case in range(cases)]
    truth, found = tables(objects, boxes)

    def mixed(table: BoxTable) -> BoxTable:  # rows of one case keep their order
        places = rng.permutation(len(table))
        order = np.empty(len(table), dtype=np.int64)
        for case in range(cases):
            mine = table.case_index == case
            order[np.sort(places[mine])] = np.flatnonzero(mine)
        return rows_in(table, order)

    assert compute_metrics(names, mixed(truth), mixed(found), bootstrap=2) == compute_metrics(
        names, truth, found, bootstrap=2
    )


@settings(max_examples=30, deadline=None)
@given(data=tables_with_ties(), seed=st.integers(0, 2**20))
def test_without_ties_the_order_of_cases_and_rows_does_not_matter(
    data: tuple[int, list[Row], list[Row]], seed: int
) -> None:
    cases, objects, boxes = data
    rng = np.random.default_rng(seed)
    scores = rng.permutation(len(boxes)) / 64
    boxes = [(*row[:2], float(score), row[3]) for row, score in zip(boxes, scores, strict=True)]
    objects = list(dict.fromkeys(objects))  # of equal objects any may be the one that is found
    truth, found = tables(objects, boxes)
    names = [str(case) for case in range(cases)]
    place = rng.permutation(cases)
    other = compute_metrics(
        names, rows_in(truth, np.arange(len(truth)), place),
        rows_in(found, rng.permutation(len(found)), place),
    )  # fmt: skip
    assert_close(compute_metrics(names, truth, found), other)


@settings(max_examples=30, deadline=None)
@given(data=tables_with_ties())
def test_empty_cases_change_the_rate_of_false_positives_alone(
    data: tuple[int, list[Row], list[Row]],
) -> None:
    cases, objects, boxes = data
    truth, found = tables(objects, boxes)
    fewer = compute_metrics(
        [str(n) for n in range(cases)], truth, found, measures=Measures(fppi=(0.25, 0.5, 2.0))
    )
    more = compute_metrics(
        [str(n) for n in range(2 * cases)], truth, found, measures=Measures(fppi=(0.125, 0.25, 1.0))
    )
    assert more["num_cases"] == 2 * fewer["num_cases"]
    for key in ("ap", "froc", "counts", "score_histogram"):
        assert more[key] == fewer[key]


@settings(max_examples=30, deadline=None)
@given(data=tables_with_ties(), case=st.integers(0, 3))
def test_what_a_case_finds_does_not_depend_on_other_cases(
    data: tuple[int, list[Row], list[Row]], case: int
) -> None:
    cases, objects, boxes = data
    names = [str(n) for n in range(max(cases, case + 1))]
    alone = tables(*([row for row in rows if row[0] == case] for rows in (objects, boxes)))
    truth, found = tables(objects, boxes)
    flags, _ = true_positive_flags(names, truth, found, iou_threshold=0.1)
    of_case, _ = true_positive_flags(names, *alone, iou_threshold=0.1)
    assert flags[found.case_index == case].tolist() == of_case.tolist()


def test_ties_follow_the_list_of_cases_and_then_the_rows() -> None:
    hit: Row = (0, 0, 0.5, OBJECT[3])
    error: Row = (1, 0, 0.5, MISS[3])
    names = ["a", "b"]

    def ap(boxes: list[Row], objects: list[Row]) -> float:
        return compute_metrics(names, *tables(objects, boxes))["ap"]["0.10"]["map"]

    assert ap([error, hit], [OBJECT]) == 1.0  # the case of the hit is listed first
    swapped: list[Row] = [(1 - row[0], *row[1:]) for row in (hit, error)]
    assert ap(swapped, [(1, *OBJECT[1:])]) == 0.5
    assert ap([(0, *error[1:]), hit], [OBJECT]) == 0.5  # one case: the error is the earlier row


def measured(**options: Any) -> Measures:
    unset: dict[str, Any] = {
        "iou": [], "fppi": [], "operating_rates": [], "size_measure": "volume", "size_edges": [],
    }  # fmt: skip
    return requested(**{**unset, **options})


def test_more_thresholds_and_other_rates_come_beside_the_standard_ones() -> None:
    names, truth, found = random_data(20)
    standard = compute_metrics(names, truth, found)
    more = compute_metrics(
        names, truth, found,
        measures=measured(iou=[0.2, 0.1, 0.125], fppi=[1, 0.3], operating_rates=[0.7]),
    )  # fmt: skip
    assert list(more["ap"]) == ["0.10", "0.125", "0.20", "0.30", "0.50", "0.10:0.50:0.05"]
    assert list(more["froc"]) == ["0.10", "0.125", "0.20", "0.30"]
    for key, value in standard["ap"].items():
        assert more["ap"][key] == value
    assert more["fppi"] == [0.3, 1.0]
    assert (
        more["froc"]["0.10"]["pooled"]["sensitivity"][1]
        == (standard["froc"]["0.10"]["pooled"]["sensitivity"][3])
    )
    (point,) = more["operating_points"]["0.20"]["pooled"]
    assert point["fppi"] <= point["wanted_fppi"] == 0.7
    assert [p["wanted_fppi"] for p in standard["operating_points"]["0.10"]["pooled"]] == [*RATES]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iou": [1.5]}, "IoU thresholds"),
        ({"iou": [math.nan]}, "IoU thresholds"),
        ({"fppi": [0.0]}, "false positives per image"),
        ({"fppi": [math.nan]}, "false positives per image"),
        ({"operating_rates": [-1.0]}, "false positives per image"),
        ({"size_edges": [5.0, 2.0]}, "sizes: got the edges 5, 2"),
    ],
)
def test_impossible_measures_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        measured(**options)


def test_plots_are_drawn_and_well_formed(tmp_path: Path) -> None:
    names, truth, found = random_data(20)
    metrics = compute_metrics(names, truth, found, num_classes=3, bootstrap=10)
    write_plots(tmp_path / "plots", names, truth, found, metrics=metrics)
    pictures = sorted(path.name for path in (tmp_path / "plots").iterdir())
    curves = [f"precision_recall_{label}.svg" for label in range(3)]
    assert pictures == ["froc.svg", *curves, "scores_0.10.svg", "scores_0.30.svg"]
    for name in pictures:
        root = ElementTree.parse(tmp_path / "plots" / name).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
    froc = (tmp_path / "plots" / "froc.svg").read_text()
    assert "0.10: 97.5 %" in froc
    assert f"IoU 0.10 {metrics['froc']['0.10']['pooled']['mean']:.3f}" in froc
    nothing = compute_metrics(["a"], *tables([], []))
    write_plots(tmp_path / "empty", ["a"], *tables([], []), metrics=nothing)
    assert "nothing to draw" in (tmp_path / "empty" / "froc.svg").read_text()
