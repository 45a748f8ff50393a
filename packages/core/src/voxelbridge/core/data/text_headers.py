"""NRRD and MetaImage: text headers and the voxels they describe, read without SimpleITK.

MetaIO crashes on strange headers and both libraries read any file that a header names; the two
formats are simple enough to read here. Refused rather than guessed: skips, lists of files, text
encodings, geometry that is not orthogonal.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.data.payload import (
    Compression,
    check_regular_file,
    check_size,
    open_payload,
    payload_in_own_folder,
    truncated,
)
from voxelbridge.core.data.volume import Grid
from voxelbridge.core.errors import DataError

HEADER_LIMIT = 1 << 20  # bytes: no text header of a single image is longer
NRRD_TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "signed long long int",
           "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}  # fmt: skip
META_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4",
    "MET_UINT": "u4", "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip
# World axes of NRRD's spaces that point against LPS; the last three name no anatomy and are taken
# as LPS, as ITK does.
NRRD_FLIPS = {
    "left-posterior-superior": (1, 1, 1), "lps": (1, 1, 1),
    "right-anterior-superior": (-1, -1, 1), "ras": (-1, -1, 1),
    "left-anterior-superior": (1, -1, 1), "las": (1, -1, 1),
    "": (1, 1, 1), "scanner-xyz": (1, 1, 1), "3d-right-handed": (1, 1, 1),
}  # fmt: skip


@dataclass(frozen=True)
class TextImage:
    """What a checked header says: the grid, and where and how the voxels lie."""

    path: Path
    grid: Grid
    dtype: np.dtype[Any]
    payload: Path
    offset: int
    compression: Compression

    def read_voxels(self) -> NDArray[Any]:
        """The voxels (D, H, W); DataError unless the payload holds exactly these."""
        stored = np.empty(self.grid.shape, dtype=self.dtype)
        target = stored.reshape(-1).view(np.uint8).data
        with open_payload(
            self.path, self.payload, offset=self.offset, compression=self.compression
        ) as reader:
            if (done := reader.fill(target)) < len(target):
                raise truncated(self.path, done, len(target))
            reader.finish()
        return stored.astype(self.dtype.newbyteorder("="), copy=False)


def read_text_image(path: Path) -> TextImage:
    """The checked header of an .nrrd, .nhdr, .mha or .mhd file; the payload's size is checked."""
    check_regular_file(path)
    with path.open("rb") as stream:
        head = stream.read(HEADER_LIMIT)
    try:
        if path.suffix.lower() in (".nrrd", ".nhdr"):
            image = _nrrd(path, head)
        else:
            image = _meta_image(path, head)
    except ValueError as error:  # numbers that are none, grids that cannot be
        reason = " ".join(str(error).split())[:200]  # a line of a strange header may be long
        raise DataError(f"{path}: header cannot be used ({reason})") from error
    available = image.payload.stat().st_size - image.offset
    expected = math.prod(image.grid.shape) * image.dtype.itemsize
    check_size(path, available, expected, compression=image.compression)
    return image


def _nrrd(path: Path, head: bytes) -> TextImage:
    if not head.startswith(b"NRRD"):
        raise DataError(f"{path}: not an NRRD file")
    ends = [at + len(mark) for mark in (b"\n\n", b"\r\n\r\n") if (at := head.find(mark)) >= 0]
    end = min(ends, default=len(head))
    fields = _nrrd_fields(path, head[:end])
    detached = fields.get("data file")
    if detached is None and path.suffix.lower() == ".nhdr":
        raise DataError(f"{path}: a detached header without 'data file'; save the image again")
    if detached is None and not ends:
        raise DataError(f"{path}: truncated: the NRRD header does not end")
    for key in ("byte skip", "line skip"):
        if fields.get(key, "0") != "0":
            raise DataError(f"{path}: NRRD with {key!r}; save the file again")
    kind = next((kind for kind, names in NRRD_TYPES.items() if fields.get("type") in names), None)
    if kind is None:
        raise DataError(f"{path}: NRRD type {fields.get('type')!r} is not a real scalar")
    order = {"little": "<", "big": ">"}.get(fields.get("endian", "").lower())
    if order is None and kind not in ("i1", "u1"):
        raise DataError(f"{path}: NRRD endian {fields.get('endian')!r}, expected little or big")
    match fields.get("encoding", "").lower():
        case "raw":
            compression: Compression = "none"
        case "gzip" | "gz":
            compression = "gzip"
        case other:
            raise DataError(f"{path}: NRRD encoding {other!r}, expected raw or gzip")
    return TextImage(
        path,
        _nrrd_grid(path, fields),
        np.dtype((order or "<") + kind),
        path if detached is None else payload_in_own_folder(path, detached),
        end if detached is None else 0,
        compression,
    )


def _nrrd_fields(path: Path, head: bytes) -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in head.decode("latin-1").splitlines()[1:]:
        key, separator, value = line.partition(":")
        if not separator or line.startswith("#") or value.startswith("="):
            continue  # a comment, or a note "key:=value"
        key = key.strip().lower()
        key = {"datafile": "data file", "byteskip": "byte skip", "lineskip": "line skip"}.get(
            key, key
        )
        if key in fields:
            raise DataError(f"{path}: NRRD field {key!r} stands twice; save the file again")
        fields[key] = value.strip()
    return fields


