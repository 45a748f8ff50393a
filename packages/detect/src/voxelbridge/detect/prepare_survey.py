"""`vb-detect prepare --dry-run`: what would be done, from names and a few headers; writes nothing.

Made for data sets of 100 000 cases: no case is opened but the sample whose extent is measured.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from voxelbridge.core.data.case_index import CASES_FOLDER
from voxelbridge.core.data.dataset import RawCase, RawDataset
from voxelbridge.core.data.resample import resampled_shape
from voxelbridge.core.data.volume import reorientation_to_lps
from voxelbridge.core.errors import VoxelbridgeError
from voxelbridge.detect.plan import FILE_NAME as PLAN_FILE
from voxelbridge.detect.plan import FIXED_SPACING_MM, read_plan
from voxelbridge.detect.plan_request import PlanRequest, Spacing

SAMPLED_HEADERS = 20
BYTES_PER_VOXEL = 4  # float32 before compression
GIB = 2**30


@dataclass(frozen=True)
class Survey:
    """What `prepare` would do with a data set."""

    name: str
    num_cases: int
    num_done: int
    num_unlabelled: int
    spacing_mm: Spacing | None  # None: no header of the sample could be read
    num_sampled: int
    unreadable: tuple[str, ...]  # cases of the sample
    estimated_bytes: int  # of the waiting cases' images before compression
    free_bytes: int

    @property
    def num_waiting(self) -> int:
        return self.num_cases - self.num_done

    def describe(self) -> str:
        """A few lines for people."""
        if self.spacing_mm is None:
            size = "unknown: no header of the sample could be read"
        else:
            edges = " x ".join(f"{edge:.4g}" for edge in self.spacing_mm)
            size = (
                f"about {self.estimated_bytes / GIB:.3g} GiB before compression at {edges} mm "
                f"(from {self.num_sampled} headers), {self.free_bytes / GIB:.3g} GiB free"
            )
        lines = [
            f"{self.name}: dry run, nothing is written",
            f"  cases        {self.num_cases} ({self.num_unlabelled} without labels)",
            f"  done         {self.num_done}",
            f"  waiting      {self.num_waiting}",
            f"  size         {size}",
        ]
        return "\n".join(lines + [f"  unreadable   {name}" for name in self.unreadable])


def survey(dataset: Path, store: Path, request: PlanRequest) -> Survey:
    """Counts cases and estimates the size of what is not done yet."""
    raw = RawDataset.open(dataset)
    done = _stored_names(store)
    waiting = [case for case in raw.cases if case.case_id not in done]
    shapes, spacings, unreadable = _sample(waiting)
    target = _target_spacing(store, request, spacings)
    voxels = [
        int(np.prod(resampled_shape(shape, spacing, target)))
        for shape, spacing in zip(shapes, spacings, strict=True)
        if target is not None
    ]
    mean = float(np.mean(voxels)) if voxels else 0.0
    return Survey(
        name=raw.name,
        num_cases=len(raw.cases),
        num_done=len(raw.cases) - len(waiting),
        num_unlabelled=sum(not case.has_labels for case in raw.cases),
        spacing_mm=target,
        num_sampled=len(shapes),
        unreadable=tuple(unreadable),
        estimated_bytes=int(mean * len(waiting) * len(raw.channel_names) * BYTES_PER_VOXEL),
        free_bytes=_free_bytes(store),
    )


def _stored_names(store: Path) -> set[str]:
    """Cases whose JSON lies in the store; it is written last, so their arrays do too."""
    try:
        with os.scandir(store / CASES_FOLDER) as entries:
            names = [entry.name for entry in entries]
    except FileNotFoundError:
        return set()
    return {name[: -len(".json")] for name in names if name.endswith(".json") and name[0] != "."}


def _sample(
    cases: Sequence[RawCase],
) -> tuple[list[tuple[int, int, int]], list[Spacing], list[str]]:
    """Shape and spacing in LPS order of cases spread evenly over the list, and unreadable ones."""
    shapes, spacings, unreadable = [], [], []
    count = min(SAMPLED_HEADERS, len(cases))
    for number in range(count):
        case = cases[number * len(cases) // count]
        try:
            grid = case.read_grid()
        except VoxelbridgeError as error:
            unreadable.append(str(error))
            continue
        grid = reorientation_to_lps(grid).apply_grid(grid)
        shapes.append(grid.shape)
        spacings.append(grid.spacing_mm)
    return shapes, spacings, unreadable


def _target_spacing(
    store: Path, request: PlanRequest, spacings: Sequence[Spacing]
) -> Spacing | None:
    if (store / PLAN_FILE).exists():
        return read_plan(store).spacing_mm
    if request.overrides.spacing_mm is not None:
        return request.overrides.spacing_mm
    if request.rule == "fixed":
        return FIXED_SPACING_MM
    if not spacings:
        return None
    z, y, x = (float(edge) for edge in np.median(np.array(spacings), axis=0))
    return z, y, x


def _free_bytes(folder: Path) -> int:
    """Free space where `folder` is or would be made."""
    path = folder.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
