"""Intensity augmentation: what is drawn, and each transform against a slow plain reference."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import ndimage

from voxelbridge.core.data.augment_intensity import (
    COLUMNS,
    IntensityAugmentation,
    IntensityParams,
)

SHAPE = (7, 9, 6)
ALWAYS = IntensityAugmentation(
    noise_probability=1.0,
    blur_probability=1.0,
    blur_channel_probability=1.0,
    brightness_probability=1.0,
    contrast_probability=1.0,
    low_resolution_probability=1.0,
    low_resolution_channel_probability=1.0,
    inverted_gamma_probability=1.0,
    gamma_probability=1.0,
)


def image_of(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def only(channels: int = 1, **changed: object) -> IntensityParams:
    """The identity but for the named fields."""
    arrays = {name: np.asarray(value, dtype=np.float32) for name, value in changed.items()}
    return dataclasses.replace(IntensityParams.identity(channels), **arrays)


def applied(params: IntensityParams, image: np.ndarray) -> np.ndarray:
    return params.apply(torch.from_numpy(image)).numpy()


def plain_blur(channel: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """`ndimage.gaussian_filter` by its definition, one axis after the other."""
    for axis, deviation in enumerate(sigma):
        if deviation == 0:
            continue
        radius = int(4 * deviation + 0.5)
        weights = [np.exp(-0.5 * (tap / deviation) ** 2) for tap in range(-radius, radius + 1)]
        kernel = np.array(weights) / np.sum(weights)
        channel = ndimage.correlate1d(channel, kernel, axis=axis, mode="nearest")
    return channel


def plain_low_resolution(channel: np.ndarray, zoom: np.ndarray) -> np.ndarray:
    """Nearest voxels of a coarser grid, then linear between their centres, the edge repeated."""
    size = [max(1, round(edge * float(z))) for edge, z in zip(channel.shape, zoom, strict=True)]
    steps = [edge / cells for edge, cells in zip(channel.shape, size, strict=True)]
    picked = [
        np.array([int((cell + 0.5) * step) for cell in range(cells)])
        for cells, step in zip(size, steps, strict=True)
    ]
    coarse = channel[np.ix_(*picked)]
    axes = [
        (np.arange(edge) + 0.5) / step - 0.5
        for edge, step in zip(channel.shape, steps, strict=True)
    ]
    points = np.stack(np.meshgrid(*axes, indexing="ij"))
    return ndimage.map_coordinates(coarse, points, order=1, mode="nearest")


def plain_gamma(channel: np.ndarray, exponent: float) -> np.ndarray:
    low, spread = channel.min(), max(np.ptp(channel), 1e-7)
    changed = ((channel - low) / spread) ** exponent * np.ptp(channel) + low
    ratio = channel.std() / max(changed.std(), 1e-7)
    return (changed - changed.mean()) * ratio + channel.mean()


def plain(params: IntensityParams, image: np.ndarray) -> np.ndarray:
    """The slow reference: channel by channel in float64, transforms in their order."""
    result = []
    for row, values in enumerate(image.astype(np.float64)):
        channel = values
        if params.noise_std[row] > 0:
            generator = torch.Generator().manual_seed(int(params.noise_seed[row]))
            noise = torch.randn(channel.shape, generator=generator).numpy()
            channel = channel + float(params.noise_std[row]) * noise
        channel = plain_blur(channel, params.blur_sigma[row].astype(np.float64))
        channel = channel * float(params.brightness[row])
        stretched = (channel - channel.mean()) * float(params.contrast[row]) + channel.mean()
        channel = np.clip(stretched, channel.min(), channel.max())
        if (params.zoom[row] != 1).any():
            channel = plain_low_resolution(channel, params.zoom[row])
        if params.inverted_gamma[row] != 1:
            channel = -plain_gamma(-channel, float(params.inverted_gamma[row]))
        if params.gamma[row] != 1:
            channel = plain_gamma(channel, float(params.gamma[row]))
        result.append(channel)
    return np.stack(result)


def test_identity_gives_the_input_bit_for_bit() -> None:
    image = torch.from_numpy(image_of(0, 2, *SHAPE))
    image[0, 0, 0, :2] = torch.tensor([-0.0, float("inf")])
    for params in (
        IntensityParams.identity(2),
        IntensityAugmentation.none().sample(np.random.default_rng(0), 2),
    ):
        result = params.apply(image)
        assert result is not image
        assert result.numpy().tobytes() == image.numpy().tobytes()


@pytest.mark.parametrize(
    "params",
    [
        only(noise_std=[0.1], noise_seed=[7]),
        only(blur_sigma=[[0.5, 1.0, 0.8]]),
        only(brightness=[1.2]),
        only(contrast=[0.8]),
        only(contrast=[1.25]),
        only(zoom=[[0.6, 0.6, 0.6]]),
        only(zoom=[[1.0, 0.5, 0.5]]),
        only(inverted_gamma=[1.4]),
        only(gamma=[0.7]),
        only(2, gamma=[1.0, 1.3], brightness=[0.9, 1.0], blur_sigma=[[0, 0, 0], [0.9, 0.6, 0.0]]),
    ],
)
def test_each_transform_equals_the_plain_reference(params: IntensityParams) -> None:
    image = image_of(1, params.gamma.size, *SHAPE)
    result = applied(params, image)
    assert not np.array_equal(result, image)
    np.testing.assert_allclose(result, plain(params, image), rtol=0, atol=2e-6)


def test_blur_equals_the_one_of_scipy() -> None:
    image = image_of(2, 1, *SHAPE)
    sigma = np.array([[0.7, 1.0, 0.5]], np.float32)
    expected = ndimage.gaussian_filter(
        image[0].astype(np.float64), sigma[0], mode="nearest", truncate=4.0
    )
    np.testing.assert_allclose(applied(only(blur_sigma=sigma), image)[0], expected, atol=1e-6)


@given(seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=20)
def test_all_transforms_in_their_order_equal_the_plain_reference(seed: int) -> None:
    image = image_of(seed, 2, *SHAPE)
    params = ALWAYS.sample(np.random.default_rng(seed), 2)
    np.testing.assert_allclose(applied(params, image), plain(params, image), rtol=0, atol=2e-5)


def test_a_batch_is_its_images_one_by_one() -> None:
    images = image_of(3, 3, 2, *SHAPE)
    batch = IntensityAugmentation.nnunet().sample_batch(np.random.default_rng(8), 3, 2)
    table = batch.to_array()
    assert table.shape == (3, 2, COLUMNS)
    assert (table != IntensityParams.identity(3, 2).to_array()).any()
    single = [
        applied(IntensityParams.from_array(row), image)
        for row, image in zip(table, images, strict=True)
    ]
    np.testing.assert_allclose(applied(batch, images), np.stack(single), rtol=0, atol=1e-6)


def test_parameters_survive_the_way_through_an_array() -> None:
    params = ALWAYS.sample(np.random.default_rng(4), 3)
    again = IntensityParams.from_array(params.to_array())
    for name, values in vars(params).items():
        np.testing.assert_array_equal(vars(again)[name], values)
        assert vars(again)[name].dtype == np.float32
    assert again.noise_seed.max() < 2**24  # whole numbers below are exact in float32


def test_draws_and_results_depend_on_the_generator_alone() -> None:
    image = image_of(5, 2, *SHAPE)
    one, two, other = (ALWAYS.sample(np.random.default_rng(seed), 2) for seed in (5, 5, 6))
    torch.manual_seed(1)
    first = applied(one, image)
    torch.manual_seed(2)
    np.testing.assert_array_equal(first, applied(two, image))
    assert not np.array_equal(first, applied(other, image))


def test_channels_get_different_noise() -> None:
    params = ALWAYS.sample(np.random.default_rng(0), 2)
    noisy = only(2, noise_std=params.noise_std, noise_seed=params.noise_seed)
    assert params.noise_std[0] == params.noise_std[1]
    noise = applied(noisy, np.zeros((2, *SHAPE), np.float32))
    assert abs(np.corrcoef(noise.reshape(2, -1))[0, 1]) < 0.2


@pytest.mark.parametrize(
    ("augmentation", "low_resolution"),
    [(IntensityAugmentation.nnunet(), 0.125), (IntensityAugmentation.voco(), 0.05)],
)
def test_draws_have_the_stated_probabilities_and_ranges(
    augmentation: IntensityAugmentation, low_resolution: float
) -> None:
    drawn = augmentation.sample_batch(np.random.default_rng(0), 20_000, 1)
    changed = (drawn.to_array() != IntensityParams.identity(20_000, 1).to_array()).mean((0, 1))
    expected = [0.1, 0.1, 0.1, 0.1, 0.15, 0.15, *[low_resolution] * 3, 0.1, 0.3]
    np.testing.assert_allclose(np.delete(changed, 1), expected, atol=0.01)  # 1: the noise's seed
    for values, low, high in (
        (drawn.noise_std, 0.0, 0.1),
        (drawn.blur_sigma[drawn.blur_sigma > 0], 0.5, 1.0),
        (drawn.brightness, 0.75, 1.25),
        (drawn.contrast, 0.75, 1.25),
        (drawn.zoom, 0.5, 1.0),
        (drawn.gamma, 0.7, 1.5),
    ):
        assert low <= values.min() < low + 0.01 * (high - low) + 1e-6
        assert high - 0.01 * (high - low) < values.max() <= high
    gamma = drawn.gamma[drawn.gamma != 1]
    assert (gamma < 1).mean() == pytest.approx(0.5, abs=0.02)  # not the share of the range below 1


def test_nndetections_list_has_its_probabilities_and_blurs_evenly() -> None:
    drawn = IntensityAugmentation.nndetection().sample_batch(np.random.default_rng(0), 20_000, 2)
    changed = drawn.to_array() != IntensityParams.identity(20_000, 2).to_array()
    noise, _, blur, _, _, brightness, contrast, zoom, _, _, inverted, gamma = changed.mean((0, 1))
    found = [noise, blur, brightness, contrast, zoom, inverted, gamma]
    np.testing.assert_allclose(found, [0.1, 0.1, 0.15, 0.15, 0.0, 0.1, 0.3], atol=0.01)
    both = changed.any(axis=1).mean(axis=0)  # blur: of a channel, the others: of the image
    assert both[2] == pytest.approx(0.2 * 0.75, abs=0.01)
    np.testing.assert_allclose(both[[0, 5, 6, 10, 11]], [0.1, 0.15, 0.15, 0.1, 0.3], atol=0.01)
    sigma = drawn.blur_sigma[drawn.blur_sigma[..., 0] > 0]
    assert (sigma == sigma[:, :1]).all()
    assert 0.5 <= sigma.min() < 0.51
    assert 0.99 < sigma.max() <= 1.0
    more = IntensityAugmentation.nndetection_more()
    assert (more.low_resolution_probability, more.low_resolution_zoom) == (0.25, (0.5, 1.0))


def test_only_no_augmentation_changes_nothing() -> None:
    assert IntensityAugmentation.none().changes_nothing
    assert not IntensityAugmentation.nndetection().changes_nothing
    never = IntensityAugmentation.none().model_copy(
        update={"blur_probability": 1.0, "blur_channel_probability": 0.0}
    )
    assert never.changes_nothing


@pytest.mark.parametrize(
    ("params", "name", "settings_of_peer"),
    [
        (only(brightness=[1.2]), "brightness_multiplicative", {"multiplier_range": (1.2, 1.2)}),
        (only(contrast=[0.8]), "contrast", {"contrast_range": lambda: 0.8}),
        (only(contrast=[1.25]), "contrast", {"contrast_range": lambda: 1.25}),
        (only(gamma=[1.4]), "gamma", {"gamma_range": (1.4, 1.4), "retain_stats": True}),
        (
            only(inverted_gamma=[1.4]),
            "gamma",
            {"gamma_range": (1.4, 1.4), "retain_stats": True, "invert_image": True},
        ),
    ],
    ids=["brightness", "contrast below 1", "contrast above 1", "gamma", "inverted gamma"],
)
def test_transforms_give_the_values_of_batchgenerators(
    params: IntensityParams, name: str, settings_of_peer: dict[str, object]
) -> None:
    peer = pytest.importorskip("batchgenerators.augmentations.color_augmentations")
    image = image_of(11, 1, *SHAPE)
    expected = getattr(peer, f"augment_{name}")(
        image.astype(np.float64), per_channel=True, **settings_of_peer
    )
    np.testing.assert_allclose(applied(params, image), expected, rtol=0, atol=3e-6)


def test_noise_and_blur_are_those_of_batchgenerators() -> None:
    peer = pytest.importorskip("batchgenerators.augmentations.noise_augmentations")
    image = image_of(12, 1, 20, 20, 20)
    expected = peer.augment_gaussian_blur(image.astype(np.float64), (0.9, 0.9))
    inside = (0, *[slice(4, -4)] * 3)  # at the border there the image is mirrored
    found = applied(only(blur_sigma=[[0.9] * 3]), image)
    np.testing.assert_allclose(found[inside], expected[inside], rtol=0, atol=1e-6)
    assert np.abs(found - expected).max() < 0.5
    # "noise_variance" there is used as the deviation
    theirs = peer.augment_gaussian_noise(np.zeros((1, 40, 40, 40)), noise_variance=(0.08, 0.08))
    ours = applied(only(noise_std=[0.08], noise_seed=[3]), np.zeros((1, 40, 40, 40), np.float32))
    for noise in (theirs, ours):
        assert noise.std() == pytest.approx(0.08, rel=0.02)
        assert abs(noise.mean()) < 2e-3


def test_only_the_named_axes_lose_resolution() -> None:
    flat = ALWAYS.model_copy(update={"low_resolution_axes": (1, 2)})
    zoom = flat.sample(np.random.default_rng(0), 4).zoom
    assert (zoom[:, 0] == 1).all()
    np.testing.assert_array_equal(zoom[:, 1], zoom[:, 2])
    assert (zoom[:, 1] < 1).all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 4), (4, 4, 4)])
@pytest.mark.parametrize("value", [0.0, 3.7, -1e4])
def test_constant_images_stay_finite_and_constant(
    shape: tuple[int, int, int], value: float
) -> None:
    quiet = ALWAYS.model_copy(update={"noise_probability": 0.0})
    params = quiet.sample(np.random.default_rng(0), 1)
    result = applied(params, np.full((1, *shape), value, np.float32))
    expected = value * float(params.brightness[0])
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_contrast_keeps_the_range_and_gamma_the_mean_and_deviation() -> None:
    image = image_of(6, 1, *SHAPE)
    stretched = applied(only(contrast=[1.25]), image)
    assert (stretched.min(), stretched.max()) == (image.min(), image.max())
    curved = applied(only(gamma=[1.5]), image)
    assert curved.mean() == pytest.approx(image.mean(), abs=1e-6)
    assert curved.std() == pytest.approx(image.std(), abs=1e-6)
    order = np.argsort(image, axis=None)
    assert (np.diff(curved.ravel()[order]) >= 0).all()


def test_the_input_and_its_memory_layout_do_not_matter() -> None:
    image = torch.from_numpy(image_of(7, 2, 2, *SHAPE))
    before = image.clone()
    params = ALWAYS.sample_batch(np.random.default_rng(0), 2, 2)
    result = params.apply(image)
    assert torch.equal(image, before)
    again = params.apply(image.to(memory_format=torch.channels_last_3d))
    np.testing.assert_allclose(again, result, rtol=0, atol=1e-6)


def test_autocast_does_not_reach_the_transforms() -> None:
    image = torch.from_numpy(image_of(8, 1, *SHAPE))
    params = ALWAYS.sample(np.random.default_rng(0), 1)
    with torch.autocast("cpu", torch.bfloat16):
        inside = params.apply(image)
    assert torch.equal(inside, params.apply(image))


@pytest.mark.parametrize(
    "wrong",
    [
        {"noise_std": (0.2, 0.1)},
        {"gamma_exponent": (0.0, 1.0)},
        {"low_resolution_zoom": (0.5, 1.5)},
        {"blur_probability": 1.1},
        {"low_resolution_axes": (3,)},
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        IntensityAugmentation.model_validate(wrong)


def test_parameters_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="channels"):
        IntensityParams.identity(2).apply(torch.zeros(1, *SHAPE))
    with pytest.raises(ValueError, match="expected"):
        IntensityParams.from_array(np.zeros((2, COLUMNS - 1)))
