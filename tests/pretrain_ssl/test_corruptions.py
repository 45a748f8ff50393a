"""Corruptions against the plain way: loops over windows and cuboids, numpy.interp, float64."""

from collections.abc import Sequence
from itertools import combinations
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from voxelbridge.pretrain_ssl.corruptions.bezier import bend, draw_control_points, draw_direction
from voxelbridge.pretrain_ssl.corruptions.intensity import (
    MAX_SAMPLED,
    IntensityRange,
    patch_limits,
    unit_limits,
)
from voxelbridge.pretrain_ssl.corruptions.noise import draw_seed, random_bits, uniform
from voxelbridge.pretrain_ssl.corruptions.painting import (
    MARGIN,
    MAX_CUBOIDS,
    Paint,
    draw_cuboids,
    draw_paint,
    paint_noise,
    painted,
)
from voxelbridge.pretrain_ssl.corruptions.shuffling import draw_windows, no_windows, shuffle

SHAPES = st.tuples(*[st.integers(1, 24)] * 3)


def slow_bits(seed: NDArray[np.int32], count: int) -> NDArray[np.uint32]:
    low, high = seed.view(np.uint32)
    x = np.arange(count, dtype=np.uint32) ^ low
    x = (x ^ (x >> np.uint32(17))) * np.uint32(0xED5AD4BB) ^ high
    x = (x ^ (x >> np.uint32(11))) * np.uint32(0xAC4C1B51)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x31848BAB)
    return x ^ (x >> np.uint32(14))


def slow_noise(seed: NDArray[np.int32], count: int) -> NDArray[np.float64]:
    return (slow_bits(seed, count) >> np.uint32(8)) / 2.0**24


def slow_shuffle(
    image: NDArray[np.float32], windows: NDArray[np.int16], seed: NDArray[np.int32]
) -> NDArray[np.float32]:
    """The original's loop: every window permutes the clean image and overwrites."""
    volumes = windows[:, 3:].astype(int).prod(axis=1)
    keys = slow_bits(seed, int(volumes.sum()))
    keys >>= np.uint32(1 + len(windows).bit_length())
    result, first = image.copy(), 0
    for (z, y, x, depth, height, width), volume in zip(windows.astype(int), volumes, strict=True):
        order = np.argsort(keys[first : first + volume], kind="stable")
        first += volume
        box = (slice(z, z + depth), slice(y, y + height), slice(x, x + width))
        for clean, spoiled in zip(image, result, strict=True):
            spoiled[box] = clean[box].reshape(-1)[order].reshape(depth, height, width)
    return result


