"""RibFrac: extracted zips, spreadsheets of fracture types, official validation as the test set."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from voxelbridge.core.data.dataset import RawDataset
from voxelbridge.core.data.image_io import write_image
from voxelbridge.core.data.raw_objects import RawObjects
from voxelbridge.core.data.volume import Grid, Volume
from voxelbridge.core.errors import DataError
from voxelbridge.detect.convert.ribfrac import convert

SHAPE = (10, 12, 14)
BOXES = {1: [0, 0, 0, 2, 3, 4], 2: [3, 4, 5, 6, 8, 10], 5: [8, 9, 10, 10, 12, 14]}
CODES = {1: 2, 2: -1, 5: 4}


def test_every_fracture_is_class_0_by_default(tmp_path: Path) -> None:
    src = _download(tmp_path / "src")
    report = convert(src, tmp_path / "out", workers=0)
    raw = RawDataset.open(tmp_path / "out")
    assert (report.num_cases, report.num_objects, report.failures) == (6, 15, [])
    assert raw.class_names == ("fracture",)
    objects = _objects(raw, "RibFrac1")
    assert objects.boxes.tolist() == list(BOXES.values())
    assert objects.ids.tolist() == [1, 2, 5]
    assert objects.labels.tolist() == [0, 0, 0]


def test_types_are_the_codes_and_undefined_comes_last(tmp_path: Path) -> None:
    src = _download(tmp_path / "src")
    convert(src, tmp_path / "out", workers=0, classes="types")
    raw = RawDataset.open(tmp_path / "out")
    assert raw.class_names == ("displaced", "non-displaced", "buckle", "segmental", "undefined")
    assert _objects(raw, "RibFrac1").labels.tolist() == [1, 4, 3]


def test_official_validation_is_the_test_set_and_healthy_cases_stay(tmp_path: Path) -> None:
    src = _download(tmp_path / "src")
    convert(src, tmp_path / "out", workers=0)
    raw = RawDataset.open(tmp_path / "out")
    assert [case.case_id for case in raw.test_cases] == ["RibFrac421"]
    assert {case.case_id for case in raw.cases} == {f"RibFrac{n}" for n in (1, 2, 3, 4, 301)}
    assert len(_objects(raw, "RibFrac2").boxes) == 0
    assert raw.splits is not None
    validated = [name for fold in raw.splits for name in fold["val"]]
    assert sorted(validated) == sorted(case.case_id for case in raw.cases)


def test_unlabelled_test_images_are_left_out_with_a_note(tmp_path: Path) -> None:
    src = _download(tmp_path / "src")
    _write(src / "ribfrac-test-images" / "RibFrac501-image.nii.gz", np.zeros(SHAPE, np.int16))
    report = convert(src, tmp_path / "out", workers=0)
    assert report.num_cases == 6
    assert report.notes == ["1 test images have no labels and were not converted"]


def test_rows_and_voxels_that_do_not_meet_are_reported(tmp_path: Path) -> None:
    src = _download(tmp_path / "src", rows={1: {1: 2, 2: 3, 9: 1}, 3: {1: 0, 2: 1, 5: 1}})
    report = convert(src, tmp_path / "out", workers=0, classes="types")
    raw = RawDataset.open(tmp_path / "out")
    assert sorted(report.notes) == [
        "RibFrac1: labels 5 have no row, kept as fractures",
        "RibFrac1: labels 9 have a row and no voxel, left out",
        "RibFrac3: labels 1 have the code 0 (no fracture), left out",
    ]
    assert _objects(raw, "RibFrac1").labels.tolist() == [1, 2, 4]
    assert _objects(raw, "RibFrac3").ids.tolist() == [2, 5]


def test_mac_files_missing_files_and_doubled_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = _download(tmp_path / "src")
    (src / "Part1" / "._RibFrac1-image.nii.gz").write_bytes(b"\x00\x05\x16\x07")
    (src / "Part1" / "RibFrac3-image.nii.gz").unlink()
    (src / "ribfrac-train-labels-1" / "Part1" / "RibFrac4-label.nii.gz").unlink()
    _write(src / "copy" / "RibFrac301-label.nii.gz", _labels())
    report = convert(src, tmp_path / "out", workers=2)
    assert report.num_cases == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(report.failures) == 3
    assert "RibFrac3-image.nii.gz" in lines[0]
    assert "RibFrac4-label.nii.gz" in lines[1]
    assert "two files of one name" in lines[2]


def test_without_spreadsheets_labels_alone_are_fractures(tmp_path: Path) -> None:
    src = _download(tmp_path / "src")
    for path in src.glob("*.csv"):
        path.unlink()
    report = convert(src, tmp_path / "out", workers=0)
    assert (report.num_cases, report.num_objects) == (6, 15)
    assert len(report.notes) == 6
    raw = RawDataset.open(tmp_path / "out")
    assert [case.case_id for case in raw.test_cases] == ["RibFrac421"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("public_id,label_id\nRibFrac1,1\n", "no column label_code"),
        ("public_id,label_id,label_code\nRibFrac1,one,2\n", "line 2"),
        ("public_id,label_id,label_code\nRibFrac1,0,0\nRibFrac1,1,7\n", "line 3: label_code 7"),
        ("public_id,label_id,label_code\nRibFrac1,1,1\nRibFrac1,1,2\n", "line 3: .* two codes"),
        ("public_id,label_id,label_code\n../x,1,1\n", "line 2: public_id"),
    ],
)
def test_broken_spreadsheet_is_refused_with_its_line(
    tmp_path: Path, text: str, message: str
) -> None:
    src = _download(tmp_path / "src")
    (src / "ribfrac-train-info-1.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        convert(src, tmp_path / "out", workers=0)


def test_options_of_an_earlier_call_must_agree(tmp_path: Path) -> None:
    src = _download(tmp_path / "src")
    convert(src, tmp_path / "out", workers=0)
    with pytest.raises(DataError, match="same options"):
        convert(src, tmp_path / "out", workers=0, classes="types")


def _objects(raw: RawDataset, case_id: str) -> RawObjects:
    (case,) = [case for case in (*raw.cases, *raw.test_cases) if case.case_id == case_id]
    return case.read_objects(case.read_image().grid)


def _labels(boxes: Mapping[int, Sequence[int]] = BOXES) -> NDArray[np.uint8]:
    labels = np.zeros(SHAPE, dtype=np.uint8)
    for number, (z0, y0, x0, z1, y1, x1) in boxes.items():
        labels[z0:z1, y0:y1, x0:x1] = number
    return labels


def _download(root: Path, rows: Mapping[int, Mapping[int, int]] | None = None) -> Path:
    tables: dict[str, list[str]] = {"train-info-1": [], "train-info-2": [], "val-info": []}
    for number in (1, 2, 3, 4, 301, 421):
        table = "val-info" if number > 420 else "train-info-2" if number > 300 else "train-info-1"
        part = {"train-info-1": "1", "train-info-2": "2"}.get(table)
        images = root / (f"Part{part}" if part else "ribfrac-val-images")
        labels = root / (
            f"ribfrac-train-labels-{part}/Part{part}" if part else "ribfrac-val-labels"
        )
        healthy = number == 2
        _write(images / f"RibFrac{number}-image.nii.gz", np.zeros(SHAPE, np.int16))
        _write(labels / f"RibFrac{number}-label.nii.gz", _labels({} if healthy else BOXES))
        codes = (rows or {}).get(number, {} if healthy else CODES)
        tables[table].append(f"RibFrac{number},0,0")
        tables[table] += [f"RibFrac{number},{label},{code}" for label, code in codes.items()]
    for name, lines in tables.items():
        text = "\n".join(["public_id,label_id,label_code", *lines]) + "\n"
        (root / f"ribfrac-{name}.csv").write_text(text)
    return root


def _write(path: Path, array: NDArray[np.generic]) -> None:
    directions = np.array([[0.0, 0.0, -1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])  # x flipped
    grid = Grid.from_parts(SHAPE, (1.25, 0.74, 0.74), directions=directions)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, Volume(array[None], grid))
