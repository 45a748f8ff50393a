"""Intensities bent by a random monotone curve (Models Genesis, arXiv 1908.06912, section 3.1).

The curve is a cubic Bezier from (0, 0) to (1, 1) whose two control points are uniform in the unit
square, so x and y only rise along it. A decreasing curve gives the y values the other way round.
"""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from voxelbridge.pretrain_ssl.corruptions.intensity import IntensityRange

KNOTS = 2**12  # a power of 2; straight pieces between them deviate from the curve by less than 1e-7

Direction = Literal[-1, 0, 1]  # decreasing curve, none, increasing curve


def draw_direction(
    rng: np.random.Generator, *, probability: float, decreasing_share: float
) -> Direction:
    """Whether a patch is bent, and which way."""
    is_bent, is_decreasing = rng.random() < probability, rng.random() < decreasing_share
    return (-1 if is_decreasing else 1) if is_bent else 0


def draw_control_points(rng: np.random.Generator) -> NDArray[np.float32]:
    """The two inner control points (x, y) of a curve, (2, 2) in [0, 1)."""
    return rng.random((2, 2), dtype=np.float32)


def bend(
    image: Tensor, points: Tensor, direction: Tensor, *, within: IntensityRange, keep_tails: bool
) -> Tensor:
    """A copy of `image` (B, C, D, H, W) with bent intensities.

    `points` (B, 2, 2), `direction` (B,), see `Direction`; samples of direction 0 stay as they are.
    The curve maps the range `within` onto itself. Values outside go on from its ends with slope 1
    (-1 for a decreasing curve), or count as its ends without `keep_tails`.
    """
    values = within.to_unit(image)
    inside = values.clamp(0, 1)
    bent = _interpolate(inside.flatten(1), *curve(points, direction)).view_as(image)
    where = direction.view(-1, 1, 1, 1, 1)
    if keep_tails:
        bent.add_(values.sub_(inside).mul_(where))
    return torch.where(where != 0, within.from_unit(bent), image)


def curve(points: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Points x and y of each curve with x rising from 0 to 1; two of (B, KNOTS) float32."""
    t = torch.linspace(0, 1, KNOTS, dtype=torch.float64, device=points.device)
    first, second, last = 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3
    inner = points.double()[..., None]  # (B, 2, 2, 1)
    # cummax: rounding must not make a flat piece fall
    x, y = (
        (inner[:, 0, axis] * first + inner[:, 1, axis] * second + last).cummax(dim=1).values
        for axis in (0, 1)
    )
    y = torch.where(direction[:, None] < 0, y.flip(1), y)
    return x.float(), y.float()


def _interpolate(values: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Values (B, N) in [0, 1] on the polylines (B, K), in float32."""
    run, rise = x.diff(dim=1), y.diff(dim=1)
    slope = torch.where(run > 0, rise / run, 0.0)
    start = torch.where(run > 0, y[:, :-1], y[:, 1:])  # a steep end may have no width in float32
    pieces = slope.shape[1]
    piece = _last_not_above(x, values).clamp_(max=pieces - 1)
    piece += pieces * torch.arange(len(x), dtype=torch.int32, device=x.device)[:, None]
    piece = piece.flatten()
    left, low, slope = (
        table.flatten().index_select(0, piece).view_as(values)
        for table in (x[:, :-1], start, slope)
    )
    return low.addcmul_(values - left, slope)


def _last_not_above(x: Tensor, values: Tensor) -> Tensor:
    """Number of the last of the rising knots x (B, K) that is <= each value; (B, N) int32.

    K is a power of 2; 0 where no knot is. A search by halves for all values at once: voxels come
    in no order, and on a CPU torch.searchsorted takes twice as long.
    """
    table, step = x.flatten(), x.shape[1] // 2
    first = x.shape[1] * torch.arange(len(x), dtype=torch.int32, device=x.device)[:, None]
    found = first.repeat(1, values.shape[1])
    while step:
        knots = table.index_select(0, (found + step).flatten()).view_as(values)
        found += (knots <= values).int().mul_(step)
        step //= 2
    return found - first
