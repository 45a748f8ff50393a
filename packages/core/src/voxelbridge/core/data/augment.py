"""Rotation, scaling and mirroring of patches: drawn first, then just the needed voxels are read.

    params = augmentation.sample(rng, patch_size)
    first, size = params.source_box(start)          # what to read around the patch at `start`
    image = params.apply_image(image_source)        # (C, *size) -> (C, *patch_size), trilinear
    labels = params.apply_labels(label_source)      # (*size) -> (*patch_size), nearest voxel
    boxes = params.apply_boxes(boxes, start=start)  # voxel edges of the volume -> of the patch

Without rotation and scaling every voxel is copied as it is and boxes are mirrored by S - x.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, PositiveFloat, model_validator

from voxelbridge.core.config import Config
from voxelbridge.core.data.patches import Start
from voxelbridge.core.data.sampling_grid import Affine, gather_linear, gather_nearest, reach_of

Triple = tuple[int, int, int]
Fraction = Annotated[float, Field(ge=0, le=1)]
Angle = Annotated[float, Field(ge=0, le=180)]

FLAT_PATCH = 3.0  # longest edge over the z edge from which a patch counts as a stack of slices


class SpatialAugmentation(Config):
    """How patches are rotated, scaled and mirrored; the defaults are nnU-Net v2's.

    Angles are in voxel space, as there, about the z, y and x axis: uniform in +-
    `rotation_degrees`.
    `scale_range` is the length of source voxels that a patch voxel spans: above 1 shows more of the
    volume, smaller; one factor for all axes. With `in_plane`, a patch is turned about z alone
    (+- `in_plane_degrees`) and scaled along y and x alone; "auto" does so for patches whose longest
    edge is more than three times the z edge.
    """

    rotation_probability: Fraction = 0.2
    rotation_degrees: tuple[Angle, Angle, Angle] = (30.0, 30.0, 30.0)  # about z, y, x
    in_plane: Literal["auto", "always", "never"] = "auto"
    in_plane_degrees: Angle = 180.0
    scale_probability: Fraction = 0.2
    scale_range: tuple[PositiveFloat, PositiveFloat] = (0.7, 1.4)
    mirror_probability: Fraction = 0.5  # of each axis on its own
    mirror_axes: tuple[Literal[0, 1, 2], ...] = (0, 1, 2)  # 0 = z

    @model_validator(mode="after")
    def _ordered(self) -> "SpatialAugmentation":
        if self.scale_range[0] > self.scale_range[1]:
            raise ValueError(
                f"scale_range {list(self.scale_range)}: the smaller factor comes first"
            )
        return self

    @classmethod
    def none(cls) -> "SpatialAugmentation":
        """Patches as they are."""
        return cls(rotation_probability=0.0, scale_probability=0.0, mirror_probability=0.0)

    @classmethod
    def moderate(cls) -> "SpatialAugmentation":
        """nnDetection's `base_mp`: smaller turns and scales than by default, more often."""
        return cls(
            rotation_probability=0.3,
            rotation_degrees=(15.0, 15.0, 15.0),
            scale_probability=0.3,
            scale_range=(0.85, 1.25),
        )

    @classmethod
    def mirroring(cls) -> "SpatialAugmentation":
        """Mirroring alone, each axis with probability 0.5."""
        return cls(rotation_probability=0.0, scale_probability=0.0)

    def sample(self, rng: np.random.Generator, patch_size: Sequence[int]) -> "SpatialParams":
        """One draw for a patch of `patch_size` (z, y, x); all randomness comes from `rng`."""
        z, y, x = patch_size
        flat = self._is_in_plane(patch_size)
        matrix = np.eye(3)
        if rng.random() < self.rotation_probability:
            limits = (self.in_plane_degrees, 0.0, 0.0) if flat else self.rotation_degrees
            matrix = rotation_matrix([rng.uniform(-limit, limit) for limit in limits])
        if rng.random() < self.scale_probability:
            scale = rng.uniform(*self.scale_range)
            matrix = matrix * np.array([1.0 if flat else scale, scale, scale])
        flips = rng.random(3) < self.mirror_probability
        mirrored = tuple(bool(flips[axis]) and axis in self.mirror_axes for axis in range(3))
        unchanged = np.array_equal(matrix, np.eye(3))
        return SpatialParams.build((z, y, x), None if unchanged else matrix, mirrored=mirrored)

    def _is_in_plane(self, patch_size: Sequence[int]) -> bool:
        match self.in_plane:
            case "auto":
                return max(patch_size) / patch_size[0] > FLAT_PATCH
            case "always":
                return True
            case "never":
                return False


