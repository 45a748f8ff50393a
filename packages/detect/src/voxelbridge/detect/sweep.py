"""The post-processing of a run, chosen on the cases that its training did not see.

After nnDetection (commit 97a58f3): every held-out case is predicted once, then five settings are
tried one after the other, each over its values with the others at the best found so far; of equal
values the first wins. Boxes and objects are compared in the stored grid. Several runs, the folds of
one cross-validation, share one setting, chosen on all their held-out cases together.
"""

import io
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from voxelbridge.core.data.case_store import CaseStore
from voxelbridge.core.data.executor import Done, Failed, map_cases
from voxelbridge.core.errors import ConfigError, DataError, VoxelbridgeError
from voxelbridge.core.progress import track
from voxelbridge.core.train.distributed import DeviceChoice, choose_device
from voxelbridge.core.train.steps import place
from voxelbridge.detect.config import PostProcessing
from voxelbridge.detect.detections import Detections
from voxelbridge.detect.evaluate.measures import RANGE_KEY, Measures
from voxelbridge.detect.evaluate.metrics import compute_metrics
from voxelbridge.detect.evaluate.tables import BoxTable
from voxelbridge.detect.held_out import HeldOutRun, open_runs, runs_by_case
from voxelbridge.detect.post_processing_file import (
    Figures,
    ObjectiveName,
    Swept,
    SweptRun,
    Tried,
    write_swept,
)
from voxelbridge.detect.predict import merge_proposals, propose
from voxelbridge.detect.train import load_run
from voxelbridge.detect.validation_cache import ProposalCache
from voxelbridge.detect.weights import Which

StepName = Literal["model_iou", "suppression", "ensemble_iou", "model_min_score", "min_size"]
Value = float | str
STEPS: Mapping[StepName, tuple[Value, ...]] = {
    "model_iou": (1e-5, 0.1, 0.2, 0.3, 0.4, 0.5),
    "suppression": ("weighted", "plain"),
    "ensemble_iou": (1e-5, 0.1, 0.2, 0.3, 0.4, 0.5),
    "model_min_score": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6),
    "min_size": (0.01, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0),  # voxels of the stored grid
}
CHUNKS_PER_WORKER = 4  # of cases; more would spend the time on starting processes

Shape = tuple[int, int, int]
Evaluate = Callable[[Sequence[PostProcessing]], list[Figures]]


@dataclass(frozen=True)
class HeldOutCases:
    """Held-out cases whose proposals are on the disk, by name."""

    store: CaseStore
    runs: tuple[HeldOutRun, ...]
    holders: Mapping[str, tuple[HeldOutRun, ...]]  # of every case, those that could be predicted
    caches: Mapping[Path, ProposalCache]  # by run
    failed: tuple[str, ...]
    num_mirrorings: int

    def merged(self, case_id: str, posts: Sequence[PostProcessing]) -> list[Detections]:
        """What is found in a case, in voxels of the stored grid, with each of the settings."""
        proposals = [
            pair for run in self.holders[case_id] for pair in self.caches[run.path].read(case_id)
        ]
        shape = self.store.record(case_id).shape[1:]
        return [merge_proposals(proposals, shape, post) for post in posts]


def sweep(
    runs: Sequence[Path],
    *,
    store: Path | None = None,
    objective: ObjectiveName = "map_range",
    steps: Sequence[StepName] = tuple(STEPS),
    num_mirrorings: int = 8,
    weights: Which = "last",
    device: DeviceChoice = "auto",
    workers: int = 2,
) -> Swept:
    """Chooses the post-processing of `runs` and writes it to each as post_processing.json.

    What was predicted by an earlier call is not predicted again. A case that fails is told on
    stderr and named in `failed_cases`; the choice is made on the others.
    """
    cases = predict_held_out(
        runs, store=store, num_mirrorings=num_mirrorings, weights=weights, device=device
    )
    swept = sweep_cases(cases, objective=objective, steps=steps, workers=workers)
    for run in cases.runs:
        write_swept(run.path, swept)
    return swept


