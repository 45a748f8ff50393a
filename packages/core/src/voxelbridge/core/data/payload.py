"""What must hold before the voxels of an image file are believed: lengths, checksums, own folder.

SimpleITK fills a truncated NIfTI file with zeros without a word, ignores gzip checksums, turns NaN
in NIfTI into 0 and lets a detached header name any file of the machine. Hence the NIfTI voxels are
decoded here (one decompression, checked to the last byte), and NRRD and MetaImage payloads are
checked here before SimpleITK reads them.
"""

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.errors import DataError

NIFTI_DTYPES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8",
    256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
}  # fmt: skip
NRRD_ITEM_BYTES = {
    1: ("signed char", "int8", "int8_t", "uchar", "unsigned char", "uint8", "uint8_t"),
    2: ("short", "short int", "signed short", "signed short int", "int16", "int16_t", "ushort",
        "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    4: ("int", "signed int", "int32", "int32_t", "uint", "unsigned int", "uint32", "uint32_t",
        "float"),
    8: ("longlong", "long long", "long long int", "signed long long", "signed long long int",
        "int64", "int64_t", "ulonglong", "unsigned long long", "unsigned long long int", "uint64",
        "uint64_t", "double"),
}  # fmt: skip
META_ITEM_BYTES = {
    "MET_CHAR": 1, "MET_UCHAR": 1, "MET_SHORT": 2, "MET_USHORT": 2, "MET_INT": 4, "MET_UINT": 4,
    "MET_LONG": 4, "MET_ULONG": 4, "MET_LONG_LONG": 8, "MET_ULONG_LONG": 8, "MET_FLOAT": 4,
    "MET_DOUBLE": 8,
}  # fmt: skip
MAX_DEFLATE_RATIO = 1032  # the largest expansion that deflate can reach, bytes out per byte in
HEADER_LIMIT = 1 << 20  # bytes: no text header of a single image is longer
CHUNK = 1 << 20  # bytes read at once while a checksum is followed


@dataclass(frozen=True)
class NiftiHeader:
    """The part of a NIfTI-1 or -2 header that decides where and how the voxels are stored."""

    shape: tuple[int, int, int]  # (z, y, x)
    dtype: np.dtype[Any]
    offset: int  # bytes from the file's (decompressed) beginning to the first voxel
    slope: float
    intercept: float

    @property
    def payload_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_nifti_header(path: Path) -> NiftiHeader:
    """Parses and checks the header of a single-file NIfTI image (.nii, .nii.gz) of one channel."""
    with _open_nifti(path) as stream:
        header = _parse_nifti(path, _read(path, stream, 540))
    size = path.stat().st_size
    possible = size * MAX_DEFLATE_RATIO if _is_gzip(path) else size
    if header.offset + header.payload_bytes > possible:
        raise DataError(
            f"{path}: truncated: the header declares {header.payload_bytes} bytes of voxels, a "
            f"file of {size} bytes cannot hold them; copy the file again"
        )
    return header


def read_nifti_voxels(path: Path) -> NDArray[Any]:
    """The voxels (D, H, W) of a NIfTI file with slope and intercept applied; NaN stays NaN.

    Every byte is accounted for: a short payload, a wrong gzip checksum or length is a DataError.
    """
    header = read_nifti_header(path)
    buffer = bytearray(header.payload_bytes)
    with _open_nifti(path) as stream:
        _read(path, stream, header.offset)
        done = _fill(path, stream, memoryview(buffer))
        if done < len(buffer):
            raise _truncated(path, done, len(buffer))
        _drain(path, stream, limit=len(buffer) + CHUNK)  # the gzip checksum comes last
    stored = np.frombuffer(buffer, dtype=header.dtype).reshape(header.shape)
    voxels = stored.astype(header.dtype.newbyteorder("="), copy=False)
    if header.slope == 1.0 and header.intercept == 0.0:
        return voxels
    wide = np.float64 if voxels.dtype == np.float64 else np.float32
    return voxels.astype(wide) * wide(header.slope) + wide(header.intercept)


def check_payload(path: Path) -> None:
    """Refuses an NRRD or MetaImage file whose voxels are missing, damaged or in another folder."""
    match path.suffix.lower():
        case ".nrrd":
            _check_nrrd(path)
        case ".mha" | ".mhd":
            _check_meta_image(path)
        case suffix:
            raise ValueError(f"no payload check for {suffix}")


