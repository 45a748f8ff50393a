"""STUDY.toml: the whole experiment matrix as typed fields; the format: docs/formats/study.md."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from voxelbridge.core.config import Config, load_config
from voxelbridge.core.errors import ConfigError
from voxelbridge.detect.config import InitParts, TuneName
from voxelbridge.detect.evaluate.measures import Convention
from voxelbridge.detect.plan_request import PlanRule
from voxelbridge.detect.post_processing_file import ObjectiveName
from voxelbridge.detect.study_cells import check_name
from voxelbridge.detect.weights import Which

Index = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Name = Annotated[str, Field(min_length=1)]
Positive = Annotated[float, Field(gt=0)]

IMAGES_TS, HELD_OUT = "imagesTs", "held-out"  # of `test`; anything else is a raw data set
SHIPPED = "studies"  # folder of the package


class PlanSettings(Config):
    """How raw data become a store, as the options of `vb-detect prepare`."""

    rule: PlanRule
    gpu_memory: str = "11GiB"
    spacing_mm: tuple[Positive, Positive, Positive] | None = None  # z, y, x
    settings: tuple[str, ...] = ()  # KEY=VALUE of the plan
    resampling: Literal["cubic", "nnunet"] = "cubic"


PLANS: Mapping[str, PlanSettings] = {
    "default": PlanSettings(rule="default"),
    "fixed": PlanSettings(rule="fixed"),
}


class DatasetSize(Config):
    """What is known of a data set before it is prepared, for the estimate alone."""

    held_out_cases: PositiveInt | None = None
    test_cases: PositiveInt | None = None
    windows_per_case: PositiveInt | None = None


class Dataset(Config):
    """Where the cases of one column of the table are."""

    name: str | None = None  # in tables; none: its key
    raw: Name | None = None  # raw data set
    stores: dict[str, Name] = Field(default_factory=dict)  # by plan: prepared before, elsewhere
    # imagesTs of `raw`, the fold's held-out cases, or a second raw data set.
    # None: imagesTs where there is `raw`, else held-out.
    test: Name | None = None
    folds: tuple[Index, ...] | None = None  # in place of the study's
    settings: tuple[str, ...] = ()
    size: DatasetSize = DatasetSize()

    @property
    def tested_on(self) -> str:
        """`test`, with its default."""
        return self.test or (IMAGES_TS if self.raw else HELD_OUT)

    @model_validator(mode="after")
    def _has_cases(self) -> "Dataset":
        if self.raw is None and not self.stores:
            raise ValueError("needs raw, a raw data set, or stores by plan")
        if self.raw is None and self.test == IMAGES_TS:
            raise ValueError(f"test {IMAGES_TS}: needs raw, the data set whose imagesTs is meant")
        return self


class Architecture(Config):
    """One block of rows."""

    preset: Name  # shipped, or a TOML file relative to the study's
    name: str | None = None  # in tables; none: its key
    settings: tuple[str, ...] = ()


class Initialisation(Config):
    """One row of every block: from which weights, and on which store."""

    name: str | None = None  # in tables; none: its key
    plan: Name = "fixed"
    checkpoint: Name | None = None  # none, and none in `checkpoints`: from scratch
    checkpoints: dict[str, Name] = Field(
        default_factory=dict
    )  # by architecture, or by encoder (resenc_l, plain)
    stem: Name | None = None
    parts: InitParts | None = None
    tune: TuneName | None = None
    settings: tuple[str, ...] = ()
    architectures: tuple[Name, ...] | None = None  # none: all
    datasets: tuple[Name, ...] | None = None  # none: all


class Rule(Config):
    """What is different for some cells; rules count in their order, the last one wins."""

    datasets: tuple[Name, ...] | None = None  # none: all
    architectures: tuple[Name, ...] | None = None
    initialisations: tuple[Name, ...] | None = None
    exclude: bool = False
    plan: Name | None = None
    checkpoint: Name | None = None
    stem: Name | None = None
    parts: InitParts | None = None
    tune: TuneName | None = None
    settings: tuple[str, ...] = ()

    def covers(self, dataset: str, architecture: str, initialisation: str) -> bool:
        """Whether the rule speaks of such a cell."""
        pairs = (
            (self.datasets, dataset),
            (self.architectures, architecture),
            (self.initialisations, initialisation),
        )
        return all(names is None or name in names for names, name in pairs)


class SweepSettings(Config):
    """Whether and how the post-processing is chosen on the held-out cases."""

    enabled: bool = True
    objective: ObjectiveName = "map_range"
    skip: tuple[str, ...] = ()


class EvaluationSettings(Config):
    """How every cell is measured."""

    convention: Convention = "clean"
    bootstrap: Index = 0  # resamplings for the 95 % intervals of each cell


class EstimateSettings(Config):
    """What `--dry-run` assumes of the machine and of data that are not prepared yet."""

    tflops: Positive = 60.0  # sustained, of one GPU
    windows_per_case: PositiveInt = 60
    held_out_cases: PositiveInt = 50
    test_cases: PositiveInt = 100


class SlurmSettings(Config):
    """Lines of the batch scripts; see `vb-detect study run --executor slurm`."""

    options: tuple[str, ...] = ()  # of every job, such as "--partition=gpu"
    train: tuple[str, ...] = ()  # besides, by kind of job: the GPU, the time
    prepare: tuple[str, ...] = ()
    sweep: tuple[str, ...] = ()
    predict: tuple[str, ...] = ()
    evaluate: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()  # shell lines before the job, such as "module load cuda"
    requeue: bool = False  # a training that was stopped with notice (--signal=B:TERM@300) goes on


class StudyConfig(Config):
    """The file. Every cell = data set x architecture x initialisation x fold x seed."""

    schema_version: Literal[1] = Field(alias="schema")
    folder: Name  # everything that is written
    datasets: dict[str, Dataset] = Field(min_length=1)
    architectures: dict[str, Architecture] = Field(min_length=1)
    initialisations: dict[str, Initialisation] = Field(min_length=1)
    plans: dict[str, PlanSettings] = Field(
        default_factory=dict
    )  # besides `default` and `fixed`, or in their place
    rules: tuple[Rule, ...] = ()
    folds: tuple[Index, ...] = Field(default=(0,), min_length=1)
    seeds: tuple[Seed, ...] = Field(default=(0,), min_length=1)
    settings: tuple[str, ...] = ()  # KEY=VALUE of every training
    tta: Annotated[int, Field(ge=0, le=8)] = 8  # mirrored copies, in sweep and prediction
    weights: Which = "last"
    sweep: SweepSettings = SweepSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    baseline: str | None = None  # initialisation that the report measures differences against
    # Rank column: over resampled images of all data sets (table 3), or of the figures inside each
    # architecture (table 2).
    ranks: Literal["bootstrap", "inside"] = "bootstrap"
    estimate: EstimateSettings = EstimateSettings()
    slurm: SlurmSettings | None = None

    @property
    def all_plans(self) -> dict[str, PlanSettings]:
        """The plans by name, the two that need not be stated included."""
        return {**PLANS, **self.plans}

    @model_validator(mode="after")
    def _names_exist(self) -> "StudyConfig":
        sets, models, inits = self.datasets, self.architectures, self.initialisations
        for field, names in (
            ("datasets", sets), ("architectures", models), ("initialisations", inits),
            ("plans", self.plans),
        ):  # fmt: skip
            for name in names:
                _check_folder_name(field, name)
        plans = self.all_plans
        for key, dataset in sets.items():
            _check_known(f"datasets.{key}.stores", dataset.stores, plans)
        for key, init in inits.items():
            _check_known(f"initialisations.{key}.plan", [init.plan], plans)
            _check_known(f"initialisations.{key}.architectures", init.architectures, models)
            _check_known(f"initialisations.{key}.datasets", init.datasets, sets)
        for number, rule in enumerate(self.rules):
            _check_known(f"rules.{number}.datasets", rule.datasets, sets)
            _check_known(f"rules.{number}.architectures", rule.architectures, models)
            _check_known(f"rules.{number}.initialisations", rule.initialisations, inits)
            _check_known(f"rules.{number}.plan", [rule.plan] if rule.plan else None, plans)
        if self.baseline is not None:
            _check_known("baseline", [self.baseline], inits)
        for field, values in (("folds", self.folds), ("seeds", self.seeds)):
            if len(set(values)) != len(values):
                raise ValueError(f"{field}: got {list(values)}, expected each number once")
        return self


@dataclass(frozen=True)
class Study:
    """A study and where its relative paths begin."""

    config: StudyConfig
    source: Path
    base: Path

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return self.path(self.config.folder)

    def path(self, text: str) -> Path:
        """A path of the file as an absolute one."""
        return (self.base / Path(text).expanduser()).resolve()


def read_study(name_or_path: str) -> Study:
    """The study of a file (its paths are relative to it) or of a shipped name (to this folder)."""
    shipped = shipped_studies()
    if name_or_path in shipped:
        source, base = shipped[name_or_path], Path.cwd()
    else:
        source = Path(name_or_path)
        base = source.resolve().parent
        if not source.is_file():
            near = difflib.get_close_matches(name_or_path, shipped, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(
                f"study {name_or_path}: no such file; {hint}shipped are {', '.join(shipped)}"
            )
    return Study(load_config(StudyConfig, source).config, source, base)


def shipped_studies() -> dict[str, Path]:
    """The files that come with the package, by name."""
    folder = Path(str(resources.files("voxelbridge.detect") / SHIPPED))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def _check_folder_name(field: str, name: str) -> None:
    try:
        check_name(field, name)
    except ConfigError as error:
        raise ValueError(str(error)) from None


def _check_known(key: str, names: Iterable[str] | None, known: Iterable[str]) -> None:
    for name in names or ():
        if name not in known:
            raise ValueError(f"{key}: got {name!r}, expected one of {', '.join(known)}")
