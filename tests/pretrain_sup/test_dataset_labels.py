"""Targets of raw data sets, from every form of dataset.json."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from voxelbridge.core.data.dataset import RawDataset
from voxelbridge.core.data.image_io import write_image
from voxelbridge.core.data.volume import Grid, Volume
from voxelbridge.core.errors import DataError
from voxelbridge.pretrain_sup.dataset_labels import (
    DatasetLabels,
    Target,
    check_name,
    read_dataset_labels,
    read_segmentation,
    unreadable_paint,
)

GRID = Grid.from_parts((4, 5, 6), (2.0, 1.0, 1.0))
ORGANS = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "liver": 1, "spleen": 2, "ignore": 3},
    "file_ending": ".nii.gz",
}
BRATS = {
    "channel_names": {"0": "T1", "1": "FLAIR"},
    "labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]},
    "regions_class_order": [1, 2, 3],
    "file_ending": ".nii.gz",
}


def make_dataset(
    folder: Path, content: dict[str, Any], label: np.ndarray | None = None, *, cases: int = 2
) -> Path:
    """A raw data set of equal cases; `label` None: a map of zeros."""
    channels = content.get("channel_names", content.get("modalities", content.get("modality")))
    voxels = np.zeros(GRID.shape, dtype=np.int16) if label is None else label
    for number in range(cases):
        for channel in range(len(channels or ())):
            name = f"case{number}_{channel:04d}.nii.gz"
            write_file(folder / "imagesTr" / name, np.ones(GRID.shape, dtype=np.float32))
        write_file(folder / "labelsTr" / f"case{number}.nii.gz", voxels)
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def write_file(path: Path, voxels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, Volume(voxels[None], GRID))


def test_nnunet_labels_become_targets_with_their_ids(tmp_path: Path) -> None:
    labels = read_dataset_labels(make_dataset(tmp_path / "Dataset007_Organs", ORGANS))
    assert labels.name == "Dataset007_Organs"
    assert labels.channels == ("CT",)
    assert labels.targets == (Target("liver", (1,)), Target("spleen", (2,)))
    assert (labels.ignore, labels.num_cases, labels.regions) == (3, 2, False)
    assert labels.uncounted == (3,)
    assert labels.legal_ids == {0, 1, 2, 3}


def test_lists_of_ids_become_regions_with_the_ids_they_are_painted_with(tmp_path: Path) -> None:
    labels = read_dataset_labels(make_dataset(tmp_path / "brats", BRATS), name="BraTS-2020")
    assert labels.name == "BraTS-2020"
    assert labels.channels == ("T1", "FLAIR")
    assert labels.regions
    assert labels.targets == (
        Target("whole", (1, 2, 3), 1),
        Target("core", (2, 3), 2),
        Target("enhancing", (3,), 3),
    )


def test_regions_without_a_class_order_are_read_too(tmp_path: Path) -> None:
    content = {key: value for key, value in BRATS.items() if key != "regions_class_order"}
    labels = read_dataset_labels(make_dataset(tmp_path / "brats", content))
    assert [target.paint for target in labels.targets] == [None, None, None]


def test_labels_of_nnunet_1_and_the_decathlon_are_read(tmp_path: Path) -> None:
    content = {
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "Anterior", "2": "Posterior"},
        "numTraining": 2,
    }
    labels = read_dataset_labels(make_dataset(tmp_path / "Task04_Hippocampus", content))
    assert labels.targets == (Target("Anterior", (1,)), Target("Posterior", (2,)))
    assert labels.ignore is None


def test_classes_of_nndetection_are_numbered_from_one(raw_dataset: Path) -> None:
    labels = read_dataset_labels(raw_dataset)
    assert labels.targets == (Target("hot", (1,)), Target("cold", (2,)))
    assert labels.num_cases == 6
    case = RawDataset.open(raw_dataset).cases[0]
    grid = case.read_grid()
    instances = case.read_semantic(grid)
    segmentation = read_segmentation(case, labels, grid)
    assert case.objects_path is not None
    classes = json.loads(case.objects_path.read_text())["instances"]
    expected = np.zeros_like(segmentation)
    for instance, label in classes.items():
        expected[instances == int(instance)] = label + 1
    np.testing.assert_array_equal(segmentation, expected)


def test_semantic_source_of_nndetection_keeps_its_ids(tmp_path: Path) -> None:
    content = {
        "modalities": {"0": "CT"},
        "labels": {"0": "tumour"},
        "seg2det_things": [2],
        "seg2det_stuff": [1],
    }
    labels = read_dataset_labels(make_dataset(tmp_path / "toy", content))
    assert labels.targets == (Target("tumour", (2,)),)
    assert labels.legal_ids == {0, 1, 2}


def test_instances_beside_an_nnunet_map_take_the_ids_of_their_classes(tmp_path: Path) -> None:
    content = {**ORGANS, "labels": {"background": 0, "liver": 4, "spleen": 7}}
    voxels = np.zeros(GRID.shape, dtype=np.int16)
    voxels[0, 0, :3] = (1, 2, 3)
    folder = make_dataset(tmp_path / "toy", content, voxels)
    instances = {"instances": {"1": 1, "2": 0, "3": 1}}
    (folder / "labelsTr" / "case0.json").write_text(json.dumps(instances))
    labels, dataset = read_dataset_labels(folder), RawDataset.open(folder)
    found = read_segmentation(dataset.cases[0], labels, GRID)
    assert found[0, 0, :4].tolist() == [7, 4, 7, 0]


def test_unknown_label_values_name_case_and_data_set(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "organs", ORGANS, np.full(GRID.shape, 9, dtype=np.int16))
    labels, case = read_dataset_labels(folder), RawDataset.open(folder).cases[0]
    with pytest.raises(DataError, match=r"^case case0: the label map holds 9, .* organs \(0, 1"):
        read_segmentation(case, labels, GRID)


def test_boxes_are_no_segmentation(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "organs", ORGANS)
    boxes = {"boxes": [{"label": 0, "box": [0, 0, 0, 1, 1, 1]}]}
    (folder / "labelsTr" / "case0.json").write_text(json.dumps(boxes))
    labels, case = read_dataset_labels(folder), RawDataset.open(folder).cases[0]
    with pytest.raises(DataError, match="case case0: has boxes only"):
        read_segmentation(case, labels, GRID)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**ORGANS, "labels": {"background": 0}}, "data set toy: no target"),
        ({**ORGANS, "labels": {}}, "'labels' names nothing to learn"),
        ({**BRATS, "regions_class_order": [1, 2]}, "'regions_class_order' is .* each of the 3"),
        ({**ORGANS, "labels": {"a": 1, "b": 70000}}, "'b' has id 70000, expected 1 to 65535"),
        ({**BRATS, "labels": {"a": [1, 2], "b": 3, "ignore": 2}, "regions_class_order": [1, 3]},
         r"label ids 2 belong to a target and are not annotated too"),
    ],
)  # fmt: skip
def test_labels_that_cannot_be_learnt_are_one_line(
    content: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = make_dataset(tmp_path / "toy", content)
    with pytest.raises(DataError, match=message) as caught:
        read_dataset_labels(folder)
    assert "\n" not in str(caught.value)


def test_data_set_without_labelled_cases_is_refused(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "toy", ORGANS)
    for path in (folder / "labelsTr").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="toy: no training case with a label"):
        read_dataset_labels(folder)


@pytest.mark.parametrize("name", ["a", "Dataset003_Liver", "AMOS-2022", "351"])
def test_folder_names_of_data_sets_are_legal(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize(
    "name",
    ["", "LiTS v1.1", "a.0", "a/b", "a__b", "-a", "a_", "ä", "x" * 65, "random", "dice", "loss!"],
)
def test_names_that_cannot_be_a_stem_get_a_proposal_that_can(name: str) -> None:
    with pytest.raises(DataError, match="cannot be that of a stem or head") as caught:
        check_name(name)
    check_name(str(caught.value).rpartition("such as ")[2])


def test_targets_that_overlap_must_be_regions() -> None:
    nested = (Target("liver", (1, 2)), Target("tumour", (2,)))
    assert DatasetLabels("lits", ("CT",), nested, None, 1, regions=True).targets == nested
    with pytest.raises(DataError, match="id 2 belongs to 'liver' and to 'tumour'"):
        DatasetLabels("lits", ("CT",), nested, None, 1)
    with pytest.raises(DataError, match="two targets are named 'a'"):
        DatasetLabels("lits", ("CT",), (Target("a", (1,)), Target("a", (2,))), None, 1)
    with pytest.raises(DataError, match="no target 'kidney'; it has liver, tumour"):
        DatasetLabels("lits", ("CT",), nested, None, 1, regions=True).target("kidney")


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([2, 1, 4], None),
        ([1, 2, 4], "paints whole as 1, which is also one of core"),
        ([2, 3, 5], "paints enhancing as 5, which is none of its own ids"),
    ],
)
def test_an_order_of_painting_that_cannot_be_read_back_is_told(
    order: list[int], message: str | None
) -> None:
    regions = {"whole": (1, 2, 3, 4), "core": (1, 3, 4), "enhancing": (4,)}
    targets = tuple(
        Target(name, ids, paint) for (name, ids), paint in zip(regions.items(), order, strict=True)
    )
    warning = unreadable_paint(DatasetLabels("toy", ("MR",), targets, None, 1, regions=True))
    assert warning is None if message is None else message in str(warning)
