"""Spatial augmentation: what is drawn and read, and image, mask and boxes staying together."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import ndimage

from voxelbridge.core.data.augment import SpatialAugmentation, SpatialParams, rotation_matrix
from voxelbridge.core.data.foreground import boxes_from_instances

ALWAYS = SpatialAugmentation(rotation_probability=1.0, scale_probability=1.0)
PATCH = (20, 24, 28)
START = (30, 28, 26)
SHAPE = (84, 88, 92)

angles = st.tuples(*[st.floats(-180, 180)] * 3)
scales = st.floats(0.5, 2.0)
flips = st.tuples(*[st.booleans()] * 3)
small_patches = st.tuples(*[st.integers(1, 12)] * 3)


def crop(volume: np.ndarray, start: tuple[int, ...], size: tuple[int, ...]) -> np.ndarray:
    """Voxels of (..., D, H, W) at `start`, 0 outside."""
    patch = np.zeros((*volume.shape[:-3], *size), volume.dtype)
    low = np.maximum(start, 0)
    high = np.minimum(np.add(start, size), volume.shape[-3:])
    if (high > low).all():
        inside = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        target = tuple(slice(a, b) for a, b in zip(low - start, high - start, strict=True))
        patch[(..., *target)] = volume[(..., *inside)]
    return patch


def seen(
    params: SpatialParams, volume: np.ndarray, start: tuple[int, int, int] = START
) -> np.ndarray:
    first, size = params.source_box(start)
    return params.apply_image(crop(volume[None], first, size))[0]


def labels_seen(
    params: SpatialParams, labels: np.ndarray, start: tuple[int, int, int] = START
) -> np.ndarray:
    first, size = params.source_box(start)
    return params.apply_labels(crop(labels, first, size))


def _shell(mask: np.ndarray) -> np.ndarray:
    """Voxels within one of the surface."""
    return np.logical_xor(ndimage.binary_dilation(mask), ndimage.binary_erosion(mask))


def plain(params: SpatialParams, volume: np.ndarray, start: tuple[int, int, int]) -> np.ndarray:
    """The slow reference: the definition of the transform on the whole volume."""
    middle = np.asarray(params.patch_size) / 2
    offset = np.asarray(start) + middle - 0.5 - params.matrix @ (middle - 0.5)
    padded = np.pad(volume, 60)
    return ndimage.affine_transform(
        padded, params.matrix, (offset + 60).tolist(), output_shape=params.patch_size, order=1
    )


def test_draws_depend_on_the_generator_alone() -> None:
    one, two = (ALWAYS.sample(np.random.default_rng(5), PATCH) for _ in range(2))
    np.testing.assert_array_equal(one.matrix, two.matrix)
    assert one.mirrored == two.mirrored
    volume = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    np.testing.assert_array_equal(seen(one, volume), seen(two, volume))
    other = ALWAYS.sample(np.random.default_rng(6), PATCH)
    assert not np.array_equal(one.matrix, other.matrix)


def test_draws_have_the_stated_probabilities() -> None:
    rng = np.random.default_rng(0)
    draws = [SpatialAugmentation().sample(rng, (32, 32, 32)) for _ in range(4000)]
    rotated = np.mean([not draw.axis_aligned for draw in draws])
    copied = np.mean([draw.copies for draw in draws])
    volumes = [abs(np.linalg.det(draw.matrix)) ** (1 / 3) for draw in draws]
    assert rotated == pytest.approx(0.2, abs=0.03)
    assert copied == pytest.approx(0.64, abs=0.03)
    assert 0.7 <= min(volumes) < 0.75
    assert 1.35 < max(volumes) <= 1.4
    for axis in range(3):
        assert np.mean([draw.mirrored[axis] for draw in draws]) == pytest.approx(0.5, abs=0.04)


def test_flat_patches_turn_in_their_plane_only() -> None:
    draw = ALWAYS.sample(np.random.default_rng(1), (8, 32, 32))
    assert not draw.axis_aligned
    np.testing.assert_array_equal(np.abs(draw.matrix[0]), [1, 0, 0])
    np.testing.assert_array_equal(np.abs(draw.matrix[:, 0]), [1, 0, 0])
    _, size = draw.source_box((0, 0, 0))
    assert size[0] <= 8 + 2  # no slice is shown that the patch does not span
    never = ALWAYS.model_copy(update={"in_plane": "never"})
    assert never.sample(np.random.default_rng(1), (8, 32, 32)).matrix[0, 1] != 0


def test_only_the_named_axes_are_mirrored() -> None:
    settings_ = SpatialAugmentation(
        rotation_probability=0, scale_probability=0, mirror_probability=1, mirror_axes=(0, 2)
    )
    assert settings_.sample(np.random.default_rng(0), PATCH).mirrored == (True, False, True)
    nothing = SpatialAugmentation.none().sample(np.random.default_rng(0), PATCH)
    assert nothing.copies
    assert nothing.mirrored == (False, False, False)
    assert SpatialAugmentation.mirroring().sample(np.random.default_rng(0), PATCH).copies


@pytest.mark.parametrize(
    "wrong", [{"scale_range": (1.4, 0.7)}, {"rotation_probability": 1.5}, {"mirror_axes": (3,)}]
)
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        SpatialAugmentation.model_validate(wrong)


@given(flips)
@settings(deadline=None, max_examples=8)
def test_copies_and_mirrors_are_exact_to_the_bit(flip: tuple[bool, bool, bool]) -> None:
    rng = np.random.default_rng(0)
    volume = rng.normal(size=SHAPE).astype(np.float32)
    params = SpatialParams.build(PATCH, mirrored=flip)
    assert params.source_box(START) == (START, PATCH)
    axes = tuple(axis for axis in range(3) if flip[axis])
    expected = np.flip(crop(volume, START, PATCH), axes)
    np.testing.assert_array_equal(seen(params, volume), expected)
    boxes = np.array([[31.25, 30, 29, 33, 35.5, 40]])
    low, high = boxes[0, :3] - START, boxes[0, 3:] - START
    moved = params.apply_boxes(boxes, start=START)[0]
    for axis in range(3):
        pair = (low[axis], high[axis])
        if flip[axis]:
            pair = (PATCH[axis] - high[axis], PATCH[axis] - low[axis])
        assert (moved[axis], moved[axis + 3]) == pair


@given(angles, scales, flips, small_patches)
@settings(deadline=None, max_examples=60)
def test_source_box_holds_every_voxel_with_weight(
    degrees: tuple[float, ...],
    scale: float,
    flip: tuple[bool, bool, bool],
    patch: tuple[int, int, int],
) -> None:
    """Read through the box, a patch equals the transform of the whole volume."""
    params = SpatialParams.build(patch, rotation_matrix(degrees) * scale, mirrored=flip)
    volume = np.random.default_rng(0).normal(size=(30, 32, 34)).astype(np.float32)
    start = (4, 15, -6)  # partly outside
    expected = plain(params, volume, start)
    np.testing.assert_allclose(seen(params, volume, start), expected, atol=2e-3)


@given(angles, scales, small_patches)
@settings(deadline=None, max_examples=60)
def test_source_box_is_not_larger_than_needed(
    degrees: tuple[float, ...], scale: float, patch: tuple[int, int, int]
) -> None:
    params = SpatialParams.build(patch, rotation_matrix(degrees) * scale)
    corners = np.stack(np.meshgrid(*[(0, n - 1) for n in patch], indexing="ij"), -1).reshape(-1, 3)
    middle = (np.asarray(patch) - 1) / 2
    places = (corners - middle) @ params.matrix.T + middle
    first, size = params.source_box((0, 0, 0))
    spare_low = places.min(axis=0) - first
    spare_high = np.asarray(first) + size - 1 - places.max(axis=0)
    assert (spare_low >= 0).all()
    assert (spare_high >= 0).all()
    assert (spare_low <= 1.01).all()  # the neighbour below
    assert (spare_high <= 1.01).all()  # the neighbour above


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_quarter_turns_equal_rot90(axis: int, turns: int) -> None:
    volume = np.random.default_rng(2).normal(size=(21, 21, 21)).astype(np.float32)
    degrees = [0.0, 0.0, 0.0]
    degrees[axis] = 90.0 * turns
    params = SpatialParams.build((21, 21, 21), rotation_matrix(degrees))
    plane = tuple(other for other in range(3) if other != axis)
    turned = seen(params, volume, (0, 0, 0))
    expected = np.rot90(volume, turns, axes=(plane[0], plane[1]))
    np.testing.assert_allclose(turned, expected, atol=1e-4)
    labels = (volume * 10).astype(np.int32)
    expected = np.rot90(labels, turns, axes=(plane[0], plane[1]))
    np.testing.assert_array_equal(labels_seen(params, labels, (0, 0, 0)), expected)


def test_scaling_alone_equals_the_general_path() -> None:
    volume = np.random.default_rng(3).normal(size=SHAPE).astype(np.float32)
    scaled = SpatialParams.build(PATCH, np.eye(3) * 1.3, mirrored=(True, False, True))
    assert scaled.axis_aligned
    nearly = SpatialParams.build(
        PATCH, rotation_matrix([1e-7, 0, 0]) * 1.3, mirrored=(True, False, True)
    )
    assert not nearly.axis_aligned
    np.testing.assert_allclose(seen(scaled, volume), seen(nearly, volume), atol=1e-4)
    labels = (volume > 1).astype(np.int32)
    assert np.mean(labels_seen(scaled, labels) != labels_seen(nearly, labels)) < 1e-3


def test_channels_are_transformed_alike() -> None:
    source = np.random.default_rng(4).normal(size=(3, *SHAPE)).astype(np.float32)
    params = ALWAYS.sample(np.random.default_rng(4), PATCH)
    first, size = params.source_box(START)
    patch = params.apply_image(crop(source, first, size))
    assert patch.shape == (3, *PATCH)
    assert patch.dtype == np.float32
    for channel in range(3):
        np.testing.assert_array_equal(patch[channel], seen(params, source[channel]))


def test_nearest_labels_equal_the_plain_reference() -> None:
    """Only part of the patch is looked at, where labels can be: it must lose none."""
    rng = np.random.default_rng(5)
    for number in range(20):
        labels = np.zeros(SHAPE, dtype=np.int32)
        z, y, x = (int(v) for v in rng.integers(20, 60, 3))
        labels[z : z + 9, y : y + 5, x : x + 7] = rng.integers(0, 4, (9, 5, 7))
        params = ALWAYS.sample(np.random.default_rng(number), PATCH)
        middle = np.asarray(PATCH) / 2
        offset = np.asarray(START) + middle - 0.5 - params.matrix @ (middle - 0.5)
        expected = ndimage.affine_transform(
            np.pad(labels, 60), params.matrix, (offset + 60).tolist(), output_shape=PATCH, order=0
        )
        assert np.mean(labels_seen(params, labels) != expected) < 1e-4  # ties of rounding


@pytest.mark.parametrize("seed", range(12))
def test_image_mask_and_box_of_a_cube_agree_to_a_voxel(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = np.zeros(SHAPE, dtype=np.int32)
    z, y, x = (int(v) for v in np.add(START, PATCH) - rng.integers(8, 16, 3))
    edge = int(rng.integers(4, 8))
    labels[z : z + edge, y : y + edge, x : x + edge] = 1
    image = labels.astype(np.float32)
    volume_box = np.array([[z, y, x, z + edge, y + edge, x + edge]], dtype=np.float64)
    params = ALWAYS.sample(rng, PATCH)
    if seed % 3 == 0:  # scaling and mirroring alone
        params = SpatialParams.build(PATCH, np.eye(3) * 1.2, mirrored=params.mirrored)
    start = params.keep_inside(START, volume_box[0])
    mask = labels_seen(params, labels, start) == 1
    from_image = seen(params, image, start) > 0.5
    assert mask.any()
    shell = _shell(mask)
    assert not (mask ^ from_image)[~shell].any()
    _, tight = boxes_from_instances(mask.astype(np.int32))
    _, of_image = boxes_from_instances(from_image.astype(np.int32))
    np.testing.assert_allclose(tight, of_image, atol=1.0)
    if params.axis_aligned:
        np.testing.assert_allclose(params.apply_boxes(volume_box, start=start), tight, atol=1.0)


@given(angles, scales, flips)
@settings(deadline=None, max_examples=25)
def test_rotated_box_is_tight_around_the_inscribed_ellipsoid(
    degrees: tuple[float, ...], scale: float, flip: tuple[bool, bool, bool]
) -> None:
    params = SpatialParams.build((32, 32, 32), rotation_matrix(degrees) * scale, mirrored=flip)
    box = np.array([[22.0, 24, 26, 34, 33, 36]])
    start = (12, 12, 14)
    edges = params.apply_boxes(box, start=start)[0]
    mask = params.draw_ellipsoids(box, start=start)
    _, drawn = boxes_from_instances(mask.astype(np.int32))
    assert (drawn[0, :3] >= np.maximum(edges[:3] - 0.5, 0)).all()
    assert (drawn[0, 3:] <= np.minimum(edges[3:] + 0.5, 32)).all()
    np.testing.assert_allclose(drawn[0], np.clip(edges, 0, 32), atol=1.6)
    # The surface points of the ellipsoid touch all six faces and never leave the box.
    sphere = np.random.default_rng(0).normal(size=(4000, 3))
    sphere /= np.linalg.norm(sphere, axis=1, keepdims=True)
    surface = box[0, :3] + (sphere + 1) * (box[0, 3:] - box[0, :3]) / 2
    places = (surface - start - 16) @ np.linalg.inv(params.matrix).T + 16
    assert (places >= edges[:3] - 1e-6).all()
    assert (places <= edges[3:] + 1e-6).all()
    assert np.abs(places.min(axis=0) - edges[:3]).max() < 0.1
    assert np.abs(places.max(axis=0) - edges[3:]).max() < 0.1


def test_drawn_ellipsoids_equal_the_transformed_map_of_ellipsoids() -> None:
    boxes = np.array([[34.0, 30, 30, 46, 44, 48], [44.0, 40, 40, 50, 54, 48]])
    whole = SpatialParams.build(SHAPE).draw_ellipsoids(boxes, start=(0, 0, 0))
    params = SpatialParams.build(PATCH, rotation_matrix([20, -10, 30]) * 1.2)
    expected = labels_seen(params, whole.astype(np.int32)) == 1
    drawn = params.draw_ellipsoids(boxes, start=START)
    shell = _shell(expected)
    assert drawn.any()
    assert not (drawn ^ expected)[~shell].any()


@given(angles, st.floats(0.7, 1.4), flips, st.tuples(*[st.integers(0, 12)] * 3))
@settings(deadline=None, max_examples=60)
def test_an_object_in_the_patch_stays_in_it_when_turned(
    degrees: tuple[float, ...],
    scale: float,
    flip: tuple[bool, bool, bool],
    corner: tuple[int, int, int],
) -> None:
    params = SpatialParams.build(PATCH, rotation_matrix(degrees) * scale, mirrored=flip)
    low = np.add(START, corner)
    box = np.concatenate([low, low + 6]).astype(np.float64)
    start = params.keep_inside(START, box)
    edges = params.apply_boxes(box, start=start)[0]
    rounding = 0.5 * np.abs(np.linalg.inv(params.matrix)).sum(axis=1)
    assert (edges[:3] >= -rounding - 1e-9).all()
    assert (edges[3:] <= PATCH + rounding + 1e-9).all()


def test_no_boxes_stay_no_boxes() -> None:
    params = ALWAYS.sample(np.random.default_rng(0), PATCH)
    assert params.apply_boxes(np.zeros((0, 6)), start=START).shape == (0, 6)
    assert not params.draw_ellipsoids(np.zeros((0, 6)), start=START).any()
    assert not labels_seen(params, np.zeros(SHAPE, np.int32)).any()


def test_a_wrong_source_is_refused() -> None:
    params = ALWAYS.sample(np.random.default_rng(0), PATCH)
    with pytest.raises(ValueError, match=r"source_box\(\) says"):
        params.apply_image(np.zeros((1, 8, 8, 8), np.float32))
