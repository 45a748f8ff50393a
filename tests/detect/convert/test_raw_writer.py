"""The writer of raw data sets: whole cases, byte copies, resuming, what is refused."""

from pathlib import Path

import numpy as np
import pytest

from voxelbridge.core.data.dataset import RawDataset
from voxelbridge.core.data.image_io import read_image, write_image
from voxelbridge.core.data.volume import Grid, Volume, boxes_to_world_mm
from voxelbridge.core.errors import DataError
from voxelbridge.core.files import read_json
from voxelbridge.detect.convert.raw_writer import (
    Boxes,
    InstanceMap,
    NoObjects,
    RawDatasetWriter,
    Unlabelled,
    WorldBoxes,
)

GRID = Grid.from_parts((6, 7, 8), (2.0, 1.0, 1.5), origin_mm=(5.0, -3.0, 9.0))
BOX = [1.0, 2.0, 3.0, 3.0, 5.0, 7.5]


def test_each_kind_of_object_reads_back(tmp_path: Path) -> None:
    writer = _writer(tmp_path / "out")
    world = boxes_to_world_mm([BOX], GRID)
    writer.add_case("a", _volume(), objects=_map(), patient="p1", origins=["dicom:1.2"])
    writer.add_case("b", _volume(), objects=Boxes([BOX], [1]), patient="p1")
    writer.add_case("c", _volume(), objects=WorldBoxes(world, [0]))
    writer.add_case("d", _volume(), objects=NoObjects(), notes=["dull"])
    writer.add_case("e", _volume(), objects=Unlabelled(), split="test")
    report = writer.finish([{"train": ["a", "b", "gone"], "val": ["c", "d"]}])
    assert (report.num_cases, report.num_objects, report.notes) == (5, 4, ["d: dull"])
    raw = RawDataset.open(tmp_path / "out")
    assert (raw.name, raw.channel_names, raw.class_names) == ("tiny", ("CT",), ("hot", "cold"))
    read = {case.case_id: case.read_objects(GRID) for case in raw.cases}
    assert read["a"].ids.tolist() == [1, 2]
    assert read["a"].labels.tolist() == [1, 0]
    np.testing.assert_allclose(read["b"].boxes, [BOX])
    np.testing.assert_allclose(read["c"].boxes, [BOX], atol=1e-5)
    assert len(read["d"].boxes) == 0
    assert read["d"].instances is not None
    assert [case.has_labels for case in raw.test_cases] == [False]
    assert raw.splits == ({"train": ("a", "b"), "val": ("c", "d")},)
    assert raw.groups == {"a": "p1", "b": "p1"}
    assert read_json(tmp_path / "out" / "origins.json") == {"a": ["dicom:1.2"]}


def test_files_of_the_ending_are_copied_and_others_rewritten(tmp_path: Path) -> None:
    same, other = tmp_path / "a.nii.gz", tmp_path / "b.mha"
    for path in (same, other):
        write_image(path, _volume())
    writer = _writer(tmp_path / "out")
    writer.add_case("a", [same], objects=NoObjects())
    writer.add_case("b", [other], objects=NoObjects())
    images = tmp_path / "out" / "imagesTr"
    assert (images / "a_0000.nii.gz").read_bytes() == same.read_bytes()
    written = read_image(images / "b_0000.nii.gz")
    np.testing.assert_array_equal(written.array, _volume().array)
    assert written.grid.agrees_with(GRID)


def test_second_call_skips_what_is_done_and_redoes_what_is_not(tmp_path: Path) -> None:
    calls: list[str] = []
    for _ in range(2):
        writer = _writer(tmp_path / "out")

        def add(case: str, writer: RawDatasetWriter = writer) -> None:
            calls.append(case)
            writer.add_case(case, _volume(), objects=Boxes([BOX], [0]), notes=["n"])

        assert writer.convert_each(add, dict.fromkeys("ab", "train"), workers=0) == []
        report = writer.finish()
        assert (report.num_cases, report.num_objects, len(report.notes)) == (2, 2, 2)
        (tmp_path / "out" / "imagesTr" / "b_0000.nii.gz").unlink(missing_ok=True)
    assert calls == ["a", "b", "b"]