def _nrrd_grid(path: Path, fields: dict[str, str]) -> Grid:
    sizes = [int(word) for word in fields.get("sizes", "").split()]
    if fields.get("dimension") != str(len(sizes)) or min(sizes, default=0) < 1:
        raise DataError(f"{path}: NRRD dimension {fields.get('dimension')!r}, sizes {sizes}")
    words = re.findall(r"none|\([^()]*\)", fields.get("space directions", ""), re.IGNORECASE)
    spacings = [float(word) for word in fields.get("spacings", "").split()]
    if words:
        space = [number for number, word in enumerate(words) if word.lower() != "none"]
    else:
        space = list(range(len(sizes)))[:3]
    extra = [size for number, size in enumerate(sizes) if number not in space]
    if len(space) != 3 or (words and len(words) != len(sizes)) or any(n != 1 for n in extra):
        raise DataError(
            f"{path}: {len(sizes)}-dimensional NRRD of sizes {sizes}; expected three dimensions "
            "with one value per voxel"
        )
    if fields.get("axis mins", fields.get("axismins")) is not None and not words:
        raise DataError(f"{path}: NRRD placed by 'axis mins'; save it with 'space directions'")
    flips = NRRD_FLIPS.get(fields.get("space", "").lower())
    if flips is None:
        raise DataError(f"{path}: NRRD space {fields['space']!r}; save it in LPS or RAS")
    if words:
        columns = np.array([_vector(words[number]) for number in space]).T  # (3, 3): x, y, z axes
    elif spacings:
        columns = np.diag(np.array([spacings[number] for number in space]))
    else:
        columns = np.eye(3)
    origin = _vector(fields["space origin"]) if "space origin" in fields else np.zeros(3)
    affine = np.column_stack([columns[:, ::-1], origin]) * np.array(flips)[:, None] + 0.0  # no -0.0
    x, y, z = (sizes[number] for number in space)
    return Grid((z, y, x), affine)


def _vector(text: str) -> NDArray[np.float64]:
    numbers = [float(word) for word in text.strip("() ").split(",")]
    if len(numbers) != 3:
        raise ValueError(f"{text!r} is no vector of three numbers")
    return np.array(numbers)


def _meta_image(path: Path, head: bytes) -> TextImage:
    fields, end = _meta_fields(path, head)
    sizes = [int(word) for word in fields.get("DimSize", "").split()]
    if fields.get("NDims") != "3" or len(sizes) != 3 or min(sizes) < 1:
        raise DataError(
            f"{path}: MetaImage NDims {fields.get('NDims')!r}, sizes {sizes}; expected 3"
        )
    kind = META_TYPES.get(fields.get("ElementType", ""))
    if kind is None or fields.get("ElementNumberOfChannels", "1") != "1":
        raise DataError(
            f"{path}: MetaImage type {fields.get('ElementType')!r} with "
            f"{fields.get('ElementNumberOfChannels', '1')!r} values per voxel; expected one number"
        )
    scaled = (("ElementToIntensityFunctionSlope", 1), ("ElementToIntensityFunctionOffset", 0))
    for key, plain in scaled:
        if float(fields.get(key, plain)) != plain:
            raise DataError(f"{path}: MetaImage with {key}; save the values themselves")
    if fields.get("HeaderSize", "0") not in ("0", "-1") or not _flag(fields, "BinaryData", "True"):
        raise DataError(f"{path}: MetaImage with HeaderSize or text voxels; save the file again")
    msb = fields.get("BinaryDataByteOrderMSB", fields.get("ElementByteOrderMSB", "False"))
    named = fields["ElementDataFile"]
    local = named.upper() == "LOCAL"
    packed = _flag(fields, "CompressedData", "False")
    return TextImage(
        path,
        _meta_grid(path, fields, sizes),
        np.dtype((">" if msb.lower() in ("true", "1") else "<") + kind),
        path if local else payload_in_own_folder(path, named),
        end if local else 0,
        "zlib" if packed else "none",
    )


def _meta_fields(path: Path, head: bytes) -> tuple[dict[str, str], int]:
    """The fields up to ElementDataFile, which is always the last, and where that line ends."""
    fields: dict[str, str] = {}
    end = 0
    while end < len(head):
        stop = head.find(b"\n", end)
        stop = len(head) if stop < 0 else stop + 1
        key, separator, value = head[end:stop].decode("latin-1").partition("=")
        key, end = key.strip(), stop
        if not separator or key in fields:
            raise DataError(f"{path}: not a MetaImage file (a line without '=' or a field twice)")
        fields[key] = value.strip()
        if key == "ElementDataFile":
            return fields, end
    raise DataError(f"{path}: not a MetaImage file, or truncated (no ElementDataFile)")


def _meta_grid(path: Path, fields: dict[str, str], sizes: list[int]) -> Grid:
    def numbers(count: int, *names: str) -> NDArray[np.float64] | None:
        text = next((fields[name] for name in names if name in fields), None)
        if text is None:
            return None
        values = np.array([float(word) for word in text.split()])
        if len(values) != count:
            raise DataError(f"{path}: {names[0]} is {text!r}, expected {count} numbers")
        return values

    spacing = numbers(3, "ElementSpacing", "ElementSize")
    origin = numbers(3, "Offset", "Position", "Origin")
    rows = numbers(9, "TransformMatrix", "Rotation", "Orientation")
    axes = np.eye(3) if rows is None else rows.reshape(3, 3)  # row k: where axis k points
    if not np.allclose(np.linalg.norm(axes, axis=1), 1.0, atol=1e-3):
        raise DataError(f"{path}: TransformMatrix {axes.tolist()} holds axes not of length 1")
    if spacing is not None and not (spacing > 0).all():  # also for NaN
        raise DataError(f"{path}: ElementSpacing {spacing.tolist()}, expected positive mm")
    columns = axes.T * (np.ones(3) if spacing is None else spacing)
    place = np.zeros(3) if origin is None else origin
    x, y, z = sizes
    return Grid((z, y, x), np.column_stack([columns[:, ::-1], place]) + 0.0)  # no -0.0


def _flag(fields: dict[str, str], key: str, default: str) -> bool:
    return fields.get(key, default).lower() in ("true", "1")
