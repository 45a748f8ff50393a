"""vb-ssl: self-supervised pre-training from a folder of images to a checkpoint."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from voxelbridge.core.command_line import (
    Device,
    DryPrepare,
    Json,
    License,
    Overrides,
    make_app,
    run_app,
)

PACKAGE = "voxelbridge.pretrain_ssl"

app = make_app(
    "Self-supervised pre-training of 3D encoders.",
    command="vb-ssl",
    package="voxelbridge-pretrain-ssl",
)


class Plan(StrEnum):
    """Which spacing the cases get."""

    fixed = "fixed"
    median = "median"
    none = "none"


class Frames(StrEnum):
    """Which volume a time series gives."""

    mean = "mean"
    first = "first"


Preset = Annotated[
    str,
    typer.Argument(
        help="Shipped preset (mae, s3d, models_genesis, voco; each also with _24gb or _small) or a "
        "TOML file."
    ),
]


@app.command()
def prepare(
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder of images or DICOM series, raw data set, BIDS or CT-RATE tree, or nnssl's "
            "pretrain_data.json."
        ),
    ],
    store: Annotated[Path, typer.Argument(help="Case store to write or to complete.")],
    plan: Annotated[
        Plan, typer.Option(help="fixed: 1 mm; median: the median spacing; none: native grid.")
    ] = Plan.fixed,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0: this one.")] = 2,
    root: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="What $NAME in a pretrain_data.json stands for."),
    ] = None,
    modality: Annotated[
        list[str] | None, typer.Option(help="Only images of this modality; repeatable.")
    ] = None,
    allow: Annotated[
        list[str] | None, typer.Option(help="DICOM defect to accept; repeatable.")
    ] = None,
    frames: Annotated[
        Frames, typer.Option(help="The volume that a time series of a BIDS tree gives.")
    ] = Frames.mean,
    executor: Annotated[str, typer.Option(help="local, or dask:ADDRESS of a scheduler.")] = "local",
    dry_run: DryPrepare = False,
) -> None:
    """Bring images into a case store; what is done is skipped."""
    from voxelbridge.core.data.cluster import open_executor
    from voxelbridge.pretrain_ssl.prepare import describe_source
    from voxelbridge.pretrain_ssl.prepare import prepare as prepare_store

    roots = _roots(root or [])
    if dry_run:
        typer.echo(
            describe_source(
                source, store, roots=roots, allow=allow or (), frames=frames.value,
                modalities=modality or (),
            )
        )  # fmt: skip
        return
    with open_executor(executor) as cluster:
        report = prepare_store(
            source, store, plan=plan.value, workers=workers, roots=roots, allow=allow or (),
            frames=frames.value, modalities=modality or (), executor=cluster,
        )  # fmt: skip
    for note in report.notes:
        typer.echo(f"note: {note}")
    for failure in report.failures:
        typer.echo(f"failed: {failure}", err=True)
    typer.echo(
        f"{store}: {report.num_cases} cases ({report.num_skipped} were there), "
        f"{len(report.failures)} failed"
    )
    if report.failures:
        raise typer.Exit(1)


@app.command()
def train(
    preset: Preset,
    store: Annotated[Path, typer.Option(help="Case store; read only.")],
    run: Annotated[Path, typer.Option(help="Run directory; an existing one is continued.")],
    overrides: Overrides = None,
    device: Device = "auto",
    workers: Annotated[int, typer.Option(min=0, help="Processes that load; 0: this one.")] = 2,
    tensorboard: Annotated[bool, typer.Option(help="Also write TensorBoard files.")] = False,
    dry_run: Annotated[bool, typer.Option(help="One step, nothing written.")] = False,
) -> None:
    """Pre-train; the same command on an existing run goes on where it stopped."""
    from voxelbridge.core.config import load_config, preset_path
    from voxelbridge.pretrain_ssl.config import PretrainConfig
    from voxelbridge.pretrain_ssl.train import train as train_run

    resolved = load_config(PretrainConfig, preset_path(PACKAGE, preset), overrides or ())
    train_run(
        resolved.config,
        store=store,
        run=run,
        device=device,
        workers=workers,
        tensorboard=tensorboard,
        dry_run=dry_run,
    )


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .safetensors to write.")],
    license_name: License = None,
) -> None:
    """Write the run's encoder (and decoder where it has one) as a checkpoint."""
    from voxelbridge.pretrain_ssl.export import export as export_run

    metadata = export_run(run, output, license_name=license_name)
    typer.echo(f"{output}: {metadata.method}, {metadata.source.steps} steps")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run directory, finished or not.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML page to write.")],
) -> None:
    """One HTML page to look through: loss curves and pictures."""
    from voxelbridge.pretrain_ssl.report import write_pretraining_report

    write_pretraining_report(run, output)
    typer.echo(f"written to {output}")


@app.command()
def show(preset: Preset, overrides: Overrides = None, as_json: Json = False) -> None:
    """Print the resolved settings, each with its origin."""
    from voxelbridge.core.config import load_config, preset_path
    from voxelbridge.pretrain_ssl.config import PretrainConfig

    settings = load_config(PretrainConfig, preset_path(PACKAGE, preset), overrides or ())
    typer.echo(json.dumps(settings.as_json(), indent=2) if as_json else settings.describe())


def _roots(given: list[str]) -> dict[str, Path]:
    """NAME=PATH options as a dictionary; a wrong one is a usage error."""
    from voxelbridge.core.errors import ConfigError

    roots = {}
    for text in given:
        name, separator, path = text.partition("=")
        if not (name and separator and path):
            raise ConfigError(f"--root {text}: expected NAME=PATH, for instance nnssl_raw=/data")
        roots[name.lstrip("$")] = Path(path)
    return roots


def main() -> None:
    """Entry point of the command `vb-ssl`."""
    run_app(app)


if __name__ == "__main__":
    main()
