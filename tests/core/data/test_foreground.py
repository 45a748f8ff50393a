"""Boxes and objects found in arrays, against plain loops and the shared tables."""

import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelbridge.core.data import foreground
from voxelbridge.core.data.foreground import (
    boxes_from_instances,
    class_locations,
    foreground_samples,
    instances_from_semantic,
    nonzero_box,
)
from voxelbridge.core.data.image_io import read_image

LABEL_IDS = {
    "whole_tumour": (1, 2, 3, 4),
    "enhancing": (4,),
    "kidney_tumour": (2,),
    "lesion": (1,),
}


def test_nonzero_box_is_the_union_over_channels() -> None:
    image = np.zeros((2, 5, 6, 7))
    image[0, 1, 2, 3] = -4
    image[1, 3, 2, 1] = np.nan
    assert nonzero_box(image).tolist() == [1, 2, 1, 4, 3, 4]


def test_nonzero_box_of_zeros_is_the_whole_volume() -> None:
    assert nonzero_box(np.zeros((1, 5, 6, 7), dtype=np.int16)).tolist() == [0, 0, 0, 5, 6, 7]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 3))
def test_nonzero_box_equals_the_extent_of_all_nonzero_voxels(seed: int, channels: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (channels, *rng.integers(1, 9, size=3))
    image = rng.integers(-2, 3, size=shape) * (rng.random(shape) < 0.05)
    where = np.argwhere(image.any(axis=0))
    whole = [0, 0, 0, *shape[1:]]
    expected = [*where.min(axis=0), *(where.max(axis=0) + 1)] if len(where) else whole
    assert nonzero_box(image).tolist() == expected


def test_filling_holes_would_not_change_the_box() -> None:
    image = np.zeros((1, 7, 8, 9), dtype=np.int16)
    image[0, 1:6, 2:7, 3:8] = 5
    box = nonzero_box(image).tolist()
    image[0, 2:5, 3:6, 4:7] = 0
    assert nonzero_box(image).tolist() == box == [1, 2, 3, 6, 7, 8]


def test_locations_are_all_voxels_of_small_labels() -> None:
    labels = np.zeros((4, 5, 6), dtype=np.uint8)
    labels[0, 0, 0], labels[3, 4, 5], labels[1, 2, 3] = 2, 2, 7
    found = class_locations(labels, [7, 2, 9])
    assert list(found) == [2, 7, 9]
    assert found[2].tolist() == [[0, 0, 0], [3, 4, 5]]
    assert found[7].tolist() == [[1, 2, 3]]
    assert found[9].shape == (0, 3)
    assert all(where.dtype == np.int32 for where in found.values())
    assert class_locations(labels, []) == {}


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([np.uint8, np.int16, np.int32, np.int64]),
    st.sampled_from([1, 30_000]),
)
def test_locations_lie_in_their_label_without_repeats(seed: int, dtype: type, factor: int) -> None:
    rng = np.random.default_rng(seed)
    if dtype is not np.int64 and dtype is not np.int32:
        factor = 1
    labels = (rng.integers(-1 if dtype != np.uint8 else 0, 6, size=(9, 10, 11)) * factor).astype(
        dtype
    )
    ids = [factor * n for n in (1, 3, 5)]
    found = class_locations(labels, ids, at_least=20, fraction=0.25)
    for label in ids:
        total = int((labels == label).sum())
        where = found[label]
        assert len(where) == max(min(20, total), -(-total // 4))
        assert (labels[tuple(where.T)] == label).all()
        flat = np.ravel_multi_index(tuple(where.T), labels.shape)
        assert (np.diff(flat) > 0).all()


def test_locations_of_a_label_depend_on_nothing_but_map_and_seed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    labels = np.random.default_rng(0).integers(0, 4, size=(8, 9, 10)).astype(np.uint8)
    first = class_locations(labels, [1, 2, 3], at_least=15)
    alone = class_locations(labels, [2], at_least=15)
    other = class_locations(labels, [2], at_least=15, seed=7)
    view = class_locations(labels.astype(np.int32)[::-1][::-1], [2], at_least=15)
    monkeypatch.setattr(foreground, "SLAB_VOXELS", 37)
    slabs = class_locations(labels, [2], at_least=15)
    for same in (alone, view, slabs):
        assert np.array_equal(first[2], same[2])
    assert not np.array_equal(first[2], other[2])


def test_locations_cover_their_label_evenly() -> None:
    labels = np.ones((10, 10, 10), dtype=np.uint8)
    counts = np.zeros((10, 10, 10))
    for seed in range(200):
        counts[tuple(class_locations(labels, [1], at_least=100, seed=seed)[1].T)] += 1
    by_slice = counts.sum(axis=(1, 2))  # 2000 expected; standard deviation about 40
    assert counts.sum() == 20_000
    assert (np.abs(by_slice - 2000) < 250).all()


def test_background_has_no_locations() -> None:
    with pytest.raises(ValueError, match="above 0"):
        class_locations(np.zeros((2, 2, 2), dtype=np.uint8), [0, 1])


def test_objects_that_touch_at_a_corner_are_one() -> None:
    labels = np.zeros((4, 4, 4), dtype=np.uint8)
    labels[0, 0, 0], labels[1, 1, 1], labels[3, 3, 3] = 2, 3, 2
    instances, specks = instances_from_semantic(labels, (2, 3), min_voxels=1)
    assert instances[0, 0, 0] == instances[1, 1, 1] == 1
    assert instances[3, 3, 3] == 2
    assert specks == 0


def test_small_components_are_left_out_and_counted() -> None:
    labels = np.zeros((3, 10, 10), dtype=np.uint8)
    labels[0, 0, :3], labels[2, 5:8, 2:9] = 1, 1
    instances, specks = instances_from_semantic(labels, [1], min_voxels=10)
    assert specks == 1
    assert np.array_equal(instances > 0, np.pad(labels[2:, 5:8, 2:9], ((2, 0), (5, 2), (2, 1))) > 0)
    assert instances.max() == 1


def test_no_objects_give_an_empty_map_and_no_boxes() -> None:
    instances, specks = instances_from_semantic(np.zeros((2, 3, 4)), [1])
    assert instances.shape == (2, 3, 4)
    assert not instances.any()
    assert specks == 0
    ids, boxes = boxes_from_instances(instances)
    assert ids.shape == (0,)
    assert boxes.shape == (0, 6)


def test_one_voxel_object_at_the_border_has_size_one() -> None:
    instances = np.zeros((3, 4, 5), dtype=np.uint8)
    instances[2, 3, 4] = 7
    ids, boxes = boxes_from_instances(instances)
    assert ids.tolist() == [7]
    assert boxes.tolist() == [[2, 3, 4, 3, 4, 5]]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1, 5, 10**6]))
