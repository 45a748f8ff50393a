"""Every case tested by the run that did not see it, in the voxels of the original images."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from voxelbridge.core.data.case_store import CaseStore
from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.core.train.steps import place
from voxelbridge.detect import cross_validation as module
from voxelbridge.detect.cross_validation import out_of_fold, parse_folds, report, train_folds
from voxelbridge.detect.detections import Detections
from voxelbridge.detect.evaluate.metrics import evaluate_files
from voxelbridge.detect.evaluate.tables import read_ground_truth, read_predictions
from voxelbridge.detect.post_processing_file import read_swept
from voxelbridge.detect.predict import Proposals, predict_volume
from voxelbridge.detect.predict_cases import predict_cases, to_original
from voxelbridge.detect.prepare import prepare
from voxelbridge.detect.splits import read_splits, write_splits
from voxelbridge.detect.train import load_run

TINY = ("patch_size=[16,16,16]", "schedule.steps=2", "schedule.warmup_steps=1")


@pytest.fixture
def store(stubs, tmp_path: Path) -> CaseStore:
    return stubs.write_stub_store(tmp_path / "store", num_cases=5)


def perfect_proposals(stubs, num_cases: int) -> list[list[Proposals]]:
    """Each object found once, by one mirroring."""
    found = Detections(
        boxes=torch.tensor(stubs.OBJECTS, dtype=torch.float32),
        scores=torch.tensor([0.9, 0.8]),
        labels=torch.tensor([0, 1]),
    )
    return [[Proposals(found, torch.ones(2))] for _ in range(num_cases)]


def test_tables_are_in_voxels_of_the_original_images(
    store: CaseStore,
    tmp_path: Path,
    stubs,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stub = stubs.StubDetector(perfect_proposals(stubs, 5)).install(monkeypatch)
    runs = [
        stubs.write_stub_run(tmp_path / "a", store, fold=0, held_out=["c3", "c0"]),
        stubs.write_stub_run(tmp_path / "b", store, fold=1, held_out=["c1"]),
    ]
    out = tmp_path / "out"
    result = out_of_fold(runs, out, num_mirrorings=1, steps=["min_size"], device="cpu", workers=0)
    assert stub.seen == [3, 0, 1]
    assert result.not_held_out == ("c2", "c4")
    assert "2 of 5 cases" in capsys.readouterr().out
    cases = (out / "cases.csv").read_text().split()
    assert cases == ["case_id", "c0", "c1", "c3"]
    truth = read_ground_truth(out / "ground_truth.csv", cases[1:])
    predictions = read_predictions(out / "predictions.csv", cases[1:])
    np.testing.assert_allclose(predictions.boxes, truth.boxes, atol=1e-4)
    original = store.details("c0").mapping.boxes_to_original(stubs.OBJECTS)
    np.testing.assert_allclose(truth.boxes, np.tile(original, (3, 1)))
    assert original[0].tolist() != list(stubs.OBJECTS[0])
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["ap"]["0.50"]["map"] == 1.0
    assert json.loads((out / "metrics_before_sweep.json").read_text()) == result.before
    again = evaluate_files(
        out / "ground_truth.csv", out / "predictions.csv", cases=out / "cases.csv",
        output=out / "again.json", num_classes=2,
    )  # fmt: skip
    assert again["ap"] == metrics["ap"]
    assert again["froc"] == metrics["froc"]
    manifest = json.loads((out / "out_of_fold.json").read_text())
    assert [(run["fold"], run["cases"]) for run in manifest["runs"]] == [
        (0, ["c3", "c0"]),
        (1, ["c1"]),
    ]
    assert manifest["not_held_out"] == ["c2", "c4"]
    report(result, out)
    assert "mAP@0.10 1.0000" in capsys.readouterr().out


def test_one_setting_is_swept_for_all_folds(
    store: CaseStore, tmp_path: Path, stubs, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = stubs.StubDetector(stubs.noisy_proposals(5, pairs=2)).install(monkeypatch)
    stub.broken = {4}
    runs = [
        stubs.write_stub_run(tmp_path / "a", store, fold=0, held_out=["c0", "c1"]),
        stubs.write_stub_run(tmp_path / "b", store, fold=1, held_out=["c2", "c3", "c4"]),
    ]
    result = out_of_fold(
        runs, tmp_path / "out", num_mirrorings=2, steps=["model_min_score"], device="cpu",
        workers=0,
    )  # fmt: skip
    assert result.swept is not None
    assert read_swept(runs[0]) == read_swept(runs[1]) == result.swept
    assert (result.swept.num_cases, result.swept.failed_cases) == (4, ("c4",))
    assert (result.failed, result.not_held_out) == (("c4",), ())
    assert result.before is not None
    assert result.before["ap"]["0.10"]["map"] == pytest.approx(result.swept.before["map_0.10"])
    with pytest.raises(DataError, match=r"1 of 5 held-out cases .*c4"):
        report(result, tmp_path / "out")


def test_a_case_held_out_twice_is_refused(
    store: CaseStore, tmp_path: Path, stubs, monkeypatch: pytest.MonkeyPatch
) -> None:
    stubs.StubDetector(stubs.noisy_proposals(5, pairs=1)).install(monkeypatch)
    runs = [
        stubs.write_stub_run(tmp_path / name, store, fold=fold, held_out=["c0", "c1"])
        for fold, name in enumerate("ab")
    ]
    with pytest.raises(ConfigError, match=r"case c0 is held out by 2 runs \(.*a, .*b\), expected"):
        out_of_fold(runs, tmp_path / "out", device="cpu", workers=0)
    assert not (tmp_path / "out").exists()


def test_folds_that_cannot_be_tested_are_refused_before_training(
    raw_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    prepare(raw_dataset, store, workers=0)
    monkeypatch.setattr(module, "train", lambda *_, **__: pytest.fail("trained"))

    def refused(message: str, folds: Sequence[int] | None = None) -> None:
        with pytest.raises(ConfigError, match=message):
            train_folds("retunet_small", store=store, out=tmp_path / "out", folds=folds)

    refused("folds 0 to 4, got 5", folds=[0, 5])
    every = ["case0", "case1", "case2"]
    write_splits(store, [{"train": every, "val": every}])
    refused("fold 0 trains on its held-out case case0")
    write_splits(store, [{"train": every, "val": []}])
    refused("fold 0 holds out no case")
    write_splits(store, [{"train": every[:1], "val": every[1:]}] * 2)
    refused("case case1 is held out by folds 0 and 1")
    assert parse_folds("0,2-4") == [0, 2, 3, 4]
    assert parse_folds(None) is None
    with pytest.raises(ConfigError, match="--folds 0;1: expected numbers"):
        parse_folds("0;1")


@pytest.mark.slow
def test_folds_are_trained_once_and_predict_uses_what_was_swept(
    raw_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, out = tmp_path / "store", tmp_path / "out"
    prepare(raw_dataset, store, workers=0)
    splits = read_splits(store)

    def folds(overrides: Sequence[str] = TINY) -> list[Path]:
        trained = train_folds(
            "retunet_small", store=store, out=out, folds=[0, 1], overrides=overrides,
            device="cpu", workers=0,
        )  # fmt: skip
        assert trained is not None
        return trained

    runs = folds()
    assert runs == [out / "fold_0", out / "fold_1"]
    before = [(run / "metrics.jsonl").stat().st_mtime_ns for run in runs]
    assert folds() == runs
    assert "fold 1: finished before" in capsys.readouterr().out
    assert [(run / "metrics.jsonl").stat().st_mtime_ns for run in runs] == before
    with pytest.raises(ConfigError, match=r"another config \(schedule\.steps"):
        folds(overrides=[*TINY, "schedule.steps=3"])
    result = out_of_fold(runs, out, num_mirrorings=2, steps=["min_size"], device="cpu", workers=0)
    assert result.swept is not None
    detector, config, _ = load_run(runs[0])
    assert config.post_processing == result.swept.post_processing
    case_id = splits[0]["val"][0]
    opened = CaseStore.open(store)
    place(detector, torch.device("cpu"), config.precision)
    found = predict_volume(
        [(detector, config)], opened.read_image(case_id), device=torch.device("cpu"),
        num_mirrorings=2,
    )  # fmt: skip
    expected = to_original(found, opened.details(case_id).mapping)
    names = (out / "cases.csv").read_text().split()[1:]
    table = read_predictions(out / "predictions.csv", names)
    mine = table.case_index == names.index(case_id)
    assert table.scores is not None
    np.testing.assert_array_equal(table.boxes[mine], expected.boxes)
    np.testing.assert_array_equal(table.scores[mine], expected.scores)
    predict_cases(runs, [raw_dataset / "imagesTs"], tmp_path / "test", device="cpu", pictures=False)
    content = json.loads((runs[1] / "post_processing.json").read_text())
    content["post_processing"]["ensemble_iou"] = 0.25
    (runs[1] / "post_processing.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"fold_1: .*sweep.* them together"):
        predict_cases(runs, [raw_dataset / "imagesTs"], tmp_path / "no", device="cpu")
