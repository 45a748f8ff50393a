"""The fingerprint: what is measured of a case, that it is kept, and that it does not wander."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from voxelbridge.core.data.dataset import RawDataset
from voxelbridge.core.data.foreground import MAX_SAMPLES, MIN_SAMPLES, samples_per_case
from voxelbridge.core.data.image_io import read_image, write_image
from voxelbridge.core.data.volume import Volume
from voxelbridge.core.errors import DataError
from voxelbridge.detect.fingerprint import (
    CASES_FILE,
    CaseFingerprint,
    FingerprintCache,
    data_digest,
    measure_case,
    source_stamp,
    write_fingerprint,
)


def test_a_case_is_measured_in_lps_order(raw_dataset: Path) -> None:
    case = measure_case(RawDataset.open(raw_dataset).cases[0], num_samples=200)
    # File axes z, y, x of 2, 1 and 1 mm are patient axes R-L, A-P and S-I.
    assert case.shape == (28, 24, 20)
    assert case.spacing_mm == (1.0, 1.0, 2.0)
    assert case.kept_by_crop == 1.0
    np.testing.assert_allclose(case.sizes_mm, [[6, 6, 12], [6, 6, 12]])
    assert case.labels.tolist() == [0, 1]
    assert case.centres_mm[:, 0].tolist() == [5.0, 21.0]  # voxels 2..8 and 18..24 of the file's x
    # Objects hold 300 and -200; the draw is of nothing else.
    assert set(case.samples[0].tolist()) == {300.0, -200.0}


def test_a_case_without_objects_is_sampled_everywhere(raw_dataset: Path) -> None:
    case = measure_case(RawDataset.open(raw_dataset).cases[2], num_samples=500)
    assert case.boxes.shape == (0, 6)
    assert case.samples.shape == (1, 500)
    assert case.samples.mean() == pytest.approx(40.0, abs=5.0)


def test_boxes_without_a_label_map_are_sampled_inside(raw_dataset: Path) -> None:
    _turn_into_boxes(raw_dataset)
    case = measure_case(RawDataset.open(raw_dataset).cases[0], num_samples=100)
    assert set(case.samples[0].tolist()) == {300.0, -200.0}


def test_the_crop_is_part_of_the_fingerprint(raw_dataset: Path) -> None:
    path = raw_dataset / "imagesTr" / "case2_0000.nii.gz"
    volume = read_image(path)
    volume.array[:, :, :12] = 0
    write_image(path, Volume(volume.array, volume.grid))
    case = measure_case(RawDataset.open(raw_dataset).cases[2], num_samples=10)
    assert case.kept_by_crop == 0.5
    assert case.shape == (28, 12, 20)


def test_a_short_draw_begins_like_a_long_one(raw_dataset: Path) -> None:
    raw = RawDataset.open(raw_dataset).cases[0]
    long, short = (measure_case(raw, num_samples=n) for n in (600, 150))
    np.testing.assert_array_equal(long.samples[:, :150], short.samples)
    assert long.digest() == short.digest()


def test_nan_voxels_are_refused_with_the_cases_name(raw_dataset: Path) -> None:
    path = raw_dataset / "imagesTr" / "case1_0000.nii.gz"
    volume = read_image(path)
    volume.array[0, 3, 3, 3] = np.nan
    write_image(path, Volume(volume.array, volume.grid))
    with pytest.raises(DataError, match="case case1: channel 0: 1 voxels are NaN"):
        measure_case(RawDataset.open(raw_dataset).cases[1], num_samples=10)


def test_json_gives_the_same_fingerprint_back(raw_dataset: Path) -> None:
    for raw in RawDataset.open(raw_dataset).cases[:3]:
        case = measure_case(raw, num_samples=130)
        again = CaseFingerprint.from_json(json.loads(json.dumps(case.to_json())))
        assert again.digest() == case.digest()
        np.testing.assert_array_equal(again.samples, case.samples)
        np.testing.assert_array_equal(again.boxes, case.boxes)


def test_a_measured_case_is_found_again_until_its_files_change(
    raw_dataset: Path, tmp_path: Path
) -> None:
    raw = RawDataset.open(raw_dataset).cases[0]
    cache = FingerprintCache(tmp_path / CASES_FILE)
    assert cache.find(raw, num_samples=100) is None
    measured = measure_case(raw, num_samples=300)
    cache.add(raw, measured)
    cache.close()
    found = FingerprintCache(tmp_path / CASES_FILE).find(raw, num_samples=100)
    assert found is not None
    assert found.samples.shape == (1, 100)
    assert FingerprintCache(tmp_path / CASES_FILE).find(raw, num_samples=301) is None
    os.utime(raw.image_paths[0], ns=(1, 1))
    assert FingerprintCache(tmp_path / CASES_FILE).find(raw, num_samples=100) is None


def test_a_torn_line_costs_its_case_only(raw_dataset: Path, tmp_path: Path) -> None:
    first, second = RawDataset.open(raw_dataset).cases[:2]
    path = tmp_path / CASES_FILE
    cache = FingerprintCache(path)
    for raw in (first, second):
        cache.add(raw, measure_case(raw, num_samples=100))
    cache.close()
    path.write_bytes(path.read_bytes()[:-300])
    torn = FingerprintCache(path)
    assert torn.find(first, num_samples=100) is not None
    assert torn.find(second, num_samples=100) is None
    torn.add(second, measure_case(second, num_samples=100))
    torn.close()
    healed = FingerprintCache(path)
    assert healed.find(first, num_samples=100) is not None
    assert healed.find(second, num_samples=100) is not None


def test_a_stamp_knows_the_meaning_of_labels(raw_dataset: Path) -> None:
    from dataclasses import replace

    raw = RawDataset.open(raw_dataset).cases[0]
    assert source_stamp(raw) == source_stamp(raw)
    assert source_stamp(raw) != source_stamp(replace(raw, num_classes=3))


def test_the_digest_does_not_depend_on_the_order(raw_dataset: Path, tmp_path: Path) -> None:
    cases = [measure_case(c, num_samples=100) for c in RawDataset.open(raw_dataset).cases]
    assert data_digest(cases) == data_digest(cases[::-1])
    assert data_digest(cases) != data_digest(cases[1:])
    write_fingerprint(tmp_path, cases)
    content = json.loads((tmp_path / "fingerprint.json").read_text())
    assert content["schema"] == 2
    assert [case["case_id"] for case in content["cases"]] == [case.case_id for case in cases]
    channel = content["cases"][0]["intensities"][0]
    assert channel["minimum"] == -200.0
    assert channel["maximum"] == 300.0
    assert channel["num_samples"] == 100


def test_the_number_of_samples_is_bounded() -> None:
    assert samples_per_case(1) == MAX_SAMPLES
    assert samples_per_case(2_000) == 1_000
    assert samples_per_case(1_000_000) == MIN_SAMPLES


def _turn_into_boxes(root: Path) -> None:
    for case in RawDataset.open(root).cases:
        objects = case.read_objects(case.read_grid())
        boxes = [
            {"label": int(label), "box": [float(edge) for edge in box]}
            for label, box in zip(objects.labels, objects.boxes, strict=True)
        ]
        (root / "labelsTr" / f"{case.case_id}.json").write_text(json.dumps({"boxes": boxes}))
        (root / "labelsTr" / f"{case.case_id}.nii.gz").unlink()
