"""Boxes as a DICOM structured report: TID 1500, one volumetric measurement group per box.

Every box is a volume surface of two polygons in the series' frame of reference (patient
coordinates, mm): its first and its last face across the slices, corners on voxel edges. The class
and the score are codes of our own coding scheme; no standard code means "score of a detector".
Needs the extra `dicom-sr` (highdicom).
"""

import warnings
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.data.dicom import DicomVolume
from voxelbridge.core.data.volume import Grid, edges_to_world
from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.core.files import atomic_write

if TYPE_CHECKING:
    from highdicom.sr import MeasurementReport
    from highdicom.sr import VolumetricROIMeasurementsAndQualitativeEvaluations as Group
    from pydicom import Dataset

SCHEME = "99VOXELBRIDGE"
SCORE_CODE = "score"
SERIES_NUMBER = 9900
STORAGE = {
    "CT": "1.2.840.10008.5.1.4.1.1.2",
    "MR": "1.2.840.10008.5.1.4.1.1.4",
    "PT": "1.2.840.10008.5.1.4.1.1.128",
}
PROCEDURES = {  # of DICOM's list CID 100
    "CT": ("25045-6", "LN", "CT unspecified body region"),
    "MR": ("25056-3", "LN", "MRI unspecified body region"),
    "PT": ("44136-0", "LN", "PET unspecified body region"),
}
ANY_PROCEDURE = ("363679005", "SCT", "Imaging procedure")
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
NAME_LENGTH = 64  # DICOM's longest meaning of a code
FACE = [(0, 0), (0, 1), (1, 1), (1, 0), (0, 0)]  # (y, x) ends round a face, closed

FloatArray = NDArray[np.float64]


def check_extra() -> None:
    """ConfigError where the extra is not installed."""
    if find_spec("highdicom") is None:
        raise ConfigError(
            "--dicom-sr: highdicom is not installed; install voxelbridge-detect[dicom-sr]"
        )


def write_structured_report(
    path: Path,
    volume: DicomVolume,
    *,
    boxes: FloatArray,
    scores: FloatArray,
    labels: NDArray[np.int64],
    class_names: Sequence[str],
    weights: Sequence[str] = (),
    max_boxes: int = 50,
) -> None:
    """Writes a Comprehensive 3D SR of the `max_boxes` best boxes.

    `boxes` (N, 6) are voxel edges of the volume's grid. `weights` (SHA-256) go into the algorithm
    identification. Patient and study are those of the source series; UIDs that were removed from it
    are made from those that it has, and a line says so. The same boxes give the same UIDs. There is
    no file, but a line, where there is no box or the series has no frame of reference.
    """
    from highdicom.sr import Comprehensive3DSR
    from pydicom.uid import generate_uid

    order = np.argsort(-scores, kind="stable")[:max_boxes]
    if not len(order):
        path.unlink(missing_ok=True)  # a report of measurements needs one
        print(f"note: {volume}: no box, so no structured report")
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they quote values of the header
        evidence = _headers(volume)
        first = evidence[0]
        frame = str(first.get("FrameOfReferenceUID", ""))
        if not frame:
            path.unlink(missing_ok=True)
            print(f"note: {volume}: no FrameOfReferenceUID, so no structured report")
            return
        told = [str(volume.origin_id), *weights, boxes[order].tobytes().hex()]
        groups = [
            _group(
                f"box {number + 1}",
                str(generate_uid(entropy_srcs=[*told, str(number)])),
                _faces(boxes[row], volume.grid),
                frame=frame,
                series=str(first.SeriesInstanceUID),
                name=class_names[int(labels[row])],
                label=int(labels[row]),
                score=float(scores[row]),
                weights=weights,
            )
            for number, row in enumerate(order)
        ]
        report = Comprehensive3DSR(
            evidence=evidence,
            content=_content(groups, volume.modality)[0],
            series_instance_uid=str(generate_uid(entropy_srcs=[*told, "series"])),
            series_number=SERIES_NUMBER,
            sop_instance_uid=str(generate_uid(entropy_srcs=[*told, "report"])),
            instance_number=1,
            manufacturer="voxelbridge",
            series_description="Detected boxes",
            is_complete=True,
        )
        with atomic_write(path) as temporary:
            report.save_as(temporary)


