"""Tables of nodule centres: names of columns, separators, spaces, errors by line."""

from pathlib import Path

import numpy as np
import pytest

from voxelbridge.core.data.dataset import RawDataset
from voxelbridge.core.data.dicom import find_series
from voxelbridge.core.data.image_io import read_image, write_image
from voxelbridge.core.data.volume import Grid, Volume, edges_to_world
from voxelbridge.core.errors import DataError
from voxelbridge.detect.check import check_dataset
from voxelbridge.detect.convert.csv_boxes import convert

FLIPPED = np.array([[0.0, 0.0, -1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
GRID = Grid.from_parts(
    (20, 24, 28), (2.0, 1.0, 1.0), directions=FLIPPED, origin_mm=(10.0, 20.0, 30.0)
)
CENTRE = edges_to_world([10.0, 12.0, 14.0], GRID)  # of the image
X, Y, Z = (float(value) for value in CENTRE)
BOX = [[8.0, 8.0, 10.0, 12.0, 16.0, 18.0]]  # 8 mm around it


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("seriesuid,coordX,coordY,coordZ,diameter_mm", f"a,{X},{Y},{Z},8"),
        ("\ufeffCase ID,X,Y,Z,Diameter (mm)", f"a.nii.gz,{X},{Y},{Z},8"),
        ("name;centerX;centerY;centerZ;diameter", f"a;{X};{Y};{Z};8,0".replace(".", ",")),
        ("image\tcx\tcy\tcz\tw\th\td", f"sub/a_0000.nii.gz\t{X}\t{Y}\t{Z}\t8\t8\t8"),
        ("pid,x,y,z,diameter_x,diameter_y,diameter_z", f"a,{X},{Y},{Z},8,8,8"),
        ("id,x_mm,y_mm,z_mm,size_x,size_y,size_z", f"a,{X},{Y},{Z},8,8,8"),
        (
            "scan,xmin,xmax,ymin,ymax,zmin,zmax",
            f"a,{X - 4},{X + 4},{Y - 4},{Y + 4},{Z - 4},{Z + 4}",
        ),
        ("case_id,label,z0,y0,x0,z1,y1,x1", "a,0,8,8,10,12,16,18"),
    ],
)
def test_usual_tables_give_the_same_box(tmp_path: Path, header: str, row: str) -> None:
    path = _table(tmp_path, f"{header}\r\n{row}\r\n\r\n")
    report = convert(path, tmp_path / "out", workers=0)
    assert (report.num_cases, report.num_objects) == (2, 1)
    assert report.notes == ["1 images have no row: cases without objects"]
    cases = RawDataset.open(tmp_path / "out").cases
    np.testing.assert_allclose(cases[0].read_objects(GRID).boxes, BOX, atol=1e-4)
    assert len(cases[1].read_objects(GRID).boxes) == 0


@pytest.mark.parametrize(
    ("space", "row"),
    [
        ("ras", f"a,{-X},{-Y},{Z},8,8,8"),
        ("voxel", "a,13.5,11.5,9.5,8,8,4"),  # a whole number is the middle of a voxel
    ],
)
def test_spaces(tmp_path: Path, space: str, row: str) -> None:
    path = _table(tmp_path, f"case,x,y,z,w,h,d\n{row}\n")
    convert(path, tmp_path / "out", workers=0, space=space)  # pyright: ignore[reportArgumentType]
    case = RawDataset.open(tmp_path / "out").cases[0]
    np.testing.assert_allclose(case.read_objects(GRID).boxes, BOX, atol=1e-4)


def test_spheres_on_oblique_grids_are_boxed_tightly(tmp_path: Path) -> None:
    turn = np.deg2rad(30)
    axes = np.array([[0, -np.sin(turn), np.cos(turn)], [0, np.cos(turn), np.sin(turn)], [1, 0, 0]])
    grid = Grid.from_parts((20, 24, 28), (2.0, 1.0, 1.0), directions=axes)
    x, y, z = edges_to_world([10.0, 12.0, 14.0], grid)
    write_image(tmp_path / "a.nii.gz", Volume(np.zeros((1, *grid.shape), np.int16), grid))
    (tmp_path / "t.csv").write_text(f"case,x,y,z,diameter\na,{x},{y},{z},8\n")
    convert(tmp_path, tmp_path / "out", workers=0)
    case = RawDataset.open(tmp_path / "out").cases[0]
    found = case.read_objects(case.read_image().grid)
    np.testing.assert_allclose(found.boxes, BOX, atol=1e-3)


def test_changed_rows_are_converted_again(tmp_path: Path) -> None:
    path = _table(tmp_path, f"case,x,y,z,diameter,label\na,{X},{Y},{Z},8,solid\n")
    convert(path, tmp_path / "out", workers=0)
    path.write_text(path.read_text() + f"b,{X},{Y},{Z},8,calcified\n")
    convert(path, tmp_path / "out", workers=0)
    raw = RawDataset.open(tmp_path / "out")
    assert raw.class_names == ("calcified", "solid")
    labels = [case.read_objects(GRID).labels.tolist() for case in raw.cases]
    assert labels == [[1], [0]]


def test_labels_name_the_classes_and_patients_the_groups(tmp_path: Path) -> None:
    text = f"case,patient,x,y,z,diameter,label\na,p1,{X},{Y},{Z},8,solid\n"
    path = _table(tmp_path, text + f"a,p1,{X},{Y},{Z},4,ground glass\nb,p1,,,,,\n")
    convert(path, tmp_path / "out", workers=0)
    raw = RawDataset.open(tmp_path / "out")
    assert raw.class_names == ("ground glass", "solid")
    assert raw.cases[0].read_objects(GRID).labels.tolist() == [1, 0]
    assert len(raw.cases[1].read_objects(GRID).boxes) == 0
    assert raw.groups == {"a": "p1", "b": "p1"}


@pytest.mark.parametrize(
    ("labels", "names", "classes"),
    [
        (("0", "2"), ("0", "1", "2"), [0, 2]),
        (("1", "2"), ("1", "2"), [0, 1]),
        (("10", "9"), ("9", "10"), [1, 0]),
        (("0", "0"), ("object",), [0, 0]),
    ],
)
def test_whole_numbers_from_0_stay_what_they_are(
    tmp_path: Path, labels: tuple[str, str], names: tuple[str, ...], classes: list[int]
) -> None:
    rows = "".join(f"a,{X},{Y},{Z},8,{label}\n" for label in labels)
    convert(_table(tmp_path, f"case,x,y,z,diameter,label\n{rows}"), tmp_path / "out", workers=0)
    raw = RawDataset.open(tmp_path / "out")
    assert raw.class_names == names
    assert raw.cases[0].read_objects(GRID).labels.tolist() == classes


def test_boxes_over_the_border_are_cut_and_those_outside_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corner = edges_to_world([0.5, 0.5, 0.5], GRID)
    rows = f"a,{corner[0]},{corner[1]},{corner[2]},20\nb,900,0,0,5\n"
    report = convert(_table(tmp_path, f"case,x,y,z,diameter\n{rows}"), tmp_path / "out", workers=0)
    case = RawDataset.open(tmp_path / "out").cases[0]
    boxes = case.read_objects(GRID).boxes
    np.testing.assert_allclose(boxes, [[0, 0, 0, 5.5, 10.5, 10.5]], atol=1e-4)
    assert len(report.failures) == 1
    assert "case b: nodules.csv: line 3: centre" in capsys.readouterr().err


def test_rows_without_an_image_are_one_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "".join(f"{name},{X},{Y},{Z},8\n" for name in ("a", "gone", "lost"))
    report = convert(_table(tmp_path, f"case,x,y,z,diameter\n{rows}"), tmp_path / "out", workers=0)
    assert report.num_cases == 2
    assert "2 cases have no image: gone, lost" in capsys.readouterr().err


def test_dicom_series_are_found_by_uid(tmp_path: Path, shared: Path) -> None:
    folder = shared / "data" / "mr_prostate_dicom" / "t2w_tra"
    (series,) = find_series(folder).volumes
    assert series.origin_id is not None
    x, y, z = edges_to_world([10.5, 200.0, 190.0], series.grid)
    path = tmp_path / "t.csv"
    uid = series.origin_id.removeprefix("dicom:")
    path.write_text(f"seriesuid,coordX,coordY,coordZ,diameter_mm\n{uid},{x},{y},{z},10\n")
    convert(path, tmp_path / "out", workers=0, images=folder)
    raw = RawDataset.open(tmp_path / "out")
    assert raw.origins == {series.case_id: (series.origin_id,)}
    image = raw.cases[0].read_image()
    assert image.grid.agrees_with(series.grid)
    (box,) = raw.cases[0].read_objects(image.grid).boxes
    np.testing.assert_allclose((box[:3] + box[3:]) / 2, [10.5, 200.0, 190.0], atol=1e-2)
    np.testing.assert_allclose((box[3:] - box[:3]) * series.grid.spacing_mm, 10.0, atol=1e-3)


def test_real_lesion_is_boxed_around_its_mask(tmp_path: Path, shared: Path) -> None:
    folder = shared / "data" / "ct_lung_nodule"
    mask = read_image(folder / "nodule_seg.nrrd")
    inside = np.argwhere(mask.array[0] > 0)
    tight = np.concatenate([inside.min(axis=0), inside.max(axis=0) + 1.0])
    corners = edges_to_world([tight[:3], tight[3:]], mask.grid)
    low, high = corners.min(axis=0), corners.max(axis=0)
    numbers = ",".join(str(value) for value in (*(low + high) / 2, *(high - low)))
    (tmp_path / "t.csv").write_text(f"image,x,y,z,w,h,d\nct.nrrd,{numbers}\n")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "ct.nrrd").symlink_to(folder / "ct.nrrd")
    convert(tmp_path, tmp_path / "out", workers=0)
    case = RawDataset.open(tmp_path / "out").cases[0]
    boxes = case.read_objects(case.read_image().grid).boxes
    np.testing.assert_allclose(boxes, [tight], atol=1e-3)


