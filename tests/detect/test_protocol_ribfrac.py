import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from voxelbridge.core.data.image_io import write_image
from voxelbridge.core.data.volume import Grid, Volume
from voxelbridge.core.errors import DataError
from voxelbridge.detect.evaluate.protocols.ribfrac import evaluate_ribfrac, recall_at_rates
from voxelbridge.detect.evaluate.protocols.ribfrac_matching import match_scan

Map = NDArray[Any]
Scans = dict[str, tuple[Map, Map]]  # truth and prediction, (z, y, x)
RATES = (0.5, 1, 2, 4, 8)


class PlainProgram:
    """The program's detection score with loops: components, thresholds, neighbours of key rates."""

    def __init__(self, scans: Scans, confidences: dict[str, dict[int, float]]) -> None:
        self.num_scans = len(scans)
        self.num_fractures = sum(int(truth.max()) for truth, _ in scans.values())
        self.instances: list[tuple[str, float, int, float]] = []  # scan, overlap, fracture, score
        for name, (truth, prediction) in scans.items():
            overlaps = self.overlaps(truth.transpose(), prediction.transpose())  # x, y, z
            for instance in range(1, int(prediction.max()) + 1):
                row = [overlaps.get((instance, f), 0.0) for f in range(1, int(truth.max()) + 1)]
                overlap = max(row, default=0.0)
                fracture = row.index(overlap) + 1 if overlap > 0 else 0
                score = confidences[name].get(instance, math.nan)
                self.instances.append((name, overlap, fracture, score))

    @staticmethod
    def overlaps(truth: Map, prediction: Map) -> dict[tuple[int, int], float]:
        touching = np.ones((3, 3, 3))
        union = np.zeros(truth.shape, dtype=np.int32)
        both = np.zeros_like(union)
        ndimage.label((truth > 0) | (prediction > 0), touching, output=union)
        ndimage.label((truth > 0) & (prediction > 0), touching, output=both)
        firsts = [tuple(np.argwhere(both == n)[0]) for n in range(1, both.max() + 1)]
        found = {}
        for first in sorted(firsts):
            size = (both == both[first]).sum()
            pair = (int(prediction[first]), int(truth[first]))
            found[pair] = size / (union == union[first]).sum()
        return found

    def sensitivities(self) -> list[float]:
        points: dict[float, float] = {}
        for threshold in np.arange(0, 1, 0.01):
            passed = [each for each in self.instances if each[3] >= threshold]
            found = {(scan, fracture) for scan, overlap, fracture, _ in passed if overlap > 0.2}
            false = sum(overlap <= 0.2 for _, overlap, _, _ in passed)
            rate, recall = false / self.num_scans, len(found) / self.num_fractures
            points[rate] = max(recall, points.get(rate, 0.0))
        values = []
        for key in RATES:
            below, above = [r for r in points if r <= key], [r for r in points if r >= key]
            if not below:
                values.append(0.0)
            elif not above:
                values.append(max(points.values()))
            else:
                low, high = max(below), min(above)
                part = (key - low) / (high - low) if high > low else 0.0
                values.append(points[low] + (points[high] - points[low]) * part)
        return values


class Folders:
    """The two folders of an evaluation."""

    def __init__(self, folder: Path) -> None:
        self.truth, self.predictions = folder / "gt", folder / "pred"
        self.output = folder / "metrics.json"

    def write(
        self, scans: Scans, confidences: dict[str, dict[int, Any]],
        codes: dict[str, dict[int, int]] | None = None,
    ) -> None:  # fmt: skip
        truth_rows: list[tuple[Any, ...]] = [("public_id", "label_id", "label_code")]
        rows: list[tuple[Any, ...]] = [("public_id", "label_id", "confidence", "label_code")]
        for folder in (self.truth, self.predictions):
            folder.mkdir(exist_ok=True)
        for name, (truth, prediction) in scans.items():
            write_map(self.truth / f"{name}-label.nii.gz", truth)
            write_map(self.predictions / f"{name}.nii.gz", prediction)
            truth_rows.append((name, 0, 0))
            rows.append((name, 0, 1, 0))
            of_scan = (codes or {}).get(name, {})
            truth_rows += [(name, n, of_scan.get(n, 1)) for n in range(1, int(truth.max()) + 1)]
            rows += [(name, n, value, 1) for n, value in confidences[name].items()]
        for path, table in (
            (self.truth / "ribfrac-gt-info.csv", truth_rows),
            (self.predictions / "ribfrac-pred-info.csv", rows),
        ):
            with path.open("w", newline="") as stream:
                csv.writer(stream).writerows(table)

    def run(self, **options: Any) -> dict[str, Any]:
        content = evaluate_ribfrac(
            self.truth, self.predictions, output=self.output, workers=0, **options
        )
        assert json.loads(self.output.read_text()) == content
        return content


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path)