def _parse_nifti(path: Path, raw: bytes) -> NiftiHeader:
    size_little, size_big = (struct.unpack(f"{order}i", raw[:4])[0] for order in "<>")
    order = "<" if size_little in (348, 540) else ">"
    match size_little if order == "<" else size_big:
        case 348:
            dims = struct.unpack(f"{order}8h", raw[40:56])
            (code,) = struct.unpack(f"{order}h", raw[70:72])
            pixdim = struct.unpack(f"{order}8f", raw[76:108])
            offset, slope, intercept = struct.unpack(f"{order}3f", raw[108:120])
            magic, first = raw[344:347], 352
        case 540:
            magic, first = raw[4:7], 544
            (code,) = struct.unpack(f"{order}h", raw[12:14])
            dims = struct.unpack(f"{order}8q", raw[16:80])
            pixdim = struct.unpack(f"{order}8d", raw[104:168])
            (offset,) = struct.unpack(f"{order}q", raw[168:176])
            slope, intercept = struct.unpack(f"{order}2d", raw[176:192])
        case _:
            raise DataError(f"{path}: not a NIfTI file (its header size is neither 348 nor 540)")
    if magic not in (b"n+1", b"n+2"):
        raise DataError(f"{path}: not a single-file NIfTI image (magic {magic!r})")
    if code not in NIFTI_DTYPES:
        raise DataError(f"{path}: NIfTI data type {code} is not a real scalar; convert the file")
    if not (math.isfinite(offset) and first <= offset < HEADER_LIMIT * 64):
        raise DataError(f"{path}: NIfTI vox_offset is {offset}, expected at least {first}")
    if not math.isfinite(slope) or slope == 0.0:  # both mean "not scaled" (NIfTI-1, nibabel)
        slope, intercept = 1.0, 0.0
    intercept = intercept if math.isfinite(intercept) else 0.0
    shape = _nifti_shape(path, dims, pixdim)
    return NiftiHeader(shape, np.dtype(order + NIFTI_DTYPES[code]), int(offset), slope, intercept)


def _nifti_shape(
    path: Path, dims: tuple[int, ...], pixdim: tuple[float, ...]
) -> tuple[int, int, int]:
    if not 3 <= dims[0] <= 7 or min(dims[1 : dims[0] + 1]) < 1:
        raise DataError(f"{path}: NIfTI dimensions {list(dims)}, expected three positive sizes")
    if math.prod(dims[4 : dims[0] + 1]) != 1:
        raise DataError(
            f"{path}: {dims[0]}-dimensional NIfTI image {list(dims[1 : dims[0] + 1])}; split it "
            "into one three-dimensional file per channel"
        )
    if not all(math.isfinite(step) and step > 0 for step in pixdim[1:4]):
        raise DataError(f"{path}: NIfTI spacing {list(pixdim[1:4])}, expected positive mm")
    return dims[3], dims[2], dims[1]


def _check_nrrd(path: Path) -> None:
    with path.open("rb") as stream:
        head = stream.read(HEADER_LIMIT)
    if not head.startswith(b"NRRD"):
        raise DataError(f"{path}: not an NRRD file")
    ends = [at + len(mark) for mark in (b"\n\n", b"\r\n\r\n") if (at := head.find(mark)) >= 0]
    end = min(ends, default=len(head))
    fields: dict[str, str] = {}
    for line in head[:end].decode("latin-1").splitlines():
        key, separator, value = line.partition(":")
        if separator and not line.startswith("#") and not value.startswith("="):
            fields.setdefault(key.strip().lower(), value.strip())
    detached = fields.get("data file", fields.get("datafile"))
    if detached is None and not ends:
        raise DataError(f"{path}: truncated: the NRRD header does not end")
    payload = path if detached is None else _own_folder(path, detached)
    if fields.get("byte skip", "0") != "0" or fields.get("line skip", "0") != "0":
        raise DataError(f"{path}: NRRD with 'byte skip' or 'line skip'; save the file again")
    item = next((n for n, names in NRRD_ITEM_BYTES.items() if fields.get("type") in names), None)
    sizes = _integers(path, "sizes", fields.get("sizes", ""))
    if item is None or not 3 <= len(sizes) <= 4:
        raise DataError(f"{path}: NRRD type {fields.get('type')!r} of sizes {sizes}; expected 3-D")
    expected = math.prod(sizes) * item
    offset = end if detached is None else 0
    match fields.get("encoding", "").lower():
        case "raw":
            _check_length(path, payload.stat().st_size - offset, expected)
        case "gzip" | "gz":
            _check_compressed(path, payload, offset, expected, wbits=31)
        case other:
            raise DataError(f"{path}: NRRD encoding {other!r}, expected raw or gzip")


