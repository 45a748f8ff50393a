"""What can be wrong with a case of a raw data set, as facts that `check` lists and reading raises.

Reading a case raises the very problems that `vb-detect check` shows, so that a case which fails
the check cannot be prepared. docs/check.md explains each kind.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from voxelbridge.core.data.volume import Grid, Volume, reorientation_to_lps
from voxelbridge.core.errors import DataError

Kind = Literal[
    "box-inverted", "box-malformed", "box-outside", "case-name", "channels", "constant",
    "duplicate-case", "grid", "groups", "label-json", "label-values", "missing-label", "nan",
    "no-things", "origins", "orphan-label", "splits", "unknown-class", "unknown-label",
    "unlisted-instance", "unreadable", "vanished-instance",
]  # fmt: skip

SHOWN_PROBLEMS = 3  # in the text of one error; `RawDataError.problems` has all
RELATIVE_STEP = 1e-4  # spacings and cosines closer than this differ by rounding of the header only
ORIGIN_STEP_MM = 1e-3  # the same for origins


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong; `message` does not repeat the case's name."""

    kind: Kind
    message: str
    case_id: str | None = None


class RawDataError(DataError):
    """Raw data that cannot be used; `problems` holds every problem, the text names the first."""

    def __init__(self, text: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(text)
        self.problems = tuple(problems)

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> "RawDataError":
        shown = [problem.message for problem in problems[:SHOWN_PROBLEMS]]
        more = len(problems) - len(shown)
        return cls("; ".join(shown) + (f"; and {more} more" if more else ""), problems)


def problem(kind: Kind, message: str) -> RawDataError:
    """An error of one problem, to be raised."""
    return RawDataError.of([Problem(kind, message)])


def few_of(names: Sequence[object], *, limit: int = 5) -> str:
    """The first of `names`, and how many follow."""
    shown = ", ".join(str(name) for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def same_voxels(a: Grid, b: Grid) -> bool:
    """Whether two grids hold the same voxels, maybe in another axis order (see `match_grid`)."""
    if a.agrees_with(b):
        return True
    first, second = (reorientation_to_lps(grid).apply_grid(grid) for grid in (a, b))
    return first.agrees_with(second)


def grid_differences(a: Grid, b: Grid) -> list[str]:
    """What differs between two grids that are not the same voxels, each with both values.

    Sizes and spacings are named in array order (z, y, x), origins and directions in LPS.
    """
    found = []
    if a.shape != b.shape:
        found.append(f"size {_sizes(a.shape)} against {_sizes(b.shape)}")
    if not _close(a.spacing_mm, b.spacing_mm, RELATIVE_STEP * min(b.spacing_mm)):
        found.append(f"spacing {_steps(a.spacing_mm)} against {_steps(b.spacing_mm)} mm")
    if not _close(a.origin_mm, b.origin_mm, ORIGIN_STEP_MM):
        found.append(f"origin {_point(a.origin_mm)} against {_point(b.origin_mm)} mm")
    if not _close(a.directions, b.directions, RELATIVE_STEP):
        found.append(f"direction {_matrix(a)} against {_matrix(b)}")
    return found or [f"corners {a.max_offset_mm(b):.3g} mm apart"]


def channel_problem(channel: NDArray[Any], where: str) -> Problem | None:
    """NaN or infinite voxels of one channel (D, H, W), or that all its voxels are equal."""
    if channel.dtype.kind == "f" and not (finite := np.isfinite(channel)).all():
        nan = int(np.count_nonzero(np.isnan(channel)))
        infinite = int(channel.size - np.count_nonzero(finite)) - nan
        message = f"{where}: {nan} voxels are NaN and {infinite} infinite; correct the image"
        return Problem("nan", message)
    if (value := channel.min()) == channel.max():
        return Problem("constant", f"{where}: every voxel is {value:g}; export the image again")
    return None


def image_problems(volume: Volume) -> list[Problem]:
    """NaN and infinite voxels of any channel, and an image that is constant in every channel.

    Preprocessing refuses the first; the second holds nothing to learn from.
    """
    found = [
        wrong
        for number, channel in enumerate(volume.array)
        if (wrong := channel_problem(channel, f"channel {number}")) is not None
    ]
    constant = [wrong for wrong in found if wrong.kind == "constant"]
    return found if len(constant) == len(volume.array) else [w for w in found if w.kind == "nan"]


def _close(a: ArrayLike, b: ArrayLike, tolerance: float) -> bool:
    return bool(np.allclose(np.asarray(a), np.asarray(b), rtol=0.0, atol=tolerance))


def _sizes(shape: Sequence[int]) -> str:
    return "x".join(str(n) for n in shape)


def _steps(spacing: Sequence[float]) -> str:
    return "x".join(f"{step:.6g}" for step in spacing)


def _point(origin: Sequence[float]) -> str:
    return "(" + ", ".join(f"{x:.6g}" for x in origin) + ")"


def _matrix(grid: Grid) -> str:
    columns = (grid.directions + 0.0).T.round(4)  # one per array axis
    names = zip("zyx", columns, strict=True)
    return " ".join(f"{axis}({', '.join(f'{v:g}' for v in column)})" for axis, column in names)