def write_map(path: Path, labels: Map, spacing: float = 1.0) -> None:
    grid = Grid.from_parts(labels.shape, (spacing, 1.0, 1.0))
    write_image(path, Volume(labels.astype(np.int16)[None], grid))


def painted(*boxes: tuple[int, int, int], shape: tuple[int, int, int] = (4, 6, 60)) -> Map:
    """Bars along x: (number, first x, last x + 1); later ones cover earlier ones."""
    labels = np.zeros(shape, dtype=np.int64)
    for number, low, high in boxes:
        labels[1:3, 1:3, low:high] = number
    return labels


def random_scan(rng: np.random.Generator) -> tuple[Map, Map]:
    """Fractures, and predictions shifted, missing, doubled, touching or made up."""
    truth, prediction = (np.zeros((9, 10, 11), dtype=np.int64) for _ in range(2))
    number = 0
    for fracture in range(1, int(rng.integers(1, 5))):
        low = rng.integers(0, 6, 3)
        high = low + rng.integers(2, 5, 3)
        truth[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = fracture
        for _ in range(int(rng.integers(0, 3))):
            number += 1
            shift = rng.integers(-1, 2, 3)
            cut = [slice(max(a, 0), b) for a, b in zip(low + shift, high + shift, strict=True)]
            prediction[tuple(cut)] = number
    for _ in range(int(rng.integers(0, 4))):
        number += 1
        corner = rng.integers(0, 9, 3)
        prediction[tuple(slice(a, a + 2) for a in corner)] = number
    return truth, prediction


@pytest.mark.parametrize("seed", range(8))
def test_score_is_the_programs_on_random_scans(folders: Folders, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scans = {f"RibFrac{n}": random_scan(rng) for n in range(int(rng.integers(1, 5)))}
    confidences = {
        name: {n: float(rng.integers(0, 21) / 20) for n in range(1, int(prediction.max()) + 1)}
        for name, (_, prediction) in scans.items()
    }
    folders.write(scans, confidences)
    plain = PlainProgram(scans, confidences)
    content = folders.run()
    np.testing.assert_allclose(content["sensitivity"], plain.sensitivities(), atol=1e-12)
    hits = {each[:1] + each[2:3] for each in plain.instances if each[1] > 0.2}
    false = sum(each[1] <= 0.2 for each in plain.instances)
    assert content["counts"]["true_positives"] == len(hits)
    assert content["counts"]["missed"] == plain.num_fractures - len(hits)
    assert content["counts"]["false_positives"] == false
    assert content["counts"]["candidates"] == len(plain.instances)


def test_overlap_of_0_2_is_no_hit_and_more_is() -> None:
    truth = painted((1, 0, 10))
    assert match_scan(truth, painted((1, 0, 2))).iou.tolist() == [0.2]
    assert match_scan(truth, painted((1, 0, 3))).iou.tolist() == [0.3]


def test_touching_objects_lower_the_overlap() -> None:
    alone = match_scan(painted((1, 0, 10)), painted((1, 0, 10)))
    touched = match_scan(painted((1, 0, 10), (2, 10, 40)), painted((1, 0, 10)))
    assert (alone.iou[0], touched.iou[0]) == (1.0, 0.25)


def test_later_component_of_a_pair_replaces_the_earlier() -> None:
    truth = painted((1, 0, 20))
    prediction = painted((1, 0, 12), (0, 12, 14), (1, 14, 15))  # two pieces of one instance
    assert match_scan(truth.transpose(), prediction.transpose()).iou.tolist() == [1 / 20]


def test_several_hits_of_a_fracture_are_duplicates(folders: Folders) -> None:
    scans = {"a": (painted((1, 0, 10)), painted((1, 0, 4), (0, 4, 5), (2, 5, 10), (3, 30, 34)))}
    folders.write(scans, {"a": {1: 0.5, 2: 0.9, 3: 0.7}})
    content = folders.run()
    assert content["counts"] == {
        "true_positives": 1, "false_positives": 1, "missed": 0, "candidates": 3, "ignored": 0,
        "duplicates": 1,
    }  # fmt: skip
    assert content["score"] == 1.0


def test_more_than_255_instances_stay_apart(folders: Folders) -> None:
    shape = (2, 32, 60)
    prediction = np.zeros(shape, dtype=np.int64)
    prediction[0, ::2, ::2][:10] = np.arange(1, 301).reshape(10, 30)
    truth = np.where(prediction == 300, 1, 0)
    folders.write({"a": (truth, prediction)}, {"a": dict.fromkeys(range(1, 301), 0.5) | {300: 0.9}})
    content = folders.run()
    assert content["counts"]["candidates"] == 300
    assert content["counts"]["false_positives"] == 299
    assert content["score"] == 1.0


def test_prediction_without_confidence_never_passes(
    folders: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    scans = {"a": (painted((1, 0, 10)), painted((1, 0, 10), (2, 30, 40)))}
    folders.write(scans, {"a": {2: "nan"}})
    content = folders.run()
    assert (content["counts"]["ignored"], content["without_confidence"]) == (2, 2)
    assert content["score"] == 0
    assert "predictions 1 have no row in ribfrac-pred-info.csv" in capsys.readouterr().out


def test_scans_without_predictions_count_in_the_rate_and_empty_ones_have_only_false(
    folders: Folders,
) -> None:
    nothing = painted()
    scans = {"a": (painted((1, 0, 10)), painted((1, 0, 10), (2, 30, 40))),
             "b": (painted((1, 0, 10)), nothing), "c": (nothing, painted((1, 0, 9))),
             "d": (nothing, nothing)}  # fmt: skip
    folders.write(scans, {"a": {1: 0.3, 2: 0.9}, "b": {}, "c": {1: 0.9}, "d": {}})
    content = folders.run()
    assert content["sensitivity"] == [0.5] * 5  # two false in four scans, then one of two found
    assert content["counts"]["missed"] == 1


def test_undefined_fractures_count_unless_ignored(folders: Folders) -> None:
    scans = {"a": (painted((1, 0, 10), (2, 20, 30)), painted((1, 0, 10), (2, 20, 30)))}
    folders.write(scans, {"a": {1: 0.9, 2: 0.9}}, {"a": {2: -1}})
    assert folders.run()["counts"]["true_positives"] == 2
    counts = folders.run(undefined="ignore")["counts"]
    assert (counts["true_positives"], counts["missed"], counts["ignored"]) == (1, 0, 1)


def test_no_fracture_at_all_scores_zero(folders: Folders) -> None:
    folders.write({"a": (painted(), painted((1, 0, 9)))}, {"a": {1: 0.9}})
    assert folders.run()["score"] == 0


def test_key_rates_take_the_highest_recall_the_line_or_the_ends() -> None:
    rates = np.array([6.0, 2.0, 2.0, 2.0, 1.5])
    recall = np.array([0.9, 0.3, 0.5, 0.4, 0.1])
    np.testing.assert_allclose(recall_at_rates(rates, recall), [0, 0, 0.5, 0.7, 0.9])


def break_missing(folders: Folders) -> None:
    (folders.predictions / "a.nii.gz").unlink()


def break_grid(folders: Folders) -> None:
    write_map(folders.predictions / "a.nii.gz", painted((1, 0, 10)), spacing=2.0)


def break_shape(folders: Folders) -> None:
    write_map(folders.predictions / "a.nii.gz", painted(shape=(4, 6, 61)))


def break_label(folders: Folders) -> None:
    write_map(folders.predictions / "a.nii.gz", -painted((1, 0, 10)))


def break_rows(folders: Folders) -> None:
    table = folders.predictions / "ribfrac-pred-info.csv"
    table.write_text("public_id,label_id,confidence\nb,1,0.5\n")


def break_twice(folders: Folders) -> None:
    table = folders.predictions / "ribfrac-pred-info.csv"
    table.write_text("public_id,label_id,confidence\na,1,0.5\na,1,0.6\n")


def break_column(folders: Folders) -> None:
    (folders.truth / "ribfrac-gt-info.csv").write_text("public_id,label_id\na,1\n")


def break_table(folders: Folders) -> None:
    (folders.predictions / "ribfrac-pred-info.csv").unlink()


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (break_missing, "pred: no label map of a"),
        (break_grid, r"a\.nii\.gz: grid .* differs from a-label"),
        (break_shape, r"a\.nii\.gz: grid .* differs from a-label"),
        (break_label, "got the label -1"),
        (break_rows, "a: its label map has 1 predictions, and ribfrac-pred-info.csv no row"),
        (break_twice, r"ribfrac-pred-info\.csv, line 3: instance 1 of a is there twice"),
        (break_column, r"ribfrac-gt-info\.csv, line 1: missing column label_code"),
        (break_table, r"pred: no ribfrac-pred-info\.csv"),
    ],
)
def test_errors_are_one_line_and_write_nothing(folders: Folders, breaks: Any, message: str) -> None:
    folders.write({"a": (painted((1, 0, 10)), painted((1, 0, 10)))}, {"a": {1: 0.5}})
    breaks(folders)
    with pytest.raises(DataError, match=message) as caught:
        folders.run()
    assert "\n" not in str(caught.value)
    assert not folders.output.exists()


def test_scans_run_in_processes_of_their_own(folders: Folders) -> None:
    folders.write({"a": (painted((1, 0, 10)), painted((1, 0, 10)))}, {"a": {1: 0.5}})
    content = evaluate_ribfrac(folders.truth, folders.predictions, output=folders.output, workers=1)
    assert content["score"] == 1.0