@dataclass(frozen=True, eq=False)
class SpatialParams:
    """One drawn transform: where each voxel of the patch comes from.

    The point at offset p from the patch's centre shows the volume at offset `matrix @ p` from the
    centre of the patch that was placed at `start`; mirroring is part of the matrix.
    """

    patch_size: Triple
    matrix: NDArray[np.float64]  # (3, 3) offset in the patch -> offset in the volume, in voxels
    copies: bool  # nothing but mirroring: voxels are copied
    mirrored: tuple[bool, bool, bool]

    @classmethod
    def build(
        cls,
        patch_size: Triple,
        matrix: ArrayLike | None = None,
        *,
        mirrored: Sequence[bool] = (False, False, False),
    ) -> "SpatialParams":
        """From a matrix (None: identity) that acts after mirroring the patch's axes."""
        z, y, x = (bool(flip) for flip in mirrored)
        signs = np.where([z, y, x], -1.0, 1.0)
        full = (np.eye(3) if matrix is None else np.asarray(matrix, dtype=np.float64)) * signs
        return cls(patch_size, full, matrix is None, (z, y, x))

    @classmethod
    def from_array(cls, patch_size: Triple, array: ArrayLike) -> "SpatialParams":
        """The transform that gave `to_array()` for this patch size."""
        values = np.asarray(array, dtype=np.float64)
        copies, z, y, x = (bool(value) for value in values[9:])
        return cls(patch_size, values[:9].reshape(3, 3).copy(), copies, (z, y, x))

    def to_array(self) -> NDArray[np.float64]:
        """The transform as 13 numbers, for batches: matrix by rows, copies, mirrored z y x."""
        return np.array([*self.matrix.ravel(), self.copies, *self.mirrored], dtype=np.float64)

    @property
    def flipped_axes(self) -> tuple[int, ...]:
        """The mirrored axes of the patch, 0 = z."""
        return tuple(axis for axis in range(3) if self.mirrored[axis])

    @property
    def axis_aligned(self) -> bool:
        """Whether boxes stay boxes: no rotation."""
        return not np.any(self.matrix[~np.eye(3, dtype=bool)])

    def source_box(self, start: Sequence[int]) -> tuple[Start, Triple]:
        """First voxel and size of the box that `apply_image` needs, for a patch at `start`.

        It depends on `start` by a shift alone, and may reach outside the volume.
        """
        offset, size = self._reach()
        z, y, x = (int(first) + low for first, low in zip(start, offset, strict=True))
        return (z, y, x), size

    def index_map(self) -> Affine:
        """Voxel index of the patch -> voxel index of the source box."""
        last = (np.asarray(self.patch_size, dtype=np.float64) - 1) / 2
        offset, _ = self._reach()
        return Affine(self.matrix, last - self.matrix @ last - np.asarray(offset, float))

    def check_source(self, shape: Sequence[int]) -> None:
        """ValueError unless `shape` (z, y, x) is the size of `source_box`."""
        _, size = self._reach()
        if tuple(shape) != size:
            raise ValueError(f"source of shape {tuple(shape)}, source_box() says {size}")

    def apply_image(self, source: NDArray[np.float32]) -> NDArray[np.float32]:
        """The patch (C, *patch_size) from the voxels (C, *size) of `source_box`, trilinear."""
        if self.copies:
            return np.flip(source, axis=tuple(1 + axis for axis in self.flipped_axes))
        self.check_source(source.shape[1:])
        return gather_linear(source, self.index_map(), self.patch_size)

    def apply_labels(self, source: NDArray[Any]) -> NDArray[Any]:
        """The label patch (*patch_size) from the voxels (*size) of `source_box`, nearest."""
        if self.copies:
            return np.flip(source, axis=self.flipped_axes)
        self.check_source(source.shape)
        return gather_nearest(source, self.index_map(), self.patch_size)

    def apply_boxes(self, boxes: ArrayLike, *, start: Sequence[int]) -> NDArray[np.float64]:
        """Boxes (N, 6) of the volume in voxel edges of the patch at `start`, not yet cut by it.

        Exact without rotation. A rotated box is the tight box of the rotated ellipsoid that is
        inscribed in it: the corners of a lesion's box are empty, and the box of the rotated corners
        would be up to 1.7 times too long.
        """
        edges = np.asarray(boxes, dtype=np.float64).reshape(-1, 2, 3) - np.asarray(start, float)
        size = np.asarray(self.patch_size, dtype=np.float64)
        if self.copies:
            flip = np.asarray(self.mirrored)
            low = np.where(flip, size - edges[:, 1], edges[:, 0])
            high = np.where(flip, size - edges[:, 0], edges[:, 1])
            return np.concatenate([low, high], axis=1)
        centre, half = self._ellipsoids(edges)
        return np.concatenate([centre - half, centre + half], axis=1)

    def draw_ellipsoids(self, boxes: ArrayLike, *, start: Sequence[int]) -> NDArray[np.bool_]:
        """Which voxels (*patch_size) have their centre in an ellipsoid inscribed in a box (N, 6).

        The ellipsoids are those of the volume, seen through the transform.
        """
        mask = np.zeros(self.patch_size, dtype=bool)
        edges = np.asarray(boxes, dtype=np.float64).reshape(-1, 2, 3) - np.asarray(start, float)
        centre, half = self._ellipsoids(edges)
        for row, radii in enumerate((edges[:, 1] - edges[:, 0]) / 2):
            low = np.clip(np.floor(centre[row] - half[row]), 0, self.patch_size).astype(int)
            high = np.clip(np.ceil(centre[row] + half[row]), 0, self.patch_size).astype(int)
            axes = [np.arange(a, b) + 0.5 for a, b in zip(low, high, strict=True)]
            points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1) - centre[row]
            distance = np.linalg.norm(points @ self.matrix.T / radii, axis=-1)
            z, y, x = (slice(a, b) for a, b in zip(low, high, strict=True))
            mask[z, y, x] |= distance <= 1.0
        return mask

    def keep_inside(self, start: Sequence[int], box: ArrayLike) -> Start:
        """`start` moved as little as needed for the object of `box` (6,) to lie in the patch whole.

        Along an axis of the patch on which the object is larger than the patch nothing moves. The
        patch may then leave the volume a little.
        """
        z, y, x = (int(first) for first in start)
        if self.copies:
            return z, y, x
        low, high = np.split(self.apply_boxes(box, start=start)[0], 2)
        size = np.asarray(self.patch_size, dtype=np.float64)
        move = np.minimum(low, 0.0) + np.maximum(high - size, 0.0)
        move[high - low > size] = 0.0
        shift = np.rint(self.matrix @ move).astype(int)
        return z + int(shift[0]), y + int(shift[1]), x + int(shift[2])

    def _ellipsoids(
        self, edges: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Centres and half sizes (N, 3) in the patch, from edges (N, 2, 3) relative to `start`."""
        inverse = np.linalg.inv(self.matrix)
        middle = np.asarray(self.patch_size, dtype=np.float64) / 2
        centre = (edges.mean(axis=1) - middle) @ inverse.T + middle
        radii = (edges[:, 1] - edges[:, 0]) / 2
        return centre, np.sqrt(radii**2 @ (inverse**2).T)

    def _reach(self) -> tuple[Triple, Triple]:
        """First voxel of the source box relative to the patch's start, and its size."""
        if self.copies:
            return (0, 0, 0), self.patch_size
        return reach_of(self.matrix, self.patch_size)


def rotation_matrix(degrees: Sequence[float]) -> NDArray[np.float64]:
    """Matrix (3, 3) of a patch turned about z, y and x by `degrees`, for vectors (z, y, x).

    A quarter turn about an axis shows what `np.rot90` gives in the plane of the other two.
    """
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(np.asarray(degrees, dtype=np.float64))):
        first, second = (other for other in range(3) if other != axis)
        turn = np.eye(3)
        turn[[first, second], [first, second]] = np.cos(angle)
        turn[first, second], turn[second, first] = np.sin(angle), -np.sin(angle)
        matrix = matrix @ turn
    return matrix
