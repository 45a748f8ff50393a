"""Real volumes in raw data sets: expected spacing, shape, objects and findings."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from voxelbridge.core.data.case_store import CaseStore
from voxelbridge.core.data.dataset import RawDataset
from voxelbridge.core.data.image_io import read_image, write_image
from voxelbridge.core.data.volume import Grid, Volume, reorientation_to_lps
from voxelbridge.core.errors import DataError
from voxelbridge.detect.check import check_dataset
from voxelbridge.detect.prepare import prepare

CLASSES = {"0": "object"}
Row = tuple[str, str, str | None]


def assemble(
    root: Path,
    files: Mapping[str, Path],
    *,
    channels: Sequence[str] = ("CT",),
    jsons: Mapping[str, Any] | None = None,
    **description: Any,
) -> Path:
    """A raw data set of copies: "imagesTr/a_0000.nrrd" -> where the file comes from."""
    content = {"modalities": {str(n): name for n, name in enumerate(channels)}, "labels": CLASSES}
    content |= description
    for name, source in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, root / name)
    for case_id, mapping in (jsons or {}).items():
        (root / "labelsTr").mkdir(exist_ok=True)
        (root / "labelsTr" / f"{case_id}.json").write_text(json.dumps(mapping))
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def rows(root: Path) -> list[Row]:
    return [(f.severity, f.check, f.case_id) for f in check_dataset(root, deep=True, workers=0)]


def ids(*numbers: int) -> dict[str, Any]:
    return {"instances": {str(number): 0 for number in numbers}}


def test_instances_of_the_abdomen_and_of_a_crop_in_another_orientation(
    shared: Path, tmp_path: Path
) -> None:
    data = shared / "data"
    files = {
        "imagesTr/abdomen_0000.nii.gz": data / "ct_abdomen/ct.nii.gz",
        "labelsTr/abdomen.nii.gz": data / "ct_abdomen/vertebrae_seg.nii.gz",
        "imagesTr/spine_0000.nii.gz": data / "ct_vertebra_crop/ct.nii.gz",
        "labelsTr/spine.nii.gz": data / "ct_vertebra_crop/vertebra_instances.nii.gz",
    }
    jsons = {"abdomen": ids(*range(26, 34)), "spine": ids(21, 22, 23)}
    root = assemble(tmp_path, files, jsons=jsons)
    assert rows(root) == []
    abdomen, spine = RawDataset.open(root).cases
    grid = abdomen.read_grid()
    assert (grid.shape, grid.spacing_mm) == ((112, 101, 122), pytest.approx((3.0, 3.0, 3.0)))
    objects = abdomen.read_objects(grid)
    assert objects.boxes[0].tolist() == [37, 19, 50, 53, 40, 70]  # instances.csv of the folder
    assert objects.boxes.shape == (8, 6)
    grid = spine.read_grid()
    assert (grid.shape, grid.spacing_mm) == ((73, 47, 73), pytest.approx((1.5, 1.5, 1.5)))
    assert len(spine.read_objects(grid).boxes) == 3
    (root / "labelsTr" / "spine.json").write_text(json.dumps(ids(21, 22, 24)))
    assert rows(root) == [
        ("error", "unlisted-instance", "spine"),
        ("error", "vanished-instance", "spine"),
    ]


def test_semantic_lesions_of_nrrd_files(shared: Path, tmp_path: Path) -> None:
    data = shared / "data"
    files = {}
    for case_id, folder, label in (
        ("brain", "mr_brain_tumour", "tumour_seg"),
        ("breast", "mr_breast_tumour", "tumour_seg"),
    ):
        files[f"imagesTr/{case_id}_0000.nrrd"] = data / folder / "mr.nrrd"
        files[f"labelsTr/{case_id}.nrrd"] = data / folder / f"{label}.nrrd"
    labels = {"background": 0, "lesion": 1}
    root = assemble(
        tmp_path, files, channels=["T1"], labels=labels, things=["lesion"], file_ending=".nrrd"
    )
    assert rows(root) == []
    brain, breast = RawDataset.open(root).cases
    grid = brain.read_grid()
    assert grid.shape == (25, 256, 256)
    assert grid.spacing_mm == pytest.approx((6.5, 0.78125, 0.78125), abs=1e-4)
    assert len(brain.read_objects(grid).boxes) == 2
    assert len(breast.read_objects(breast.read_grid()).boxes) == 1


def test_sequences_on_different_grids_raise_and_name_the_sizes(
    shared: Path, tmp_path: Path
) -> None:
    names = ("t1", "t1c", "t2", "fla")
    folder = shared / "data" / "mr_glioma_native_4seq"
    files = {
        f"imagesTr/glioma_{n:04d}.nii.gz": folder / f"TCGA-FG-6692_{name}.nii.gz"
        for n, name in enumerate(names)
    }
    root = assemble(tmp_path, files, channels=names, jsons={"glioma": {"boxes": []}})
    found = [f for f in check_dataset(root, deep=True, workers=0) if f.severity == "error"]
    assert [f.check for f in found] == ["grid", "grid"]
    text = " ".join(f.message for f in found)
    assert (
        "glioma_0002.nii.gz differs from glioma_0000.nii.gz: size 26x256x224 against 26x224x256"
        in text
    )
    assert "size 26x256x208 against 26x224x256" in text
    with pytest.raises(DataError, match="case glioma: grid of glioma_0002"):
        RawDataset.open(root).cases[0].read_image()


def test_channels_of_mixed_types_share_one_grid(shared: Path, tmp_path: Path) -> None:
    names = ("T1", "T2", "FLAIR")
    files = {
        f"imagesTr/stroke_{n:04d}.nii.gz": shared / "data" / "mr_stroke_3seq" / f"{name}.nii.gz"
        for n, name in enumerate(names)
    }
    root = assemble(tmp_path, files, channels=names, jsons={"stroke": {"instances": {}}})
    assert rows(root) == [("warning", "no-objects", None)]
    volume = RawDataset.open(root).cases[0].read_image()
    assert volume.array.shape == (3, 140, 160, 124)
    assert volume.array.dtype == np.float32
    assert volume.array[1].max() == pytest.approx(503.969, abs=1e-3)
    assert volume.array[2].max() == 255


def test_ct_padding_is_a_warning(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "ct_chest_lowres"
    labels = {"background": 0, **{f"segment{n}": n for n in range(1, 8)}}
    files = {"imagesTr/chest_0000.nrrd": folder / "ct.nrrd",
             "labelsTr/chest.nrrd": folder / "seg.seg.nrrd"}  # fmt: skip
    root = assemble(tmp_path, files, labels=labels, things=["segment1"])
    (found,) = check_dataset(root, deep=True, workers=0)
    assert (found.severity, found.check) == ("warning", "intensity")
    assert "minimum -3024" in found.message
    grid = RawDataset.open(root).cases[0].read_grid()
    assert grid.shape == (34, 128, 128)
    assert grid.spacing_mm == pytest.approx((10.0, 3.047, 3.047), abs=1e-3)
    del labels["segment7"]
    root = assemble(tmp_path, files, labels=labels, things=["segment1"])
    assert ("error", "unknown-label", "chest") in rows(root)


def test_one_head_in_24_orders_is_one_image_and_any_order_fits_as_label(
    shared: Path, tmp_path: Path
) -> None:
    heads = sorted((shared / "data" / "orientations").glob("*.nii.gz"))
    names = [path.name.removesuffix(".nii.gz") for path in heads]
    files = {f"imagesTr/{name}_0000.nii.gz": path for name, path in zip(names, heads, strict=True)}
    root = assemble(tmp_path, files, channels=["T1"], jsons={name: {"boxes": []} for name in names})
    reference = read_image(heads[names.index("LPS")])
    marked = np.zeros(reference.grid.shape, dtype=np.uint8)
    marked[20:24, 30:36, 10:12] = 1
    for name in names:
        write_image(root / "labelsTr" / f"{name}.nii.gz", Volume(marked[None], reference.grid))
        (root / "labelsTr" / f"{name}.json").write_text(json.dumps(ids(1)))
    found = rows(root)
    assert found == [("error", "duplicate-image", name) for name in names[1:]]
    for case in RawDataset.open(root).cases:
        grid = case.read_grid()
        objects = case.read_objects(grid)
        in_lps = reorientation_to_lps(grid).apply_boxes(objects.boxes)
        back = reorientation_to_lps(reference.grid).inverse().apply_boxes(in_lps)
        assert back.tolist() == [[20, 30, 10, 24, 36, 12]]


def test_label_stored_the_other_way_round_fits_its_dicom_series(
    shared: Path, tmp_path: Path
) -> None:
    folder = shared / "data" / "ct_dicom_series"
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder / "dicom")))
    image = reader.Execute()
    directions = np.array(image.GetDirection()).reshape(3, 3)[:, ::-1]
    grid = Grid.from_parts(
        image.GetSize()[::-1], image.GetSpacing()[::-1], directions=directions,
        origin_mm=image.GetOrigin(),
    )  # fmt: skip
    assert grid.shape == (20, 512, 512)
    assert grid.spacing_mm == pytest.approx((2.0, 0.9766, 0.9766), abs=1e-4)
    labels = {"background": 0, "liver": 5, **{f"o{n}": n for n in range(1, 118) if n != 5}}
    root = assemble(
        tmp_path, {"labelsTr/ct.nii.gz": folder / "seg.nii.gz"}, labels=labels, things=["liver"]
    )
    write_image(
        root / "imagesTr" / "ct_0000.nii.gz", Volume(sitk.GetArrayFromImage(image)[None], grid)
    )
    assert [row for row in rows(root) if row[0] == "error"] == []
    case = RawDataset.open(root).cases[0]
    stored = read_image(folder / "seg.nii.gz")
    assert not stored.grid.agrees_with(grid)
    organ = case.read_semantic(grid) == 5
    centre_of_organ = np.argwhere(organ).mean(axis=0) + 0.5
    image_values = sitk.GetArrayFromImage(image)[organ]
    assert 0 < np.median(image_values) < 200  # the liver's Hounsfield units, not air or bone
    boxes = case.read_objects(grid).boxes
    largest = boxes[np.argmax(np.prod(boxes[:, 3:] - boxes[:, :3], axis=1))]
    assert (largest[:3] <= centre_of_organ).all()
    assert (centre_of_organ <= largest[3:]).all()


VOLUMES = {
    "abdomen": "ct_abdomen/ct.nii.gz",
    "spine": "ct_vertebra_crop/ct.nii.gz",
    "chest": "ct_chest_lowres/ct.nrrd",
    "brain": "mr_brain_tumour/mr.nrrd",
    "breast": "mr_breast_tumour/mr.nrrd",
    "stroke": "mr_stroke_3seq/FLAIR.nii.gz",
}
CUTS = (0.1, 0.5, 0.9, 0.99, 0.999)


def damage_all(shared: Path, root: Path) -> tuple[list[str], list[str]]:
    """Every volume in every format, whole, cut, and with one bit flipped in the gz stream."""
    good, bad = [], []
    for name, source in VOLUMES.items():
        volume = read_image(shared / "data" / source)
        for ending in (".nii", ".nii.gz", ".mha", ".nrrd"):
            case_id = f"{name}{ending.replace('.', '_')}"
            whole = root / "imagesTr" / f"{case_id}_whole_0000{ending}"
            whole.parent.mkdir(parents=True, exist_ok=True)
            write_image(whole, volume)
            good.append(f"{case_id}_whole")
            content = whole.read_bytes()
            damaged = {f"cut{cut}": content[: int(cut * len(content))] for cut in CUTS}
            if ending == ".nii.gz":
                flipped = bytearray(content)
                flipped[len(content) * 2 // 3] ^= 8
                damaged["flip"] = bytes(flipped)
            for kind, piece in damaged.items():
                bad.append(f"{case_id}_{kind}")
                whole.with_name(f"{bad[-1]}_0000{ending}").write_bytes(piece)
    return good, bad


@pytest.mark.slow
@pytest.mark.long
def test_check_and_prepare_name_every_damaged_file_and_keep_every_good_one(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = damage_all(shared, tmp_path / "raw")
    box = {"boxes": [{"label": 0, "box": [4, 4, 4, 9, 9, 9]}]}
    root = assemble(tmp_path / "raw", {}, channels=["MR"], jsons=dict.fromkeys([*good, *bad], box))
    assert len(bad) == 126
    found = check_dataset(root, deep=True, workers=2)
    assert sorted(f.case_id or "" for f in found if f.check == "unreadable") == sorted(bad)
    others = {f.check for f in found if f.severity == "error"} - {"unreadable"}
    assert others == {"duplicate-image"}  # the whole files of one volume are one image
    capsys.readouterr()
    with pytest.raises(DataError, match="126 of 150 cases"):
        prepare(root, tmp_path / "store", workers=2, spacing_mm=(6.0, 6.0, 6.0))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(bad)
    assert all(any(f"case {name}:" in line for line in lines) for name in bad)
    store = CaseStore.open(tmp_path / "store")
    assert [record.case_id for record in store.cases] == sorted(good)