def run_sweep(
    runs: Sequence[Path],
    *,
    store: Path | None,
    objective: ObjectiveName,
    steps: Sequence[StepName],
    num_mirrorings: int,
    weights: Which,
    device: DeviceChoice,
    workers: int,
    as_json: bool,
) -> None:
    """The command: prints the table or what was written; DataError at the end if cases failed."""
    # JSON must be alone on stdout, where progress is told as well.
    with redirect_stdout(io.StringIO()) if as_json else nullcontext():
        swept = sweep(
            runs,
            store=store,
            objective=objective,
            steps=steps,
            num_mirrorings=num_mirrorings,
            weights=weights,
            device=device,
            workers=workers,
        )
    if as_json:
        print(json.dumps(swept.model_dump(mode="json", by_alias=True), indent=2))
    else:
        print(describe(swept))
    raise_for_failures(swept.failed_cases, of=swept.num_cases)


def predict_held_out(
    paths: Sequence[Path],
    *,
    store: Path | None,
    num_mirrorings: int,
    weights: Which,
    device: DeviceChoice,
    one_each: bool = False,
) -> HeldOutCases:
    """The held-out cases of runs, each predicted by the runs that held it out, or read from disk.

    A case that fails is told in one line on stderr and left out.
    """
    opened, runs = open_runs(paths, store=store, weights=weights)
    holders = runs_by_case(runs, one_each=one_each)
    target = choose_device(device)
    caches = {}
    failed: set[str] = set()
    for run in runs:
        for case_id in run.cases:
            opened.record(case_id)  # a case that is not in the store is told before the work
        cache = caches[run.path] = ProposalCache.open(run, num_mirrorings=num_mirrorings)
        missing = [case_id for case_id in run.cases if not cache.has(case_id)]
        failed.update(_fill(cache, run, opened, missing, target, num_mirrorings))
    if len(failed) == len(holders):
        raise DataError(f"none of the {len(failed)} held-out cases could be predicted; see above")
    kept = {case_id: own for case_id, own in holders.items() if case_id not in failed}
    return HeldOutCases(opened, tuple(runs), kept, caches, tuple(sorted(failed)), num_mirrorings)


def sweep_cases(
    cases: HeldOutCases, *, objective: ObjectiveName, steps: Sequence[StepName], workers: int
) -> Swept:
    """The greedy choice on predicted cases, as it is written to the runs."""
    records = [cases.store.record(case_id) for case_id in cases.holders]
    num_objects = sum(len(record.labels) for record in records)
    if num_objects == 0:
        raise DataError(
            f"the {len(records)} held-out cases hold no object, so no setting is better than "
            "another; sweep several folds together, or keep the settings of the preset"
        )
    first = cases.runs[0]
    start = first.config.post_processing
    grid: list[tuple[StepName, Sequence[Value]]] = [
        (name, STEPS[name]) for name in STEPS if name in steps
    ]
    best, tried, figures = greedy(
        start, grid, partial(_evaluate, cases, workers=workers), objective=objective
    )
    return Swept(
        post_processing=best,
        objective=objective,
        before=figures[start],
        after=figures[best],
        start=start,
        tried=tuple(tried),
        runs=tuple(
            SweptRun(
                run=str(run.path), fold=run.fold, weights=run.weights,
                weights_sha256=run.weights_sha256,
            )
            for run in cases.runs
        ),
        mirrorings=cases.num_mirrorings,
        store=cases.store.digest,
        num_cases=len(records),
        num_objects=num_objects,
        failed_cases=cases.failed,
        seen_in_training=seen_in_training(cases),
    )  # fmt: skip


def seen_in_training(cases: HeldOutCases) -> tuple[str, ...]:
    """The cases that a run which held them out was trained on: the only patient of a data set."""
    return tuple(
        case_id
        for case_id, holders in cases.holders.items()
        if any(case_id in run.trained_on for run in holders)
    )


