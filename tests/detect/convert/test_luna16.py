"""LUNA16: spheres in world space, official subsets, the real tables."""

import csv
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - the name everybody uses

from voxelbridge.core.data.dataset import RawDataset
from voxelbridge.core.data.volume import Grid, edges_to_world
from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.detect.convert.luna16 import (
    case_name,
    convert,
    read_nodules,
    spheres_to_objects,
    subset_folds,
)
from voxelbridge.detect.convert.raw_writer import Boxes, InstanceMap, NoObjects

UID = "1.3.6.1.4.1.14519.5.2.1.6279.6001."


def test_download_becomes_a_data_set(tmp_path: Path) -> None:
    src = _download(tmp_path / "src")
    report = convert(src, tmp_path / "out", workers=2)
    assert (report.num_cases, report.num_objects, report.failures) == (4, 3, [])
    assert report.notes == ["1 scans of annotations.csv are not in the folder"]
    raw = RawDataset.open(tmp_path / "out")
    assert [case.case_id for case in raw.test_cases] == [case_name(f"{UID}9")]
    assert [fold["val"] for fold in raw.splits or ()] == [
        (case_name(f"{UID}{n}"),) for n in (0, 1, 2)
    ]
    empty = next(case for case in raw.cases if case.case_id.endswith("_2"))
    assert len(empty.read_objects(empty.read_image().grid).boxes) == 0


@pytest.mark.parametrize("flip", [False, True])
def test_sphere_is_found_in_world_space_whatever_the_direction(tmp_path: Path, flip: bool) -> None:
    src = tmp_path / "src"
    image = _write_scan(src / "subset0", f"{UID}5", flip=flip)
    _write_scan(src / "subset1", f"{UID}6", flip=flip)
    centre = image.TransformContinuousIndexToPhysicalPoint((14.0, 9.0, 5.0))  # x, y, z
    _write_annotations(src, [(f"{UID}5", *centre, 6.0)])
    convert(src, tmp_path / "out", workers=0)
    case = RawDataset.open(tmp_path / "out").cases[0]
    grid = case.read_image().grid
    objects = case.read_objects(grid)
    # radius 3 mm at spacing (2, 1, 1): 1.5, 3 and 3 voxels around the middle of voxel (5, 9, 14)
    assert objects.boxes.tolist() == [[4.0, 6.0, 11.0, 7.0, 13.0, 18.0]]
    inside = np.argwhere(np.asarray(objects.instances) == 1)
    distance = np.linalg.norm(edges_to_world(inside + 0.5, grid) - centre, axis=1)
    assert distance.max() <= 3.0
    assert len(inside) == _count_within(grid, np.array(centre), 3.0)


def test_nodule_between_voxel_centres_becomes_one_voxel() -> None:
    grid = Grid.from_parts((5, 6, 7), (5.0, 1.0, 1.0))
    objects, notes = spheres_to_objects(np.array([[3.4, 2.0, 12.4, 3.0]]), grid)
    assert isinstance(objects, InstanceMap)
    assert np.argwhere(objects.array == 1).tolist() == [[2, 2, 3]]
    assert notes == ["nodule 0 reaches no voxel centre: it became one voxel"]


def test_overlapping_nodules_keep_their_boxes() -> None:
    grid = Grid.from_parts((20, 20, 20), (1.0, 1.0, 1.0))
    spheres = np.array([[8.0, 8.0, 8.0, 8.0], [10.0, 8.0, 8.0, 4.0]])
    objects, notes = spheres_to_objects(spheres, grid)
    assert isinstance(objects, Boxes)
    assert np.asarray(objects.boxes).tolist() == [[4, 4, 4, 13, 13, 13], [6, 6, 8, 11, 11, 13]]
    assert notes == ["nodules overlap: written as boxes"]


def test_nodule_at_the_border_is_cut_and_one_outside_is_an_error() -> None:
    grid = Grid.from_parts((4, 4, 4), (1.0, 1.0, 1.0))
    objects, _ = spheres_to_objects(np.array([[0.0, 0.0, 0.0, 4.0]]), grid)
    assert isinstance(objects, InstanceMap)
    assert objects.array[0, 0, 2] == 1
    with pytest.raises(DataError, match=r"nodule 0 .* outside the image"):
        spheres_to_objects(np.array([[50.0, 0.0, 0.0, 4.0]]), grid)
    assert isinstance(spheres_to_objects(np.zeros((0, 4)), grid)[0], NoObjects)


