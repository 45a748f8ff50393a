"""What a method makes of a patch, as panels of a picture: slices side by side, or overlaps.

    Picture("slices", (slice_panel("image", image), slice_panel("visible", image, hidden)))

A panel's voxel is hidden where its value is NaN. `pictures` draws them.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Panel:
    """One image of a picture: values (H, W), NaN where a voxel is hidden."""

    name: str
    values: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Picture:
    """Slices in grey with one window, or overlaps 0 .. 1 of target (rows) and base crops."""

    kind: Literal["slices", "overlap"]
    panels: tuple[Panel, ...]


def slice_panel(
    name: str, volume: Tensor | NDArray[Any], hidden: Tensor | NDArray[Any] | None = None
) -> Panel:
    """The middle z slice of the first channel of (C, D, H, W) on any device, in float32.

    `hidden` (D, H, W), True = masked out, becomes NaN.
    """
    middle = volume.shape[1] // 2
    values = _to_numpy(volume[0, middle]).astype(np.float32)  # a copy: the volume stays as it is
    if hidden is not None:
        values[_to_numpy(hidden[middle]).astype(bool)] = np.nan
    return Panel(name, values)


def _to_numpy(values: Tensor | NDArray[Any]) -> NDArray[Any]:
    if isinstance(values, Tensor):
        values = values.detach()
        return (values if values.dtype == torch.bool else values.float()).cpu().numpy()
    return np.asarray(values)
