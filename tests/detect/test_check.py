"""Checking raw data sets: every kind of finding has a miniature case; prepare refuses errors."""

import gzip
import io
import json
import re
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from voxelbridge.core.command_line import run_app
from voxelbridge.core.data.case_store import CaseStore, CaseStoreWriter
from voxelbridge.core.data.image_io import read_image, write_image
from voxelbridge.core.data.provenance import Provenance, content_hashes
from voxelbridge.core.data.volume import Grid, Volume, reorientation_to_lps
from voxelbridge.core.errors import DataError
from voxelbridge.detect.check import check_dataset
from voxelbridge.detect.check_findings import Finding, in_order, print_table, rows
from voxelbridge.detect.cli import app
from voxelbridge.detect.prepare import prepare

SHAPE = (12, 14, 16)
GRID = Grid.from_parts(SHAPE, (2.0, 1.0, 0.5), directions=-np.eye(3)[:, ::-1], origin_mm=(9, 8, 7))
NNDETECTION = {"name": "toy", "modalities": {"0": "CT"}, "labels": {"0": "hot", "1": "cold"}}
NNUNET = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "hot": 1, "organ": 2},
    "things": ["hot"],
    "file_ending": ".nii.gz",
}


def put_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def put_image(path: Path, array: np.ndarray, grid: Grid = GRID) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, Volume(array[None], grid))


def noise(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)


def blobs(*classes: int) -> np.ndarray:
    """An instance map with object n + 1 in its own corner, `classes` long."""
    instances = np.zeros(SHAPE, dtype=np.uint8)
    for number in range(len(classes)):
        instances[1:4, 1:4, 1 + 5 * number : 5 + 5 * number] = number + 1
    return instances


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """An nnDetection set of three good cases: two objects, one object, none."""
    root = tmp_path / "data"
    put_json(root / "dataset.json", NNDETECTION)
    for number, classes in enumerate(((0, 1), (0,), ())):
        put_image(root / "imagesTr" / f"c{number}_0000.nii.gz", noise(number))
        put_image(root / "labelsTr" / f"c{number}.nii.gz", blobs(*classes))
        mapping = {str(n + 1): label for n, label in enumerate(classes)}
        put_json(root / "labelsTr" / f"c{number}.json", {"instances": mapping, "extra": 1})
    return root


def found(root: Path, *, deep: bool = False, **options: Any) -> list[tuple[str, str, str | None]]:
    listed = check_dataset(root, deep=deep, workers=0, **options)
    return [(finding.severity, finding.check, finding.case_id) for finding in listed]


def messages(root: Path, *, deep: bool = False, **options: Any) -> str:
    return "\n".join(f.message for f in check_dataset(root, deep=deep, workers=0, **options))


def put_boxes(root: Path, *boxes: Any, case: str = "c1") -> None:
    (root / "labelsTr" / f"{case}.nii.gz").unlink(missing_ok=True)
    put_json(root / "labelsTr" / f"{case}.json", {"boxes": list(boxes)})


def box(*edges: float, label: Any = 0, key: str = "box") -> dict[str, Any]:
    return {"label": label, key: list(edges)}


def rewrite(
    root: Path, change: Callable[[np.ndarray], np.ndarray], folder: str = "labelsTr"
) -> None:
    name = "c1.nii.gz" if folder == "labelsTr" else "c1_0000.nii.gz"
    path = root / folder / name
    put_image(path, change(read_image(path).array[0].copy()))


def set_voxels(value: float, *, dtype: Any = None) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.astype(dtype or array.dtype)
        array[8:10, 8:10, 8:10] = value
        return array

    return change


def test_a_good_data_set_has_no_finding(data: Path) -> None:
    assert found(data) == []
    assert found(data, deep=True) == []


