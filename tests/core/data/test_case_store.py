"""The case store: exact round trips, damage is found, unfinished work is not."""

import json
import multiprocessing
from functools import partial
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelbridge.core.data.array_file import chunk_shapes, open_array
from voxelbridge.core.data.case_store import CaseStore, CaseStoreWriter
from voxelbridge.core.data.mapping import StoredToOriginal
from voxelbridge.core.data.provenance import Provenance
from voxelbridge.core.data.volume import Grid, box_corners_to_world
from voxelbridge.core.errors import DataError


def _grid(shape: tuple[int, ...]) -> Grid:
    return Grid.from_parts(shape, (2.0, 1.0, 0.5), origin_mm=(1.5, -2.5, 3.5))


def _image(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _write(
    writer: CaseStoreWriter, case_id: str, shape: tuple[int, ...], **extra: Any
) -> np.ndarray:
    image = _image(shape)
    given = {"boxes": [], "labels": [], **extra}
    writer.write_case(case_id, image, grid=_grid(shape[1:]), **given)
    return image


def _store(tmp_path: Path) -> tuple[CaseStore, np.ndarray, np.ndarray]:
    writer = CaseStoreWriter(tmp_path, patch_size=(16, 16, 16))
    shape = (2, 20, 33, 41)
    instances = np.random.default_rng(1).integers(0, 4, size=shape[1:]).astype(np.uint8)
    image = _write(
        writer,
        "b",
        shape,
        boxes=[[0, 0.25, 0, 20, 33, 41], [1, 2, 3, 4, 5, 6]],
        labels=[1, 0],
        instances=instances,
        segmentation=instances % 2,
        extra={"seen": [1, 2]},
    )
    _write(writer, "a", (1, 4, 5, 6))
    writer.finish()
    return CaseStore.open(tmp_path), image, instances


def test_store_gives_back_what_was_written(tmp_path: Path) -> None:
    store, image, instances = _store(tmp_path)
    assert [record.case_id for record in store.cases] == ["a", "b"]
    record = store.record("b")
    assert record.shape == (2, 20, 33, 41)
    assert record.spacing_mm == (2.0, 1.0, 0.5)
    assert record.boxes.tolist() == [[0, 0.25, 0, 20, 33, 41], [1, 2, 3, 4, 5, 6]]
    assert record.labels.tolist() == [1, 0]
    assert np.array_equal(store.read_image("b"), image)
    assert np.array_equal(store.read_instances("b"), instances)
    details = store.details("b")
    assert details.extra == {"seen": [1, 2]}
    assert np.array_equal(details.grid.affine, _grid((20, 33, 41)).affine)
    empty = store.record("a")
    assert empty.boxes.shape == (0, 6)
    assert empty.labels.shape == (0,)
    assert store.verify() == []


def test_case_file_has_the_promised_keys(tmp_path: Path) -> None:
    _store(tmp_path)
    (path,) = tmp_path.glob("**/b.json")
    content = json.loads(path.read_text())
    assert content["case_id"] == "b"
    assert content["schema"] == 1
    assert content["spacing_mm"] == [2.0, 1.0, 0.5]
    assert content["boxes"][0] == [0, 0.25, 0, 20, 33, 41]
    assert content["labels"] == [1, 0]
    assert path.with_suffix(".b2nd").is_file()


@pytest.mark.parametrize(
    "start",
    [(0, 0, 0), (3, 5, 7), (-4, -4, -4), (15, 30, 38), (50, 0, 0), (-30, 0, 0), (5, -3, 40)],
)
@pytest.mark.parametrize("size", [(8, 8, 8), (40, 9, 60), (1, 1, 1)])
def test_patch_equals_padding_the_whole_volume(
    tmp_path: Path, start: tuple[int, ...], size: tuple[int, ...]
) -> None:
    store, image, instances = _store(tmp_path)
    margin = 128
    where = tuple(slice(s + margin, s + margin + n) for s, n in zip(start, size, strict=True))
    wide = np.pad(image, [(0, 0), *[(margin, margin)] * 3], constant_values=-7)
    patch = store.read_patch("b", start, size, pad_value=-7)
    assert patch.dtype == np.float32
    assert np.array_equal(patch, wide[(slice(None), *where)])
    labels = store.read_instances_patch("b", start, size, pad_value=-1)
    assert labels.dtype == np.int32
    assert np.array_equal(labels, np.pad(instances.astype(int), margin, constant_values=-1)[where])
    semantic = store.read_segmentation_patch("b", start, size)
    assert np.array_equal(semantic, np.pad(instances % 2, margin)[where])


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 1, 64, 64), (3, 64, 1, 1), (1, 5, 200, 7)])
@pytest.mark.parametrize("patch", [(1, 1, 1), (16, 128, 128), (160, 160, 160)])
def test_tiny_and_one_slice_volumes_round_trip(
    tmp_path: Path, shape: tuple[int, ...], patch: tuple[int, ...]
) -> None:
    writer = CaseStoreWriter(tmp_path, patch_size=patch)
    image = _write(writer, "case", shape, instances=np.ones(shape[1:], dtype=np.int64))
    writer.finish()
    store = CaseStore.open(tmp_path)
    assert np.array_equal(store.read_image("case"), image)
    assert store.read_instances("case").all()


