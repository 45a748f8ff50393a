"""Detection patches: boxes follow the voxels through cropping and mirroring."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelbridge.core.data.case_store import CaseStore
from voxelbridge.core.data.foreground import boxes_from_instances
from voxelbridge.detect.batches import (
    PatchSampler,
    Sample,
    case_objects,
    crop_boxes,
    flip_sample,
    read_sample,
)
from voxelbridge.detect.prepare import prepare


@pytest.fixture
def store(raw_dataset: Path, tmp_path: Path) -> CaseStore:
    prepare(raw_dataset, tmp_path / "store", workers=0)
    return CaseStore.open(tmp_path / "store")


def _sampler(store: CaseStore, *, mirror: bool, fraction: float) -> PatchSampler:
    cases = case_objects(store, [record.case_id for record in store.cases])
    return PatchSampler(store, cases, (16, 16, 16), 4, fraction, mirror)


@pytest.mark.parametrize("mirror", [False, True])
def test_boxes_fit_the_voxels_of_their_patch(store: CaseStore, mirror: bool) -> None:
    """The bright object is 300 HU and the dark one -200 HU: boxes must lie on them."""
    sampler = _sampler(store, mirror=mirror, fraction=1.0)
    seen = 0
    for step in range(12):
        batch = sampler(step, np.random.default_rng(step))
        assert batch.image.shape == (4, 1, 16, 16, 16)
        assert batch.foreground is not None
        for image, target, mask in zip(batch.image, batch.targets, batch.foreground, strict=True):
            assert len(target) > 0  # every patch of this batch lies on an object
            for box, label in zip(target.boxes.tolist(), target.labels.tolist(), strict=True):
                z0, y0, x0, z1, y1, x1 = (round(edge) for edge in box)
                inside = image[0, z0:z1, y0:y1, x0:x1]
                bright = inside.mean() > image[0].mean()
                assert bright == (label == 0)
                assert mask[z0:z1, y0:y1, x0:x1].all()
                seen += 1
    assert seen > 40


def test_half_of_a_batch_lies_on_objects(store: CaseStore) -> None:
    sampler = _sampler(store, mirror=False, fraction=0.5)
    for step in range(10):
        batch = sampler(step, np.random.default_rng(step))
        assert all(len(target) > 0 for target in batch.targets[2:])


def test_cases_without_objects_are_sampled(store: CaseStore) -> None:
    cases = case_objects(store, ["case2"])
    sampler = PatchSampler(store, cases, (16, 16, 16), 2, 1.0, False)
    batch = sampler(0, np.random.default_rng(0))
    assert [len(target) for target in batch.targets] == [0, 0]


def test_a_patch_larger_than_the_volume_is_padded(store: CaseStore) -> None:
    cases = case_objects(store, ["case0"])
    sample = read_sample(store, "case0", cases["case0"], (-2, -4, -6), (32, 32, 32))
    assert sample.image.shape == (1, 32, 32, 32)
    assert sample.foreground is not None
    assert len(sample.boxes) == 2
    _, boxes = boxes_from_instances(store.read_instances("case0"))
    np.testing.assert_allclose(sample.boxes, boxes + np.tile([2, 4, 6], 2))
    assert (sample.image[0, :2] == 0).all()


boxes_strategy = st.lists(
    st.tuples(*[st.integers(0, 12)] * 3, *[st.integers(1, 8)] * 3), min_size=0, max_size=5
)


@settings(deadline=None, max_examples=60)
@given(boxes_strategy, st.sets(st.integers(0, 2)))
def test_flipping_twice_is_the_identity_on_image_and_boxes(
    parts: list[tuple[int, ...]], axes: set[int]
) -> None:
    starts = np.array([part[:3] for part in parts], dtype=np.float32).reshape(-1, 3)
    sizes = np.array([part[3:] for part in parts], dtype=np.float32).reshape(-1, 3)
    boxes = np.concatenate([starts, starts + sizes], axis=1)
    rng = np.random.default_rng(1)
    image = rng.normal(size=(1, 20, 21, 22)).astype(np.float32)
    sample = Sample(image, boxes, np.zeros(len(boxes), np.int64), image[0] > 0)
    once = flip_sample(sample, axes=sorted(axes))
    for before, after in zip(sample.boxes, once.boxes, strict=True):
        z0, y0, x0, z1, y1, x1 = (int(edge) for edge in before)
        a0, b0, c0, a1, b1, c1 = (int(edge) for edge in after)
        voxels = sample.image[0, z0:z1, y0:y1, x0:x1]
        moved = once.image[0, a0:a1, b0:b1, c0:c1]
        np.testing.assert_array_equal(np.flip(voxels, axis=tuple(axes)), moved)
    twice = flip_sample(once, axes=sorted(axes))
    np.testing.assert_array_equal(twice.image, sample.image)
    np.testing.assert_array_equal(twice.boxes, sample.boxes)
    assert twice.foreground is not None
    np.testing.assert_array_equal(twice.foreground, image[0] > 0)


def test_slivers_are_left_out_but_small_objects_stay() -> None:
    boxes = np.array(
        [[0, 0, 0, 10.5, 4, 4], [10, 0, 0, 12, 4, 4], [11, 1, 1, 11.5, 2, 2]], dtype=np.float32
    )
    visible, rows = crop_boxes(boxes, (10, 0, 0), (8, 8, 8))
    # The first shows half a voxel of its ten; the third is half a voxel thick altogether.
    assert rows.tolist() == [1, 2]
    np.testing.assert_allclose(visible, [[0, 0, 0, 2, 4, 4], [1, 1, 1, 1.5, 2, 2]])
    none, rows = crop_boxes(np.zeros((0, 6), np.float32), (0, 0, 0), (8, 8, 8))
    assert none.shape == (0, 6)
    assert rows.shape == (0,)
