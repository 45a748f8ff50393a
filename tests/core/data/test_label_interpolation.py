"""Label maps by linear votes against batchgenerators' function, which nnU-Net uses."""

import numpy as np
import pytest
from batchgenerators.augmentations import utils as batchgenerators_utils
from batchgenerators.augmentations.utils import resize_segmentation
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.transform import resize

from voxelbridge.core.data.label_interpolation import nearest_picks, resample_labels_linear
from voxelbridge.core.data.resample import resample_labels

sizes = st.tuples(*[st.integers(1, 14)] * 3)
factors = st.tuples(*[st.integers(1, 4)] * 3)
# older releases write every label above one half instead of taking the largest
votes = pytest.mark.skipif(
    not hasattr(batchgenerators_utils, "_resample_seg_by_argmax"),
    reason="this batchgenerators has the older rule",
)


def _labels(shape: tuple[int, ...], seed: int, *, count: int, dtype: type = np.int16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, count, size=shape).astype(dtype)


def _plain(labels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    # one volume per label, the largest wins; -1 where two are within rounding
    ids = np.unique(labels)
    scores = [
        np.asarray(
            resize(
                (labels == label).astype(float), shape, order=1, mode="edge", anti_aliasing=False
            )
        )
        for label in ids
    ]
    ranked = np.sort(np.stack(scores), axis=0)
    clear = ranked[-1] - (ranked[-2] if len(ids) > 1 else 0.0) > 1e-9
    return np.where(clear, ids[np.argmax(np.stack(scores), axis=0)], -1)


@votes
@settings(max_examples=60, deadline=None)
@given(sizes, sizes, st.integers(0, 2**31), st.integers(1, 9))
def test_labels_equal_batchgenerators(
    old: tuple[int, ...], new: tuple[int, ...], seed: int, count: int
) -> None:
    labels = _labels(old, seed, count=count)
    got = resample_labels_linear(labels, new)
    assert got.dtype == labels.dtype
    assert np.array_equal(got, resize_segmentation(labels, new, 1))


@votes
@settings(max_examples=30, deadline=None)
@given(sizes, factors, st.integers(0, 2**31))
def test_ties_of_whole_factors_equal_batchgenerators(
    old: tuple[int, ...], factor: tuple[int, ...], seed: int
) -> None:
    labels = _labels(old, seed, count=4, dtype=np.uint8)
    new = tuple(n * f for n, f in zip(old, factor, strict=True))
    assert np.array_equal(resample_labels_linear(labels, new), resize_segmentation(labels, new, 1))
    assert np.array_equal(
        resample_labels_linear(np.repeat(labels, 2, axis=1), old),
        resize_segmentation(np.repeat(labels, 2, axis=1), old, 1),
    )


@settings(max_examples=30, deadline=None)
@given(sizes, sizes, st.integers(0, 2**31))
def test_the_largest_weight_wins(old: tuple[int, ...], new: tuple[int, ...], seed: int) -> None:
    labels = _labels(old, seed, count=5)
    expected = _plain(labels, new)
    got = resample_labels_linear(labels, new)
    assert np.array_equal(got[expected >= 0], expected[expected >= 0])


@votes
@settings(max_examples=25, deadline=None)
@given(sizes, sizes, st.integers(0, 2), st.integers(0, 2**31))
def test_nearest_axis_equals_slices_by_batchgenerators(
    old: tuple[int, ...], new: tuple[int, ...], axis: int, seed: int
) -> None:
    labels = _labels(old, seed, count=5)
    in_plane = tuple(n for a, n in enumerate(new) if a != axis)
    slices = [
        resize_segmentation(part, in_plane, 1)
        for part in np.moveaxis(labels.astype(float), axis, 0)
    ]
    picks = nearest_picks(old[axis], new[axis])
    expected = np.stack([slices[pick] for pick in picks], axis=axis)
    got = resample_labels_linear(labels, new, nearest_axis=axis)
    assert np.array_equal(got, expected)


def test_smooth_objects_agree_with_nearest_inside_and_far_away() -> None:
    labels = np.zeros((10, 12, 14), dtype=np.uint8)
    labels[3:8, 3:9, 4:10] = 7
    shape = (25, 31, 30)
    linear, nearest = resample_labels_linear(labels, shape), resample_labels(labels, shape)
    assert set(np.unique(linear)) == {0, 7}
    assert np.mean(linear != nearest) < 0.02
    assert linear.flags.c_contiguous


def test_many_labels_and_negative_ones_keep_their_values() -> None:
    labels = _labels((6, 7, 8), 0, count=90, dtype=np.int32) - 1
    got = resample_labels_linear(labels, (13, 15, 9))
    assert set(np.unique(got)) <= set(np.unique(labels))
    assert got.dtype == np.int32


def test_views_of_any_layout_give_the_same() -> None:
    labels = _labels((6, 7, 8), 0, count=4)
    view = labels.transpose(2, 0, 1)[::-1, :, ::-1]
    assert np.array_equal(
        resample_labels_linear(view, (9, 5, 12)),
        resample_labels_linear(np.ascontiguousarray(view), (9, 5, 12)),
    )


def test_equal_shape_is_returned_untouched_and_one_label_fills_all() -> None:
    labels = np.full((2, 3, 4), 5, dtype=np.int8)
    assert resample_labels_linear(labels, (2, 3, 4)) is labels
    assert (resample_labels_linear(labels, (7, 1, 5)) == 5).all()


def test_wrong_number_of_axes_is_refused() -> None:
    with pytest.raises(ValueError, match="D, H, W"):
        resample_labels_linear(np.zeros((1, 3, 3, 3)), (2, 2, 2))