def slow_curve(
    points: NDArray[np.float32], direction: int, knots: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The original: samples of the curve, both axes sorted or x alone."""
    t = np.linspace(0, 1, knots)
    (x1, y1), (x2, y2) = points.astype(np.float64)
    x = 3 * (1 - t) * t**2 * x1 + 3 * (1 - t) ** 2 * t * x2 + (1 - t) ** 3  # from (1, 1) to (0, 0)
    y = 3 * (1 - t) * t**2 * y1 + 3 * (1 - t) ** 2 * t * y2 + (1 - t) ** 3
    return np.sort(x), (np.sort(y) if direction > 0 else y)


def slow_painted(paint: int, cuboids: NDArray[np.int16], shape: Sequence[int]) -> NDArray[np.bool_]:
    inside = np.zeros(shape, dtype=bool)
    for z, y, x, depth, height, width in cuboids.astype(int):
        inside[z : z + depth, y : y + height, x : x + width] = True
    return {Paint.NONE: np.zeros(shape, dtype=bool), Paint.INSIDE: inside, Paint.OUTSIDE: ~inside}[
        Paint(paint)
    ]


def batched(values: Sequence[Any] | NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(value) for value in values]))


def unit_range(batch: int, channels: int) -> IntensityRange:
    return IntensityRange.from_limits(batched([unit_limits(channels)] * batch))


# ------------------------------------------------------------------------------------- noise


def test_random_bits_equal_the_plain_hash() -> None:
    seeds = [draw_seed(np.random.default_rng(number)) for number in range(3)]
    bits = random_bits(batched(seeds), 1000).numpy()
    for row, seed in zip(bits, seeds, strict=True):
        np.testing.assert_array_equal(row.view(np.uint32), slow_bits(seed, 1000))


def test_noise_is_uniform_and_differs_between_seeds() -> None:
    seeds = batched([[1, 0], [2, 0], [1, 1], [-(2**31), 2**31 - 1]]).int()
    noise = uniform(seeds, 200_000).double()
    assert noise.min() >= 0
    assert noise.max() < 1
    histogram = torch.stack([torch.histc(row, 20, 0, 1) for row in noise])
    assert (histogram - 10_000).abs().max() < 500  # 5 standard deviations
    centred = noise - 0.5
    correlation = centred @ centred.T / 200_000 * 12
    assert (correlation - torch.eye(4)).abs().max() < 0.015
    neighbours = (centred[:, 1:] * centred[:, :-1]).mean(dim=1) * 12
    assert neighbours.abs().max() < 0.015


def test_a_seed_gives_no_number_twice() -> None:
    assert len(random_bits(torch.tensor([[5, -7]]).int(), 100_000)[0].unique()) == 100_000


# --------------------------------------------------------------------------------- intensity


def test_limits_are_percentiles_of_each_channel() -> None:
    rng = np.random.default_rng(0)
    patch = rng.standard_normal((2, 12, 16, 20)).astype(np.float32)
    patch[1] *= 3
    expected = np.percentile(patch.reshape(2, -1), (0.5, 99.5), axis=1).T
    np.testing.assert_allclose(patch_limits(patch, 0.5), expected, rtol=1e-6)
    extremes = np.stack([patch.min(axis=(1, 2, 3)), patch.max(axis=(1, 2, 3))], axis=1)
    np.testing.assert_array_equal(patch_limits(patch, 0), extremes)


def test_limits_of_a_large_patch_come_from_voxels_spread_over_all_axes() -> None:
    extents = (48, 64, 64)
    assert np.prod(extents) > 2 * MAX_SAMPLED
    for axis in range(3):
        ramp = np.linspace(0, 100, extents[axis], dtype=np.float32)
        shape = [1] * 4
        shape[axis + 1] = -1
        patch = np.ascontiguousarray(np.broadcast_to(ramp.reshape(shape), (1, *extents)))
        np.testing.assert_allclose(patch_limits(patch, 10)[0], [10, 90], atol=2)


def test_limits_of_a_constant_patch_have_a_width() -> None:
    patch = np.full((1, 4, 4, 4), 7, dtype=np.float32)
    np.testing.assert_array_equal(patch_limits(patch, 0.5), [[6.5, 7.5]])


def test_limits_of_a_mostly_constant_patch_are_its_extremes() -> None:
    patch = np.zeros((1, 10, 10, 10), dtype=np.float32)
    patch[0, 0, 0, :2] = (-3, 5)
    np.testing.assert_array_equal(patch_limits(patch, 0.5), [[-3, 5]])


@pytest.mark.parametrize("percentile", [0.0, 0.5])
@pytest.mark.parametrize(
    ("value", "step", "peak"),
    [
        (1e8, 0.0, 0.0),  # 1e8 +- 0.5 are one float32
        (-3e38, 0.0, 0.0),
        (-0.3, 3e-8, 1000.0),  # a background but for rounding, and 1 voxel in 1,000
        (0.0, 1e-42, 1000.0),
    ],
)
def test_rounding_is_no_range(percentile: float, value: float, step: float, peak: float) -> None:
    values = np.full(1000, value, dtype=np.float32)
    values[::2] += np.float32(step)
    values[7] += np.float32(peak)
    patch = values.reshape(1, 10, 10, 10)
    low, high = patch_limits(patch, percentile)[0].tolist()
    assert (low <= patch).all()
    assert (patch <= high).all()
    assert np.float32(high) - np.float32(low) >= max(0.5, peak, 1e-6 * abs(value))
    within = IntensityRange.from_limits(torch.tensor([[[low, high]]]))
    there = within.to_unit(batched(patch[None]))
    assert there.isfinite().all()
    np.testing.assert_allclose(within.from_unit(there)[0], patch, rtol=1e-6, atol=1e-3)


def test_range_there_and_back_is_the_identity() -> None:
    image = torch.randn(2, 2, 4, 5, 6)
    limits = torch.tensor([[[-1, 2], [0, 1]], [[-3, 3], [2, 2.5]]])
    within = IntensityRange.from_limits(limits)
    torch.testing.assert_close(within.from_unit(within.to_unit(image)), image)
    corners = within.to_unit(limits.view(2, 2, 1, 1, 2))
    torch.testing.assert_close(corners, torch.tensor([0.0, 1.0]).expand(2, 2, 1, 1, 2))


# ------------------------------------------------------------------------------------ Bezier


def bent_ramp(points: NDArray[np.float32], direction: int, values: Tensor) -> NDArray[np.float64]:
    image = values.view(1, 1, 1, 1, -1)
    bent = bend(
        image,
        batched([points]),
        torch.tensor([direction], dtype=torch.int8),
        within=unit_range(1, 1),
        keep_tails=False,
    )
    return bent.flatten().double().numpy()


@given(seed=st.integers(0, 10_000), direction=st.sampled_from([-1, 1]))
@settings(deadline=None, max_examples=30)
def test_curve_is_within_1e_6_of_the_original_one(seed: int, direction: int) -> None:
    points = draw_control_points(np.random.default_rng(seed))
    values = torch.linspace(0, 1, 5001)
    bent = bent_ramp(points, direction, values)
    # both are polylines, and where they are steep a step of 1e-6 along x is a large one along y
    x, y = slow_curve(points, direction, 100_000)
    one, other = (np.interp(values.double().numpy() + step, x, y) for step in (-1e-6, 1e-6))
    assert (bent >= np.minimum(one, other) - 1e-6).all()
    assert (bent <= np.maximum(one, other) + 1e-6).all()


@pytest.mark.parametrize("direction", [-1, 1])
def test_curve_equals_interpolation_between_the_same_knots(direction: int) -> None:
    values = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    for seed in range(10):
        points = draw_control_points(np.random.default_rng(seed))
        x, y = (axis.astype(np.float32) for axis in slow_curve(points, direction, 4096))
        expected = np.interp(values.double().numpy(), x, y)
        np.testing.assert_allclose(
            bent_ramp(points, direction, values), expected, rtol=0, atol=1e-6
        )


@pytest.mark.parametrize(
    "points", [[[0, 0], [0, 0]], [[1, 1], [1, 1]], [[1, 0], [0, 1]], [[0, 1], [1, 0]], [[0, 1]] * 2]
)
@pytest.mark.parametrize("direction", [-1, 1])
def test_curve_is_monotone_from_end_to_end(points: list[list[int]], direction: int) -> None:
    values = torch.linspace(0, 1, 20_001)
    bent = bent_ramp(np.array(points, dtype=np.float32), direction, values)
    assert (np.diff(bent) * direction >= -1e-6).all()
    ends = (0, 1) if direction > 0 else (1, 0)
    assert (bent[0], bent[-1]) == pytest.approx(ends, abs=1e-6)


def test_decreasing_curve_is_the_increasing_one_from_the_other_end() -> None:
    points = draw_control_points(np.random.default_rng(3))
    turned = 1 - points[::-1]  # the curve turned by 180 degrees
    values = torch.linspace(0, 1, 1001)
    falling = bent_ramp(points, -1, values)
    rising = bent_ramp(points, 1, values)
    x, y = slow_curve(points, 1, 100_000)
    np.testing.assert_allclose(rising, np.interp(values, x, y), atol=1e-4)
    _, y_turned = slow_curve(turned, 1, 100_000)
    np.testing.assert_allclose(falling, 1 - np.interp(values, x, y_turned), atol=1e-4)


def test_tails_go_on_with_slope_one_and_the_range_maps_onto_itself() -> None:
    limits = torch.tensor([[[-1.0, 3.0]]] * 2)
    image = torch.tensor([-2.0, -1.0, 3.0, 7.0]).expand(2, 1, 1, 1, 4)
    points = torch.rand(2, 2, 2)
    direction = torch.tensor([1, -1], dtype=torch.int8)
    within = IntensityRange.from_limits(limits)
    kept = bend(image, points, direction, within=within, keep_tails=True)
    clamped = bend(image, points, direction, within=within, keep_tails=False)
    torch.testing.assert_close(kept[0].flatten(), torch.tensor([-2.0, -1.0, 3.0, 7.0]))
    torch.testing.assert_close(kept[1].flatten(), torch.tensor([4.0, 3.0, -1.0, -5.0]))
    torch.testing.assert_close(clamped[0].flatten(), torch.tensor([-1.0, -1.0, 3.0, 3.0]))
    torch.testing.assert_close(clamped[1].flatten(), torch.tensor([3.0, 3.0, -1.0, -1.0]))


def test_samples_of_a_batch_are_bent_by_their_own_curves_and_ranges() -> None:
    rng = np.random.default_rng(0)
    image = batched(rng.standard_normal((3, 2, 4, 5, 6)).astype(np.float32))
    points = batched([draw_control_points(rng) for _ in range(3)])
    direction = torch.tensor([1, 0, -1], dtype=torch.int8)
    limits = batched([patch_limits(sample.numpy(), 5.0) for sample in image])
    together = bend(
        image, points, direction, within=IntensityRange.from_limits(limits), keep_tails=True
    )
    for number in range(3):
        one = slice(number, number + 1)
        within = IntensityRange.from_limits(limits[one])
        alone = bend(image[one], points[one], direction[one], within=within, keep_tails=True)
        assert torch.equal(together[one], alone)
    assert torch.equal(together[1], image[1])


def test_half_of_nine_in_ten_curves_fall() -> None:
    rng = np.random.default_rng(0)
    directions = [draw_direction(rng, probability=0.9, decreasing_share=0.5) for _ in range(20_000)]
    counts = [directions.count(direction) / 20_000 for direction in (-1, 0, 1)]
    assert counts == pytest.approx([0.45, 0.1, 0.45], abs=0.015)


# --------------------------------------------------------------------------------- shuffling


@given(shape=SHAPES, channels=st.integers(1, 2), count=st.integers(1, 40), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_shuffling_equals_the_loop_over_windows(
    shape: tuple[int, int, int], channels: int, count: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((2, channels, *shape)).astype(np.float32)
    windows, seeds = large_windows(rng, shape, count=2 * count).reshape(2, count, 6), []
    for sample in range(2):
        seeds.append(draw_seed(rng))
        windows[sample, : count // 4] = 0  # some empty ones
    shuffled = shuffle(batched(image), batched(windows), batched(seeds))
    for sample in range(2):
        expected = slow_shuffle(image[sample], windows[sample], seeds[sample])
        np.testing.assert_array_equal(shuffled[sample].numpy(), expected)


def large_windows(
    rng: np.random.Generator, shape: tuple[int, int, int], *, count: int
) -> NDArray[np.int16]:
    """Windows of any size that fits, so that small patches show something."""
    edges = rng.integers(1, np.minimum(shape, 7), (count, 3), endpoint=True)
    starts = rng.integers(0, np.array(shape) - edges, endpoint=True)
    return np.concatenate([starts, edges], axis=1).astype(np.int16)


def test_shuffling_as_in_training_equals_the_loop_over_windows() -> None:
    rng = np.random.default_rng(0)
    image = rng.standard_normal((1, 32, 48, 40)).astype(np.float32)
    windows, seed = draw_windows(rng, image.shape[1:], count=10_000), draw_seed(rng)
    shuffled = shuffle(batched([image]), batched([windows]), batched([seed]))
    np.testing.assert_array_equal(shuffled[0].numpy(), slow_shuffle(image, windows, seed))


def test_a_window_is_permuted_uniformly() -> None:
    image = torch.arange(4.0).view(2, 2).repeat(1, 6000).view(1, 1, 1, 2, 12_000)
    windows = [[0, 0, 2 * number, 1, 2, 2] for number in range(6000)]
    shuffled = shuffle(image, torch.tensor([windows]), torch.tensor([[4, 2]]).int())
    rows = shuffled.view(2, 6000, 2).transpose(0, 1).reshape(6000, 4)
    assert torch.equal(rows.sort(dim=1).values, torch.arange(4.0).expand(6000, 4))
    _, counts = rows.unique(dim=0, return_counts=True)
    assert len(counts) == 24
    assert (counts - 250).abs().max() < 80  # 5 standard deviations


def test_channels_are_shuffled_alike() -> None:
    rng = np.random.default_rng(0)
    image = torch.randn(1, 1, 20, 20, 20).repeat(1, 2, 1, 1, 1)
    windows = batched([draw_windows(rng, (20, 20, 20), count=500)])
    shuffled = shuffle(image, windows, batched([draw_seed(rng)]))
    assert torch.equal(shuffled[:, 0], shuffled[:, 1])
    assert not torch.equal(shuffled, image)


def test_no_windows_shuffle_nothing() -> None:
    image = torch.randn(2, 1, 20, 20, 20)
    seeds = torch.zeros(2, 2, dtype=torch.int32)
    shuffled = shuffle(image, batched([no_windows(10)] * 2), seeds)
    assert torch.equal(shuffled, image)
    assert shuffled.data_ptr() != image.data_ptr()


@given(shape=st.tuples(*[st.integers(1, 200)] * 3), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_windows_lie_inside_and_reach_every_size(shape: tuple[int, int, int], seed: int) -> None:
    windows = draw_windows(np.random.default_rng(seed), shape, count=2000)
    starts, edges = windows[:, :3], windows[:, 3:]
    assert windows.shape == (2000, 6)
    assert (starts >= 0).all()
    assert (starts + edges <= shape).all()
    assert (edges.min(axis=0) == 1).all()
    assert (edges.max(axis=0) == np.maximum(1, np.array(shape) // 10)).all()


def test_windows_touch_all_borders() -> None:
    windows = draw_windows(np.random.default_rng(0), (30, 40, 50), count=5000)
    assert (windows[:, :3].min(axis=0) == 0).all()
    assert ((windows[:, :3] + windows[:, 3:]).max(axis=0) == (30, 40, 50)).all()


def original_moved_share(extent: int, draw: Random) -> float:
    """Share of voxels that the original's loop over 10,000 windows moves."""
    clean = np.arange(extent**3).reshape(extent, extent, extent)
    result = clean.copy()
    for _ in range(10_000):
        edges = [draw.randint(1, extent // 10) for _ in range(3)]
        starts = [draw.randint(0, extent - edge) for edge in edges]
        box = tuple(slice(start, start + edge) for start, edge in zip(starts, edges, strict=True))
        window = clean[box].reshape(-1).tolist()
        draw.shuffle(window)
        result[box] = np.reshape(window, edges)
    return float((result != clean).mean())


def test_shuffling_moves_the_stated_share_of_the_voxels() -> None:
    rng = np.random.default_rng(0)
    image = torch.arange(64.0**3).view(1, 1, 64, 64, 64)
    shares = []
    for _ in range(5):
        windows = batched([draw_windows(rng, (64, 64, 64), count=10_000)])
        shuffled = shuffle(image, windows, batched([draw_seed(rng)]))
        shares.append((shuffled != image).double().mean().item())
    assert np.mean(shares) == pytest.approx(0.74, abs=0.02)
    assert np.mean(shares) == pytest.approx(original_moved_share(64, Random(0)), rel=0.01)


# ---------------------------------------------------------------------------------- painting


@given(shape=SHAPES, channels=st.integers(1, 2), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_painting_equals_the_loop_over_cuboids(
    shape: tuple[int, int, int], channels: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    kinds = [Paint.NONE, Paint.INSIDE, Paint.OUTSIDE]
    image = rng.standard_normal((3, channels, *shape)).astype(np.float32)
    cuboids = [draw_cuboids(rng, shape, kind, probability=0.95) for kind in kinds]
    seeds = [draw_seed(rng) for _ in kinds]
    limits = rng.standard_normal((3, channels, 2)).astype(np.float32)
    limits.sort(axis=2)
    spoiled = paint_noise(
        batched(image),
        torch.tensor(kinds, dtype=torch.int8),
        batched(cuboids),
        batched(seeds),
        within=IntensityRange.from_limits(batched(limits)),
    )
    for sample, kind in enumerate(kinds):
        noise = slow_noise(seeds[sample], channels * int(np.prod(shape))).reshape(channels, *shape)
        low, high = limits[sample].T[..., None, None, None]
        replaced = slow_painted(kind, cuboids[sample], shape)
        expected = np.where(replaced, low + (high - low) * noise, image[sample])
        np.testing.assert_allclose(spoiled[sample].numpy(), expected, rtol=0, atol=1e-6)
        kept = ~np.broadcast_to(replaced, image[sample].shape)
        np.testing.assert_array_equal(spoiled[sample].numpy()[kept], image[sample][kept])


@given(
    shape=st.tuples(*[st.integers(1, 100)] * 3),
    kind=st.sampled_from([Paint.INSIDE, Paint.OUTSIDE]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_cuboids_have_the_stated_sizes_and_lie_inside(
    shape: tuple[int, int, int], kind: Paint, seed: int
) -> None:
    cuboids = draw_cuboids(np.random.default_rng(seed), shape, kind, probability=0.95).astype(int)
    count = int(np.count_nonzero(cuboids[:, 3]))
    assert cuboids.shape == (MAX_CUBOIDS, 6)
    assert not cuboids[count:].any()
    extent, starts, edges = np.array(shape), cuboids[:count, :3], cuboids[:count, 3:]
    if kind is Paint.INSIDE:
        smallest = np.maximum(1, extent // 6)
        assert (edges >= smallest).all()
        assert (edges <= np.maximum(smallest, extent // 3)).all()
    else:
        assert count >= 1
        assert (extent - edges >= 3 * extent // 7).all()
        assert (extent - edges <= 4 * extent // 7).all()
    margin = np.minimum(MARGIN, (extent - edges) // 2)
    assert (starts >= margin).all()
    assert (starts + edges + margin <= extent).all()


def test_number_of_cuboids_follows_the_probability_of_going_on() -> None:
    rng = np.random.default_rng(0)
    for kind, least in ((Paint.INSIDE, 0), (Paint.OUTSIDE, 1)):
        draws = [draw_cuboids(rng, (64, 64, 64), kind, probability=0.7) for _ in range(4000)]
        counts = np.array([np.count_nonzero(draw[:, 3]) for draw in draws]) - least
        most = MAX_CUBOIDS - least
        expected = [0.3 * 0.7**number for number in range(most)] + [0.7**most]
        shares = np.bincount(counts, minlength=most + 1) / len(counts)
        np.testing.assert_allclose(shares, expected, atol=0.03)


def union_shares(cuboids: NDArray[np.int16], extent: int) -> NDArray[np.float64]:
    """Share of a patch of `extent`^3 in the union of its cuboids (draws, K, 6), exactly."""
    first = cuboids[..., :3].astype(np.float64)
    last = first + cuboids[..., 3:]
    total = np.zeros(len(cuboids))
    for size in range(1, cuboids.shape[1] + 1):
        for chosen in combinations(range(cuboids.shape[1]), size):
            members = list(chosen)
            edges = last[:, members].min(axis=1) - first[:, members].max(axis=1)
            total += (-1) ** (size + 1) * np.maximum(edges, 0).prod(axis=1)
    return total / extent**3


def drawn_shares(kind: Paint, draws: int) -> NDArray[np.float64]:
    rng = np.random.default_rng(1)
    cuboids = [draw_cuboids(rng, (64, 64, 64), kind, probability=0.95) for _ in range(draws)]
    return union_shares(np.stack(cuboids), 64)


def test_share_of_a_union_equals_counted_voxels() -> None:
    rng = np.random.default_rng(0)
    kinds = [Paint.INSIDE, Paint.OUTSIDE] * 3
    cuboids = batched([draw_cuboids(rng, (64,) * 3, kind, probability=0.95) for kind in kinds])
    replaced = painted(torch.tensor(kinds), cuboids, (64, 64, 64)).double().mean(dim=(1, 2, 3))
    shares = torch.from_numpy(union_shares(cuboids.numpy(), 64))
    expected = torch.where(torch.tensor(kinds) == Paint.OUTSIDE, 1 - shares, shares)
    torch.testing.assert_close(replaced, expected)


def original_shares(kind: Paint, draws: int) -> NDArray[np.float64]:
    """The same of the original's cuboids in 64^3."""
    draw = Random(2)
    cuboids = np.zeros((draws, MAX_CUBOIDS, 6), dtype=np.int16)
    for row in cuboids:
        for number in range(MAX_CUBOIDS):
            if (number > 0 or kind is Paint.INSIDE) and draw.random() >= 0.95:
                break
            if kind is Paint.INSIDE:
                edges = [draw.randint(64 // 6, 64 // 3) for _ in range(3)]
            else:
                edges = [64 - draw.randint(3 * 64 // 7, 4 * 64 // 7) for _ in range(3)]
            row[number] = [draw.randint(3, 64 - edge - 3) for edge in edges] + edges
    return union_shares(cuboids, 64)


@pytest.mark.parametrize(("kind", "stated"), [(Paint.INSIDE, 0.05), (Paint.OUTSIDE, 0.32)])
def test_cuboids_cover_the_stated_share_of_the_voxels(kind: Paint, stated: float) -> None:
    share = drawn_shares(kind, 8000).mean()  # in-painting replaces it, out-painting keeps it
    assert share == pytest.approx(stated, abs=0.02)
    assert share == pytest.approx(original_shares(kind, 8000).mean(), rel=0.02)


def test_most_painted_patches_are_painted_outside() -> None:
    rng = np.random.default_rng(0)
    kinds = [draw_paint(rng, probability=0.9, outpaint_share=0.8) for _ in range(20_000)]
    shares = [kinds.count(kind) / 20_000 for kind in Paint]
    assert shares == pytest.approx([0.1, 0.18, 0.72], abs=0.015)
