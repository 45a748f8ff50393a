"""Noise, blur, brightness, contrast, low resolution and gamma of patches: drawn, then applied.

    params = augmentation.sample(rng, num_channels)  # in the loader; `to_array` travels in a batch
    image = params.apply(image)                      # (C, D, H, W), on any device

One draw for many images has arrays with a further leading axis, and applies to (B, C, D, H, W).
The transforms and their order are nnU-Net's (arXiv 1809.10486, batchgeneratorsv2) and those of
nnDetection (arXiv 2106.00817, batchgenerators). Differs: noise is drawn for every channel (nnU-Net:
one pattern for all), the blur's kernel reaches 4 sigma (nnU-Net: 3) and repeats the edge (both
mirror there), low resolution is brought back linearly (nnDetection: cubic).
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor
from torch.nn.functional import interpolate, pad

from voxelbridge.core.config import Config

Fraction = Annotated[float, Field(ge=0, le=1)]
Range = tuple[PositiveFloat, PositiveFloat]
Floats = NDArray[np.float32]

COLUMNS = 12  # of `IntensityParams.to_array`, per channel

_SEEDS = 2**24  # noise seeds are below this: float32 holds them exactly
_BLUR_REACH = 4.0  # sigmas
_SMALL = 1e-7  # least range or deviation that is divided by


class IntensityAugmentation(Config):
    """How the intensities of patches are changed; the defaults are nnU-Net v2's.

    `..._probability` is drawn for an image, `..._channel_probability` then for each of its
    channels, and the values for each channel on its own (the noise's deviation for the image).
    Factors and exponents lie below and above 1 with equal probability where their range has both.
    """

    noise_probability: Fraction = 0.1
    noise_std: tuple[NonNegativeFloat, NonNegativeFloat] = (0.0, 0.1)  # nnU-Net: "variance"
    blur_probability: Fraction = 0.2
    blur_channel_probability: Fraction = 0.5
    blur_sigma: Range = (0.5, 1.0)  # voxels
    blur_isotropic: bool = False  # one sigma for all axes of a channel (nnDetection)
    brightness_probability: Fraction = 0.15
    brightness_factor: Range = (0.75, 1.25)
    contrast_probability: Fraction = 0.15
    contrast_factor: Range = (0.75, 1.25)  # of the distance from the mean; the range stays
    low_resolution_probability: Fraction = 0.25
    low_resolution_channel_probability: Fraction = 0.5
    low_resolution_zoom: Range = (0.5, 1.0)  # of the voxels along an axis, same for all axes
    low_resolution_axes: tuple[Literal[0, 1, 2], ...] = (0, 1, 2)  # 0 = z
    inverted_gamma_probability: Fraction = 0.1  # gamma of the negative image
    gamma_probability: Fraction = 0.3
    gamma_exponent: Range = (0.7, 1.5)  # of the image in [0, 1]; mean and deviation stay

    @model_validator(mode="after")
    def _ordered(self) -> "IntensityAugmentation":
        for name, value in self:
            if isinstance(value, tuple) and name != "low_resolution_axes" and value[0] > value[1]:
                raise ValueError(f"{name} {list(value)}: the smaller value comes first")
        if self.low_resolution_zoom[1] > 1:
            raise ValueError(f"low_resolution_zoom {list(self.low_resolution_zoom)}: at most 1")
        return self

    @classmethod
    def nnunet(cls) -> "IntensityAugmentation":
        """nnU-Net v2's."""
        return cls()

    @classmethod
    def nndetection(cls) -> "IntensityAugmentation":
        """nnDetection v0.1's default, `base_more`: no low resolution; blurs evenly in all axes."""
        return cls(blur_isotropic=True, low_resolution_probability=0.0)

    @classmethod
    def nndetection_more(cls) -> "IntensityAugmentation":
        """nnDetection's `more`: the default and low resolution."""
        return cls(blur_isotropic=True)

    @classmethod
    def voco(cls) -> "IntensityAugmentation":
        """nnssl's for the crops of VoCo."""
        return cls(low_resolution_probability=0.1)

    @classmethod
    def none(cls) -> "IntensityAugmentation":
        """Images as they are."""
        return cls(
            noise_probability=0.0,
            blur_probability=0.0,
            brightness_probability=0.0,
            contrast_probability=0.0,
            low_resolution_probability=0.0,
            inverted_gamma_probability=0.0,
            gamma_probability=0.0,
        )

    @property
    def changes_nothing(self) -> bool:
        """Whether no draw can change an image."""
        return not any(
            (
                self.noise_probability,
                self.blur_probability and self.blur_channel_probability,
                self.brightness_probability,
                self.contrast_probability,
                self.low_resolution_probability and self.low_resolution_channel_probability,
                self.inverted_gamma_probability,
                self.gamma_probability,
            )
        )

    def sample(self, rng: np.random.Generator, num_channels: int) -> "IntensityParams":
        """One draw for an image (C, D, H, W); all randomness comes from `rng`."""
        batch = self.sample_batch(rng, 1, num_channels).to_array()
        return IntensityParams.from_array(batch[0])

    def sample_batch(
        self, rng: np.random.Generator, num_images: int, num_channels: int
    ) -> "IntensityParams":
        """Independent draws for images (B, C, D, H, W)."""
        shape = (num_images, num_channels)
        std = np.broadcast_to(rng.uniform(*self.noise_std, size=(num_images, 1)), shape)
        zoom = np.ones((*shape, 3))
        zoom[..., list(self.low_resolution_axes)] = rng.uniform(
            *self.low_resolution_zoom, size=(*shape, 1)
        )
        sigma = rng.uniform(*self.blur_sigma, size=(*shape, 3))
        if self.blur_isotropic:
            sigma[...] = sigma[..., :1]
        seed = rng.integers(_SEEDS, size=shape)
        brightness = _factors(rng, self.brightness_factor, shape)
        contrast = _factors(rng, self.contrast_factor, shape)
        inverted_gamma = _factors(rng, self.gamma_exponent, shape)
        gamma = _factors(rng, self.gamma_exponent, shape)

        def where(probability: float, per_channel: float = 1.0) -> NDArray[np.bool_]:
            chosen = rng.random((num_images, 1)) < probability
            return chosen & (rng.random(shape) < per_channel)

        blurs = where(self.blur_probability, self.blur_channel_probability)
        coarse = where(self.low_resolution_probability, self.low_resolution_channel_probability)
        return IntensityParams(
            noise_std=_or(std, 0.0, where(self.noise_probability)),
            noise_seed=seed.astype(np.float32),
            blur_sigma=_or(sigma, 0.0, blurs[..., None]),
            brightness=_or(brightness, 1.0, where(self.brightness_probability)),
            contrast=_or(contrast, 1.0, where(self.contrast_probability)),
            zoom=_or(zoom, 1.0, coarse[..., None]),
            inverted_gamma=_or(inverted_gamma, 1.0, where(self.inverted_gamma_probability)),
            gamma=_or(gamma, 1.0, where(self.gamma_probability)),
        )


@dataclass(frozen=True, eq=False)
class IntensityParams:
    """What happens to each channel, float32, every array with the leading axes (C) or (B, C).

    A value that changes nothing (0 for noise and blur, 1 for the rest) leaves every bit as it is.
    """

    noise_std: Floats
    noise_seed: Floats  # whole numbers; the noise depends on it and on the kind of device
    blur_sigma: Floats  # (..., 3) voxels along z, y, x
    brightness: Floats
    contrast: Floats
    zoom: Floats  # (..., 3) share of the voxels kept along z, y, x
    inverted_gamma: Floats
    gamma: Floats

    @classmethod
    def identity(cls, *leading: int) -> "IntensityParams":
        """Changes nothing; `leading` is (C) or (B, C)."""
        row = np.zeros((*leading, COLUMNS), np.float32)
        row[..., 5:] = 1.0
        return cls.from_array(row)

    @classmethod
    def from_array(cls, values: ArrayLike) -> "IntensityParams":
        """From (..., C, 12), what `to_array` gave."""
        v = np.asarray(values, dtype=np.float32)
        if v.ndim < 2 or v.shape[-1] != COLUMNS:
            raise ValueError(f"expected (..., C, {COLUMNS}), got {v.shape}")
        return cls(
            v[..., 0], v[..., 1], v[..., 2:5], v[..., 5], v[..., 6], v[..., 7:10], v[..., 10],
            v[..., 11],
        )  # fmt: skip

    def to_array(self) -> Floats:
        """(..., C, 12): all fields in their order."""
        fields = [np.asarray(value, dtype=np.float32) for value in vars(self).values()]
        leading = self.noise_std.ndim
        return np.concatenate([f if f.ndim > leading else f[..., None] for f in fields], axis=-1)

    @torch.no_grad()
    def apply(self, image: Tensor) -> Tensor:
        """`image` (C, D, H, W) or (B, C, D, H, W) in float32 or float64, changed; not in place."""
        if tuple(image.shape[:-3]) != self.noise_std.shape:
            raise ValueError(
                f"image {tuple(image.shape)} for parameters of {self.noise_std.shape} channels"
            )
        # A row is a channel of an image: (N, D, H, W). Only the rows that change are computed.
        rows = image.reshape(-1, *image.shape[-3:]).clone(memory_format=torch.contiguous_format)
        p = IntensityParams.from_array(self.to_array().reshape(-1, COLUMNS))
        for row in np.flatnonzero(p.noise_std):
            rows[row] += _noise(rows[row], float(p.noise_std[row]), int(p.noise_seed[row]))
        for chosen in _rows(p.blur_sigma.max(axis=1) > 0):
            rows[chosen] = _blur(rows[chosen], p.blur_sigma[chosen])
        for chosen in _rows(p.brightness != 1):
            rows[chosen] *= _per_row(p.brightness[chosen], rows)
        for chosen in _rows(p.contrast != 1):
            rows[chosen] = _contrast(rows[chosen], _per_row(p.contrast[chosen], rows))
        for row in np.flatnonzero(p.zoom.min(axis=1) < 1):
            rows[row] = _low_resolution(rows[row], p.zoom[row])
        for chosen in _rows(p.inverted_gamma != 1):
            exponent = _per_row(p.inverted_gamma[chosen], rows)
            rows[chosen] = -_gamma(-rows[chosen], exponent)
        for chosen in _rows(p.gamma != 1):
            rows[chosen] = _gamma(rows[chosen], _per_row(p.gamma[chosen], rows))
        return rows.view(image.shape)


def _factors(
    rng: np.random.Generator, limits: tuple[float, float], shape: tuple[int, int]
) -> NDArray[np.float64]:
    """Uniform in `limits`; where 1 lies inside, below and above it with equal probability."""
    low, high = limits
    if not low < 1 < high:
        return rng.uniform(low, high, size=shape)
    below = rng.random(shape) < 0.5
    return np.where(below, rng.uniform(low, 1, size=shape), rng.uniform(1, high, size=shape))


def _or(values: ArrayLike, otherwise: float, chosen: NDArray[np.bool_]) -> Floats:
    return np.where(chosen, values, otherwise).astype(np.float32)


def _rows(chosen: NDArray[np.bool_]) -> list[NDArray[np.intp]]:
    """The chosen rows, in a list that is empty where there are none."""
    rows = np.flatnonzero(chosen)
    return [rows] if rows.size else []


def _per_row(values: Floats, rows: Tensor) -> Tensor:
    """(N,) -> (N, 1, 1, 1) beside `rows`."""
    return torch.as_tensor(values, dtype=rows.dtype, device=rows.device)[:, None, None, None]


def _noise(row: Tensor, std: float, seed: int) -> Tensor:
    generator = torch.Generator(row.device).manual_seed(seed)
    return std * torch.randn(row.shape, generator=generator, device=row.device, dtype=row.dtype)


def _blur(rows: Tensor, sigma: Floats) -> Tensor:
    """(N, D, H, W) smoothed with `sigma` (N, 3); each kernel ends at its own 4 sigma."""
    for axis in range(3):
        kernels = _kernels(sigma[:, axis])  # (N, T)
        reach = kernels.shape[1] // 2
        margins = [0] * 6
        margins[4 - 2 * axis : 6 - 2 * axis] = [reach, reach]
        padded = pad(rows[None], margins, mode="replicate")[0]
        size = rows.shape[1 + axis]
        rows = torch.zeros_like(rows)
        for tap in range(kernels.shape[1]):
            rows.addcmul_(padded.narrow(1 + axis, tap, size), _per_row(kernels[:, tap], rows))
    return rows


def _kernels(sigma: Floats) -> NDArray[np.float32]:
    """Normalised Gaussian weights (N, T) around their middle; a sigma of 0 is the identity."""
    radii = np.floor(_BLUR_REACH * sigma + 0.5)
    offsets = np.arange(-radii.max(), radii.max() + 1)
    scaled = offsets / np.maximum(sigma, _SMALL)[:, None].astype(np.float64)
    weights = np.where(np.abs(offsets) <= radii[:, None], np.exp(-0.5 * scaled**2), 0.0)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _contrast(rows: Tensor, factor: Tensor) -> Tensor:
    mean = rows.mean(dim=(1, 2, 3), keepdim=True)
    low, high = rows.amin(dim=(1, 2, 3), keepdim=True), rows.amax(dim=(1, 2, 3), keepdim=True)
    return torch.clamp((rows - mean) * factor + mean, low, high)


def _low_resolution(row: Tensor, zoom: Floats) -> Tensor:
    """(D, H, W) with fewer voxels (the nearest ones), and linearly back."""
    size = [max(1, round(edge * float(z))) for edge, z in zip(row.shape, zoom, strict=True)]
    coarse = interpolate(row[None, None], size, mode="nearest-exact")
    return interpolate(coarse, row.shape, mode="trilinear", align_corners=False)[0, 0]


def _gamma(rows: Tensor, exponent: Tensor) -> Tensor:
    """(N, D, H, W), scaled to [0, 1], to the power of `exponent`, with the mean and deviation."""
    dims = (1, 2, 3)
    low = rows.amin(dim=dims, keepdim=True)
    spread = rows.amax(dim=dims, keepdim=True) - low
    changed = ((rows - low) / spread.clamp_min(_SMALL)) ** exponent * spread + low
    mean = rows.mean(dim=dims, keepdim=True)
    std = _root_mean_square(rows - mean)  # two passes: torch.std_mean takes four times as long
    changed -= changed.mean(dim=dims, keepdim=True)
    return changed * (std / _root_mean_square(changed).clamp_min(_SMALL)) + mean


def _root_mean_square(rows: Tensor) -> Tensor:
    return rows.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