def greedy(
    start: PostProcessing,
    grid: Sequence[tuple[StepName, Sequence[Value]]],
    evaluate: Evaluate,
    *,
    objective: ObjectiveName,
) -> tuple[PostProcessing, list[Tried], dict[PostProcessing, Figures]]:
    """The best setting by one pass over `grid`, everything tried, and the figures of each setting.

    A start value that is not among a step's values is tried last, so that the end is never worse
    than the start. No setting is evaluated twice.
    """
    best = start
    figures: dict[PostProcessing, Figures] = {}
    tried: list[Tried] = []
    for name, values in grid:
        own = getattr(best, name)
        values = [*values, own] if own not in values else list(values)
        settings = [best.model_copy(update={name: value}) for value in values]
        new = [setting for setting in settings if setting not in figures]
        if start not in figures and start not in new:
            new.append(start)
        figures.update(zip(new, evaluate(new) if new else [], strict=True))
        reached = [figures[setting][objective] for setting in settings]
        winner = reached.index(max(reached))
        best = settings[winner]
        tried += [
            Tried(step=name, value=value, figures=figures[setting], chosen=number == winner)
            for number, (value, setting) in enumerate(zip(values, settings, strict=True))
        ]
    if not grid:
        figures[start] = evaluate([start])[0]
    return best, tried, figures


def merge_held_out(
    cases: HeldOutCases, posts: Sequence[PostProcessing], *, workers: int, description: str
) -> dict[str, list[Detections]]:
    """Per case what is found with each of the settings; in `workers` processes."""
    names = list(cases.holders)
    count = max(1, min(len(names), workers * CHUNKS_PER_WORKER))
    chunks = [_Chunk(tuple(names[number::count])) for number in range(count)]
    merge = partial(_merge_chunk, cases, tuple(posts))
    found: dict[str, list[Detections]] = {}
    for outcome in map_cases(
        merge, chunks, workers=workers, description=description, timeout_s=None
    ):
        match outcome:
            case Done(value=value):
                found.update({name: [_unpacked(part) for part in own] for name, own in value})
            case Failed(error=error):
                raise error
    return {name: found[name] for name in names}


def figures_of(cases: HeldOutCases, found: Sequence[Detections]) -> Figures:
    """The six figures of merit of detections in the stored grid, one entry per case in order."""
    records = [cases.store.record(case_id) for case_id in cases.holders]
    truth = BoxTable.from_cases(
        [record.boxes for record in records], [record.labels for record in records]
    )
    table = BoxTable.from_cases(
        [part.boxes for part in found],
        [part.labels for part in found],
        scores=[part.scores for part in found],
    )
    metrics = compute_metrics(
        list(cases.holders),
        truth,
        table,
        num_classes=cases.runs[0].num_classes,
        measures=Measures(operating_rates=(1.0,), sizes=None),
    )
    ap, froc = metrics["ap"], metrics["froc"]
    return {
        "map_range": ap[RANGE_KEY]["map"],
        "map_0.10": ap["0.10"]["map"],
        "map_0.30": ap["0.30"]["map"],
        "map_0.50": ap["0.50"]["map"],
        "froc_0.10": froc["0.10"]["pooled"]["mean"],
        "froc_0.30": froc["0.30"]["pooled"]["mean"],
    }


def chosen_steps(*, only: Sequence[str], skip: Sequence[str]) -> tuple[StepName, ...]:
    """The steps to take for `--only` and `--skip`; a ConfigError for names that are none."""
    for option, names in (("--only", only), ("--skip", skip)):
        for name in names:
            if name not in STEPS:
                raise ConfigError(f"{option} {name}: expected one of {', '.join(STEPS)}")
    if only and skip:
        raise ConfigError("--only and --skip: give one of them")
    return tuple(name for name in STEPS if (name in only if only else name not in skip))


