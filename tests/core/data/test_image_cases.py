from pathlib import Path

import numpy as np
import pytest
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from voxelbridge.core.data.image_cases import count_channels, find_image_cases
from voxelbridge.core.data.image_io import write_image
from voxelbridge.core.data.volume import Grid, Volume
from voxelbridge.core.errors import ConfigError, DataError


def put(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(
        path, Volume(np.ones((1, 4, 5, 6), np.int16), Grid.from_parts((4, 5, 6), (1, 1, 1)))
    )


def write_series(folder: Path, *, places: tuple[float, ...] = (0, 2, 4, 6)) -> None:
    folder.mkdir(parents=True)
    uid = generate_uid()
    for number, z in enumerate(places):
        header = Dataset()
        header.file_meta = FileMetaDataset()
        header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        header.SOPClassUID, header.SOPInstanceUID = CTImageStorage, generate_uid()
        header.SeriesInstanceUID, header.Modality = uid, "CT"
        header.ImagePositionPatient = [0, 0, z]
        header.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        header.PixelSpacing = [1, 1]
        header.Rows, header.Columns, header.SamplesPerPixel = 5, 6, 1
        header.PhotometricInterpretation = "MONOCHROME2"
        header.BitsAllocated, header.BitsStored, header.HighBit = 16, 16, 15
        header.PixelRepresentation = 1
        header.RescaleSlope, header.RescaleIntercept = 1, 0
        header.PixelData = np.full((5, 6), number, dtype=np.int16).tobytes()
        header.save_as(folder / f"IM{number}", enforce_file_format=True)


def test_channel_files_make_one_case(tmp_path: Path) -> None:
    for channel in range(2):
        put(tmp_path / f"a_000{channel}.mha")
    (case,) = find_image_cases([tmp_path], num_channels=2).cases
    assert case.case_id == "a"
    assert case.read().array.shape == (2, 4, 5, 6)


def test_missing_channel_is_named(tmp_path: Path) -> None:
    put(tmp_path / "a_0000.mha")
    with pytest.raises(DataError, match="the model needs 2"):
        find_image_cases([tmp_path], num_channels=2)


def test_each_dicom_volume_below_a_folder_is_a_case(tmp_path: Path) -> None:
    write_series(tmp_path / "p1" / "ct")
    write_series(tmp_path / "p2" / "ct")
    found = find_image_cases([tmp_path], num_channels=1)
    assert [case.case_id for case in found.cases] == ["p1__ct", "p2__ct"]
    assert found.cases[0].paths == (tmp_path / "p1" / "ct",)
    np.testing.assert_array_equal(found.cases[0].read().array[0, :, 0, 0], [0, 1, 2, 3])


def test_folder_with_image_files_is_read_for_them_alone(tmp_path: Path) -> None:
    put(tmp_path / "a.mha")
    write_series(tmp_path / "dicom")
    assert [case.case_id for case in find_image_cases([tmp_path], num_channels=1).cases] == ["a"]


def test_image_files_and_dicom_in_one_folder_are_refused(tmp_path: Path) -> None:
    write_series(tmp_path / "mixed")
    put(tmp_path / "mixed" / "a.mha")
    with pytest.raises(DataError, match="two folders"):
        find_image_cases([tmp_path / "mixed"], num_channels=1)


def test_dicom_serves_models_of_one_channel_only(tmp_path: Path) -> None:
    write_series(tmp_path / "ct")
    with pytest.raises(DataError, match="one channel, this one has 3"):
        find_image_cases([tmp_path], num_channels=3)


def test_refused_series_are_lines_beside_the_cases(tmp_path: Path) -> None:
    write_series(tmp_path / "good")
    write_series(tmp_path / "bad", places=(0, 2, 6, 8))
    found = find_image_cases([tmp_path], num_channels=1)
    assert [case.case_id for case in found.cases] == ["good"]
    assert "series bad" in found.refused[0]
    allowed = find_image_cases([tmp_path], num_channels=1, allow=["gap"])
    assert [case.case_id for case in allowed.cases] == ["bad", "good"]


def test_equal_names_of_two_places_are_an_error(tmp_path: Path) -> None:
    write_series(tmp_path / "p1" / "ct")
    write_series(tmp_path / "p2" / "ct")
    with pytest.raises(DataError, match="have one name"):
        find_image_cases([tmp_path / "p1", tmp_path / "p2"], num_channels=1)


def test_folder_without_images_says_what_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"no image found; .*DICOM"):
        find_image_cases([tmp_path], num_channels=1)
    with pytest.raises(DataError, match="not an image"):
        find_image_cases([tmp_path / "notes.txt"], num_channels=1)


def test_an_unknown_allowance_is_told_where_there_is_no_dicom_too(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").write_bytes(b"")
    with pytest.raises(ConfigError, match="unknown gaps; expected some of gap, "):
        find_image_cases([tmp_path], num_channels=1, allow=["gaps"])


def test_channels_are_counted_from_the_names(tmp_path: Path) -> None:
    put(tmp_path / "a_0000.mha")
    assert count_channels([tmp_path]) == 1
    for channel in range(3):
        put(tmp_path / f"a_000{channel}.mha")
    assert count_channels([tmp_path]) == 3
    put(tmp_path / "one" / "plain.nii.gz")
    assert count_channels([tmp_path / "one"]) == 1
    write_series(tmp_path / "ct")
    assert count_channels([tmp_path / "ct"]) == 1
