"""From a read volume to what networks see: LPS order, crop, one spacing, normalised intensities.

The order is nnDetection's: crop to non-zero voxels, resample, then normalise. Training and
prediction call the same functions, so that both see the same numbers. The image keeps its stored
type until it is resampled and is then normalised where it lies: beside the file's voxels and the
result there is at most one half-resampled volume. `preprocess_channel` takes one channel at a time
and writes to any array, also to a mapped file.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from voxelbridge.core.data.foreground import nonzero_box
from voxelbridge.core.data.mapping import StoredToOriginal
from voxelbridge.core.data.normalize import (
    CTPercentile,
    ZScore,
    normalize_in_place,
    require_finite,
)
from voxelbridge.core.data.resample import (
    IN_MEMORY,
    Resampling,
    Workspace,
    nearest_image_axis,
    resample_into,
    resample_labels_by,
    resampled_shape,
)
from voxelbridge.core.data.volume import Volume, reorientation_to_lps

DEFAULT_RESAMPLING = Resampling()


@dataclass(frozen=True, eq=False)
class Preprocessed:
    """A normalised image (C, D, H, W) float32 and its exact relation to the original file."""

    image: NDArray[np.float32]
    mapping: StoredToOriginal


def crop_mapping(volume: Volume, *, boxes: ArrayLike = ()) -> StoredToOriginal:
    """LPS order and the crop to voxels other than 0, widened to hold `boxes` (N, 6).

    `boxes` are in voxel edges of the file. An image of zeros keeps its whole extent.
    """
    reorientation = reorientation_to_lps(volume.grid)
    crop = nonzero_box(reorientation.apply_array(volume.array)).astype(np.int64)
    objects = reorientation.apply_boxes(np.asarray(boxes, dtype=np.float64).reshape(-1, 6))
    if len(objects):
        limit = np.asarray(reorientation.target_shape)
        low = np.floor(objects[:, :3].min(axis=0)).astype(np.int64)
        high = np.ceil(objects[:, 3:].max(axis=0)).astype(np.int64)
        crop[:3] = np.clip(np.minimum(crop[:3], low), 0, limit)
        crop[3:] = np.clip(np.maximum(crop[3:], high), 0, limit)
    return StoredToOriginal.build(volume.grid, crop_box=[int(edge) for edge in crop])


def preprocess(
    volume: Volume,
    mapping: StoredToOriginal,
    *,
    spacing_mm: Sequence[float] | None,
    normalization: Sequence[ZScore | CTPercentile],
    resampling: Resampling = DEFAULT_RESAMPLING,
) -> Preprocessed:
    """`volume` cropped as `mapping` says, at `spacing_mm` (None: its own), one scheme per channel.

    `volume` is left as it is. Raises DataError for NaN or infinite voxels.
    """
    if len(normalization) != len(volume.array):
        raise ValueError(f"{len(normalization)} schemes for {len(volume.array)} channels")
    require_finite(_crop(mapping.reorientation.apply_array(volume.array), mapping))
    final = at_spacing(mapping, spacing_mm)
    image = np.empty((len(volume.array), *final.stored_shape), dtype=np.float32)
    for source, target, scheme in zip(volume.array, image, normalization, strict=True):
        preprocess_channel(
            source, target, final,
            spacing_mm=spacing_mm, normalization=scheme, resampling=resampling,
        )  # fmt: skip
    return Preprocessed(image, final)


def at_spacing(mapping: StoredToOriginal, spacing_mm: Sequence[float] | None) -> StoredToOriginal:
    """`mapping` with the stored shape that `spacing_mm` (z, y, x; None: its own) gives."""
    before = _crop_spacing(mapping)
    after = before if spacing_mm is None else spacing_mm
    shape = resampled_shape(mapping.crop_shape, before, after)
    return replace(mapping, stored_shape=shape)


def preprocess_channel(
    source: NDArray[Any],
    target: NDArray[np.float32],
    mapping: StoredToOriginal,
    *,
    spacing_mm: Sequence[float] | None,
    normalization: ZScore | CTPercentile,
    resampling: Resampling = DEFAULT_RESAMPLING,
    workspace: Workspace = IN_MEMORY,
) -> None:
    """What `preprocess` makes of one channel (D, H, W) of the file, written to `target`.

    `mapping` is what `at_spacing` gave and `target` contiguous and of its stored shape. Raises
    DataError for NaN or infinite voxels.
    """
    cropped = _crop(mapping.reorientation.apply_array(source), mapping)
    require_finite(cropped)
    before = _crop_spacing(mapping)
    after = before if spacing_mm is None else spacing_mm
    axis = nearest_image_axis(resampling, before, after)
    resample_into(target, cropped, nearest_axis=axis, workspace=workspace)
    normalize_in_place(_Slices(target, workspace), normalization)


def labels_to_stored(
    labels: NDArray[Any],
    mapping: StoredToOriginal,
    *,
    resampling: Resampling = DEFAULT_RESAMPLING,
    spacing_mm: Sequence[float] | None = None,
) -> NDArray[Any]:
    """A label map (D, H, W) on the file's grid, brought to the stored grid of `mapping`.

    `resampling` and `spacing_mm` are those that `preprocess` got; nnU-Net's rule looks at the
    spacing (None: that of the stored grid), the nearest voxel does not.
    """
    cropped = _crop(mapping.reorientation.apply_array(labels), mapping)
    return resample_labels_by(
        resampling,
        cropped,
        mapping.stored_shape,
        spacing_mm=_crop_spacing(mapping),
        new_spacing_mm=mapping.stored_grid.spacing_mm if spacing_mm is None else spacing_mm,
    )


@dataclass(frozen=True)
class _Slices:
    """The slices of a volume, one after the other; the workspace hears of each."""

    array: NDArray[np.float32]
    workspace: Workspace

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        for plane in self.array:
            yield plane
            self.workspace.wrote(plane.nbytes)


def _crop_spacing(mapping: StoredToOriginal) -> tuple[float, float, float]:
    # before resampling, in the order of the stored axes
    return mapping.reorientation.apply_grid(mapping.original_grid).spacing_mm


def _crop(array: NDArray[Any], mapping: StoredToOriginal) -> NDArray[Any]:
    z, y, x = mapping.crop_start
    d, h, w = mapping.crop_shape
    return array[..., z : z + d, y : y + h, x : x + w]
