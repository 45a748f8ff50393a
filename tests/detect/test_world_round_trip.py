"""A box drawn in the world comes back to its place through preparing and predicting."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelbridge.core.data.case_store import CaseStore
from voxelbridge.core.data.image_io import read_image
from voxelbridge.core.data.mapping import StoredToOriginal
from voxelbridge.core.data.normalize import ZScore
from voxelbridge.core.data.preprocess import (
    DEFAULT_RESAMPLING,
    at_spacing,
    crop_mapping,
    preprocess,
)
from voxelbridge.core.data.volume import (
    Grid,
    Volume,
    box_corners_to_world,
    boxes_from_world_mm,
)
from voxelbridge.detect import predict_cases as module
from voxelbridge.detect.convert.raw_writer import RawDatasetWriter, WorldBoxes
from voxelbridge.detect.detections import Detections
from voxelbridge.detect.plan_request import parse_request
from voxelbridge.detect.predict_cases import to_original
from voxelbridge.detect.prepare import prepare

TOLERANCE_MM = 0.01
SPACINGS = [(1.0, 1.0, 1.0), (5.0, 0.7, 0.7), (0.93, 2.1, 1.7), (3.3, 3.3, 0.81)]


def identity(boxes: np.ndarray) -> Detections:
    """A detector's answer that is `boxes`, in float32 as detectors give it."""
    count = len(boxes)
    return Detections(
        torch.from_numpy(np.asarray(boxes, dtype=np.float32)),
        torch.linspace(0.9, 0.1, count),
        torch.zeros(count, dtype=torch.int64),
    )


def corners(boxes: np.ndarray, grid: Grid) -> np.ndarray:
    """World corners of boxes in an order that does not depend on the axes."""
    found = np.round(box_corners_to_world(boxes, grid), 6)
    return np.stack([rows[np.lexsort(np.round(rows, 1).T)] for rows in found])


def world_boxes(volume: Volume) -> np.ndarray:
    """World-aligned boxes (cx, cy, cz, wx, wy, wz) well inside what is not zero."""
    mapping = crop_mapping(volume)
    inner = np.array([[0.2, 0.25, 0.3], [0.5, 0.6, 0.45]])
    edges = mapping.stored_grid.shape * inner
    box = np.concatenate([edges[0] + 0.13, edges[1] + 0.71])[None]
    ends = box_corners_to_world(box, mapping.stored_grid)[0]
    low, high = ends.min(axis=0), ends.max(axis=0)
    first = np.concatenate([(low + high) / 2, high - low])
    second = np.concatenate([low + 3.3, [2.2, 3.1, 4.7]])
    return np.stack([first, second])


@pytest.mark.parametrize("spacing", SPACINGS, ids=str)
def test_all_24_orientations_come_back(shared: Path, spacing: tuple[float, float, float]) -> None:
    files = sorted((shared / "data" / "orientations").glob("*.nii.gz"))
    assert len(files) == 24
    drawn: np.ndarray | None = None
    for path in files:
        volume = read_image(path)
        drawn = world_boxes(volume) if drawn is None else drawn  # the same place in all files
        boxes = boxes_from_world_mm(drawn, volume.grid)
        mapping = crop_mapping(volume, boxes=boxes)
        prepared = preprocess(volume, mapping, spacing_mm=spacing, normalization=[ZScore()]).mapping
        found = to_original(identity(prepared.boxes_to_stored(boxes)), prepared)
        difference = corners(found.boxes, volume.grid) - corners(boxes, volume.grid)
        assert np.abs(difference).max() < TOLERANCE_MM, path.name
        ends = box_corners_to_world(found.boxes, volume.grid)
        low, high = ends.min(axis=1), ends.max(axis=1)
        again = np.concatenate([(low + high) / 2, high - low], axis=1)
        np.testing.assert_allclose(again, drawn, atol=TOLERANCE_MM, err_msg=path.name)


@pytest.mark.slow
@pytest.mark.long
def test_the_commands_bring_all_24_back(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted((shared / "data" / "orientations").glob("*.nii.gz"))
    writer = RawDatasetWriter(
        tmp_path / "raw", name="turned", channel_names=["MR"], class_names=["lesion"]
    )
    drawn = world_boxes(read_image(files[0]))
    for path in files:
        writer.add_case(path.name[:3], [path], objects=WorldBoxes(drawn, [0, 0]))
    writer.finish(None)
    request = parse_request("fixed", spacing_mm=(1.3, 0.9, 2.1))
    store_path = tmp_path / "store"
    prepare(tmp_path / "raw", store_path, request=request, workers=0)
    store = CaseStore.open(store_path)
    plan = SimpleNamespace(
        channel_names=("MR",), class_names=("lesion",), spacing_mm=(1.3, 0.9, 2.1),
        normalization=(ZScore(),), resampling=DEFAULT_RESAMPLING,
    )  # fmt: skip
    names = iter(sorted(path.name[:3] for path in files))

    def stored_boxes(_: object, image: np.ndarray, **__: object) -> Detections:
        record = store.record(next(names))
        assert image.shape[1:] == tuple(record.shape)[-3:]
        return identity(record.boxes)

    monkeypatch.setattr(
        module, "load_ensemble", lambda *_, **__: module.Ensemble([], plan, {})  # type: ignore[arg-type]
    )  # fmt: skip
    monkeypatch.setattr(module, "predict_volume", stored_boxes)
    out = tmp_path / "out"
    module.predict_cases([], [tmp_path / "raw" / "imagesTr"], out, pictures=False)
    for path in files:
        found = json.loads((out / f"{path.name[:3]}.json").read_text())["boxes"]
        world = np.array([row["box_mm"] for row in found])
        np.testing.assert_allclose(world, drawn, atol=TOLERANCE_MM, err_msg=path.name)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_oblique_grid_and_crop_comes_back(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(1, 1200, size=3))
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))  # also left-handed
    grid = Grid.from_parts(
        shape, rng.uniform(0.3, 8.0, size=3).tolist(), directions=rotation,
        origin_mm=rng.uniform(-900, 900, size=3).tolist(),
    )  # fmt: skip
    whole = StoredToOriginal.build(grid)
    target = np.array(whole.reorientation.target_shape)
    low = rng.integers(0, target)
    high = low + 1 + rng.integers(0, target - low)
    mapping = at_spacing(
        StoredToOriginal.build(grid, crop_box=[*low, *high]), rng.uniform(0.3, 8.0, size=3).tolist()
    )
    ends = np.sort(rng.uniform(low, high, size=(5, 2, 3)), axis=1)
    in_file = mapping.reorientation.inverse().apply_boxes(np.clip(ends, low, high).reshape(-1, 6))
    kept = (in_file[:, 3:] - in_file[:, :3] > 1e-3).all(axis=1)
    boxes = in_file[kept]
    found = to_original(identity(mapping.boxes_to_stored(boxes)), mapping)
    assert len(found.boxes) == len(boxes)
    moved = np.abs(box_corners_to_world(found.boxes, grid) - box_corners_to_world(boxes, grid))
    assert moved.max(initial=0.0) < TOLERANCE_MM