def _headers(volume: DicomVolume) -> list["Dataset"]:
    """Headers of the source files, with what reports inherit from them, also where it is empty."""
    from pydicom import Dataset, dcmread

    headers: list[Dataset] = []
    for file in volume.files:
        try:
            header = dcmread(file, stop_before_pixels=True, force=True)
        except Exception as error:  # pydicom's errors have no common type
            raise DataError(f"{file}: header cannot be read ({type(error).__name__})") from error
        meta = header.file_meta if hasattr(header, "file_meta") else Dataset()
        for key, given in (
            ("SOPClassUID", "MediaStorageSOPClassUID"),
            ("SOPInstanceUID", "MediaStorageSOPInstanceUID"),
        ):
            if not header.get(key) and meta.get(given):
                setattr(header, key, meta.get(given))
        if not header.get("SOPClassUID"):
            header.SOPClassUID = STORAGE.get(volume.modality, SECONDARY_CAPTURE)
        for key in (
            "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber",
            "StudyID", "StudyDate", "StudyTime",
        ):  # fmt: skip
            if key not in header:
                setattr(header, key, "")
        headers.append(header)
    _complete_uids(volume, headers)
    return headers


def _complete_uids(volume: DicomVolume, headers: Sequence["Dataset"]) -> None:
    """Makes the UIDs that were removed from a series, always the same for the same files."""
    from pydicom.uid import generate_uid

    told = [str(headers[0].get("FrameOfReferenceUID")), str(headers[0].get("SOPInstanceUID"))]
    made: list[str] = []
    for key in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
        for number, header in enumerate(headers):
            if not header.get(key):
                each = [str(number)] if key == "SOPInstanceUID" else []
                setattr(header, key, generate_uid(entropy_srcs=[*told, key, *each]))
                made.append(key)
    if made:
        print(
            f"note: {volume}: the series has no {', '.join(dict.fromkeys(made))}; the structured "
            "report refers to made-up ones"
        )


def _faces(box: FloatArray, grid: Grid) -> list[FloatArray]:
    """Closed polygons (5, 3) of the two faces across the slices, in LPS mm."""
    ends = box.reshape(2, 3)
    return [
        edges_to_world(np.array([(ends[side, 0], ends[y, 1], ends[x, 2]) for y, x in FACE]), grid)
        for side in (0, 1)
    ]


def _group(
    identifier: str,
    uid: str,
    faces: list[FloatArray],
    *,
    frame: str,
    series: str,
    name: str,
    label: int,
    score: float,
    weights: Sequence[str],
) -> "Group":
    from highdicom.sr import (
        AlgorithmIdentification,
        CodedConcept,
        GraphicTypeValues3D,
        Measurement,
        SourceSeriesForSegmentation,
        TrackingIdentifier,
        VolumeSurface,
        VolumetricROIMeasurementsAndQualitativeEvaluations,
    )
    from pydicom.sr.codedict import codes

    return VolumetricROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(uid=uid, identifier=identifier),
        referenced_volume_surface=VolumeSurface(
            graphic_type=GraphicTypeValues3D.POLYGON,
            graphic_data=faces,
            frame_of_reference_uid=frame,
            source_series=SourceSeriesForSegmentation(series),
        ),
        finding_type=CodedConcept(f"class{label}", SCHEME, name[:NAME_LENGTH]),
        algorithm_id=AlgorithmIdentification(
            name="voxelbridge-detect",
            version=metadata.version("voxelbridge-detect"),
            parameters=[f"weights sha256 {digest}" for digest in weights] or None,
        ),
        measurements=[
            Measurement(
                name=CodedConcept(SCORE_CODE, SCHEME, "Detection score"),
                value=score,
                unit=codes.UCUM.NoUnits,
            )
        ],
    )


def _content(groups: list["Group"], modality: str) -> "MeasurementReport":
    from highdicom.sr import (
        CodedConcept,
        DeviceObserverIdentifyingAttributes,
        MeasurementReport,
        ObservationContext,
        ObserverContext,
    )
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid

    device = DeviceObserverIdentifyingAttributes(
        uid=str(generate_uid(entropy_srcs=["voxelbridge"])),
        name="voxelbridge-detect",
        manufacturer_name="voxelbridge",
    )
    return MeasurementReport(
        observation_context=ObservationContext(
            observer_device_context=ObserverContext(
                observer_type=codes.DCM.Device, observer_identifying_attributes=device
            )
        ),
        procedure_reported=CodedConcept(*PROCEDURES.get(modality, ANY_PROCEDURE)),
        imaging_measurements=groups,
    )
