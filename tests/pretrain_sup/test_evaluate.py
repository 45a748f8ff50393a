"""Folders of predicted label maps against raw data sets."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from voxelbridge.core.data.image_io import read_image, write_image
from voxelbridge.core.data.volume import Grid, Volume, reorientation_to_lps
from voxelbridge.core.errors import DataError
from voxelbridge.pretrain_sup.dataset_labels import read_dataset_labels
from voxelbridge.pretrain_sup.evaluate import LabelSource, evaluate_folder
from voxelbridge.pretrain_sup.mask_scores import compare_masks

SPACING = (3.0, 0.5, 1.25)
FLIPPED = np.array([[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, -1.0]])[:, ::-1]
GRID = Grid.from_parts((6, 8, 7), SPACING, directions=FLIPPED, origin_mm=(3, -4, 5))
CONTENT = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "whole": [1, 2], "core": 2, "rare": 3, "never": 4, "ignore": 5},
    "regions_class_order": [1, 2, 3, 4],
    "file_ending": ".nii.gz",
}


def write(path: Path, voxels: np.ndarray, grid: Grid = GRID) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, Volume(voxels[None], grid))


def label_map(seed: int, values: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).choice(values, size=GRID.shape).astype(np.int16)


# `rare` is missed in a, spurious in b and absent from c
REFERENCES = {"a": (0, 1, 2, 3, 5), "b": (0, 1, 2), "c": (0, 1, 2), "d": (0, 1)}
PREDICTIONS = {"a": (0, 1, 2), "b": (0, 1, 2, 3), "c": (0, 1, 2)}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A raw data set of four cases, and predictions of three of them."""
    dataset, predictions = tmp_path / "toy", tmp_path / "predicted"
    for seed, (case, values) in enumerate(REFERENCES.items()):
        part = "Ts" if case == "c" else "Tr"
        write(dataset / f"images{part}" / f"{case}_0000.nii.gz", np.ones(GRID.shape, np.float32))
        write(dataset / f"labels{part}" / f"{case}.nii.gz", label_map(seed, values))
    (dataset / "dataset.json").write_text(json.dumps(CONTENT))
    for seed, (case, values) in enumerate(PREDICTIONS.items()):
        write(predictions / f"{case}.nii.gz", label_map(seed + 10, values))
    return dataset, predictions


