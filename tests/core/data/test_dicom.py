import contextlib
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from pydicom import Dataset, dcmread
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    EnhancedMRImageStorage,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    RLELossless,
    generate_uid,
)

from voxelbridge.core.data.dicom import DicomFolder, find_series
from voxelbridge.core.data.executor import Done, Failed, map_cases
from voxelbridge.core.data.volume import edges_to_world
from voxelbridge.core.errors import ConfigError, DataError


def refusal(folder: Path, **options: Any) -> str:
    """The only refusal of a folder without volumes, after a look for the patient in it."""
    found = find_series(folder, **options)
    assert found.volumes == ()
    (line,) = [str(refused) for refused in found.refused]
    assert "\n" not in line
    return line


def only(found: DicomFolder) -> Any:
    assert found.refused == ()
    (volume,) = found.volumes
    return volume


def rescaled(pixels: Callable[..., np.ndarray], seeds: range) -> np.ndarray:
    return np.stack([pixels(seed).astype(np.int16) - 1024 for seed in seeds])


# --- plain series


def test_series_has_the_voxels_and_the_grid_of_its_slices(
    tmp_path: Path, write_series: Any, pixels: Any
) -> None:
    write_series(tmp_path / "chest", count=5)
    found = only(find_series(tmp_path))
    volume = found.read()
    assert found.case_id == "chest"
    assert found.modality == "CT"
    assert volume.array.shape == (1, 5, 10, 12)
    assert volume.array.dtype == np.int16
    np.testing.assert_array_equal(volume.array[0], rescaled(pixels, range(5)))
    assert volume.grid.spacing_mm == pytest.approx((2.0, 0.8, 0.7))
    assert volume.grid.origin_mm == pytest.approx((-3.5, 4.25, 0.0))


def test_origin_is_the_series_uid(tmp_path: Path, write_series: Any) -> None:
    uid = generate_uid()
    write_series(tmp_path, uid=uid)
    assert only(find_series(tmp_path)).origin_id == f"dicom:{uid}"


def test_series_in_the_searched_folder_itself_is_named_by_it(
    tmp_path: Path, write_series: Any
) -> None:
    write_series(tmp_path / "scan7")
    assert only(find_series(tmp_path / "scan7")).case_id == "scan7"


@pytest.mark.parametrize("order", [(4, 2, 0, 1, 3), (0, 1, 2, 3, 4)])
def test_order_comes_from_positions_not_from_names_or_numbers(
    tmp_path: Path, write_series: Any, pixels: Any, order: tuple[int, ...]
) -> None:
    def number_backwards(header: Dataset, index: int) -> None:
        header.InstanceNumber = 99 - index

    write_series(tmp_path, edit=number_backwards, names=[f"IM{n}" for n in order])
    volume = only(find_series(tmp_path)).read()
    np.testing.assert_array_equal(volume.array[0], rescaled(pixels, range(5)))


def test_descending_positions_give_the_same_voxels_in_space(
    tmp_path: Path, write_series: Any, pixels: Any
) -> None:
    def downwards(header: Dataset, index: int) -> None:
        header.ImagePositionPatient = [0, 0, -2.0 * index]

    write_series(tmp_path, edit=downwards)
    volume = only(find_series(tmp_path)).read()
    np.testing.assert_array_equal(volume.array[0], rescaled(pixels, range(5))[::-1])
    assert volume.grid.origin_mm == pytest.approx((0.0, 0.0, -8.0))


def test_sagittal_series_is_stacked_along_its_own_normal(tmp_path: Path, write_series: Any) -> None:
    def sagittal(header: Dataset, index: int) -> None:
        header.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
        header.ImagePositionPatient = [3.0 * index, -20, 30]

    write_series(tmp_path, edit=sagittal)
    grid = only(find_series(tmp_path)).grid
    assert grid.spacing_mm == pytest.approx((3.0, 0.8, 0.7))
    # the normal of these axes points to the right: the stack begins at the largest x
    np.testing.assert_allclose(grid.directions.T, [[-1, 0, 0], [0, 0, -1], [0, 1, 0]], atol=1e-12)
    centre = edges_to_world([0.5, 2.5, 3.5], grid)
    np.testing.assert_allclose(centre, [12.0, -20 + 3 * 0.7, 30 - 2 * 0.8], atol=1e-9)


def test_two_series_of_one_folder_are_two_cases_with_stable_names(
    tmp_path: Path, write_series: Any
) -> None:
    uids = "1.2.826.0.1.1", "1.2.826.0.1.2"
    for place in ("a", "b"):
        for n, uid in enumerate(uids):
            names = [f"{n}_{index}.dcm" for index in range(5)]
            write_series(tmp_path / place / "study", uid=uid, names=names)
    names = [[volume.case_id for volume in find_series(tmp_path / place).volumes] for place in "ab"]
    assert names[0] == names[1]
    assert len(set(names[0])) == 2
    assert all(name.startswith("study__CT4_") for name in names[0])


