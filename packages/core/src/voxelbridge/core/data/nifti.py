"""NIfTI-1 and -2 files: their voxels, checked to the last byte, and what is wrong in their headers.

Only the geometry is left to SimpleITK, which turns NaN voxels into 0 and believes cut files.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.data.payload import (
    PayloadReader,
    check_regular_file,
    check_size,
    open_payload,
    truncated,
)
from voxelbridge.core.errors import DataError

NIFTI_DTYPES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8",
    256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
}  # fmt: skip
HEADER_BYTES = 544  # NIfTI-2 with the flag of its extensions; NIfTI-1 has 352
MAX_OFFSET = 1 << 26  # bytes: no header extension is larger
MILLIMETRES = (0, 2)  # xyzt_units of space: unknown or mm
XFORM_CODES = range(6)
SHEAR_TOLERANCE = 1e-3  # cosine between axes of an sform
FORMS_TOLERANCE = 0.1  # of the smallest spacing, between sform and qform at any corner

Frames = Literal["only", "first", "mean"]


@dataclass(frozen=True)
class NiftiHeader:
    """The part of a NIfTI-1 or -2 header that decides where and how the voxels are stored."""

    shape: tuple[int, int, int]  # (z, y, x) of one frame
    frames: int  # product of the sizes past the third
    dtype: np.dtype[Any]
    offset: int  # bytes from the file's (unpacked) beginning to the first voxel
    slope: float
    intercept: float

    @property
    def frame_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def payload_bytes(self) -> int:
        return self.frames * self.frame_bytes


@dataclass(frozen=True)
class _Fields:
    """The fields of either version as they stand in the file."""

    order: str  # of the bytes, for struct
    first: int  # smallest offset of the voxels
    dims: tuple[int, ...]
    pixdim: tuple[float, ...]
    code: int
    offset: float
    slope: float
    intercept: float
    units: int
    qform_code: int
    sform_code: int
    quaternion: tuple[float, ...]  # b, c, d, offset x, y, z
    sform: NDArray[np.float64]  # (3, 4): voxel (x, y, z, 1) to RAS mm


def read_nifti_header(path: Path) -> NiftiHeader:
    """Parses and checks the header of a single-file NIfTI image (.nii, .nii.gz)."""
    size = check_regular_file(path)
    fields = _fields(path)
    header = _checked(path, fields)
    if _is_gzip(path):
        check_size(path, size, header.offset + header.payload_bytes, compression="gzip")
    else:
        check_size(path, size - header.offset, header.payload_bytes, compression="none")
    return header


def read_nifti_voxels(path: Path, *, frames: Frames = "only") -> NDArray[Any]:
    """The voxels (D, H, W) of a NIfTI file with slope and intercept applied; NaN stays NaN.

    A file of several frames is refused unless `frames` says which volume is meant: the first, or
    the mean of all (float32).
    """
    header = read_nifti_header(path)
    check_frames(path, header, frames)
    compression = "gzip" if _is_gzip(path) else "none"
    with open_payload(path, path, offset=0, compression=compression) as reader:
        reader.skip(header.offset)
        stored = _frame(path, header, reader)
        total = stored.astype(np.float64) if frames == "mean" and header.frames > 1 else None
        for _ in range(1, header.frames):  # read even where not needed: the checksum comes last
            later = _frame(path, header, reader)
            if total is not None:
                total += later
        reader.finish()
    if total is not None:
        mean = total / header.frames * header.slope + header.intercept
        return mean.astype(np.float32)
    voxels = stored.astype(header.dtype.newbyteorder("="), copy=False)
    if header.slope == 1.0 and header.intercept == 0.0:
        return voxels
    wide = np.float64 if voxels.dtype == np.float64 else np.float32
    scaled = voxels.astype(wide)
    scaled *= wide(header.slope)
    scaled += wide(header.intercept)
    return scaled


def check_frames(path: Path, header: NiftiHeader, frames: Frames) -> None:
    """Refuses a file of several frames unless it is said which volume is meant."""
    if header.frames != 1 and frames == "only":
        raise DataError(
            f"{path}: {header.frames} frames in one NIfTI file; split it into one "
            "three-dimensional file per channel"
        )


def nifti_header_problems(path: Path) -> list[str]:
    """What is doubtful in a NIfTI header, one line each without the path; empty if nothing.

    A header that cannot be read at all is one line as well. Reading refuses some of these; the
    others (a slope of NaN, two different positions) it takes as SimpleITK does.
    """
    try:
        fields = _fields(path)
    except DataError as error:
        return [str(error).removeprefix(f"{path}: ")]
    problems = [*_scaling_problems(fields), *_pixdim_problems(fields), *_form_problems(fields)]
    try:
        read_nifti_header(path)
    except DataError as error:
        problems.append(str(error).removeprefix(f"{path}: "))
    return problems


def _fields(path: Path) -> _Fields:
    check_regular_file(path)
    raw = bytearray(HEADER_BYTES)
    compression = "gzip" if _is_gzip(path) else "none"
    with open_payload(path, path, offset=0, compression=compression) as reader:
        if reader.fill(memoryview(raw)) < 352:
            raise DataError(f"{path}: truncated: it ends within the NIfTI header")
    little, big = (struct.unpack_from(f"{order}i", raw)[0] for order in "<>")
    order = "<" if little in (348, 540) else ">"
    match little if order == "<" else big:
        case 348:
            magic, fields = bytes(raw[344:347]), _fields_of_1(raw, order)
        case 540:
            magic, fields = bytes(raw[4:7]), _fields_of_2(raw, order)
        case _:
            raise DataError(f"{path}: not a NIfTI file (its header size is neither 348 nor 540)")
    if magic not in (b"n+1", b"n+2"):
        raise DataError(f"{path}: not a single-file NIfTI image (magic {magic!r})")
    return fields


def _fields_of_1(raw: bytearray, order: str) -> _Fields:
    def at(kind: str, offset: int) -> tuple[Any, ...]:  # Any: numbers of the asked kind
        return struct.unpack_from(order + kind, raw, offset)

    return _Fields(
        order=order,
        first=352,
        dims=at("8h", 40),
        pixdim=at("8f", 76),
        code=at("h", 70)[0],
        offset=at("f", 108)[0],
        slope=at("f", 112)[0],
        intercept=at("f", 116)[0],
        units=raw[123],
        qform_code=at("h", 252)[0],
        sform_code=at("h", 254)[0],
        quaternion=at("6f", 256),
        sform=np.array(at("12f", 280)).reshape(3, 4),
    )


def _fields_of_2(raw: bytearray, order: str) -> _Fields:
    def at(kind: str, offset: int) -> tuple[Any, ...]:  # Any: numbers of the asked kind
        return struct.unpack_from(order + kind, raw, offset)

    return _Fields(
        order=order,
        first=544,
        dims=at("8q", 16),
        pixdim=at("8d", 104),
        code=at("h", 12)[0],
        offset=at("q", 168)[0],
        slope=at("d", 176)[0],
        intercept=at("d", 184)[0],
        units=at("i", 500)[0] & 0xFF,
        qform_code=at("i", 344)[0],
        sform_code=at("i", 348)[0],
        quaternion=at("6d", 352),
        sform=np.array(at("12d", 400)).reshape(3, 4),
    )


def _checked(path: Path, fields: _Fields) -> NiftiHeader:
    dims, slope, intercept = fields.dims, fields.slope, fields.intercept
    if fields.code not in NIFTI_DTYPES:
        raise DataError(
            f"{path}: NIfTI data type {fields.code} is not a real scalar; convert the file"
        )
    if not (math.isfinite(fields.offset) and fields.first <= fields.offset < MAX_OFFSET):
        raise DataError(
            f"{path}: NIfTI vox_offset is {fields.offset}, expected at least {fields.first}"
        )
    if not 3 <= dims[0] <= 7 or min(dims[1 : dims[0] + 1]) < 1:
        raise DataError(f"{path}: NIfTI dimensions {list(dims)}, expected three positive sizes")
    if not all(math.isfinite(step) and step > 0 for step in fields.pixdim[1:4]):
        raise DataError(f"{path}: NIfTI spacing {list(fields.pixdim[1:4])}, expected positive mm")
    if math.isnan(slope) or slope == 0.0:  # both mean "not scaled" (NIfTI-1; older nibabel: NaN)
        slope, intercept = 1.0, 0.0
    if not (math.isfinite(slope) and math.isfinite(intercept)):
        raise DataError(
            f"{path}: NIfTI scl_slope {slope} and scl_inter {intercept}; save the image again"
        )
    return NiftiHeader(
        shape=(dims[3], dims[2], dims[1]),
        frames=math.prod(dims[4 : dims[0] + 1]),
        dtype=np.dtype(fields.order + NIFTI_DTYPES[fields.code]),
        offset=int(fields.offset),
        slope=slope,
        intercept=intercept,
    )


def _frame(path: Path, header: NiftiHeader, reader: PayloadReader) -> NDArray[Any]:
    buffer = np.empty(header.shape, dtype=header.dtype)
    target = buffer.reshape(-1).view(np.uint8).data
    if (done := reader.fill(target)) < len(target):
        raise truncated(path, done, len(target))
    return buffer


def _scaling_problems(fields: _Fields) -> list[str]:
    problems = []
    if not math.isfinite(fields.slope):
        problems.append(f"scl_slope is {fields.slope}; read as 'not scaled' if it is NaN")
    if not math.isfinite(fields.intercept):
        problems.append(f"scl_inter is {fields.intercept}")
    return problems


def _pixdim_problems(fields: _Fields) -> list[str]:
    problems = []
    if fields.pixdim[0] not in (-1.0, 0.0, 1.0):
        problems.append(f"pixdim[0] is {fields.pixdim[0]}, expected -1 or 1")
    if fields.units & 7 not in MILLIMETRES:
        problems.append(f"xyzt_units {fields.units}: space is not in mm")
    if not fields.qform_code and not fields.sform_code:
        problems.append("neither qform nor sform: position and orientation are unknown")
    for name, code in (("qform", fields.qform_code), ("sform", fields.sform_code)):
        if code not in XFORM_CODES:
            problems.append(f"{name}_code is {code}, expected 0 to 5")
    return problems


def _form_problems(fields: _Fields) -> list[str]:
    problems = []
    sform = fields.sform if fields.sform_code > 0 else None
    spacing = np.asarray(fields.pixdim[1:4])
    if sform is not None:
        lengths = np.linalg.norm(sform[:, :3], axis=0)
        if not np.isfinite(sform).all() or not lengths.all():
            return ["the sform holds NaN, infinity or an axis of length 0"]
        cosines = sform[:, :3].T @ sform[:, :3] / np.outer(lengths, lengths)
        worst = float(np.abs(cosines - np.eye(3)).max())
        if worst > SHEAR_TOLERANCE:
            problems.append(f"the sform is sheared: its axes have a cosine of {worst:.3g}")
        if not np.allclose(lengths, np.abs(spacing), rtol=1e-2):
            problems.append(
                f"the sform's spacing {np.round(lengths, 4).tolist()} differs from pixdim "
                f"{np.round(spacing, 4).tolist()}"
            )
    if fields.qform_code > 0:
        qform = _qform(fields)
        if qform is None:
            problems.append("the qform's quaternion is longer than 1 or not finite")
        elif sform is not None:
            difference = _largest_offset(sform, qform, fields.dims[1:4])
            if not difference <= FORMS_TOLERANCE * float(np.abs(spacing).min()):
                problems.append(f"qform and sform disagree by up to {difference:.3g} mm")
    return problems


def _qform(fields: _Fields) -> NDArray[np.float64] | None:
    b, c, d = fields.quaternion[:3]
    rest = 1.0 - (b * b + c * c + d * d)
    if not np.isfinite(fields.quaternion).all() or rest < -1e-4:
        return None
    a = math.sqrt(max(rest, 0.0))
    rotation = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )
    scale = np.array(fields.pixdim[1:4], dtype=np.float64)
    scale[2] *= -1.0 if fields.pixdim[0] == -1.0 else 1.0  # qfac
    return np.column_stack([rotation * scale, fields.quaternion[3:]])


def _largest_offset(
    one: NDArray[np.float64], other: NDArray[np.float64], dims: tuple[int, ...]
) -> float:
    ends = [(0.0, float(size - 1)) for size in dims]
    corners = np.stack([axis.ravel() for axis in np.meshgrid(*ends)] + [np.ones(8)])  # (4, 8)
    return float(np.linalg.norm((one - other) @ corners, axis=0).max())


def _is_gzip(path: Path) -> bool:
    return path.name.lower().endswith(".gz")
