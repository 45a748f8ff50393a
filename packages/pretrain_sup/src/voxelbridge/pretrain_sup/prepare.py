"""From several raw data sets to one case store: equal grid, labels with their original ids.

Per case, as for detection: read, bring to LPS, crop to the box of voxels other than 0 (and of
labels), resample image and labels, normalise. Written to STORE beside the cases: `prepare.json`
(the plan) and `label_space.json` (which heads learn which label ids). docs/multi_dataset_store.md.
"""

import functools
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path

from voxelbridge.core.data.case_store import CaseStoreWriter
from voxelbridge.core.data.executor import Failed, map_cases
from voxelbridge.core.data.foreground import samples_per_case
from voxelbridge.core.data.survey import GIB, HeaderSample, free_bytes, stored_names
from voxelbridge.core.errors import DataError, VoxelbridgeError
from voxelbridge.pretrain_sup.dataset_labels import DatasetLabels
from voxelbridge.pretrain_sup.fingerprint import CaseMeasures, measure_case
from voxelbridge.pretrain_sup.label_space import FILE_NAME as LABEL_SPACE_FILE
from voxelbridge.pretrain_sup.label_space import LabelSpace, write_label_space
from voxelbridge.pretrain_sup.plan import (
    DatasetPlan,
    StorePlan,
    needs_foreground,
    plan_dataset,
    write_plan,
)
from voxelbridge.pretrain_sup.prepare_case import CaseTask, SourceCase, store_case
from voxelbridge.pretrain_sup.prepare_sources import PrepareRequest, SourceDataset, inspect


@dataclass(frozen=True)
class PrepareReport:
    """How many cases the store holds, how many this call added, and what failed."""

    num_cases: int
    num_new: int
    label_space: LabelSpace
    failures: tuple[str, ...]


@dataclass(frozen=True)
class _Work:
    """What does the work, and the cases that it could not do."""

    workers: int
    executor: Executor | None
    failures: list[str] = field(default_factory=list)
    failed: set[str] = field(default_factory=set)  # case ids

    def note(self, case: SourceCase, error: VoxelbridgeError) -> None:
        """Keeps one line about a case that failed."""
        text = " ".join(str(error).split())
        for prefix in (f"{case}: ", f"case {case.case_id}: ", f"{case.raw}: "):
            text = text.removeprefix(prefix)
        self.failures.append(f"{case}: {text}")
        self.failed.add(case.case_id)


def prepare(
    datasets: Sequence[Path],
    store: Path,
    *,
    request: PrepareRequest | None = None,
    workers: int = 2,
    executor: Executor | None = None,
) -> PrepareReport:
    """Brings the training cases of raw `datasets` into `store`; what is there is skipped.

    A store takes further data sets at any time. A case that fails is reported and left out; the
    others are stored. Raises ConfigError where the store was begun with another plan or other
    labels, and DataError where a data set cannot be used or no case at all could be stored.
    """
    found = inspect(datasets, store, request or PrepareRequest())
    work = _Work(workers, executor)
    plan = found.plan
    for source in found.sources:
        if source.name not in plan.datasets:
            entry = _plan_of(source, plan, work)
            if entry is not None:
                plan = plan.with_dataset(source.name, entry)
                write_plan(store, plan)
    usable = [source for source in found.sources if source.name in plan.datasets]
    if not usable:
        total = sum(len(source.raw.cases) for source in found.sources)
        raise DataError(f"none of {total} cases can be used; {work.failures[0]}")
    space = found.space_with(usable)
    write_label_space(store / LABEL_SPACE_FILE, space)
    num_new = _store_cases(store, plan, space, usable, work)
    names = stored_names(store)
    if not names:
        raise DataError(f"{store}: no case could be stored; {work.failures[0]}")
    return PrepareReport(len(names), num_new, space, tuple(work.failures))


def describe(
    datasets: Sequence[Path], store: Path, *, request: PrepareRequest | None = None
) -> str:
    """What `prepare` would do, from names and a few headers; nothing is written."""
    found = inspect(datasets, store, request or PrepareRequest())
    space = found.space_with(found.sources)
    done = stored_names(store)
    lines, total = [], 0
    for source in found.sources:
        waiting = [case.raw for case in source.cases() if case.case_id not in done]
        sample = HeaderSample.read(waiting)
        num_channels = len(source.raw.channel_names)
        total += sample.estimated_bytes(
            found.plan.spacing_mm, num_cases=len(waiting), num_channels=num_channels
        )
        heads = ", ".join(
            f"{head.name} ({len(head.targets)} targets)" for head in space.heads_of(source.name)
        )
        lines.append(
            f"  {source.name}: {len(source.raw.cases)} cases, {len(waiting)} waiting; channels "
            f"{', '.join(source.raw.channel_names)}; heads {heads}"
        )
        lines += [f"    unreadable: {text}" for text in sample.unreadable]
    return "\n".join(
        [
            f"{store}: dry run, nothing is written",
            *lines,
            f"  about {total / GIB:.3g} GiB before compression, "
            f"{free_bytes(store) / GIB:.3g} GiB free",
        ]
    )


def _plan_of(source: SourceDataset, plan: StorePlan, work: _Work) -> DatasetPlan | None:
    """Measures a data set that is new to the store; None, and noted, where it cannot be used."""
    cases = source.cases()
    channels = source.raw.channel_names
    draws = samples_per_case(len(cases)) if needs_foreground(plan.normalization, channels) else 0
    measures: list[CaseMeasures] = []
    for outcome in map_cases(
        functools.partial(_measure, labels=source.labels, num_samples=draws),
        cases,
        workers=work.workers,
        description=f"measuring {source.name}",
        executor=work.executor,
    ):
        if isinstance(outcome, Failed):
            work.note(outcome.item, outcome.error)
        else:
            measures.append(outcome.value)
    if not measures:
        return None
    try:
        return plan_dataset(measures, plan, channel_names=channels)
    except DataError as error:
        work.failures.append(f"data set {source.name}: {error}")
        return None


def _measure(case: SourceCase, *, labels: DatasetLabels, num_samples: int) -> CaseMeasures:
    return measure_case(case.raw, labels=labels, num_samples=num_samples)


def _store_cases(
    store: Path,
    plan: StorePlan,
    space: LabelSpace,
    sources: Sequence[SourceDataset],
    work: _Work,
) -> int:
    """Stores what is not there, all data sets together; returns how many cases are new."""
    writer = CaseStoreWriter(store)
    writer.remove_leftovers()
    tasks = []
    for source in sources:
        of_dataset, labels = plan.datasets[source.name], space.dataset(source.name)
        for case in source.cases():
            if case.case_id in work.failed or writer.is_done(case.case_id):
                continue
            provenance = source.provenance(case.raw.case_id, of_dataset)
            tasks.append(CaseTask(case, labels, of_dataset, provenance))
    num_new = 0
    for outcome in map_cases(
        functools.partial(store_case, writer=writer, plan=plan),
        tasks,
        workers=work.workers,
        description="preparing",
        executor=work.executor,
    ):
        if isinstance(outcome, Failed):
            work.note(outcome.item.case, outcome.error)
        else:
            num_new += 1
    writer.finish()
    return num_new
