"""The jobs of a study in the order of their dependencies.

STUDY/stores/DATASET/PLAN/    prepare   one per data set and plan, where there is raw data
STUDY/truth/DATASET/          truth     the test cases, where they are not the fold's own
STUDY/runs/CELL/              train
                              sweep     writes to the run
STUDY/predictions/CELL/       predict
STUDY/results/CELL/           evaluate
STUDY/jobs/KIND/...           the markers and the log of each
"""

from dataclasses import dataclass, field
from pathlib import Path

from voxelbridge.detect.study.config import HELD_OUT, IMAGES_TS, Study
from voxelbridge.detect.study.inputs import Input
from voxelbridge.detect.study.matrix import Cell, cells_of
from voxelbridge.detect.study.tasks import (
    Evaluate,
    Kind,
    Predict,
    Prepare,
    Sweep,
    Task,
    Train,
    Truth,
)
from voxelbridge.detect.study_cells import CellKey

RESULTS = "results"


@dataclass(frozen=True)
class Job:
    """One task, what it waits for and what it reads from outside of the study's folder."""

    id: str  # also its folder below STUDY/jobs
    task: Task
    after: tuple[str, ...] = ()
    inputs: tuple[Input, ...] = ()
    cells: tuple[CellKey, ...] = ()  # one; of prepare and truth all that need them

    @property
    def kind(self) -> Kind:
        return self.task.kind


@dataclass(frozen=True)
class Plan:
    """The whole study as jobs; those of a cell stand together, in their order."""

    study: Study
    cells: tuple[Cell, ...]
    jobs: dict[str, Job]
    of_cell: dict[CellKey, tuple[str, ...]]  # ids, prepare first

    @property
    def results(self) -> Path:
        """The folder that `read_cells` reads."""
        return self.study.folder / RESULTS


def plan_jobs(study: Study) -> Plan:
    """Cells and jobs of a study."""
    builder = _Builder(study)
    cells = cells_of(study)
    of_cell = {cell.key: builder.add_cell(cell) for cell in cells}
    jobs = {
        name: Job(job.id, job.task, job.after, job.inputs, tuple(builder.users[name]))
        for name, job in builder.jobs.items()
    }
    return Plan(study, cells, jobs, of_cell)


@dataclass
class _Builder:
    study: Study
    jobs: dict[str, Job] = field(default_factory=dict)
    users: dict[str, list[CellKey]] = field(default_factory=dict)

    def add_cell(self, cell: Cell) -> tuple[str, ...]:
        """The ids of the cell's jobs; adds those that are not there yet."""
        config, folder = self.study.config, self.study.folder
        path = cell.key.path
        store, prepared = self._store(cell)
        run = str(folder / "runs" / path)
        predictions = folder / "predictions" / path
        truth, tables = self._truth(cell, predictions)
        trained = self._add(
            cell,
            f"train/{path.as_posix()}",
            Train(
                preset=cell.preset, store=str(store), run=run, settings=cell.settings,
                init=str(cell.init) if cell.init else None, stem=cell.stem, parts=cell.parts,
                tune=cell.tune, fold=cell.key.fold,
            ),
            after=prepared,
            inputs=_inputs_of_training(cell, store, is_outside=not prepared),
        )  # fmt: skip
        ready = trained
        if config.sweep.enabled:
            ready = self._add(
                cell,
                f"sweep/{path.as_posix()}",
                Sweep(
                    run=run, store=str(store), objective=config.sweep.objective,
                    skip=config.sweep.skip, tta=config.tta, weights=config.weights,
                ),
                after=trained,
            )  # fmt: skip
        predicted = self._add(
            cell,
            f"predict/{path.as_posix()}",
            Predict(
                run=run, store=str(store), truth=str(tables) if truth else None,
                out=str(predictions), tta=config.tta, weights=config.weights,
            ),
            after=(*ready, *truth),
        )  # fmt: skip
        evaluated = self._add(
            cell,
            f"evaluate/{path.as_posix()}",
            Evaluate(
                run=run, truth=str(tables), predictions=str(predictions),
                out=str(folder / RESULTS / path), convention=config.evaluation.convention,
                bootstrap=config.evaluation.bootstrap,
            ),
            after=predicted,
        )  # fmt: skip
        swept = ready if ready != trained else ()
        return (*prepared, *truth, *trained, *swept, *predicted, *evaluated)

    def _add(
        self,
        cell: Cell,
        name: str,
        task: Task,
        *,
        after: tuple[str, ...] = (),
        inputs: tuple[Input, ...] = (),
    ) -> tuple[str]:
        self.jobs.setdefault(name, Job(name, task, after, inputs))
        self.users.setdefault(name, []).append(cell.key)
        return (name,)

    def _store(self, cell: Cell) -> tuple[Path, tuple[str, ...]]:
        """The store of a cell and the job that makes it, if it is not there from outside."""
        config = self.study.config
        key = cell.key.dataset
        dataset = config.datasets[key]
        if cell.plan in dataset.stores:
            return self.study.path(dataset.stores[cell.plan]), ()
        assert dataset.raw is not None  # `cells_of` has looked
        raw = self.study.path(dataset.raw)
        store = self.study.folder / "stores" / key / cell.plan
        task = Prepare(dataset=str(raw), store=str(store), plan=config.all_plans[cell.plan])
        name = f"prepare/{key}/{cell.plan}"
        return store, self._add(cell, name, task, inputs=(Input("raw-train", raw),))

    def _truth(self, cell: Cell, predictions: Path) -> tuple[tuple[str, ...], Path]:
        """The job that reads the test cases (none: held-out ones), and where their tables are."""
        key = cell.key.dataset
        dataset = self.study.config.datasets[key]
        if dataset.tested_on == HELD_OUT:
            return (), predictions
        only_unseen = dataset.tested_on == IMAGES_TS
        stated = dataset.raw if only_unseen else dataset.tested_on
        assert stated is not None  # the config has looked
        raw = self.study.path(stated)
        out = self.study.folder / "truth" / key
        task = Truth(dataset=str(raw), only_unseen=only_unseen, out=str(out))
        source = Input("raw-test" if only_unseen else "raw", raw)
        return self._add(cell, f"truth/{key}", task, inputs=(source,)), out


def _inputs_of_training(cell: Cell, store: Path, *, is_outside: bool) -> tuple[Input, ...]:
    inputs = []
    if cell.init:
        inputs.append(Input("file", cell.init))
    if Path(cell.preset).suffix:
        inputs.append(Input("file", Path(cell.preset)))
    if is_outside:
        inputs.append(Input("store", store))
    return tuple(inputs)
