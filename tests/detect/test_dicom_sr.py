"""Structured reports, read back by pydicom and highdicom."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from voxelbridge.core.data.dicom import find_series
from voxelbridge.core.data.image_io import write_image
from voxelbridge.core.data.normalize import ZScore
from voxelbridge.core.data.preprocess import DEFAULT_RESAMPLING
from voxelbridge.core.data.volume import Grid, Volume, box_corners_to_world
from voxelbridge.core.errors import ConfigError
from voxelbridge.detect import dicom_sr
from voxelbridge.detect import predict_cases as module
from voxelbridge.detect.detections import Detections

BOXES = np.array([[2.5, 30, 40, 6, 60.25, 80], [0.0, 0, 0, 1, 512, 3], [7.0, 8, 9, 8, 10, 12]])
SCORES = np.array([0.25, 0.8906250596046448, 0.5])


@pytest.mark.parametrize("name", ["ct_dicom_series/dicom", "mr_prostate_dicom/adc"])
def test_a_report_holds_the_boxes_in_patient_coordinates(
    shared: Path, tmp_path: Path, name: str
) -> None:
    pytest.importorskip("highdicom")
    from highdicom.sr import srread
    from pydicom import dcmread

    volume = find_series(shared / "data" / name).volumes[0]
    for file in ("a.sr.dcm", "again.sr.dcm"):
        dicom_sr.write_structured_report(
            tmp_path / file, volume, boxes=BOXES, scores=SCORES, labels=np.array([1, 0, 1]),
            class_names=["cyst", "n" * 80], weights=["0" * 64], max_boxes=2,
        )  # fmt: skip
    source = dcmread(volume.files[0], stop_before_pixels=True)
    report = srread(tmp_path / "a.sr.dcm")
    assert report.SOPClassUID == "1.2.840.10008.5.1.4.1.1.88.34"  # Comprehensive 3D SR
    if source.StudyInstanceUID:  # it was removed from one of them
        assert report.StudyInstanceUID == source.StudyInstanceUID
    assert report.StudyInstanceUID
    assert report.PatientID == source.PatientID
    assert report.SOPInstanceUID == dcmread(tmp_path / "again.sr.dcm").SOPInstanceUID
    content: Any = report.content  # a MeasurementReport
    groups = content.get_volumetric_roi_measurement_groups()
    assert len(groups) == 2
    for group, row in zip(groups, (1, 2), strict=True):
        surface = group.roi
        assert surface.frame_of_reference_uid == source.FrameOfReferenceUID
        series = surface.source_series_for_segmentation
        assert series.value == (source.SeriesInstanceUID or series.value)
        corners = np.concatenate(surface.graphic_data)
        ends = box_corners_to_world(BOXES[row : row + 1], volume.grid)[0]
        np.testing.assert_allclose(corners.min(axis=0), ends.min(axis=0), atol=1e-3)
        np.testing.assert_allclose(corners.max(axis=0), ends.max(axis=0), atol=1e-3)
        for polygon in surface.graphic_data:
            assert polygon.shape == (5, 3)
            assert np.array_equal(polygon[0], polygon[-1])
        measurement = group.get_measurements()[0]
        assert measurement.name.meaning == "Detection score"
        assert abs(measurement.value - SCORES[row]) < 1e-9
        assert group.finding_type.meaning == ("cyst" if row == 1 else "n" * 64)
    raw = (tmp_path / "a.sr.dcm").read_bytes()
    assert b"voxelbridge-detect" in raw
    assert f"weights sha256 {'0' * 64}".encode() in raw
    referenced = [
        item.ReferencedSOPInstanceUID
        for study in (
            *report.get("CurrentRequestedProcedureEvidenceSequence", []),
            *report.get("PertinentOtherEvidenceSequence", []),
        )
        for series in study.ReferencedSeriesSequence
        for item in series.ReferencedSOPSequence
    ]
    assert len(set(referenced)) == len(volume.files)


def test_predict_writes_reports_for_dicom_alone_and_says_so(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pytest.importorskip("highdicom")
    plan = SimpleNamespace(
        channel_names=("CT",), class_names=("nodule",), spacing_mm=(4.0, 3.0, 3.0),
        normalization=(ZScore(),), resampling=DEFAULT_RESAMPLING,
    )  # fmt: skip

    def one_box(*_: object, **__: object) -> Detections:
        box = torch.tensor([[1.0, 1.0, 1.0, 3.0, 3.0, 3.0]])
        return Detections(box, torch.tensor([0.5]), torch.tensor([0]))

    monkeypatch.setattr(
        module, "load_ensemble", lambda *_, **__: module.Ensemble([], plan, {})  # type: ignore[arg-type]
    )  # fmt: skip
    monkeypatch.setattr(module, "predict_volume", one_box)
    voxels = np.ones((1, 4, 5, 6), dtype=np.int16)
    write_image(tmp_path / "plain.nii", Volume(voxels, Grid.from_parts((4, 5, 6), (9.0, 6.0, 6.0))))
    series = shared / "data" / "ct_dicom_series" / "dicom"
    out = tmp_path / "out"
    module.predict_cases([], [tmp_path / "plain.nii", series], out, dicom_sr=True, pictures=False)
    assert "no DICOM series, so no structured report: plain" in capsys.readouterr().out
    (report,) = out.glob("*.dcm")
    case = json.loads((out / f"{report.name.removesuffix('.sr.dcm')}.json").read_text())
    from highdicom.sr import srread

    content: Any = srread(report).content  # a MeasurementReport
    (group,) = content.get_volumetric_roi_measurement_groups()
    corners = np.concatenate(group.roi.graphic_data)
    box_mm = np.array(case["boxes"][0]["box_mm"])
    np.testing.assert_allclose(
        (corners.min(axis=0) + corners.max(axis=0)) / 2, box_mm[:3], atol=0.01
    )


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(dicom_sr, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"install voxelbridge-detect\[dicom-sr\]"):
        module.predict_cases([tmp_path], [tmp_path], tmp_path / "out", dicom_sr=True)
