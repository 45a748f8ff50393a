"""What an evaluation measures: IoU thresholds, false-positive rates, sizes of objects."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from voxelbridge.core.errors import ConfigError
from voxelbridge.detect.evaluate.froc import FPPI

Convention = Literal["clean", "nndetection"]
SizeMeasure = Literal["volume", "longest-side"]

RANGE_KEY = "0.10:0.50:0.05"
RANGE = tuple(float(t) for t in np.linspace(0.1, 0.5, 9))


@dataclass(frozen=True)
class Sizes:
    """How objects are sorted by size: into [0, e0), [e0, e1), ..., [en, infinity).

    `edges` None: the terciles of the objects at hand.
    """

    measure: SizeMeasure = "volume"
    edges: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        edges = self.edges
        if edges is not None and not (
            edges and all(0 < edge < math.inf for edge in edges) and _ascend(edges)
        ):
            raise ConfigError(
                f"sizes: got the edges {', '.join(f'{edge:g}' for edge in edges)}, expected "
                "finite numbers above 0, each larger than the one before"
            )


@dataclass(frozen=True)
class Measures:
    """The figures of an evaluation; the default is what metrics.json always holds.

    IoU thresholds of AP and of FROC, whether AP is averaged over RANGE too, the false positives per
    image at which FROC is read and for which operating points are looked up, sizes (None: not).
    """

    ap: tuple[float, ...] = (0.1, 0.3, 0.5)
    ap_range: bool = True
    froc: tuple[float, ...] = (0.1, 0.3)
    fppi: tuple[float, ...] = FPPI
    operating_rates: tuple[float, ...] = FPPI
    sizes: Sizes | None = Sizes()

    def __post_init__(self) -> None:
        for name, values in (("AP", self.ap), ("FROC", self.froc)):
            if not all(0 < value <= 1 for value in values) or not _ascend(values):
                raise ConfigError(f"{name}: got the IoU thresholds {values}, expected ascending "
                                  "numbers above 0 and up to 1")  # fmt: skip
        for rates in (self.fppi, self.operating_rates):
            if not rates or not all(0 < rate < math.inf for rate in rates) or not _ascend(rates):
                raise ConfigError(
                    f"false positives per image: got {', '.join(f'{rate:g}' for rate in rates)}, "
                    "expected ascending numbers above 0"
                )

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Every IoU threshold that predictions must be assigned at: AP, range, FROC."""
        span = RANGE if self.ap_range else ()
        return tuple(dict.fromkeys((*self.ap, *span, *self.froc)))


def requested(
    *,
    iou: Sequence[float],
    fppi: Sequence[float],
    operating_rates: Sequence[float],
    size_measure: SizeMeasure,
    size_edges: Sequence[float],
) -> Measures:
    """The measures that a command line asks for; `iou` come beside the standard thresholds."""
    standard = Measures()
    rates = tuple(sorted(set(fppi))) or standard.fppi
    return Measures(
        ap=tuple(sorted({*standard.ap, *iou})),
        froc=tuple(sorted({*standard.froc, *iou})),
        fppi=rates,
        operating_rates=tuple(sorted(set(operating_rates))) or rates,
        sizes=Sizes(size_measure, tuple(size_edges) or None),
    )


def threshold_key(threshold: float) -> str:
    """The key of an IoU threshold in metrics.json: "0.10", or all digits where two do not do."""
    text = f"{threshold:.2f}"
    return text if float(text) == threshold else repr(threshold)


def _ascend(values: Sequence[float]) -> bool:
    return all(a < b for a, b in itertools.pairwise(values))
