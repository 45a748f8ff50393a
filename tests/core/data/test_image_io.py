"""Image files: every format and orientation, and damaged or hostile files."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from voxelbridge.core.data.image_io import read_channels, read_grid, read_image, write_image
from voxelbridge.core.data.volume import (
    Grid,
    Volume,
    boxes_from_world_mm,
    boxes_to_world_mm,
    edges_to_world,
    reorientation_to_lps,
)
from voxelbridge.core.errors import DataError

ENDINGS = [".nii.gz", ".nii", ".nrrd", ".mha"]


def _volume(dtype: str = "int16", shape: tuple[int, ...] = (3, 4, 5)) -> Volume:
    array = np.arange(np.prod(shape)).reshape(1, *shape).astype(dtype)
    directions = np.array([[0, 1.0, 0], [0, 0, -1.0], [1.0, 0, 0]])
    z, y, x = shape
    grid = Grid.from_parts((z, y, x), (2.5, 1.5, 0.5), directions=directions, origin_mm=(7, -8, 9))
    return Volume(array, grid)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float32", "float64"])
def test_read_of_write_is_the_same_volume(tmp_path: Path, ending: str, dtype: str) -> None:
    volume = _volume(dtype)
    path = tmp_path / f"case{ending}"
    write_image(path, volume)
    back = read_image(path)
    assert back.array.dtype == np.dtype(dtype)
    assert np.array_equal(back.array, volume.array)
    assert back.grid.max_offset_mm(volume.grid) < 1e-4
    assert read_grid(path).max_offset_mm(back.grid) == 0
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("ending", ENDINGS)
def test_one_slice_volume_keeps_three_axes(tmp_path: Path, ending: str) -> None:
    for shape in ((1, 4, 5), (3, 1, 5), (3, 4, 1), (1, 1, 1)):
        write_image(tmp_path / f"a{ending}", _volume(shape=shape))
        assert read_image(tmp_path / f"a{ending}").array.shape == (1, *shape)


@pytest.mark.parametrize("ending", ENDINGS)
def test_nan_and_infinity_survive_reading(tmp_path: Path, ending: str) -> None:
    volume = _volume("float32")
    volume.array[0, 1, 2, 3], volume.array[0, 0, 0, 0] = np.nan, np.inf
    write_image(tmp_path / f"a{ending}", volume)
    back = read_image(tmp_path / f"a{ending}").array[0]
    assert np.isnan(back[1, 2, 3])
    assert np.isinf(back[0, 0, 0])


def test_detached_header_in_its_own_folder_is_read(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(np.arange(24, dtype=np.int16).reshape(2, 3, 4))
    sitk.WriteImage(image, str(tmp_path / "a.mhd"))
    assert read_image(tmp_path / "a.mhd").array.sum() == sum(range(24))


def test_24_orientations_give_one_array_and_24_grids(shared: Path) -> None:
    files = sorted((shared / "data" / "orientations").glob("*.nii.gz"))
    assert len(files) == 24
    volumes = [read_image(path) for path in files]
    turned = [reorientation_to_lps(v.grid).apply_volume(v) for v in volumes]
    for volume in turned:
        assert np.array_equal(volume.array, turned[0].array)
        assert volume.grid.max_offset_mm(turned[0].grid) < 1e-4
    assert turned[0].grid.shape == (67, 79, 64)
    assert len({v.grid.affine.round(3).tobytes() for v in volumes}) == 24


def test_box_written_in_any_of_24_orientations_is_one_physical_box(shared: Path) -> None:
    reference = None
    for path in sorted((shared / "data" / "orientations").glob("*.nii.gz")):
        grid = read_grid(path)
        change = reorientation_to_lps(grid)
        box = np.array([[10.0, 20.25, 5.5, 31.0, 47.75, 40.0]])  # in LPS order
        in_file = change.inverse().apply_boxes(box)
        world = boxes_to_world_mm(in_file, grid)
        reference = world if reference is None else reference
        np.testing.assert_allclose(world, reference, atol=1e-4)
        np.testing.assert_allclose(boxes_from_world_mm(world, grid), in_file, atol=1e-4)
        np.testing.assert_allclose(change.apply_boxes(in_file), box, atol=1e-12)


@pytest.mark.slow
def test_all_shared_images_equal_simpleitk(shared: Path) -> None:
    endings = (".nii.gz", ".nrrd", ".mha")
    paths = [p for p in sorted((shared / "data").rglob("*")) if p.name.endswith(endings)]
    assert len(paths) > 50
    for path in paths:
        volume, reference = read_image(path), sitk.ReadImage(str(path))
        expected = sitk.GetArrayFromImage(reference)
        assert volume.array.dtype == expected.dtype, path
        assert np.array_equal(volume.array[0], expected), path
        point = reference.TransformContinuousIndexToPhysicalPoint((1.5, 2.25, 0.5))
        ours = edges_to_world(np.array([1.0, 2.75, 2.0]), volume.grid)
        np.testing.assert_allclose(ours, point, atol=1e-4)


def test_label_in_another_axis_order_is_a_channel_of_the_same_grid(tmp_path: Path) -> None:
    first = _volume()
    second = reorientation_to_lps(first.grid).apply_volume(first)
    write_image(tmp_path / "a.nrrd", first)
    write_image(tmp_path / "b.nrrd", second)
    both = read_channels([tmp_path / "a.nrrd", tmp_path / "b.nrrd"])
    assert np.array_equal(both.array[0], both.array[1])


def test_channels_on_different_grids_name_both_files(shared: Path) -> None:
    paths = sorted((shared / "data" / "mr_glioma_native_4seq").glob("*.nii.gz"))
    with pytest.raises(DataError, match=rf"{paths[1].name}.*differs from {paths[0].name}"):
        read_channels(paths)


@pytest.mark.parametrize("ending", [*ENDINGS, ".mhd"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_file_is_refused(tmp_path: Path, ending: str, share: float) -> None:
    rng = np.random.default_rng(0)
    image = sitk.GetImageFromArray(rng.integers(0, 3000, size=(9, 10, 11)).astype(np.int16))
    path = tmp_path / f"a{ending}"
    sitk.WriteImage(image, str(path), useCompression=ending != ".nii")
    cut = next(iter(tmp_path.glob("*raw")), path)
    raw = cut.read_bytes()
    cut.write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(DataError, match=r"a\.") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


def test_flipped_payload_bit_of_gzip_nifti_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.nii.gz"
    rng = np.random.default_rng(0)
    volume = _volume(shape=(9, 10, 11))
    write_image(path, Volume(rng.integers(0, 3000, volume.array.shape).astype("i2"), volume.grid))
    raw = path.read_bytes()
    for position in rng.integers(20, len(raw), size=60).tolist():
        damaged = bytearray(raw)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.nii\.gz"):
            read_image(path)


def test_small_file_that_declares_a_huge_volume_is_refused_at_once(tmp_path: Path) -> None:
    write_image(tmp_path / "a.nii", _volume())
    header = bytearray((tmp_path / "a.nii").read_bytes()[:352])
    header[40:48] = struct.pack("<4h", 3, 1000, 1000, 1000)
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(bytes(header) + b"\0"))
    with pytest.raises(DataError, match="cannot hold"):
        read_image(tmp_path / "b.nii.gz")
    with pytest.raises(DataError, match="cannot hold"):
        read_grid(tmp_path / "b.nii.gz")


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (76 + 4, struct.pack("<f", 0.0), "spacing"),
        (76 + 8, struct.pack("<f", float("nan")), "spacing"),
        (76 + 12, struct.pack("<f", -1.0), "spacing"),
        (108, struct.pack("<f", 1e9), "vox_offset"),
        (108, struct.pack("<f", -352.0), "vox_offset"),
        (70, struct.pack("<h", 128), "data type"),
        (40, struct.pack("<2h", 3, -5), "dimensions"),
        (40, struct.pack("<h", 9), "dimensions"),
        (40, struct.pack("<5h", 4, 5, 4, 1, 3), "split"),
        (344, b"ni1\0", "single-file"),
        (0, b"\1\2\3\4", "not a NIfTI"),
    ],
)
def test_wrong_nifti_header_names_the_field(
    tmp_path: Path, offset: int, value: bytes, message: str
) -> None:
    path = tmp_path / "a.nii"
    write_image(path, _volume())
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(value)] = value
    path.write_bytes(raw)
    with pytest.raises(DataError, match=message):
        read_image(path)


@pytest.mark.parametrize(
    ("slope", "intercept"), [(2.0, -5.0), (float("nan"), float("nan")), (0.5, 0.0)]
)
def test_nifti_slope_and_intercept_as_simpleitk_reads_them(
    tmp_path: Path, slope: float, intercept: float
) -> None:
    path = tmp_path / "a.nii"
    write_image(path, _volume())
    raw = bytearray(path.read_bytes())
    raw[112:120] = struct.pack("<2f", slope, intercept)
    path.write_bytes(raw)
    expected = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    np.testing.assert_allclose(read_image(path).array[0], expected)


def test_nifti_slope_of_zero_means_not_scaled(tmp_path: Path) -> None:
    path = tmp_path / "a.nii"
    write_image(path, _volume())
    raw = bytearray(path.read_bytes())
    raw[112:120] = struct.pack("<2f", 0.0, 7.0)
    path.write_bytes(raw)
    assert np.array_equal(read_image(path).array, _volume().array)


def test_big_endian_nifti_is_read(tmp_path: Path) -> None:
    write_image(tmp_path / "a.nii", _volume())
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    for first, stop, size in ((0, 4, 4), (40, 56, 2), (56, 68, 4), (68, 76, 2), (76, 120, 4),
                              (252, 256, 2), (256, 328, 4), (352, len(raw), 2)):  # fmt: skip
        fields = np.frombuffer(bytes(raw[first:stop]), dtype=f"u{size}").byteswap()
        raw[first:stop] = fields.tobytes()
    (tmp_path / "b.nii").write_bytes(raw)
    big, little = read_image(tmp_path / "b.nii"), read_image(tmp_path / "a.nii")
    assert np.array_equal(big.array, little.array)
    assert big.grid.max_offset_mm(little.grid) < 1e-4


@pytest.mark.parametrize("target", ["../secret.raw", "/etc/passwd", "LIST", "a%03d.raw 1 3 1", ""])
def test_detached_header_may_only_name_a_file_of_its_folder(tmp_path: Path, target: str) -> None:
    folder = tmp_path / "case"
    folder.mkdir()
    (tmp_path / "secret.raw").write_bytes(b"secret" * 100)
    (folder / "a.mhd").write_text(
        "ObjectType = Image\nNDims = 3\nDimSize = 2 3 4\nElementType = MET_UCHAR\n"
        f"ElementDataFile = {target}\n"
    )
    (folder / "a.nrrd").write_text(
        f"NRRD0004\ntype: uchar\ndimension: 3\nsizes: 2 3 4\nencoding: raw\ndata file: {target}\n\n"
    )
    for name in ("a.mhd", "a.nrrd"):
        with pytest.raises(DataError, match="same folder"):
            read_image(folder / name)


def test_detached_payload_behind_a_link_to_another_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.raw").write_bytes(bytes(24))
    folder = tmp_path / "case"
    folder.mkdir()
    (folder / "a.raw").symlink_to(tmp_path / "secret.raw")
    (folder / "a.mhd").write_text(
        "NDims = 3\nDimSize = 2 3 4\nElementType = MET_UCHAR\nElementDataFile = a.raw\n"
    )
    with pytest.raises(DataError, match="links to another folder"):
        read_image(folder / "a.mhd")


def test_wrong_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_image(tmp_path / "none.nii.gz")
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(DataError, match="unknown image format"):
        read_image(tmp_path / "a.png")
    (tmp_path / "folder.nii").mkdir()
    with pytest.raises(DataError, match="is not a file"):
        read_image(tmp_path / "folder.nii")
    with pytest.raises(DataError, match="cannot write"):
        write_image(tmp_path / "a.mhd", _volume())


def test_colour_image_is_refused(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(np.zeros((2, 3, 4, 3), dtype=np.uint8), isVector=True)
    for name in ("a.nii", "a.mha", "a.nrrd"):
        sitk.WriteImage(image, str(tmp_path / name))
        with pytest.raises(DataError, match=name):
            read_image(tmp_path / name)
