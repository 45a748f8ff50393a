"""Resampling through per-axis matrices against scikit-image."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.transform import resize

from voxelbridge.core.data import resample
from voxelbridge.core.data.resample import resample_image, resample_labels, resampled_shape

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


def test_slabs_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    array = _structured((2, 13, 21, 34), 0)
    shapes = [(26, 10, 50), (7, 40, 20), (13, 30, 30), (13, 21, 60)]
    whole = [resample_image(array, shape) for shape in shapes]
    monkeypatch.setattr(resample, "SLAB_BYTES", 6000)
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


def test_wrong_number_of_axes_is_refused() -> None:
    with pytest.raises(ValueError, match="C, D, H, W"):
        resample_image(np.zeros((3, 3, 3)), (2, 2, 2))
    with pytest.raises(ValueError, match="D, H, W"):
        resample_labels(np.zeros((1, 3, 3, 3)), (2, 2, 2))
