"""Transforms on the device give what the loader's own give, for one source box and for batches."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from voxelbridge.core.data.augment import SpatialAugmentation, SpatialParams, rotation_matrix
from voxelbridge.core.data.augment_device import (
    SourceBoxes,
    apply_image_on,
    apply_images_on,
    apply_labels_on,
    label_extents,
)
from voxelbridge.core.data.foreground import boxes_from_instances

PATCH = (9, 16, 12)
MATRICES = {
    "rotation about z": rotation_matrix([33.0, 0.0, 0.0]),
    "rotation about y": rotation_matrix([0.0, -20.0, 0.0]),
    "rotation about x": rotation_matrix([0.0, 0.0, 75.0]),
    "quarter turn": rotation_matrix([90.0, 0.0, 0.0]),
    "scaling": np.diag([1.3, 0.7, 1.0]),
    "all": rotation_matrix([11.0, -25.0, 40.0]) * np.array([0.8, 1.2, 1.4]),
}

angles = st.tuples(*[st.floats(-180, 180)] * 3)
scales = st.tuples(*[st.floats(0.5, 2.0)] * 3)
flips = st.tuples(*[st.booleans()] * 3)
patches = st.tuples(*[st.integers(1, 14)] * 3)


def source_of(params: SpatialParams, *, channels: int = 2, seed: int = 0) -> NDArray[np.float32]:
    """Noise on the source box: the hardest image for interpolation."""
    _, size = params.source_box((0, 0, 0))
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (channels, *size)).astype(np.float32)


@pytest.mark.parametrize("mirrored", [(False, False, False), (True, False, True)])
@pytest.mark.parametrize("name", MATRICES)
def test_patch_is_the_one_of_the_loader(name: str, mirrored: tuple[bool, bool, bool]) -> None:
    params = SpatialParams.build(PATCH, MATRICES[name], mirrored=mirrored)
    source = source_of(params, channels=3)
    patch = apply_image_on(torch.from_numpy(source), params)
    assert patch.dtype == torch.float32
    np.testing.assert_allclose(patch.numpy(), params.apply_image(source), rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(patch=patches, angle=angles, scale=scales, mirrored=flips)
def test_any_transform_gives_the_patch_of_the_loader(
    patch: tuple[int, int, int],
    angle: tuple[float, float, float],
    scale: tuple[float, float, float],
    mirrored: tuple[bool, bool, bool],
) -> None:
    params = SpatialParams.build(patch, rotation_matrix(angle) * scale, mirrored=mirrored)
    source = source_of(params)
    found = apply_image_on(torch.from_numpy(source), params).numpy()
    assert found.shape == (2, *patch)
    np.testing.assert_allclose(found, params.apply_image(source), rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=10)
@given(patch=patches, mirrored=flips)
def test_mirroring_alone_copies_every_voxel(
    patch: tuple[int, int, int], mirrored: tuple[bool, bool, bool]
) -> None:
    params = SpatialParams.build(patch, mirrored=mirrored)
    source = source_of(params)
    found = apply_image_on(torch.from_numpy(source), params)
    assert np.array_equal(found.numpy(), params.apply_image(source))


@settings(deadline=None, max_examples=40)
@given(
    patch=patches,
    matrix=st.one_of(
        st.none(),
        scales.map(np.diag),
        st.sampled_from([0.0, 90.0, 180.0, 270.0]).map(lambda a: rotation_matrix([0.0, a, 0.0])),
        st.builds(lambda angle, scale: rotation_matrix(angle) * scale, angles, scales),
    ),
    mirrored=flips,
    seed=st.integers(0, 9),
)
def test_labels_are_those_of_the_loader_in_every_voxel(
    patch: tuple[int, int, int],
    matrix: NDArray[np.float64] | None,
    mirrored: tuple[bool, bool, bool],
    seed: int,
) -> None:
    params = SpatialParams.build(patch, matrix, mirrored=mirrored)
    _, size = params.source_box((0, 0, 0))
    source = np.random.default_rng(seed).integers(0, 70_000, size).astype(np.int32)
    found = apply_labels_on(torch.from_numpy(source), params)
    assert found.dtype == torch.int32
    np.testing.assert_array_equal(found.numpy(), params.apply_labels(source))


@settings(deadline=None, max_examples=30)
@given(shape=patches, count=st.integers(0, 6), density=st.floats(0, 1), seed=st.integers(0, 99))
def test_extents_are_the_boxes_of_the_labels(
    shape: tuple[int, int, int], count: int, density: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(-1, 9, shape) * (rng.random(shape) < density)  # some beyond the count
    ids, boxes = boxes_from_instances(labels)
    extents = label_extents(torch.from_numpy(labels), count=count).numpy()
    assert extents.shape == (count, 6)
    asked = ids <= count
    np.testing.assert_array_equal(1 + np.flatnonzero(extents[:, 0] >= 0), ids[asked])
    np.testing.assert_array_equal(extents[ids[asked] - 1], boxes[asked])
    absent = np.setdiff1d(np.arange(1, count + 1), ids)
    assert (extents[absent - 1] == -1).all()


def test_axes_are_z_y_x() -> None:
    """The index of one axis as image: a quarter turn about z swaps y and x and leaves z."""
    params = SpatialParams.build((3, 5, 5), rotation_matrix([90.0, 0.0, 0.0]))
    first, size = params.source_box((0, 0, 0))
    axes = np.meshgrid(*[np.arange(n) + f for f, n in zip(first, size, strict=True)], indexing="ij")
    source = torch.from_numpy(np.stack(axes).astype(np.float32))
    z, y, x = apply_image_on(source, params).numpy()
    index = np.arange(5)
    np.testing.assert_allclose(z, np.broadcast_to(np.arange(3)[:, None, None], z.shape), atol=1e-5)
    np.testing.assert_allclose(y[0], np.rot90(np.broadcast_to(index[:, None], (5, 5))), atol=1e-5)
    np.testing.assert_allclose(x[0], np.rot90(np.broadcast_to(index, (5, 5))), atol=1e-5)


def test_constant_image_stays_constant_to_the_border() -> None:
    for name, matrix in MATRICES.items():
        params = SpatialParams.build(PATCH, matrix)
        source = torch.full((1, *params.source_box((0, 0, 0))[1]), 7.0)
        found = apply_image_on(source, params).numpy()
        np.testing.assert_allclose(found, 7.0, rtol=1e-6, err_msg=name)


def test_batch_of_ragged_sources_is_each_source_on_its_own() -> None:
    rng = np.random.default_rng(3)
    augmentation = SpatialAugmentation(rotation_probability=0.5, scale_probability=0.5)
    params = tuple(augmentation.sample(rng, PATCH) for _ in range(6))
    assert {drawn.copies for drawn in params} == {True, False}
    sources = tuple(torch.from_numpy(source_of(p, seed=n)) for n, p in enumerate(params))
    assert len({source.shape for source in sources}) > 2
    batch = SourceBoxes(sources, params).to("cpu").apply()
    assert batch.shape == (6, 2, *PATCH)
    assert batch.is_contiguous()
    for patch, source, drawn in zip(batch, sources, params, strict=True):
        assert torch.equal(patch, apply_image_on(source, drawn))


def test_sources_stay_as_they_are() -> None:
    params = SpatialParams.build(PATCH, MATRICES["all"])
    source = torch.from_numpy(source_of(params))
    before = source.clone()
    patch = apply_images_on([source], [params])
    patch.zero_()
    assert torch.equal(source, before)
    mirrored = SpatialParams.build(PATCH, mirrored=(False, False, False))
    copy = torch.from_numpy(source_of(mirrored))
    apply_images_on([copy], [mirrored]).zero_()
    assert copy.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int16])
@pytest.mark.parametrize("matrix", [None, MATRICES["all"]], ids=["copied", "resampled"])
def test_other_types_are_resampled_in_float32(
    dtype: torch.dtype, matrix: NDArray[np.float64] | None
) -> None:
    params = SpatialParams.build(PATCH, matrix)
    source = torch.from_numpy(10 * source_of(params)).to(dtype)
    found = apply_image_on(source, params)
    assert found.dtype == torch.float32
    expected = params.apply_image(source.float().numpy())
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-4)


def test_autocast_changes_nothing() -> None:
    params = SpatialParams.build(PATCH, MATRICES["all"])
    source = torch.from_numpy(source_of(params))
    plain = apply_image_on(source, params)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(apply_image_on(source, params), plain)


@pytest.mark.parametrize("matrix", [None, MATRICES["all"]], ids=["copied", "resampled"])
def test_source_of_another_size_is_refused(matrix: NDArray[np.float64] | None) -> None:
    params = SpatialParams.build(PATCH, matrix)
    with pytest.raises(ValueError, match=r"source_box\(\) says"):
        apply_image_on(torch.zeros(1, 4, 4, 4), params)


def test_sources_and_transforms_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="1 sources, 0 transforms"):
        SourceBoxes((torch.zeros(1, *PATCH),), ())


@settings(deadline=None, max_examples=20)
@given(patch=patches, angle=angles, mirrored=flips, copies=st.booleans())
def test_array_form_keeps_the_transform(
    patch: tuple[int, int, int],
    angle: tuple[float, float, float],
    mirrored: tuple[bool, bool, bool],
    copies: bool,
) -> None:
    matrix = None if copies else rotation_matrix(angle)
    params = SpatialParams.build(patch, matrix, mirrored=mirrored)
    array = params.to_array()
    assert array.shape == (13,)
    back = SpatialParams.from_array(patch, torch.from_numpy(np.stack([array, array]))[1].numpy())
    assert np.array_equal(back.matrix, params.matrix)
    assert (back.copies, back.mirrored) == (params.copies, params.mirrored)
    assert back.source_box((1, 2, 3)) == params.source_box((1, 2, 3))
    source = source_of(params)
    assert np.array_equal(back.apply_image(source), params.apply_image(source))
