"""NRRD and MetaImage without SimpleITK: the same volumes as SimpleITK reads, or a clear refusal."""

import gzip
import zlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from voxelbridge.core.data.image_io import read_grid, read_image
from voxelbridge.core.errors import DataError

VOXELS = bytes(range(24))
TURNED = "(0,1.5,0) (-1,0,0) (0,0,2)"


def _nrrd(folder: Path, *lines: str, voxels: bytes = VOXELS, name: str = "a.nrrd") -> Path:
    given = {line.partition(":")[0] for line in lines}
    usual = ["type: uchar", "dimension: 3", "sizes: 2 3 4", "encoding: raw"]
    usual = [line for line in usual if line.partition(":")[0] not in given]
    (folder / name).write_bytes("\n".join(["NRRD0004", *usual, *lines, "", ""]).encode() + voxels)
    return folder / name


def _meta(folder: Path, *lines: str, voxels: bytes = VOXELS) -> Path:
    given = {line.partition(" ")[0] for line in lines}
    usual = ["NDims = 3", "DimSize = 2 3 4", "ElementType = MET_UCHAR"]
    usual = [line for line in usual if line.partition(" ")[0] not in given]
    last = [] if "ElementDataFile" in given else ["ElementDataFile = LOCAL"]
    text = "\n".join(["ObjectType = Image", *usual, *lines, *last, ""])
    (folder / "a.mha").write_bytes(text.encode() + voxels)
    return folder / "a.mha"


def _assert_as_simpleitk(path: Path) -> None:
    volume, reference = read_image(path), sitk.ReadImage(str(path))
    expected = sitk.GetArrayFromImage(reference)
    assert volume.array.dtype == expected.dtype
    assert np.array_equal(volume.array[0], expected)
    directions = np.array(reference.GetDirection()).reshape(3, 3)[:, ::-1]
    affine = directions * np.array(reference.GetSpacing())[::-1]
    np.testing.assert_allclose(volume.grid.affine[:, :3], affine, atol=1e-12)
    np.testing.assert_allclose(volume.grid.affine[:, 3], reference.GetOrigin(), atol=1e-12)
    assert read_grid(path).max_offset_mm(volume.grid) == 0


@pytest.mark.parametrize(
    "space",
    ["left-posterior-superior", "right-anterior-superior", "left-anterior-superior", "RAS", "LAS",
     "LPS", "scanner-xyz", "3D-right-handed"],
)  # fmt: skip
def test_nrrd_space_is_brought_to_lps(tmp_path: Path, space: str) -> None:
    lines = (f"space: {space}", f"space directions: {TURNED}", "space origin: (1,2,3)")
    _assert_as_simpleitk(_nrrd(tmp_path, *lines))


@pytest.mark.parametrize(
    "lines",
    [
        ["spacings: 0.5 0.25 2"],
        [],
        ["space dimension: 3", f"space directions: {TURNED}", "space origin: (1,2,3)"],
        ["dimension: 4", "sizes: 1 2 3 4", "space: LPS", f"space directions: none {TURNED}",
         "kinds: vector domain domain domain"],
        ["# a comment", "note:=type: float", "content: x"],
    ],
)  # fmt: skip
def test_nrrd_geometry_is_as_simpleitk_reads_it(tmp_path: Path, lines: list[str]) -> None:
    _assert_as_simpleitk(_nrrd(tmp_path, *lines))


@pytest.mark.parametrize("endian", ["little", "big"])
@pytest.mark.parametrize("kind", ["short", "uint16", "int", "float", "double", "unsigned int"])
def test_nrrd_types_and_byte_orders(tmp_path: Path, kind: str, endian: str) -> None:
    voxels = bytes(range(8 * 24))[: 24 * {"short": 2, "uint16": 2, "double": 8}.get(kind, 4)]
    for encoding, packed in (("raw", voxels), ("gzip", gzip.compress(voxels))):
        lines = (f"type: {kind}", f"endian: {endian}", f"encoding: {encoding}")
        _assert_as_simpleitk(_nrrd(tmp_path, *lines, voxels=packed))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["sizes: 2 3"], "sizes"),
        (["dimension: 4", "sizes: 3 2 2 2"], "dimensional"),
        (["sizes: 2 3 -4"], "sizes"),
        (["sizes: 2 3 x"], "cannot be used"),
        (["type: block"], "scalar"),
        (["type: short"], "endian"),
        (["encoding: ascii"], "encoding"),
        (["byte skip: -1"], "byte skip"),
        (["lineskip: 2"], "line skip"),
        (["space: right-anterior-superior-time"], "space"),
        (["spacings: nan 1 1"], "cannot be used"),
        (["spacings: 1 0 1"], "cannot be used"),
        (["space directions: (1,0,0) (0.2,1,0) (0,0,1)"], "sheared"),
        (["space directions: (1,0,0) (1,0,0) (0,0,1)"], "cannot be used"),
        (["spacings: 1 1 1", "axis mins: 0 0 0"], "axis mins"),
        (["sizes: 2 3 4", "content: x", "content: y"], "twice"),
    ],
)
def test_nrrd_that_cannot_be_trusted_is_refused(
    tmp_path: Path, lines: list[str], message: str
) -> None:
    with pytest.raises(DataError, match=rf"a\.nrrd: .*{message}") as caught:
        read_image(_nrrd(tmp_path, *lines))
    assert "\n" not in str(caught.value)


