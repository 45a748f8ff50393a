"""`vb-detect study run|status|report`."""

import os
from pathlib import Path

from voxelbridge.core.data.cluster import DASK, LOCAL
from voxelbridge.core.errors import ConfigError
from voxelbridge.core.train.distributed import DeviceChoice
from voxelbridge.detect.study.config import read_study
from voxelbridge.detect.study.dry_run import describe_jobs
from voxelbridge.detect.study.jobs import plan_jobs
from voxelbridge.detect.study.launch import open_launcher
from voxelbridge.detect.study.run import report_outcome, work_off
from voxelbridge.detect.study.slurm import submit, write_scripts
from voxelbridge.detect.study.status import as_json, describe, study_status

SLURM = "slurm"


def run(
    study: str,
    *,
    jobs: int,
    device: DeviceChoice,
    executor: str,
    gpus: str | None,
    workers: int,
    dry_run: bool,
) -> None:
    """Works the study off, gives it to a queue, or tells what would be done."""
    cards = _cards(gpus, executor)
    plan = plan_jobs(read_study(study))
    if dry_run:
        print(describe_jobs(plan))
        if executor == SLURM:
            waiting = write_scripts(plan, device=device, workers=workers)
            print(f"{len(waiting)} scripts and submit.sh are in {plan.study.folder / SLURM}")
        return
    if executor == SLURM:
        submitted = submit(plan, device=device, workers=workers)
        print(
            f"{len(submitted.new)} jobs submitted, {len(submitted.queued)} were in the queue; "
            f"`vb-detect study status {study}` shows them"
        )
        return
    slots = len(cards) or jobs
    # Several networks on one machine's cores: each takes its part of them.
    threads = max(1, (os.cpu_count() or 1) // slots) if executor == LOCAL and slots > 1 else None
    with open_launcher(executor, jobs=jobs, gpus=cards) as launcher:
        outcome = work_off(plan, launcher, device=device, workers=workers, threads=threads)
    report_outcome(plan, outcome)


def status(study: str, *, json: bool) -> None:
    """Prints the matrix."""
    plan = plan_jobs(read_study(study))
    found = study_status(plan)
    print(as_json(found) if json else describe(plan, found))


def report(study: str, output: Path | None, *, compare: str | None, samples: int) -> None:
    """Writes tables, rankings and figures."""
    from voxelbridge.detect.study.report import write_report

    if compare not in (None, "paper"):
        raise ConfigError(f"--compare {compare}: expected paper")
    plan = plan_jobs(read_study(study))
    out = output or plan.study.folder / "report"
    for line in write_report(plan, out, with_paper=compare == "paper", samples=samples):
        print(line)


def _cards(gpus: str | None, executor: str) -> tuple[str, ...]:
    """The GPUs that --gpus names; ConfigError where it or --executor cannot be meant so."""
    if executor not in (LOCAL, SLURM) and not executor.startswith(DASK):
        raise ConfigError(f"--executor {executor}: expected {LOCAL}, {DASK}ADDRESS or {SLURM}")
    if gpus is None:
        return ()
    if executor != LOCAL:
        raise ConfigError(f"--gpus: for --executor {LOCAL} alone; the cluster gives out its own")
    cards = tuple(part.strip() for part in gpus.split(","))
    for card in cards:
        if not (card.isdigit() or card.startswith(("GPU-", "MIG-"))):
            raise ConfigError(f"--gpus {gpus}: expected numbers such as 0,1,2, got {card!r}")
    return cards
