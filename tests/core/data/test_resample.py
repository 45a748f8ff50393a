"""Resampling through per-axis matrices against scikit-image, and nnU-Net's shortcut."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.ndimage import map_coordinates
from skimage.transform import resize

from voxelbridge.core.data import resample
from voxelbridge.core.data.label_interpolation import resample_labels_linear
from voxelbridge.core.data.resample import (
    Resampling,
    coarse_axis,
    resample_image,
    resample_image_by,
    resample_labels,
    resample_labels_by,
    resampled_shape,
)

sizes = st.tuples(*[st.integers(1, 40)] * 3)


def _structured(shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * 300 + 1000 * (rng.random(shape) < 0.05)).astype(np.float32)


def _skimage(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(resize(array, shape, order=3, mode="edge", anti_aliasing=False, clip=True))


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, st.integers(0, 2**31))
def test_image_equals_scikit_image(old: tuple[int, ...], new: tuple[int, ...], seed: int) -> None:
    array = _structured(old, seed)
    got = resample_image(array[None], new)[0]
    assert got.shape == new
    span = float(array.max() - array.min()) or 1.0
    np.testing.assert_allclose(got, _skimage(array, new), atol=1e-5 * span)


@settings(max_examples=15, deadline=None)
@given(sizes, sizes, st.sampled_from([np.uint8, np.int16, np.int32]), st.permutations(range(3)))
def test_integer_images_in_any_layout_equal_scikit_image(
    old: tuple[int, ...], new: tuple[int, ...], dtype: type, order: list[int]
) -> None:
    array = np.clip(_structured(old, 3), 0, 250).astype(dtype).transpose(order)[::-1, :, ::-1]
    before = array.copy()
    got = resample_image(array[None], new)[0]
    expected = np.asarray(
        resize(
            array, new, order=3, mode="edge", anti_aliasing=False, clip=True, preserve_range=True
        )
    )
    np.testing.assert_allclose(got, expected, atol=1e-4 * max(1.0, float(np.ptp(array))))
    assert got.flags.c_contiguous
    assert np.array_equal(array, before)


def test_clipping_is_what_keeps_the_overshoot_away() -> None:
    array = np.zeros((1, 12, 12, 12), dtype=np.int16)
    array[0, 4:8, 4:8, 4:8] = 1000
    free = np.asarray(
        resize(array[0].astype(float), (30, 30, 30), order=3, mode="edge", clip=False)
    )
    got = resample_image(array, (30, 30, 30))
    assert free.max() > 1100
    assert got.max() == 1000
    assert got.min() == 0


def test_slabs_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    array = _structured((2, 13, 21, 34), 0)
    shapes = [(26, 10, 50), (7, 40, 20), (13, 30, 30), (13, 21, 60)]
    whole = [resample_image(array, shape) for shape in shapes]
    monkeypatch.setattr(resample, "SLAB_BYTES", 1500)
    for shape, expected in zip(shapes, whole, strict=True):
        np.testing.assert_allclose(resample_image(array, shape), expected, rtol=0, atol=1e-3)


def test_equal_shape_is_returned_untouched() -> None:
    array = np.random.default_rng(0).normal(size=(1, 4, 5, 6)).astype(np.float32)
    assert resample_image(array, (4, 5, 6)) is array
    labels = np.zeros((4, 5, 6), dtype=np.int16)
    assert resample_labels(labels, (4, 5, 6)) is labels


def test_result_stays_within_the_range_of_its_channel() -> None:
    array = np.zeros((2, 8, 8, 8), dtype=np.float32)
    array[1, 4, 4, 4] = 100.0
    got = resample_image(array, (20, 20, 20))
    assert (got[0] == 0).all()
    assert got[1].min() == 0.0
    assert got[1].max() <= 100.0


def test_constant_integer_image_stays_constant() -> None:
    got = resample_image(np.full((1, 3, 1, 5), 7, dtype=np.int16), (9, 4, 2))
    assert got.dtype == np.float32
    assert (got == 7).all()


@settings(max_examples=30, deadline=None)
@given(sizes, sizes)
def test_labels_take_the_voxel_whose_centre_is_nearest(
    old: tuple[int, ...], new: tuple[int, ...]
) -> None:
    labels = np.arange(np.prod(old)).reshape(old)
    got = resample_labels(labels, new)
    for axis in range(3):
        centres = (np.arange(new[axis]) + 0.5) * old[axis] / new[axis]
        picked = np.unravel_index(got, old)[axis]
        index = np.moveaxis(picked, axis, 0)[:, 0, 0]
        assert (np.abs(index + 0.5 - centres) <= 0.5 + 1e-9).all()


def test_doubling_and_halving_labels_is_the_identity() -> None:
    labels = np.random.default_rng(0).integers(0, 9, size=(3, 4, 5)).astype(np.int32)
    doubled = resample_labels(labels, (6, 8, 10))
    assert doubled.dtype == np.int32
    assert np.array_equal(doubled[::2, 1::2, ::2], labels)
    assert np.array_equal(resample_labels(doubled, (3, 4, 5)), labels)


def test_resampled_shape_rounds_and_keeps_one_voxel() -> None:
    assert resampled_shape((48, 512, 512), (5.0, 0.5703125, 0.5703125), (1, 1, 1)) == (
        240,
        292,
        292,
    )
    assert resampled_shape((1, 4, 4), (1, 1, 1), (9, 1, 2)) == (1, 4, 2)


def test_shape_rounds_in_the_order_of_nnunet() -> None:
    # halves go to the even number: 16.5 and 17.5; 0.7 / 0.2 is 3.4999999999999996
    assert resampled_shape((33, 35, 1), (0.3, 0.3, 0.7), (0.6, 0.6, 0.2)) == (16, 18, 3)


@pytest.mark.parametrize(
    ("old", "new", "axis"),
    [
        ((5.0, 0.57, 0.57), (1.0, 1.0, 1.0), 0),
        ((0.5, 0.5, 5.0), (1.0, 1.0, 1.0), 2),
        ((3.0, 1.0, 1.0), (1.0, 1.0, 1.0), None),  # the ratio must exceed three
        ((1.0, 1.0, 1.0), (1.0, 4.0, 1.0), 1),  # then the new spacing is looked at
        ((5.0, 0.5, 0.5), (1.0, 1.0, 9.0), 0),  # the old one comes first
        ((0.24, 1.25, 1.25), (1.0, 1.0, 1.0), None),  # two coarse axes
        ((0.24, 1.25, 1.25), (5.0, 1.0, 1.0), None),  # which settles it, as in nnU-Net
        ((0.24, 1.2500001, 1.25), (1.0, 1.0, 1.0), None),
    ],
)
def test_coarse_axis(old: tuple[float, ...], new: tuple[float, ...], axis: int | None) -> None:
    assert coarse_axis(old, new) == axis


def _nnunet_shortcut(array: np.ndarray, shape: tuple[int, ...], axis: int) -> np.ndarray:
    # slow and plain: every slice by scikit-image, then order 0 along the axis by coordinates
    in_plane = tuple(n for a, n in enumerate(shape) if a != axis)
    slices = [
        np.asarray(resize(part, in_plane, order=3, mode="edge", anti_aliasing=False))
        for part in np.moveaxis(array.astype(float), axis, 0)
    ]
    stack = np.stack(slices, axis=axis)
    scale = [old / new for old, new in zip(stack.shape, shape, strict=True)]
    grid = np.mgrid[tuple(slice(n) for n in shape)]
    coordinates = [s * (g + 0.5) - 0.5 for s, g in zip(scale, grid, strict=True)]
    return np.asarray(map_coordinates(stack, coordinates, order=0, mode="nearest"))


@settings(max_examples=25, deadline=None)
@given(sizes, sizes, st.integers(0, 2))
def test_nearest_axis_equals_slices_by_scikit_image(
    old: tuple[int, ...], new: tuple[int, ...], axis: int
) -> None:
    array = _structured(old, 1)
    got = resample_image(array[None], new, nearest_axis=axis)[0]
    if old == new:
        assert np.array_equal(got, array)
        return
    expected = _nnunet_shortcut(array, new, axis)
    np.testing.assert_allclose(got, expected, atol=1e-4 * (float(np.ptp(array)) or 1.0))


def test_resampling_settings_choose_the_rule() -> None:
    image = _structured((4, 12, 12), 0)[None]
    labels = np.random.default_rng(0).integers(0, 4, size=(4, 12, 12)).astype(np.uint8)
    shape, spacing = (20, 8, 8), {"spacing_mm": (5.0, 0.6, 0.6), "new_spacing_mm": (1.0, 0.9, 0.9)}
    plain, peer = Resampling(), Resampling(image="nnunet", labels="nnunet")
    assert plain == Resampling(image="cubic", labels="nearest")
    for rule, expected in (
        (plain, resample_image(image, shape)),
        (peer, resample_image(image, shape, nearest_axis=0)),
    ):
        assert np.array_equal(resample_image_by(rule, image, shape, **spacing), expected)
    for rule, expected in (
        (plain, resample_labels(labels, shape)),
        (peer, resample_labels_linear(labels, shape, nearest_axis=0)),
    ):
        assert np.array_equal(resample_labels_by(rule, labels, shape, **spacing), expected)
    isotropic = {"spacing_mm": (1.0, 1.0, 1.0), "new_spacing_mm": (0.5, 1.0, 1.0)}
    assert np.array_equal(
        resample_image_by(peer, image, shape, **isotropic), resample_image(image, shape)
    )
    with pytest.raises(ValidationError):
        Resampling(image="linear")  # type: ignore[arg-type]  # the point of the test


def test_wrong_number_of_axes_is_refused() -> None:
    with pytest.raises(ValueError, match="C, D, H, W"):
        resample_image(np.zeros((3, 3, 3)), (2, 2, 2))
    with pytest.raises(ValueError, match="D, H, W"):
        resample_labels(np.zeros((1, 3, 3, 3)), (2, 2, 2))
