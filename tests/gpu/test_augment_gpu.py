"""Augmentation on the GPU gives the batches that the loader and the CPU give."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from voxelbridge.core.data.augment import SpatialAugmentation
from voxelbridge.core.data.augment_device import apply_image_on, apply_labels_on, label_extents
from voxelbridge.core.data.augment_intensity import IntensityAugmentation
from voxelbridge.core.data.case_store import CaseStore, CaseStoreWriter
from voxelbridge.core.data.foreground import boxes_from_instances
from voxelbridge.core.data.volume import Grid
from voxelbridge.detect.batches import PatchSampler, case_objects

pytestmark = pytest.mark.gpu
ALWAYS = SpatialAugmentation(rotation_probability=1.0, scale_probability=1.0)
PATCH = (48, 56, 64)


def test_labels_on_the_gpu_are_the_loaders_in_every_voxel() -> None:
    rng = np.random.default_rng(0)
    for seed in range(6):
        augmentation = ALWAYS if seed % 2 else SpatialAugmentation(rotation_probability=0.0)
        params = augmentation.sample(np.random.default_rng(seed), PATCH)
        _, size = params.source_box((0, 0, 0))
        source = rng.integers(0, 9, size).astype(np.int32)
        found = apply_labels_on(torch.from_numpy(source).cuda(), params)
        np.testing.assert_array_equal(found.cpu().numpy(), params.apply_labels(source))
        ids, boxes = boxes_from_instances(found.cpu().numpy())
        extents = label_extents(found, count=8).cpu().numpy()
        np.testing.assert_array_equal(extents[ids - 1], boxes)


def test_images_on_the_gpu_are_the_loaders_up_to_rounding() -> None:
    params = ALWAYS.sample(np.random.default_rng(1), PATCH)
    _, size = params.source_box((0, 0, 0))
    source = np.random.default_rng(2).normal(size=(2, *size)).astype(np.float32)
    found = apply_image_on(torch.from_numpy(source).cuda(), params).cpu().numpy()
    np.testing.assert_allclose(found, params.apply_image(source), rtol=0, atol=3e-4)


def test_intensities_on_the_gpu_are_the_cpus_but_for_the_noise() -> None:
    quiet = IntensityAugmentation.nndetection().model_copy(update={"noise_probability": 0.0})
    params = quiet.sample_batch(np.random.default_rng(0), 16, 2)
    images = torch.randn(16, 2, 24, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cuda", torch.bfloat16):
        found = params.apply(images.cuda()).cpu()
    torch.testing.assert_close(found, params.apply(images), rtol=0, atol=1e-4)
    noisy = IntensityAugmentation.none().model_copy(update={"noise_probability": 1.0})
    drawn = noisy.sample_batch(np.random.default_rng(0), 4, 2)
    first, second = (drawn.apply(images[:4].cuda()) for _ in range(2))
    assert torch.equal(first, second)
    deviation = (first.cpu() - images[:4]).std(dim=(2, 3, 4))
    torch.testing.assert_close(deviation, torch.from_numpy(drawn.noise_std), rtol=0.05, atol=1e-4)


def test_batches_made_on_the_gpu_are_those_of_the_loader(tmp_path: Path) -> None:
    instances = np.zeros((60, 70, 80), np.int32)
    instances[20:30, 25:40, 30:37] = 1
    instances[2:9, 50:60, 50:70] = 2
    _, boxes = boxes_from_instances(instances)
    writer = CaseStoreWriter(tmp_path, patch_size=PATCH)
    writer.write_case(
        "a", np.random.default_rng(0).normal(size=(1, 60, 70, 80)).astype(np.float32),
        grid=Grid.from_parts(instances.shape, (1.0, 1.0, 1.0)), boxes=boxes, labels=[0, 1],
        instances=instances,
    )  # fmt: skip
    writer.finish()
    store = CaseStore.open(tmp_path)
    sampler = PatchSampler(store, case_objects(store, ["a"]), PATCH, 4, 0.5, ALWAYS)
    for step in range(3):
        expected = sampler(step, np.random.default_rng(step))
        loaded = replace(sampler, defer=True).load(step, np.random.default_rng(step))
        made = loaded.finish(torch.device("cuda"))
        torch.testing.assert_close(made.image.cpu(), expected.image, rtol=0, atol=3e-4)
        assert made.foreground is not None
        assert expected.foreground is not None
        assert torch.equal(made.foreground.cpu(), expected.foreground)
        for one, other in zip(made.targets, expected.targets, strict=True):
            assert one.boxes.is_cuda
            assert torch.equal(one.boxes.cpu(), other.boxes)
            assert torch.equal(one.labels.cpu(), other.labels)
