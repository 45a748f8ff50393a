"""`vb-detect prepare --dry-run`: what would be done, from names and headers; writes nothing."""

from dataclasses import dataclass
from pathlib import Path

from voxelbridge.core.data.dataset import RawDataset
from voxelbridge.core.data.survey import GIB, HeaderSample, free_bytes, stored_names
from voxelbridge.detect.plan import FILE_NAME as PLAN_FILE
from voxelbridge.detect.plan import FIXED_SPACING_MM, read_plan
from voxelbridge.detect.plan_request import PlanRequest, Spacing


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
    raw.require_things()
    done = stored_names(store)
    waiting = [case for case in raw.cases if case.case_id not in done]
    sample = HeaderSample.read(waiting)
    target = _target_spacing(store, request, sample)
    size = 0
    if target is not None:
        size = sample.estimated_bytes(
            target, num_cases=len(waiting), num_channels=len(raw.channel_names)
        )
    return Survey(
        name=raw.name,
        num_cases=len(raw.cases),
        num_done=len(raw.cases) - len(waiting),
        num_unlabelled=sum(not case.has_labels for case in raw.cases),
        spacing_mm=target,
        num_sampled=len(sample.shapes),
        unreadable=sample.unreadable,
        estimated_bytes=size,
        free_bytes=free_bytes(store),
    )


def _target_spacing(store: Path, request: PlanRequest, sample: HeaderSample) -> Spacing | None:
    if (store / PLAN_FILE).exists():
        return read_plan(store).spacing_mm
    if request.overrides.spacing_mm is not None:
        return request.overrides.spacing_mm
    if request.rule == "fixed":
        return FIXED_SPACING_MM
    return sample.median_spacing_mm()
