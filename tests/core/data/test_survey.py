from pathlib import Path

import pytest

from voxelbridge.core.data.dataset import RawDataset
from voxelbridge.core.data.survey import HeaderSample, free_bytes, stored_names


def test_headers_are_sampled_in_lps_order(raw_dataset: Path) -> None:
    sample = HeaderSample.read(RawDataset.open(raw_dataset).cases)
    # File axes z, y, x of 2, 1 and 1 mm are patient axes R-L, A-P and S-I.
    assert set(sample.shapes) == {(28, 24, 20)}
    assert sample.median_spacing_mm() == pytest.approx((1.0, 1.0, 2.0))
    size = sample.estimated_bytes((1.0, 1.0, 1.0), num_cases=10, num_channels=3)
    assert size == 28 * 24 * 40 * 10 * 3 * 4


def test_unreadable_headers_are_told_and_left_out(raw_dataset: Path) -> None:
    (raw_dataset / "imagesTr" / "case0_0000.nii.gz").write_bytes(b"junk")
    sample = HeaderSample.read(RawDataset.open(raw_dataset).cases)
    assert len(sample.shapes) == 5
    assert len(sample.unreadable) == 1
    assert "case case0" in sample.unreadable[0]


def test_nothing_to_sample_gives_no_spacing_and_no_bytes() -> None:
    sample = HeaderSample.read([])
    assert sample.median_spacing_mm() is None
    assert sample.estimated_bytes((1.0, 1.0, 1.0), num_cases=0, num_channels=1) == 0


def test_stored_names_are_those_of_complete_cases(tmp_path: Path) -> None:
    assert stored_names(tmp_path) == set()
    (tmp_path / "cases").mkdir()
    for name in ("a.json", "a.b2nd", ".partial-1-b.json", "c.b2nd"):
        (tmp_path / "cases" / name).touch()
    assert stored_names(tmp_path) == {"a"}


def test_free_space_of_a_folder_to_be_made(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "not" / "yet") > 0
    assert not (tmp_path / "not").exists()