def test_chunks_follow_the_patch() -> None:
    assert chunk_shapes((1, 300, 300, 300), (128, 128, 128)) == ((1, 64, 64, 64), (1, 32, 32, 32))
    assert chunk_shapes((2, 30, 300, 300), (16, 192, 192)) == ((1, 16, 64, 64), (1, 8, 32, 32))
    assert chunk_shapes((1, 300, 300), (96, 96, 96)) == ((1, 64, 64), (1, 32, 32))


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    digests = []
    for name in ("one", "two"):
        store, _, _ = _store(tmp_path / name)
        digests.append(store.digest)
    assert digests[0] == digests[1]


def test_every_changed_byte_of_the_store_is_found(tmp_path: Path) -> None:
    store, _, _ = _store(tmp_path)
    rng = np.random.default_rng(0)
    paths = [path for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    assert len(paths) == 7
    for path in paths:
        raw = path.read_bytes()
        for position in rng.integers(0, len(raw), size=25).tolist():
            damaged = bytearray(raw)
            damaged[position] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            if path.name == "index.jsonl":
                with pytest.raises(DataError, match=r"index\.jsonl"):
                    CaseStore.open(tmp_path)
            else:
                problems = store.verify()
                assert len(problems) == 1
                assert path.name in problems[0]
        path.write_bytes(raw)
    assert store.verify() == []


def test_missing_truncated_and_unknown_files_are_found(tmp_path: Path) -> None:
    store, _, _ = _store(tmp_path)
    (tmp_path / "cases" / "a.b2nd").unlink()
    image = tmp_path / "cases" / "b.b2nd"
    image.write_bytes(image.read_bytes()[:-1])
    (tmp_path / "cases" / "c.json").write_text("{}")
    problems = "\n".join(store.verify())
    assert "a.b2nd: case a: cannot be read" in problems
    assert "b.b2nd: case b:" in problems
    assert "c.json: not in the index" in problems
    assert len(problems.splitlines()) == 3


def test_damage_is_refused_at_the_first_read_by_default(tmp_path: Path) -> None:
    _store(tmp_path)
    path = tmp_path / "cases" / "b.b2nd"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 255
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"b\.b2nd: case b: its content changed"):
        CaseStore.open(tmp_path).read_patch("b", (0, 0, 0), (4, 4, 4))


def test_a_cut_file_is_refused_even_without_verification(tmp_path: Path) -> None:
    _store(tmp_path)
    path = tmp_path / "cases" / "b.b2nd"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"b\.b2nd"):
        CaseStore.open(tmp_path, verify="never").read_image("b")