def test_what_is_written_passes_the_checks(tmp_path: Path) -> None:
    path = _table(tmp_path, f"case,x,y,z,diameter\na,{X},{Y},{Z},8\na,{X},{Y},{Z},6\n")
    convert(path, tmp_path / "out", workers=0)
    findings = check_dataset(tmp_path / "out", deep=False, workers=0)
    assert [finding for finding in findings if finding.severity == "error"] == []


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "empty; expected a header"),
        ("x,y,z,diameter\n1,2,3,4\n", "no column for the case"),
        ("case,x,y,diameter\na,1,2,4\n", "expected x, y, z with diameter_mm"),
        ("case,x,y,z,diameter\na,1,2,3,4\nb,1,2\n", "line 3: 3 fields, the header 5"),
        ("case,x,y,z,diameter\na,1,2,three,4\n", "line 2: 'three' is not a finite number"),
        ("case,x,y,z,diameter\na,1,2,nan,4\n", "line 2: 'nan' is not a finite number"),
        ("case,x,y,z,diameter\na,1,2,,4\n", "line 2: '' is not a finite number"),
        ("case,x,y,z,diameter\na,1,2,3,0\n", "line 2: size or diameter"),
        ("case,z0,y0,x0,z1,y1,x1\na,5,5,5,6,6,2\n", "line 2: end must lie behind start"),
        ("case,x,y,z,z,diameter\na,1,2,3,3,4\n", "columns z are there twice"),
        ("case,x,y,z,diameter\n,1,2,3,4\n", "line 2: no case"),
        ("case,x,y,z,diameter\nq,1,2,3,4\n", "none of its 1 cases is an image"),
        ("case,x,y,z,diameter,label\na,1,2,3,4,\na,1,2,3,4,k\n", "some have none"),
    ],
)
def test_wrong_tables_are_named_by_line(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(DataError, match=match):
        convert(_table(tmp_path, text), tmp_path / "out", workers=0)


def _table(folder: Path, text: str) -> Path:
    for name in "ab":
        volume = Volume(np.zeros((1, *GRID.shape), np.int16), GRID)
        write_image(folder / "images" / f"{name}_0000.nii.gz", volume)
    path = folder / "nodules.csv"
    path.write_bytes(text.encode())
    return path
