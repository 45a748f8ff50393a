"""What one job does, as a file that a process on any machine can be given.

A task is one call of a public function. Its paths are absolute; what it depends on is stated by
`facts`, in which they do not count, so that a study can be moved.
"""

import hashlib
import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from voxelbridge.core.config import Config
from voxelbridge.detect.config import InitParts, TuneName
from voxelbridge.detect.evaluate.measures import Convention
from voxelbridge.detect.post_processing_file import ObjectiveName
from voxelbridge.detect.study.config import PlanSettings
from voxelbridge.detect.weights import Which


class Prepare(Config):
    """A raw data set becomes a store."""

    PATHS: ClassVar[frozenset[str]] = frozenset({"dataset", "store"})
    kind: Literal["prepare"] = "prepare"
    dataset: str
    store: str
    plan: PlanSettings


class Truth(Config):
    """The tables of the test cases: cases.csv, ground_truth.csv, images.json."""

    PATHS: ClassVar[frozenset[str]] = frozenset({"dataset", "out"})
    kind: Literal["truth"] = "truth"
    dataset: str
    only_unseen: bool  # imagesTs alone; else imagesTr where imagesTs has no labels
    out: str


class Train(Config):
    """One training."""

    PATHS: ClassVar[frozenset[str]] = frozenset({"preset", "store", "run", "init"})
    kind: Literal["train"] = "train"
    preset: str
    store: str
    run: str
    settings: tuple[str, ...]
    init: str | None
    stem: str | None
    parts: InitParts | None
    tune: TuneName | None
    fold: int


class Sweep(Config):
    """The choice of a run's post-processing."""

    PATHS: ClassVar[frozenset[str]] = frozenset({"run", "store"})
    kind: Literal["sweep"] = "sweep"
    run: str
    store: str
    objective: ObjectiveName
    skip: tuple[str, ...]
    tta: int
    weights: Which


class Predict(Config):
    """Boxes of the test cases; `truth` None: of the cases that the run held out."""

    PATHS: ClassVar[frozenset[str]] = frozenset({"run", "store", "truth", "out"})
    kind: Literal["predict"] = "predict"
    run: str
    store: str
    truth: str | None
    out: str
    tta: int
    weights: Which


class Evaluate(Config):
    """The result of a cell."""

    PATHS: ClassVar[frozenset[str]] = frozenset({"run", "truth", "predictions", "out"})
    kind: Literal["evaluate"] = "evaluate"
    run: str
    truth: str  # folder of cases.csv and ground_truth.csv
    predictions: str  # folder of predictions.csv
    out: str
    convention: Convention
    bootstrap: int


Task = Annotated[Prepare | Truth | Train | Sweep | Predict | Evaluate, Field(discriminator="kind")]
Kind = Literal["prepare", "truth", "train", "sweep", "predict", "evaluate"]


def facts_of(task: Prepare | Truth | Train | Sweep | Predict | Evaluate) -> str:
    """SHA-256 of everything that a task states besides where things lie."""
    content: Any = task.model_dump(mode="json", exclude=set(task.PATHS))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