def describe(swept: Swept) -> str:
    """The table of everything tried, for a person."""
    shown: tuple[ObjectiveName, ...] = tuple(
        dict.fromkeys((swept.objective, "map_range", "map_0.10", "froc_0.10"))
    )
    lines = [
        f"{swept.num_cases} held-out cases, {swept.num_objects} objects, "
        f"{swept.mirrorings} mirrorings, objective {swept.objective}",
        f"  {'setting':<16} {'value':>9}  " + "  ".join(f"{name:>9}" for name in shown),
        _row("as before", "", swept.before, shown),
    ]
    for name, rows in itertools.groupby(swept.tried, key=lambda row: row.step):
        lines += [
            _row(name, row.value, row.figures, shown) + ("  <-" if row.chosen else "")
            for row in rows
        ]
    lines.append(_row("chosen", "", swept.after, shown))
    if swept.seen_in_training:
        lines.append(
            f"careful: training saw {', '.join(swept.seen_in_training[:5])} (a data set with a "
            "single patient has no other); these figures say nothing about new cases"
        )
    return "\n".join(lines)


def raise_for_failures(failed: Sequence[str], *, of: int) -> None:
    """A DataError that names the failed cases beside `of` good ones, if there are any."""
    if failed:
        raise DataError(
            f"{len(failed)} of {of + len(failed)} held-out cases could not be predicted "
            f"({', '.join(failed[:5])}); the others were used"
        )


@dataclass(frozen=True)
class _Chunk:
    """Cases that one process merges."""

    case_ids: tuple[str, ...]

    def __str__(self) -> str:
        return f"cases {self.case_ids[0]} to {self.case_ids[-1]}"


_Packed = tuple[Any, Any, Any]  # boxes, scores, labels as arrays: tensors travel as shared memory


def _fill(
    cache: ProposalCache,
    run: HeldOutRun,
    store: CaseStore,
    case_ids: Sequence[str],
    device: torch.device,
    num_mirrorings: int,
) -> Iterator[str]:
    """Predicts cases into the cache; yields those that failed."""
    if not case_ids:
        return
    detector, config, _ = load_run(run.path, weights=run.weights, swept=False)
    place(detector, device, config.precision)
    for case_id in track(case_ids, description=f"predicting fold {run.fold}"):
        try:
            image = store.read_image(case_id)
            found = propose(detector, config, image, device=device, num_mirrorings=num_mirrorings)
            cache.write(case_id, found)
        except (VoxelbridgeError, ValueError, RuntimeError) as error:
            text = " ".join(str(error).split())
            print(f"error: case {case_id}: {text}", file=sys.stderr)
            yield case_id


def _evaluate(
    cases: HeldOutCases, posts: Sequence[PostProcessing], *, workers: int
) -> list[Figures]:
    found = merge_held_out(
        cases, posts, workers=workers, description=f"merging with {len(posts)} settings"
    )
    return [
        figures_of(cases, [own[number] for own in found.values()]) for number in range(len(posts))
    ]


def _merge_chunk(
    cases: HeldOutCases, posts: Sequence[PostProcessing], chunk: _Chunk
) -> list[tuple[str, list[_Packed]]]:
    return [
        (case_id, [_packed(part) for part in cases.merged(case_id, posts)])
        for case_id in chunk.case_ids
    ]


def _packed(found: Detections) -> _Packed:
    return found.boxes.numpy(), found.scores.numpy(), found.labels.numpy()


def _unpacked(packed: _Packed) -> Detections:
    boxes, scores, labels = (torch.from_numpy(np.ascontiguousarray(part)) for part in packed)
    return Detections(boxes=boxes, scores=scores, labels=labels)


def _row(name: str, value: Value, figures: Figures, shown: Sequence[ObjectiveName]) -> str:
    text = f"{value:g}" if isinstance(value, float) else value
    numbers = "  ".join(f"{figures[figure]:>9.4f}" for figure in shown)
    return f"  {name:<16} {text:>9}  {numbers}"
