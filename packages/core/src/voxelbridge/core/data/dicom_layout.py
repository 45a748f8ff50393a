"""Where the pixels of a DICOM file lie and how they are coded, checked against the file's length.

The stream stands at the pixel element when the header was read up to it.
"""

import struct
from dataclasses import dataclass
from typing import BinaryIO

from pydicom import Dataset
from pydicom.uid import UID

PIXEL_DATA = 0x7FE00010
UNDEFINED = 0xFFFFFFFF
ITEM, SEQUENCE_END = 0xFFFEE000, 0xFFFEE0DD

IMPLICIT, EXPLICIT, BIG_ENDIAN = (
    "1.2.840.10008.1.2",
    "1.2.840.10008.1.2.1",
    "1.2.840.10008.1.2.2",
)
_JPEG = "1.2.840.10008.1.2.4."
# What GDCM decodes: JPEG, JPEG lossless, JPEG-LS, JPEG 2000 and run lengths.
COMPRESSED = frozenset(
    [
        "1.2.840.10008.1.2.5",
        *(_JPEG + number for number in ("50", "51", "57", "70", "80", "81", "90", "91")),
    ]
)
MAX_RATIO = 1000  # of decoded to coded bytes, in frames large enough to hurt
LARGE_FRAME_BYTES = 64 << 20


class FrameError(Exception):
    """Why a file cannot be used, worded to follow its name; holds no value of the header."""


@dataclass(frozen=True, slots=True)
class PixelLayout:
    """Size and coding of the pixels of one file; `start` and `num_bytes` bound them in the file."""

    rows: int
    columns: int
    num_frames: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    transfer_syntax: str
    start: int  # of the value of the pixel element
    num_bytes: int
    file_bytes: int

    @property
    def is_compressed(self) -> bool:
        return self.transfer_syntax in COMPRESSED

    @property
    def frame_bytes(self) -> int:
        """Bytes of one decoded frame."""
        return self.rows * self.columns * self.bits_allocated // 8


def read_layout(stream: BinaryIO, header: Dataset, *, file_bytes: int) -> PixelLayout:
    """The layout of the pixel element at which `stream` stands. Raises FrameError."""
    syntax = _transfer_syntax(header)
    start, length = _pixel_element(stream, header, big_endian=syntax == BIG_ENDIAN)
    rows, columns = _integer(header, "Rows"), _integer(header, "Columns")
    allocated = _integer(header, "BitsAllocated")
    stored = _integer(header, "BitsStored", default=allocated)
    high = _integer(header, "HighBit", default=stored - 1)
    frames = _integer(header, "NumberOfFrames", default=1)
    samples = _integer(header, "SamplesPerPixel", default=1)
    photometric = str(header.get("PhotometricInterpretation") or "MONOCHROME2").strip()
    if samples != 1 or not photometric.startswith("MONOCHROME"):
        raise FrameError(
            f"is a colour image ({samples} samples per pixel); expected one grey value per pixel"
        )
    if min(rows, columns, frames) < 1:
        raise FrameError(f"has {rows} rows, {columns} columns and {frames} frames")
    if allocated not in (8, 16, 32) or not 1 <= stored <= allocated:
        raise FrameError(f"has {stored} of {allocated} bits per pixel; 8, 16 and 32 are read")
    if not stored - 1 <= high < allocated or (syntax == BIG_ENDIAN and allocated == 8):
        raise FrameError(f"has an odd pixel layout ({stored} bits up to bit {high}, {syntax})")
    compressed = syntax in COMPRESSED
    if compressed:
        if length != UNDEFINED:
            raise FrameError("compressed pixel data is not in fragments")
        length = _fragments_length(stream, start, file_bytes, num_frames=frames)
    elif length == UNDEFINED:
        raise FrameError("uncompressed pixel data has no length")
    if length == 0:
        raise FrameError("pixel data is empty")
    if start + length > file_bytes:
        raise FrameError(
            f"is truncated: {file_bytes - start} of {length} bytes of pixel data are there"
        )
    layout = PixelLayout(
        rows, columns, frames, allocated, stored, high,
        _integer(header, "PixelRepresentation", default=0) == 1,
        syntax, start, length, file_bytes,
    )  # fmt: skip
    _check_length(layout)
    return layout


def _transfer_syntax(header: Dataset) -> str:
    meta = getattr(header, "file_meta", Dataset())
    given = str(meta.get("TransferSyntaxUID") or "")
    implicit, little = header.original_encoding
    found = BIG_ENDIAN if not little else IMPLICIT if implicit else EXPLICIT
    syntax = given or found
    if syntax in (IMPLICIT, EXPLICIT, BIG_ENDIAN):
        return found  # some writers name another one than they use
    if syntax not in COMPRESSED:
        name = UID(syntax).name if UID(syntax).is_transfer_syntax else "unknown"
        raise FrameError(
            f"transfer syntax {name} is not read; decompress the files, for instance with gdcmconv"
        )
    return syntax


def _pixel_element(stream: BinaryIO, header: Dataset, *, big_endian: bool) -> tuple[int, int]:
    """Offset and length of the value of the pixel element."""
    implicit, _ = header.original_encoding
    order = ">" if big_endian else "<"
    start = stream.read(8)
    if len(start) < 8:
        raise FrameError("has no pixel data")
    group, element, length = struct.unpack(f"{order}HHL", start)
    if group << 16 | element != PIXEL_DATA:
        raise FrameError("holds floating-point pixels, which are not read")
    if not implicit:
        if start[4:6] not in (b"OB", b"OW"):
            raise FrameError("pixel data has an unknown type")
        rest = stream.read(4)
        if len(rest) < 4:
            raise FrameError("has no pixel data")
        (length,) = struct.unpack(f"{order}L", rest)
    return stream.tell(), length


def _fragments_length(stream: BinaryIO, start: int, file_bytes: int, *, num_frames: int) -> int:
    """Bytes of the items of compressed pixel data, their end mark included."""
    count, place = -1, start  # the first item is the table of offsets
    while True:
        stream.seek(place)
        item = stream.read(8)
        if len(item) < 8:
            raise FrameError("is truncated: the end of its compressed pixel data is missing")
        group, element, length = struct.unpack("<HHL", item)
        place += 8
        if group << 16 | element == SEQUENCE_END:
            break
        if group << 16 | element != ITEM or place + length > file_bytes:
            raise FrameError("is truncated or damaged in its compressed pixel data")
        place += length
        count += length > 0 or count < 0
    if count < 1:
        raise FrameError("pixel data is empty")
    if count < num_frames:
        raise FrameError(f"has {num_frames} frames and compressed data for {count}")
    return place - start


def _check_length(layout: PixelLayout) -> None:
    expected = layout.frame_bytes * layout.num_frames
    if layout.is_compressed:
        if layout.frame_bytes > LARGE_FRAME_BYTES and expected > MAX_RATIO * layout.num_bytes:
            raise FrameError(
                f"says {expected} bytes of pixels, too many for {layout.num_bytes} compressed bytes"
            )
    elif not expected <= layout.num_bytes <= expected + 2:  # padded to an even length
        raise FrameError(f"has {layout.num_bytes} bytes of pixel data, its header says {expected}")


def _integer(header: Dataset, keyword: str, *, default: int | None = None) -> int:
    value = header.get(keyword)
    if value is None or value == "":
        if default is None:
            raise FrameError(f"has no {keyword}")
        return default
    return int(value)