def test_store_is_read_from_a_read_only_folder(tmp_path: Path) -> None:
    _store(tmp_path)
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file()}
    (tmp_path / "cases").chmod(0o555)
    store = CaseStore.open(tmp_path)
    store.read_patch("b", (0, 0, 0), (4, 4, 4))
    (tmp_path / "cases").chmod(0o755)
    assert before == {
        p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file()
    }


def test_unfinished_case_is_not_done_and_not_in_the_store(tmp_path: Path) -> None:
    writer = CaseStoreWriter(tmp_path)
    assert not writer.is_done("a")
    _write(writer, "a", (1, 4, 5, 6))
    assert writer.is_done("a")
    image = tmp_path / "cases" / "a.b2nd"
    raw = image.read_bytes()
    image.write_bytes(raw[:-5])
    assert not writer.is_done("a")
    image.write_bytes(raw)
    (tmp_path / "cases" / "a.json").write_text('{"schema": 1')
    assert not writer.is_done("a")
    (tmp_path / "cases" / ".partial-x-b.json").write_text("{}")
    with pytest.raises(DataError, match="case a is not complete"):
        writer.finish()
    writer.remove_leftovers()
    _write(writer, "a", (1, 4, 5, 6))
    _write(writer, "b", (1, 4, 5, 6))
    writer.finish(only=["b"])
    assert [record.case_id for record in CaseStore.open(tmp_path).cases] == ["b"]
    assert not list(tmp_path.rglob(".partial*"))


def test_failed_write_leaves_no_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CaseStoreWriter(tmp_path)

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("voxelbridge.core.data.case_store.write_array", full)
    with pytest.raises(DataError, match="No space left"):
        _write(writer, "a", (1, 4, 5, 6))
    assert not writer.is_done("a")
    assert list((tmp_path / "cases").iterdir()) == []


def test_folder_without_index_is_not_a_store(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a finished case store"):
        CaseStore.open(tmp_path)


def test_other_schema_is_refused(tmp_path: Path) -> None:
    _store(tmp_path)
    index = tmp_path / "index.jsonl"
    index.write_bytes(index.read_bytes().replace(b'"schema": 1', b'"schema": 2', 1))
    with pytest.raises(DataError, match="schema 2, this version reads 1"):
        CaseStore.open(tmp_path)


def test_unknown_case_and_missing_array_are_named(tmp_path: Path) -> None:
    store, _, _ = _store(tmp_path)
    with pytest.raises(DataError, match="no case 'zzz'"):
        store.record("zzz")
    with pytest.raises(DataError, match="case a has no instances"):
        store.read_instances("a")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": [[0, 0, 0, 1, 1, 0]], "labels": [0]}, "inverted"),
        ({"boxes": [[0, 0, 0, 1, 1, float("nan")]], "labels": [0]}, "inverted"),
        ({"boxes": [[0, 0, 0, 1, 1, 7]], "labels": [0]}, "outside"),
        ({"boxes": [[-1, 0, 0, 1, 1, 6]], "labels": [0]}, "outside"),
        ({"boxes": [[0, 0, 0, 1, 1, 1]], "labels": [-1]}, "negative"),
    ],
)
def test_wrong_boxes_name_the_case(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"case x.*{message}"):
        _write(CaseStoreWriter(tmp_path), "x", (1, 4, 5, 6), **changes)
    assert not (tmp_path / "cases").exists()


def test_nan_in_the_image_is_never_stored(tmp_path: Path) -> None:
    image = _image((1, 4, 5, 6))
    image[0, 1, 1, 1] = np.nan
    with pytest.raises(DataError, match="case x: 1 voxels are NaN"):
        CaseStoreWriter(tmp_path).write_case("x", image, grid=_grid((4, 5, 6)), boxes=[], labels=[])


@pytest.mark.parametrize(
    "case_id", ["", ".", "..", "a/b", ".hidden", "x.instances", "x.mask.body", "a\nb"]
)
def test_case_ids_that_are_no_file_names_are_refused(tmp_path: Path, case_id: str) -> None:
    with pytest.raises(DataError, match="rename it"):
        _write(CaseStoreWriter(tmp_path), case_id, (1, 2, 2, 2))


