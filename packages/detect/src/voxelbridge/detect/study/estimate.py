"""What a study will cost, before anything has run.

The model: training = 3 x (operations of a forward pass of one patch) x batch x steps, backward
counted as twice the forward pass; sweep and prediction = operations x windows per case x mirrored
copies x cases; both divided by a sustained rate that STUDY.toml assumes (`estimate.tflops`).
Validation, loading, merging and the cheaper steps with a frozen encoder are not counted. Windows
and cases are a store's where it is prepared, else what STUDY.toml states of the data set, else
assumed.
"""

from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from voxelbridge.core.tiles import tile_starts
from voxelbridge.detect.build import load_detect_config
from voxelbridge.detect.config import DetectConfig
from voxelbridge.detect.info import describe_preset
from voxelbridge.detect.plan import FILE_NAME as PLAN_FILE
from voxelbridge.detect.plan import Plan as StorePlan
from voxelbridge.detect.plan import read_plan
from voxelbridge.detect.splits import FILE_NAME as SPLITS_FILE
from voxelbridge.detect.splits import read_splits
from voxelbridge.detect.study.config import HELD_OUT
from voxelbridge.detect.study.jobs import Job, Plan
from voxelbridge.detect.study.matrix import Cell, without_plan
from voxelbridge.detect.study.tasks import Predict, Sweep, Train
from voxelbridge.detect.study_cells import CellKey

TRAINING_PASSES = 3  # forward, and backward as two of them
MODEL = (
    "estimate: {passes} x GFLOP of a patch x batch x steps for training, GFLOP x windows x "
    "mirrored copies x cases for sweep and prediction, at {tflops:g} TFLOP/s sustained (assumed: "
    "estimate.tflops)"
)


@dataclass(frozen=True)
class JobCost:
    """GPU hours of a job; None for jobs that need no GPU."""

    job: Job
    gpu_hours: float | None
    steps: int | None = None  # of a training


@dataclass(frozen=True)
class _Sizes:
    held_out: int
    test: int
    windows: int


@dataclass
class Estimator:
    """Costs of the jobs of one study."""

    plan: Plan
    _cells: dict[CellKey, Cell] = field(default_factory=dict)
    _networks: dict[tuple[str, tuple[str, ...], Path | None], tuple[DetectConfig, float]] = field(
        default_factory=dict
    )
    _plans: dict[Path, StorePlan | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._cells = {cell.key: cell for cell in self.plan.cells}

    def describe(self) -> str:
        """The model in one line."""
        tflops = self.plan.study.config.estimate.tflops
        return MODEL.format(passes=TRAINING_PASSES, tflops=tflops)

    def cost(self, job: Job) -> JobCost:
        """What one job costs."""
        if not isinstance(job.task, Train | Sweep | Predict):
            return JobCost(job, None)
        cell = self._cells[job.cells[0]]
        store = Path(job.task.store)
        config, gflop = self._network(cell, store)
        flop = gflop * 1e9
        if isinstance(job.task, Train):
            steps = config.schedule.steps
            flop *= TRAINING_PASSES * config.batch_size * steps
            return JobCost(job, self._hours(flop), steps)
        study = self.plan.study.config
        is_held_out = study.datasets[cell.key.dataset].tested_on == HELD_OUT
        if isinstance(job.task, Predict) and is_held_out and study.sweep.enabled:
            return JobCost(job, 0.0)  # the sweep's predictions are read
        sizes = self._sizes(cell, store, config)
        cases = sizes.held_out if isinstance(job.task, Sweep) or is_held_out else sizes.test
        return JobCost(job, self._hours(flop * sizes.windows * max(1, study.tta) * cases))

    def _hours(self, flop: float) -> float:
        return flop / (self.plan.study.config.estimate.tflops * 1e12) / 3600

    def _network(self, cell: Cell, store: Path) -> tuple[DetectConfig, float]:
        """The config and the GFLOP of one patch; an architecture from a plan that is not there
        yet counts as the preset's."""
        plan = self._read_plan(store)
        settings = cell.settings[:-1]  # without the seed
        kept = settings if plan else without_plan(settings)
        key = (cell.preset, kept, store if plan else None)
        if key not in self._networks:
            config = load_detect_config(cell.preset, kept, plan=plan)
            facts = describe_preset(cell.preset, plan=plan, overrides=kept)
            self._networks[key] = (config, float(facts["gflop"]))
        return self._networks[key]

    def _sizes(self, cell: Cell, store: Path, config: DetectConfig) -> _Sizes:
        assumed = self.plan.study.config.estimate
        stated = self.plan.study.config.datasets[cell.key.dataset].size
        held_out = stated.held_out_cases or assumed.held_out_cases
        test = stated.test_cases or assumed.test_cases
        windows = stated.windows_per_case or assumed.windows_per_case
        plan = self._read_plan(store)
        if plan is not None:
            starts = (
                tile_starts(size, edge)
                for size, edge in zip(plan.median_shape, config.patch_size, strict=True)
            )
            windows = prod(len(axis) for axis in starts)
            if (store / SPLITS_FILE).is_file():
                folds = read_splits(store)
                held_out = len(folds[min(cell.key.fold, len(folds) - 1)]["val"])
        return _Sizes(held_out, test, windows)

    def _read_plan(self, store: Path) -> StorePlan | None:
        if store not in self._plans:
            self._plans[store] = read_plan(store) if (store / PLAN_FILE).is_file() else None
        return self._plans[store]
