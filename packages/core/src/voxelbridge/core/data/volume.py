"""Grids, volumes and boxes in voxel edges; any orientation to LPS and back, exactly.

Voxel i of an axis covers the edges [i, i + 1); its centre is edge coordinate i + 0.5, and the
affine maps voxel *centres* (array indices), so an edge point is mapped at `edge - 0.5`.
World coordinates are LPS: x grows to the patient's left, y to the back, z to the head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
Shape = tuple[int, int, int]  # voxels (z, y, x)

GRID_TOLERANCE = 0.1  # of the smallest spacing: boxes do not feel a shift of a tenth of a voxel
TIE_DECIMALS = 6  # direction cosines that agree to this count as equal when axes are chosen


@dataclass(frozen=True, eq=False)
class Grid:
    """Where an array lies in the patient: its shape and the affine from index to LPS mm.

    `affine` (3, 4) float64 maps (z, y, x, 1) of a voxel centre to world (x, y, z) in mm. It may
    hold any orientation, oblique axes and left-handed axis orders. Read-only after construction.
    """

    shape: Shape
    affine: FloatArray

    def __post_init__(self) -> None:
        shape = tuple(int(n) for n in self.shape)
        affine = np.array(self.affine, dtype=np.float64)
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"grid shape must be three positive integers, got {self.shape}")
        if affine.shape != (3, 4) or not np.isfinite(affine).all():
            raise ValueError(f"grid affine must be 3x4 and finite, got {affine}")
        lengths = np.linalg.norm(affine[:, :3], axis=0)
        if lengths.min() == 0 or abs(np.linalg.det(affine[:, :3] / lengths)) < 1e-6:
            raise ValueError("grid affine is singular: two axes coincide or a spacing is zero")
        affine.setflags(write=False)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "affine", affine)

    @classmethod
    def from_parts(
        cls,
        shape: Sequence[int],
        spacing_mm: Sequence[float],
        *,
        directions: ArrayLike | None = None,
        origin_mm: Sequence[float] = (0.0, 0.0, 0.0),
    ) -> "Grid":
        """Grid from shape and spacing (z, y, x); `origin_mm` is the world (x, y, z) of voxel 0.

        `directions` (3, 3) holds the unit vectors (world x, y, z) of the array axes z, y, x in its
        columns; without it the array is in LPS order.
        """
        columns = np.eye(3)[:, ::-1] if directions is None else np.asarray(directions, float)
        affine = np.empty((3, 4))
        affine[:, :3] = columns * np.asarray(spacing_mm, float)
        affine[:, 3] = origin_mm
        return cls(_as_shape(shape), affine)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance of neighbouring voxel centres along the array axes (z, y, x)."""
        z, y, x = np.linalg.norm(self.affine[:, :3], axis=0)
        return float(z), float(y), float(x)

    @property
    def directions(self) -> FloatArray:
        """Unit vectors (world x, y, z) of the array axes z, y, x, in the columns of a (3, 3)."""
        return self.affine[:, :3] / np.linalg.norm(self.affine[:, :3], axis=0)

    @property
    def origin_mm(self) -> tuple[float, float, float]:
        """World (x, y, z) of the centre of voxel (0, 0, 0)."""
        x, y, z = self.affine[:, 3]
        return float(x), float(y), float(z)

    def cropped(self, start: Sequence[int], shape: Sequence[int]) -> "Grid":
        """Grid of the sub-array that begins at index `start` (z, y, x); it may reach outside."""
        affine = self.affine.copy()
        affine[:, 3] += affine[:, :3] @ np.asarray(start, float)
        return Grid(_as_shape(shape), affine)

    def resampled(self, shape: Sequence[int]) -> "Grid":
        """Grid of another shape over the same outer edges: edges scale by the shape ratio."""
        scale = np.asarray(self.shape, float) / np.asarray(shape, float)
        affine = self.affine.copy()
        affine[:, :3] *= scale
        # voxel centre 0.5 of the new grid lies at edge 0.5 * scale of the old one
        affine[:, 3] += self.affine[:, :3] @ (0.5 * scale - 0.5)
        return Grid(_as_shape(shape), affine)

    def max_offset_mm(self, other: "Grid") -> float:
        """Largest distance between equal corners of two grids; infinite if their shapes differ."""
        if self.shape != other.shape:
            return float("inf")
        corners = np.array(list(product(*((0.0, n) for n in self.shape))))
        difference = edges_to_world(corners, self) - edges_to_world(corners, other)
        return float(np.linalg.norm(difference, axis=1).max())

    def agrees_with(self, other: "Grid", *, tolerance: float = GRID_TOLERANCE) -> bool:
        """Whether all corners coincide within `tolerance` of the smallest spacing."""
        return self.max_offset_mm(other) <= tolerance * min(self.spacing_mm)

    def to_json(self) -> dict[str, Any]:
        """JSON object with exact floats; read back by `from_json`."""
        return {"shape": list(self.shape), "affine": self.affine.tolist()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Grid":
        return cls(_as_shape(content["shape"]), np.asarray(content["affine"], dtype=np.float64))


@dataclass(frozen=True, eq=False)
class Volume:
    """An image in memory: array (C, D, H, W) in z, y, x order and the grid of its voxels."""

    array: NDArray[Any]
    grid: Grid

    def __post_init__(self) -> None:
        if self.array.ndim != 4 or self.array.shape[1:] != self.grid.shape:
            raise ValueError(
                f"volume array {self.array.shape} must be (C, D, H, W) on grid {self.grid.shape}"
            )


@dataclass(frozen=True)
class Reorientation:
    """A change of array axis order: transpose by `permutation`, then flip where `flips` is True.

    New axis a is old axis `permutation[a]`; `flips` belongs to the new axes. Exact for arrays,
    grids and boxes; no value is interpolated and no coordinate is rounded.
    """

    source_shape: Shape
    permutation: tuple[int, int, int]
    flips: tuple[bool, bool, bool]

    @property
    def target_shape(self) -> Shape:
        z, y, x = (self.source_shape[axis] for axis in self.permutation)
        return z, y, x

    def apply_array(self, array: NDArray[Any]) -> NDArray[Any]:
        """View of (..., D, H, W) in the new order; leading axes are left alone."""
        if array.shape[-3:] != self.source_shape:
            raise ValueError(f"array {array.shape} does not end in {self.source_shape}")
        lead = array.ndim - 3
        moved = array.transpose(*range(lead), *(lead + axis for axis in self.permutation))
        steps = tuple(slice(None, None, -1 if flip else 1) for flip in self.flips)
        return moved[(..., *steps)]

    def apply_grid(self, grid: Grid) -> Grid:
        if grid.shape != self.source_shape:
            raise ValueError(f"grid {grid.shape} is not the source {self.source_shape}")
        affine = grid.affine.copy()
        affine[:, :3] = grid.affine[:, list(self.permutation)]
        for axis, (flip, size) in enumerate(zip(self.flips, self.target_shape, strict=True)):
            if flip:
                affine[:, 3] += affine[:, axis] * (size - 1)
                affine[:, axis] *= -1.0
        return Grid(self.target_shape, affine)

    def apply_volume(self, volume: Volume) -> Volume:
        return Volume(self.apply_array(volume.array), self.apply_grid(volume.grid))

    def apply_boxes(self, boxes: ArrayLike) -> FloatArray:
        """Boxes (N, 6) in edges of the source array -> edges of the new array (flip is S - x)."""
        edges = _as_boxes(boxes).reshape(-1, 2, 3)[:, :, list(self.permutation)].copy()
        for axis, (flip, size) in enumerate(zip(self.flips, self.target_shape, strict=True)):
            if flip:
                edges[:, :, axis] = size - edges[:, ::-1, axis]
        return edges.reshape(-1, 6)

    def inverse(self) -> "Reorientation":
        """The reorientation that undoes this one bit by bit."""
        z, y, x = (self.permutation.index(axis) for axis in range(3))
        return Reorientation(
            self.target_shape, (z, y, x), (self.flips[z], self.flips[y], self.flips[x])
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "source_shape": list(self.source_shape),
            "permutation": list(self.permutation),
            "flips": list(self.flips),
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Reorientation":
        z, y, x = (int(axis) for axis in content["permutation"])
        fz, fy, fx = (bool(flip) for flip in content["flips"])
        return cls(_as_shape(content["source_shape"]), (z, y, x), (fz, fy, fx))


def reorientation_to_lps(grid: Grid) -> Reorientation:
    """The axis order in which indices z, y, x grow to the head, the back and the left.

    Oblique grids keep their direction matrix; only their axes are reordered. Of the six
    permutations the one with the largest sum of |direction cosines| along the matched world axes
    is taken, cosines rounded to 6 decimals; among equals the first in lexicographic order, that is
    the one nearest to the file's own order. An axis is flipped when its cosine is negative. The
    rule is always a permutation, and a reordered grid is reordered no further.
    """
    cosines = np.round(grid.directions[::-1], TIE_DECIMALS)  # rows: world z, y, x; columns: axes
    z, y, x = max(
        permutations(range(3)),
        key=lambda order: round(sum(abs(cosines[w, a]) for w, a in enumerate(order)), 5),
    )  # max keeps the first of equals
    fz, fy, fx = (bool(cosines[world, axis] < 0) for world, axis in enumerate((z, y, x)))
    return Reorientation(grid.shape, (z, y, x), (fz, fy, fx))


def match_grid(volume: Volume, grid: Grid) -> Volume | None:
    """`volume` in the axis order of `grid`, or None when the two are not the same voxels."""
    if volume.grid.agrees_with(grid):
        return volume
    canonical = reorientation_to_lps(volume.grid).apply_volume(volume)
    matched = reorientation_to_lps(grid).inverse()
    if canonical.grid.shape != matched.source_shape:
        return None
    candidate = matched.apply_volume(canonical)
    return candidate if candidate.grid.agrees_with(grid) else None


def edges_to_world(edges: ArrayLike, grid: Grid) -> FloatArray:
    """Edge points (..., 3) in (z, y, x) -> LPS mm (..., 3) in (x, y, z)."""
    points = np.asarray(edges, dtype=np.float64) - 0.5
    return points @ grid.affine[:, :3].T + grid.affine[:, 3]


def world_to_edges(points_mm: ArrayLike, grid: Grid) -> FloatArray:
    """LPS mm (..., 3) in (x, y, z) -> edge points (..., 3) in (z, y, x)."""
    centred = np.asarray(points_mm, dtype=np.float64) - grid.affine[:, 3]
    return centred @ np.linalg.inv(grid.affine[:, :3]).T + 0.5


def box_corners_to_world(boxes: ArrayLike, grid: Grid) -> FloatArray:
    """Boxes (N, 6) in voxel edges -> their eight corners (N, 8, 3) in LPS mm."""
    return edges_to_world(_corners(_as_boxes(boxes)), grid)


def boxes_to_world_mm(boxes: ArrayLike, grid: Grid) -> FloatArray:
    """Boxes (N, 6) in voxel edges -> (cx, cy, cz, wx, wy, wz): the world-aligned box around each.

    Exact where the grid's axes are world axes; around an oblique box it is larger than the box.
    """
    corners = box_corners_to_world(boxes, grid)  # (N, 8, 3)
    low, high = corners.min(axis=1), corners.max(axis=1)
    return np.concatenate([(low + high) / 2, high - low], axis=1)


def boxes_from_world_mm(boxes_mm: ArrayLike, grid: Grid) -> FloatArray:
    """World-aligned boxes (cx, cy, cz, wx, wy, wz) in LPS mm -> tight boxes (N, 6) in voxel edges.

    The result encloses the eight transformed corners, and may reach outside the grid.
    """
    boxes = _as_boxes(boxes_mm)
    ends = np.concatenate(
        [boxes[:, :3] - boxes[:, 3:] / 2, boxes[:, :3] + boxes[:, 3:] / 2], axis=1
    )
    edges = world_to_edges(_corners(ends), grid)  # (N, 8, 3)
    return np.concatenate([edges.min(axis=1), edges.max(axis=1)], axis=1)


def _corners(boxes: FloatArray) -> FloatArray:
    pick = np.array(list(product((0, 3), (1, 4), (2, 5))))  # (8, 3)
    return boxes[:, pick]  # (N, 8, 3)


def _as_boxes(boxes: ArrayLike) -> FloatArray:
    array = np.asarray(boxes, dtype=np.float64)
    if array.size == 0:
        return np.zeros((0, 6))
    if array.ndim != 2 or array.shape[1] != 6:
        raise ValueError(f"boxes must be (N, 6), got {array.shape}")
    return array


def _as_shape(shape: Sequence[int]) -> Shape:
    z, y, x = (int(n) for n in shape)
    return z, y, x
