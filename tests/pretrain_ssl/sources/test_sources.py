"""What each kind of source gives, on miniatures of the real layouts."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - the name everybody uses

from voxelbridge.core.data.case_store import CaseStore
from voxelbridge.core.data.image_io import write_image
from voxelbridge.core.data.volume import Grid, Volume
from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.pretrain_ssl.prepare import describe_source, prepare
from voxelbridge.pretrain_ssl.sources.find import find_scans


def write(path: Path, array: np.ndarray, spacing: tuple[float, float, float] = (1, 1, 1)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, Volume(array[None], Grid.from_parts(array.shape, spacing)))


def noise(seed: int = 0, shape: tuple[int, int, int] = (6, 7, 8)) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32)


def collection(tmp_path: Path, *, change: Callable[[dict], None] = lambda tree: None) -> Path:
    """A pretrain_data.json with two subjects; the first has two sessions and both masks."""
    raw = tmp_path / "elsewhere" / "raw"
    write(raw / "D" / "t1.nii.gz", noise(0))
    write(raw / "D" / "t2.nii.gz", noise(1))
    write(raw / "D" / "later.nii.gz", noise(2))
    write(raw / "D" / "other.nii.gz", noise(3))
    face = np.zeros((6, 7, 8), np.uint8)
    face[:2] = 1
    brain = np.zeros((6, 7, 8), np.uint8)
    brain[:, 2:5] = 2
    write(raw / "D" / "face.nii.gz", face)
    write(raw / "D" / "brain.nii.gz", brain)

    def image(name: str, **more: object) -> dict:
        return {
            "name": f"{name}.nii.gz",
            "image_path": f"$nnssl_raw/D/{name}.nii.gz",
            "modality": "T2w" if name == "t2" else "T1w",
            "image_info": {},
            "associated_masks": None,
            **more,
        }

    masks = {
        "anonymization_mask": "$nnssl_raw/D/face.nii.gz",
        "anatomy_mask": "$nnssl_raw/D/brain.nii.gz",
    }
    tree = {
        "collection_index": 745,
        "collection_name": "Dataset745_Open",
        "datasets": {
            "ds01": {
                "dataset_index": "ds01",
                "name": "first",
                "dataset_info": None,
                "subjects": {
                    "s1": {
                        "subject_id": "s1",
                        "subject_info": {"age": 42, "sex": "F"},
                        "sessions": {
                            "a": {
                                "session_id": "a",
                                "session_info": None,
                                "images": [image("t1", associated_masks=masks), image("t2")],
                            },
                            "b": {
                                "session_id": "b",
                                "session_info": None,
                                "images": [image("later")],
                            },
                        },
                    },
                    "s2": {
                        "subject_id": "s2",
                        "subject_info": None,
                        "sessions": {"DEFAULT": {"images": [image("other")]}},
                    },
                },
            }
        },
    }
    change(tree)
    path = tmp_path / "pretrain_data.json"
    path.write_text(json.dumps(tree))
    return path


def test_nnssl_collection_is_stored_with_subjects_and_named_masks(tmp_path: Path) -> None:
    path = collection(tmp_path)
    roots = {"nnssl_raw": tmp_path / "elsewhere" / "raw"}
    report = prepare(path, tmp_path / "store", plan="none", workers=0, roots=roots)
    assert (report.num_cases, report.failures) == (4, ())
    store = CaseStore.open(tmp_path / "store")
    name = "Dataset745_Open__ds01__s1__a__t1"
    record = store.record(name)
    assert record.provenance.patient == "Dataset745_Open__ds01__s1"
    assert record.provenance.origin_ids == ("nnssl:Dataset745_Open/ds01/s1/a/t1.nii.gz",)
    assert len(record.provenance.content_sha256) == 1
    assert record.mask_names == ("anatomy", "anonymization")
    face = store.read_mask_patch(name, "anonymization", (0, 0, 0), (6, 7, 8))
    brain = store.read_mask_patch(name, "anatomy", (0, 0, 0), (6, 7, 8))
    assert face[:2].all()
    assert not face[2:].any()
    assert brain[:, 2:5].all()  # any value above 0 is inside
    assert int(brain.max()) == 1
    patients = {record.provenance.patient for record in store.cases}
    assert patients == {"Dataset745_Open__ds01__s1", "Dataset745_Open__ds01__s2"}
    stored = (tmp_path / "store" / "cases" / f"{name}.json").read_text()
    assert '"age"' not in stored
    assert str(tmp_path) not in stored


def test_missing_roots_are_named_together(tmp_path: Path) -> None:
    def other_root(tree: dict) -> None:
        images = tree["datasets"]["ds01"]["subjects"]["s2"]["sessions"]["DEFAULT"]["images"]
        images[0]["image_path"] = "$archive/other.nii.gz"

    path = collection(tmp_path, change=other_root)
    with pytest.raises(ConfigError, match="add --root archive=PATH --root nnssl_raw=PATH"):
        find_scans(path)


def test_paths_without_a_root_are_relative_to_the_file(tmp_path: Path) -> None:
    def relative(tree: dict) -> None:
        for subject in tree["datasets"]["ds01"]["subjects"].values():
            for session in subject["sessions"].values():
                for image in session["images"]:
                    image["image_path"] = image["image_path"].replace("$nnssl_raw", "elsewhere/raw")
                    image["associated_masks"] = None

    report = prepare(
        collection(tmp_path, change=relative).parent, tmp_path / "s", plan="none", workers=0
    )
    assert report.num_cases == 4


def test_broken_collection_names_the_place(tmp_path: Path) -> None:
    def no_path(tree: dict) -> None:
        del tree["datasets"]["ds01"]["subjects"]["s2"]["sessions"]["DEFAULT"]["images"][0]["name"]

    with pytest.raises(DataError, match=r"ds01\.subjects\.s2\.sessions\.DEFAULT\.images\.0\.name"):
        find_scans(collection(tmp_path, change=no_path))


def test_two_images_of_one_name_in_a_session_are_refused(tmp_path: Path) -> None:
    def twice(tree: dict) -> None:
        images = tree["datasets"]["ds01"]["subjects"]["s1"]["sessions"]["a"]["images"]
        images[1]["name"] = images[0]["name"]

    with pytest.raises(DataError, match="the same case name Dataset745_Open__ds01__s1__a__t1"):
        find_scans(collection(tmp_path, change=twice), roots={"nnssl_raw": tmp_path})


def test_a_missing_image_and_a_mask_of_another_grid_cost_their_cases_alone(tmp_path: Path) -> None:
    path = collection(tmp_path)
    raw = tmp_path / "elsewhere" / "raw"
    (raw / "D" / "t2.nii.gz").unlink()
    write(raw / "D" / "face.nii.gz", np.ones((6, 7, 9), np.uint8))
    report = prepare(path, tmp_path / "s", plan="none", workers=1, roots={"nnssl_raw": raw})
    assert report.num_cases == 2
    assert len(report.failures) == 2
    assert any("t2.nii.gz: does not exist" in line for line in report.failures)
    assert any("mask grid 6x7x9" in line for line in report.failures)


def test_modalities_can_be_chosen(tmp_path: Path) -> None:
    path, roots = collection(tmp_path), {"nnssl_raw": tmp_path / "elsewhere" / "raw"}
    report = prepare(path, tmp_path / "s", plan="none", workers=0, roots=roots, modalities=["T2w"])
    assert report.num_cases == 1
    with pytest.raises(ConfigError, match="no image has it; there are T1w, T2w"):
        prepare(path, tmp_path / "s2", plan="none", workers=0, roots=roots, modalities=["CT"])


def test_dry_run_says_what_would_be_done_and_writes_nothing(tmp_path: Path) -> None:
    path, roots = collection(tmp_path), {"nnssl_raw": tmp_path / "elsewhere" / "raw"}
    text = describe_source(path, tmp_path / "s", roots=roots)
    assert "nnssl collection, 4 images of 2 patients" in text
    assert "T1w 3, T2w 1" in text
    assert "mask anatomy: 1 images" in text
    assert "0 are there, 4 would be prepared" in text
    assert not (tmp_path / "s").exists()


def ct_rate(tmp_path: Path, *, fixed: bool, table: bool = True) -> Path:
    root = tmp_path / "dataset"
    folder = root / ("train_fixed" if fixed else "train")
    names = ["train_1_a_1", "train_1_a_2", "train_1_b_1", "train_22_a_1"]
    for number, name in enumerate(names):
        patient, scan = name.split("_")[1:3]
        place = folder / f"train_{patient}" / f"train_{patient}_{scan}"
        write(place / f"{name}.nii.gz", np.round(noise(number)), (1.0, 1.0, 1.0))
    (root / "metadata").mkdir()
    if table:
        with (root / "metadata" / "train_metadata.csv").open("w", newline="") as stream:
            rows = csv.writer(stream)
            rows.writerow(
                ["VolumeName", "RescaleIntercept", "RescaleSlope", "XYSpacing", "ZSpacing", "X"]
            )
            for name in names:
                rows.writerow([f"{name}.nii.gz", -1024, 2, "[0.5, 0.75]", 3.0, "more"])
    (root / "metadata" / "no_chest_train.txt").write_text("train_22_a_1\n")
    return folder


def test_ct_rate_takes_values_and_spacing_of_the_first_release_from_its_table(
    tmp_path: Path,
) -> None:
    folder = ct_rate(tmp_path, fixed=False)
    source = find_scans(folder)
    assert source.kind == "CT-RATE"
    assert [scan.case_id for scan in source.scans] == ["train_1_a_1", "train_1_a_2", "train_1_b_1"]
    assert {scan.patient for scan in source.scans} == {"ct-rate:train_1"}
    assert [scan.scan for scan in source.scans] == [
        "ct-rate:train_1_a", "ct-rate:train_1_a", "ct-rate:train_1_b",
    ]  # fmt: skip
    assert source.notes == ("1 volumes are left out: listed as not of the chest",)
    volume = source.scans[0].image.read()
    np.testing.assert_allclose(volume.array[0], np.round(noise(0)) * 2 - 1024, atol=1e-3)
    assert volume.grid.spacing_mm == pytest.approx((3.0, 0.75, 0.5))
    assert source.scans[0].image.read_grid().spacing_mm == pytest.approx((3.0, 0.75, 0.5))


def test_ct_rates_corrected_release_is_taken_as_it_is(tmp_path: Path) -> None:
    source = find_scans(ct_rate(tmp_path, fixed=True))
    volume = source.scans[0].image.read()
    np.testing.assert_allclose(volume.array[0], np.round(noise(0)))
    assert volume.grid.spacing_mm == pytest.approx((1.0, 1.0, 1.0))


def test_ct_rate_without_its_table_says_that_headers_are_not_trustworthy(tmp_path: Path) -> None:
    source = find_scans(ct_rate(tmp_path, fixed=False, table=False))
    assert any("no metadata table was found" in note for note in source.notes)


def test_ct_rate_volume_unknown_to_the_table_is_refused(tmp_path: Path) -> None:
    folder = ct_rate(tmp_path, fixed=False)
    write(folder / "train_3" / "train_3_a" / "train_3_a_1.nii.gz", noise())
    source = find_scans(folder)
    assert len(source.refused) == 1
    assert "train_3_a_1.nii.gz: not in the metadata tables" in source.refused[0]


@pytest.mark.parametrize(
    ("spacing", "slope"), [("0.5", "1"), ("[0.5]", "1"), ("[0.5, 0.5]", "x"), ("[0.5, 0]", "1")]
)
def test_broken_ct_rate_table_names_its_line(tmp_path: Path, spacing: str, slope: str) -> None:
    folder = ct_rate(tmp_path, fixed=False, table=False)
    path = folder.parent / "metadata" / "train_metadata.csv"
    path.write_text(
        "VolumeName,RescaleIntercept,RescaleSlope,XYSpacing,ZSpacing\n"
        f'train_1_a_1.nii.gz,0,{slope},"{spacing}",1\n'
    )
    with pytest.raises(DataError, match=r"train_metadata\.csv, line 2"):
        find_scans(folder)


def test_bids_subjects_are_patients_and_derivatives_are_left_out(tmp_path: Path) -> None:
    root = tmp_path / "abcd"
    write(
        root / "sub-NDARINV1" / "ses-baseline" / "anat" / "sub-NDARINV1_ses-b_T1w.nii.gz", noise()
    )
    write(root / "sub-NDARINV1" / "ses-later" / "anat" / "sub-NDARINV1_ses-l_T2w.nii.gz", noise(1))
    write(root / "sub-2" / "anat" / "sub-2_T1w.nii.gz", noise(2))
    write(root / "derivatives" / "seg" / "sub-2" / "anat" / "sub-2_dseg.nii.gz", noise(3))
    (root / "dataset_description.json").write_text("{}")
    source = find_scans(root)
    assert source.kind == "BIDS"
    assert [(scan.patient, scan.modality) for scan in source.scans] == [
        ("abcd:sub-2", "T1w"), ("abcd:sub-NDARINV1", "T1w"), ("abcd:sub-NDARINV1", "T2w"),
    ]  # fmt: skip
    assert source.notes == ("1 images outside of sub-*/{anat,func,...} are left out",)
    report = prepare(root, tmp_path / "store", plan="median", workers=0)
    assert report.num_cases == 3


def write_series(path: Path, frames: np.ndarray) -> None:
    """A NIfTI file of several frames (T, D, H, W), which our own writer does not make."""
    path.parent.mkdir(parents=True, exist_ok=True)
    volumes = [sitk.GetImageFromArray(frame) for frame in frames]
    sitk.WriteImage(sitk.JoinSeries(volumes), str(path))


@pytest.mark.parametrize("frames", ["mean", "first"])
def test_a_time_series_gives_its_mean_or_its_first_frame(
    tmp_path: Path, frames: Literal["mean", "first"]
) -> None:
    series = np.stack([noise(seed) for seed in range(3)])
    root = tmp_path / "abcd"
    write_series(root / "sub-1" / "func" / "sub-1_task-rest_bold.nii.gz", series)
    report = prepare(root, tmp_path / "store", plan="none", workers=0, frames=frames)
    assert (report.num_cases, report.failures) == (1, ())
    expected = series.mean(axis=0) if frames == "mean" else series[0]
    stored = CaseStore.open(tmp_path / "store").read_image("sub-1__func__sub-1_task-rest_bold")
    np.testing.assert_allclose(stored[0], (expected - expected.mean()) / expected.std(), atol=1e-4)


@pytest.mark.parametrize("linked", ["file", "subject"])
def test_linked_images_of_a_bids_tree_are_read(tmp_path: Path, linked: str) -> None:
    own, tree = tmp_path / "own" / "sub-01" / "anat", tmp_path / "tree"
    write(own / "sub-01_T1w.nii.gz", noise())
    write(tree / ".git" / "annex" / "objects" / "key" / "key.nii.gz", noise(1))
    if linked == "subject":
        (tree / "sub-01").symlink_to(own.parent)
    else:
        (tree / "sub-01" / "anat").mkdir(parents=True)
        (tree / "sub-01" / "anat" / "sub-01_T1w.nii.gz").symlink_to(own / "sub-01_T1w.nii.gz")
    found = find_scans(tree)
    assert [scan.case_id for scan in found.scans] == ["sub-01__anat__sub-01_T1w"]
    assert found.notes == ()
    assert found.scans[0].image.read().array.shape == (1, 6, 7, 8)


def test_channels_of_a_raw_data_set_belong_to_the_patient_of_groups_json(tmp_path: Path) -> None:
    root = tmp_path / "Dataset001_X"
    for name in ("p_0000", "p_0001", "q_0000"):
        write(root / "imagesTr" / f"{name}.nii.gz", noise())
    (root / "dataset.json").write_text("{}")
    (root / "groups.json").write_text('{"p": "anna", "q": "anna"}')
    (root / "origins.json").write_text('{"p": ["dicom:1.2.3"]}')
    scans = find_scans(root).scans
    assert [scan.case_id for scan in scans] == ["p_0000", "p_0001", "q_0000"]
    assert {scan.patient for scan in scans} == {"Dataset001_X:anna"}
    assert scans[1].origin_ids == ("dicom:1.2.3",)
    assert scans[0].scan == scans[1].scan != scans[2].scan


def test_root_for_another_source_is_a_usage_error(tmp_path: Path) -> None:
    write(tmp_path / "src" / "a.nii.gz", noise())
    with pytest.raises(ConfigError, match="--root is for nnssl's"):
        find_scans(tmp_path / "src", roots={"x": tmp_path})
