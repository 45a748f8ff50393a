"""Detection patches: boxes follow the voxels through cropping, mirroring, turning and scaling."""

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelbridge.core.data.augment import SpatialAugmentation, SpatialParams, rotation_matrix
from voxelbridge.core.data.augment_intensity import IntensityAugmentation, IntensityParams
from voxelbridge.core.data.batches import step_batches
from voxelbridge.core.data.case_index import CaseRecord
from voxelbridge.core.data.case_store import CaseStore, CaseStoreWriter
from voxelbridge.core.data.foreground import boxes_from_instances
from voxelbridge.core.data.image_io import read_image, write_image
from voxelbridge.core.data.volume import Grid, Volume
from voxelbridge.core.train.distributed import World
from voxelbridge.detect import train
from voxelbridge.detect.batches import DetectionBatch, PatchSampler, case_objects, on_device
from voxelbridge.detect.build import load_detect_config
from voxelbridge.detect.patch_objects import crop_boxes
from voxelbridge.detect.patch_sources import BoxMasks, read_sample
from voxelbridge.detect.prepare import prepare

NONE = SpatialAugmentation.none()
MIRROR = SpatialAugmentation.mirroring()
ALWAYS = SpatialAugmentation(rotation_probability=1.0, scale_probability=1.0)
SCALE = SpatialAugmentation(rotation_probability=0.0, scale_probability=1.0)
PATCH = (16, 16, 16)


@pytest.fixture
def store(raw_dataset: Path, tmp_path: Path) -> CaseStore:
    prepare(raw_dataset, tmp_path / "store", workers=0)
    return CaseStore.open(tmp_path / "store")


def _sampler(
    store: CaseStore,
    augmentation: SpatialAugmentation,
    *,
    fraction: float = 1.0,
    box_masks: BoxMasks = "none",
) -> PatchSampler:
    cases = case_objects(store, [record.case_id for record in store.cases])
    return PatchSampler(store, cases, PATCH, 4, fraction, augmentation, box_masks)


@pytest.mark.parametrize("augmentation", [NONE, MIRROR, SCALE, ALWAYS])
def test_boxes_fit_the_voxels_of_their_patch(
    store: CaseStore, augmentation: SpatialAugmentation
) -> None:
    """The bright object is 300 HU and the dark one -200 HU: boxes must lie on them."""
    sampler = _sampler(store, augmentation)
    seen = 0
    for step in range(12):
        batch = sampler(step, np.random.default_rng(step))
        assert batch.image.shape == (4, 1, *PATCH)
        assert batch.foreground is not None
        for image, target, mask in zip(batch.image, batch.targets, batch.foreground, strict=True):
            assert len(target) > 0  # every patch of this batch lies on an object
            for box, label in zip(target.boxes.tolist(), target.labels.tolist(), strict=True):
                z0, y0, x0, z1, y1, x1 = (round(edge) for edge in box)
                own = mask[z0:z1, y0:y1, x0:x1]
                bright = image[0, z0:z1, y0:y1, x0:x1][own].mean() > image[0].mean()
                assert bright == (label == 0)
                if augmentation.rotation_probability == 0:
                    assert own.float().mean() > (0.5 if augmentation is SCALE else 0.99)
                seen += 1
    assert seen > 40


def test_half_of_a_batch_lies_on_objects(store: CaseStore) -> None:
    sampler = _sampler(store, NONE, fraction=0.5)
    for step in range(10):
        batch = sampler(step, np.random.default_rng(step))
        assert all(len(target) > 0 for target in batch.targets[2:])


def test_cases_without_objects_are_sampled(store: CaseStore) -> None:
    cases = case_objects(store, ["case2"])
    sampler = PatchSampler(store, cases, PATCH, 2, 1.0, ALWAYS)
    batch = sampler(0, np.random.default_rng(0))
    assert [len(target) for target in batch.targets] == [0, 0]


def test_a_patch_larger_than_the_volume_is_padded(store: CaseStore) -> None:
    cases = case_objects(store, ["case0"])
    params = SpatialParams.build((32, 32, 32))
    sample = read_sample(store, "case0", cases["case0"], (-2, -4, -6), params)
    assert sample.image.shape == (1, 32, 32, 32)
    assert sample.foreground is not None
    assert len(sample.boxes) == 2
    _, boxes = boxes_from_instances(store.read_instances("case0"))
    np.testing.assert_allclose(sample.boxes, boxes + np.tile([2, 4, 6], 2))
    assert (sample.image[0, :2] == 0).all()


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