def test_failing_case_leaves_no_file_and_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = _writer(tmp_path / "out")

    def add(case: str) -> None:
        outside = Boxes([[3, 0, 0, 3, 1, 1]] if case == "bad" else [BOX], [0])
        writer.add_case(case, _volume(), objects=outside)

    failures = writer.convert_each(add, {"bad": "train", "good": "test"}, workers=2)
    report = writer.finish(failures=failures)
    assert report.num_cases == 1
    assert len(report.failures) == 1
    assert "bad" in report.failures[0]
    assert capsys.readouterr().err == f"error: {report.failures[0]}\n"
    assert not [path for path in (tmp_path / "out").rglob("*") if "bad" in path.name]


def test_leftovers_of_a_killed_call_go(tmp_path: Path) -> None:
    writer = _writer(tmp_path / "out")
    writer.add_case("a", _volume(), objects=NoObjects())
    write_image(tmp_path / "out" / "imagesTr" / "half_0000.nii.gz", _volume())
    (tmp_path / "out" / "labelsTr" / ".partial-x.nii.gz").write_bytes(b"1")
    writer.finish()
    assert [case.case_id for case in RawDataset.open(tmp_path / "out").cases] == ["a"]
    assert not list((tmp_path / "out").rglob(".partial*"))


def test_case_that_changes_sides_is_moved(tmp_path: Path) -> None:
    writer = _writer(tmp_path / "out")
    writer.add_case("a", _volume(), objects=_map())
    assert writer.is_done("a")
    assert not writer.is_done("a", split="test")
    writer.add_case("a", _volume(), objects=_map(), split="test")
    writer.finish()
    raw = RawDataset.open(tmp_path / "out")
    assert not raw.cases
    assert [case.case_id for case in raw.test_cases] == ["a"]


def test_foreign_folders_and_other_options_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(DataError, match="is no conversion; give an empty folder"):
        _writer(tmp_path / "mine")
    _writer(tmp_path / "out", seed=0)
    with pytest.raises(DataError, match="converted with name tiny, seed 0, now asked"):
        _writer(tmp_path / "out", seed=1)


@pytest.mark.parametrize(
    ("objects", "match"),
    [
        (InstanceMap(np.zeros((1, 1, 1), int), {}), "does not fit the image"),
        (InstanceMap(np.ones(GRID.shape, int), {2: 0}), r"ids \[1\], the classes name \[2\]"),
        (InstanceMap(np.ones(GRID.shape, int), {1: 5}), "unknown classes"),
        (Boxes([[1, 1, 1, 1, 2, 2]], [0]), "no extent"),
        (Boxes([[1, 1, np.nan, 2, 2, 2]], [0]), "not finite"),
        (Boxes([BOX], [2]), "class 2"),
    ],
)
def test_wrong_objects_are_refused(tmp_path: Path, objects: Boxes, match: str) -> None:
    with pytest.raises(DataError, match=match):
        _writer(tmp_path / "out").add_case("a", _volume(), objects=objects)


@pytest.mark.parametrize("case", ["", ".a", "a/b", "settings"])
def test_impossible_case_ids_are_refused(tmp_path: Path, case: str) -> None:
    with pytest.raises(DataError, match="case id"):
        _writer(tmp_path / "out").add_case(case, _volume(), objects=NoObjects())


def test_channels_must_be_complete_and_on_one_grid(tmp_path: Path) -> None:
    paths = [tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"]
    write_image(paths[0], _volume())
    write_image(paths[1], Volume(_volume().array, Grid.from_parts(GRID.shape, (2.0, 1.0, 1.0))))
    writer = RawDatasetWriter(
        tmp_path / "out", name="two", channel_names=("a", "b"), class_names=("hot",)
    )
    with pytest.raises(DataError, match="1 channels, expected a, b"):
        writer.add_case("x", paths[:1], objects=NoObjects())
    with pytest.raises(DataError, match="differs from"):
        writer.add_case("x", paths, objects=NoObjects())


def _writer(out: Path, seed: int = 0) -> RawDatasetWriter:
    return RawDatasetWriter(
        out,
        name="tiny",
        channel_names=("CT",),
        class_names=("hot", "cold"),
        settings={"seed": seed},
    )


def _volume() -> Volume:
    return Volume(np.arange(6 * 7 * 8, dtype=np.int16).reshape(1, 6, 7, 8), GRID)


def _map() -> InstanceMap:
    array = np.zeros(GRID.shape, dtype=np.int64)
    array[1:3, 2:4, 3:6], array[4, 4, 4] = 1, 2
    return InstanceMap(array, {1: 1, 2: 0})
