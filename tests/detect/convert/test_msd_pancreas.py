"""MSD Pancreas: the layout of Task07_Pancreas, its split, its small components, its traps."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split

from voxelbridge.core.data.dataset import RawDataset
from voxelbridge.core.data.image_io import write_image
from voxelbridge.core.data.volume import Grid, Volume, reorientation_to_lps
from voxelbridge.core.errors import DataError
from voxelbridge.detect.convert.msd_pancreas import convert, drop_small

SHAPE = (8, 20, 24)
SPACING = (2.5, 0.8, 0.8)
TUMOUR_BOXES = [[1, 2, 3, 4, 7, 9], [5, 10, 12, 6, 15, 16]]


def test_boxes_classes_split_and_origins(tmp_path: Path) -> None:
    src = _task(tmp_path / "Task07_Pancreas", count=10)
    report = convert(src, tmp_path / "out", workers=0)
    raw = RawDataset.open(tmp_path / "out")
    assert (report.num_cases, report.num_objects, report.failures) == (10, 20, [])
    assert (len(raw.cases), len(raw.test_cases)) == (7, 3)
    assert raw.class_names == ("tumour",)
    case = raw.cases[0]
    objects = case.read_objects(case.read_image().grid)
    assert objects.boxes.tolist() == TUMOUR_BOXES
    assert objects.labels.tolist() == [0, 0]
    origins = json.loads((tmp_path / "out" / "origins.json").read_text())
    assert origins[case.case_id] == [f"msd-pancreas:{case.case_id}"]
    assert len(json.loads((tmp_path / "out" / "groups.json").read_text())) == 10


def test_images_are_copied_byte_for_byte(tmp_path: Path) -> None:
    src = _task(tmp_path / "src", count=4)
    convert(src, tmp_path / "out", workers=0)
    for path in (src / "imagesTr").glob("pancreas_*"):
        name = path.name.replace(".nii.gz", "_0000.nii.gz")
        (copy,) = (tmp_path / "out").glob(f"imagesT?/{name}")
        assert copy.read_bytes() == path.read_bytes()


def test_split_is_nndetections_and_five_folds_hold_out_a_fifth(tmp_path: Path) -> None:
    src = _task(tmp_path / "src", count=20, tumour=False)
    convert(src, tmp_path / "out", workers=0)
    raw = RawDataset.open(tmp_path / "out")
    names = [f"pancreas_{number:03d}" for number in range(20)]
    train, test = train_test_split(names, test_size=0.3, random_state=0, shuffle=True)
    assert sorted(case.case_id for case in raw.test_cases) == sorted(test)
    assert raw.splits is not None
    assert [len(fold["val"]) for fold in raw.splits] == [3, 3, 3, 3, 2]
    assert sorted(name for fold in raw.splits for name in fold["val"]) == sorted(train)


def test_another_seed_gives_another_test_set_and_the_same_seed_the_same(tmp_path: Path) -> None:
    src = _task(tmp_path / "src", count=12, tumour=False)
    tests = []
    for run, seed in enumerate((0, 0, 3)):
        convert(src, tmp_path / f"out{run}", seed=seed, workers=0)
        tests.append({c.case_id for c in RawDataset.open(tmp_path / f"out{run}").test_cases})
    assert tests[0] == tests[1] != tests[2]


def test_small_components_are_dropped_and_counted(tmp_path: Path) -> None:
    labels = _labels()
    labels[7, 18:20, 20:22] = 2  # 1.6 mm in plane
    src = _task(tmp_path / "src", count=2, labels={0: labels})
    report = convert(src, tmp_path / "out", workers=0)
    assert report.num_objects == 4
    assert report.notes == ["pancreas_000: 1 components below 3 mm left out"]
    again = convert(src, tmp_path / "all", workers=0, min_size_mm=0.0)
    assert again.num_objects == 5


def test_components_touching_at_a_corner_are_one_and_pancreas_is_none(tmp_path: Path) -> None:
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[0:2, 0:5, 0:5], labels[2:4, 5:10, 5:10] = 2, 2
    labels[5:8] = 1
    src = _task(tmp_path / "src", count=1, labels={0: labels})
    assert convert(src, tmp_path / "out", workers=0).num_objects == 1


def test_case_without_a_tumour_stays(tmp_path: Path) -> None:
    src = _task(tmp_path / "src", count=3, tumour=False)
    report = convert(src, tmp_path / "out", workers=0)
    assert (report.num_cases, report.num_objects) == (3, 0)


def test_mac_files_and_unlabelled_test_images_are_no_cases(tmp_path: Path) -> None:
    src = _task(tmp_path / "src", count=3)
    (src / "imagesTr" / "._pancreas_000.nii.gz").write_bytes(b"\x00\x05\x16\x07")
    (src / "labelsTr" / "._pancreas_000.nii.gz").write_bytes(b"\x00\x05\x16\x07")
    _write(src / "imagesTs" / "pancreas_900.nii.gz", np.zeros(SHAPE, np.int16))
    report = convert(src, tmp_path / "out", workers=0)
    assert report.num_cases == 3
    assert report.notes == ["1 images of imagesTs have no labels and were not converted"]


def test_missing_files_bad_labels_and_other_grids_cost_their_case_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strange = _labels()
    strange[0, 0, 0] = 7
    src = _task(tmp_path / "src", count=6, labels={4: strange}, declared=8)
    (src / "labelsTr" / "pancreas_001.nii.gz").unlink()
    _write(src / "labelsTr" / "pancreas_002.nii.gz", _labels()[:-1])
    report = convert(src, tmp_path / "out", workers=2)
    lines = capsys.readouterr().err.splitlines()
    assert report.num_cases == 3
    assert [line.removeprefix("error: ") for line in lines] == report.failures
    for number, reason in (
        (1, "no file in labelsTr"),
        (2, "differs from image grid"),
        (4, r"unknown labels [7]"),
        (6, "no file in imagesTr"),
        (7, "no file in imagesTr"),
    ):
        (line,) = [line for line in lines if f"pancreas_{number:03d}" in line]
        assert reason in line


def test_label_in_another_axis_order_is_brought_to_the_images(tmp_path: Path) -> None:
    src = _task(tmp_path / "src", count=1)
    volume = Volume(_labels()[None], _grid())
    _write_volume(
        src / "labelsTr" / "pancreas_000.nii.gz",
        reorientation_to_lps(volume.grid).apply_volume(volume),
    )
    convert(src, tmp_path / "out", workers=0)
    (case,) = RawDataset.open(tmp_path / "out").cases
    assert case.read_objects(case.read_image().grid).boxes.tolist() == TUMOUR_BOXES


def test_folder_without_the_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Task07_Pancreas"):
        convert(tmp_path, tmp_path / "out", workers=0)


def test_parent_folder_of_the_task_is_accepted(tmp_path: Path) -> None:
    _task(tmp_path / "src" / "Task07_Pancreas", count=2)
    assert convert(tmp_path / "src", tmp_path / "out", workers=0).num_cases == 2


def test_coarsest_axis_does_not_decide_what_is_small() -> None:
    instances = np.zeros((4, 10, 10), dtype=np.int32)
    instances[0, 0:4, 0:4] = 1  # 4 x 4 mm in plane, one slice of 2 mm
    instances[2:4, 6:8, 0:4] = 2  # 2 mm along y
    instances[0:3, 5:8, 5:8] = 3
    kept, num_small = drop_small(instances, (2.0, 1.0, 1.0), 3.0)
    assert num_small == 1
    assert np.array_equal(kept, np.where(instances == 3, 2, np.where(instances == 2, 0, instances)))


@settings(deadline=None, max_examples=20)
@given(
    spacing=st.tuples(*[st.floats(0.3, 5.0)] * 3),
    sizes=st.lists(st.tuples(*[st.integers(1, 4)] * 3), min_size=1, max_size=3),
    min_size=st.floats(0.0, 6.0),
)
def test_drop_small_equals_a_plain_loop(
    spacing: tuple[float, float, float], sizes: list[tuple[int, int, int]], min_size: float
) -> None:
    instances = np.zeros((6, 6, 18), dtype=np.int32)
    for number, (z, y, x) in enumerate(sizes):
        instances[:z, :y, number * 6 : number * 6 + x] = number + 1
    fine = [axis for axis in range(3) if axis != int(np.argmax(spacing))]
    kept = [
        number + 1
        for number, size in enumerate(sizes)
        if all(size[axis] * spacing[axis] >= min_size - 1e-3 for axis in fine)
    ]
    result, num_small = drop_small(instances, spacing, min_size)
    assert num_small == len(sizes) - len(kept)
    for new, old in enumerate(kept, start=1):
        assert np.array_equal(result == new, instances == old)
    assert int(result.max()) == len(kept)


def _grid() -> Grid:
    directions = np.array([[0.0, 0.0, 1.0], [0.0, -1.0, 0.0], [1.0, 0.0, 0.0]])  # y flipped
    return Grid.from_parts(SHAPE, SPACING, directions=directions, origin_mm=(3.0, -9.0, 40.0))


def _labels() -> NDArray[np.uint8]:
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[0:6, 1:16, 1:18] = 1
    for z0, y0, x0, z1, y1, x1 in TUMOUR_BOXES:
        labels[z0:z1, y0:y1, x0:x1] = 2
    return labels


def _task(
    root: Path,
    *,
    count: int,
    tumour: bool = True,
    labels: Mapping[int, NDArray[np.uint8]] | None = None,
    declared: int | None = None,
) -> Path:
    default = _labels() if tumour else np.zeros(SHAPE, dtype=np.uint8)
    rows = []
    for number in range(count):
        name = f"pancreas_{number:03d}.nii.gz"
        _write(root / "imagesTr" / name, np.full(SHAPE, number, dtype=np.int16))
        _write(root / "labelsTr" / name, (labels or {}).get(number, default))
    for number in range(declared or count):
        name = f"pancreas_{number:03d}.nii.gz"
        rows.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    description = {
        "name": "Pancreas",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "pancreas", "2": "cancer"},
        "training": rows,
        "test": ["./imagesTs/pancreas_900.nii.gz"],
    }
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def _write(path: Path, array: NDArray[np.generic]) -> None:
    grid = _grid()
    _write_volume(path, Volume(array[None], grid.cropped((0, 0, 0), array.shape)))


def _write_volume(path: Path, volume: Volume) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, volume)
