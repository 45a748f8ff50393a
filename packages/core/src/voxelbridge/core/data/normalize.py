"""Intensity normalisation: z-score per image, or clipping and scaling with data set statistics."""

from typing import Annotated, Any, Literal, assert_never

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from voxelbridge.core.config import Config
from voxelbridge.core.errors import DataError

MIN_STD = 1e-8  # nnU-Net's floor: a constant image becomes 0, not NaN
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
    image = array.astype(np.float32)
    if not np.isfinite(image).all():
        count = int(np.count_nonzero(~np.isfinite(image)))
        raise DataError(f"{count} voxels are NaN or infinite; correct the image before normalising")
    match scheme:
        case ZScore():
            return _zscore(image, nonzero_only=scheme.nonzero_only)
        case CTPercentile():
            np.clip(image, scheme.lower, scheme.upper, out=image)
            image -= np.float32(scheme.mean)
            image /= np.float32(max(scheme.std, MIN_STD))
            return image
        case _:
            assert_never(scheme)


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


def _zscore(image: NDArray[np.float32], *, nonzero_only: bool) -> NDArray[np.float32]:
    mask = image != 0 if nonzero_only else None
    values = image if mask is None else image[mask]
    if values.size == 0:
        return image
    mean = values.mean(dtype=np.float64)
    std = max(float(values.std(dtype=np.float64)), MIN_STD)
    image -= np.float32(mean)
    image /= np.float32(std)
    if mask is not None:
        image[~mask] = 0.0
    return image
