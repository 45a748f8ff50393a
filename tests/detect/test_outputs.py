"""Per-case outputs: world coordinates, 3D Slicer's form, pictures."""

import json
from pathlib import Path

import numpy as np

from voxelbridge.core.data.volume import Grid, boxes_from_world_mm, edges_to_world
from voxelbridge.detect.outputs import write_case_json, write_slicer_markups

DIRECTIONS = np.array([[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
GRID = Grid.from_parts((20, 24, 28), (2.0, 1.0, 0.5), directions=DIRECTIONS, origin_mm=(5, -7, 11))
BOXES = np.array([[2.0, 3, 4, 8, 9, 10], [10.0, 10, 10, 12.5, 20, 24]])
SCORES = np.array([0.25, 0.75])
LABELS = np.array([1, 0])
NAMES = ["nodule", "mass"]


def test_json_boxes_in_mm_lead_back_to_the_voxels(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_case_json(
        path, "a", grid=GRID, boxes=BOXES, scores=SCORES, labels=LABELS, class_names=NAMES
    )
    content = json.loads(path.read_text())
    assert [entry["class"] for entry in content["boxes"]] == ["mass", "nodule"]
    assert [entry["score"] for entry in content["boxes"]] == [0.25, 0.75]
    world = [entry["box_mm"] for entry in content["boxes"]]
    np.testing.assert_allclose(boxes_from_world_mm(world, GRID), BOXES, atol=1e-9)


def test_slicer_rois_have_the_corners_of_the_boxes(tmp_path: Path) -> None:
    path = tmp_path / "a.mrk.json"
    write_slicer_markups(
        path, grid=GRID, boxes=BOXES, scores=SCORES, labels=LABELS, class_names=NAMES
    )
    markups = json.loads(path.read_text())["markups"]
    assert [roi["controlPoints"][0]["label"] for roi in markups] == ["nodule 0.750", "mass 0.250"]
    for roi, box in zip(markups, BOXES[::-1], strict=True):
        axes = np.array(roi["orientation"]).reshape(3, 3)
        assert np.isclose(np.linalg.det(axes), 1.0)
        assert roi["locked"] is True
        assert roi["coordinateSystem"] == "LPS"
        signs = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, -1).T
        corners = np.array(roi["center"]) + (signs * np.array(roi["size"]) / 2) @ axes.T
        ends = edges_to_world(np.stack([box[:3], box[3:]]), GRID)
        np.testing.assert_allclose(corners.min(axis=0), ends.min(axis=0), atol=1e-9)
        np.testing.assert_allclose(corners.max(axis=0), ends.max(axis=0), atol=1e-9)


def test_slicer_files_are_capped_at_the_best_boxes(tmp_path: Path) -> None:
    path = tmp_path / "a.mrk.json"
    write_slicer_markups(
        path, grid=GRID, boxes=BOXES, scores=SCORES, labels=LABELS, class_names=NAMES, max_boxes=1
    )
    markups = json.loads(path.read_text())["markups"]
    assert [roi["controlPoints"][0]["label"] for roi in markups] == ["nodule 0.750"]
