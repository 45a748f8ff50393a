"""The plan: what the data decide before training (fingerprint -> plan.json).

`default` takes nnDetection's rule for the target spacing (median, a very coarse axis finer), and
`fixed` takes 1 mm in all axes, which the paper found better (arXiv 2509.15947, table 2).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from voxelbridge.core.config import Config, validate
from voxelbridge.core.data.normalize import Normalization, ZScore, fit_ct
from voxelbridge.core.errors import DataError
from voxelbridge.core.files import read_json, write_json

FILE_NAME = "plan.json"
FIXED_SPACING_MM = (1.0, 1.0, 1.0)
ANISOTROPY = 3.0  # an axis coarser than 3 x the others is resampled to its 10th percentile
MAX_STORED_OBJECTS = 2000
SEED = 12345

SpacingRule = Literal["default", "fixed"]


class CaseFingerprint(Config):
    """What planning needs of one case, measured after bringing it to LPS and cropping it."""

    case_id: str
    shape: tuple[int, int, int]  # voxels z, y, x after the crop
    spacing_mm: tuple[float, float, float]
    boxes: tuple[tuple[float, float, float, float, float, float], ...]  # of the original file
    object_sizes_mm: tuple[tuple[float, float, float], ...]
    labels: tuple[int, ...]
    # Per channel, a sample of the intensities inside objects (all of the image without objects).
    intensity_samples: tuple[tuple[float, ...], ...]


class Plan(Config):
    """Frozen decisions of planning; written to the store and copied into each run."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    rule: SpacingRule
    spacing_mm: tuple[float, float, float]
    channel_names: tuple[str, ...]
    class_names: tuple[str, ...]
    normalization: tuple[Normalization, ...]  # per channel
    object_sizes: tuple[tuple[float, float, float], ...]  # voxels of the stored grid, a sample
    median_shape: tuple[int, int, int]  # voxels of the stored grid
    num_cases: int
    num_objects_per_class: tuple[int, ...]


def make_plan(
    fingerprints: Sequence[CaseFingerprint],
    *,
    rule: SpacingRule,
    channel_names: Sequence[str],
    class_names: Sequence[str],
    spacing_mm: tuple[float, float, float] | None = None,
) -> Plan:
    """The plan for the training cases; `spacing_mm` overrides the rule's target spacing."""
    if not fingerprints:
        raise DataError("planning: no readable training case is left")
    target = spacing_mm or (FIXED_SPACING_MM if rule == "fixed" else median_spacing(fingerprints))
    sizes = np.array(
        [size for case in fingerprints for size in case.object_sizes_mm], dtype=np.float64
    ).reshape(-1, 3)
    shapes = np.array([case.shape for case in fingerprints]) * np.array(
        [case.spacing_mm for case in fingerprints]
    )
    labels = [label for case in fingerprints for label in case.labels]
    return Plan(
        rule=rule,
        spacing_mm=target,
        channel_names=tuple(channel_names),
        class_names=tuple(class_names),
        normalization=tuple(
            _normalization(name, [case.intensity_samples[channel] for case in fingerprints])
            for channel, name in enumerate(channel_names)
        ),
        object_sizes=_sample_rows(sizes / np.array(target)),
        median_shape=_triple_of_ints(np.median(shapes / np.array(target), axis=0)),
        num_cases=len(fingerprints),
        num_objects_per_class=tuple(labels.count(label) for label in range(len(class_names))),
    )


def median_spacing(fingerprints: Sequence[CaseFingerprint]) -> tuple[float, float, float]:
    """nnDetection's target spacing: the median per axis, a very coarse axis at its 10th percentile.

    An axis counts as much coarser when its spacing is above three times the others' and its size
    is below a third of theirs; it never gets finer than the finest other axis.
    """
    spacings = np.array([case.spacing_mm for case in fingerprints])
    target = np.median(spacings, axis=0)
    size = np.median(np.array([case.shape for case in fingerprints]), axis=0)
    worst = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != worst]
    coarse = target[worst] > ANISOTROPY * target[others].min()
    short = size[worst] * ANISOTROPY < size[others].min()
    if coarse and short:
        finer = float(np.percentile(spacings[:, worst], 10))
        target[worst] = max(finer, float(target[others].min()) + 1e-5)
    return (float(target[0]), float(target[1]), float(target[2]))


def write_plan(folder: Path, plan: Plan) -> None:
    """Writes `plan.json` into a store or run directory, atomically."""
    write_json(folder / FILE_NAME, plan.model_dump(mode="json", by_alias=True))


def read_plan(folder: Path) -> Plan:
    """The plan of a store or run directory; a damaged file is named in the error."""
    path = folder / FILE_NAME
    return validate(Plan, read_json(path), where=str(path))


def _normalization(channel_name: str, samples: Sequence[tuple[float, ...]]) -> Normalization:
    """nnU-Net's rule: a channel called CT is normalised with the data set's foreground."""
    if channel_name.casefold() != "ct":
        return ZScore()
    return fit_ct(np.array([value for case in samples for value in case], dtype=np.float64))


def _sample_rows(sizes: np.ndarray) -> tuple[tuple[float, float, float], ...]:
    if len(sizes) > MAX_STORED_OBJECTS:
        chosen = np.random.default_rng(SEED).choice(len(sizes), MAX_STORED_OBJECTS, replace=False)
        sizes = sizes[np.sort(chosen)]
    return tuple((float(z), float(y), float(x)) for z, y, x in sizes)


def _triple_of_ints(values: np.ndarray) -> tuple[int, int, int]:
    z, y, x = (max(round(float(value)), 1) for value in values)
    return (z, y, x)