def other_grid(**change: Any) -> Callable[[Path], None]:
    parts: dict[str, Any] = {
        "spacing_mm": (2.0, 1.0, 0.5),
        "directions": -np.eye(3)[:, ::-1],
        "origin_mm": (9, 8, 7),
    } | change
    shape = parts.pop("shape", SHAPE)

    def damage(root: Path) -> None:
        grid = Grid.from_parts(shape, parts.pop("spacing_mm"), **parts)
        put_image(root / "labelsTr" / "c1.nii.gz", np.zeros(shape, dtype=np.uint8), grid)

    return damage


def cut_image(root: Path) -> None:
    path = root / "imagesTr" / "c1_0000.nii.gz"
    path.write_bytes(path.read_bytes()[:60])


def cut_label(root: Path) -> None:
    path = root / "labelsTr" / "c1.nii.gz"
    path.write_bytes(path.read_bytes()[:-12])


def drop_labels(root: Path) -> None:
    for ending in (".nii.gz", ".json"):
        (root / "labelsTr" / f"c1{ending}").unlink()


def wrong_json(content: Any) -> Callable[[Path], None]:
    return lambda root: put_json(root / "labelsTr" / "c1.json", content)


def wrong_box(*boxes: Any) -> Callable[[Path], None]:
    return lambda root: put_boxes(root, *boxes)


SHALLOW_ERRORS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "size": (other_grid(shape=(12, 14, 17)), "grid", "size 12x14x17 against 12x14x16"),
    "spacing": (
        other_grid(spacing_mm=(2.5, 1.0, 0.5)), "grid", "spacing 2.5x1x0.5 against 2x1x0.5 mm",
    ),
    "origin": (other_grid(origin_mm=(9, 8, 9)), "grid", "origin (9, 8, 9) against (9, 8, 7) mm"),
    "direction": (other_grid(directions=np.eye(3)[:, ::-1]), "grid", "direction z(0, 0, 1)"),
    "image": (cut_image, "unreadable", "imagesTr/c1_0000.nii.gz: truncated"),
    "label": (cut_label, "unreadable", "labelsTr/c1.nii.gz: truncated"),
    "no label": (drop_labels, "missing-label", "no label"),
    "no map": (
        lambda root: (root / "labelsTr" / "c1.nii.gz").unlink(), "missing-label", "map is missing",
    ),
    "no json": (lambda root: (root / "labelsTr" / "c1.json").unlink(), "no-things", "'things'"),
    "json": (
        lambda root: (root / "labelsTr" / "c1.json").write_text("{"), "label-json", "valid JSON",
    ),
    "json keys": (wrong_json({"objects": {}}), "label-json", "neither"),
    "json both": (wrong_json({"instances": {}, "boxes": []}), "label-json", "keep one"),
    "id": (wrong_json({"instances": {"one": 0}}), "label-json", "'one' is not a positive"),
    "vanished": (wrong_json({"instances": {"1": 0, "4": 1}}), "vanished-instance", "instances 4"),
    "unlisted": (wrong_json({"instances": {}}), "unlisted-instance", "instances 1 of the label"),
    "class": (wrong_json({"instances": {"1": 2}}), "unknown-class", "class 2, expected 0 to 1"),
    "fraction": (
        lambda root: rewrite(root, set_voxels(1.5, dtype=np.float32)), "label-values", "as 1.5",
    ),
    "nan label": (
        lambda root: rewrite(root, set_voxels(np.nan, dtype=np.float32)), "label-values", "nan",
    ),
    "negative": (
        lambda root: rewrite(root, set_voxels(-1, dtype=np.int16)), "label-values", "below 0",
    ),
    "inverted": (wrong_box(box(4, 1, 1, 3, 2, 2)), "box-inverted", "box 0: [4.0"),
    "empty": (wrong_box(box(4, 1, 1, 4, 2, 2)), "box-inverted", "box 0"),
    "outside": (wrong_box(box(0, 0, 0, 1, 1, 1), box(0, 0, 12, 1, 1, 18)), "box-outside", "box 1"),
    "outside mm": (wrong_box(box(500, 0, 0, 9, 9, 9, key="box_mm")), "box-outside", "box 0"),
    "over the border mm": (wrong_box(box(9, 8, 7, 60, 9, 9, key="box_mm")), "box-outside", "box 0"),
    "flat mm": (wrong_box(box(9, 8, 7, 0, 9, 9, key="box_mm")), "box-inverted", "positive"),
    "five numbers": (wrong_box(box(0, 0, 0, 1, 1)), "box-malformed", "six numbers"),
    "box class": (wrong_box(box(0, 0, 0, 1, 1, 1, label=7)), "unknown-class", "box 0 has class 7"),
}  # fmt: skip


