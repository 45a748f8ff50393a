"""MONAI data lists: box modes and spaces, sections and folds, what is named when it is wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from voxelbridge.core.data.dataset import RawDataset
from voxelbridge.core.data.image_io import write_image
from voxelbridge.core.data.volume import Grid, Volume, box_corners_to_world
from voxelbridge.core.errors import DataError
from voxelbridge.detect.convert.monai_json import BoxMode, Space, boxes_to_edges, convert

# x and y run to the right and the front, as in many NIfTI files
RAS_LIKE = np.array([[0.0, 0.0, -1.0], [0.0, -1.0, 0.0], [1.0, 0.0, 0.0]])
GRID = Grid.from_parts(
    (10, 12, 14), (2.0, 1.0, 0.5), directions=RAS_LIKE, origin_mm=(30.0, 40.0, -50.0)
)
EDGES = np.array([[2.0, 3.0, 4.0, 5.0, 9.0, 12.5]])


@pytest.mark.parametrize("mode", ["cccwhd", "xyzxyz", "xyzwhd", "xxyyzz"])
@pytest.mark.parametrize("space", ["lps", "ras", "voxel"])
def test_every_mode_and_space_gives_the_same_box(mode: BoxMode, space: Space) -> None:
    written = _as_monai(EDGES[0], mode, space)
    edges = boxes_to_edges(np.array([written]), GRID, mode=mode, space=space)
    np.testing.assert_allclose(edges, EDGES, atol=1e-9)


def test_list_becomes_a_data_set(tmp_path: Path) -> None:
    path = _list(tmp_path)
    report = convert(path, tmp_path / "out", workers=2, images=tmp_path / "images")
    assert (report.num_cases, report.num_objects, report.failures) == (4, 3, [])
    raw = RawDataset.open(tmp_path / "out")
    assert raw.class_names == ("class 0", "class 1")
    assert raw.splits == ({"train": ("a", "b"), "val": ("c",)},)
    assert [(case.case_id, case.has_labels) for case in raw.test_cases] == [("t", False)]
    objects = {case.case_id: case.read_objects(GRID) for case in raw.cases}
    np.testing.assert_allclose(objects["a"].boxes, np.repeat(EDGES, 2, axis=0), atol=1e-4)
    assert objects["a"].labels.tolist() == [1, 0]
    assert len(objects["b"].boxes) == 0


def test_folds_channels_and_folders_of_equal_names(tmp_path: Path) -> None:
    training = []
    for number in range(4):
        names = [f"images/p{number}/t1.nii.gz", f"images/p{number}/t2.nii.gz"]
        for name in names:
            write_image(tmp_path / name, _volume())
        training.append({"image": names, "box": [], "label": [], "fold": number % 2})
    (tmp_path / "list.json").write_text(json.dumps({"training": training}))
    convert(tmp_path, tmp_path / "out", workers=0)
    raw = RawDataset.open(tmp_path / "out")
    assert raw.channel_names == ("image0", "image1")
    assert raw.splits == (
        {"train": ("p1_t1", "p3_t1"), "val": ("p0_t1", "p2_t1")},
        {"train": ("p0_t1", "p2_t1"), "val": ("p1_t1", "p3_t1")},
    )


def test_missing_image_is_named_and_the_others_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _list(tmp_path)
    (tmp_path / "images" / "c.nii.gz").unlink()
    report = convert(path, tmp_path / "out", workers=0, images=tmp_path / "images")
    assert report.num_cases == 3
    assert "c.nii.gz is missing" in capsys.readouterr().err


def test_wrong_space_is_told_by_boxes_outside(tmp_path: Path) -> None:
    path = _list(tmp_path)
    report = convert(path, tmp_path / "out", workers=0, images=tmp_path / "images", space="ras")
    assert len(report.failures) == 2
    assert all("lies outside the image" in line for line in report.failures)
    report = convert(
        path, tmp_path / "other", workers=0, images=tmp_path / "images", box_mode="xyzxyz"
    )
    assert all("has no extent; is xyzxyz its mode?" in line for line in report.failures)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([], "no list 'training'"),
        ({"training": 3}, "'training' is not a list"),
        ({"training": [{"box": []}]}, r"training\[0\]: no 'image'"),
        ({"training": [{"image": "a.nii.gz"}]}, r"training\[0\]: no 'box'"),
        ({"training": [{"image": "a.nii.gz", "box": [[1, 2]]}]}, "six finite numbers"),
        ({"training": [{"image": "a.nii.gz", "box": [["x"] * 6]}]}, "six numbers"),
        ({"training": [{"image": "a", "box": [[1] * 6], "label": []}]}, "1 boxes, but 'label'"),
        ({"training": [{"image": "a", "box": [[1] * 6], "label": [-1]}]}, "whole numbers from 0"),
        ({"training": [{"image": "a", "box": []}] * 2}, "listed twice"),
    ],
)
def test_wrong_lists_are_named_by_entry(tmp_path: Path, content: Any, match: str) -> None:
    path = tmp_path / "list.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=match):
        convert(path, tmp_path / "out")


def _list(folder: Path) -> Path:
    for name in "abct":
        write_image(folder / "images" / f"{name}.nii.gz", _volume())
    box = _as_monai(EDGES[0], "cccwhd", "lps")
    content = {
        "training": [
            {"image": "a.nii.gz", "box": [box, box], "label": [1, 0]},
            {"image": "b.nii.gz", "box": [], "label": []},
        ],
        "validation": [{"image": "c.nii.gz", "box": [box], "label": [0]}],
        "testing": ["t.nii.gz"],
    }
    (folder / "dataset_fold0.json").write_text(json.dumps(content))
    return folder / "dataset_fold0.json"


def _volume() -> Volume:
    return Volume(np.zeros((1, *GRID.shape), dtype=np.int16), GRID)


def _as_monai(edges: np.ndarray, mode: str, space: str) -> list[float]:
    if space == "voxel":
        low, high = edges[2::-1], edges[:2:-1]
    else:
        corners = box_corners_to_world([edges], GRID)[0]
        corners = corners * ((-1, -1, 1) if space == "ras" else (1, 1, 1))
        low, high = corners.min(axis=0), corners.max(axis=0)
    written = {
        "cccwhd": [*(low + high) / 2, *(high - low)],
        "xyzxyz": [*low, *high],
        "xyzwhd": [*low, *(high - low)],
        "xxyyzz": np.stack([low, high], axis=1).ravel().tolist(),
    }
    return [float(value) for value in written[mode]]
