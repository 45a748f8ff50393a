"""PN9: arrays, lists, a table of boxes with inclusive ends."""

from pathlib import Path

import numpy as np
import pytest

from voxelbridge.core.data.dataset import RawDataset
from voxelbridge.core.errors import DataError
from voxelbridge.detect.convert.pn9 import convert

HEADER = "pid,nodule_class,xmin,xmax,ymin,ymax,zmin,zmax,nodule_id,center_x,center_y,center_z\n"


def test_release_becomes_a_data_set(tmp_path: Path) -> None:
    src = _download(tmp_path / "src")
    report = convert(src, tmp_path / "out", workers=2)
    assert (report.num_cases, report.num_objects, report.failures) == (4, 4, [])
    raw = RawDataset.open(tmp_path / "out")
    assert [case.case_id for case in raw.test_cases] == ["00204"]
    assert raw.splits == ({"train": ("00021", "00022"), "val": ("00103",)},)
    case = raw.cases[0]
    image = case.read_image()
    assert image.array.dtype == np.uint8
    assert image.array.shape == (1, 8, 9, 10)
    assert image.grid.spacing_mm == (1.0, 1.0, 1.0)
    assert image.array[0, 3, 4, 5] == 3 * 90 + 4 * 10 + 5 - 256
    objects = case.read_objects(image.grid)
    # inclusive ends, one slice thick, and overlapping boxes both survive
    assert objects.boxes.tolist() == [[2, 3, 4, 3, 7, 9], [1, 2, 3, 5, 8, 10]]
    assert len(raw.cases[1].read_objects(image.grid).boxes) == 0


def test_boxes_beyond_the_volume_are_cut_or_dropped_with_a_note(tmp_path: Path) -> None:
    src = _download(tmp_path / "src")
    with (src / "train_anno.csv").open("a") as stream:
        stream.write("22,CN,8,15,0,3,0,1,7,0,0,0\n22,CN,80,90,0,3,0,1,8,0,0,0\n")
    report = convert(src, tmp_path / "out", workers=0)
    assert report.notes == [
        "00022: 1 boxes lie outside the volume and were dropped",
        "00022: 1 boxes were cut at the border of the volume",
    ]
    case = RawDataset.open(tmp_path / "out").cases[1]
    assert case.read_objects(case.read_image().grid).boxes.tolist() == [[0, 0, 8, 2, 4, 10]]


def test_cut_off_and_missing_arrays_cost_their_case_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = _download(tmp_path / "src")
    whole = (src / "npy" / "00022_zoom.npy").read_bytes()
    (src / "npy" / "00022_zoom.npy").write_bytes(whole[:-50])
    (src / "npy" / "00103_zoom.npy").unlink()
    report = convert(src, tmp_path / "out", workers=0)
    assert (report.num_cases, len(report.failures)) == (2, 2)
    told = capsys.readouterr().err
    assert "val.txt: 1 scans have no array: 00103" in told
    assert "00022_zoom.npy: not a whole array file" in told


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    src = _download(tmp_path / "src")
    np.save(src / "npy" / "00022_zoom.npy", np.array([{"a": 1}], dtype=object))
    report = convert(src, tmp_path / "out", workers=0)
    assert len(report.failures) == 1


def test_wrong_layouts_say_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no PID_zoom\.npy below it \(JPEG slices are not read\)"):
        convert(tmp_path, tmp_path / "out")
    src = _download(tmp_path / "src")
    (src / "val.txt").unlink()
    with pytest.raises(DataError, match=r"expected one val\.txt below it, found none"):
        convert(src, tmp_path / "out")
    (src / "val.txt").write_text("00103\n")
    (src / "train_anno.csv").write_text(HEADER + "21,CN,9,4,3,6,2,2,0,0,0,0\n")
    with pytest.raises(DataError, match=r"train_anno\.csv: line 2: inverted box"):
        convert(src, tmp_path / "out")
    (src / "train_anno.csv").write_text("pid,center_x\n")
    (src / "test_anno.csv").unlink()
    with pytest.raises(DataError, match="no table with the columns pid, zmin"):
        convert(src, tmp_path / "out")


def _download(src: Path) -> Path:
    (src / "npy").mkdir(parents=True)
    array = np.arange(720, dtype=np.int64).astype(np.uint8).reshape(1, 8, 9, 10)
    for number, pid in enumerate(("00021", "00022", "00103", "00204")):
        np.save(src / "npy" / f"{pid}_zoom.npy", array if number % 2 == 0 else array[0])
    (src / "train.txt").write_text("00021\n00022\n\n")
    (src / "val.txt").write_text("00103\r\n")
    (src / "test.txt").write_text("00204\n")
    (src / "train_anno.csv").write_text(
        HEADER
        + "21,3SN,4,8,3,6,2,2,0,0,0,0\n21,CN,3,9,2,7,1,4,1,0,0,0\n103,CN,0,0,0,0,0,0,2,0,0,0\n"
    )
    (src / "test_anno.csv").write_text(
        HEADER + "204,CN,1,2,1,2,1,2,3,0,0,0\n103,CN,0,0,0,0,0,0,2,0,0,0\n"
    )
    return src