@pytest.mark.parametrize("name", SHALLOW_ERRORS)
def test_each_error_is_named_once_and_prepare_refuses_just_that_case(
    data: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, check, text = SHALLOW_ERRORS[name]
    damage(data)
    errors = [f for f in check_dataset(data, deep=False, workers=0) if f.severity == "error"]
    assert [(finding.check, finding.case_id) for finding in errors] == [(check, "c1")]
    assert text in errors[0].message
    assert "\n" not in errors[0].message
    with pytest.raises(DataError, match="c1"):
        prepare(data, tmp_path / "store", workers=0)
    assert "case c1" in capsys.readouterr().err
    store = CaseStore.open(tmp_path / "store")
    assert [record.case_id for record in store.cases] == ["c0", "c2"]


def test_all_problems_of_a_case_are_listed(data: Path) -> None:
    put_json(data / "labelsTr" / "c0.json", {"instances": {"2": 0, "5": 1}})
    put_boxes(data, box(3, 0, 0, 2, 1, 1), box(0, 0, 0, 99, 1, 1), box(0, 0, 0, 1, 1, 1, label=9))
    assert found(data) == [
        ("error", "box-inverted", "c1"),
        ("error", "box-outside", "c1"),
        ("error", "unknown-class", "c1"),
        ("error", "unlisted-instance", "c0"),
        ("error", "vanished-instance", "c0"),
    ]


def test_label_in_another_axis_order_is_no_finding(data: Path) -> None:
    turned = reorientation_to_lps(GRID).apply_volume(Volume(blobs(0)[None], GRID))
    put_image(data / "labelsTr" / "c1.nii.gz", turned.array[0], turned.grid)
    assert found(data) == []


def test_channels_that_are_missing_or_on_another_grid(data: Path, tmp_path: Path) -> None:
    put_json(data / "dataset.json", NNDETECTION | {"modalities": {"0": "T1", "1": "T2"}})
    put_image(data / "imagesTr" / "c0_0001.nii.gz", noise(7))
    put_image(
        data / "imagesTr" / "c2_0001.nii.gz",
        noise(8, (12, 14, 15)),
        GRID.cropped((0, 0, 0), (12, 14, 15)),
    )
    assert found(data) == [("error", "channels", "c1"), ("error", "grid", "c2")]
    text = messages(data)
    assert "channels [0] in imagesTr, dataset.json declares 2" in text
    assert "c2_0001.nii.gz differs from c2_0000.nii.gz: size 12x14x15 against 12x14x16" in text
    with pytest.raises(DataError, match=r"2 of 3 cases .*c1, c2"):
        prepare(data, tmp_path / "store", workers=0)


def test_semantic_maps_are_checked_for_unknown_labels_and_specks(tmp_path: Path) -> None:
    put_json(tmp_path / "dataset.json", NNUNET)
    for number, extra in enumerate((0, 3, 1)):
        labels = blobs(0)
        labels[10, 12, 14] = extra  # one voxel
        labels[8, 8, 2] = 2
        put_image(tmp_path / "imagesTr" / f"c{number}_0000.nii.gz", noise(number))
        put_image(tmp_path / "labelsTr" / f"c{number}.nii.gz", labels)
    assert found(tmp_path) == [("error", "unknown-label", "c1"), ("warning", "specks", "c2")]
    assert "holds 3, which 'labels' of dataset.json does not name (0, 1, 2)" in messages(tmp_path)


def test_labels_without_image_and_images_with_odd_names(data: Path) -> None:
    put_json(data / "labelsTr" / "lost.json", {"instances": {}})
    (data / "labelsTr" / "lost.nii.gz").write_bytes(b"")
    (data / "labelsTr" / "._c0.nii.gz").write_bytes(b"macOS")
    (data / "labelsTr" / "notes.txt").write_text("no label")
    put_image(data / "imagesTr" / "scan.nii.gz", noise(3))
    assert found(data) == [("error", "channels", "scan"), ("error", "missing-label", "scan"),
                           ("error", "orphan-label", "lost")]  # fmt: skip
    assert "no channel number in the name scan.nii.gz" in messages(data)


def test_tables_that_name_unknown_cases_are_findings_and_the_cases_are_still_checked(
    data: Path,
) -> None:
    put_json(data / "splits.json", [{"train": ["c0", "zz"], "val": ["c0", "c1"]}])
    put_json(data / "groups.json", {"zz": "p"})
    put_json(data / "origins.json", {"zz": ["dicom:1"]})
    cut_label(data)
    listed = found(data)
    for check in ("splits", "groups", "origins"):
        assert ("error", check, None) in listed
    assert ("error", "unreadable", "c1") in listed
    text = messages(data)
    assert "fold 0 names unknown cases: zz" in text
    assert "fold 0 has cases in train and val: c0" in text


def test_one_patient_or_scan_on_both_sides_of_a_split(data: Path) -> None:
    put_image(data / "imagesTs" / "t0_0000.nii.gz", noise(9))
    put_image(data / "imagesTs" / "t1_0000.nii.gz", noise(10))
    put_json(data / "groups.json", {"c0": "p1", "c1": "p1", "t0": "p1", "c2": "p2"})
    put_json(data / "origins.json", {"c2": ["dicom:9#b=0"], "t1": ["dicom:9#b=800"]})
    put_json(data / "splits.json", [{"train": ["c0", "c2"], "val": ["c1"]}])
    assert found(data) == [
        ("error", "leak-fold", "c1"),
        ("error", "leak-test", "t0"),
        ("error", "leak-test", "t1"),
    ]
    text = messages(data)
    assert "one patient is in imagesTr (c0, c1) and in imagesTs (t0)" in text
    assert "one scan is in imagesTr (c2) and in imagesTs (t1)" in text
    assert "p1" not in text


def test_case_in_training_and_test_is_an_error(data: Path) -> None:
    shutil.copytree(data / "imagesTr", data / "imagesTs")
    assert ("error", "duplicate-case", None) in found(data)


def test_test_cases_need_no_label_unless_others_have_one(data: Path) -> None:
    for number in range(2):
        put_image(data / "imagesTs" / f"t{number}_0000.nii.gz", noise(20 + number))
    assert found(data) == []
    put_json(data / "labelsTs" / "t0.json", {"boxes": [box(1, 1, 1, 3, 3, 3)]})
    assert found(data) == [("warning", "missing-label", "t1")]
    put_json(data / "labelsTs" / "t0.json", {"boxes": [box(1, 1, 1, 3, 3, 99)]})
    assert ("error", "box-outside", "t0") in found(data)


def test_odd_images_and_objects_are_warnings(data: Path) -> None:
    instances = np.zeros(SHAPE, dtype=np.uint8)
    instances[0, 0:2, 0:2] = 1
    instances[11, 0:2, 0:2] = 1  # 20 mm away
    put_image(data / "labelsTr" / "c1.nii.gz", instances)
    put_boxes(data, box(1, 1, 1, 3, 3, 3), box(1, 1, 1, 3, 3, 3), case="c0")
    flat = Grid.from_parts((4, 14, 16), (30.0, 1.0, 1.0))
    put_image(data / "imagesTr" / "c2_0000.nii.gz", noise(2, flat.shape), flat)
    put_image(data / "labelsTr" / "c2.nii.gz", np.zeros(flat.shape, dtype=np.uint8), flat)
    assert found(data) == [
        ("warning", "anisotropic", "c2"),
        ("warning", "empty-class", None),
        ("warning", "far-parts", "c1"),
        ("warning", "repeated-box", "c0"),
        ("warning", "spacing", "c2"),
        ("warning", "tiny-image", "c2"),
    ]
    assert "instance 1 has 2 parts, 20 mm apart" in messages(data)


def test_nifti_header_nonsense_is_a_warning_or_makes_the_file_unreadable(data: Path) -> None:
    path = data / "imagesTr" / "c1_0000.nii.gz"
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[112:116] = struct.pack("<f", np.nan)  # scl_slope
    path.write_bytes(gzip.compress(bytes(raw)))
    assert found(data) == [("warning", "header", "c1")]
    assert "slope" in messages(data)
    raw[80:84] = struct.pack("<f", np.nan)  # the first spacing
    path.write_bytes(gzip.compress(bytes(raw)))
    assert ("error", "unreadable", "c1") in found(data)


def test_a_set_without_any_object_is_a_warning_and_without_maps_legal(data: Path) -> None:
    for number in range(3):
        (data / "labelsTr" / f"c{number}.nii.gz").unlink()
        empty: dict[str, Any] = {"instances": {}} if number else {"boxes": []}
        put_json(data / "labelsTr" / f"c{number}.json", empty)
    assert found(data) == [("warning", "no-objects", None)]


def test_deep_finds_nan_that_nifti_hides_and_infinity(data: Path, tmp_path: Path) -> None:
    image = noise(1).astype(np.float32)
    image[0, 0, :3], image[1, 1, 1] = np.nan, np.inf
    for name in ("c1_0000.nii.gz", "c0_0000.nii.gz"):
        put_image(data / "imagesTr" / name, image + (0 if "c1" in name else 1))
    (data / "imagesTr" / "c0_0000.nii.gz").rename(tmp_path / "x.nii.gz")
    put_image(data / "imagesTr" / "c0_0000.nrrd", image + 1)
    assert found(data) == []
    assert found(data, deep=True) == [("error", "nan", "c0"), ("error", "nan", "c1")]
    assert "c1_0000.nii.gz: 3 voxels are NaN and 1 infinite" in messages(data, deep=True)
    with pytest.raises(DataError):
        prepare(data, tmp_path / "store", workers=0)
    assert [r.case_id for r in CaseStore.open(tmp_path / "store").cases] == ["c2"]


@pytest.mark.parametrize("cut", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_deep_finds_truncation(data: Path, ending: str, cut: float) -> None:
    whole = data / "imagesTr" / "c1_0000.nii.gz"
    path = data / "imagesTr" / f"c1_0000{ending}"
    put_image(path, read_image(whole).array[0])
    if path != whole:
        whole.unlink()
    path.write_bytes(path.read_bytes()[: int(cut * path.stat().st_size)])
    listed = found(data, deep=True)
    assert listed == [("error", "unreadable", "c1")]


def test_deep_reads_label_maps_that_boxes_made_needless(data: Path) -> None:
    put_json(data / "labelsTr" / "c1.json", {"boxes": [box(1, 1, 1, 3, 3, 3)]})
    cut_label(data)
    assert found(data) == []
    assert found(data, deep=True) == [("error", "unreadable", "c1")]


def test_a_name_that_no_store_can_hold_is_an_error(data: Path) -> None:
    put_image(data / "imagesTr" / "a.instances_0000.nii.gz", noise(30))
    put_json(data / "labelsTr" / "a.instances.json", {"boxes": []})
    assert found(data) == [("error", "case-name", "a.instances")]


def test_deep_finds_a_flipped_bit_in_a_gzip_stream(data: Path) -> None:
    path = data / "imagesTr" / "c1_0000.nii.gz"
    raw = bytearray(gzip.decompress(path.read_bytes()))
    packed = bytearray(gzip.compress(bytes(raw)))
    packed[len(packed) // 2] ^= 4
    path.write_bytes(packed)
    assert found(data, deep=True) == [("error", "unreadable", "c1")]


def test_deep_finds_constant_images_and_odd_hounsfield_units(data: Path) -> None:
    rewrite(data, lambda array: np.zeros_like(array), "imagesTr")
    padded = noise(0)
    padded[:, 0] = -3024
    put_image(data / "imagesTr" / "c0_0000.nii.gz", padded)
    put_image(data / "imagesTr" / "c2_0000.nii.gz", np.clip(noise(2), 0, None))
    assert found(data, deep=True) == [
        ("error", "constant", "c1"),
        ("warning", "intensity", "c0"),
        ("warning", "intensity", "c2"),
    ]
    text = messages(data, deep=True)
    assert "minimum -3024: padding" in text
    assert "rescale intercept" in text
    put_json(data / "dataset.json", NNDETECTION | {"modalities": {"0": "T1"}})
    assert found(data, deep=True) == [("error", "constant", "c1")]


def test_one_constant_channel_of_two_is_a_warning_and_no_duplicate(data: Path) -> None:
    put_json(data / "dataset.json", NNDETECTION | {"modalities": {"0": "T1", "1": "T2"}})
    for number in range(3):
        put_image(data / "imagesTr" / f"c{number}_0001.nii.gz", np.zeros(SHAPE, dtype=np.int16))
    assert found(data, deep=True) == [("warning", "constant", f"c{n}") for n in range(3)]
    shutil.copy(data / "imagesTr" / "c0_0000.nii.gz", data / "imagesTr" / "c0_0001.nii.gz")
    assert found(data, deep=True)[-1] == ("warning", "duplicate-channel", "c0")


def test_deep_finds_the_same_image_in_other_clothes(data: Path) -> None:
    volume = read_image(data / "imagesTr" / "c0_0000.nii.gz")
    turned = reorientation_to_lps(volume.grid).apply_volume(volume)
    put_image(data / "imagesTs" / "t0_0000.nrrd", turned.array[0].astype(np.float32), turned.grid)
    assert found(data) == []
    assert found(data, deep=True) == [("error", "duplicate-image", "t0")]
    assert "the same voxels as case c0 of imagesTr" in messages(data, deep=True)


def test_leakage_against_another_data_set_and_a_store(data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    put_json(other / "dataset.json", NNDETECTION)
    put_image(other / "imagesTr" / "x_0000.nii.gz", noise(1))
    put_image(other / "imagesTr" / "y_0000.nii.gz", noise(50))
    put_json(data / "origins.json", {"c2": ["kits:case_00001"]})
    put_json(other / "origins.json", {"y": ["kits:case_00001"]})
    assert found(data, against=[other]) == [("error", "leak-data-set", "c2")]
    assert found(data, deep=True, against=[other]) == [
        ("error", "leak-data-set", "c1"),
        ("error", "leak-data-set", "c2"),
    ]
    writer = CaseStoreWriter(tmp_path / "store")
    hashes = content_hashes(read_image(data / "imagesTr" / "c0_0000.nii.gz"))
    writer.write_case(
        "s", noise(0)[None].astype(np.float32), grid=GRID, boxes=[], labels=[],
        provenance=Provenance(content_sha256=hashes),
    )  # fmt: skip
    writer.finish()
    assert found(data, deep=True, against=[tmp_path / "store"]) == [
        ("error", "leak-data-set", "c0")
    ]
    assert "the same image as case s of" in messages(data, deep=True, against=[tmp_path / "store"])
    with pytest.raises(DataError, match="neither a case store nor a raw data set"):
        check_dataset(data, deep=False, workers=0, against=[tmp_path])


def test_data_sets_known_to_share_scans_are_a_warning(data: Path, tmp_path: Path) -> None:
    other = tmp_path / "AbdomenAtlas1.1Mini"
    put_json(other / "dataset.json", NNDETECTION)
    put_image(other / "imagesTr" / "BDMAP_00000001_0000.nii.gz", noise(90))
    assert found(data, against=[other]) == []
    put_json(data / "origins.json", {"c2": ["kits:case_00001"]})
    assert found(data, against=[other]) == [("warning", "known-overlap", None)]
    text = messages(data, against=[other])
    assert "AbdomenAtlas Mini and KiTS (19, 21, 23) share scans" in text
    assert str(other) in text


def test_findings_do_not_depend_on_workers(data: Path) -> None:
    cut_label(data)
    put_boxes(data, box(3, 0, 0, 2, 1, 1), case="c0")
    expected = check_dataset(data, deep=True, workers=0)
    assert check_dataset(data, deep=True, workers=2) == expected


def test_command_prints_a_table_and_ends_with_one(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(["check", str(data), "--workers", "0"], status=0)
    assert "3 cases checked: 0 errors in 0 cases, 0 warnings" in capsys.readouterr().out
    cut_label(data)
    put_boxes(data, box(1, 1, 1, 2, 2, 2), box(1, 1, 1, 2, 2, 2), case="c0")
    run(["check", str(data), "--workers", "0"], status=1)
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith(("error", "warning"))]
    assert [line.split()[:3] for line in lines] == [
        ["error", "unreadable", "c1"],
        ["warning", "repeated-box", "c0"],
    ]
    assert err.count("\n") == 1
    assert "1 error in 1 case, 1 warning" in err


def test_json_is_alone_on_stdout(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut_label(data)
    run(["check", str(data), "--json", "--workers", "1"], status=1)
    content = json.loads(capsys.readouterr().out)
    assert content["schema"] == 1
    assert content["dataset"] == str(data)
    assert (content["num_cases"], content["errors"], content["warnings"]) == (3, 1, 0)
    (finding,) = content["findings"]
    assert set(finding) == {"severity", "check", "case_id", "message"}
    assert (finding["severity"], finding["check"], finding["case_id"]) == (
        "error", "unreadable", "c1",
    )  # fmt: skip


def test_broken_dataset_json_is_one_line(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "dataset.json").write_text('{"modalities": ')
    run(["check", str(data)], status=1)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "dataset.json: not valid JSON" in err


def test_many_equal_findings_are_folded_into_one_row_with_names() -> None:
    equal = [Finding("warning", f"c{n:03d}", "constant", "same") for n in range(21)]
    other = [Finding("error", "z", "grid", "size"), Finding("warning", "a", "constant", "else")]
    ordered = in_order([*equal, *other, equal[0]])
    assert len(ordered) == 23
    assert [row[:3] for row in rows(ordered)] == [
        ("error", "grid", "z"),
        ("warning", "constant", "a"),
        ("warning", "constant", "21 cases"),
    ]
    assert "c000, c001" in list(rows(ordered))[-1][3]
    assert "c020" in list(rows(ordered))[-1][3]
    assert len(list(rows(ordered[:-1]))) == 22


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_table_in_which_brackets_are_no_markup(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    print_table([Finding("error", "[red]case", "grid", "size [4] against [5]")])
    shown = screen.getvalue()
    assert "severity" in shown
    assert "[red]case" in shown
    assert "[4] against [5]" in re.sub(r"\x1b\[[0-9;]*m", "", shown)


def run(arguments: list[str], *, status: int) -> None:
    with pytest.raises(SystemExit) as end:
        run_app(app, arguments)
    assert (end.value.code or 0) == status