def test_case_ids_with_spaces_dots_and_umlauts_work(tmp_path: Path) -> None:
    writer = CaseStoreWriter(tmp_path)
    names = sorted(["Fall 1", "1.3.6.1.4", "größe", "a=b;c", "[x]*"])
    for name in names:
        _write(writer, name, (1, 2, 3, 4))
    writer.finish()
    store = CaseStore.open(tmp_path)
    assert [record.case_id for record in store.cases] == names
    assert all(store.read_image(name).shape == (1, 2, 3, 4) for name in names)


def test_file_that_holds_an_expression_is_never_opened(tmp_path: Path) -> None:
    operand: Any = blosc2.ones((4, 4), urlpath=str(tmp_path / "a.b2nd"), mode="w")
    path = tmp_path / "lazy.b2nd"
    (operand + 1).save(urlpath=str(path))
    with pytest.raises(DataError, match=r"lazy\.b2nd"):
        open_array(path, shape=(4, 4), dtype=np.float64)


def test_array_of_another_type_or_shape_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.b2nd"
    blosc2.ones((4, 4), urlpath=str(path), mode="w")
    with pytest.raises(DataError, match="the index says"):
        open_array(path, shape=(4, 4), dtype=np.float32)
    with pytest.raises(DataError, match="the index says"):
        open_array(path, shape=(4, 5), dtype=np.float64)


def _sum_of_patches(root: Path, seed: int, results: Any) -> None:
    store = CaseStore.open(root)
    rng = np.random.default_rng(seed)
    starts = rng.integers(-5, 20, size=(50, 3)).tolist()
    results.put(sum(float(store.read_patch("b", s, (16, 16, 16)).sum()) for s in starts))


def test_two_processes_read_one_store_at_once(tmp_path: Path) -> None:
    _store(tmp_path)  # this process has used blosc2 before the fork
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    readers = [
        context.Process(target=_sum_of_patches, args=(tmp_path, 0, results)) for _ in range(2)
    ]
    for reader in readers:
        reader.start()
    sums = {results.get(timeout=30) for _ in readers}
    for reader in readers:
        reader.join(timeout=30)
        assert reader.exitcode == 0
    assert len(sums) == 1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31))
