"""vb-sup: supervised pre-training on many partially labelled data sets."""

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

PACKAGE = "voxelbridge.pretrain_sup"

app = make_app(
    "Supervised pre-training of 3D encoders on many data sets.",
    command="vb-sup",
    package="voxelbridge-pretrain-sup",
)


class Normalization(StrEnum):
    """How intensities are normalised."""

    zscore = "zscore"
    ct = "ct"
    auto = "auto"


class Modality(StrEnum):
    """What an image of the catalogue was made with."""

    CT = "CT"
    CTA = "CTA"
    CBCT = "CBCT"
    MRI = "MRI"
    MRA = "MRA"
    PET = "PET"


class Layout(StrEnum):
    """Which outputs learn which data set."""

    per_dataset = "per_dataset"
    joint = "joint"


Preset = Annotated[
    str,
    typer.Argument(
        help="Shipped preset (multitalent_resenc_l, multitalent_retina_unet, multitalent_small, "
        "multitalent_retina_unet_small) or a TOML file."
    ),
]


@app.command()
def prepare(
    datasets: Annotated[
        list[Path], typer.Argument(help="Raw data set folders, one after the other.")
    ],
    store: Annotated[Path, typer.Argument(help="Case store to write or to complete.")],
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0: this one.")] = 2,
    spacing: Annotated[
        tuple[float, float, float] | None,
        typer.Option(metavar="Z Y X", help="Spacing in mm; default 1 1 1, or the store's."),
    ] = None,
    normalization: Annotated[
        Normalization | None,
        typer.Option(
            help="zscore: every image by itself (default, or the store's); ct: by the data set's "
            "foreground; auto: channels called CT as ct, others as zscore."
        ),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="Changes to targets and names.")
    ] = None,
    max_targets: Annotated[
        int | None, typer.Option(min=1, help="Targets of one head; more are split (20).")
    ] = None,
    layout: Annotated[
        Layout | None, typer.Option(help="Heads per data set (default), or one joint layer.")
    ] = None,
    executor: Annotated[str, typer.Option(help="local, or dask:ADDRESS of a scheduler.")] = "local",
    dry_run: DryPrepare = False,
) -> None:
    """Bring raw data sets into one case store; what is done is skipped."""
    from voxelbridge.core.data.cluster import open_executor
    from voxelbridge.pretrain_sup.catalogue import leakage_notes
    from voxelbridge.pretrain_sup.prepare import describe
    from voxelbridge.pretrain_sup.prepare import prepare as prepare_store
    from voxelbridge.pretrain_sup.prepare_sources import PrepareRequest

    request = PrepareRequest(
        spacing_mm=spacing,
        normalization=None if normalization is None else normalization.value,
        labels=labels,
        max_targets=max_targets,
        layout=None if layout is None else layout.value,
    )
    if dry_run:
        typer.echo(describe(datasets, store, request=request))
        return
    with open_executor(executor) as cluster:
        report = prepare_store(datasets, store, request=request, workers=workers, executor=cluster)
    for failure in report.failures:
        typer.echo(f"failed: {failure}", err=True)
    space = report.label_space
    typer.echo(
        f"{store}: {report.num_cases} cases ({report.num_new} new) of {len(space.datasets)} data "
        f"sets, {len(space.heads)} heads, {len(report.failures)} failed"
    )
    for note in leakage_notes(dataset.name for dataset in space.datasets):
        typer.echo(f"note: {note}")
    if report.failures:
        raise typer.Exit(1)


