"""Frames of one plane to a regular stack: ordered along the normal, evenly spaced, not sheared."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.data.dicom_headers import Frame
from voxelbridge.core.data.volume import FloatArray, Grid
from voxelbridge.core.errors import ConfigError

Allowance = Literal["gap", "varying_spacing", "duplicate", "mixed_geometry"]

COSINE_TOLERANCE = 1e-3
SPACING_TOLERANCE = 1e-3  # relative, in the plane
STEP_TOLERANCE = 0.05  # of the slice distance; positions rounded to 0.1 mm pass at 1.25 mm
GRID_TOLERANCE = 0.1  # of a voxel, how far a slice may lie from where the grid puts it
MAX_BRIDGED_STEPS = 3  # allowed gaps are at most two slices wide


@dataclass(frozen=True, eq=False)
class Stack:
    """Frames in the order of the grid's z axis, as a Grid.

    Slice k is frame `lower[k]` mixed with `fraction[k]` of the next one; all fractions are 0
    unless a gap or a varying distance was allowed and is bridged by linear interpolation.
    """

    frames: tuple[Frame, ...]
    grid: Grid
    lower: NDArray[np.int64]
    fraction: FloatArray


class StackError(Exception):
    """Why frames are no volume, worded to follow the name of their series."""


def check_allowances(allow: Collection[str]) -> frozenset[str]:
    """`allow` as a set, or ConfigError naming what exists."""
    unknown = sorted(set(allow) - set(get_args(Allowance)))
    if unknown:
        known = ", ".join(get_args(Allowance))
        raise ConfigError(f"allow: unknown {', '.join(unknown)}; expected some of {known}")
    return frozenset(allow)


def stack(frames: Sequence[Frame], *, allow: Collection[str] = ()) -> Stack:
    """The regular stack of frames with one plane, at different positions. Raises StackError."""
    first = frames[0]
    if all(frame.marks.kind == "localizer" for frame in frames):
        raise StackError(f"{listed([frame.name for frame in frames])} is a localizer, not a volume")
    if len({frame.rescale is None for frame in frames}) > 1:
        without = [frame for frame in frames if frame.rescale is None]
        raise StackError(
            f"{listed([frame.name for frame in without])} has no rescale slope, others have"
        )
    axes = plane_axes(first)  # (3, 3): rows x, y, normal
    positions = np.array([frame.position_mm for frame in frames]) @ axes.T  # in the plane's axes
    order = np.argsort(positions[:, 2], kind="stable")
    frames, positions = [frames[n] for n in order], positions[order]
    depths = positions[:, 2]
    _check_tilt(frames, positions)
    if len(frames) == 1:
        step = _single_step(first)
        lower, fraction = np.zeros(1, dtype=np.int64), np.zeros(1)
    else:
        lower, fraction, step = _regular_steps(frames, depths, allow)
    row_step, column_step = first.spacing_mm
    grid = Grid.from_parts(
        (len(lower), first.pixels.rows, first.pixels.columns),
        (step, row_step, column_step),
        directions=axes[::-1].T + 0.0,
        origin_mm=frames[0].position_mm,
    )
    return Stack(tuple(frames), grid, lower, fraction)


def same_plane(one: Frame, other: Frame) -> bool:
    return (
        plane_size(one) == plane_size(other)
        and np.allclose(one.spacing_mm, other.spacing_mm, rtol=SPACING_TOLERANCE, atol=0)
        and np.allclose(one.orientation, other.orientation, rtol=0, atol=COSINE_TOLERANCE)
    )


def plane_axes(frame: Frame) -> FloatArray:
    """Unit vectors along a row (x), along a column (y) and their normal, as rows of (3, 3)."""
    x, y = np.array(frame.orientation[:3]), np.array(frame.orientation[3:])
    lengths = np.linalg.norm(x), np.linalg.norm(y)
    if abs(lengths[0] - 1) > 1e-2 or abs(lengths[1] - 1) > 1e-2 or abs(x @ y) > 1e-2:
        raise StackError(f"{frame.name}: ImageOrientationPatient is not two orthogonal directions")
    x = x / lengths[0]
    y = y - (x @ y) * x
    y = y / np.linalg.norm(y)
    return np.stack([x, y, np.cross(x, y)])


def plane_size(frame: Frame) -> tuple[int, int]:
    return frame.pixels.rows, frame.pixels.columns


def listed(texts: Sequence[str], *, limit: int = 4) -> str:
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more


def hint(allowance: Allowance) -> str:
    return f" (allow: {allowance})"


def mixed_text(planes: Sequence[Sequence[Frame]]) -> str:
    """What differs between the planes of one series, and how many slices each has."""
    first = planes[0][0]
    other = next(plane[0] for plane in planes[1:])
    if plane_size(first) != plane_size(other):
        sizes = " and ".join("{}x{}".format(*plane_size(frame)) for frame in (first, other))
        what = f"mixed slice sizes ({sizes} pixels)"
    elif not np.allclose(first.orientation, other.orientation, rtol=0, atol=COSINE_TOLERANCE):
        what = "mixed orientations"
    else:
        what = "mixed pixel spacings"
    groups = [f"{len(plane)} like {plane[0].name}" for plane in planes]
    return f"{what}: {listed(groups)}" + hint("mixed_geometry")


def _check_tilt(frames: Sequence[Frame], positions: FloatArray) -> None:
    shift = np.linalg.norm(positions[:, :2] - positions[0, :2], axis=1)
    worst = int(shift.argmax())
    if shift[worst] > GRID_TOLERANCE * min(frames[0].spacing_mm):
        angle = np.degrees(np.arctan2(shift[worst], positions[worst, 2] - positions[0, 2]))
        raise StackError(
            f"gantry tilt: slices are shifted in their plane, {frames[worst].name} by "
            f"{shift[worst]:.3g} mm against {frames[0].name} ({angle:.1f} degrees); "
            "resample it to a straight grid first"
        )


def _single_step(frame: Frame) -> float:
    if frame.thickness_mm is None or frame.thickness_mm <= 0:
        raise StackError(f"one slice ({frame.name}) without SliceThickness is no volume")
    return frame.thickness_mm


def _regular_steps(
    frames: Sequence[Frame], depths: FloatArray, allow: Collection[str]
) -> tuple[NDArray[np.int64], FloatArray, float]:
    """Frame indices and fractions of evenly spaced slices, and their distance."""
    steps = np.diff(depths)
    step = float(np.percentile(steps, 50, method="lower"))
    even = (depths[-1] - depths[0]) / (len(depths) - 1)
    lattice = depths[0] + even * np.arange(len(depths))
    near = np.abs(steps - even) <= STEP_TOLERANCE * even
    if near.all() and np.abs(depths - lattice).max() <= GRID_TOLERANCE * even:
        return np.arange(len(depths)), np.zeros(len(depths)), float(even)
    regular = np.abs(steps - step) <= STEP_TOLERANCE * step
    multiple = np.rint(steps / step)
    gaps = ~regular & (multiple >= 2) & (np.abs(steps - multiple * step) <= GRID_TOLERANCE * step)
    name: Allowance = "gap" if (gaps | regular).all() and gaps.any() else "varying_spacing"
    text = (
        _gap_text(frames, gaps, multiple) if name == "gap" else _varying_text(frames, steps, step)
    )
    if name not in allow and not (name == "gap" and "varying_spacing" in allow):
        raise StackError(text + hint(name))
    if steps.max() > (MAX_BRIDGED_STEPS + GRID_TOLERANCE) * step:
        raise StackError(f"{text}; too wide to be bridged")
    count = max(2, round(float(depths[-1] - depths[0]) / step) + 1)
    targets = np.linspace(depths[0], depths[-1], count)
    lower = np.clip(np.searchsorted(depths, targets, side="right") - 1, 0, len(depths) - 2)
    fraction = (targets - depths[lower]) / (depths[lower + 1] - depths[lower])
    fraction = np.where(np.abs(fraction - np.rint(fraction)) < 1e-3, np.rint(fraction), fraction)
    return lower, fraction, float(targets[1] - targets[0])


def _gap_text(frames: Sequence[Frame], gaps: NDArray[np.bool_], multiple: FloatArray) -> str:
    places = [
        f"{int(multiple[n]) - 1} between {frames[n].name} and {frames[n + 1].name}"
        for n in np.flatnonzero(gaps).tolist()
    ]
    total = int(multiple[gaps].sum() - gaps.sum())
    noun = "slice is" if total == 1 else "slices are"
    return f"gap: {total} {noun} missing: {listed(places)}"


def _varying_text(frames: Sequence[Frame], steps: FloatArray, step: float) -> str:
    worst = int(np.abs(steps - step).argmax())
    return (
        f"varying spacing: slices are {steps.min():.4g} to {steps.max():.4g} mm apart, mostly "
        f"{step:.4g}; {steps[worst]:.4g} between {frames[worst].name} and {frames[worst + 1].name}"
    )
