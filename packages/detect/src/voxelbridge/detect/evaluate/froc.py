"""FROC: sensitivity against false positives per image, read at seven rates or others."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FPPI = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # false positives per image

Floats = NDArray[np.float64]


def froc_points(
    true_positive: NDArray[np.bool_], scores: Floats, *, num_objects: int, num_images: int
) -> tuple[Floats, Floats, Floats]:
    """False positives per image, sensitivity and score threshold of each point of the curve.

    Predictions come by descending score; equal scores make one point. The curve starts with no
    prediction at all: (0, 0) at the score infinity.
    """
    ends = last_of_each_score(scores)
    hits = np.cumsum(true_positive)[ends]
    fppi = (ends + 1 - hits) / num_images
    return (
        np.concatenate([[0.0], fppi]),
        np.concatenate([[0.0], hits / num_objects]),
        np.concatenate([[np.inf], scores[ends]]),
    )


def sensitivity_at_rates(
    fppi: Floats, sensitivity: Floats, *, rates: Sequence[float] = FPPI
) -> Floats:
    """Sensitivity at each rate of a curve that starts in (0, 0); (points,) x 2 -> (rates,).

    Linear between points; of points at the same rate the highest; beyond the last point its value.
    """
    return np.interp(rates, fppi, sensitivity)


def last_of_each_score(scores: Floats) -> NDArray[np.int64]:
    """Positions at which a run of equal scores ends; (K,) descending -> (distinct scores,)."""
    return np.flatnonzero(np.append(scores[1:] != scores[:-1], True)[: len(scores)])