@app.command()
def train(
    preset: Preset,
    store: Annotated[Path, typer.Option(help="Store that `vb-sup prepare` made; read only.")],
    run: Annotated[Path, typer.Option(help="Run directory; an existing one is continued.")],
    overrides: Overrides = None,
    extend: Annotated[
        Path | None,
        typer.Option(
            metavar="OLDRUN",
            help="Begin with all weights of this run; data sets new to it get new stems and heads.",
        ),
    ] = None,
    device: Device = "auto",
    workers: Annotated[int, typer.Option(min=0, help="Processes that load; 0: this one.")] = 2,
    tensorboard: Annotated[bool, typer.Option(help="Also write TensorBoard files.")] = False,
    dry_run: Annotated[bool, typer.Option(help="One step, nothing written.")] = False,
) -> None:
    """Train on all data sets at once; the same command on an existing run goes on."""
    from voxelbridge.core.config import load_config, preset_path
    from voxelbridge.pretrain_sup.config import MultiTalentConfig
    from voxelbridge.pretrain_sup.train import train as train_run

    resolved = load_config(MultiTalentConfig, preset_path(PACKAGE, preset), overrides or ())
    train_run(
        resolved.config,
        store=store,
        run=run,
        extend=extend,
        device=device,
        workers=workers,
        tensorboard=tensorboard,
        dry_run=dry_run,
    )


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .safetensors to write.")],
    default_stem: Annotated[
        str | None,
        typer.Option(
            metavar="DATASET",
            help="Stem for whoever names none; else the data set with the most cases.",
        ),
    ] = None,
    license_name: License = None,
) -> None:
    """Write the run's stems, trunk and decoder as a checkpoint; heads stay behind."""
    from voxelbridge.pretrain_sup.export import export as export_run

    metadata = export_run(run, output, default_stem=default_stem, license_name=license_name)
    typer.echo(f"{output}: {metadata.method}, {metadata.source.steps} steps")
    for name, stem in metadata.stems.items():
        chosen = ", the default" if name == metadata.default_stem else ""
        plural = "" if stem.channels == 1 else "s"
        typer.echo(f"  stem {name}: {stem.channels} channel{plural} ({stem.modality}){chosen}")


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="Run directory of a finished training.")],
    images: Annotated[list[Path], typer.Option(help="Folder or file, DICOM too; repeatable.")],
    out: Annotated[Path, typer.Option(help="Folder to write label maps and pictures to.")],
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Whose labels; needed where several have as many channels."
        ),
    ] = None,
    head: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this head of the data set; repeatable."),
    ] = None,
    stem: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Data set whose stem and normalisation to use; else the heads'."
        ),
    ] = None,
    mirror: Annotated[
        bool, typer.Option(help="Average mirrored copies: better, up to 8 times slower.")
    ] = True,
    overlays: Annotated[bool, typer.Option(help="Also draw a picture of each case.")] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Predict again what is there.")
    ] = False,
    allow: Annotated[
        list[str] | None,
        typer.Option(help="Accept in DICOM: gap, varying_spacing, duplicate, mixed_geometry."),
    ] = None,
    device: Device = "auto",
) -> None:
    """Write a label map for every image, on its own grid; what is there is skipped."""
    from voxelbridge.pretrain_sup.predict_cases import PredictionRequest, predict_cases

    request = PredictionRequest(
        dataset=dataset,
        heads=tuple(head or ()),
        stem=stem,
        mirror=mirror,
        overwrite=overwrite,
        pictures=overlays,
    )
    count = predict_cases(run, images, out, request=request, device=device, allow=allow or ())
    typer.echo(f"{out}: {count} cases predicted")


@app.command()
def evaluate(
    labels: Annotated[
        Path, typer.Option(metavar="DATASET", help="Raw data set with the reference labels.")
    ],
    predictions: Annotated[Path, typer.Option(metavar="DIR", help="Label maps, one per case.")],
    output: Annotated[Path, typer.Option(help="JSON file to write.")],
    table: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Also a row per case and target.")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this target; repeatable.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Compare the targets as this run learnt them.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0: this one.")] = 2,
) -> None:
    """Dice and surface distances of label maps against the references of a data set."""
    from voxelbridge.pretrain_sup.evaluate import LabelSource, describe_summary, evaluate_files
    from voxelbridge.pretrain_sup.predict_cases import learnt_labels

    learnt = None if run is None else learnt_labels(run, predictions)
    summary = evaluate_files(
        LabelSource.of_dataset(labels, labels=learnt),
        predictions,
        output=output,
        table=table,
        targets=target,
        workers=workers,
    )
    typer.echo(describe_summary(summary))
    typer.echo(f"written to {output}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run directory, finished or not.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML page to write.")],
    predictions: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Folder of `vb-sup predict` to show; repeatable."),
    ] = None,
    metrics: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="JSON of `vb-sup evaluate` to show; repeatable."),
    ] = None,
) -> None:
    """One HTML page to look through: loss curves per data set, predictions, Dice."""
    from voxelbridge.pretrain_sup.report import write_training_report

    write_training_report(run, output, predictions=predictions or (), metrics=metrics or ())
    typer.echo(f"written to {output}")


@app.command()
def show(preset: Preset, overrides: Overrides = None, as_json: Json = False) -> None:
    """Print the resolved settings, each with its origin."""
    from voxelbridge.core.config import load_config, preset_path
    from voxelbridge.pretrain_sup.config import MultiTalentConfig

    settings = load_config(MultiTalentConfig, preset_path(PACKAGE, preset), overrides or ())
    typer.echo(json.dumps(settings.as_json(), indent=2) if as_json else settings.describe())


@app.command()
def catalogue(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    modality: Annotated[
        Modality | None, typer.Option(case_sensitive=False, help="Only data sets that have it.")
    ] = None,
    detection: Annotated[
        str | None,
        typer.Option(
            "--conflicts",
            metavar="D01..D08",
            help="Only data sets that may hold scans of this detection data set, and why.",
        ),
    ] = None,
) -> None:
    """List the paper's 65 pre-training data sets, corrected, and what they share with D01-D08."""
    from voxelbridge.pretrain_sup.catalogue_table import show_catalogue

    show_catalogue(
        modality=None if modality is None else modality.value, detection=detection, as_json=as_json
    )


def main() -> None:
    """Entry point of the command `vb-sup`."""
    run_app(app)


if __name__ == "__main__":
    main()
