"""From a read volume to what networks see: LPS order, crop, one spacing, normalised intensities.

The order is nnDetection's: crop to non-zero voxels, resample, then normalise. Training and
prediction call the same functions, so that both see the same numbers. The image keeps its stored
type until it is resampled and is then normalised where it lies: beside the file's voxels and the
result there is at most one half-resampled volume.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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
    Resampling,
    resample_image_by,
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
    cropped = _crop(mapping.reorientation.apply_array(volume.array), mapping)
    require_finite(cropped)
    spacing_before = _crop_spacing(mapping)
    spacing = spacing_before if spacing_mm is None else spacing_mm
    shape = resampled_shape(mapping.crop_shape, spacing_before, spacing)
    if shape == mapping.crop_shape:
        image = np.array(cropped, dtype=np.float32, order="C")  # a copy: it is normalised in place
    else:
        image = resample_image_by(
            resampling, cropped, shape, spacing_mm=spacing_before, new_spacing_mm=spacing
        )
    for channel, scheme in zip(image, normalization, strict=True):
        normalize_in_place(channel, scheme)
    final = StoredToOriginal(
        original_grid=mapping.original_grid,
        reorientation=mapping.reorientation,
        crop_start=mapping.crop_start,
        crop_shape=mapping.crop_shape,
        stored_shape=shape,
    )
    return Preprocessed(image, final)


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


def _crop_spacing(mapping: StoredToOriginal) -> tuple[float, float, float]:
    # before resampling, in the order of the stored axes
    return mapping.reorientation.apply_grid(mapping.original_grid).spacing_mm


def _crop(array: NDArray[Any], mapping: StoredToOriginal) -> NDArray[Any]:
    z, y, x = mapping.crop_start
    d, h, w = mapping.crop_shape
    return array[..., z : z + d, y : y + h, x : x + w]