def test_detached_nrrd_header_in_its_own_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(VOXELS)
    path = _nrrd(tmp_path, "data file: a.raw", voxels=b"", name="a.nhdr")
    _assert_as_simpleitk(path)
    (tmp_path / "a.raw.gz").write_bytes(gzip.compress(VOXELS))
    path = _nrrd(tmp_path, "data file: a.raw.gz", "encoding: gzip", voxels=b"", name="a.nhdr")
    _assert_as_simpleitk(path)


@pytest.mark.parametrize(
    "target", ["../secret.raw", "/etc/passwd", "LIST", "a%d.raw 1 3 1", "", "a.nhdr", ".", "sub"]
)
def test_detached_nrrd_header_may_only_name_a_file_of_its_folder(
    tmp_path: Path, target: str
) -> None:
    (tmp_path / "secret.raw").write_bytes(VOXELS)
    (tmp_path / "case" / "sub").mkdir(parents=True)
    path = _nrrd(tmp_path / "case", f"data file: {target}", voxels=b"", name="a.nhdr")
    with pytest.raises(DataError, match=r"a\.nhdr: .*(same folder|names itself)"):
        read_image(path)


def test_nhdr_without_a_data_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data file"):
        read_image(_nrrd(tmp_path, name="a.nhdr"))


@pytest.mark.parametrize(
    "lines",
    [
        ["TransformMatrix = 0 1 0 0 0 1 1 0 0", "Offset = 1 2 3", "ElementSpacing = 0.5 1 2"],
        ["Rotation = 0 1 0 0 0 1 1 0 0", "Position = 1 2 3", "ElementSpacing = 0.5 1 2"],
        ["Orientation = -1 0 0 0 1 0 0 0 1", "Origin = 1 2 3"],
        ["ElementSize = 0.5 1 2"],
        ["HeaderSize = -1"],
        [],
    ],
)
def test_meta_geometry_is_as_simpleitk_reads_it(tmp_path: Path, lines: list[str]) -> None:
    _assert_as_simpleitk(_meta(tmp_path, *lines))


@pytest.mark.parametrize("order", ["BinaryDataByteOrderMSB", "ElementByteOrderMSB"])
@pytest.mark.parametrize("value", ["True", "False"])
@pytest.mark.parametrize("kind", ["SHORT", "UINT", "LONG", "FLOAT", "DOUBLE"])
def test_meta_types_and_byte_orders(tmp_path: Path, order: str, value: str, kind: str) -> None:
    voxels = bytes(range(8 * 24))[: 24 * {"SHORT": 2, "DOUBLE": 8}.get(kind, 4)]
    lines = (f"ElementType = MET_{kind}", f"{order} = {value}")
    _assert_as_simpleitk(_meta(tmp_path, *lines, voxels=voxels))
    packed = zlib.compress(voxels)
    more = ("CompressedData = True", f"CompressedDataSize = {len(packed)}")
    _assert_as_simpleitk(_meta(tmp_path, *lines, *more, voxels=packed))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["NDims = 9999"], "NDims"),
        (["DimSize = 2 3"], "sizes"),
        (["DimSize = 2 0 4"], "sizes"),
        (["ElementType = MET_FLOAT_ARRAY"], "one number"),
        (["ElementNumberOfChannels = 3"], "one number"),
        (["ElementSpacing = 1 1 -1"], "positive"),
        (["ElementSpacing = nan 1 1"], "positive"),
        (["ElementSpacing = 1 1"], "3 numbers"),
        (["TransformMatrix = 2 0 0 0 1 0 0 0 1"], "length 1"),
        (["TransformMatrix = 1 0 0 1 0 0 0 0 1"], "cannot be used"),
        (["Offset = inf 0 0"], "cannot be used"),
        (["HeaderSize = 12"], "HeaderSize"),
        (["BinaryData = False"], "text voxels"),
        (["ElementToIntensityFunctionSlope = 2"], "ElementToIntensityFunctionSlope"),
        (["Comment = a", "Comment = b"], "twice"),
        (["no equals sign"], "without '='"),
    ],
)
def test_meta_image_that_cannot_be_trusted_is_refused(
    tmp_path: Path, lines: list[str], message: str
) -> None:
    with pytest.raises(DataError, match=rf"a\.mha: .*{message}") as caught:
        read_image(_meta(tmp_path, *lines))
    assert "\n" not in str(caught.value)
