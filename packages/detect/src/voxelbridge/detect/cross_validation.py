"""Every fold trained in turn, and every case tested by the run that did not see it.

The figures are of the original images' voxel edges, as `vb-detect predict` and `evaluate` give
them. nnDetection's consolidation: one post-processing for all folds, swept on their held-out cases
together; figures with it are of the cases that it was chosen on, so those with the settings from
before are written beside them.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from voxelbridge.core.data.case_store import CaseStore
from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.core.files import read_json, sha256_of, write_json
from voxelbridge.core.run import check_same_config
from voxelbridge.core.train.distributed import DeviceChoice
from voxelbridge.detect.build import load_detect_config, with_arguments
from voxelbridge.detect.config import InitParts, PostProcessing, TuneName
from voxelbridge.detect.detections import Detections
from voxelbridge.detect.evaluate.metrics import compute_metrics
from voxelbridge.detect.evaluate.tables import (
    BoxTable,
    write_cases,
    write_ground_truth,
    write_predictions,
)
from voxelbridge.detect.held_out import DATA_FILE, KIND
from voxelbridge.detect.plan import read_plan
from voxelbridge.detect.post_processing_file import (
    ObjectiveName,
    Swept,
    check_same_merging,
    with_swept,
    write_swept,
)
from voxelbridge.detect.predict_cases import to_original
from voxelbridge.detect.prediction_folder import CaseBoxes
from voxelbridge.detect.splits import Split, read_splits
from voxelbridge.detect.sweep import (
    STEPS,
    HeldOutCases,
    StepName,
    merge_held_out,
    predict_held_out,
    raise_for_failures,
    sweep_cases,
)
from voxelbridge.detect.train import train
from voxelbridge.detect.weights import Which, stored_weights

MANIFEST_FILE = "out_of_fold.json"
METRICS_FILE = "metrics.json"
BEFORE_FILE = "metrics_before_sweep.json"

Metrics = dict[str, Any]  # Any: a JSON object


@dataclass(frozen=True)
class OutOfFold:
    """What `out_of_fold` found; `before` and `swept` where a sweep was made."""

    metrics: Metrics
    before: Metrics | None
    swept: Swept | None
    not_held_out: tuple[str, ...]  # cases of the store that were tested by no run
    failed: tuple[str, ...]


def train_folds(
    preset: str,
    *,
    store: Path,
    out: Path,
    folds: Sequence[int] | None = None,
    overrides: Sequence[str] = (),
    init: Path | None = None,
    stem: str | None = None,
    init_parts: InitParts | None = None,
    tune: TuneName | None = None,
    device: DeviceChoice = "auto",
    workers: int = 2,
    tensorboard: bool = False,
) -> list[Path] | None:
    """Trains OUT/fold_K for each of `folds` (None: all of the store); returns them.

    A finished fold is left as it is, after a check that it was trained with these settings; a
    stopped one goes on. None where a signal ended a training: the same call goes on from there.
    """
    if torch.distributed.is_torchelastic_launched():
        raise ConfigError(
            "cross-validate trains in one process; under torchrun, train each fold with "
            "`vb-detect train --fold K` and test them with `vb-detect out-of-fold`"
        )
    _check_folder(out)
    splits = read_splits(store)
    chosen = _chosen_folds(store, splits, folds)
    given = with_arguments(preset, overrides, stem=stem, init_parts=init_parts, tune=tune)
    config = load_detect_config(preset, given, plan=read_plan(store), init=init)
    facts = {"store": CaseStore.open(store).digest, "init": sha256_of(init) if init else None}
    runs = []
    for fold in chosen:
        run = out / f"fold_{fold}"
        runs.append(run)
        if stored_weights(run, "last") is not None:
            check_same_config(run, config, kind=KIND)
            _check_same_facts(run, {**facts, "fold": fold})
            print(f"fold {fold}: finished before, in {run}", flush=True)
            continue
        print(f"fold {fold}: training in {run}", flush=True)
        train(
            preset, store=store, run=run, overrides=overrides, init=init, stem=stem,
            init_parts=init_parts, tune=tune, fold=fold, device=device, workers=workers,
            tensorboard=tensorboard,
        )  # fmt: skip
        if stored_weights(run, "last") is None:
            return None
    return runs


def out_of_fold(
    runs: Sequence[Path],
    out: Path,
    *,
    store: Path | None = None,
    objective: ObjectiveName = "map_range",
    steps: Sequence[StepName] = tuple(STEPS),
    num_mirrorings: int = 8,
    weights: Which = "last",
    bootstrap: int = 0,
    device: DeviceChoice = "auto",
    workers: int = 2,
) -> OutOfFold:
    """Tests runs on the cases that each held out; writes tables and metrics to `out`.

    With `steps` the post-processing is swept on all held-out cases together and written to every
    run; without, each run keeps its own. Raises ConfigError for runs that are not different folds
    of one store. A case that fails is told on stderr and left out.
    """
    _check_folder(out)
    cases = predict_held_out(
        runs, store=store, num_mirrorings=num_mirrorings, weights=weights, device=device,
        one_each=True,
    )  # fmt: skip
    missing = tuple(
        record.case_id
        for record in cases.store.cases
        if record.case_id not in cases.holders and record.case_id not in cases.failed
    )
    if missing:
        print(
            f"note: {len(missing)} of {len(cases.store.cases)} cases of {cases.store.root} were "
            f"held out by none of the runs ({', '.join(missing[:5])}) and are not tested"
        )
    swept = None
    if steps:
        swept = sweep_cases(cases, objective=objective, steps=steps, workers=workers)
        for run in cases.runs:
            write_swept(run.path, swept)
    posts = [swept.post_processing, swept.start] if swept else [shared_settings(cases)]
    found = merge_held_out(cases, posts, workers=workers, description="merging")
    truth, *tables = _original_tables(cases, found)
    names = list(cases.holders)
    num_classes = cases.runs[0].num_classes
    spacings = np.array(
        [cases.store.details(name).mapping.original_grid.spacing_mm for name in names]
    )
    metrics = [
        compute_metrics(
            names,
            truth,
            table,
            num_classes=num_classes,
            spacings=spacings,
            bootstrap=bootstrap if table is tables[0] else 0,
            show_progress=True,
        )
        for table in tables
    ]
    write_cases(out / "cases.csv", names)
    write_ground_truth(out / "ground_truth.csv", truth, cases=names)
    write_predictions(out / "predictions.csv", tables[0], cases=names)
    write_json(out / METRICS_FILE, metrics[0])
    if swept:
        write_json(out / BEFORE_FILE, metrics[1])
    else:
        (out / BEFORE_FILE).unlink(missing_ok=True)
    write_json(out / MANIFEST_FILE, _manifest(cases, missing, posts[0], is_swept=swept is not None))
    return OutOfFold(metrics[0], metrics[1] if swept else None, swept, missing, cases.failed)


def report(result: OutOfFold, out: Path) -> None:
    """Prints the figures; DataError if cases failed."""
    print(f"{describe(result)}\nwritten to {out}")
    raise_for_failures(result.failed, of=result.metrics["num_cases"])


def shared_settings(cases: HeldOutCases) -> PostProcessing:
    """The post-processing that all runs predict with; a ConfigError where they have several."""
    posts = [
        with_swept(run.path, run.config, weights=run.weights).post_processing for run in cases.runs
    ]
    check_same_merging([run.path for run in cases.runs], posts)
    return posts[0]


def describe(result: OutOfFold) -> str:
    """The figures of merit, for a person."""
    metrics = result.metrics
    lines = [f"{metrics['num_cases']} cases out of fold, {metrics['num_objects']} objects"]
    for name, content in (("with the swept settings", metrics), ("before", result.before)):
        if content is not None:
            figures = (
                f"mAP@0.10 {_figure(content['ap']['0.10']['map'])}, "
                f"mAP@0.10:0.50 {_figure(content['ap']['0.10:0.50:0.05']['map'])}, "
                f"FROC@0.10 {_figure(content['froc']['0.10']['pooled']['mean'])}"
            )
            lines.append(f"  {name:<24} {figures}" if result.swept else f"  {figures}")
    return "\n".join(lines)


def parse_folds(text: str | None) -> list[int] | None:
    """`0,1,3` or `0-4` as numbers; None stays None; anything else is a ConfigError."""
    if text is None:
        return None
    folds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ConfigError(f"--folds {text}: expected numbers such as 0,1,2 or 0-4")
        if int(last or first) < int(first):
            raise ConfigError(f"--folds {part.strip()}: goes down; write {last}-{first}")
        folds += range(int(first), int(last or first) + 1)
    return folds


def _check_folder(out: Path) -> None:
    """Told before hours of work: DataError where `out` cannot become a folder to write to."""
    nearest = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise DataError(f"--out {out}: {nearest} is a file; name another folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise DataError(f"--out {out}: {nearest} may not be written to; name another folder")


def _chosen_folds(store: Path, splits: Sequence[Split], folds: Sequence[int] | None) -> list[int]:
    """The folds to train, each once, ascending; those that cannot be tested are refused."""
    chosen = sorted(set(range(len(splits)) if folds is None else folds))
    held_out: dict[str, int] = {}
    for fold in chosen:
        if not 0 <= fold < len(splits):
            raise ConfigError(f"--folds: {store} has folds 0 to {len(splits) - 1}, got {fold}")
        split = splits[fold]
        if not split["val"]:
            raise ConfigError(f"{store}: fold {fold} holds out no case, so it cannot be tested")
        if seen := set(split["train"]).intersection(split["val"]):
            raise ConfigError(
                f"{store}: fold {fold} trains on its held-out case {min(seen)} (a data set with a "
                "single patient has no other); cross-validation needs two patients or more"
            )
        for case_id in split["val"]:
            if case_id in held_out:
                raise ConfigError(
                    f"{store}: case {case_id} is held out by folds {held_out[case_id]} and {fold}; "
                    "choose folds with --folds that share none"
                )
            held_out[case_id] = fold
    if not chosen:
        raise ConfigError(f"{store}: no fold to train")
    return chosen


def _check_same_facts(run: Path, facts: dict[str, Any]) -> None:
    data = read_json(run / DATA_FILE)
    before = {
        "store": data.get("store"),
        "fold": data.get("fold"),
        "init": data.get("detector", {}).get("init_checkpoint_sha256"),
    }
    different = [
        f"{name}: {before[name]} -> {facts[name]}" for name in facts if before[name] != facts[name]
    ]
    if different:
        raise DataError(
            f"{run}: was trained with other data ({'; '.join(different)}); take another --out"
        )


def _original_tables(cases: HeldOutCases, found: dict[str, list[Detections]]) -> list[BoxTable]:
    """Objects, and detections with each of the settings, in voxel edges of the original images."""
    truth: list[tuple[NDArray[np.float64], NDArray[np.int64]]] = []
    parts: list[list[CaseBoxes]] = []
    for case_id, own in found.items():
        details = cases.store.details(case_id)
        record = cases.store.record(case_id)
        stated = details.extra.get("original_boxes")
        boxes = details.mapping.boxes_to_original(record.boxes) if stated is None else stated
        truth.append((np.asarray(boxes, dtype=np.float64).reshape(-1, 6), record.labels))
        parts.append([to_original(part, details.mapping) for part in own])
    tables = [BoxTable.from_cases([boxes for boxes, _ in truth], [labels for _, labels in truth])]
    for column in zip(*parts, strict=True):
        tables.append(
            BoxTable.from_cases(
                [part.boxes for part in column],
                [part.labels for part in column],
                scores=[part.scores for part in column],
            )
        )
    return tables


def _manifest(
    cases: HeldOutCases, missing: Sequence[str], post: PostProcessing, *, is_swept: bool
) -> dict[str, Any]:
    return {
        "schema": 1,
        "store": cases.store.digest,
        "mirrorings": cases.num_mirrorings,
        "swept": is_swept,
        "post_processing": post.model_dump(mode="json"),
        "runs": [
            {
                "run": str(run.path),
                "fold": run.fold,
                "weights": run.weights,
                "weights_sha256": run.weights_sha256,
                "cases": [case for case in run.cases if case in cases.holders],
            }
            for run in cases.runs
        ],
        "failed": list(cases.failed),
        "not_held_out": list(missing),
    }


def _figure(value: float | None) -> str:
    return "none (no objects)" if value is None else f"{value:.4f}"
