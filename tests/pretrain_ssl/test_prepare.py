import json
from pathlib import Path

import numpy as np
import pytest

from voxelbridge.core.data.case_store import CaseStore
from voxelbridge.core.data.image_io import write_image
from voxelbridge.core.data.resample import resample_image
from voxelbridge.core.data.volume import Grid, Volume
from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.pretrain_ssl.prepare import prepare
from voxelbridge.pretrain_ssl.sources.find import find_scans

Spacing = tuple[float, float, float]


def image(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 20, (1, *shape)).astype(np.float32)


def write(path: Path, array: np.ndarray, spacing: Spacing = (1.0, 1.0, 1.0)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    grid = Grid.from_parts(array.shape[1:], spacing)
    write_image(path, Volume(array, grid))


def test_fixed_plan_crops_resamples_to_one_millimetre_and_normalises(tmp_path: Path) -> None:
    inner = image((6, 10, 12))
    array = np.pad(inner, ((0, 0), (2, 1), (0, 0), (3, 3)))
    write(tmp_path / "src" / "a.nii.gz", array, (2.0, 1.0, 1.0))
    report = prepare(tmp_path / "src", tmp_path / "store", plan="fixed", workers=0)
    assert (report.num_cases, report.failures) == (1, ())
    store = CaseStore.open(tmp_path / "store")
    assert store.cases[0].shape == (1, 12, 10, 12)
    assert store.cases[0].spacing_mm == pytest.approx((1.0, 1.0, 1.0))
    resampled = resample_image(inner, (12, 10, 12))
    expected = (resampled - resampled.mean()) / resampled.std()
    np.testing.assert_allclose(store.read_image("a"), expected, atol=1e-4)
    details = store.details("a")
    assert details.mapping.crop_start == (2, 0, 3)
    assert details.extra["normalization"] == [{"name": "zscore", "nonzero_only": False}]


def test_none_keeps_grid_and_extent(tmp_path: Path) -> None:
    array = np.pad(image((6, 10, 12)), ((0, 0), (2, 1), (0, 0), (3, 3)))
    write(tmp_path / "src" / "a.nrrd", array, (2.5, 0.7, 0.8))
    prepare(tmp_path / "src", tmp_path / "store", plan="none", workers=0)
    store = CaseStore.open(tmp_path / "store")
    assert store.cases[0].shape == array.shape
    assert store.cases[0].spacing_mm == pytest.approx((2.5, 0.7, 0.8))
    expected = (array - array.mean()) / array.std()
    np.testing.assert_allclose(store.read_image("a"), expected, atol=1e-4)


def test_median_takes_the_median_spacing_of_each_axis(tmp_path: Path) -> None:
    for name, spacing in (("a", (1.0, 1.0, 2.0)), ("b", (2.0, 1.5, 1.0)), ("c", (5.0, 2.0, 1.0))):
        write(tmp_path / "src" / f"{name}.mha", image((6, 6, 6)), spacing)
    prepare(tmp_path / "src", tmp_path / "store", plan="median", workers=0)
    assert json.loads((tmp_path / "store" / "prepare.json").read_text())["spacing_mm"] == [
        2.0,
        1.5,
        1.0,
    ]
    shapes = {record.case_id: record.shape for record in CaseStore.open(tmp_path / "store").cases}
    assert shapes["b"] == (1, 6, 6, 6)
    assert shapes["a"] == (1, 3, 4, 12)


def test_names_come_from_relative_paths(tmp_path: Path) -> None:
    write(tmp_path / "site1" / "scan.nii.gz", image((4, 4, 4)))
    write(tmp_path / "site2" / "scan.nii.gz", image((4, 4, 4)))
    (tmp_path / "notes.txt").touch()
    assert [found.case_id for found in find_scans(tmp_path).scans] == ["site1__scan", "site2__scan"]


def test_raw_data_set_gives_one_case_per_channel_file_of_images_tr(tmp_path: Path) -> None:
    for name in ("imagesTr/p_0000", "imagesTr/p_0001", "imagesTs/q_0000", "labelsTr/p"):
        write(tmp_path / f"{name}.nii.gz", image((4, 4, 4)))
    (tmp_path / "dataset.json").write_text("{}")
    assert [found.case_id for found in find_scans(tmp_path).scans] == ["p_0000", "p_0001"]


def test_equal_names_of_two_formats_stay_two_cases(tmp_path: Path) -> None:
    write(tmp_path / "a.nii.gz", image((4, 4, 4)))
    write(tmp_path / "a.nrrd", image((4, 4, 4)))
    assert len({scan.case_id for scan in find_scans(tmp_path).scans}) == 2


@pytest.mark.parametrize("name", ["missing", "empty", "notes.txt"])
def test_other_sources_are_refused_with_what_is_accepted(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=rf"{name}: (.*accepted are nnssl|no image found)"):
        find_scans(tmp_path / name)


def test_bad_cases_are_named_once_and_the_good_ones_are_stored(tmp_path: Path) -> None:
    write(tmp_path / "src" / "good.nii.gz", image((4, 5, 6)))
    write(tmp_path / "src" / "zero.nii.gz", np.zeros((1, 4, 4, 4), np.float32))
    write(tmp_path / "src" / "flat.nii.gz", np.full((1, 4, 4, 4), 7, np.float32))
    holes = image((4, 4, 4))
    holes[0, 1, 1, 1] = np.nan
    write(tmp_path / "src" / "holes.nrrd", holes)
    (tmp_path / "src" / "junk.nii.gz").write_bytes(b"junk")
    report = prepare(tmp_path / "src", tmp_path / "store", plan="fixed", workers=1)
    assert report.num_cases == 1
    assert [record.case_id for record in CaseStore.open(tmp_path / "store").cases] == ["good"]
    assert len(report.failures) == 4
    reasons = {"holes": "1 voxels are NaN", "zero": "all voxels are 0", "flat": "are 7", "junk": ""}
    for name, reason in reasons.items():
        lines = [line for line in report.failures if name in line]
        assert len(lines) == 1
        assert reason in lines[0]


def test_done_cases_are_skipped_and_new_ones_added(tmp_path: Path) -> None:
    write(tmp_path / "src" / "a.nii.gz", image((4, 5, 6)))
    prepare(tmp_path / "src", tmp_path / "store", plan="median", workers=0)
    stored = tmp_path / "store" / "cases" / "a.b2nd"
    before = stored.stat().st_mtime_ns
    write(tmp_path / "src" / "b.nii.gz", image((4, 5, 6)), (3.0, 3.0, 3.0))
    report = prepare(tmp_path / "src", tmp_path / "store", plan="median", workers=0)
    assert (report.num_cases, report.num_skipped) == (2, 1)
    assert stored.stat().st_mtime_ns == before
    assert CaseStore.open(tmp_path / "store").record("b").spacing_mm == pytest.approx((1, 1, 1))


def test_other_plan_for_an_existing_store_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "src" / "a.nii.gz", image((4, 5, 6)))
    prepare(tmp_path / "src", tmp_path / "store", plan="fixed", workers=0)
    with pytest.raises(ConfigError, match="was prepared otherwise"):
        prepare(tmp_path / "src", tmp_path / "store", plan="none", workers=0)


def test_foreign_folder_is_not_used_as_a_store(tmp_path: Path) -> None:
    write(tmp_path / "src" / "a.nii.gz", image((4, 5, 6)))
    with pytest.raises(ConfigError, match=r"holds files but no prepare\.json"):
        prepare(tmp_path / "src", tmp_path / "src", plan="fixed", workers=0)


def test_source_without_a_usable_image_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "junk.nii.gz").write_bytes(b"junk")
    with pytest.raises(DataError, match="none of 1 images could be stored"):
        prepare(tmp_path / "src", tmp_path / "store", plan="fixed", workers=0)


def test_images_of_the_same_voxels_are_said_in_one_note(tmp_path: Path) -> None:
    for number in range(5):
        write(tmp_path / "src" / f"{number}.nii.gz", image((4, 5, 6)))
    write(tmp_path / "src" / "other.nii.gz", image((4, 5, 6), seed=1))
    report = prepare(tmp_path / "src", tmp_path / "store", plan="none", workers=0)
    assert report.num_cases == 6
    (note,) = report.notes
    assert note.startswith(
        "4 of 6 cases repeat the voxels of another one (1 = 0, 2 = 0, 3 = 0 and 1 more); "
    )