def test_real_tables_have_the_published_counts(shared: Path) -> None:
    folder = shared / "data" / "luna16_protocol"
    nodules = read_nodules(folder / "annotations.csv")
    scans = (folder / "seriesuids.csv").read_text().split()
    assert sum(map(len, nodules.values())) == 1186
    assert len(nodules) == 601
    assert len(scans) == 888
    assert set(nodules) <= set(scans)
    subsets = {}
    for number in range(10):
        listed = (folder / f"subset{number}_scans_with_nodules.csv").read_text().split()
        subsets |= {case_name(uid.strip()): number for uid in listed}
    assert set(subsets) == {case_name(uid) for uid in nodules}
    folds = subset_folds(subsets, test_subset=9)
    assert len(folds) == 9
    for fold in folds:
        assert len(fold["train"]) + len(fold["val"]) == sum(n != 9 for n in subsets.values())
        assert len({subsets[case] for case in fold["val"]}) == 1


def test_wrong_layouts_say_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"annotations\.csv: cannot be read"):
        convert(tmp_path, tmp_path / "out")
    _write_annotations(tmp_path, [])
    with pytest.raises(DataError, match=r"expected subset0/\*\.mhd to subset9"):
        convert(tmp_path, tmp_path / "out")
    with pytest.raises(ConfigError, match="expected 0 to 9"):
        convert(tmp_path, tmp_path / "out", test_subset=10)
    _write_annotations(tmp_path, [("a", 1, 2, "x", 4)])
    with pytest.raises(DataError, match="line 2: not a number"):
        convert(tmp_path, tmp_path / "out")


def test_missing_raw_file_costs_its_case_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = _download(tmp_path / "src")
    (src / "subset1" / f"{UID}1.raw").unlink()
    report = convert(src, tmp_path / "out", workers=0)
    assert report.num_cases == 3
    assert len(report.failures) == 1
    assert case_name(f"{UID}1") in capsys.readouterr().err


def _download(src: Path) -> Path:
    image = _write_scan(src / "subset0", f"{UID}0")
    _write_scan(src / "subset1" / "subset1", f"{UID}1")
    (src / "subset1" / "subset1").rename(src / "moved")
    (src / "subset1").rmdir()
    (src / "moved").rename(src / "subset1")
    _write_scan(src / "subset2", f"{UID}2")
    _write_scan(src / "subset9" / "subset9", f"{UID}9")
    here = image.TransformContinuousIndexToPhysicalPoint((10.0, 9.0, 5.0))
    there = image.TransformContinuousIndexToPhysicalPoint((20.0, 9.0, 3.0))
    rows = [(f"{UID}0", *here, 5.0), (f"{UID}0", *there, 4.0), (f"{UID}9", *here, 3.0)]
    _write_annotations(src, [*rows, (f"{UID}77", 0.0, 0.0, 0.0, 3.0)])
    return src


def _write_scan(folder: Path, uid: str, *, flip: bool = False) -> sitk.Image:
    folder.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(np.full((10, 18, 26), -900, dtype=np.int16))
    image.SetSpacing((1.0, 1.0, 2.0))
    image.SetOrigin((-120.5, 33.25, -300.0))
    if flip:
        image.SetDirection((-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0))
    sitk.WriteImage(image, str(folder / f"{uid}.mhd"))
    return image


def _write_annotations(src: Path, rows: list[tuple[object, ...]]) -> None:
    with (src / "annotations.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["seriesuid", "coordX", "coordY", "coordZ", "diameter_mm"])
        table.writerows(rows)


def _count_within(grid: Grid, centre: np.ndarray, radius: float) -> int:
    index = np.indices(grid.shape).reshape(3, -1).T
    world = index @ grid.affine[:, :3].T + grid.affine[:, 3]
    return int((np.linalg.norm(world - centre, axis=1) <= radius).sum())
