from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import Dataset

from voxelbridge.core.data.case_names import MAX_BYTES, safe_case_id
from voxelbridge.core.data.image_io import write_image
from voxelbridge.core.data.sources import find_images
from voxelbridge.core.data.volume import Grid, Volume
from voxelbridge.core.errors import ConfigError, DataError

SHAPE = (4, 5, 6)
LUNA_NAME = "1.3.6.1.4.1.14519.5.2.1.6279.6001.105756658031515062000744821260"


def put(path: Path, value: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    grid = Grid.from_parts(SHAPE, (3.0, 2.0, 1.0))
    write_image(path, Volume(np.full((1, *SHAPE), value, dtype=np.int16), grid))
    return path


def test_single_file_is_one_case(tmp_path: Path) -> None:
    found = find_images(put(tmp_path / "scan.nii.gz", value=7))
    assert [image.case_id for image in found.images] == ["scan"]
    assert found.refused == ()
    assert (found.images[0].read().array == 7).all()
    assert found.images[0].read_grid().spacing_mm == pytest.approx((3.0, 2.0, 1.0))


def test_tree_of_files_and_series_is_sorted_and_named_by_relative_paths(
    tmp_path: Path, write_series: Any
) -> None:
    put(tmp_path / "site2" / "scan.nrrd")
    put(tmp_path / "site1" / "scan.nii.gz")
    put(tmp_path / "b_0001.mha")
    write_series(tmp_path / "site1" / "ct")
    found = find_images(tmp_path)
    names = [image.case_id for image in found.images]
    assert names == ["b_0001", "site1__ct", "site1__scan", "site2__scan"]
    assert [image.read().array.shape[1:] for image in found.images] == [
        SHAPE,
        (5, 10, 12),
        SHAPE,
        SHAPE,
    ]
    assert [image.read_grid().shape for image in found.images] == [SHAPE, (5, 10, 12), SHAPE, SHAPE]
    assert len(found.images[1].files) == 5


def test_names_do_not_depend_on_where_the_folder_lies(tmp_path: Path, write_series: Any) -> None:
    names = []
    for place in ("here", "there/and/deeper"):
        put(tmp_path / place / "set" / "x.mha")
        write_series(tmp_path / place / "set", uid="1.2.826.0.1.7")
        names.append([image.case_id for image in find_images(tmp_path / place / "set").images])
    assert names[0] == names[1] == ["set", "x"]


def test_equal_names_are_told_apart_by_ending_or_path(tmp_path: Path, write_series: Any) -> None:
    put(tmp_path / "scan.nii.gz")
    put(tmp_path / "scan.mha")
    write_series(tmp_path / "scan")
    put(tmp_path / "a" / "b.mha")
    put(tmp_path / "a__b.mha")
    names = [image.case_id for image in find_images(tmp_path).images]
    assert {"scan_nii_gz", "scan_mha", "scan_dicom"} < set(names)
    assert len(set(names)) == 5
    assert [image.case_id for image in find_images(tmp_path).images] == names


def test_names_that_differ_in_case_only_are_told_apart(tmp_path: Path) -> None:
    put(tmp_path / "Scan.mha")
    put(tmp_path / "scan.mha")
    names = [image.case_id.casefold() for image in find_images(tmp_path).images]
    assert len(set(names)) == 2


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        (["a", "b c", "ü"], "a__b c__ü"),
        (["-rf"], "_rf"),
        ([".."], "_."),
        (["a\nb"], "a_b"),
        (['q:"*?'], "q____"),
        ([" "], "_"),
        (["u\u0308"], "ü"),
    ],
)
def test_case_names_are_safe_for_files(parts: list[str], name: str) -> None:
    assert safe_case_id(parts) == name


def test_long_names_are_cut_and_stay_different() -> None:
    one, other = (safe_case_id(["ä" * 200, end]) for end in "xy")
    assert one != other
    assert max(len(one.encode()), len(other.encode())) <= MAX_BYTES


def test_refused_series_are_lines_and_the_rest_is_found(tmp_path: Path, write_series: Any) -> None:
    def lose(_: Dataset, index: int) -> bool:
        return index != 2

    put(tmp_path / "good.mha")
    write_series(tmp_path / "broken", edit=lose)
    found = find_images(tmp_path)
    assert [image.case_id for image in found.images] == ["good"]
    (line,) = found.refused
    assert "series broken" in line
    assert "gap" in line
    assert find_images(tmp_path, allow=["gap"]).refused == ()


def test_provenance_is_the_series_uid_where_it_is_known(tmp_path: Path, write_series: Any) -> None:
    write_series(tmp_path / "ct", uid="1.2.826.0.1.7")
    put(tmp_path / f"{LUNA_NAME}.mha")
    put(tmp_path / "scan.mha")
    names = {image.case_id: image.provenance_names for image in find_images(tmp_path).images}
    assert names == {
        "ct": ("dicom:1.2.826.0.1.7",),
        LUNA_NAME: (f"dicom:{LUNA_NAME}",),
        "scan": (),
    }


def test_a_single_dicom_file_is_searched_too(tmp_path: Path, write_series: Any) -> None:
    (path,) = write_series(tmp_path, count=1, names=["slice"])
    (image,) = find_images(path).images
    assert image.case_id == "slice"
    assert image.read().array.shape == (1, 1, 10, 12)


def test_links_are_followed_and_broken_ones_refused_once(tmp_path: Path) -> None:
    outside = put(tmp_path / "outside" / "scan.mha")
    put(tmp_path / "inside" / "own.mha")
    (tmp_path / "inside" / "link.mha").symlink_to(outside)
    (tmp_path / "inside" / "folder").symlink_to(tmp_path / "outside")
    (tmp_path / "inside" / "gone.mha").symlink_to(tmp_path / "gone")
    found = find_images(tmp_path / "inside")
    assert [image.case_id for image in found.images] == ["folder__scan", "link", "own"]
    assert [image.read().array.ndim for image in found.images] == [4, 4, 4]
    (line,) = found.refused
    assert line.startswith("gone.mha: is a link to a file that is not there; fetch the file")


def test_what_is_no_image_says_what_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"no image found; readable are \.nii\.gz.*DICOM"):
        find_images(tmp_path)
    with pytest.raises(DataError, match="not an image"):
        find_images(tmp_path / "notes.txt")
    with pytest.raises(DataError, match="does not exist"):
        find_images(tmp_path / "gone")


def test_unknown_allowance_is_a_config_error_for_any_source(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown tilt"):
        find_images(put(tmp_path / "scan.mha"), allow=["tilt"])


def test_real_folders_go_through_the_right_reader(shared: Path) -> None:
    found = find_images(shared / "data" / "ct_dicom_series")
    assert [image.case_id for image in found.images] == ["dicom", "seg"]
    assert [image.read_grid().shape for image in found.images] == [(20, 512, 512)] * 2
    names = [image.case_id for image in find_images(shared / "data" / "orientations").images]
    assert len(names) == 24
