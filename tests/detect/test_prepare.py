"""Preparing: what is in the store, what is named when a case is bad, what is skipped."""

import json
from pathlib import Path

import numpy as np
import pytest

from voxelbridge.core.data.case_store import CaseStore
from voxelbridge.core.data.dataset import RawDataset
from voxelbridge.core.data.foreground import boxes_from_instances
from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.detect.evaluate.tables import read_cases, read_ground_truth
from voxelbridge.detect.plan import read_plan
from voxelbridge.detect.prepare import prepare
from voxelbridge.detect.splits import read_splits


def test_the_store_holds_every_case_on_the_planned_grid(raw_dataset: Path, tmp_path: Path) -> None:
    store_path = tmp_path / "store"
    prepare(raw_dataset, store_path, workers=0)
    store, plan = CaseStore.open(store_path), read_plan(store_path)
    assert [record.case_id for record in store.cases] == [f"case{n}" for n in range(6)]
    # File axes z, y, x are patient axes R-L (2 mm), A-P and S-I: in LPS order x has 2 mm.
    assert plan.spacing_mm == (1.0, 1.0, 2.0)
    assert plan.num_objects_per_class == (5, 5)
    assert plan.normalization[0].name == "ct_percentile"
    record = store.record("case0")
    assert record.shape == (1, 28, 24, 20)
    assert record.labels.tolist() == [0, 1]
    ids, boxes = boxes_from_instances(store.read_instances("case0"))
    assert ids.tolist() == [1, 2]
    np.testing.assert_array_equal(boxes, record.boxes)
    assert store.verify() == []


def test_fixed_spacing_scales_boxes_exactly(raw_dataset: Path, tmp_path: Path) -> None:
    store_path = tmp_path / "store"
    prepare(raw_dataset, store_path, rule="fixed", workers=0)
    store = CaseStore.open(store_path)
    assert store.record("case0").shape == (1, 28, 24, 40)
    sizes = store.record("case0").boxes[:, 3:] - store.record("case0").boxes[:, :3]
    np.testing.assert_allclose(sizes, [[6, 6, 12], [6, 6, 12]])


def test_ground_truth_is_in_the_files_own_voxels(raw_dataset: Path, tmp_path: Path) -> None:
    store_path = tmp_path / "store"
    prepare(raw_dataset, store_path, workers=0)
    raw = RawDataset.open(raw_dataset)
    for prefix, cases in (("", raw.cases), ("test_", raw.test_cases)):
        names = read_cases(store_path / f"{prefix}cases.csv")
        assert names == [case.case_id for case in cases]
        table = read_ground_truth(store_path / f"{prefix}ground_truth.csv", names)
        for index, case in enumerate(cases):
            objects = case.read_objects(case.read_image().grid)
            rows = table.case_index == index
            np.testing.assert_array_equal(table.boxes[rows], objects.boxes)
            np.testing.assert_array_equal(table.labels[rows], objects.labels)
    details = CaseStore.open(store_path).details("case0")
    original = details.mapping.boxes_to_original(CaseStore.open(store_path).record("case0").boxes)
    np.testing.assert_allclose(original, details.extra["original_boxes"], atol=1e-4)


def test_a_second_call_does_nothing_again(raw_dataset: Path, tmp_path: Path) -> None:
    store_path = tmp_path / "store"
    prepare(raw_dataset, store_path, workers=0)
    array = store_path / "cases" / "case1.b2nd"
    before = array.stat().st_mtime_ns
    prepare(raw_dataset, store_path, workers=0)
    assert array.stat().st_mtime_ns == before


def test_a_bad_case_is_named_and_the_others_are_stored(
    raw_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = raw_dataset / "imagesTr" / "case3_0000.nii.gz"
    broken.write_bytes(broken.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"1 of 6 cases could not be prepared \(case3\)"):
        prepare(raw_dataset, tmp_path / "store", workers=1)
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    assert "case3" in error
    store = CaseStore.open(tmp_path / "store")
    assert [record.case_id for record in store.cases] == [
        "case0", "case1", "case2", "case4", "case5",
    ]  # fmt: skip
    held = [name for fold in read_splits(tmp_path / "store") for name in fold["val"]]
    assert "case3" not in held


def test_another_plan_on_an_existing_store_is_refused(raw_dataset: Path, tmp_path: Path) -> None:
    prepare(raw_dataset, tmp_path / "store", workers=0)
    with pytest.raises(ConfigError, match=r"another plan .*spacing_mm"):
        prepare(raw_dataset, tmp_path / "store", rule="fixed", workers=0)


def test_own_splits_and_patients_are_kept(raw_dataset: Path, tmp_path: Path) -> None:
    own = [{"train": ["case0", "case1"], "val": ["case5"]}]
    (raw_dataset / "splits.json").write_text(json.dumps(own))
    prepare(raw_dataset, tmp_path / "a", workers=0)
    assert read_splits(tmp_path / "a") == own
    (raw_dataset / "splits.json").unlink()
    (raw_dataset / "groups.json").write_text(
        json.dumps({f"case{n}": f"p{n // 2}" for n in range(6)})
    )
    prepare(raw_dataset, tmp_path / "b", workers=0)
    for fold in read_splits(tmp_path / "b"):
        assert len(fold["val"]) == 2
        assert int(fold["val"][0][-1]) // 2 == int(fold["val"][1][-1]) // 2


def test_only_some_cases_can_be_taken(raw_dataset: Path, tmp_path: Path) -> None:
    prepare(raw_dataset, tmp_path / "store", workers=0, only=["case0", "case4"])
    store = CaseStore.open(tmp_path / "store")
    assert [record.case_id for record in store.cases] == ["case0", "case4"]
