"""Intensity normalisation: z-score per image, or clipping and scaling with data set statistics."""

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal, assert_never

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from voxelbridge.core.config import Config
from voxelbridge.core.errors import DataError

MIN_STD = 1e-8  # nnU-Net's floor: a constant image becomes 0, not NaN
MASK_BELOW = 0.75  # nnU-Net: cropping that leaves less means that the background was removed
CT_PERCENTILES = (0.5, 99.5)  # nnU-Net and nnDetection: of the foreground voxels of all cases


class ZScore(Config):
    """Subtract the image's own mean and divide by its standard deviation.

    With `nonzero_only` the statistics come from voxels other than 0, and 0 stays 0: for images
    whose background was removed (skull-stripped MR).
    """

    name: Literal["zscore"] = "zscore"
    nonzero_only: bool = False


class CTPercentile(Config):
    """Clip to [lower, upper], subtract `mean`, divide by `std`: figures of the whole data set."""

    name: Literal["ct_percentile"] = "ct_percentile"
    lower: float
    upper: float
    mean: float
    std: float


Normalization = Annotated[ZScore | CTPercentile, Field(discriminator="name")]


def normalize(array: NDArray[Any], scheme: ZScore | CTPercentile) -> NDArray[np.float32]:
    """(D, H, W) of any real type -> normalised float32, a new array. NaN, infinity: DataError."""
    require_finite(array)
    image = array.astype(np.float32)
    normalize_in_place(image, scheme)
    return image


def normalize_in_place(image: Iterable[NDArray[np.float32]], scheme: ZScore | CTPercentile) -> None:
    """Normalises finite (D, H, W) where it is, slice by slice: no second volume is needed.

    `image` is an array, or anything that gives its slices as often as they are asked for.
    """
    match scheme:
        case ZScore():
            _zscore(image, nonzero_only=scheme.nonzero_only)
        case CTPercentile():
            mean, std = np.float32(scheme.mean), np.float32(max(scheme.std, MIN_STD))
            for plane in image:
                np.clip(plane, scheme.lower, scheme.upper, out=plane)
                plane -= mean
                plane /= std
        case _:
            assert_never(scheme)


def require_finite(array: NDArray[Any]) -> None:
    """Raises DataError with the number of voxels that are NaN, infinite or beyond float32."""
    if array.dtype.kind != "f" or array.size == 0:
        return
    limit = np.finfo(np.float32).max
    if -limit <= array.min() and array.max() <= limit:  # NaN is in no range
        return
    count = array.size - int(np.count_nonzero(np.abs(array) <= limit))
    raise DataError(f"{count} voxels are NaN or infinite; correct the image before normalising")


def normalization_of(
    channel_name: str, samples: NDArray[Any], *, kept_by_crop: float
) -> ZScore | CTPercentile:
    """nnU-Net's rule: a channel called CT takes the data set's foreground, others their own.

    `samples` are foreground intensities of the data set (read for CT alone); `kept_by_crop` is the
    median share of the voxels that the crop to voxels other than 0 leaves.
    """
    if channel_name.casefold() == "ct":
        return fit_ct(samples)
    return ZScore(nonzero_only=kept_by_crop < MASK_BELOW)


def fit_ct(samples: NDArray[Any]) -> CTPercentile:
    """The CT scheme from foreground intensities (any shape) pooled over the training cases."""
    values = np.asarray(samples, dtype=np.float64).ravel()
    if values.size == 0 or not np.isfinite(values).all():
        raise DataError(
            f"CT statistics need finite foreground voxels, got {values.size} samples; "
            "check that the training cases have objects and no NaN"
        )
    lower, upper = np.percentile(values, CT_PERCENTILES)
    return CTPercentile(
        lower=float(lower), upper=float(upper), mean=float(values.mean()), std=float(values.std())
    )


def _zscore(image: Iterable[NDArray[np.float32]], *, nonzero_only: bool) -> None:
    # Sums in float64, slice by slice: the deviations of a whole volume would be twice its size.
    count, total = 0, 0.0
    for plane in image:
        count += int(np.count_nonzero(plane)) if nonzero_only else plane.size
        total += float(plane.sum(dtype=np.float64))  # voxels of 0 add nothing
    if count == 0:
        return
    mean, squares = total / count, 0.0
    for plane in image:
        deviations = (plane[plane != 0] if nonzero_only else plane).astype(np.float64) - mean
        squares += float(np.square(deviations, out=deviations).sum())
    std = np.float32(max(math.sqrt(squares / count), MIN_STD))
    for plane in image:
        background = plane == 0 if nonzero_only else None
        plane -= np.float32(mean)
        plane /= std
        if background is not None:
            plane[background] = 0.0