def _check_meta_image(path: Path) -> None:
    with path.open("rb") as stream:
        head = stream.read(HEADER_LIMIT)
    fields: dict[str, str] = {}
    end = 0
    while end < len(head) and "ElementDataFile" not in fields:
        stop = head.find(b"\n", end)
        stop = len(head) if stop < 0 else stop + 1
        key, separator, value = head[end:stop].decode("latin-1").partition("=")
        if not separator:
            raise DataError(f"{path}: not a MetaImage file (a header line without '=')")
        fields[key.strip()] = value.strip()
        end = stop
    if "ElementDataFile" not in fields or "ElementType" not in fields:
        raise DataError(f"{path}: not a MetaImage file (ElementType or ElementDataFile missing)")
    sizes = _integers(path, "DimSize", fields.get("DimSize", ""))
    if fields.get("NDims") != "3" or len(sizes) != 3 or min(sizes) < 1:
        raise DataError(f"{path}: MetaImage NDims {fields.get('NDims')}, sizes {sizes}; expected 3")
    if fields["ElementType"] not in META_ITEM_BYTES:
        raise DataError(f"{path}: MetaImage type {fields['ElementType']} is not a real scalar")
    if fields.get("HeaderSize", "0") not in ("0", "-1"):
        raise DataError(f"{path}: MetaImage with HeaderSize; save the file again")
    named = fields["ElementDataFile"]
    payload = path if named.upper() == "LOCAL" else _own_folder(path, named)
    offset = end if payload is path else 0
    expected = math.prod(sizes) * META_ITEM_BYTES[fields["ElementType"]]
    expected *= int(fields.get("ElementNumberOfChannels", "1"))
    if fields.get("CompressedData", "False").lower() in ("true", "1"):
        _check_compressed(path, payload, offset, expected, wbits=47)  # zlib or gzip, by its header
    else:
        _check_length(path, payload.stat().st_size - offset, expected)


def _own_folder(header: Path, name: str) -> Path:
    # Headers name files; a strange one must not make us read elsewhere, also not through a link.
    payload = header.parent / name
    plain = name and Path(name).name == name and not name.upper().startswith("LIST")
    if not plain or "%" in name or not payload.is_file():
        raise DataError(
            f"{header}: its voxels are in {name!r}; expected one existing file in the same folder"
        )
    if payload.resolve().parent not in (header.resolve().parent, header.parent.resolve()):
        raise DataError(f"{header}: {name!r} links to another folder; copy the file beside it")
    return payload


def _integers(path: Path, key: str, text: str) -> list[int]:
    try:
        return [int(word) for word in text.split()]
    except ValueError:
        raise DataError(f"{path}: {key} is {text!r}, expected integers") from None


def _check_length(path: Path, got: int, expected: int) -> None:
    if got < expected:
        raise _truncated(path, max(got, 0), expected)


def _check_compressed(path: Path, payload: Path, offset: int, expected: int, *, wbits: int) -> None:
    decoder = zlib.decompressobj(wbits)
    got = 0
    with payload.open("rb") as stream:
        stream.seek(offset)
        try:
            while not decoder.eof and (piece := stream.read(CHUNK // 16)):
                got += len(decoder.decompress(piece))
                if got > 2 * expected + CHUNK:
                    raise DataError(f"{path}: more voxels than its header declares ({expected})")
        except zlib.error as error:
            raise DataError(f"{path}: damaged voxels ({error}); copy the file again") from error
    if got < expected or not decoder.eof:
        raise _truncated(path, got, expected)


def _truncated(path: Path, got: int, expected: int) -> DataError:
    return DataError(
        f"{path}: truncated: {got} bytes of voxels, the header declares {expected}; "
        "copy the file again"
    )


def _is_gzip(path: Path) -> bool:
    return path.name.lower().endswith(".gz")


def _open_nifti(path: Path) -> BinaryIO:
    # typeshed gives GzipFile no common base with open()'s result; both are binary readers
    return gzip.open(path, "rb") if _is_gzip(path) else path.open("rb")  # type: ignore[return-value]


def _read(path: Path, stream: BinaryIO, count: int) -> bytes:
    buffer = bytearray(count)
    done = _fill(path, stream, memoryview(buffer))
    if done < min(count, 352):
        raise DataError(f"{path}: truncated: it ends within the NIfTI header")
    return bytes(buffer)


def _fill(path: Path, stream: BinaryIO, target: memoryview) -> int:
    done = 0
    try:
        while done < len(target):
            count = stream.readinto(target[done : done + CHUNK])  # type: ignore[attr-defined]
            if not count:
                break
            done += count
    except (EOFError, OSError, zlib.error) as error:  # BadGzipFile is an OSError
        raise _damaged(path, error) from error
    return done


def _drain(path: Path, stream: BinaryIO, *, limit: int) -> None:
    rest = 0
    try:
        while piece := stream.read(CHUNK):
            rest += len(piece)
            if rest > limit:
                raise DataError(f"{path}: holds far more bytes than its header declares")
    except (EOFError, OSError, zlib.error) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: truncated or damaged ({error}); copy the file again")
