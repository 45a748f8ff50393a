"""One DICOM file to the frames it holds: place, pixel layout and marks, without decoding a voxel.

A header is input from anywhere: reading is bounded in bytes and in depth, nothing but the pixel
element's own length is trusted, and neither a message nor a `Frame` holds what names a patient.
"""

import re
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from io import SEEK_SET
from pathlib import Path
from typing import BinaryIO

from pydicom import Dataset, dcmread
from pydicom.errors import InvalidDicomError
from pydicom.uid import UID

from voxelbridge.core.data.dicom_layout import FrameError, PixelLayout, read_layout
from voxelbridge.core.data.dicom_values import HeaderValues, b_value, text_value

PREAMBLE_BYTES = 128
MAGIC = b"DICM"
FILE_ENDINGS = (".dcm", ".dicom", ".ima")  # such a file is meant to be DICOM: garbage is reported
MAX_VALUE_BYTES = 64 << 20  # one header value; per-frame groups of enhanced objects are the largest
MAX_READS = 5_000_000  # ends headers made of millions of elements after some seconds

# What is not an image is passed over: reports, plans, outlines, masks on another grid, doses.
NO_IMAGE = (
    "SR", "KO", "PR", "REG", "FID", "RTSTRUCT", "RTPLAN", "RTRECORD", "RTDOSE", "SEG", "RWV", "DOC",
)  # fmt: skip
TAGS: tuple[int, ...] = (
    0x00080008, 0x00080016, 0x00080018, 0x00080060, 0x00180024, 0x00180050, 0x00180081,
    0x00180086, 0x00180088, 0x00181060, 0x00189087, 0x00190010, 0x0019100C, 0x0020000E,
    0x00200011, 0x00200012, 0x00200013, 0x00200032, 0x00200037, 0x00200100, 0x00280002,
    0x00280004, 0x00280008, 0x00280010, 0x00280011, 0x00280030, 0x00280100, 0x00280101,
    0x00280102, 0x00280103, 0x00281052, 0x00281053, 0x00430010, 0x00431039, 0x20010010,
    0x20011003, 0x52009229, 0x52009230,
)  # fmt: skip
KINDS = {
    "P": "phase", "PHASE": "phase", "PHASE MAP": "phase", "P_FFE": "phase", "P_IR": "phase",
    "P_SE": "phase", "R": "real", "REAL": "real", "R_FFE": "real", "I": "imaginary",
    "IMAGINARY": "imaginary", "I_FFE": "imaginary", "M": "magnitude", "MAGNITUDE": "magnitude",
    "M_FFE": "magnitude", "M_SE": "magnitude", "M_IR": "magnitude", "ADC": "adc", "FA": "fa",
    "EADC": "eadc", "LOCALIZER": "localizer", "WATER": "water", "W": "water", "FAT": "fat",
    "F": "fat", "IN_PHASE": "in-phase", "IP": "in-phase", "OUT_PHASE": "out-phase",
    "OPP_PHASE": "out-phase", "OP": "out-phase",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Marks:
    """What tells the volumes of one series apart; None where the header does not say."""

    kind: str  # "phase", "adc", "localizer", ... from ImageType, or ""
    b_value: int | None  # s/mm2
    echo_time_ms: float | None
    echo_number: int | None
    temporal: int | None
    image_type: str
    acquisition: int | None
    trigger_ms: float | None


@dataclass(frozen=True, slots=True)
class Frame:
    """One slice: where its pixels lie in which file, and where it lies in the patient (LPS mm)."""

    path: Path
    name: str  # of the file, below the folder that was searched
    number: int  # of the frame in its file
    pixels: PixelLayout
    series_uid: str
    series_number: int | None
    modality: str
    instance_uid: str
    instance_number: int | None
    position_mm: tuple[float, float, float]  # world (x, y, z) of the first voxel's centre
    orientation: tuple[float, ...]  # six cosines: along a row, then along a column
    spacing_mm: tuple[float, float]  # between rows (y), between columns (x)
    thickness_mm: float | None
    rescale: tuple[float, float] | None  # slope, intercept
    marks: Marks


@dataclass(frozen=True, slots=True)
class Unusable:
    """A file that should hold slices and does not, with the series it says it belongs to."""

    path: Path
    name: str
    series_uid: str
    reason: str


def is_dicom(path: Path) -> bool:
    """Whether a regular file has the DICOM mark, whatever its name; the preamble is not looked at.

    Old files without a preamble count when they begin with a plausible element of group 8.
    """
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        start = stream.read(PREAMBLE_BYTES + len(MAGIC))
    return start[PREAMBLE_BYTES:] == MAGIC or _is_bare(start)


def read_frames(path: Path, *, name: str) -> tuple[Frame, ...] | Unusable | None:
    """The frames of a DICOM file, the reason why it has none, or None for what is not an image.

    `name` stands for the file in messages. Any damage gives `Unusable`, never another exception.
    """
    uid = ""
    try:
        with path.open("rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they quote values of the header
            start = stream.read(PREAMBLE_BYTES + len(MAGIC))
            stream.seek(0)
            size = path.stat().st_size
            bare = start[PREAMBLE_BYTES:] != MAGIC
            if bare and not _is_bare(start):
                raise FrameError("is empty" if size == 0 else "is not a DICOM file")
            header = dcmread(
                _BoundedFile(stream), stop_before_pixels=True, force=bare, specific_tags=list(TAGS)
            )
            uid = text_value(header, "SeriesInstanceUID")
            if _is_no_image(header):
                return None
            layout = read_layout(stream, header, file_bytes=size)
            return tuple(_frames(header, layout, path, name))
    except FrameError as problem:
        return Unusable(path, name, uid, str(problem))
    except InvalidDicomError:
        return Unusable(path, name, uid, "is not a DICOM file")
    except OSError as error:
        return Unusable(path, name, uid, f"cannot be read ({error.strerror})")
    except Exception as error:  # pydicom's errors have no common type, and they quote the header
        return Unusable(path, name, uid, f"header cannot be read ({type(error).__name__})")


class _BoundedFile:
    """What pydicom reads from: refuses values that no sound header has."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._reads = 0
        self.name = ""  # pydicom keeps it beside the data

    def read(self, size: int = -1, /) -> bytes:
        self._reads += 1
        if size < 0:  # pydicom inflates the whole file at once, whatever comes out
            raise FrameError("deflated transfer syntax is not read; store it uncompressed")
        if size > MAX_VALUE_BYTES or self._reads > MAX_READS:
            raise FrameError("header is too large to be sound")
        return self._stream.read(size)

    def seek(self, offset: int, whence: int = SEEK_SET, /) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()


def _is_bare(start: bytes) -> bool:
    """Whether a file begins with an element of group 8 (or 2) as little endian, no preamble."""
    if len(start) < 16:
        return False
    group, element, length = struct.unpack("<HHL", start[:8])
    explicit = start[4:6].isalpha() and start[4:6].isupper()
    return group in (2, 8) and element <= 0x60 and (explicit or length <= 256)


def _is_no_image(header: Dataset) -> bool:
    meta = getattr(header, "file_meta", Dataset())
    uid = text_value(header, "SOPClassUID") or text_value(meta, "MediaStorageSOPClassUID")
    known = UID(uid).keyword
    if text_value(header, "Modality") in NO_IMAGE or (known and "Image" not in known):
        return True
    return bool(uid) and not known and "Rows" not in header  # a maker's private object


def _frames(header: Dataset, layout: PixelLayout, path: Path, name: str) -> list[Frame]:
    per_frame: Sequence[Dataset] = header.get("PerFrameFunctionalGroupsSequence") or ()
    if not per_frame and layout.num_frames == 1:
        return [_frame(HeaderValues((header,)), header, layout, path, name, number=0)]
    if len(per_frame) != layout.num_frames:
        raise FrameError(
            f"multi-frame object: {layout.num_frames} frames, {len(per_frame)} of them described; "
            "only enhanced objects with per-frame functional groups are read"
        )
    shared: Sequence[Dataset] = header.get("SharedFunctionalGroupsSequence") or ()
    return [
        _frame(
            HeaderValues((header, *(d for g in shared for d in _items(g)), *_items(group))),
            header, layout, path, name, number=number,
        )
        for number, group in enumerate(per_frame)
    ]  # fmt: skip


def _items(group: Dataset) -> list[Dataset]:
    """The content of the functional groups of a frame: one item each."""
    return [element.value[0] for element in group if element.VR == "SQ" and len(element.value)]


def _frame(
    values: HeaderValues,
    header: Dataset,
    layout: PixelLayout,
    path: Path,
    name: str,
    *,
    number: int,
) -> Frame:
    position = values.numbers("ImagePositionPatient", 3)
    orientation = values.numbers("ImageOrientationPatient", 6)
    spacing = values.numbers("PixelSpacing", 2)
    missing = [
        keyword
        for keyword, value in (
            ("ImagePositionPatient", position),
            ("ImageOrientationPatient", orientation),
            ("PixelSpacing", spacing),
        )
        if value is None
    ]
    if position is None or orientation is None or spacing is None:
        raise FrameError(f"has no {', '.join(missing)}: its place in the patient is unknown")
    if min(spacing) <= 0:
        raise FrameError(f"PixelSpacing {spacing[0]:g}x{spacing[1]:g} mm is not positive")
    return Frame(
        path=path,
        name=name,
        number=number,
        pixels=layout,
        series_uid=text_value(header, "SeriesInstanceUID"),
        series_number=values.integer("SeriesNumber"),
        modality=re.sub(r"[^A-Z0-9]", "", text_value(header, "Modality").upper())[:8],
        instance_uid=text_value(header, "SOPInstanceUID"),
        instance_number=values.integer("InstanceNumber"),
        position_mm=(position[0], position[1], position[2]),
        orientation=orientation,
        spacing_mm=(spacing[0], spacing[1]),
        thickness_mm=values.number("SpacingBetweenSlices", "SliceThickness"),
        rescale=_rescale(values),
        marks=_marks(values, header),
    )


def _rescale(values: HeaderValues) -> tuple[float, float] | None:
    slope, intercept = values.number("RescaleSlope"), values.number("RescaleIntercept")
    if slope is None and intercept is None:
        return None
    if slope == 0:
        raise FrameError("RescaleSlope is 0: all values are lost")
    return (1.0 if slope is None else slope), (0.0 if intercept is None else intercept)


def _marks(values: HeaderValues, header: Dataset) -> Marks:
    words = tuple(word.upper().strip() for word in values.words("FrameType", "ImageType"))
    if "MOSAIC" in words:
        raise FrameError("is a mosaic of slices in one picture, which is not read")
    kinds = [KINDS[word] for word in words if word in KINDS]
    kind = next((k for k in kinds if k not in ("magnitude", "water", "fat")), "")
    return Marks(
        kind=kind or (kinds[0] if kinds else ""),
        b_value=b_value(values, header),
        echo_time_ms=values.number("EffectiveEchoTime", "EchoTime"),
        echo_number=values.integer("EchoNumbers"),
        temporal=values.integer("TemporalPositionIndex", "TemporalPositionIdentifier"),
        image_type="/".join(words),
        acquisition=values.integer("FrameAcquisitionNumber", "AcquisitionNumber"),
        trigger_ms=values.number("NominalCardiacTriggerDelayTime", "TriggerTime"),
    )