def test_boxes_go_to_the_original_file_and_back(seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    shape = rng.integers(4, 40, size=3)
    original = Grid.from_parts(shape.tolist(), rng.uniform(0.5, 5, 3).tolist(), directions=matrix)
    size = np.array(StoredToOriginal.build(original).stored_shape)
    low = rng.integers(0, size - 1)
    high = rng.integers(low + 1, size + 1)
    mapping = StoredToOriginal.build(
        original, crop_box=[*low, *high], stored_shape=rng.integers(1, 50, 3).tolist()
    )
    first = rng.uniform(0, 0.5, size=(6, 3))
    boxes = np.concatenate([first, first + rng.uniform(0, 0.5, size=(6, 3))], axis=1)
    boxes *= np.tile(mapping.stored_shape, 2)
    in_file = mapping.boxes_to_original(boxes)
    np.testing.assert_allclose(mapping.boxes_to_stored(in_file), boxes, atol=1e-9)
    here = np.sort(box_corners_to_world(boxes, mapping.stored_grid), axis=1)
    there = np.sort(box_corners_to_world(in_file, original), axis=1)
    np.testing.assert_allclose(here, there, atol=1e-8)
    again = StoredToOriginal.from_json(json.loads(json.dumps(mapping.to_json())))
    assert np.array_equal(again.boxes_to_original(boxes), in_file)
    assert again.stored_grid.max_offset_mm(mapping.stored_grid) == 0


def test_boxes_on_an_unresampled_case_are_exact() -> None:
    original = Grid.from_parts((7, 8, 9), (1, 1, 1), directions=np.diag([-1.0, 1, -1]))
    mapping = StoredToOriginal.build(original, crop_box=[1, 2, 3, 6, 7, 8])
    boxes = np.array([[0, 0, 0, 1, 1, 1], [0.5, 1, 2, 3, 4, 5]])
    assert np.array_equal(mapping.boxes_to_stored(mapping.boxes_to_original(boxes)), boxes)


LOCATIONS = {1: np.array([[0, 1, 2], [3, 4, 5]]), 0: np.zeros((0, 3), dtype=np.int64)}
PROVENANCE = Provenance("p1", ("dicom:1.2.3", "kits:case_00000"), ("a" * 64, "b" * 64))


def _full_case(root: Path) -> tuple[CaseStore, np.ndarray]:
    mask = np.random.default_rng(2).integers(0, 3, size=(20, 21, 22))
    _write(
        CaseStoreWriter(root, patch_size=(16, 16, 16)),
        "a",
        (1, 20, 21, 22),
        provenance=PROVENANCE,
        locations=LOCATIONS,
        masks={"body": mask, "anon_mask": mask > 5},
    )
    CaseStoreWriter(root).finish()
    return CaseStore.open(root), mask


def test_provenance_locations_and_masks_come_back(tmp_path: Path) -> None:
    store, mask = _full_case(tmp_path)
    record = store.record("a")
    assert record.provenance == PROVENANCE
    assert record.mask_names == ("anon_mask", "body")
    locations = store.read_locations("a")
    assert list(locations) == [0, 1]
    for label, voxels in LOCATIONS.items():
        assert locations[label].dtype == np.int32
        assert np.array_equal(locations[label], voxels)
    patch = store.read_mask_patch("a", "body", (-2, 3, 5), (10, 4, 30))
    assert patch.dtype == np.uint8
    wide = np.pad((mask != 0).astype(np.uint8), 40)
    assert np.array_equal(patch, wide[38:48, 43:47, 45:75])
    assert not store.read_mask_patch("a", "anon_mask", (0, 0, 0), (20, 21, 22)).any()
    assert store.verify() == []


def test_case_without_provenance_locations_and_masks_has_none(tmp_path: Path) -> None:
    store, _, _ = _store(tmp_path)
    assert store.record("a").provenance == Provenance()
    assert store.record("a").mask_names == ()
    with pytest.raises(DataError, match="case a has no locations"):
        store.read_locations("a")
    with pytest.raises(DataError, match=r"case a has no mask\.body"):
        store.read_mask_patch("a", "body", (0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize("name", ["a.locations.safetensors", "a.mask.body.b2nd"])
def test_damaged_mask_or_locations_are_refused(tmp_path: Path, name: str) -> None:
    _full_case(tmp_path)
    path = tmp_path / "cases" / name
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    store = CaseStore.open(tmp_path)
    assert len(store.verify()) == 1
    read = store.read_locations
    if "mask" in name:
        read = partial(store.read_mask_patch, name="body", start=(0, 0, 0), size=(1, 1, 1))
    with pytest.raises(DataError, match=f"{name}: case a: its content changed"):
        read("a")
    path.unlink()
    assert not CaseStoreWriter(tmp_path).is_done("a")


@pytest.mark.parametrize("name", ["", "a.b", "../x", "a/b", "x" * 65, "ü"])
def test_mask_names_that_are_no_plain_words_are_refused(tmp_path: Path, name: str) -> None:
    mask = np.zeros((2, 2, 2), dtype=bool)
    with pytest.raises(DataError, match="case a: mask name"):
        _write(CaseStoreWriter(tmp_path), "a", (1, 2, 2, 2), masks={name: mask})


@pytest.mark.parametrize(
    "voxels", [np.array([[0, 0, 2]]), np.array([[-1, 0, 0]]), np.zeros((1, 3)), np.zeros(3, int)]
)
def test_locations_outside_or_of_another_form_are_a_programming_error(
    tmp_path: Path, voxels: np.ndarray
) -> None:
    with pytest.raises(ValueError, match="locations of 0"):
        _write(CaseStoreWriter(tmp_path), "a", (1, 2, 2, 2), locations={0: voxels})
