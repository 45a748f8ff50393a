"""3D Slicer markups read back: our own boxes exactly, and what people do to them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from voxelbridge.core.data.dataset import RawDataset
from voxelbridge.core.data.image_io import write_image
from voxelbridge.core.data.volume import Grid, Volume
from voxelbridge.core.errors import DataError
from voxelbridge.detect.convert.slicer import convert, read_markups, roi_box
from voxelbridge.detect.outputs import write_slicer_markups

NAMES = ("benign", "malignant 2")
BOXES = np.array([[1.25, 2.5, 3.0, 6.0, 9.125, 12.0], [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]])


def grids() -> dict[str, Grid]:
    turn = np.deg2rad(20)
    oblique = np.array(
        [[0, -np.sin(turn), np.cos(turn)], [0, np.cos(turn), np.sin(turn)], [1, 0, 0]]
    )
    flipped = np.array([[0.0, 0.0, -1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    permuted = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]])
    parts = {"upright": None, "flipped": flipped, "permuted": permuted, "oblique": oblique}
    return {
        name: Grid.from_parts(
            (10, 12, 14), (2.5, 0.7, 0.8), directions=axes, origin_mm=(-120.0, 33.0, 700.0)
        )
        for name, axes in parts.items()
    }


@pytest.mark.parametrize("name", ["upright", "flipped", "permuted", "oblique"])
def test_our_predictions_come_back_exactly(tmp_path: Path, name: str) -> None:
    grid = grids()[name]
    _write_predictions(tmp_path / "p" / "a.mrk.json", grid)
    _write_image(tmp_path / "images" / "a_0000.nii.gz", grid)
    report = convert(
        tmp_path / "p", tmp_path / "out", workers=0, images=tmp_path / "images", class_names=NAMES
    )
    assert (report.num_objects, report.failures, report.notes) == (2, [], [])
    raw = RawDataset.open(tmp_path / "out")
    assert raw.class_names == NAMES
    objects = raw.cases[0].read_objects(raw.cases[0].read_image().grid)
    np.testing.assert_allclose(objects.boxes, BOXES, atol=1e-3)
    assert objects.labels.tolist() == [1, 0]


def test_ras_and_lps_are_the_same_box(tmp_path: Path) -> None:
    grid = grids()["oblique"]
    path = tmp_path / "a.mrk.json"
    _write_predictions(path, grid)
    content = json.loads(path.read_text())
    for markup in content["markups"]:
        x, y, z = markup["center"]
        a = markup["orientation"]
        markup |= {"center": [-x, -y, z], "orientation": [*(-v for v in a[:6]), *a[6:]]}
        markup["coordinateSystem"] = "RAS"
    (tmp_path / "b.mrk.json").write_text(json.dumps(content))
    for roi, other in zip(
        *(read_markups(tmp_path / f"{n}.mrk.json")[0] for n in "ab"), strict=True
    ):
        np.testing.assert_allclose(roi_box(other, grid), roi_box(roi, grid), atol=1e-9)


def test_rotated_rois_become_upright_boxes_with_a_note(tmp_path: Path) -> None:
    _write_image(tmp_path / "a.nii.gz", _plain())
    turn = np.deg2rad(45)
    axes = [np.cos(turn), -np.sin(turn), 0, np.sin(turn), np.cos(turn), 0, 0, 0, 1]
    _write_markups(tmp_path / "a.mrk.json", [_roi([10, 10, 10], [4, 4, 6], orientation=axes)])
    report = convert(tmp_path, tmp_path / "out", workers=0)
    assert report.notes == ["a: 1 rotated ROIs became the upright boxes around them"]
    case = RawDataset.open(tmp_path / "out").cases[0]
    half = 2 * np.sqrt(2)
    expected = [[7.5, 10.5 - half, 10.5 - half, 13.5, 10.5 + half, 10.5 + half]]
    np.testing.assert_allclose(case.read_objects(_plain()).boxes, expected, atol=1e-4)


def test_files_belong_to_images_by_name_prefix_or_folder(tmp_path: Path) -> None:
    for name in ("a", "a1", "b", "empty", "unseen"):
        _write_image(tmp_path / f"{name}.nii.gz", _plain())
    roi = _roi([10, 10, 10], [4, 4, 4])
    _write_markups(tmp_path / "a_R-1.mrk.json", [roi])
    _write_markups(tmp_path / "a_R-2.mrk.json", [roi])
    _write_markups(tmp_path / "a1.mrk.json", [roi])
    _write_markups(tmp_path / "b" / "R.mrk.json", [roi])
    _write_markups(tmp_path / "empty.mrk.json", [{"type": "Fiducial", "controlPoints": []}])
    report = convert(tmp_path, tmp_path / "out", workers=0)
    raw = RawDataset.open(tmp_path / "out")
    counts = {case.case_id: len(case.read_objects(_plain()).boxes) for case in raw.cases}
    assert counts == {"a": 2, "a1": 1, "b": 1, "empty": 0}
    assert report.notes == [
        "empty: 1 markups of type Fiducial were passed over",
        "1 images have no .mrk.json file and were left out",
    ]


def test_a_corrected_file_is_converted_again(tmp_path: Path) -> None:
    for name in "ab":
        _write_image(tmp_path / f"{name}.nii.gz", _plain())
        _write_markups(tmp_path / f"{name}.mrk.json", [_roi([10, 10, 10], [4, 4, 4])])
    convert(tmp_path, tmp_path / "out", workers=0)
    _write_markups(tmp_path / "a.mrk.json", [_roi([10, 10, 10], [4, 4, 6])])
    convert(tmp_path, tmp_path / "out", workers=0)
    cases = RawDataset.open(tmp_path / "out").cases
    boxes = [case.read_objects(_plain()).boxes[0].tolist() for case in cases]
    assert [box[3] - box[0] for box in boxes] == [6, 4]


def test_labels_lose_their_score_and_new_rois_take_the_only_class(tmp_path: Path) -> None:
    path = tmp_path / "a.mrk.json"
    texts = ["nodule 0.873", "nodule", "ROI 2 mm 1.000", "R-1", "", "R_1-1"]
    _write_markups(path, [_roi([1, 1, 1], [1, 1, 1], label=text) for text in texts])
    labels = [roi.label for roi in read_markups(path)[0]]
    assert labels == ["nodule", "nodule", "ROI 2 mm", None, None, None]
    _write_markups(path, [_roi([1, 1, 1], [1, 1, 1], label="R-1") | {"name": "cyst"}])
    assert [roi.label for roi in read_markups(path)[0]] == ["cyst"]


def test_unnamed_and_unknown_classes_fail_their_case(tmp_path: Path) -> None:
    for name in "abc":
        _write_image(tmp_path / f"{name}.nii.gz", _plain())
    for name, label in (("a", "cyst"), ("b", "R"), ("c", "tumor")):
        _write_markups(tmp_path / f"{name}.mrk.json", [_roi([9, 9, 9], [2, 2, 2], label=label)])
    report = convert(tmp_path, tmp_path / "out", workers=0, class_names=("cyst", "tumour"))
    assert report.num_cases == 1
    assert "ROI 0 (unnamed): name it after its class: cyst, tumour" in report.failures[0]
    assert "ROI 0 (tumor): unknown class" in report.failures[1]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"size": [1, 2]}, "size is .* expected 3 numbers"),
        ({"size": [1, 2, 0]}, "must be positive"),
        ({"orientation": [1, 0, 0, 1, 0, 0, 0, 0, 1]}, "no rotation"),
        ({"coordinateSystem": "XYZ"}, "coordinate system 'XYZ'"),
        ({"insideOut": True}, "inside out"),
        ({"coordinateUnits": "um"}, "units 'um'"),
    ],
)
def test_wrong_rois_are_named(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    _write_markups(tmp_path / "a.mrk.json", [_roi([1, 1, 1], [1, 1, 1]) | change])
    with pytest.raises(DataError, match=rf"a\.mrk\.json: markup 0: .*{match}"):
        read_markups(tmp_path / "a.mrk.json")


def test_roi_that_was_never_placed_is_passed_over_and_positions_may_be_in_the_point(
    tmp_path: Path,
) -> None:
    never = _roi([1, 1, 1], [1, 1, 1])
    never["controlPoints"][0]["positionStatus"] = "undefined"
    point = _roi([4, 5, 6], [1, 1, 1])
    del point["center"]
    _write_markups(tmp_path / "a.mrk.json", [never, point])
    rois, notes = read_markups(tmp_path / "a.mrk.json")
    assert [roi.centre_mm.tolist() for roi in rois] == [[4, 5, 6]]
    assert notes == ["1 markups of type ROI without a position were passed over"]


def test_wrong_layouts_say_what_is_expected(tmp_path: Path) -> None:
    _write_image(tmp_path / "a.nii.gz", _plain())
    with pytest.raises(DataError, match=r"expected CASE\.mrk\.json per image"):
        convert(tmp_path, tmp_path / "out")
    _write_markups(tmp_path / "z.mrk.json", [])
    with pytest.raises(DataError, match=r"z\.mrk\.json: belongs to no image"):
        convert(tmp_path, tmp_path / "out")


def _plain() -> Grid:
    return Grid.from_parts((20, 20, 20), (1.0, 1.0, 1.0))


def _write_image(path: Path, grid: Grid) -> None:
    write_image(path, Volume(np.zeros((1, *grid.shape), np.int16), grid))


def _write_predictions(path: Path, grid: Grid) -> None:
    write_slicer_markups(
        path,
        grid=grid,
        boxes=BOXES,
        scores=np.array([0.9, 0.123456]),
        labels=np.array([1, 0]),
        class_names=NAMES,
    )


def _write_markups(path: Path, markups: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"markups": markups}))


def _roi(
    centre: list[float],
    size: list[float],
    *,
    orientation: list[float] | None = None,
    label: str = "R-1",
) -> dict[str, Any]:
    return {
        "type": "ROI",
        "coordinateSystem": "LPS",
        "coordinateUnits": "mm",
        "roiType": "Box",
        "center": centre,
        "orientation": orientation or [1, 0, 0, 0, 1, 0, 0, 0, 1],
        "size": size,
        "controlPoints": [{"label": label, "position": centre, "positionStatus": "defined"}],
    }
