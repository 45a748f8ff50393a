"""The voxels of a DICOM stack: stored values of each frame, rescaled to what they measure.

GDCM sees only a file written here, with the compressed pixels and nothing else of the original:
the stored values come back untouched by its own rescaling, and no strange header reaches it. Its
decoders may still fail hard on damaged data; decode unknown files in a process of their own.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813 - the name everybody uses
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.filewriter import dcmwrite
from pydicom.uid import UID, generate_uid

from voxelbridge.core.data.dicom_headers import Frame
from voxelbridge.core.data.dicom_layout import BIG_ENDIAN, PixelLayout
from voxelbridge.core.data.dicom_stack import Stack
from voxelbridge.core.data.volume import Volume
from voxelbridge.core.errors import DataError

SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
MULTI_FRAME_BYTE = "1.2.840.10008.5.1.4.1.1.7.2"
MULTI_FRAME_WORD = "1.2.840.10008.5.1.4.1.1.7.3"


def read_stack(stack: Stack) -> Volume:
    """The volume (1, D, H, W) of a stack, slope and intercept applied slice by slice.

    int16 where every value is an integer that fits, else float32. Raises DataError naming a file.
    """
    stored = _stored_values(stack.frames)
    rescales = [frame.rescale or (1.0, 0.0) for frame in stack.frames]
    array = _rescaled(stored, rescales)
    if stack.fraction.any():
        array = _bridged(array, stack)
    return Volume(array[None], stack.grid)


def read_file_frames(path: Path, layout: PixelLayout) -> NDArray[Any]:
    """All frames (F, H, W) of a file as stored integers. Raises DataError."""
    try:
        with path.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size != layout.file_bytes:
                raise DataError(f"{path}: changed since its header was read; start again")
            stream.seek(layout.start)
            raw = stream.read(layout.num_bytes)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if len(raw) != layout.num_bytes:
        raise DataError(f"{path}: truncated, {len(raw)} of {layout.num_bytes} bytes of pixels")
    values = _decoded(path, raw, layout) if layout.is_compressed else _native(raw, layout)
    return _without_foreign_bits(values, layout)


def _stored_values(frames: tuple[Frame, ...]) -> list[NDArray[Any]]:
    """One (H, W) array per frame; a file with several frames is read once."""
    by_file: dict[Path, list[int]] = {}
    for index, frame in enumerate(frames):
        by_file.setdefault(frame.path, []).append(index)
    stored: dict[int, NDArray[Any]] = {}
    for path, indices in by_file.items():
        values = read_file_frames(path, frames[indices[0]].pixels)
        for index in indices:
            stored[index] = values[frames[index].number]
    return [stored[index] for index in range(len(frames))]


def _native(raw: bytes, layout: PixelLayout) -> NDArray[Any]:
    order = ">" if layout.transfer_syntax == BIG_ENDIAN else "<"
    dtype = np.dtype(f"{order}{'i' if layout.signed else 'u'}{layout.bits_allocated // 8}")
    count = layout.num_frames * layout.rows * layout.columns
    values = np.frombuffer(raw, dtype=dtype, count=count)
    return values.reshape(layout.num_frames, layout.rows, layout.columns)


def _decoded(path: Path, raw: bytes, layout: PixelLayout) -> NDArray[Any]:
    sitk.ProcessObject.GlobalWarningDisplayOff()  # our errors say it in one line
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    try:
        with _scratch_file(_bare_file(raw, layout)) as name, _silent_libraries():
            reader.SetFileName(name)
            values = sitk.GetArrayFromImage(reader.Execute())
    except RuntimeError as error:
        raise DataError(f"{path}: its compressed pixels cannot be decoded") from error
    shape = (layout.num_frames, layout.rows, layout.columns)
    if values.size != np.prod(shape) or values.dtype.kind not in "iu":
        raise DataError(f"{path}: decoded pixels {values.shape} do not fit the header's {shape}")
    return values.reshape(shape)


def _bare_file(raw: bytes, layout: PixelLayout) -> bytes:
    """A DICOM file that holds these compressed pixels and what is needed to decode them."""
    several = layout.num_frames > 1
    word = MULTI_FRAME_WORD if layout.bits_allocated > 8 else MULTI_FRAME_BYTE
    content = Dataset()
    content.SOPClassUID = word if several else SECONDARY_CAPTURE
    content.SOPInstanceUID = generate_uid(entropy_srcs=["voxelbridge"])
    content.SamplesPerPixel = 1
    content.PhotometricInterpretation = "MONOCHROME2"
    content.Rows, content.Columns = layout.rows, layout.columns
    if several:
        content.NumberOfFrames = layout.num_frames
    content.BitsAllocated, content.BitsStored = layout.bits_allocated, layout.bits_stored
    content.HighBit, content.PixelRepresentation = layout.high_bit, int(layout.signed)
    content.PixelData = raw[:-8]  # the end mark is written anew
    content["PixelData"].VR = "OB"
    content["PixelData"].is_undefined_length = True
    content.file_meta = FileMetaDataset()
    content.file_meta.TransferSyntaxUID = UID(layout.transfer_syntax)
    content.file_meta.MediaStorageSOPClassUID = UID(content.SOPClassUID)
    content.file_meta.MediaStorageSOPInstanceUID = content.SOPInstanceUID
    buffer = BytesIO()
    dcmwrite(buffer, content, enforce_file_format=True)
    return buffer.getvalue()


@contextmanager
def _scratch_file(content: bytes) -> Iterator[str]:
    """The name of a file with `content` that lives in memory where the system can do that."""
    if hasattr(os, "memfd_create"):
        with os.fdopen(os.memfd_create("pixels"), "wb") as stream:
            stream.write(content)
            stream.flush()
            yield f"/proc/self/fd/{stream.fileno()}"
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "pixels.dcm"
            path.write_bytes(content)
            yield str(path)


@contextmanager
def _silent_libraries() -> Iterator[None]:
    """Keeps C libraries from printing: the decoders of JPEG report damage on standard error."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _without_foreign_bits(values: NDArray[Any], layout: PixelLayout) -> NDArray[Any]:
    """Values of the stored bits alone: old files keep overlays in the others."""
    unused = layout.bits_allocated - layout.bits_stored
    if unused == 0 or layout.is_compressed:
        return values
    dtype = np.dtype(f"{'i' if layout.signed else 'u'}{layout.bits_allocated // 8}")
    above = layout.bits_allocated - 1 - layout.high_bit
    return (values.astype(dtype) << above) >> unused  # the right shift keeps the sign