def test_table_and_summary_hold_the_scores_of_every_case_and_target(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    source = LabelSource.of_dataset(folders[0])
    summary = evaluate_folder(source, folders[1], output=tmp_path / "out")
    with (tmp_path / "out" / "scores.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    names = ["whole", "core", "rare", "never"]
    assert [(row["case_id"], row["target"]) for row in rows] == [
        (case, name) for case in "abc" for name in names
    ]
    ids = dict(zip(names, [(1, 2), (2,), (3,), (4,)], strict=True))
    for row in rows:
        seed = "abc".index(row["case_id"])
        reference = label_map(seed, REFERENCES[row["case_id"]])
        predicted = label_map(seed + 10, PREDICTIONS[row["case_id"]])
        counted = reference != 5
        masks = [np.isin(m, ids[row["target"]]) & counted for m in (reference, predicted)]
        scores = compare_masks(masks[0], masks[1], SPACING)
        assert row["reference_voxels"] == str(scores.reference_voxels)
        for key in ("dice", "assd_mm", "hd95_mm"):
            value = getattr(scores, key)
            assert row[key] == "" if value is None else float(row[key]) == pytest.approx(value)
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == summary
    assert summary["schema"] == 1
    assert (summary["num_cases"], summary["num_without_prediction"]) == (3, 1)
    whole, rare, never = (summary["targets"][name] for name in ("whole", "rare", "never"))
    dice = [float(row["dice"]) for row in rows if row["target"] == "whole"]
    assert whole["dice"] == pytest.approx(sum(dice) / 3)
    assert rare == {
        "num_cases": 2,
        "num_missed": 1,
        "num_spurious": 1,
        "num_absent": 1,
        "dice": 0.0,
        "assd_mm": None,
        "hd95_mm": None,
    }
    assert (never["num_absent"], never["dice"]) == (3, None)
    core = summary["targets"]["core"]
    assert summary["mean"]["dice"] == pytest.approx((whole["dice"] + core["dice"] + 0.0) / 3)
    assert summary["mean"]["assd_mm"] == pytest.approx((whole["assd_mm"] + core["assd_mm"]) / 2)


def test_perfect_predictions_score_one_and_zero_distance(folders: tuple[Path, Path]) -> None:
    dataset, _ = folders
    source = LabelSource.of_folder(dataset / "labelsTr", read_dataset_labels(dataset))
    summary = evaluate_folder(source, dataset / "labelsTr", targets=["whole", "core"])
    assert summary["mean"] == {"dice": 1.0, "assd_mm": 0.0, "hd95_mm": 0.0}
    assert list(summary["targets"]) == ["whole", "core"]


def test_prediction_in_another_axis_order_is_turned(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    source = LabelSource.of_dataset(folders[0])
    expected = evaluate_folder(source, folders[1])
    turn = reorientation_to_lps(GRID)
    for seed, (case, values) in enumerate(PREDICTIONS.items()):
        turned = turn.apply_volume(Volume(label_map(seed + 10, values)[None], GRID))
        write(tmp_path / "turned" / f"{case}.nrrd", turned.array[0].astype(np.float32), turned.grid)
    found = evaluate_folder(source, tmp_path / "turned", workers=1)
    for name, row in expected["targets"].items():
        assert found["targets"][name] == pytest.approx(row)


def test_instance_maps_are_compared_by_class(raw_dataset: Path, tmp_path: Path) -> None:
    for path in sorted((raw_dataset / "labelsTr").glob("case*.nii.gz")):
        volume = read_image(path)
        objects = json.loads((path.parent / f"{path.name[:5]}.json").read_text())["instances"]
        semantic = np.zeros_like(volume.array)
        for instance, label in objects.items():
            semantic[volume.array == int(instance)] = label + 1
        write_image(tmp_path / "predicted" / path.name, Volume(semantic, volume.grid))
    summary = evaluate_folder(LabelSource.of_dataset(raw_dataset), tmp_path / "predicted")
    assert summary["mean"] == {"dice": 1.0, "assd_mm": 0.0, "hd95_mm": 0.0}
    assert summary["targets"]["hot"]["num_absent"] == 1


def test_mistakes_name_the_case_and_nothing_is_written(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    dataset, predictions = folders
    source = LabelSource.of_dataset(dataset)

    def refused(message: str) -> None:
        with pytest.raises(DataError, match=message) as caught:
            evaluate_folder(source, predictions, output=tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    wider = Grid.from_parts(GRID.shape, (3.0, 0.5, 1.5), directions=FLIPPED, origin_mm=(3, -4, 5))
    write(predictions / "b.nii.gz", label_map(1, (0, 1)), wider)
    refused(r"^case b: grid of b.nii.gz differs .*: spacing 3x0.5x1.5 against 3x0.5x1.25 mm")
    write(predictions / "b.nii.gz", label_map(1, (0, 8)))
    refused(r"^case b: b.nii.gz: the label map holds 8, expected the ids of data set toy")
    write(predictions / "b.nii.gz", np.full(GRID.shape, 0.5, dtype=np.float32))
    refused(r"^case b: b.nii.gz holds values that are no label ids")
    (predictions / "b.nii.gz").write_bytes(b"nothing")
    refused(r"^case b: .*b.nii.gz")
    write(predictions / "b.nii.gz", label_map(1, (0, 1)))
    write(predictions / "b.nrrd", label_map(1, (0, 1)))
    refused(r"b.nii.gz and b.nrrd are of one case")
    (predictions / "b.nrrd").rename(predictions / "z.nrrd")
    refused(r"no reference label for z; data set toy has a, b, c, d")
    for path in predictions.iterdir():
        path.unlink()
    refused("no predicted label map")
    with pytest.raises(DataError, match="no target 'liver'; it has whole, core"):
        evaluate_folder(source, predictions, targets=["liver"])
    with pytest.raises(DataError, match="no such folder"):
        evaluate_folder(source, tmp_path / "nowhere")
