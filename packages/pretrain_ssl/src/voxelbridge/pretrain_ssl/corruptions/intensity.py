"""The intensities of a patch that are taken for [0, 1]."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

MAX_SAMPLED = 2**16  # voxels that a percentile is taken over
LEAST_WIDTH = 1e-6  # of a range, as a share of the largest value: less is rounding


@dataclass(frozen=True, eq=False)
class IntensityRange:
    """Lowest value and width of each sample and channel's range, both (B, C, 1, 1, 1)."""

    low: Tensor
    width: Tensor

    @classmethod
    def from_limits(cls, limits: Tensor) -> "IntensityRange":
        """From lowest and highest values (B, C, 2), as `patch_limits` gives them per patch."""
        low, high = limits[..., None, None, None].unbind(2)
        return cls(low, high - low)

    def to_unit(self, image: Tensor) -> Tensor:
        """A copy of (B, C, D, H, W) with the range on [0, 1]."""
        return (image - self.low).div_(self.width)

    def from_unit(self, image: Tensor) -> Tensor:
        """Back again."""
        return self.low + image * self.width


def patch_limits(patch: NDArray[np.float32], percentile: float) -> NDArray[np.float32]:
    """Lowest and highest value that count as 0 and 1, of each channel of (C, D, H, W), (C, 2).

    The `percentile`-th and (100 - percentile)-th percentile over at most MAX_SAMPLED evenly spread
    voxels; the extremes of all voxels for 0 or where most voxels are the same but for rounding. A
    constant channel has [value - 0.5, value + 0.5], and more for values beyond a million.
    """
    channels = patch.reshape(len(patch), -1)
    return np.stack([_limits(channel, percentile) for channel in channels]).astype(np.float32)


def unit_limits(channels: int) -> NDArray[np.float32]:
    """[0, 1] for each channel, (C, 2)."""
    return np.tile(np.array([0, 1], dtype=np.float32), (channels, 1))


def _limits(values: NDArray[np.float32], percentile: float) -> NDArray[np.float32]:
    low, high = float(values.min()), float(values.max())
    least = LEAST_WIDTH * max(-low, high)
    if percentile > 0:
        sampled = values[:: _stride(values.size)]
        first, last = np.percentile(sampled, (percentile, 100 - percentile))
        if last - first > least:
            return np.array([first, last], dtype=np.float32)
    half = max(0.5, least)
    limits = [low, high] if high - low > least else [low - half, low + half]
    return np.array(limits, dtype=np.float32)


def _stride(count: int) -> int:
    """A step over `count` voxels that has no factor in common with the edges of the patch."""
    step = math.ceil(count / MAX_SAMPLED)
    while math.gcd(step, count) > 1:
        step += 1
    return step
