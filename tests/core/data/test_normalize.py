"""Intensity normalisation."""

import numpy as np
import pytest
from pydantic import TypeAdapter

from voxelbridge.core.data.normalize import (
    CTPercentile,
    Normalization,
    ZScore,
    fit_ct,
    normalization_of,
    normalize,
    normalize_in_place,
    require_finite,
)
from voxelbridge.core.errors import DataError


def test_zscore_has_mean_zero_and_standard_deviation_one() -> None:
    image = np.random.default_rng(0).normal(1000, 300, size=(9, 10, 11)).astype(np.int16)
    got = normalize(image, ZScore())
    assert got.dtype == np.float32
    assert abs(got.mean()) < 1e-5
    assert abs(got.std() - 1) < 1e-5


def test_zscore_of_nonzero_voxels_leaves_background_zero() -> None:
    image = np.zeros((4, 4, 4), dtype=np.float32)
    image[1:3] = np.random.default_rng(0).normal(50, 5, size=(2, 4, 4))
    got = normalize(image, ZScore(nonzero_only=True))
    assert (got[[0, 3]] == 0).all()
    assert abs(got[1:3].mean()) < 1e-5
    assert abs(got[1:3].std() - 1) < 1e-5


@pytest.mark.parametrize("nonzero_only", [True, False])
def test_constant_image_becomes_zero(nonzero_only: bool) -> None:
    for value in (0.0, 7.0):
        got = normalize(np.full((2, 3, 4), value), ZScore(nonzero_only=nonzero_only))
        assert (got == 0).all()


def test_ct_is_clipped_shifted_and_scaled() -> None:
    scheme = CTPercentile(lower=-100, upper=300, mean=50, std=25)
    got = normalize(np.array([[[-3024, -100, 50, 75, 3000]]], dtype=np.int16), scheme)
    assert got.ravel().tolist() == [-6.0, -6.0, 0.0, 1.0, 10.0]


def test_fit_ct_gives_percentiles_mean_and_deviation() -> None:
    samples = np.arange(1001)
    scheme = fit_ct(samples)
    assert (scheme.lower, scheme.upper) == (5.0, 995.0)
    assert scheme.mean == 500.0
    assert scheme.std == pytest.approx(np.std(samples))


def test_fit_ct_of_nothing_or_nan_is_refused() -> None:
    with pytest.raises(DataError, match="foreground"):
        fit_ct(np.zeros(0))
    with pytest.raises(DataError, match="finite"):
        fit_ct(np.array([1.0, np.nan]))


@pytest.mark.parametrize("scheme", [ZScore(), CTPercentile(lower=0, upper=1, mean=0, std=1)])
def test_nan_and_infinity_are_refused_with_their_number(scheme: Normalization) -> None:
    image = np.zeros((2, 2, 2), dtype=np.float32)
    image[0, 0] = [np.nan, np.inf]
    with pytest.raises(DataError, match="2 voxels"):
        normalize(image, scheme)


def test_values_beyond_float32_and_slices_are_counted() -> None:
    image = np.zeros((3, 2, 2))
    image[1, 0] = [1e300, -np.inf]
    with pytest.raises(DataError, match="2 voxels"):
        require_finite(image)
    require_finite(np.zeros((1, 0, 2)))
    require_finite(np.array([2**62]))


@pytest.mark.parametrize(
    "scheme",
    [ZScore(), ZScore(nonzero_only=True), CTPercentile(lower=-50, upper=90, mean=3, std=7)],
)
def test_slices_in_place_equal_the_formula_over_the_whole(scheme: Normalization) -> None:
    rng = np.random.default_rng(1)
    image = (rng.normal(20, 60, size=(7, 8, 9)) * (rng.random((7, 8, 9)) < 0.7)).astype(np.float32)
    image[2] = 0
    wide = image.astype(np.float64)
    match scheme:
        case ZScore():
            values = wide[wide != 0] if scheme.nonzero_only else wide
            expected = (wide - values.mean()) / values.std()
            if scheme.nonzero_only:
                expected[wide == 0] = 0
        case CTPercentile():
            expected = (np.clip(wide, -50, 90) - 3) / 7
    np.testing.assert_allclose(normalize(image, scheme), expected, atol=2e-6)
    view = image[::-1, :, ::-1]
    normalize_in_place(view, scheme)
    np.testing.assert_allclose(view, expected[::-1, :, ::-1], atol=2e-6)


def test_input_array_is_left_alone() -> None:
    image = np.arange(8, dtype=np.float32).reshape(2, 2, 2)
    normalize(image, ZScore())
    assert image.ravel().tolist() == list(range(8))


def test_schemes_are_told_apart_by_name_in_json() -> None:
    adapter = TypeAdapter(Normalization)
    for scheme in (ZScore(nonzero_only=True), CTPercentile(lower=0, upper=1, mean=0.5, std=2)):
        assert adapter.validate_json(adapter.dump_json(scheme)) == scheme


def test_the_channel_name_and_the_crop_choose_the_scheme() -> None:
    samples = np.arange(1000)
    for name in ("CT", "ct"):
        assert normalization_of(name, samples, kept_by_crop=0.5) == fit_ct(samples)
    for name in ("T1", "CT_venous", ""):
        assert normalization_of(name, samples, kept_by_crop=0.75) == ZScore()
        assert normalization_of(name, samples, kept_by_crop=0.74) == ZScore(nonzero_only=True)
