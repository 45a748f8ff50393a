"""Prediction from a DICOM folder, with a stand-in for the network."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from voxelbridge.core.data.normalize import ZScore
from voxelbridge.core.data.preprocess import DEFAULT_RESAMPLING
from voxelbridge.core.errors import DataError
from voxelbridge.detect import predict_cases as module
from voxelbridge.detect.detections import Detections


@pytest.fixture
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = SimpleNamespace(
        channel_names=("CT",),
        class_names=("nodule",),
        spacing_mm=(2.0, 1.0, 1.0),
        normalization=(ZScore(),),
        resampling=DEFAULT_RESAMPLING,
    )

    def one_box(*_: object, **__: object) -> Detections:
        box = torch.tensor([[1.0, 1.0, 1.0, 3.0, 3.0, 3.0]])
        return Detections(box, torch.tensor([0.5]), torch.tensor([0]))

    monkeypatch.setattr(module, "_load_ensemble", lambda _: ([], plan))
    monkeypatch.setattr(module, "predict_volume", one_box)


@pytest.mark.usefixtures("_stand_in")
def test_dicom_series_are_predicted_and_refused_ones_reported(
    tmp_path: Path, shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    series = shared / "data" / "mr_prostate_dicom" / "adc"
    (tmp_path / "images" / "bad").mkdir(parents=True)
    (tmp_path / "images" / "good").mkdir()
    for number, path in enumerate(sorted(series.iterdir())):
        for place in ("good", "bad") if number != 9 else ("good",):
            raw = path.read_bytes()
            # another series: the last digit of its UID
            raw = raw if place == "good" else raw.replace(b"251833954", b"251833955")
            (tmp_path / "images" / place / path.name).write_bytes(raw)
    out = tmp_path / "out"
    with pytest.raises(DataError, match="1 DICOM series or files were refused; the 1 cases"):
        module.predict_cases([tmp_path], [tmp_path / "images"], out)
    assert "series bad" in capsys.readouterr().err
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["cases"] == {"good": [str(tmp_path / "images" / "good")]}
    assert "gap" in manifest["refused"][0]
    assert (out / "good.json").is_file()
    assert (out / "good.png").is_file()
    assert len((out / "predictions.csv").read_text().splitlines()) == 2
