"""KiTS21: a file per instance and annotator, majority, overlaps, slices along the first axis."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from voxelbridge.core.data.dataset import RawDataset
from voxelbridge.core.data.foreground import boxes_from_instances
from voxelbridge.core.data.image_io import read_image, write_image
from voxelbridge.core.data.raw_objects import RawObjects
from voxelbridge.core.data.volume import Grid, Volume, reorientation_to_lps
from voxelbridge.core.errors import DataError
from voxelbridge.detect.convert.kits21 import Part, convert, draw, majority

SHAPE = (20, 16, 6)  # as read: z is the image's columns, the slices are the last axis
Box = tuple[int, int, int, int, int, int]


def test_majority_of_three_per_instance(tmp_path: Path) -> None:
    tumour = {
        1: _mask((2, 2, 1, 8, 8, 3)),
        2: _mask((3, 2, 1, 8, 9, 3)),
        3: _mask((2, 1, 0, 7, 8, 3)),
    }
    touching = _agreed(_mask((8, 2, 1, 12, 8, 3)))
    cyst = _agreed(_mask((15, 10, 4, 16, 11, 5)))
    kidney = _agreed(_mask((0, 0, 0, 18, 14, 6)))
    parts = {"tumor-1": tumour, "tumor-2": touching, "cyst-1": cyst, "kidney-1": kidney}
    report = convert(_data(tmp_path / "src", {0: parts}), tmp_path / "out", workers=0)
    assert (report.num_cases, report.num_objects, report.notes) == (1, 3, [])
    objects = _objects(tmp_path / "out", "case_00000")
    assert objects.boxes.tolist() == [
        [2, 2, 1, 8, 8, 3],
        [8, 2, 1, 12, 8, 3],  # touches the first and stays its own
        [15, 10, 4, 16, 11, 5],
    ]
    assert objects.labels.tolist() == [0, 0, 1]


def test_slice_axis_is_told_by_the_affine(tmp_path: Path) -> None:
    boxes = _agreed(_mask((2, 2, 1, 8, 8, 3)))
    convert(_data(tmp_path / "src", {0: {"tumor-1": boxes}}), tmp_path / "out", workers=0)
    case = RawDataset.open(tmp_path / "out").cases[0]
    volume = case.read_image()
    order = reorientation_to_lps(volume.grid)
    assert order.apply_grid(volume.grid).spacing_mm == pytest.approx((5.0, 0.8, 0.8))
    # head to foot slices 1..2 of 6 are the slices 3..4 counted from the feet
    boxes = order.apply_boxes(case.read_objects(volume.grid).boxes)
    assert boxes[0, [0, 3]].tolist() == [3, 5]


def test_fifteen_percent_are_held_out_by_case(tmp_path: Path) -> None:
    kidney = {"kidney-1": {1: _mask((0, 0, 0, 2, 2, 2))}}
    src = _data(tmp_path / "src", dict.fromkeys(range(20), kidney))
    report = convert(src, tmp_path / "out", workers=0)
    raw = RawDataset.open(tmp_path / "out")
    assert (len(raw.cases), len(raw.test_cases), report.num_objects) == (17, 3, 0)
    assert raw.splits is not None
    assert [len(fold["val"]) for fold in raw.splits] == [4, 4, 3, 3, 3]
    origins = (tmp_path / "out" / "origins.json").read_text()
    assert '"kits:case_00019"' in origins


def test_missing_annotations_are_noted_and_two_must_agree(tmp_path: Path) -> None:
    parts = {
        "tumor-1": {1: _mask((2, 2, 1, 8, 8, 3)), 3: _mask((4, 2, 1, 9, 8, 3))},
        "cyst-2": {2: _mask((12, 2, 1, 14, 8, 3))},
        "cyst-3": {n: _mask((n, 12, 1, n + 1, 14, 3)) for n in (1, 2, 3)},
    }
    report = convert(_data(tmp_path / "src", {0: parts}), tmp_path / "out", workers=0)
    assert report.notes == [
        "case_00000: tumor 1 has 2 annotations, expected 3",
        "case_00000: cyst 2 has 1 annotations, expected 3",
        "case_00000: cyst 3 has no voxel that most of its annotations share, left out",
    ]
    objects = _objects(tmp_path / "out", "case_00000")
    assert objects.boxes.tolist() == [[4, 2, 1, 8, 8, 3], [12, 2, 1, 14, 8, 3]]
    assert objects.labels.tolist() == [0, 1]


def test_object_inside_another_survives_and_the_loss_is_told(tmp_path: Path) -> None:
    parts = {
        "tumor-1": _agreed(_mask((5, 5, 2, 7, 7, 4))),
        "cyst-1": _agreed(_mask((4, 4, 1, 9, 9, 5))),
    }
    report = convert(_data(tmp_path / "src", {0: parts}), tmp_path / "out", workers=0)
    objects = _objects(tmp_path / "out", "case_00000")
    assert objects.boxes.tolist() == [[5, 5, 2, 7, 7, 4], [4, 4, 1, 9, 9, 5]]
    assert report.notes == [
        "case_00000: 8 of 100 voxels of cyst 1 also belong to tumor 1; it loses them"
    ]


def test_instance_equal_to_another_is_reported_and_left_out(tmp_path: Path) -> None:
    same = _agreed(_mask((5, 5, 2, 7, 7, 4)))
    parts = {"tumor-1": same, "tumor-2": same}
    report = convert(_data(tmp_path / "src", {0: parts}), tmp_path / "out", workers=0)
    assert report.num_objects == 1
    (note,) = report.notes
    assert "tumor 1 also belong to tumor 2; it vanishes" in note


def test_missing_image_annotation_and_other_grid_cost_their_case(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cyst = {"cyst-1": {1: _mask((0, 0, 0, 2, 2, 2))}}
    src = _data(tmp_path / "src", dict.fromkeys(range(5), cyst))
    (src / "data" / "case_00001" / "imaging.nii.gz").unlink()
    for path in (src / "data" / "case_00002" / "segmentations").iterdir():
        path.rename(path.with_name(f"._{path.name}"))
    _write(
        src / "data" / "case_00003" / "segmentations" / "cyst_instance-1_annotation-2.nii.gz",
        np.ones((20, 16, 7), dtype=np.uint8),
    )
    report = convert(src, tmp_path / "out", workers=2)
    lines = capsys.readouterr().err.splitlines()
    assert report.num_cases == 2
    assert len(lines) == len(report.failures) == 3
    assert "case_00001: no imaging.nii.gz" in lines[0]
    assert "case_00002" in lines[1]
    assert "no annotation" in lines[1]
    assert "differs from image grid" in lines[2]


def test_kits23_calls_the_folder_instances(tmp_path: Path) -> None:
    src = _data(tmp_path / "src", {0: {"cyst-1": {1: _mask((0, 0, 0, 2, 2, 2))}}})
    folder = src / "data" / "case_00000"
    (folder / "segmentations").rename(folder / "instances")
    (src / "data").rename(src / "dataset")
    assert convert(src, tmp_path / "out", workers=0).num_objects == 1


def test_folder_without_cases_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="case_00NNN"):
        convert(tmp_path, tmp_path / "out", workers=0)


def test_real_tumours_keep_their_boxes(shared: Path, tmp_path: Path) -> None:
    """Label files of KiTS19 taken apart into instance files give the boxes of the table."""
    path = shared / "data" / "kits19_labels" / "case_00021.nii.gz"
    volume = read_image(path)
    folder = tmp_path / "src" / "data" / "case_00021"
    (folder / "segmentations").mkdir(parents=True)
    (folder / "imaging.nii.gz").write_bytes(path.read_bytes())
    tumour = (volume.array == 2).astype(np.uint8)
    for annotation, shift in ((1, 0), (2, 0), (3, 3)):
        array = np.roll(tumour, shift, axis=2)
        name = f"tumor_instance-1_annotation-{annotation}.nii.gz"
        write_image(folder / "segmentations" / name, Volume(array, volume.grid))
    convert(tmp_path / "src", tmp_path / "out", workers=0)
    objects = _objects(tmp_path / "out", "case_00021")
    assert objects.boxes.tolist() == [[308, 243, 13, 356, 284, 19]]  # instances.csv


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=3))
def test_majority_equals_counting(votes: list[int]) -> None:
    annotations = [[bool(vote >> bit & 1) for bit in range(3)] for vote in votes]
    total = np.asarray(np.sum(annotations, axis=0), dtype=np.uint8)
    expected = [sum(row[bit] for row in annotations) / len(annotations) > 0.5 for bit in range(3)]
    assert majority(total, len(annotations)).tolist() == expected


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(*[st.integers(0, 5)] * 3, *[st.integers(1, 4)] * 3), min_size=1, max_size=5)
)
def test_drawn_map_loses_no_object_unnoticed(boxes: list[Box]) -> None:
    parts = []
    for number, (z, y, x, d, h, w) in enumerate(boxes):
        inside = (slice(z, z + d), slice(y, y + h), slice(x, x + w))
        parts.append(Part(f"tumor {number}", 0, inside, np.ones((d, h, w), dtype=bool)))
    canvas, notes = draw(parts, (9, 9, 9))
    seen = set(boxes_from_instances(canvas)[0].tolist())
    for number, part in enumerate(parts, start=1):
        whole = np.count_nonzero(canvas == number) == part.num_voxels
        told = [note for note in notes if f"voxels of {part.name} also" in note]
        assert len(told) == (0 if whole else 1)
        assert (number in seen) == (not told or "vanishes" not in told[0])
    union = np.zeros((9, 9, 9), dtype=bool)
    for part in parts:
        union[part.inside] |= part.mask
    assert np.array_equal(canvas > 0, union)


def _objects(out: Path, case_id: str) -> RawObjects:
    raw = RawDataset.open(out)
    (case,) = [case for case in (*raw.cases, *raw.test_cases) if case.case_id == case_id]
    return case.read_objects(case.read_image().grid)


def _agreed(mask: NDArray[np.uint8]) -> dict[int, NDArray[np.uint8]]:
    return {1: mask, 2: mask, 3: mask}


def _mask(box: Box) -> NDArray[np.uint8]:
    z0, y0, x0, z1, y1, x1 = box
    mask = np.zeros(SHAPE, dtype=np.uint8)
    mask[z0:z1, y0:y1, x0:x1] = 1
    return mask


def _data(root: Path, cases: Mapping[int, Mapping[str, Mapping[int, NDArray[np.uint8]]]]) -> Path:
    for number, parts in cases.items():
        folder = root / "data" / f"case_{number:05d}"
        _write(folder / "imaging.nii.gz", np.zeros(SHAPE, np.int16))
        _write(folder / "aggregated_MAJ_seg.nii.gz", np.ones(SHAPE, np.uint8))
        for part, annotations in parts.items():
            kind, instance = part.split("-")
            for annotation, mask in annotations.items():
                name = f"{kind}_instance-{instance}_annotation-{annotation}.nii.gz"
                _write(folder / "segmentations" / name, mask)
    return root


def _write(path: Path, array: NDArray[np.generic]) -> None:
    # KiTS: array axis 0 runs to the patient's left, 1 to the back, 2 from head to foot
    directions = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, -1.0]])
    grid = Grid.from_parts(array.shape, (0.8, 0.8, 5.0), directions=directions)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, Volume(array[None], grid))