def test_series_spread_over_subfolders_is_one_volume(tmp_path: Path, write_series: Any) -> None:
    names = [f"disk{n % 2}/IM{n}" for n in range(5)]
    write_series(tmp_path / "study", names=names)
    found = only(find_series(tmp_path))
    assert found.case_id == "study"
    assert found.grid.shape == (5, 10, 12)


def test_slices_without_series_uid_go_by_folder(tmp_path: Path, write_series: Any) -> None:
    def blank(header: Dataset, _: int) -> None:
        header.SeriesInstanceUID = ""

    for name in ("one", "two"):
        write_series(tmp_path / name, edit=blank)
    found = find_series(tmp_path)
    assert [volume.case_id for volume in found.volumes] == ["one", "two"]
    assert all(volume.origin_id is None for volume in found.volumes)


# --- splits


@pytest.mark.parametrize("tag", ["standard", "siemens", "ge", "philips", "sequence"])
def test_b_values_are_volumes_of_their_own(tmp_path: Path, write_series: Any, tag: str) -> None:
    def weight(header: Dataset, index: int) -> None:
        b = (50, 800)[index % 2]
        header.ImagePositionPatient = [0, 0, 3.0 * (index // 2)]
        match tag:
            case "standard":
                header.DiffusionBValue = float(b)
            case "siemens":
                block = header.private_block(0x19, "SIEMENS MR HEADER", create=True)
                block.add_new(0x0C, "UN", f"{b} ".encode())
            case "ge":
                block = header.private_block(0x43, "GEMS_PARM_01", create=True)
                block.add_new(0x39, "IS", [1_000_000_000 + b, 8, 0, 0])
            case "philips":
                block = header.private_block(0x2001, "Philips Imaging DD 001", create=True)
                block.add_new(0x03, "FL", float(b))
            case _:
                header.SequenceName = f"*ep_b{b}t"

    uid = generate_uid()
    write_series(tmp_path / "dwi", count=8, uid=uid, modality="MR", edit=weight)
    found = find_series(tmp_path)
    assert [volume.case_id for volume in found.volumes] == ["dwi__b50", "dwi__b800"]
    assert found.volumes[0].origin_id == f"dicom:{uid}#b=50"
    assert all(volume.grid.shape[0] == 4 for volume in found.volumes)
    assert all(volume.grid.spacing_mm[0] == pytest.approx(3.0) for volume in found.volumes)


def test_echoes_are_volumes_of_their_own(tmp_path: Path, write_series: Any, pixels: Any) -> None:
    def echo(header: Dataset, index: int) -> None:
        header.EchoTime = (4.6, 9.2)[index // 4]
        header.ImagePositionPatient = [0, 0, 2.0 * (index % 4)]

    write_series(tmp_path / "gre", count=8, modality="MR", edit=echo)
    first, second = find_series(tmp_path).volumes
    assert (first.case_id, second.case_id) == ("gre__te4.6", "gre__te9.2")
    np.testing.assert_array_equal(second.read().array[0], rescaled(pixels, range(4, 8)))


def test_echo_times_that_differ_by_rounding_are_one_volume(
    tmp_path: Path, write_series: Any
) -> None:
    def jitter(header: Dataset, index: int) -> None:
        header.EchoTime = 2.381 + 0.001 * (index % 2)

    write_series(tmp_path, modality="MR", edit=jitter)
    assert only(find_series(tmp_path)).grid.shape[0] == 5


def test_magnitude_and_phase_are_parted(tmp_path: Path, write_series: Any) -> None:
    def kind(header: Dataset, index: int) -> None:
        header.ImageType = ["ORIGINAL", "PRIMARY", "MP"[index % 2]]
        header.ImagePositionPatient = [0, 0, 2.0 * (index // 2)]

    write_series(tmp_path / "gre", count=8, modality="MR", edit=kind)
    names = [volume.case_id for volume in find_series(tmp_path).volumes]
    assert names == ["gre__magnitude", "gre__phase"]


@pytest.mark.parametrize(
    ("keyword", "suffix"),
    [("TemporalPositionIdentifier", "t"), ("AcquisitionNumber", "acq"), ("EchoNumbers", "echo")],
)
def test_repeated_positions_are_parted_by_what_differs(
    tmp_path: Path, write_series: Any, keyword: str, suffix: str
) -> None:
    def phase(header: Dataset, index: int) -> None:
        setattr(header, keyword, index // 4 + 1)
        header.ImagePositionPatient = [0, 0, 2.0 * (index % 4)]

    write_series(tmp_path / "dyn", count=12, modality="MR", edit=phase)
    names = [volume.case_id for volume in find_series(tmp_path).volumes]
    assert names == [f"dyn__{suffix}{n}" for n in (1, 2, 3)]


def test_acquisition_number_of_every_slice_does_not_part_a_plain_series(
    tmp_path: Path, write_series: Any
) -> None:
    def count(header: Dataset, index: int) -> None:
        header.AcquisitionNumber = index + 1
        header.TriggerTime = 10.0 * index

    write_series(tmp_path, edit=count)
    assert only(find_series(tmp_path)).grid.shape[0] == 5


def test_equal_repeats_are_parted_by_instance_number_as_last_resort(
    tmp_path: Path, write_series: Any, pixels: Any
) -> None:
    def repeat(header: Dataset, index: int) -> None:
        header.ImagePositionPatient = [0, 0, 2.0 * (index % 4)]

    write_series(tmp_path / "dyn", count=8, edit=repeat, names=[f"{9 - n}" for n in range(8)])
    first, second = find_series(tmp_path).volumes
    assert (first.case_id, second.case_id) == ("dyn__r1", "dyn__r2")
    np.testing.assert_array_equal(first.read().array[0], rescaled(pixels, range(4)))


def test_a_phase_with_a_missing_slice_is_refused_alone(tmp_path: Path, write_series: Any) -> None:
    def phase(header: Dataset, index: int) -> bool:
        header.TemporalPositionIdentifier = index // 5 + 1
        header.ImagePositionPatient = [0, 0, 2.0 * (index % 5)]
        return index != 7

    write_series(tmp_path / "dyn", count=10, modality="MR", edit=phase)
    found = find_series(tmp_path)
    assert [volume.case_id for volume in found.volumes] == ["dyn__t1"]
    assert "gap" in str(found.refused[0])
    assert "t=2" in str(found.refused[0])


def test_b_values_that_alternate_within_one_stack_are_refused(
    tmp_path: Path, write_series: Any
) -> None:
    def weight(header: Dataset, index: int) -> None:
        header.DiffusionBValue = (0.0, 800.0)[index % 2]

    write_series(tmp_path, count=6, modality="MR", edit=weight)
    assert "b-values alternate" in refusal(tmp_path)


# --- refusals


def test_missing_slice_is_refused_with_its_neighbours(tmp_path: Path, write_series: Any) -> None:
    uid = generate_uid()
    write_series(tmp_path / "chest", count=7, uid=uid, edit=lambda _, index: index != 3)
    line = refusal(tmp_path)
    assert "series chest" in line
    assert uid[-8:] in line
    assert uid not in line
    assert "gap: 1 slice is missing: 1 between chest/003.dcm and chest/005.dcm" in line
    assert "allow: gap" in line


def test_allowed_gap_is_bridged_by_its_neighbours(
    tmp_path: Path, write_series: Any, pixels: Any
) -> None:
    write_series(tmp_path, count=7, edit=lambda _, index: index != 3)
    volume = only(find_series(tmp_path, allow=["gap"])).read()
    assert volume.array.shape == (1, 7, 10, 12)
    assert volume.grid.spacing_mm[0] == pytest.approx(2.0)
    expected = rescaled(pixels, range(7)).astype(np.float32)
    expected[3] = (expected[2] + expected[4]) / 2
    np.testing.assert_allclose(volume.array[0], expected, atol=1e-3)


def test_wide_gap_is_refused_even_if_allowed(tmp_path: Path, write_series: Any) -> None:
    write_series(tmp_path, count=12, edit=lambda _, index: not 3 <= index <= 6)
    assert "too wide" in refusal(tmp_path, allow=["gap"])


@pytest.mark.parametrize("same_number", [True, False])
def test_duplicate_position_is_refused_with_its_files(
    tmp_path: Path, write_series: Any, same_number: bool
) -> None:
    def twice(header: Dataset, index: int) -> None:
        if index == 5:
            header.ImagePositionPatient = [-3.5, 4.25, 4.0]
            header.InstanceNumber = 3 if same_number else 6

    write_series(tmp_path, count=6, edit=twice)
    line = refusal(tmp_path)
    assert "duplicate positions: 003.dcm, 006.dcm" in line
    assert "with different content" in refusal(tmp_path, allow=["duplicate"])


def test_copied_file_is_refused_and_dropped_if_allowed(
    tmp_path: Path, write_series: Any, pixels: Any
) -> None:
    files = write_series(tmp_path)
    shutil.copy(files[2], tmp_path / "copy.dcm")
    assert "copy.dcm is the same instance as 003.dcm" in refusal(tmp_path)
    volume = only(find_series(tmp_path, allow=["duplicate"])).read()
    np.testing.assert_array_equal(volume.array[0], rescaled(pixels, range(5)))


def test_one_instance_with_two_contents_is_refused_even_if_allowed(
    tmp_path: Path, write_series: Any
) -> None:
    files = write_series(tmp_path)
    changed = bytearray(files[2].read_bytes())
    changed[-1] ^= 1
    (tmp_path / "copy.dcm").write_bytes(changed)
    assert "other content" in refusal(tmp_path, allow=["duplicate"])


def test_varying_spacing_is_refused_and_interpolated_if_allowed(
    tmp_path: Path, write_series: Any
) -> None:
    places = (0.0, 2.0, 4.0, 7.0, 9.0)

    def move(header: Dataset, index: int) -> None:
        header.ImagePositionPatient = [0, 0, places[index]]
        # values that are linear in z show a correct interpolation
        header.PixelData = np.full((10, 12), 100 * places[index], dtype=np.uint16).tobytes()

    write_series(tmp_path, edit=move)
    assert "varying spacing: slices are 2 to 3 mm apart" in refusal(tmp_path)
    volume = only(find_series(tmp_path, allow=["varying_spacing"])).read()
    z = np.arange(volume.grid.shape[0]) * volume.grid.spacing_mm[0]
    assert z[-1] == pytest.approx(9.0)
    np.testing.assert_allclose(volume.array[0, :, 4, 5], 100 * z - 1024, atol=1e-3)


def test_positions_rounded_to_a_tenth_are_regular(tmp_path: Path, write_series: Any) -> None:
    def rounded(header: Dataset, index: int) -> None:
        header.ImagePositionPatient = [0, 0, round(1.25 * index, 1)]

    write_series(tmp_path, count=9, edit=rounded)
    assert only(find_series(tmp_path)).grid.spacing_mm[0] == pytest.approx(1.25)


def test_gantry_tilt_is_refused_with_its_angle(tmp_path: Path, write_series: Any) -> None:
    cosine, sine = np.cos(np.radians(10)), np.sin(np.radians(10))

    def tilt(header: Dataset, _: int) -> None:
        header.ImageOrientationPatient = [1, 0, 0, 0, float(cosine), float(-sine)]

    write_series(tmp_path, edit=tilt)
    line = refusal(tmp_path)
    assert "gantry tilt" in line
    assert "10.0 degrees" in line


def test_oblique_series_is_no_tilt(tmp_path: Path, write_series: Any) -> None:
    cosine, sine = np.cos(np.radians(10)), np.sin(np.radians(10))

    def oblique(header: Dataset, index: int) -> None:
        header.ImageOrientationPatient = [1, 0, 0, 0, float(cosine), float(-sine)]
        header.ImagePositionPatient = [0, 2.0 * index * float(sine), 2.0 * index * float(cosine)]

    write_series(tmp_path, edit=oblique)
    assert only(find_series(tmp_path)).grid.spacing_mm[0] == pytest.approx(2.0)


@pytest.mark.parametrize("what", ["orientations", "slice sizes", "pixel spacings"])
def test_mixed_planes_are_refused_and_parted_if_allowed(
    tmp_path: Path, write_series: Any, what: str
) -> None:
    def mix(header: Dataset, index: int) -> None:
        if index < 4:
            return
        header.ImagePositionPatient = [2.0 * index, 0, 0]
        if what == "orientations":
            header.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
        else:
            header.ImagePositionPatient = [-3.5, 4.25, 2.0 * index]
        if what == "slice sizes":
            header.Rows = 8
            header.PixelData = header.PixelData[: 8 * 12 * 2]
        if what == "pixel spacings":
            header.PixelSpacing = [0.9, 0.9]

    write_series(tmp_path / "scan", count=8, edit=mix)
    assert f"mixed {what}" in refusal(tmp_path)
    found = find_series(tmp_path, allow=["mixed_geometry"])
    assert [volume.case_id for volume in found.volumes] == ["scan__plane1", "scan__plane2"]


def test_scout_beside_its_series_is_refused_alone(tmp_path: Path, write_series: Any) -> None:
    def scout(header: Dataset, index: int) -> None:
        if index == 5:
            header.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
            header.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]

    write_series(tmp_path / "chest", count=6, edit=scout)
    found = find_series(tmp_path)
    assert [volume.grid.shape[0] for volume in found.volumes] == [5]
    assert "localizer" in str(found.refused[0])


def _set(**values: Any) -> Callable[[Dataset, int], None]:
    def edit(header: Dataset, _: int) -> None:
        for keyword, value in values.items():
            if value is None:
                delattr(header, keyword)
            else:
                setattr(header, keyword, value)

    return edit


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (_set(SamplesPerPixel=3, PhotometricInterpretation="RGB"), "colour image"),
        (_set(PhotometricInterpretation="PALETTE COLOR"), "colour image"),
        (_set(PixelData=None), "has no pixel data"),
        (_set(PixelData=b""), "pixel data is empty"),
        (_set(PixelData=bytes(100)), "100 bytes of pixel data, its header says 240"),
        (_set(PixelData=bytes(480)), "480 bytes of pixel data, its header says 240"),
        (_set(ImagePositionPatient=None), "no ImagePositionPatient"),
        (_set(ImageOrientationPatient=None), "no ImageOrientationPatient"),
        (_set(PixelSpacing=None), "no PixelSpacing"),
        (_set(PixelSpacing=[0, 0.7]), "not positive"),
        (_set(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "not two orthogonal"),
        (_set(RescaleSlope=0), "RescaleSlope is 0"),
        (_set(Rows=0), "0 rows"),
        (_set(BitsAllocated=1, BitsStored=1, HighBit=0), "1 of 1 bits"),
        (_set(ImageType=["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]), "mosaic"),
        (_set(NumberOfFrames=2, PixelData=bytes(480)), "multi-frame"),
    ],
)
def test_unusable_slices_refuse_their_series(
    tmp_path: Path, write_series: Any, edit: Any, words: str
) -> None:
    write_series(tmp_path / "scan", edit=edit)
    line = refusal(tmp_path)
    assert words in line
    assert "scan" in line


def test_one_damaged_slice_refuses_its_series_and_no_other(
    tmp_path: Path, write_series: Any
) -> None:
    files = write_series(tmp_path / "bad")
    write_series(tmp_path / "good")
    files[-1].write_bytes(files[-1].read_bytes()[:-30])
    found = find_series(tmp_path)
    assert [volume.case_id for volume in found.volumes] == ["good"]
    assert "bad/005.dcm is truncated: 210 of 240 bytes" in str(found.refused[0])


@pytest.mark.parametrize("kept", [0, 1, 100, 131, 132, 140, 300, 500, 900])
def test_file_cut_anywhere_refuses_its_series(tmp_path: Path, write_series: Any, kept: int) -> None:
    files = write_series(tmp_path / "scan")
    files[-1].write_bytes(files[-1].read_bytes()[:kept])
    assert "005.dcm" in refusal(tmp_path)


def test_single_slice_needs_a_thickness(tmp_path: Path, write_series: Any) -> None:
    write_series(tmp_path / "one", count=1)
    assert only(find_series(tmp_path)).grid.spacing_mm[0] == pytest.approx(2.5)
    write_series(tmp_path / "one", count=1, edit=_set(SliceThickness=None))
    assert "without SliceThickness" in refusal(tmp_path)


def test_some_slices_without_rescale_are_refused(tmp_path: Path, write_series: Any) -> None:
    def forget(header: Dataset, index: int) -> None:
        if index == 2:
            del header.RescaleSlope, header.RescaleIntercept

    write_series(tmp_path, edit=forget)
    assert "003.dcm has no rescale slope" in refusal(tmp_path)


def test_unknown_allowance_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown tilt; expected some of gap, varying_spacing"):
        find_series(tmp_path, allow=["tilt"])


def test_missing_folder_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        find_series(tmp_path / "gone")


def test_pipe_is_no_source(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.dcm")
    assert find_series(tmp_path).refused == ()
    with pytest.raises(DataError, match="neither a folder nor a file"):
        find_series(tmp_path / "pipe.dcm")


# --- values


def test_slope_and_intercept_are_applied_slice_by_slice(
    tmp_path: Path, write_series: Any, pixels: Any
) -> None:
    def scale(header: Dataset, index: int) -> None:
        header.RescaleSlope, header.RescaleIntercept = f"{0.5 + index}", "0.25"

    write_series(tmp_path, edit=scale)
    array = only(find_series(tmp_path)).read().array
    assert array.dtype == np.float32
    for index in range(5):
        expected = pixels(index) * (0.5 + index) + 0.25
        np.testing.assert_allclose(array[0, index], expected, rtol=1e-6)


def test_missing_rescale_gives_the_stored_values(
    tmp_path: Path, write_series: Any, pixels: Any
) -> None:
    edit = _set(RescaleSlope=None, RescaleIntercept=None)
    write_series(tmp_path, modality="MR", edit=edit)
    array = only(find_series(tmp_path)).read().array
    np.testing.assert_array_equal(array[0], np.stack([pixels(n) for n in range(5)]))


def test_values_beyond_int16_are_kept_as_float32(tmp_path: Path, write_series: Any) -> None:
    def large(header: Dataset, _: int) -> None:
        header.BitsStored, header.HighBit = 16, 15
        header.PixelData = np.full((10, 12), 65535, dtype=np.uint16).tobytes()

    write_series(tmp_path, edit=large)
    array = only(find_series(tmp_path)).read().array
    assert array.dtype == np.float32
    assert (array == 65535 - 1024).all()


def test_bits_above_the_stored_ones_are_ignored_and_signs_kept(
    tmp_path: Path, write_series: Any
) -> None:
    values = np.tile(np.array([-2048, -1, 0, 2047], dtype=np.int16), (10, 3))

    def overlay(header: Dataset, _: int) -> None:
        header.PixelRepresentation = 1
        header.RescaleIntercept = 0
        raw = (values.view(np.uint16) & 0x0FFF) | 0x9000  # the upper bits hold an overlay
        header.PixelData = raw.tobytes()

    write_series(tmp_path, edit=overlay)
    np.testing.assert_array_equal(only(find_series(tmp_path)).read().array[0, 0], values)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_other_uncompressed_transfer_syntaxes_are_read(
    tmp_path: Path, write_series: Any, pixels: Any, syntax: str
) -> None:
    def swap(header: Dataset, index: int) -> None:
        if syntax == ExplicitVRBigEndian:
            header.PixelData = pixels(index).byteswap().tobytes()
            header["PixelData"].VR = "OW"

    write_series(tmp_path, edit=swap, syntax=syntax)
    array = only(find_series(tmp_path)).read().array
    np.testing.assert_array_equal(array[0], rescaled(pixels, range(5)))


def test_run_length_compression_is_decoded_without_loss(
    tmp_path: Path, write_series: Any, pixels: Any
) -> None:
    for path in write_series(tmp_path):
        header = dcmread(path)
        header.compress(RLELossless, generate_instance_uid=False)
        header.save_as(path)
    array = only(find_series(tmp_path)).read().array
    np.testing.assert_array_equal(array[0], rescaled(pixels, range(5)))


def test_truncated_compressed_file_refuses_its_series(tmp_path: Path, write_series: Any) -> None:
    files = write_series(tmp_path)
    for path in files:
        header = dcmread(path)
        header.compress(RLELossless, generate_instance_uid=False)
        header.save_as(path)
    files[2].write_bytes(files[2].read_bytes()[:-20])
    assert "003.dcm is truncated" in refusal(tmp_path)


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.4.100", "1.2.840.10008.1.2.4.201", "1.2.3"])
def test_transfer_syntax_that_cannot_be_decoded_is_named(
    tmp_path: Path, write_series: Any, syntax: str
) -> None:
    for path in write_series(tmp_path):
        header = dcmread(path)
        header.compress(RLELossless, generate_instance_uid=False)
        header.file_meta.TransferSyntaxUID = UID(syntax)
        header.save_as(path)
    assert "transfer syntax" in refusal(tmp_path)


def test_deflated_file_is_refused_without_inflating_it(tmp_path: Path, write_series: Any) -> None:
    write_series(tmp_path, syntax=DeflatedExplicitVRLittleEndian)
    assert "deflated" in str(find_series(tmp_path).refused[0])


def test_damaged_compressed_pixels_fail_their_case_alone(tmp_path: Path, write_series: Any) -> None:
    for place in ("bad", "good"):
        for path in write_series(tmp_path / place):
            header = dcmread(path)
            header.compress(RLELossless, generate_instance_uid=False)
            if place == "bad":
                header.PixelData = header.PixelData[:20] + b"\xff" * (len(header.PixelData) - 20)
                start = header.PixelData.rfind(b"\xff" * 8)
                assert start > 0
            header.save_as(path)
    found = find_series(tmp_path)
    volumes = {volume.case_id: volume for volume in found.volumes}
    outcomes = map_cases(_sum, list(volumes.values()), workers=1, description="reading")
    kinds = {outcome.item.case_id: type(outcome) for outcome in outcomes}
    assert kinds.pop("good") is Done
    assert set(kinds.values()) <= {Failed}
    assert len(kinds) + len(found.refused) == 1


def test_decoder_says_nothing_itself(
    shared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for path in sorted((shared / "data" / "ct_dicom_series" / "dicom").iterdir())[:3]:
        raw = bytearray(path.read_bytes())
        noise = np.random.default_rng(1).bytes(60_000)
        raw[20_000:80_000] = noise
        (tmp_path / path.name).write_bytes(raw)
    volume = only(find_series(tmp_path))
    capfd.readouterr()
    with contextlib.suppress(DataError):  # it may also decode to something
        volume.read()
    assert capfd.readouterr() == ("", "")
    os.write(2, b"heard again")
    assert capfd.readouterr().err == "heard again"


def _sum(volume: Any) -> int:
    return int(volume.read().array.sum())


def test_file_that_changed_after_the_search_is_an_error(tmp_path: Path, write_series: Any) -> None:
    files = write_series(tmp_path)
    found = only(find_series(tmp_path))
    files[1].write_bytes(files[1].read_bytes()[:-10])
    with pytest.raises(DataError, match=r"002\.dcm: changed since"):
        found.read()


# --- enhanced objects


def _enhanced(uid: str, *, values: tuple[tuple[float, float, float], ...]) -> Dataset:
    """Frames of (z, b-value, slope) in one object."""
    header = Dataset()
    header.SOPClassUID = EnhancedMRImageStorage
    header.SOPInstanceUID = generate_uid()
    header.SeriesInstanceUID = uid
    header.Modality = "MR"
    header.InstanceNumber = 1
    header.PatientName = "Secretname"
    header.ImageType = ["ORIGINAL", "PRIMARY", "DIFFUSION", "NONE"]
    header.Rows, header.Columns, header.NumberOfFrames = 10, 12, len(values)
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated, header.BitsStored, header.HighBit = 16, 16, 15
    header.PixelRepresentation = 0
    shared, plane, measures = Dataset(), Dataset(), Dataset()
    plane.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    measures.PixelSpacing, measures.SliceThickness = [1.5, 1.25], 4
    shared.PlaneOrientationSequence = Items([plane])
    shared.PixelMeasuresSequence = Items([measures])
    header.SharedFunctionalGroupsSequence = Items([shared])
    frames = []
    for z, b, slope in values:
        group, position, diffusion, transform = Dataset(), Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = [1, 2, z]
        diffusion.DiffusionBValue = b
        transform.RescaleSlope, transform.RescaleIntercept = slope, 0
        group.PlanePositionSequence = Items([position])
        group.MRDiffusionSequence = Items([diffusion])
        group.PixelValueTransformationSequence = Items([transform])
        frames.append(group)
    header.PerFrameFunctionalGroupsSequence = Items(frames)
    return header


@pytest.mark.parametrize("compressed", [False, True])
def test_enhanced_object_is_parted_and_ordered_by_its_frames(
    tmp_path: Path, write_series: Any, pixels: Any, compressed: bool
) -> None:
    values = tuple((4.0 * (2 - n % 3), (0.0, 700.0)[n // 3], 1.0 + n // 3) for n in range(6))
    header = _enhanced(generate_uid(), values=values)
    stored = pixels(3, (6, 10, 12))
    header.PixelData = stored.tobytes()
    (path,) = write_series(tmp_path / "dwi", count=1, edit=lambda old, _: _become(old, header))
    if compressed:
        header = dcmread(path)
        header.compress(RLELossless, generate_instance_uid=False)
        header.save_as(path)
    found = find_series(tmp_path)
    assert found.refused == ()
    assert [volume.case_id for volume in found.volumes] == ["dwi__b0", "dwi__b700"]
    volume = found.volumes[1].read()
    assert volume.grid.spacing_mm == pytest.approx((4.0, 1.5, 1.25))
    np.testing.assert_array_equal(volume.array[0], stored[[5, 4, 3]].astype(np.int16) * 2)


def _become(old: Dataset, new: Dataset) -> None:
    old.clear()
    old.update(new)


# --- strange files and folders


def test_other_files_are_passed_over_and_counted(tmp_path: Path, write_series: Any) -> None:
    write_series(tmp_path / "chest")
    (tmp_path / "chest" / "notes.txt").write_text("nothing")
    (tmp_path / "chest" / "empty").write_bytes(b"")
    (tmp_path / "chest" / ".hidden.dcm").write_bytes(b"x")
    (tmp_path / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM" + b"../../secret")
    for modality in ("SR", "SEG", "RTSTRUCT"):
        write_series(tmp_path / modality, count=1, edit=_set(Modality=modality))
    found = find_series(tmp_path)
    assert only(found).case_id == "chest"
    assert found.num_skipped == 5


def test_garbage_named_dcm_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(b"")
    (tmp_path / "b.dcm").write_bytes(b"hello, I am a text" * 20)
    lines = [str(line) for line in find_series(tmp_path).refused]
    assert lines == ["a.dcm: is empty", "b.dcm: is not a DICOM file"]


def test_preamble_of_an_executable_is_only_data(tmp_path: Path, write_series: Any) -> None:
    for path in write_series(tmp_path / "scan"):
        path.write_bytes(b"\x7fELF" + bytes(124) + path.read_bytes()[128:])
    assert only(find_series(tmp_path)).read().array.shape == (1, 5, 10, 12)


def test_file_without_preamble_is_read(tmp_path: Path, write_series: Any) -> None:
    for path in write_series(tmp_path / "scan", names=[f"IM{n}" for n in range(5)]):
        header = dcmread(path)
        del header.file_meta
        header.preamble = None
        header.save_as(path, implicit_vr=True, little_endian=True, enforce_file_format=False)
        assert path.read_bytes()[128:132] != b"DICM"
    assert only(find_series(tmp_path)).read().array.shape == (1, 5, 10, 12)


def test_very_deep_sequence_is_refused_in_one_line(tmp_path: Path, write_series: Any) -> None:
    (path,) = write_series(tmp_path / "deep", count=1)
    raw = path.read_bytes()
    item = struct.pack("<HH2sHL", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF)
    item += struct.pack("<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF)
    place = raw.index(struct.pack("<HH", 0x0010, 0x0010))  # before the patient's name
    path.write_bytes(raw[:place] + item * 100_000 + raw[place:])
    assert "deep/001.dcm" in refusal(tmp_path)


@pytest.mark.parametrize("tag", [(0x0020, 0x0032), (0x0008, 0x0008), (0x5200, 0x9230)])
def test_value_with_a_huge_length_is_refused(
    tmp_path: Path, write_series: Any, tag: tuple[int, int]
) -> None:
    (path,) = write_series(tmp_path / "huge", count=1)
    raw = path.read_bytes()
    place = raw.index(struct.pack("<HH", 0x0010, 0x0010))
    huge = struct.pack("<HH2sHL", *tag, b"UN", 0, 0xFFFFFF00)
    path.write_bytes(raw[:place] + huge + raw[place:])
    assert "huge/001.dcm" in refusal(tmp_path)


def test_links_are_followed_and_broken_ones_refused(tmp_path: Path, write_series: Any) -> None:
    files = write_series(tmp_path / "outside")
    (tmp_path / "inside" / "slices").mkdir(parents=True)
    for file in files:
        (tmp_path / "inside" / "slices" / file.name).symlink_to(file)
    (tmp_path / "inside" / "loop.dcm").symlink_to(tmp_path / "inside" / "loop.dcm")
    (tmp_path / "inside" / "gone.dcm").symlink_to(tmp_path / "gone.dcm")
    found = find_series(tmp_path / "inside")
    assert [volume.case_id for volume in found.volumes] == ["slices"]
    assert [line.where for line in found.refused] == ["gone.dcm", "loop.dcm"]
    (tmp_path / "inside" / "slices").rename(tmp_path / "slices")
    (tmp_path / "inside" / "folder").symlink_to(tmp_path / "outside")
    assert [volume.case_id for volume in find_series(tmp_path / "inside").volumes] == ["folder"]


def test_mutated_headers_never_raise(tmp_path: Path, write_series: Any) -> None:
    files = write_series(tmp_path / "scan")
    whole = files[2].read_bytes()
    rng = np.random.default_rng(3)
    for _ in range(150):
        changed = bytearray(whole)
        for place in rng.integers(128, len(whole) - 240, size=3):
            changed[place] = rng.integers(0, 256)
        files[2].write_bytes(changed)
        found = find_series(tmp_path)
        assert len(found.volumes) <= 2
        for volume in found.volumes:
            assert volume.read().array.shape[2:] == (10, 12)


def test_no_message_or_name_holds_the_patient(
    tmp_path: Path, write_series: Any, private_words: tuple[str, ...]
) -> None:
    spoiled = {
        "gap": lambda header, index: index != 2,
        "colour": _set(PhotometricInterpretation="RGB", SamplesPerPixel=3),
        "text": _set(PixelSpacing=None),
        "single": lambda header, index: index == 0,
        "good": None,
    }
    for name, edit in spoiled.items():
        write_series(tmp_path / name, edit=edit)
    bad = write_series(tmp_path / "number")[1]
    # a number replaced by the patient's name, so that a careless message would quote it
    bad.write_bytes(bad.read_bytes().replace(b"2.5 ", b"Secr"))
    found = find_series(tmp_path)
    assert {volume.case_id for volume in found.volumes} == {"good", "single"}
    shown = [str(line) for line in found.refused]
    shown += [f"{volume} {volume.case_id} {volume.origin_id}" for volume in found.volumes]
    assert len(shown) == 6
    assert not [word for word in (*private_words, "secr") for line in shown if word in line.lower()]


# --- real series


@pytest.mark.parametrize(
    ("folder", "shape", "spacing", "dtype"),
    [
        ("mr_prostate_dicom/t2w_tra", (19, 384, 384), (3.0, 0.5, 0.5), np.int16),
        ("mr_prostate_dicom/adc", (19, 128, 84), (3.0, 2.0, 2.0), np.int16),
        ("ct_dicom_series/dicom", (20, 512, 512), (2.0, 0.9765625, 0.9765625), np.int16),
    ],
)
def test_real_series_equals_the_reader_of_simpleitk(
    shared: Path,
    folder: str,
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    dtype: Any,
) -> None:
    place = shared / "data" / folder
    volume = only(find_series(place)).read()
    assert volume.grid.shape == shape
    assert volume.grid.spacing_mm == pytest.approx(spacing, abs=1e-4)
    assert volume.array.dtype == dtype
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(place)))
    image = reader.Execute()
    np.testing.assert_array_equal(volume.array[0], sitk.GetArrayFromImage(image))
    np.testing.assert_allclose(volume.grid.origin_mm, image.GetOrigin(), atol=1e-6)
    directions = np.array(image.GetDirection()).reshape(3, 3)[:, ::-1]
    np.testing.assert_allclose(volume.grid.directions, directions, atol=1e-6)


def test_real_diffusion_series_gives_a_volume_per_b_value(shared: Path) -> None:
    found = find_series(shared / "data" / "mr_prostate_dicom")
    assert found.refused == ()
    assert [volume.case_id for volume in found.volumes] == [
        "adc", "dwi_multi_b__b400", "dwi_multi_b__b50", "dwi_multi_b__b800", "t2w_tra",
    ]  # fmt: skip
    for volume in found.volumes[1:4]:
        assert volume.grid.shape == (19, 128, 84)
        assert volume.grid.spacing_mm == pytest.approx((3.0, 2.0, 2.0), abs=1e-4)
        assert len(volume.files) == 19
    means = [volume.read().array.mean() for volume in found.volumes[1:4]]
    assert means[1] > means[0] > means[2]  # signal falls with b: 50, 400, 800


@pytest.mark.parametrize("removed", [1, 10, 18])
def test_real_series_with_a_lost_slice_is_refused(
    shared: Path, tmp_path: Path, removed: int
) -> None:
    place = tmp_path / "t2w"
    shutil.copytree(shared / "data" / "mr_prostate_dicom" / "t2w_tra", place)
    files = only(find_series(place)).files
    files[removed].unlink()
    found = find_series(place)
    if removed == 18:  # an end slice cannot be missed
        assert only(found).grid.shape[0] == 18
    else:
        assert "gap: 1 slice is missing" in str(found.refused[0])
