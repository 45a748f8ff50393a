"""From a volume to the stored array: order of operations, axes, crop, settings, memory."""

import tracemalloc

import numpy as np
import pytest
from skimage.transform import resize

from voxelbridge.core.data import resample
from voxelbridge.core.data.label_interpolation import resample_labels_linear
from voxelbridge.core.data.normalize import CTPercentile, ZScore, normalize
from voxelbridge.core.data.preprocess import crop_mapping, labels_to_stored, preprocess
from voxelbridge.core.data.resample import Resampling, resample_image, resample_labels
from voxelbridge.core.data.volume import Grid, Volume
from voxelbridge.core.errors import DataError

CT = CTPercentile(lower=-100.0, upper=200.0, mean=20.0, std=40.0)


def _volume(
    shape: tuple[int, int, int] = (6, 10, 12),
    spacing: tuple[float, float, float] = (2.0, 1.0, 1.0),
    *,
    channels: int = 1,
    dtype: type = np.int16,
) -> Volume:
    array = np.random.default_rng(0).normal(30, 80, size=(channels, *shape)).astype(dtype)
    array[array == 0] = 1
    return Volume(array, Grid.from_parts(shape, spacing))


def test_image_is_cropped_then_resampled_then_normalised() -> None:
    volume = _volume()
    volume.array[:, :1] = volume.array[:, :, :2] = volume.array[:, :, :, -3:] = 0
    mapping = crop_mapping(volume)
    assert mapping.crop_start == (1, 2, 0)
    assert mapping.crop_shape == (5, 8, 9)
    got = preprocess(volume, mapping, spacing_mm=(1.0, 1.0, 2.0), normalization=[CT])
    cropped = volume.array[0, 1:, 2:, :-3].astype(float)
    resampled = np.asarray(
        resize(cropped, (10, 8, 4), order=3, mode="edge", anti_aliasing=False, clip=True)
    )
    expected = (np.clip(resampled, CT.lower, CT.upper) - CT.mean) / CT.std
    np.testing.assert_allclose(got.image[0], expected, atol=1e-4)
    assert got.mapping.stored_shape == (10, 8, 4)
    assert got.image.flags.c_contiguous


@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.float64, np.uint8])
@pytest.mark.parametrize("spacing_mm", [None, (2.0, 1.0, 1.0), (1.0, 1.5, 1.5)])
def test_the_volume_is_left_as_it_is(
    dtype: type, spacing_mm: tuple[float, float, float] | None
) -> None:
    volume = _volume(dtype=dtype)
    before = volume.array.copy()
    got = preprocess(volume, crop_mapping(volume), spacing_mm=spacing_mm, normalization=[ZScore()])
    assert np.array_equal(volume.array, before)
    assert got.image.dtype == np.float32
    assert abs(float(got.image.mean())) < 1e-5
    if spacing_mm is None:
        assert np.array_equal(got.image[0], normalize(volume.array[0], ZScore()))


def test_each_channel_has_its_own_scheme() -> None:
    volume = _volume(channels=2)
    got = preprocess(volume, crop_mapping(volume), spacing_mm=None, normalization=[ZScore(), CT])
    assert np.array_equal(got.image[1], normalize(volume.array[1], CT))
    with pytest.raises(ValueError, match="1 schemes for 2 channels"):
        preprocess(volume, crop_mapping(volume), spacing_mm=None, normalization=[CT])


def test_stored_axes_are_lps_and_labels_go_the_same_way() -> None:
    shape = (6, 10, 12)
    directions = np.array([[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, -1.0]])
    grid = Grid.from_parts(shape, (2.0, 1.0, 1.5), directions=directions)
    labels = np.zeros(shape, dtype=np.int16)
    labels[1:3, 4:9, 2:5] = 3
    volume = Volume((labels + 1)[None] * 100, grid)
    mapping = crop_mapping(volume)
    prepared = preprocess(volume, mapping, spacing_mm=(1.5, 1.0, 2.0), normalization=[ZScore()])
    stored = labels_to_stored(labels, prepared.mapping)
    assert prepared.mapping.stored_shape == (12, 10, 6)
    assert stored.dtype == np.int16
    assert np.array_equal(stored == 3, prepared.image[0] > 0)
    box = prepared.mapping.boxes_to_stored([[1, 4, 2, 3, 9, 5]])[0]
    where = np.argwhere(stored == 3)
    assert box.tolist() == [*where.min(axis=0), *(where.max(axis=0) + 1)]


def test_the_setting_gives_the_numbers_of_nnunet_for_image_and_labels() -> None:
    volume = _volume((6, 20, 22), (5.0, 0.6, 0.6), dtype=np.float32)
    labels = np.random.default_rng(1).integers(0, 5, size=(6, 20, 22)).astype(np.uint8)
    rule = Resampling(image="nnunet", labels="nnunet")
    spacing = (1.0, 1.0, 1.0)
    mapping = crop_mapping(volume)
    got = preprocess(volume, mapping, spacing_mm=spacing, normalization=[CT], resampling=rule)
    shape = (30, 12, 13)
    assert got.mapping.stored_shape == shape
    expected = normalize(resample_image(volume.array, shape, nearest_axis=0)[0], CT)
    assert np.array_equal(got.image[0], expected)
    stored = labels_to_stored(labels, got.mapping, resampling=rule, spacing_mm=spacing)
    assert np.array_equal(stored, resample_labels_linear(labels, shape, nearest_axis=0))
    plain = preprocess(volume, mapping, spacing_mm=spacing, normalization=[CT])
    assert not np.allclose(plain.image, got.image, atol=0.1)
    assert np.array_equal(labels_to_stored(labels, got.mapping), resample_labels(labels, shape))


def test_nan_is_counted_before_resampling_spreads_it() -> None:
    volume = _volume(dtype=np.float32)
    volume.array[0, 2, 3, 4] = np.nan
    volume.array[0, 1, 1, 1] = np.inf
    with pytest.raises(DataError, match="2 voxels"):
        preprocess(
            volume, crop_mapping(volume), spacing_mm=(1.0, 1.0, 1.0), normalization=[ZScore()]
        )


def test_one_slice_and_one_voxel_volumes_pass() -> None:
    for shape in ((1, 8, 8), (1, 1, 1), (5, 1, 3)):
        volume = _volume(shape, (4.0, 1.0, 1.0))
        got = preprocess(
            volume, crop_mapping(volume), spacing_mm=(1.0, 2.0, 0.5), normalization=[ZScore()]
        )
        assert np.isfinite(got.image).all()
        assert got.image.shape[1:] == got.mapping.stored_shape


@pytest.mark.parametrize(
    ("shape", "new_spacing"), [((16, 160, 160), (1.0, 1.0, 1.0)), ((90, 90, 90), (8.0, 2.0, 2.0))]
)
def test_working_memory_is_bounded(
    shape: tuple[int, int, int],
    new_spacing: tuple[float, float, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resample, "SLAB_BYTES", 1 << 18)
    volume = _volume(shape, (4.0, 1.0, 1.0))
    mapping = crop_mapping(volume)
    preprocess(volume, mapping, spacing_mm=new_spacing, normalization=[ZScore()])  # the matrices
    tracemalloc.start()
    got = preprocess(volume, mapping, spacing_mm=new_spacing, normalization=[ZScore()])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    d, h, w = shape
    stored = got.image.shape[1:]
    # the axis of slices goes first where it shrinks and last where it grows
    half_done = 4 * (stored[0] * h * w if stored[0] < d else d * stored[1] * stored[2])
    assert peak < got.image.nbytes + half_done + (2 << 20)