def _store_of(
    root: Path, instances: np.ndarray, boxes: np.ndarray, *, with_map: bool = True
) -> CaseStore:
    writer = CaseStoreWriter(root, patch_size=PATCH)
    writer.write_case(
        "a",
        (instances > 0).astype(np.float32)[None],
        grid=Grid.from_parts(instances.shape, (1.0, 1.0, 1.0)),
        boxes=boxes,
        labels=np.arange(len(boxes)),
        instances=instances if with_map else None,
    )
    writer.finish()
    return CaseStore.open(root)


def _balls(*balls: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Instance map and boxes of balls (z, y, x, radius)."""
    instances = np.zeros((40, 42, 44), dtype=np.int32)
    axes = np.ogrid[:40, :42, :44]
    for number, (*middle, radius) in enumerate(balls, start=1):
        distance = sum((a + 0.5 - m) ** 2 for a, m in zip(axes, middle, strict=True))
        instances[distance <= radius**2] = number
    return instances, boxes_from_instances(instances)[1]


def test_rotated_boxes_are_tight_around_the_voxels(tmp_path: Path) -> None:
    store = _store_of(tmp_path, *_balls((18, 18, 18, 4), (24, 26, 22, 3)))
    case = case_objects(store, ["a"])["a"]
    for seed in range(20):
        params = ALWAYS.sample(np.random.default_rng(seed), PATCH)
        first, size = params.source_box((12, 13, 12))
        instances = params.apply_labels(store.read_instances_patch("a", first, size))
        ids, tight = boxes_from_instances(instances)
        sample = read_sample(store, "a", case, (12, 13, 12), params)
        np.testing.assert_array_equal(sample.labels, ids - 1)
        np.testing.assert_array_equal(sample.boxes, tight)
        assert sample.foreground is not None
        np.testing.assert_array_equal(sample.foreground, instances > 0)


def test_a_cut_object_is_boxed_by_what_is_left_of_it(tmp_path: Path) -> None:
    store = _store_of(tmp_path, *_balls((10, 20, 20, 6), (30, 8, 8, 6)))
    case = case_objects(store, ["a"])["a"]
    sample = read_sample(store, "a", case, (14, 12, 12), SpatialParams.build(PATCH))
    z0, y0, x0, z1, y1, x1 = sample.boxes[0].tolist()
    assert (z0, z1) == (0, 2)
    assert max(y1 - y0, x1 - x0) < 12  # the cap is narrower than the ball
    # The corner of the second ball's box reaches into this patch, the ball does not.
    corner = read_sample(store, "a", case, (34, 12, 12), SpatialParams.build(PATCH))
    visible, _ = crop_boxes(case.boxes, (34, 12, 12), PATCH)
    assert len(visible) == 1
    assert len(corner.boxes) == 0
    assert corner.foreground is not None
    assert not corner.foreground.any()


@pytest.mark.parametrize("augmentation", [MIRROR, SCALE, ALWAYS])
def test_boxes_alone_follow_the_objects_within_a_voxel(
    tmp_path: Path, augmentation: SpatialAugmentation
) -> None:
    """A ball is its own inscribed ellipsoid: with and without its map the boxes must agree."""
    instances, boxes = _balls((20, 20, 20, 5))
    mapped = _store_of(tmp_path / "map", instances, boxes)
    bare = _store_of(tmp_path / "bare", instances, boxes, with_map=False)
    for seed in range(12):
        params = augmentation.sample(np.random.default_rng(seed), PATCH)
        samples = [
            read_sample(
                store,
                "a",
                case_objects(store, ["a"])["a"],
                (12, 12, 12),
                params,
                box_masks="ellipsoid",
            )
            for store in (mapped, bare)
        ]
        np.testing.assert_allclose(samples[0].boxes, samples[1].boxes, atol=1.01)
        true, drawn = (sample.foreground for sample in samples)
        assert true is not None
        assert drawn is not None
        assert 2 * (true & drawn).sum() / (true.sum() + drawn.sum()) > 0.8


def test_box_masks_decide_the_foreground_of_cases_without_a_map(tmp_path: Path) -> None:
    store = _store_of(tmp_path, *_balls((20, 20, 20, 5)), with_map=False)
    without = _sampler(store, ALWAYS)(0, np.random.default_rng(0))
    assert without.foreground is None
    drawn = _sampler(store, ALWAYS, box_masks="ellipsoid")(0, np.random.default_rng(0))
    assert drawn.foreground is not None
    for target, mask in zip(drawn.targets, drawn.foreground, strict=True):
        z0, y0, x0, z1, y1, x1 = target.boxes[0].round().int().tolist()
        assert mask[z0:z1, y0:y1, x0:x1].float().mean() > 0.35  # pi / 6 of a whole one
        assert mask.sum() > 20


@pytest.mark.parametrize("augmentation", [SCALE, ALWAYS])
def test_patches_on_objects_show_them_whole_where_they_fit(
    tmp_path: Path, augmentation: SpatialAugmentation
) -> None:
    instances, boxes = _balls((20, 21, 22, 3))
    sampler = _sampler(_store_of(tmp_path, instances, boxes), augmentation)
    whole = 4 / 3 * np.pi * 3**3
    for step in range(10):
        batch = sampler(step, np.random.default_rng(step))
        assert batch.foreground is not None
        for target, mask in zip(batch.targets, batch.foreground, strict=True):
            assert len(target) == 1
            assert mask.sum() > 0.7 * whole / 1.4**3


def test_augmented_batches_are_a_function_of_seed_rank_and_step(tmp_path: Path) -> None:
    store = _store_of(tmp_path, *_balls((18, 18, 18, 4), (28, 30, 26, 3)))
    sampler = _sampler(store, SpatialAugmentation(rotation_probability=0.5), fraction=0.5)

    def images(*, workers: int, rank: int = 0, first: int = 0) -> list[torch.Tensor]:
        batches = step_batches(
            sampler, seed=1, first_step=first, steps=8, workers=workers, rank=rank
        )
        return [batch.image.clone() for batch in batches]

    here = images(workers=0)
    for workers in (1, 2):
        there = images(workers=workers)
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
    tail = images(workers=2, first=5)
    assert all(torch.equal(a, b) for a, b in zip(here[5:], tail, strict=True))
    every = [*here, *images(workers=2, rank=1)]
    assert len({image.numpy().tobytes() for image in every}) == len(every)  # no stream repeats


def test_a_patch_boxes_the_objects_whose_voxels_it_shows_and_no_others(tmp_path: Path) -> None:
    """Scaled, less than a voxel's width of an object may show as a whole layer of voxels."""
    instances = np.zeros((40, 40, 40), np.int32)
    instances[12:22, 10:20, 10:20] = 1
    store = _store_of(tmp_path, instances, boxes_from_instances(instances)[1])
    case = case_objects(store, ["a"])["a"]
    params = SpatialParams.build(PATCH, np.diag([1.4, 1.4, 1.4]))
    thickness = set()
    for first in range(-10, 30):
        sample = read_sample(store, "a", case, (first, 8, 8), params)
        assert sample.foreground is not None
        layers = int(sample.foreground.any(axis=(1, 2)).sum())
        assert bool(layers) == bool(len(sample.boxes))
        thickness.add(layers)
    assert {0, 1, 2} <= thickness


def _mixed_store(root: Path) -> CaseStore:
    """Cases with a map, with boxes alone, and without objects; images of noise."""
    writer = CaseStoreWriter(root, patch_size=PATCH)
    instances, boxes = _balls((18, 18, 18, 4), (24, 26, 22, 3), (5, 30, 30, 6))
    rng = np.random.default_rng(0)
    for name, own, with_map in (("map", boxes, True), ("bare", boxes, False), ("empty", [], True)):
        writer.write_case(
            name,
            rng.normal(size=(2, *instances.shape)).astype(np.float32),
            grid=Grid.from_parts(instances.shape, (1.0, 1.0, 1.0)),
            boxes=own,
            labels=np.arange(len(own)),
            instances=(instances * (len(own) > 0)) if with_map else None,
        )
    writer.finish()
    return CaseStore.open(root)


def _same(first: DetectionBatch, second: DetectionBatch, *, image: float) -> None:
    np.testing.assert_allclose(first.image, second.image, rtol=0, atol=image)
    for one, other in zip(first.targets, second.targets, strict=True):
        assert torch.equal(one.boxes, other.boxes)
        assert torch.equal(one.labels, other.labels)
    assert (first.foreground is None) == (second.foreground is None)
    if first.foreground is not None and second.foreground is not None:
        assert torch.equal(first.foreground, second.foreground)


@pytest.mark.parametrize("augmentation", [NONE, SCALE, SpatialAugmentation(), ALWAYS])
@pytest.mark.parametrize("names", [("map", "bare", "empty"), ("map", "empty"), ("empty",)])
def test_batches_made_on_the_device_are_those_of_the_loader(
    tmp_path: Path, augmentation: SpatialAugmentation, names: tuple[str, ...]
) -> None:
    """Boxes and foreground in every bit, images up to the rounding of coordinates."""
    store = _mixed_store(tmp_path)
    cases = case_objects(store, names)
    here = PatchSampler(store, cases, PATCH, 4, 0.5, augmentation, "ellipsoid")
    there = replace(here, defer=True)
    for step in range(4):
        loaded = there.load(step, np.random.default_rng(step))
        made = next(on_device([loaded], torch.device("cpu")))
        _same(made, here(step, np.random.default_rng(step)), image=1e-4)


def test_intensities_change_on_the_device_and_nothing_else_does(tmp_path: Path) -> None:
    sampler = PatchSampler(
        store := _mixed_store(tmp_path), case_objects(store, ["map"]), PATCH, 4, 0.5,
        intensity=IntensityAugmentation.nndetection(), augmentation=MIRROR,
    )  # fmt: skip
    plain = sampler(3, np.random.default_rng(3))
    loaded = sampler.load(3, np.random.default_rng(3))
    assert loaded.intensity is not None
    assert loaded.intensity.shape == (4, 2, 12)
    made = loaded.finish(torch.device("cpu"))
    assert not torch.equal(made.image, plain.image)
    params = IntensityParams.from_array(loaded.intensity.numpy())
    assert torch.equal(made.image, params.apply(plain.image))
    _same(replace(made, image=plain.image), plain, image=0)
    # what validation calls never changes intensities, nor does a preset that names none
    off = replace(sampler, intensity=IntensityAugmentation.none())
    _same(off(3, np.random.default_rng(3)), plain, image=0)
    _same(off.load(3, np.random.default_rng(3)).finish(torch.device("cpu")), plain, image=0)


def test_training_takes_the_intensities_of_the_preset_and_defers_on_a_gpu(tmp_path: Path) -> None:
    store = _mixed_store(tmp_path)
    for name, device in (("retunet", "cpu"), ("retunet", "cuda"), ("retunet_small", "cpu")):
        config = load_detect_config(name)
        sampler = train._sampler(store, ["map"], config, World(torch.device(device)))
        assert sampler.intensity == config.intensity
        assert sampler.augmentation == config.augmentation
        assert sampler.defer == (device == "cuda")


@pytest.mark.parametrize("defer", [False, True])
def test_changed_batches_do_not_depend_on_the_number_of_workers(
    tmp_path: Path, defer: bool
) -> None:
    store = _mixed_store(tmp_path)
    sampler = PatchSampler(
        store, case_objects(store, ["map", "empty"]), PATCH, 3, 0.5, SpatialAugmentation(),
        intensity=IntensityAugmentation.nndetection(), defer=defer,
    )  # fmt: skip

    def batches(workers: int) -> list[DetectionBatch]:
        loaded = step_batches(sampler.load, seed=1, first_step=0, steps=5, workers=workers)
        return list(on_device(loaded, torch.device("cpu")))

    here = batches(0)
    for workers in (1, 2):
        for one, other in zip(here, batches(workers), strict=True):
            _same(one, other, image=0)


@settings(deadline=None, max_examples=25)
@given(
    quarters=st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)),
    mirrored=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    scale=st.sampled_from([1.0, 1.0, 0.5, 2.0, 1.3]),
    start=st.tuples(st.integers(-8, 30), st.integers(-8, 32), st.integers(-8, 34)),
)
def test_image_objects_and_boxes_stay_together(
    shared_store: CaseStore,
    quarters: tuple[int, int, int],
    mirrored: tuple[bool, bool, bool],
    scale: float,
    start: tuple[int, int, int],
) -> None:
    """The image shows row n's object as n + 1, here and where the patch cuts it or misses it."""
    matrix = np.rint(rotation_matrix([90.0 * turn for turn in quarters])) * scale
    params = SpatialParams.build(PATCH, matrix, mirrored=mirrored)
    case = case_objects(shared_store, ["a"])["a"]
    sample = read_sample(shared_store, "a", case, start, params)
    if scale == 1.0:  # voxels lie on voxels: what numpy's own turning and mirroring gives
        window = shared_store.read_patch("a", start, PATCH, pad_value=0.0)[0]
        offsets = np.stack(np.meshgrid(*[np.arange(16) - 7.5] * 3, indexing="ij"), axis=-1)
        z, y, x = np.moveaxis(np.rint(offsets @ params.matrix.T + 7.5).astype(int), -1, 0)
        np.testing.assert_allclose(sample.image[0], window[z, y, x], atol=1e-5)
        ids, boxes = boxes_from_instances(np.rint(sample.image[0]).astype(int))
        np.testing.assert_array_equal(sample.labels, ids - 1)
        np.testing.assert_allclose(sample.boxes, boxes, atol=1e-4)
        np.testing.assert_array_equal(sample.foreground, np.rint(sample.image[0]) > 0)
    assert sample.foreground is not None
    assert set(sample.labels) <= {0, 1, 2}
    covered = np.zeros(PATCH, dtype=bool)
    for z0, y0, x0, z1, y1, x1 in sample.boxes:
        low = [int(np.floor(edge - 0.5)) for edge in (z0, y0, x0)]
        high = [int(np.ceil(edge + 0.5)) for edge in (z1, y1, x1)]
        covered[tuple(slice(max(a, 0), b) for a, b in zip(low, high, strict=True))] = True
    assert not (sample.foreground & ~covered).any()  # no object without a box


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> CaseStore:
    """One case whose image is its instance map."""
    instances, boxes = _balls((18, 18, 18, 4), (24, 30, 22, 3), (8, 8, 30, 6))
    writer = CaseStoreWriter(tmp_path_factory.mktemp("map"), patch_size=PATCH)
    writer.write_case(
        "a", instances.astype(np.float32)[None],
        grid=Grid.from_parts(instances.shape, (1.0, 1.0, 1.0)), boxes=boxes,
        labels=np.arange(len(boxes)), instances=instances,
    )  # fmt: skip
    writer.finish()
    return CaseStore.open(writer.root)