def test_boxes_equal_a_plain_loop(seed: int, factor: int) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 9, size=3))
    instances = rng.integers(-1, 5, size=shape) * factor * (rng.random(shape) < 0.3)
    ids, boxes = boxes_from_instances(instances)
    expected = sorted(set(instances[instances > 0].tolist()))
    assert ids.tolist() == expected
    for number, box in zip(expected, boxes, strict=True):
        where = np.argwhere(instances == number)
        assert box.tolist() == [*where.min(axis=0), *(where.max(axis=0) + 1)]


def test_samples_come_from_the_mask() -> None:
    image = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    rng = np.random.default_rng(0)
    samples = foreground_samples(image, image > 20, count=100, rng=rng)
    assert set(samples.tolist()) == {21.0, 22.0, 23.0}
    assert foreground_samples(image, image > 99, count=5, rng=rng).shape == (0,)


@pytest.mark.slow
def test_instances_table_of_real_labels_is_reproduced(shared: Path) -> None:
    with (shared / "data" / "instances.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    cases = sorted({(row["file"], row["target"].partition("_id_")[0]) for row in rows})
    assert len(cases) > 15
    for file, target in cases:
        labels = read_image(shared / "data" / file).array[0]
        expected = sorted(
            (
                tuple(int(row[f"{a}_{end}"]) for end in ("min", "max") for a in "zyx"),
                int(row["voxels"]),
            )
            for row in rows
            if row["file"] == file and row["target"].partition("_id_")[0] == target
        )
        if target in LABEL_IDS:
            instances, _ = instances_from_semantic(labels, LABEL_IDS[target])
        else:  # vertebrae: one instance per label id
            instances = labels.astype(np.int32)
        ids, boxes = boxes_from_instances(instances)
        counts = np.bincount(instances.ravel())[ids]
        found = sorted(
            (tuple(int(edge) for edge in box), int(count))
            for box, count in zip(boxes, counts, strict=True)
        )
        assert found == expected, (file, target)
