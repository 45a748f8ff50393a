"""CTA-A: tables with paths, three subsets, components of masks."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from voxelbridge.core.data.dataset import RawDataset
from voxelbridge.core.data.image_io import write_image
from voxelbridge.core.data.volume import Grid, Volume
from voxelbridge.core.errors import DataError
from voxelbridge.detect.convert.cta_a import convert, subset_of

SHAPE = (12, 14, 16)
BOXES = [[0, 0, 0, 3, 4, 5], [6, 7, 8, 7, 8, 9], [9, 10, 1, 12, 14, 4]]
COLUMNS = ("subset", "id", "hospital", "cta_img_file", "aneurysm_seg_file")


def test_boxes_and_split(tmp_path: Path) -> None:
    src = _download(tmp_path / "src")
    report = convert(src, tmp_path / "out", workers=0)
    raw = RawDataset.open(tmp_path / "out")
    assert (report.num_cases, report.num_objects, report.failures) == (8, 24, [])
    assert report.notes == ["2 external images are not part of this data set"]
    assert [case.case_id for case in raw.test_cases] == ["T001", "T002"]
    assert [case.case_id for case in raw.cases] == [f"P00{n}" for n in range(1, 7)]
    case = raw.cases[0]
    objects = case.read_objects(case.read_image().grid)
    assert objects.boxes.tolist() == BOXES
    assert raw.splits is not None
    assert sorted(n for fold in raw.splits for n in fold["val"]) == [c.case_id for c in raw.cases]


def test_external_test_set_is_a_data_set_of_its_own(tmp_path: Path) -> None:
    src = _download(tmp_path / "src")
    report = convert(src, tmp_path / "out", workers=0, test_set="external")
    raw = RawDataset.open(tmp_path / "out")
    assert [case.case_id for case in raw.test_cases] == ["E001", "E002"]
    assert (raw.cases, raw.splits) == ((), None)
    assert len(report.notes) == 2


def test_treated_aneurysm_is_an_aneurysm_and_touching_values_are_one(tmp_path: Path) -> None:
    mask = np.zeros(SHAPE, dtype=np.uint8)
    mask[1:3, 1:3, 1:3], mask[1:3, 1:3, 3:5], mask[8, 8, 8] = 1, 2, 3
    src = _download(tmp_path / "src")
    _write(src / "ane_seg" / "P001.nii.gz", mask)
    convert(src, tmp_path / "out", workers=0)
    case = RawDataset.open(tmp_path / "out").cases[0]
    objects = case.read_objects(case.read_image().grid)
    assert objects.boxes.tolist() == [[1, 1, 1, 3, 3, 5], [8, 8, 8, 9, 9, 9]]


def test_healthy_case_stays(tmp_path: Path) -> None:
    src = _download(tmp_path / "src")
    _write(src / "ane_seg" / "P002.nii.gz", np.zeros(SHAPE, np.uint8))
    report = convert(src, tmp_path / "out", workers=0)
    assert (report.num_cases, report.num_objects) == (8, 21)


def test_missing_file_flipped_grid_and_escaping_path_cost_their_case(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = _download(tmp_path / "src", extra=[("train", "P900", "hos_1", "../x.nii.gz", "y.nii.gz")])
    _write(tmp_path / "x.nii.gz", np.zeros(SHAPE, np.int16))
    (src / "cta_img" / "P003.nii.gz").unlink()
    # the same array with x running the other way is another place in the patient
    _write(src / "ane_seg" / "P004.nii.gz", np.ones(SHAPE, np.uint8), x=-1.0)
    report = convert(src, tmp_path / "out", workers=2)
    lines = capsys.readouterr().err.splitlines()
    assert report.num_cases == 6
    assert len(lines) == len(report.failures) == 3
    assert "P003" in lines[0]
    assert "cta_img/P003.nii.gz' is no file" in lines[0]
    assert "differs from image grid" in lines[1]
    assert "lies outside" in lines[2]


def test_several_tables_in_folders_are_joined(tmp_path: Path) -> None:
    _download(tmp_path / "src" / "internal", external=False)
    rows = [("external test", "E9", "hos_7", "img\\E9.nii.gz", "seg\\E9.nii.gz")]
    root = tmp_path / "src" / "external"
    _table(root / "list.csv", rows)
    _write(root / "img" / "E9.nii.gz", np.zeros(SHAPE, np.int16))
    _write(root / "seg" / "E9.nii.gz", np.ones(SHAPE, np.uint8))
    assert convert(tmp_path / "src", tmp_path / "in", workers=0).num_cases == 8
    report = convert(tmp_path / "src", tmp_path / "ex", workers=0, test_set="external")
    assert (report.num_cases, report.num_objects) == (1, 1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no table"),
        ([("somewhere", "P1", "h", "a.nii.gz", "b.nii.gz")], "line 2: subset 'somewhere'"),
        (
            [("train", "P1", "h", "a", "b"), ("eval", "P1", "h", "a", "b")],
            "line 3: case P1 .* befo",
        ),
        ([("train", "", "h", "a.nii.gz", "b.nii.gz")], "line 2: no id"),
    ],
)
def test_broken_table_is_refused_with_its_line(
    tmp_path: Path, rows: list[tuple[str, ...]], message: str
) -> None:
    _table(tmp_path / "src" / "list.csv", rows)
    with pytest.raises(DataError, match=message):
        convert(tmp_path / "src", tmp_path / "out", workers=0)


@pytest.mark.parametrize(
    ("text", "subset"),
    [
        ("train", "train"),
        ("Internal_Train", "train"),
        ("eval", "internal"),
        ("internal_test", "internal"),
        ("test", "internal"),
        ("External Test", "external"),
        ("", None),
    ],
)
def test_subset_names(text: str, subset: str | None) -> None:
    assert subset_of(text) == subset


def _download(root: Path, *, external: bool = True, extra: Sequence[tuple[str, ...]] = ()) -> Path:
    subsets = {f"P00{n}": "train" for n in range(1, 7)}
    subsets |= {"T001": "internal_test", "T002": "internal_test"}
    subsets |= {"E001": "external_test", "E002": "external_test"} if external else {}
    mask = np.zeros(SHAPE, dtype=np.uint8)
    for z0, y0, x0, z1, y1, x1 in BOXES:
        mask[z0:z1, y0:y1, x0:x1] = 1
    rows = [
        (subset, name, "hos_1", f"cta_img/{name}.nii.gz", f"ane_seg/{name}.nii.gz")
        for name, subset in subsets.items()
    ]
    for name in subsets:
        _write(root / "cta_img" / f"{name}.nii.gz", np.zeros(SHAPE, np.int16))
        _write(root / "ane_seg" / f"{name}.nii.gz", mask)
    _table(root / "aneurysm_seg.csv", [*rows, *extra])
    return root


def _table(path: Path, rows: Sequence[Sequence[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([COLUMNS, *rows])


def _write(path: Path, array: NDArray[np.generic], *, x: float = 1.0) -> None:
    directions = np.array([[0.0, 0.0, x], [0.0, -1.0, 0.0], [-1.0, 0.0, 0.0]])
    grid = Grid.from_parts(SHAPE, (0.4, 0.46, 0.46), directions=directions)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, Volume(array[None], grid))
