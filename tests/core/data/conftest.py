"""Miniature DICOM series, written slice by slice, with a patient whose name must never show."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    generate_uid,
)

PATIENT = "Secretname^Hidden"
PATIENT_ID = "PID-8472-SECRET"
BIRTH_DATE = "19561231"
PRIVATE_WORDS = ("secretname", "hidden", "pid-8472", "19561231", "20240229", "drsecret")


class WriteSeries(Protocol):
    """Writes `count` slices of 12 x 10 voxels, 2 mm apart; returns the files in slice order.

    `edit` changes a slice's header before it is written and may return False to leave it out.
    """

    def __call__(
        self,
        folder: Path,
        *,
        count: int = 5,
        uid: str | None = None,
        modality: str = "CT",
        edit: Callable[[Dataset, int], bool | None] | None = None,
        names: Sequence[str] | None = None,
        syntax: str = ExplicitVRLittleEndian,
        first_seed: int = 0,
    ) -> list[Path]: ...


def slice_header(index: int, *, uid: str, modality: str, seed: int) -> Dataset:
    """One slice with 10 rows of 12 pixels of 0.8 (y) x 0.7 (x) mm at z = 2 * index."""
    header = Dataset()
    header.SOPClassUID = CTImageStorage if modality == "CT" else MRImageStorage
    header.SOPInstanceUID = generate_uid()
    header.StudyInstanceUID = generate_uid(entropy_srcs=[uid])
    header.SeriesInstanceUID = uid
    header.Modality = modality
    header.SeriesNumber = 4
    header.InstanceNumber = index + 1
    header.PatientName = PATIENT
    header.PatientID = PATIENT_ID
    header.PatientBirthDate = BIRTH_DATE
    header.StudyDate = header.SeriesDate = header.ContentDate = "20240229"
    header.ReferringPhysicianName = "Drsecret"
    header.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    header.ImagePositionPatient = [-3.5, 4.25, 2.0 * index]
    header.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    header.PixelSpacing = [0.8, 0.7]
    header.SliceThickness = 2.5
    header.Rows, header.Columns = 10, 12
    header.SamplesPerPixel = 1
    header.PhotometricInterpretation = "MONOCHROME2"
    header.BitsAllocated, header.BitsStored, header.HighBit = 16, 12, 11
    header.PixelRepresentation = 0
    header.RescaleSlope, header.RescaleIntercept = 1, -1024
    header.PixelData = stored_pixels(seed).tobytes()
    return header


def stored_pixels(seed: int, shape: tuple[int, ...] = (10, 12)) -> np.ndarray:
    """The stored values of the slice with this seed."""
    return np.random.default_rng(seed).integers(0, 4096, size=shape, dtype=np.uint16)


def save(header: Dataset, path: Path, *, syntax: str = ExplicitVRLittleEndian) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = UID(syntax)
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID
    header.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture
def write_series() -> WriteSeries:
    def write(
        folder: Path,
        *,
        count: int = 5,
        uid: str | None = None,
        modality: str = "CT",
        edit: Callable[[Dataset, int], bool | None] | None = None,
        names: Sequence[str] | None = None,
        syntax: str = ExplicitVRLittleEndian,
        first_seed: int = 0,
    ) -> list[Path]:
        uid = uid or generate_uid()
        files: list[Path] = []
        for index in range(count):
            header = slice_header(index, uid=uid, modality=modality, seed=first_seed + index)
            if edit is not None and edit(header, index) is False:
                continue
            name = names[index] if names else f"{index + 1:03d}.dcm"
            files.append(save(header, folder / name, syntax=syntax))
        return files

    return write


@pytest.fixture
def pixels() -> Callable[..., np.ndarray]:
    """`stored_pixels` of the writer above."""
    return stored_pixels


@pytest.fixture
def private_words() -> tuple[str, ...]:
    """Lower-case words of the patient that no message and no name may hold."""
    return PRIVATE_WORDS
