"""The post-processing that a sweep chose for a run: RUN/post_processing.json.

The format: docs/formats/post_processing.md. It belongs to the weights it was swept with.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from voxelbridge.core.config import Config, validate
from voxelbridge.core.errors import CheckpointError, ConfigError
from voxelbridge.core.files import read_json, write_json
from voxelbridge.detect.config import DetectConfig, PostProcessing
from voxelbridge.detect.weights import Which, stored_weights

FILE_NAME = "post_processing.json"
MERGING = (
    "model_top_k", "model_min_score", "min_size", "model_iou", "suppression", "boxes_per_case",
    "ensemble_top_k", "ensemble_iou", "ensemble_min_score",
)  # fmt: skip

ObjectiveName = Literal[
    "map_range", "map_0.10", "map_0.30", "map_0.50", "froc_0.10", "froc_0.30"
]  # fmt: skip
Figures = dict[ObjectiveName, float]


class Tried(Config):
    """One setting that was evaluated: `value` of the field `step`, all others as chosen before."""

    step: str
    value: float | str
    figures: Figures
    chosen: bool


class SweptRun(Config):
    """A run whose predictions took part."""

    run: str
    fold: int
    weights: Which
    weights_sha256: str


class Swept(Config):
    """Content of the file."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    post_processing: PostProcessing
    objective: ObjectiveName
    before: Figures  # with the settings that the sweep started from
    after: Figures
    start: PostProcessing
    tried: tuple[Tried, ...]
    runs: tuple[SweptRun, ...]
    mirrorings: int
    store: str  # digest
    num_cases: int
    num_objects: int
    failed_cases: tuple[str, ...] = ()
    seen_in_training: tuple[str, ...] = ()  # of the cases: figures on them say nothing about others


def write_swept(run: Path, swept: Swept) -> None:
    """Writes the file into the run, atomically."""
    write_json(run / FILE_NAME, swept.model_dump(mode="json", by_alias=True))


def read_swept(run: Path) -> Swept | None:
    """What a sweep wrote to the run; None where there was none."""
    path = run / FILE_NAME
    if not path.is_file():
        return None
    content: Any = read_json(path)
    return validate(Swept, content, where=str(path))


def with_swept(run: Path, config: DetectConfig, *, weights: Which) -> DetectConfig:
    """The run's config with the settings that were swept for it, or as it is where none were.

    Settings that were swept with other weights than the run's `weights` are a CheckpointError.
    """
    swept = read_swept(run)
    if swept is None:
        return config
    stored = stored_weights(run, weights)
    known = {part.weights_sha256: part.weights for part in swept.runs}
    if stored is None or stored.sha256 not in known:
        names = ", ".join(sorted(set(known.values())))
        raise CheckpointError(
            f"{run / FILE_NAME}: made for other weights ({names} at the time) than the run's "
            f"{weights}; run `vb-detect sweep` with --weights {weights}, or delete the file"
        )
    return config.model_copy(update={"post_processing": swept.post_processing})


def check_same_merging(runs: Sequence[Path], posts: Sequence[PostProcessing]) -> None:
    """ConfigError unless the settings by which boxes are merged are the same for all runs."""
    for run, post in zip(runs[1:], posts[1:], strict=True):
        for name in MERGING:
            first, own = getattr(posts[0], name), getattr(post, name)
            if first != own:
                raise ConfigError(
                    f"{run}: its post-processing has {name} {own}, that of {runs[0]} {first}; an "
                    "ensemble needs one for all: sweep them together (`vb-detect sweep RUN...`), "
                    f"or delete their {FILE_NAME}"
                )
