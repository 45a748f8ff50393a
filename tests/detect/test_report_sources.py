"""The report page reads what `predict` and `out-of-fold` write, and says what else to do."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from voxelbridge.core.errors import DataError
from voxelbridge.detect.cross_validation import out_of_fold
from voxelbridge.detect.detections import Detections
from voxelbridge.detect.predict import Proposals
from voxelbridge.detect.report_inputs import report_folder


def content_of(page: Path) -> dict[str, Any]:
    text = page.read_text(encoding="utf-8")
    block = re.search(r'id="report-data">(.*?)</script>', text, re.DOTALL)
    assert block is not None
    return json.loads(block[1])


@pytest.fixture
def tested(stubs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An out-of-fold folder beside its two runs and their store; each object found exactly."""
    store = stubs.write_stub_store(tmp_path / "store", num_cases=3)
    found = Detections(
        boxes=torch.tensor(stubs.OBJECTS, dtype=torch.float32),
        scores=torch.tensor([0.9, 0.8]),
        labels=torch.tensor([0, 1]),
    )
    every = [[Proposals(found, torch.ones(2))] for _ in range(3)]
    stubs.StubDetector(every).install(monkeypatch)
    out = tmp_path / "out"
    runs = [
        stubs.write_stub_run(out / "fold_0", store, fold=0, held_out=["c0"]),
        stubs.write_stub_run(out / "fold_1", store, fold=1, held_out=["c1", "c2"]),
    ]
    for fold, run in enumerate(runs):
        (run / "metrics.jsonl").write_text(f'{{"step": 0, "loss": {fold + 1}.0}}\n')
    out_of_fold(runs, out, num_mirrorings=1, steps=[], device="cpu", workers=0)
    return out


def test_cases_out_of_fold_are_shown_on_the_grid_of_the_store(tested: Path, stubs) -> None:
    page = tested.parent / "report.html"
    report_folder(tested, page)
    content = content_of(page)
    assert [case["id"] for case in content["cases"]] == ["c0", "c1", "c2"]
    assert all(case["pictures"] for case in content["cases"])
    (arm,) = content["arms"]
    assert arm["truth"]["box"][:2] == [pytest.approx(box, abs=1e-3) for box in stubs.OBJECTS]
    assert arm["predictions"]["box"][:2] == [pytest.approx(b, abs=1e-3) for b in stubs.OBJECTS]
    assert content["classes"] == ["class 0", "class 1"]
    text = page.read_text(encoding="utf-8")
    assert "fold 0 1" in text  # the last loss of each fold's curve
    assert "fold 1 2" in text


def test_without_the_store_the_tables_are_shown_alone(tested: Path) -> None:
    shutil.rmtree(tested.parent / "store")
    page = tested.parent / "report.html"
    report_folder(tested, page)
    assert not any(case["pictures"] for case in content_of(page)["cases"])
    assert "no pictures, the store of its runs is not where" in page.read_text(encoding="utf-8")


def test_folders_that_cannot_be_read_say_what_to_do(tested: Path) -> None:
    page = tested.parent / "report.html"
    run = tested / "fold_0"
    with pytest.raises(DataError, match=r"fold_0: a run without predictions; run `vb-detect pred"):
        report_folder(run, page)
    with pytest.raises(DataError, match="nothing: does not exist"):
        report_folder(tested / "nothing", page)
    (tested / "out_of_fold.json").write_text("{}")
    with pytest.raises(DataError, match=r"out_of_fold\.json: says nothing of runs"):
        report_folder(tested, page)
    (tested / "out_of_fold.json").unlink()
    with pytest.raises(DataError, match=r"neither manifest\.json nor out_of_fold\.json"):
        report_folder(tested, page)
    assert not page.exists()