@pytest.mark.parametrize("numbers", [(3, 900), (7, 3_000_000)])
def test_prepared_maps_number_the_object_of_row_n_as_n_plus_1(
    raw_dataset: Path, tmp_path: Path, numbers: tuple[int, int]
) -> None:
    path = raw_dataset / "labelsTr" / "case0.nii.gz"
    volume = read_image(path)
    renamed = np.choose(volume.array.astype(np.int64), [0, *numbers]).astype(np.int32)
    write_image(path, Volume(renamed, volume.grid))
    classes = {str(number): row for row, number in enumerate(numbers)}
    path.with_name("case0.json").write_text(json.dumps({"instances": classes}))
    prepare(raw_dataset, tmp_path / "store", workers=0, only=["case0"])
    store = CaseStore.open(tmp_path / "store")
    ids, boxes = boxes_from_instances(store.read_instances("case0"))
    assert ids.tolist() == [1, 2]
    np.testing.assert_allclose(boxes, store.record("case0").boxes, atol=1.0)


def test_a_hundred_thousand_cases_start_within_seconds(tmp_path: Path) -> None:
    small = _store_of(tmp_path, *_balls((20, 20, 20, 5)))
    known = small.cases[0]
    cases = [
        CaseRecord(
            "a" if number == 0 else f"case{number}",
            known.shape,
            known.spacing_mm,
            known.boxes,
            known.labels,
            known.files,
        )
        for number in range(100_000)
    ]
    store = CaseStore(tmp_path, cases, digest="", verify=False)
    started = time.monotonic()
    table = case_objects(store, [record.case_id for record in cases])
    assert time.monotonic() - started < 2.5
    sampler = PatchSampler(store, table, PATCH, 2, 1.0, ALWAYS)

    def make(step: int, rng: np.random.Generator) -> int:
        sampler._objects_up_to  # noqa: B018 - what a worker computes before its first patch
        return step

    assert list(step_batches(make, seed=0, first_step=0, steps=4, workers=2)) == [0, 1, 2, 3]
    assert time.monotonic() - started < 5
