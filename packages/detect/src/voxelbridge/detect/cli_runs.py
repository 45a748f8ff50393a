"""The commands of `vb-detect` that train and use runs, from `train` to `export`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from voxelbridge.core.command_line import Device, Overrides
from voxelbridge.detect.cli_options import (
    Mergers,
    Objective,
    RunStore,
    SkippedSteps,
    Store,
    SweepTTA,
    SweptSteps,
    Weights,
)


def train(
    preset: Annotated[str, typer.Argument(help="Name of a shipped preset, or a TOML file.")],
    store: Store,
    run: Annotated[Path, typer.Option(help="Run directory; an existing one is continued.")],
    init: Annotated[
        Path | None, typer.Option(help="Checkpoint (.safetensors) whose encoder is taken over.")
    ] = None,
    stem: Annotated[
        str | None,
        typer.Option(
            help="First layer: checkpoint (equal channels), random, replicate, or a stem's name; "
            "default: the preset's transfer.stem (checkpoint)."
        ),
    ] = None,
    init_parts: Annotated[
        Literal["encoder", "encoder+decoder"] | None,
        typer.Option(
            help="What is taken over; the decoder is a Retina U-Net's pyramid (U-FPN). "
            "Default: the preset's transfer.parts (encoder)."
        ),
    ] = None,
    tune: Annotated[
        Literal["linear", "lora", "full"] | None,
        typer.Option(
            help="linear = the encoder stays frozen, lora = low-rank updates of its convolutions, "
            "full = all weights. Default: the preset's (full)."
        ),
    ] = None,
    fold: Annotated[int, typer.Option(min=0, help="Fold that is held out.")] = 0,
    overrides: Overrides = None,
    device: Device = "auto",
    workers: Annotated[int, typer.Option(min=0, help="Processes that load patches.")] = 2,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write TensorBoard scalars too.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build everything, train one step, write nothing.")
    ] = False,
) -> None:
    """Fine-tune a detector, from scratch or from a pre-trained encoder."""
    from voxelbridge.detect.build import require_checkpoint
    from voxelbridge.detect.train import train as run_train

    require_checkpoint(init, overrides or [], stem=stem)
    run_train(
        preset, store=store, run=run, overrides=overrides or [], init=init, stem=stem,
        init_parts=init_parts, tune=tune, fold=fold, device=device, workers=workers,
        dry_run=dry_run, tensorboard=tensorboard,
    )  # fmt: skip


def predict(
    runs: Annotated[list[Path], typer.Argument(help="Run directories; several are an ensemble.")],
    images: Annotated[list[Path], typer.Option(help="Folder or file, DICOM too; repeatable.")],
    out: Annotated[Path, typer.Option(help="Folder to write to; cases that it holds are skipped.")],
    tta: Annotated[
        int, typer.Option(min=0, max=8, help="Mirrored copies: 0 none, 4 in-plane, 8 all axes.")
    ] = 0,
    min_score: Annotated[float, typer.Option(min=0, max=1, help="Drop boxes below.")] = 0.0,
    max_boxes: Annotated[
        int, typer.Option(min=1, help="Best boxes for the 3D Slicer file and the DICOM SR.")
    ] = 50,
    allow: Annotated[
        list[str] | None,
        typer.Option(help="Accept in DICOM: gap, varying_spacing, duplicate, mixed_geometry."),
    ] = None,
    weights: Weights = "last",
    dicom_sr: Annotated[
        bool, typer.Option("--dicom-sr", help="DICOM input: write a structured report too.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Predict the cases that OUT holds again.")
    ] = False,
    device: Device = "auto",
) -> None:
    """Predict boxes for images: CSV for the set; JSON, 3D Slicer markups and a picture per case."""
    from voxelbridge.detect.predict_cases import predict_cases

    predict_cases(
        runs, images, out, device=device, num_mirrorings=tta, min_score=min_score,
        max_markups=max_boxes, allow=allow or [], weights=weights, dicom_sr=dicom_sr,
        overwrite=overwrite,
    )  # fmt: skip


def sweep(
    runs: Annotated[
        list[Path], typer.Argument(help="Run directories; several folds get one setting.")
    ],
    store: RunStore = None,
    objective: Objective = "map_range",
    only: SweptSteps = None,
    skip: SkippedSteps = None,
    tta: SweepTTA = 8,
    weights: Weights = "last",
    device: Device = "auto",
    workers: Mergers = 2,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what is written to the runs.")
    ] = False,
) -> None:
    """Choose the post-processing on the held-out cases; `predict` then uses it."""
    from voxelbridge.detect.sweep import chosen_steps, run_sweep

    run_sweep(
        runs, store=store, objective=objective,
        steps=chosen_steps(only=only or [], skip=skip or []), num_mirrorings=tta,
        weights=weights, device=device, workers=workers, as_json=as_json,
    )  # fmt: skip


def cross_validate(
    preset: Annotated[str, typer.Argument(help="Name of a shipped preset, or a TOML file.")],
    store: Store,
    out: Annotated[Path, typer.Option(help="Folder for fold_0, fold_1, ... and the results.")],
    folds: Annotated[
        str | None, typer.Option(help="Such as 0,1,2 or 0-4; default: all of the store.")
    ] = None,
    init: Annotated[
        Path | None, typer.Option(help="Checkpoint (.safetensors) whose encoder is taken over.")
    ] = None,
    stem: Annotated[str | None, typer.Option(help="First layer, as in `train`.")] = None,
    init_parts: Annotated[
        Literal["encoder", "encoder+decoder"] | None, typer.Option(help="As in `train`.")
    ] = None,
    tune: Annotated[
        Literal["linear", "lora", "full"] | None, typer.Option(help="As in `train`.")
    ] = None,
    overrides: Overrides = None,
    objective: Objective = "map_range",
    skip: SkippedSteps = None,
    tta: SweepTTA = 8,
    bootstrap: Annotated[
        int, typer.Option(min=0, help="Resamplings of the images for 95 % intervals.")
    ] = 0,
    device: Device = "auto",
    workers: Annotated[int, typer.Option(min=0, help="Processes that load, then merge.")] = 2,
) -> None:
    """Train fold after fold, then test every case by the run that did not see it."""
    from voxelbridge.detect.build import require_checkpoint
    from voxelbridge.detect.cross_validation import out_of_fold as run_out_of_fold
    from voxelbridge.detect.cross_validation import parse_folds, train_folds
    from voxelbridge.detect.cross_validation import report as report_figures
    from voxelbridge.detect.sweep import chosen_steps

    require_checkpoint(init, overrides or [], stem=stem)
    steps = chosen_steps(only=[], skip=skip or [])
    runs = train_folds(
        preset, store=store, out=out, folds=parse_folds(folds), overrides=overrides or [],
        init=init, stem=stem, init_parts=init_parts, tune=tune, device=device, workers=workers,
    )  # fmt: skip
    if runs is None:
        return
    result = run_out_of_fold(
        runs, out, store=store, objective=objective, steps=steps, num_mirrorings=tta,
        bootstrap=bootstrap, device=device, workers=workers,
    )  # fmt: skip
    report_figures(result, out)


def out_of_fold(
    runs: Annotated[list[Path], typer.Argument(help="Runs on different folds of one store.")],
    out: Annotated[Path, typer.Option(help="Folder to write tables and metrics to.")],
    store: RunStore = None,
    objective: Objective = "map_range",
    skip: SkippedSteps = None,
    no_sweep: Annotated[
        bool, typer.Option("--no-sweep", help="Keep the post-processing that the runs have.")
    ] = False,
    tta: SweepTTA = 8,
    weights: Weights = "last",
    bootstrap: Annotated[
        int, typer.Option(min=0, help="Resamplings of the images for 95 % intervals.")
    ] = 0,
    device: Device = "auto",
    workers: Mergers = 2,
) -> None:
    """Test finished runs, each on the cases that it held out, and sweep over all of them."""
    from voxelbridge.detect.cross_validation import out_of_fold as run_out_of_fold
    from voxelbridge.detect.cross_validation import report as report_figures
    from voxelbridge.detect.sweep import chosen_steps

    steps = () if no_sweep else chosen_steps(only=[], skip=skip or [])
    result = run_out_of_fold(
        runs, out, store=store, objective=objective, steps=steps, num_mirrorings=tta,
        weights=weights, bootstrap=bootstrap, device=device, workers=workers,
    )  # fmt: skip
    report_figures(result, out)


def export(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="ONNX file to write.")],
    check: Annotated[
        bool, typer.Option("--check", help="Compare with onnxruntime before the file appears.")
    ] = False,
    weights: Weights = "last",
) -> None:
    """Write a run's network as ONNX: one patch in, raw outputs out."""
    from voxelbridge.detect.export_run import export_run

    print(export_run(run, output, check=check, weights=weights))
