"""The commands of `vb-detect study`: run, status, report."""

from pathlib import Path
from typing import Annotated

import typer

from voxelbridge.core.command_line import Device

study_app = typer.Typer(no_args_is_help=True)
StudyFile = Annotated[
    str, typer.Argument(metavar="STUDY.toml", help="The study's file, or a shipped study's name.")
]


@study_app.command(name="run")
def study_run(
    study: StudyFile,
    jobs: Annotated[int, typer.Option(min=1, help="Jobs at once on this machine.")] = 1,
    device: Device = "auto",
    executor: Annotated[
        str, typer.Option(metavar="local|dask:ADDRESS|slurm", help="Where the jobs run.")
    ] = "local",
    gpus: Annotated[
        str | None, typer.Option(help="Such as 0,1,2: one job at once on each of these GPUs.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes of a job that load.")] = 2,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List every job with its estimated GPU hours.")
    ] = False,
) -> None:
    """Do every job that is not done; the same command goes on after a stop."""
    from voxelbridge.detect.study.command import run as run_study

    run_study(
        study, jobs=jobs, device=device, executor=executor, gpus=gpus, workers=workers,
        dry_run=dry_run,
    )  # fmt: skip


@study_app.command(name="status")
def study_status(
    study: StudyFile,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """The matrix with progress, failures and the time that is left."""
    from voxelbridge.detect.study.command import status as show_status

    show_status(study, json=as_json)


@study_app.command(name="report")
def study_report(
    study: StudyFile,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder; default: report in the study's.")
    ] = None,
    compare: Annotated[
        str | None, typer.Option(metavar="paper", help="Put the paper's figures beside.")
    ] = None,
    bootstrap: Annotated[
        int, typer.Option(min=1, help="Resamplings of the images for the ranks.")
    ] = 1000,
) -> None:
    """Tables, ranks and figures of what is finished."""
    from voxelbridge.detect.study.command import report as write_report

    write_report(study, output, compare=compare, samples=bootstrap)
