"""Raw data sets in the layouts people have."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from voxelbridge.core.data.dataset import RawDataset
from voxelbridge.core.data.image_io import write_image
from voxelbridge.core.data.volume import (
    Grid,
    Volume,
    boxes_to_world_mm,
    edges_to_world,
    reorientation_to_lps,
)
from voxelbridge.core.errors import DataError

SHAPE = (6, 7, 8)
ROTATED = np.array([[0.8, 0.6, 0.0], [0.6, -0.8, 0.0], [0.0, 0.0, 1.0]])[:, ::-1]
GRID = Grid.from_parts(SHAPE, (2.0, 1.0, 0.5), directions=-np.eye(3)[:, ::-1], origin_mm=(9, 8, 7))
NNUNET = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "organ": 1, "tumour": 2, "cyst": 3, "mass": [2, 3], "ignore": 4},
    "file_ending": ".nii.gz",
    "things": ["tumour", "cyst"],
    "stuff": ["organ"],
}
NNDETECTION = {
    "task": "Task001_Toy",
    "modalities": {"0": "CT"},
    "labels": {"0": "nodule", "1": "vessel"},
    "dim": 3,
}


def _json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _image(path: Path, array: np.ndarray | None = None, grid: Grid = GRID) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.zeros(grid.shape, dtype=np.int16) if array is None else array
    write_image(path, Volume(voxels[None], grid))


def _objects(folder: Path, case: int = 0):
    raw = RawDataset.open(folder).cases[case]
    return raw.read_objects(raw.read_image().grid)


def _semantic() -> np.ndarray:
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[:, 0] = 1
    labels[0:3, 2:4, 0:3] = 2
    labels[4:6, 2:4, 0:4] = 2
    labels[0:3, 5:7, 5:8] = 3
    labels[5, 6, 7] = 3  # one voxel: a speck
    return labels


def test_nnunet_semantic_map_gives_components_of_the_things(tmp_path: Path) -> None:
    _json(tmp_path / "dataset.json", NNUNET)
    _image(tmp_path / "imagesTr" / "a_0000.nii.gz")
    _image(tmp_path / "labelsTr" / "a.nii.gz", _semantic())
    data = RawDataset.open(tmp_path)
    assert data.class_names == ("tumour", "cyst")
    assert data.channel_names == ("CT",)
    objects = _objects(tmp_path)
    assert objects.labels.tolist() == [0, 0, 1]
    assert objects.boxes.tolist() == [
        [0, 2, 0, 3, 4, 3],
        [4, 2, 0, 6, 4, 4],
        [0, 5, 5, 3, 7, 8],
    ]
    assert objects.num_specks == 1
    assert objects.instances is not None
    assert [int(objects.instances[0, 2, 0]), int(objects.instances[0, 5, 5])] == [1, 3]
    semantic = data.cases[0].read_semantic(GRID)
    assert np.array_equal(semantic, _semantic())


def test_things_may_be_named_by_id(tmp_path: Path) -> None:
    _json(tmp_path / "dataset.json", {**NNUNET, "things": [3, "tumour"]})
    _image(tmp_path / "imagesTr" / "a_0000.nii.gz")
    assert RawDataset.open(tmp_path).class_names == ("cyst", "tumour")


def test_region_label_is_one_thing_of_several_ids(tmp_path: Path) -> None:
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[0:2, 0:3, 0:2], labels[0:2, 0:3, 2:4] = 2, 3
    _json(tmp_path / "dataset.json", {**NNUNET, "things": ["mass"]})
    _image(tmp_path / "imagesTr" / "a_0000.nii.gz")
    _image(tmp_path / "labelsTr" / "a.nii.gz", labels)
    objects = _objects(tmp_path)
    assert objects.boxes.tolist() == [[0, 0, 0, 2, 3, 4]]


def test_overlapping_things_are_boxed_whole_and_the_later_is_seen_in_the_map(
    tmp_path: Path,
) -> None:
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[0:4, 0:4, 0:4], labels[1:4, 1:3, 1:3] = 2, 3
    _json(tmp_path / "dataset.json", {**NNUNET, "things": ["mass", "cyst"]})
    _image(tmp_path / "imagesTr" / "a_0000.nii.gz")
    _image(tmp_path / "labelsTr" / "a.nii.gz", labels)
    objects = _objects(tmp_path)
    assert objects.boxes.tolist() == [[0, 0, 0, 4, 4, 4], [1, 1, 1, 4, 3, 3]]
    assert objects.instances is not None
    assert np.unique(objects.instances).tolist() == [0, 1, 2]


def test_min_voxels_of_the_data_set_decides_what_is_a_speck(tmp_path: Path) -> None:
    _json(tmp_path / "dataset.json", {**NNUNET, "min_voxels": 1})
    _image(tmp_path / "imagesTr" / "a_0000.nii.gz")
    _image(tmp_path / "labelsTr" / "a.nii.gz", _semantic())
    objects = _objects(tmp_path)
    assert len(objects.boxes) == 4
    assert objects.num_specks == 0


@pytest.mark.parametrize("layout", ["", "raw_splitted"])
def test_nndetection_instance_map_with_its_json(tmp_path: Path, layout: str) -> None:
    instances = np.zeros(SHAPE, dtype=np.uint8)
    instances[0, 0, 0], instances[2:4, 3:6, 1:2] = 2, 5
    _json(tmp_path / "dataset.json", NNDETECTION)
    images, labels = tmp_path / layout / "imagesTr", tmp_path / layout / "labelsTr"
    _image(images / "a_0000.nii.gz")
    _image(images / "b_0000.nii.gz")
    _image(labels / "a.nii.gz", instances)
    _json(labels / "a.json", {"instances": {"5": 0, "2": 1}, "note": "kept"})
    _image(labels / "b.nii.gz")
    _json(labels / "b.json", {"instances": {}})
    _image(tmp_path / layout / "imagesTs" / "c_0000.nii.gz")
    data = RawDataset.open(tmp_path)
    assert data.name == "Task001_Toy"
    assert data.class_names == ("nodule", "vessel")
    assert [case.case_id for case in data.cases] == ["a", "b"]
    assert [case.case_id for case in data.test_cases] == ["c"]
    assert not data.test_cases[0].has_labels
    objects = _objects(tmp_path)
    assert objects.ids.tolist() == [2, 5]
    assert objects.labels.tolist() == [1, 0]
    assert objects.boxes.tolist() == [[0, 0, 0, 1, 1, 1], [2, 3, 1, 4, 6, 2]]
    negative = _objects(tmp_path, 1)
    assert negative.boxes.shape == (0, 6)
    assert negative.labels.shape == (0,)
    assert negative.instances is not None
    assert not negative.instances.any()


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"1": 0}, "instances 3 of the label map are not in the JSON"),
        ({"1": 0, "3": 0, "7": 1, "9": 0}, "instances 7, 9 of the JSON file have no voxel"),
        ({"1": 0, "3": 2}, "instance 3 has class 2, expected 0 to 1"),
        ({"1": 0, "3": True}, "instance 3 has class True"),
        ({"1": 0, "x": 0}, "'x' is not a positive integer"),
        ([1, 3], "must be an object"),
    ],
)
def test_instance_json_that_does_not_fit_names_case_and_ids(
    tmp_path: Path, mapping: Any, message: str
) -> None:
    instances = np.zeros(SHAPE, dtype=np.uint8)
    instances[0, 0, 0], instances[2, 2, 2] = 1, 3
    _json(tmp_path / "dataset.json", NNDETECTION)
    _image(tmp_path / "imagesTr" / "a_0000.nii.gz")
    _image(tmp_path / "labelsTr" / "a.nii.gz", instances)
    _json(tmp_path / "labelsTr" / "a.json", {"instances": mapping})
    with pytest.raises(DataError, match=f"case a: .*{message}"):
        _objects(tmp_path)


def test_boxes_in_voxel_edges_and_in_world_mm_are_one_box(tmp_path: Path) -> None:
    box = [1.0, 2.5, 3.0, 4.0, 6.0, 7.25]
    world = boxes_to_world_mm([box], GRID)[0].tolist()
    _json(tmp_path / "dataset.json", NNDETECTION)
    _image(tmp_path / "imagesTr" / "a_0000.nii.gz")
    _json(
        tmp_path / "labelsTr" / "a.json",
        {"boxes": [{"label": 0, "box": box}, {"label": 1, "box_mm": world}]},
    )
    objects = _objects(tmp_path)
    assert objects.instances is None
    assert objects.labels.tolist() == [0, 1]
    np.testing.assert_allclose(objects.boxes, [box, box], atol=1e-4)


def test_world_box_on_an_oblique_grid_is_the_tight_box_of_its_corners(tmp_path: Path) -> None:
    grid = Grid.from_parts((30, 30, 30), (1, 1, 1), directions=ROTATED)
    centre = edges_to_world([15.0, 15.0, 15.0], grid)
    _json(tmp_path / "dataset.json", NNDETECTION)
    _image(tmp_path / "imagesTr" / "a_0000.nii.gz", grid=grid)
    box_mm = [*centre.tolist(), 10.0, 4.0, 6.0]
    _json(tmp_path / "labelsTr" / "a.json", {"boxes": [{"label": 0, "box_mm": box_mm}]})
    # widths (x, y, z) = (10, 4, 6) turned by the rotation (0.8, 0.6): 0.8*10 + 0.6*4 and so on
    widths = np.array([6.0, 0.6 * 10 + 0.8 * 4, 0.8 * 10 + 0.6 * 4])
    expected = np.concatenate([15 - widths / 2, 15 + widths / 2])
    np.testing.assert_allclose(_objects(tmp_path).boxes[0], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ({"label": 0, "box": [0, 0, 0, 1, 1]}, "six numbers"),
        ({"label": 0, "box": [0, 0, 0, 1, 1, "1"]}, "six numbers"),
        ({"label": 0, "box": [0, 0, 0, 1, 1, float("nan")]}, "finite|JSON"),
        ({"label": 0, "box": [0, 0, 5, 1, 1, 1]}, "inverted"),
        ({"label": 0, "box": [0, 0, 0, 60, 1, 1]}, "outside"),
        ({"label": 0, "box": [0, 0, 0, 8, 1, 1]}, "outside"),
        ({"label": 0, "box_mm": [900, 0, 0, 6, 1, 1]}, "outside"),
        ({"label": 0, "box_mm": [0, 0, 0, 6, -1, 1]}, "positive"),
        ({"label": 0}, "'box' or 'box_mm'"),
        ({"label": 0, "box": [0] * 6, "box_mm": [0] * 6}, "'box' or 'box_mm'"),
        ({"label": 5, "box": [0, 0, 0, 1, 1, 1]}, "class 5"),
        ({"box": [0, 0, 0, 1, 1, 1]}, "class None"),
        ([0, 0, 0, 1, 1, 1], "'box' or 'box_mm'"),
    ],
)
def test_wrong_box_names_case_and_row(tmp_path: Path, box: Any, message: str) -> None:
    _json(tmp_path / "dataset.json", NNDETECTION)
    _image(tmp_path / "imagesTr" / "a_0000.nii.gz")
    good = {"label": 0, "box": [0, 0, 0, 1, 1, 1]}
    _json(tmp_path / "labelsTr" / "a.json", {"boxes": [good, box]})
    with pytest.raises(DataError, match=f"case a: box 1.*({message})"):
        _objects(tmp_path)


def test_box_that_overhangs_by_rounding_is_clipped(tmp_path: Path) -> None:
    _json(tmp_path / "dataset.json", NNDETECTION)
    _image(tmp_path / "imagesTr" / "a_0000.nii.gz")
    box = {"label": 0, "box": [-0.5, 0, 0, 6.25, 7, 8]}
    _json(tmp_path / "labelsTr" / "a.json", {"boxes": [box]})
    assert _objects(tmp_path).boxes.tolist() == [[0, 0, 0, 6, 7, 8]]


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_every_format_and_several_channels(tmp_path: Path, ending: str) -> None:
    content = {**NNUNET, "channel_names": {"0": "T1", "1": "T2"}, "file_ending": ending}
    _json(tmp_path / "dataset.json", content)
    for channel in range(2):
        voxels = np.full(SHAPE, channel, dtype=np.int16)
        _image(tmp_path / "imagesTr" / f"a.b_{channel:04d}{ending}", voxels)
    _image(tmp_path / "labelsTr" / f"a.b{ending}", _semantic())
    (tmp_path / "imagesTr" / "._a.b_0000.nii.gz").write_bytes(b"macOS")
    (tmp_path / "imagesTr" / "readme.txt").write_text("no image")
    (case,) = RawDataset.open(tmp_path).cases
    assert case.case_id == "a.b"
    image = case.read_image()
    assert image.array[:, 0, 0, 0].tolist() == [0, 1]
    assert len(case.read_objects(image.grid).boxes) == 3


def test_label_in_another_axis_order_is_turned_to_the_image(tmp_path: Path) -> None:
    _json(tmp_path / "dataset.json", NNUNET)
    _image(tmp_path / "imagesTr" / "a_0000.nii.gz")
    turned = reorientation_to_lps(GRID).apply_volume(Volume(_semantic()[None], GRID))
    _image(tmp_path / "labelsTr" / "a.nii.gz", turned.array[0], turned.grid)
    assert _objects(tmp_path).boxes.tolist()[0] == [0, 2, 0, 3, 4, 3]


def test_label_on_another_grid_names_both_grids(tmp_path: Path) -> None:
    _json(tmp_path / "dataset.json", NNUNET)
    _image(tmp_path / "imagesTr" / "LIDC-0421_0000.nii.gz")
    other = Grid.from_parts((6, 7, 9), (2.0, 1.0, 0.5))
    _image(tmp_path / "labelsTr" / "LIDC-0421.nii.gz", grid=other)
    with pytest.raises(DataError, match=r"case LIDC-0421: label grid 6x7x9.*image grid 6x7x8"):
        _objects(tmp_path)


def test_label_with_fractions_is_refused(tmp_path: Path) -> None:
    _json(tmp_path / "dataset.json", NNUNET)
    _image(tmp_path / "imagesTr" / "a_0000.nii.gz")
    _image(tmp_path / "labelsTr" / "a.nii.gz", np.full(SHAPE, 0.5, dtype=np.float32))
    with pytest.raises(DataError, match=r"case a: .*not whole numbers"):
        _objects(tmp_path)


def test_one_bad_case_does_not_hide_the_others(tmp_path: Path) -> None:
    _json(tmp_path / "dataset.json", {**NNUNET, "channel_names": {"0": "T1", "1": "T2"}})
    for name in ("a_0000", "a_0001", "b_0001", "c_0000", "c_0001"):
        _image(tmp_path / "imagesTr" / f"{name}.nii.gz")
    (tmp_path / "imagesTr" / "c_0001.nii.gz").write_bytes(b"broken")
    good, missing, broken = RawDataset.open(tmp_path).cases
    assert good.read_image().array.shape == (2, *SHAPE)
    with pytest.raises(DataError, match=r"case b: channels \[1\] in imagesTr.*declares 2"):
        missing.read_image()
    with pytest.raises(DataError, match=r"case c: .*c_0001\.nii\.gz"):
        broken.read_image()
    with pytest.raises(DataError, match="case a: no label"):
        good.read_objects(GRID)


def test_semantic_map_without_things_says_what_to_add(tmp_path: Path) -> None:
    content = {key: value for key, value in NNUNET.items() if key != "things"}
    _json(tmp_path / "dataset.json", content)
    _image(tmp_path / "imagesTr" / "a_0000.nii.gz")
    _image(tmp_path / "labelsTr" / "a.nii.gz", _semantic())
    assert RawDataset.open(tmp_path).class_names == ("organ", "tumour", "cyst", "mass")
    with pytest.raises(DataError, match=r"case a: .*no 'things'"):
        _objects(tmp_path)
    with pytest.raises(DataError, match=r"no 'things', and none of 1 .*\"things\": \[\"mass\"\]$"):
        RawDataset.open(tmp_path).require_things()
    _json(tmp_path / "labelsTr" / "a.json", {"instances": {}})
    RawDataset.open(tmp_path).require_things()


def test_detached_images_are_read_from_their_own_folder(tmp_path: Path) -> None:
    import SimpleITK as sitk  # noqa: N813

    _json(tmp_path / "dataset.json", {**NNUNET, "file_ending": ".mhd"})
    (tmp_path / "imagesTr").mkdir()
    image = sitk.GetImageFromArray(np.ones(SHAPE, dtype=np.int16))
    sitk.WriteImage(image, str(tmp_path / "imagesTr" / "a_0000.mhd"))
    (case,) = RawDataset.open(tmp_path).cases
    assert case.read_image().array.sum() == np.prod(SHAPE)


def test_splits_and_groups_are_read_and_checked(tmp_path: Path) -> None:
    _json(tmp_path / "dataset.json", NNUNET)
    for name in "abc":
        _image(tmp_path / "imagesTr" / f"{name}_0000.nii.gz")
    assert RawDataset.open(tmp_path).splits is None
    _json(tmp_path / "splits.json", [{"train": ["a", "b"], "val": ["c"]}])
    _json(tmp_path / "groups.json", {"a": "p1", "b": "p1"})
    data = RawDataset.open(tmp_path)
    assert data.splits == ({"train": ("a", "b"), "val": ("c",)},)
    assert data.groups == {"a": "p1", "b": "p1"}
    for content, message in (
        ([{"train": ["a"], "val": ["zz"]}], "unknown cases: zz"),
        ([{"train": ["a", "b"], "val": ["b"]}], "train and val: b"),
        ([{"train": ["a"]}], "needs 'train' and 'val'"),
        ({}, "expected a list"),
    ):
        _json(tmp_path / "splits.json", content)
        with pytest.raises(DataError, match=f"splits.json.*{message}"):
            RawDataset.open(tmp_path)
    (tmp_path / "splits.json").unlink()
    _json(tmp_path / "groups.json", {"zz": "p1"})
    with pytest.raises(DataError, match=r"groups\.json.*unknown cases: zz"):
        RawDataset.open(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "JSON object"),
        ({"labels": {}}, "channel_names"),
        ({"channel_names": {"1": "CT"}, "labels": {}}, "expected 0, 1"),
        ({**NNUNET, "things": ["tumor"]}, "'things' names tumor; labels are organ, tumour"),
        ({**NNUNET, "things": "tumour"}, "must be a list"),
        ({**NNUNET, "labels": {"background": 0, "tumour": 2.5}}, "expected an id"),
        ({**NNDETECTION, "labels": {"1": "nodule"}}, "expected 0, 1, 2"),
    ],
)
def test_wrong_dataset_json_names_file_and_key(tmp_path: Path, content: Any, message: str) -> None:
    _json(tmp_path / "dataset.json", content)
    _image(tmp_path / "imagesTr" / "a_0000.nii.gz")
    with pytest.raises(DataError, match=rf"dataset\.json.*{message}") as caught:
        RawDataset.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_folder_that_is_no_data_set_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no dataset\.json"):
        RawDataset.open(tmp_path)
    _json(tmp_path / "dataset.json", NNUNET)
    with pytest.raises(DataError, match="no images in imagesTr"):
        RawDataset.open(tmp_path)
    _image(tmp_path / "imagesTr" / "scan.nii.gz")
    with pytest.raises(DataError, match="no channel number"):
        RawDataset.open(tmp_path)


def test_case_in_training_and_test_is_refused(tmp_path: Path) -> None:
    _json(tmp_path / "dataset.json", NNUNET)
    _image(tmp_path / "imagesTr" / "a_0000.nii.gz")
    _image(tmp_path / "imagesTs" / "a_0000.nii.gz")
    with pytest.raises(DataError, match="imagesTr and in imagesTs: a"):
        RawDataset.open(tmp_path)


def test_a_case_is_shown_by_its_name(tmp_path: Path) -> None:
    _json(tmp_path / "dataset.json", NNUNET)
    _image(tmp_path / "imagesTr" / "a_0000.nii.gz")
    assert str(RawDataset.open(tmp_path).cases[0]) == "case a"


def test_each_case_may_be_labelled_in_its_own_way(tmp_path: Path) -> None:
    _json(tmp_path / "dataset.json", NNUNET)
    labels = tmp_path / "labelsTr"
    for name in ("boxes", "empty", "instances", "nobox", "semantic", "zeros"):
        _image(tmp_path / "imagesTr" / f"{name}_0000.nii.gz")
    _json(labels / "boxes.json", {"boxes": [{"label": 1, "box": [0, 0, 0, 2, 2, 2]}]})
    _json(labels / "empty.json", {"instances": {}})
    _image(labels / "instances.nii.gz", _semantic())
    _json(labels / "instances.json", {"instances": {"1": 0, "2": 1, "3": 0}, "age": 60})
    _json(labels / "nobox.json", {"boxes": [], "reader": "A"})
    _image(labels / "semantic.nii.gz", _semantic())
    _image(labels / "zeros.nii.gz")
    cases = RawDataset.open(tmp_path).cases
    objects = {case.case_id: case.read_objects(GRID) for case in cases}
    assert {name: found.labels.tolist() for name, found in objects.items()} == {
        "boxes": [1], "empty": [], "instances": [0, 1, 0], "nobox": [], "semantic": [0, 0, 1],
        "zeros": [],
    }  # fmt: skip
    # Where boxes alone are known, no voxel is known to be background.
    assert {name for name, found in objects.items() if found.instances is None} == {
        "boxes", "nobox",
    }  # fmt: skip
    empty = objects["empty"].instances
    assert empty is not None
    assert empty.shape == SHAPE


def test_old_nnunet_and_decathlon_labels_by_id(tmp_path: Path) -> None:
    content = {
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "organ", "2": "tumour", "3": "cyst"},
        "numTraining": 1,
        "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}],
        "things": ["tumour", "cyst"],
    }
    _json(tmp_path / "dataset.json", content)
    _image(tmp_path / "imagesTr" / "a_0000.nii.gz")
    _image(tmp_path / "labelsTr" / "a.nii.gz", _semantic())
    assert RawDataset.open(tmp_path).class_names == ("tumour", "cyst")
    assert _objects(tmp_path).labels.tolist() == [0, 0, 1]


def test_nndetection_source_with_semantic_things(tmp_path: Path) -> None:
    content = {**NNDETECTION, "seg2det_things": [2, 3], "seg2det_stuff": [1], "min_vol": 1}
    _json(tmp_path / "dataset.json", content)
    _image(tmp_path / "imagesTr" / "a_0000.nii.gz")
    _image(tmp_path / "labelsTr" / "a.nii.gz", _semantic())
    assert _objects(tmp_path).labels.tolist() == [0, 0, 1, 1]  # the speck counts


def test_regions_with_a_class_order(tmp_path: Path) -> None:
    content = {
        **NNUNET,
        "labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]},
        "regions_class_order": [1, 2, 3],
        "things": ["whole", "enhancing"],
    }
    _json(tmp_path / "dataset.json", content)
    _image(tmp_path / "imagesTr" / "a_0000.nii.gz")
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[0:4, 0:4, 0:4], labels[1:4, 1:4, 1:4] = 1, 3
    _image(tmp_path / "labelsTr" / "a.nii.gz", labels)
    assert _objects(tmp_path).boxes.tolist() == [[0, 0, 0, 4, 4, 4], [1, 1, 1, 4, 4, 4]]


def test_ignored_voxels_are_no_object_and_other_ids_are_refused(tmp_path: Path) -> None:
    _json(tmp_path / "dataset.json", NNUNET)
    _image(tmp_path / "imagesTr" / "a_0000.nii.gz")
    labels = _semantic()
    labels[:, 6, 0] = 4  # "ignore"
    _image(tmp_path / "labelsTr" / "a.nii.gz", labels)
    assert len(_objects(tmp_path).boxes) == 3
    labels[0, 6, 1] = 5
    _image(tmp_path / "labelsTr" / "a.nii.gz", labels)
    with pytest.raises(DataError, match="case a: the label map holds 5, which 'labels'"):
        _objects(tmp_path)


def test_files_may_be_named_by_dataset_json(tmp_path: Path) -> None:
    outside = tmp_path / "pacs"
    content = {
        **NNUNET,
        "dataset": {
            "a": {"images": ["../pacs/scan1.nii.gz"], "label": "../pacs/seg1.nii.gz"},
            "b": {"images": [str(outside / "scan2.nrrd")], "label": str(outside / "seg2.nii.gz")},
            "c": {"images": ["../pacs/scan1.nii.gz"]},
            "d": {"images": ["../pacs/scan1.nii.gz", "x.nii.gz"], "label": "gone.nii.gz"},
            "e": {"images": ["../pacs/scan1.nii.gz"], "label": "gone.nii.gz"},
        },
    }
    folder = tmp_path / "data"
    _json(folder / "dataset.json", content)
    _image(outside / "scan1.nii.gz")
    _image(outside / "scan2.nrrd")
    _image(outside / "seg1.nii.gz", _semantic())
    _image(outside / "seg2.nii.gz", _semantic())
    _json(outside / "seg2.json", {"instances": {"1": 0, "2": 1, "3": 1}})
    _json(folder / "labelsTr" / "c.json", {"boxes": []})
    cases = {case.case_id: case for case in RawDataset.open(folder).cases}
    assert list(cases) == ["a", "b", "c", "d", "e"]
    assert cases["a"].read_objects(cases["a"].read_grid()).labels.tolist() == [0, 0, 1]
    assert cases["b"].read_image().array.shape == (1, *SHAPE)
    assert cases["b"].read_objects(GRID).labels.tolist() == [0, 1, 1]
    assert len(cases["c"].read_objects(GRID).boxes) == 0
    with pytest.raises(DataError, match="case d: 2 images in dataset"):
        cases["d"].read_image()
    with pytest.raises(DataError, match=r"case e: .*gone\.nii\.gz does not exist"):
        cases["e"].read_objects(GRID)
    for named in ({"images": []}, {"label": "x"}, [1], {"images": [1]}):
        _json(folder / "dataset.json", {**NNUNET, "dataset": {"a": named}})
        with pytest.raises(DataError, match="case 'a' of 'dataset'"):
            RawDataset.open(folder)
    _json(folder / "dataset.json", {**NNUNET, "dataset": {"../a": {"images": ["x"]}}})
    with pytest.raises(DataError, match="file name"):
        RawDataset.open(folder)


def test_labels_may_have_another_ending_unless_one_is_declared(tmp_path: Path) -> None:
    _json(tmp_path / "dataset.json", NNDETECTION)
    _image(tmp_path / "imagesTr" / "a_0000.mha")
    _image(tmp_path / "labelsTr" / "a.nii.gz")
    _json(tmp_path / "labelsTr" / "a.json", {"instances": {}})
    assert len(_objects(tmp_path).boxes) == 0
    assert RawDataset.open(tmp_path).cases[0].label_path is not None
    _json(tmp_path / "dataset.json", {**NNDETECTION, "file_ending": ".mha"})
    assert RawDataset.open(tmp_path).cases[0].label_path is None


def test_two_files_of_one_channel_are_a_problem_of_their_case(tmp_path: Path) -> None:
    _json(tmp_path / "dataset.json", NNDETECTION)
    for name in ("a_0000.mha", "a_0000.nii.gz", "b_0000.nii.gz"):
        _image(tmp_path / "imagesTr" / name)
    first, second = RawDataset.open(tmp_path).cases
    with pytest.raises(DataError, match="case a: several files of channel 0"):
        first.read_image()
    assert second.read_image().array.shape == (1, *SHAPE)


def test_channels_on_other_grids_are_all_named(tmp_path: Path) -> None:
    names = {str(n): f"T{n}" for n in range(3)}
    _json(tmp_path / "dataset.json", {**NNDETECTION, "modalities": names})
    _image(tmp_path / "imagesTr" / "a_0000.nii.gz")
    for number, spacing in ((1, (2.0, 1.0, 0.75)), (2, (3.0, 1.0, 0.5))):
        _image(
            tmp_path / "imagesTr" / f"a_000{number}.nii.gz", grid=Grid.from_parts(SHAPE, spacing)
        )
    (case,) = RawDataset.open(tmp_path).cases
    for read in (case.read_image, case.read_grid):
        with pytest.raises(DataError, match=r"case a: .*a_0001.*2x1x0\.75.*a_0002.*3x1x0\.5"):
            read()


def test_labels_without_an_image_are_surveyed_and_do_not_stop_opening(tmp_path: Path) -> None:
    _json(tmp_path / "dataset.json", NNDETECTION)
    _image(tmp_path / "imagesTr" / "a_0000.nii.gz")
    _json(tmp_path / "labelsTr" / "lost.json", {"boxes": []})
    assert len(RawDataset.open(tmp_path).cases) == 1
    _, problems = RawDataset.survey(tmp_path)
    assert [(p.kind, p.case_id) for p in problems] == [("orphan-label", "lost")]


def test_origins_are_read_and_checked(tmp_path: Path) -> None:
    _json(tmp_path / "dataset.json", NNUNET)
    _image(tmp_path / "imagesTr" / "a_0000.nii.gz")
    _image(tmp_path / "imagesTs" / "t_0000.nii.gz")
    assert RawDataset.open(tmp_path).origins == {}
    _json(tmp_path / "origins.json", {"a": ["dicom:1", "kits:2"], "t": "msd:3"})
    assert RawDataset.open(tmp_path).origins == {"a": ("dicom:1", "kits:2"), "t": ("msd:3",)}
    for content, message in (
        ({"zz": ["dicom:1"]}, "unknown cases: zz"),
        ({"a": 3}, "expected names"),
        ([], "expected an object"),
    ):
        _json(tmp_path / "origins.json", content)
        with pytest.raises(DataError, match=rf"origins\.json.*{message}"):
            RawDataset.open(tmp_path)


def test_yaml_is_refused_with_the_way_to_convert_it(tmp_path: Path) -> None:
    (tmp_path / "dataset.yaml").write_text("task: Task001")
    with pytest.raises(DataError, match=r"dataset\.yaml: .*JSON"):
        RawDataset.open(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**NNUNET, "file_ending": ".png"}, "'file_ending' is '.png'"),
        ({**NNUNET, "things": ["tumour", 2]}, "names a label twice"),
        ({**NNUNET, "things": ["ignore"]}, "'things' names ignore"),
        ({**NNUNET, "labels": {"background": 1}}, "'background'"),
        ({**NNUNET, "labels": {"background": 0, "a": 1, "b": 1}}, "same id 1"),
        ({**NNUNET, "labels": {"background": 0, "a": [0, 1]}}, "contains 0"),
        ({**NNUNET, "min_voxels": "ten"}, "'min_voxels'"),
        ({**NNUNET, "dataset": []}, "'dataset' must be an object"),
        ({**NNDETECTION, "seg2det_things": [1]}, "one label id above 0"),
    ],
)
def test_more_wrong_descriptions(tmp_path: Path, content: Any, message: str) -> None:
    _json(tmp_path / "dataset.json", content)
    _image(tmp_path / "imagesTr" / "a_0000.nii.gz")
    with pytest.raises(DataError, match=rf"dataset\.json: .*{message}") as caught:
        RawDataset.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_images_of_another_ending_are_told(tmp_path: Path) -> None:
    _json(tmp_path / "dataset.json", NNUNET)
    _image(tmp_path / "imagesTr" / "a_0000.nrrd")
    with pytest.raises(DataError, match=r"a_0000\.nrrd do not end in \.nii\.gz"):
        RawDataset.open(tmp_path)


def test_many_cases_are_opened_from_names_alone(tmp_path: Path) -> None:
    _json(tmp_path / "dataset.json", NNDETECTION)
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).mkdir()
    for number in range(2000):
        (tmp_path / "imagesTr" / f"c{number:06d}_0000.nii.gz").touch()
        (tmp_path / "labelsTr" / f"c{number:06d}.json").touch()
    cases = RawDataset.open(tmp_path).cases
    assert len(cases) == 2000
    assert all(case.objects_path is not None for case in cases)
    assert cases[-1].case_id == "c001999"
