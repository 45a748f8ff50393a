"""Where an evaluation takes cases and objects from."""

import json
from pathlib import Path

import numpy as np
import pytest

from voxelbridge.core.data.dataset import RawDataset
from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.detect.evaluate.metrics import evaluate_files
from voxelbridge.detect.evaluate.sources import read_truth
from voxelbridge.detect.evaluate.tables import (
    BoxTable,
    write_cases,
    write_ground_truth,
    write_predictions,
)
from voxelbridge.detect.prepare import prepare


def objects_of(dataset: Path, names: list[str]) -> BoxTable:
    raw = RawDataset.open(dataset)
    known = {case.case_id: case for case in (*raw.cases, *raw.test_cases)}
    objects = [known[name].read_objects(known[name].read_grid()) for name in names]
    return BoxTable.from_cases([o.boxes for o in objects], [o.labels for o in objects])


def equal(one: BoxTable, other: BoxTable) -> bool:
    order, again = (np.argsort(table.case_index, kind="stable") for table in (one, other))
    return all(
        np.array_equal(a[order], b[again])
        for a, b in (
            (one.case_index, other.case_index),
            (one.labels, other.labels),
            (one.boxes, other.boxes),
        )
    )


def perfect(dataset: Path, folder: Path, names: list[str]) -> Path:
    """A predictions.csv of the objects themselves."""
    table = objects_of(dataset, names)
    scores = np.linspace(1.0, 0.5, len(table))
    path = folder / "predictions.csv"
    write_predictions(
        path, BoxTable(table.case_index, table.labels, table.boxes, scores), cases=names
    )
    return path


def test_a_raw_data_set_gives_the_boxes_of_its_files_for_the_listed_cases(
    raw_dataset: Path, tmp_path: Path
) -> None:
    names = ["case4", "case0"]
    predictions = perfect(raw_dataset, tmp_path, names)
    write_cases(tmp_path / "cases.csv", names)  # beside the predictions, as `predict` leaves it
    truth = read_truth(raw_dataset, predictions=predictions, workers=0)
    assert truth.cases == names
    assert truth.num_classes == 2
    assert equal(truth.objects, objects_of(raw_dataset, names))
    assert truth.spacings is not None
    raw = {case.case_id: case for case in RawDataset.open(raw_dataset).cases}
    assert truth.spacings.tolist() == [list(raw[name].read_grid().spacing_mm) for name in names]
    metrics = evaluate_files(raw_dataset, predictions, output=tmp_path / "m.json", workers=0)
    assert metrics["ap"]["0.50"]["map"] == 1.0
    assert metrics["sizes"]["unit"] == "mm^3"


def test_without_a_list_the_labelled_test_cases_of_a_data_set_are_evaluated(
    raw_dataset: Path, tmp_path: Path
) -> None:
    raw = RawDataset.open(raw_dataset)
    tests = [case.case_id for case in raw.test_cases if case.has_labels]
    assert tests
    truth = read_truth(raw_dataset, predictions=tmp_path / "p.csv", workers=0)
    assert truth.cases == tests
    for path in (*raw_dataset.glob("labelsTs/*"), *raw_dataset.glob("imagesTs/*")):
        path.unlink()
    truth = read_truth(raw_dataset, predictions=tmp_path / "p.csv", workers=0)
    assert truth.cases == [case.case_id for case in raw.cases]


def test_a_store_gives_the_boxes_of_the_original_files(raw_dataset: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    prepare(raw_dataset, store, workers=0)
    tests = [case.case_id for case in RawDataset.open(raw_dataset).test_cases]
    names = ["case3", tests[0], "case0"]
    write_cases(tmp_path / "cases.csv", names)
    truth = read_truth(store, predictions=tmp_path / "p.csv")
    assert truth.cases == names
    assert truth.spacings is None  # a test case is not stored
    assert equal(truth.objects, objects_of(raw_dataset, names))
    write_cases(tmp_path / "cases.csv", ["case3", "case0"])
    truth = read_truth(store, predictions=tmp_path / "p.csv")
    raw = read_truth(raw_dataset, predictions=tmp_path / "p.csv", workers=0)
    assert truth.spacings is not None
    assert raw.spacings is not None
    np.testing.assert_allclose(truth.spacings, raw.spacings)


@pytest.mark.parametrize("source", ["raw", "store"])
def test_a_case_that_the_data_set_lacks_is_named_with_its_line(
    raw_dataset: Path, tmp_path: Path, source: str
) -> None:
    folder = raw_dataset
    if source == "store":
        folder = tmp_path / "store"
        prepare(raw_dataset, folder, workers=0)
    write_cases(tmp_path / "some.csv", ["case0", "case77"])
    with pytest.raises(DataError, match=r"some\.csv, line 3: case 'case77' is not in") as error:
        read_truth(folder, predictions=tmp_path / "p.csv", cases=tmp_path / "some.csv", workers=0)
    assert "\n" not in str(error.value)


def test_a_listed_case_without_labels_is_refused(raw_dataset: Path, tmp_path: Path) -> None:
    for path in raw_dataset.glob("labelsTr/case1.*"):
        path.unlink()
    write_cases(tmp_path / "cases.csv", ["case0", "case1"])
    with pytest.raises(DataError, match="no labels of case1"):
        read_truth(raw_dataset, predictions=tmp_path / "p.csv", workers=0)


def test_a_broken_label_file_is_one_line_that_names_the_case(
    raw_dataset: Path, tmp_path: Path
) -> None:
    write_cases(tmp_path / "cases.csv", ["case0"])
    path = raw_dataset / "labelsTr" / "case0.json"
    path.write_text(json.dumps({"instances": {"1": 99}}))
    with pytest.raises(DataError, match="case0") as error:
        read_truth(raw_dataset, predictions=tmp_path / "p.csv", workers=0)
    assert "\n" not in str(error.value)


def test_a_class_beyond_the_number_of_classes_is_refused(raw_dataset: Path, tmp_path: Path) -> None:
    write_cases(tmp_path / "cases.csv", ["case0"])
    with pytest.raises(DataError, match="case case0: class 1, expected at most 0"):
        read_truth(raw_dataset, predictions=tmp_path / "p.csv", num_classes=1, workers=0)


def test_a_table_takes_the_list_beside_it_and_needs_one(raw_dataset: Path, tmp_path: Path) -> None:
    truth, found = tmp_path / "truth", tmp_path / "found"
    truth.mkdir()
    found.mkdir()
    table = objects_of(raw_dataset, ["case0"])
    write_ground_truth(truth / "ground_truth.csv", table, cases=["case0"])
    with pytest.raises(ConfigError, match="--cases: not given"):
        read_truth(truth / "ground_truth.csv", predictions=found / "predictions.csv")
    write_cases(truth / "cases.csv", ["case0", "empty"])
    got = read_truth(truth / "ground_truth.csv", predictions=found / "predictions.csv")
    assert got.cases == ["case0", "empty"]
    write_cases(found / "cases.csv", ["case0"])
    got = read_truth(truth / "ground_truth.csv", predictions=found / "predictions.csv")
    assert got.cases == ["case0"]
