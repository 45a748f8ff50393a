"""Phantom data sets: reproducible, readable as a raw data set, plausible, not trivially solved."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from numpy.typing import NDArray
from scipy import ndimage

from voxelbridge.core.data.dataset import RawDataset
from voxelbridge.core.data.foreground import boxes_from_instances

TOOL = Path(__file__).resolve().parents[2] / "tools" / "phantom.py"
SIZE = (24, 28, 32)


@pytest.fixture(scope="module")
def phantom() -> ModuleType:
    spec = importlib.util.spec_from_file_location("phantom", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def dataset(phantom: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantom")
    phantom.write_phantom_dataset(folder, num_train=5, num_test=2, size=SIZE, seed=3)
    return folder


def test_every_case_has_image_map_and_classes(dataset: Path) -> None:
    for suffix, split, count in (("Tr", "train", 5), ("Ts", "test", 2)):
        names = [f"{split}_{index:04d}" for index in range(count)]
        images = sorted(path.name for path in (dataset / f"images{suffix}").iterdir())
        assert images == [f"{name}_0000.nii.gz" for name in names]
        labels = sorted(path.name for path in (dataset / f"labels{suffix}").iterdir())
        assert labels == sorted(f"{name}{end}" for name in names for end in (".json", ".nii.gz"))


def test_files_hold_the_case_on_one_grid_away_from_the_origin(
    phantom: ModuleType, dataset: Path
) -> None:
    for index in range(5):
        case = phantom.make_case("train", index, size=SIZE, seed=3)
        image = sitk.ReadImage(str(dataset / "imagesTr" / f"{case.case_id}_0000.nii.gz"))
        label = sitk.ReadImage(str(dataset / "labelsTr" / f"{case.case_id}.nii.gz"))
        assert image.GetPixelID() == sitk.sitkInt16
        assert np.array_equal(sitk.GetArrayFromImage(image), case.image)
        assert np.array_equal(sitk.GetArrayFromImage(label), case.instances)
        assert image.GetSpacing() == label.GetSpacing() == pytest.approx((1.5, 1.5, 1.5))
        assert image.GetOrigin() == label.GetOrigin() == pytest.approx(case.origin_mm[::-1])
        assert np.abs(image.GetOrigin()).min() > 0
        content = json.loads((dataset / "labelsTr" / f"{case.case_id}.json").read_text())
        assert content["instances"] == {str(k): v for k, v in enumerate(case.labels, start=1)}


def test_raw_dataset_reader_finds_the_same_objects(phantom: ModuleType, dataset: Path) -> None:
    raw = RawDataset.open(dataset)
    assert tuple(raw.class_names) == phantom.CLASS_NAMES
    cases = {case.case_id: case for case in raw.cases}
    for index in range(5):
        made = phantom.make_case("train", index, size=SIZE, seed=3)
        case = cases[made.case_id]
        objects = case.read_objects(case.read_image().grid)
        _, boxes = boxes_from_instances(made.instances)
        assert np.array_equal(np.asarray(objects.boxes), boxes)
        assert tuple(np.asarray(objects.labels).tolist()) == made.labels


def test_case_depends_on_seed_split_and_index_alone(
    phantom: ModuleType, dataset: Path, tmp_path: Path
) -> None:
    phantom.write_phantom_dataset(tmp_path, num_train=1, num_test=1, size=SIZE, seed=3)
    for name in ("imagesTr/train_0000_0000.nii.gz", "imagesTs/test_0000_0000.nii.gz"):
        first, second = (sitk.ReadImage(str(folder / name)) for folder in (dataset, tmp_path))
        assert np.array_equal(sitk.GetArrayFromImage(first), sitk.GetArrayFromImage(second))
    images = [
        phantom.make_case(split, index, size=SIZE, seed=seed).image
        for split, index, seed in (
            ("train", 0, 0),
            ("test", 0, 0),
            ("train", 1, 0),
            ("train", 0, 1),
        )
    ]
    assert all(not np.array_equal(a, b) for i, a in enumerate(images) for b in images[:i])


@pytest.mark.slow
def test_lesions_are_whole_apart_and_of_both_classes(phantom: ModuleType) -> None:
    cases = [phantom.make_case("train", index, seed=0) for index in range(32)]
    labels = [label for case in cases for label in case.labels]
    assert sum(not case.labels for case in cases) == 32 // 8
    assert min(labels.count(0), labels.count(1)) > 0.35 * len(labels)
    sizes = []
    for case in cases:
        assert case.image.shape == (48, 48, 48)
        assert np.unique(case.instances).tolist() == list(range(len(case.labels) + 1))
        for instance in range(1, len(case.labels) + 1):
            mask = case.instances == instance
            parts = np.zeros(mask.shape, np.int32)
            ndimage.label(mask, np.ones((3, 3, 3)), output=parts)
            assert parts.max() == 1
            near = ndimage.binary_dilation(mask, np.ones((3, 3, 3)))
            assert set(np.unique(case.instances[near])) <= {0, instance}
            sizes.append(int(mask.sum()))
    assert min(sizes) >= phantom.MIN_LESION_VOXELS
    assert max(sizes) > 8 * min(sizes)


@pytest.mark.slow
def test_voxels_look_like_ct_and_lesions_stand_out_of_all_organs(phantom: ModuleType) -> None:
    cases = [phantom.make_case("train", index, seed=0) for index in range(12)]
    values = np.concatenate([case.image.ravel() for case in cases]).astype(float)
    classes = np.concatenate([_class_map(case).ravel() for case in cases])
    organs = values[classes < 0]
    assert -200 < np.percentile(organs, 0.1) < np.percentile(organs, 99.9) < 400
    assert -120 < np.median(organs) < 80  # fat and soft tissue
    assert np.median(values[classes == 0]) > np.percentile(organs, 99)
    assert np.median(values[classes == 1]) < np.percentile(organs, 1)


def _class_map(case: object) -> NDArray[np.int64]:
    instances: NDArray[np.uint8] = case.instances  # pyright: ignore[reportAttributeAccessIssue]
    labels: tuple[int, ...] = case.labels  # pyright: ignore[reportAttributeAccessIssue]
    return np.array([-1, *labels], np.int64)[instances]


def test_tiny_volumes_work(phantom: ModuleType) -> None:
    for index in range(4):
        case = phantom.make_case("test", index, size=(16, 16, 16), seed=1)
        assert case.image.dtype == np.int16
        assert int(case.instances.max()) == len(case.labels)


@pytest.mark.slow
def test_command_line_writes_a_data_set_and_names_a_bad_size(tmp_path: Path) -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(TOOL), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    out = tmp_path / "data"
    done = call(str(out), "--train", "1", "--test", "0", "--seed", "2", "--size", "16", "18", "20")
    assert done.returncode == 0, done.stderr
    image = sitk.ReadImage(str(out / "imagesTr" / "train_0000_0000.nii.gz"))
    assert image.GetSize() == (20, 18, 16)
    bad = call(str(tmp_path / "bad"), "--size", "8", "48", "48")
    assert bad.returncode == 2
    assert len(bad.stderr.strip().splitlines()) == 1
    assert "at least 16 voxels" in bad.stderr
    assert not (tmp_path / "bad").exists()