def _rescaled(stored: list[NDArray[Any]], rescales: list[tuple[float, float]]) -> NDArray[Any]:
    whole = all(slope.is_integer() and intercept.is_integer() for slope, intercept in rescales)
    limits = np.iinfo(np.int16)
    small = whole and all(
        limits.min <= end * slope + intercept <= limits.max
        for values, (slope, intercept) in zip(stored, rescales, strict=True)
        for end in (float(values.min()), float(values.max()))
    )
    dtype = np.dtype(np.int16 if small else np.float32)
    array = np.empty((len(stored), *stored[0].shape), dtype=dtype)
    for number, (values, (slope, intercept)) in enumerate(zip(stored, rescales, strict=True)):
        if (slope, intercept) == (1.0, 0.0):
            array[number] = values
        elif small:
            array[number] = values.astype(np.int32) * int(slope) + int(intercept)
        else:
            array[number] = values.astype(np.float64) * slope + intercept
    return array


def _bridged(array: NDArray[Any], stack: Stack) -> NDArray[np.float32]:
    bridged = array[stack.lower].astype(np.float32)
    for number in np.flatnonzero(stack.fraction):
        weight = np.float32(stack.fraction[number])
        bridged[number] *= 1 - weight
        bridged[number] += weight * array[stack.lower[number] + 1]
    return bridged
