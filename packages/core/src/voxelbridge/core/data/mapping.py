"""How a stored array lies in the file it came from: reorientation, crop, resampling; both ways."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from voxelbridge.core.data.volume import (
    FloatArray,
    Grid,
    Reorientation,
    Shape,
    reorientation_to_lps,
)


@dataclass(frozen=True, eq=False)
class StoredToOriginal:
    """The exact mapping between a stored grid and the grid of the original file.

    original file -> `reorientation` (LPS order) -> crop of `crop_shape` at `crop_start` (voxels,
    z y x) -> resampling over equal outer edges to `stored_shape`.
    """

    original_grid: Grid
    reorientation: Reorientation
    crop_start: Shape
    crop_shape: Shape
    stored_shape: Shape

    @classmethod
    def build(
        cls,
        original_grid: Grid,
        *,
        crop_box: Sequence[int] | None = None,
        stored_shape: Sequence[int] | None = None,
    ) -> "StoredToOriginal":
        """The mapping of a case brought to LPS, cropped and resampled (None = not done).

        `crop_box` holds six voxel edges in the LPS order.
        """
        reorientation = reorientation_to_lps(original_grid)
        whole = (0, 0, 0, *reorientation.target_shape)
        z0, y0, x0, z1, y1, x1 = (int(edge) for edge in (whole if crop_box is None else crop_box))
        crop_shape = (z1 - z0, y1 - y0, x1 - x0)
        dz, dy, dx = crop_shape if stored_shape is None else (int(n) for n in stored_shape)
        return cls(original_grid, reorientation, (z0, y0, x0), crop_shape, (dz, dy, dx))

    @property
    def stored_grid(self) -> Grid:
        """The grid of the stored array."""
        reoriented = self.reorientation.apply_grid(self.original_grid)
        return reoriented.cropped(self.crop_start, self.crop_shape).resampled(self.stored_shape)

    def boxes_to_original(self, boxes: ArrayLike) -> FloatArray:
        """Boxes (N, 6) in stored voxel edges -> voxel edges of the original file."""
        edges = _rows(boxes) * self._scale() + np.tile(self.crop_start, 2)
        return self.reorientation.inverse().apply_boxes(edges)

    def boxes_to_stored(self, boxes: ArrayLike) -> FloatArray:
        """Boxes (N, 6) in voxel edges of the original file -> stored voxel edges (not clipped)."""
        edges = self.reorientation.apply_boxes(_rows(boxes))
        return (edges - np.tile(self.crop_start, 2)) / self._scale()

    def to_json(self) -> dict[str, Any]:
        return {
            "original_grid": self.original_grid.to_json(),
            "reorientation": self.reorientation.to_json(),
            "crop_start": list(self.crop_start),
            "crop_shape": list(self.crop_shape),
            "stored_shape": list(self.stored_shape),
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "StoredToOriginal":
        shapes = (_triple(content[key]) for key in ("crop_start", "crop_shape", "stored_shape"))
        return cls(
            Grid.from_json(content["original_grid"]),
            Reorientation.from_json(content["reorientation"]),
            *shapes,
        )

    def _scale(self) -> FloatArray:
        # original voxels per stored voxel
        return np.tile(np.asarray(self.crop_shape, float) / np.asarray(self.stored_shape, float), 2)


def _rows(boxes: ArrayLike) -> FloatArray:
    return np.asarray(boxes, dtype=np.float64).reshape(-1, 6)


def _triple(values: Sequence[int]) -> Shape:
    z, y, x = (int(n) for n in values)
    return z, y, x
