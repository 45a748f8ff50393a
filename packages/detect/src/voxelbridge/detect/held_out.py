"""Which cases the runs of a cross-validation held out, and in which store they lie."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxelbridge.core.data.case_store import CaseStore
from voxelbridge.core.errors import CheckpointError, ConfigError, DataError
from voxelbridge.core.files import read_json
from voxelbridge.core.run import ENVIRONMENT_FILE, read_run_config
from voxelbridge.detect.config import DetectConfig
from voxelbridge.detect.weights import Which, file_of, stored_weights

KIND = "detect"
DATA_FILE = "data.json"


@dataclass(frozen=True)
class HeldOutRun:
    """A finished run, and the cases that its training did not see."""

    path: Path
    fold: int
    cases: tuple[str, ...]
    trained_on: frozenset[str]
    store_digest: str
    store: Path | None  # where it lay at the last start
    weights: Which
    weights_sha256: str
    config: DetectConfig
    num_classes: int


def open_runs(
    paths: Sequence[Path], *, store: Path | None, weights: Which
) -> tuple[CaseStore, list[HeldOutRun]]:
    """The finished runs at `paths` and the store they were all trained on.

    `store` None: where the first run found it. Another store than the runs' is a DataError, runs on
    several stores, with different post-processing or named twice are a ConfigError.
    """
    runs = [read_run(path, weights=weights) for path in paths]
    first = runs[0]
    for run in runs[1:]:
        if run.store_digest != first.store_digest:
            raise ConfigError(
                f"{run.path}: trained on another store than {first.path}; "
                "take runs on folds of one store"
            )
        if run.config.post_processing != first.config.post_processing:
            raise ConfigError(
                f"{run.path}: its config has another post_processing than {first.path}; "
                "one sweep needs one start"
            )
    for number, run in enumerate(runs):
        for other in runs[:number]:
            if run.weights_sha256 == other.weights_sha256:
                raise ConfigError(f"{run.path}: has the same weights as {other.path}; drop one")
    return _open_store(first, store), runs


def read_run(path: Path, *, weights: Which) -> HeldOutRun:
    """What the files of one finished run say."""
    config = read_run_config(path, DetectConfig, kind=KIND)
    data: Any = read_json(path / DATA_FILE)
    stored = stored_weights(path, weights)
    if stored is None:
        advice = "take --weights last" if weights == "best" else "train the run first"
        raise CheckpointError(f"{path}: no {file_of(path, weights).name}; {advice}")
    try:
        return HeldOutRun(
            path=path,
            fold=int(data["fold"]),
            cases=tuple(data["val"]),
            trained_on=frozenset(data["train"]),
            store_digest=str(data["store"]),
            store=_recorded_store(path),
            weights=weights,
            weights_sha256=stored.sha256,
            config=config,
            num_classes=int(data["detector"]["num_classes"]),
        )
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: {DATA_FILE} or {ENVIRONMENT_FILE} is damaged ({error!r})"
        ) from error


def recorded_store(path: Path) -> Path | None:
    """Where the store of the run at `path` lay at its last start; None where nothing tells."""
    try:
        return _recorded_store(path)
    except (KeyError, IndexError, TypeError, AttributeError):
        return None


def runs_by_case(
    runs: Sequence[HeldOutRun], *, one_each: bool = False
) -> dict[str, tuple[HeldOutRun, ...]]:
    """Every held-out case, by name, with the runs that held it out: equally many for all.

    `one_each`: more than one is refused, and so is a case that its own run was trained on.
    """
    found: dict[str, list[HeldOutRun]] = {}
    for run in runs:
        if not run.cases:
            raise ConfigError(
                f"{run.path}: fold {run.fold} held out no case, so none can be tested"
            )
        if one_each and (seen := run.trained_on.intersection(run.cases)):
            raise ConfigError(
                f"{run.path}: was trained on its held-out case {min(seen)} (a data set with a "
                "single patient has no other); nothing can be measured on it"
            )
        for case in run.cases:
            found.setdefault(case, []).append(run)
    counts = {case: len(holders) for case, holders in found.items()}
    most = max(counts, key=lambda case: counts[case])
    fewest = min(counts, key=lambda case: counts[case])
    if counts[most] > 1 and (one_each or counts[most] != counts[fewest]):
        first, second, *_ = found[most]
        raise ConfigError(
            f"case {most} is held out by {counts[most]} runs ({first.path}, {second.path}), "
            + ("expected one" if one_each else f"case {fewest} by {counts[fewest]}")
            + "; take runs on different folds"
        )
    return {case: tuple(found[case]) for case in sorted(found)}


def _recorded_store(path: Path) -> Path | None:
    recorded = read_json(path / ENVIRONMENT_FILE)["starts"][-1]["arguments"].get("store")
    return Path(recorded) if recorded else None


def _open_store(run: HeldOutRun, given: Path | None) -> CaseStore:
    place = given or run.store
    if place is None or (given is None and not place.is_dir()):
        raise ConfigError(
            f"{run.path}: its store {place or ''} is not here; name the store with --store"
        )
    store = CaseStore.open(place)
    if store.digest != run.store_digest:
        raise DataError(
            f"{place}: not the store that {run.path} was trained on (digest "
            f"{store.digest[:12]}, expected {run.store_digest[:12]}); name that one with --store"
        )
    return store
