"""The commands of `vb-detect` for what was found: evaluate, rank, report."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def evaluate(
    ground_truth: Annotated[
        Path, typer.Option(help="CSV (case_id,label,z0,y0,x0,z1,y1,x1), raw data set, or store.")
    ],
    predictions: Annotated[Path, typer.Option(help="CSV: the same with a score after label.")],
    output: Annotated[Path, typer.Option(help="metrics.json to write.")],
    cases: Annotated[
        Path | None,
        typer.Option(help="CSV: case_id of every evaluated case; default: beside the predictions."),
    ] = None,
    convention: Annotated[
        Literal["clean", "nndetection"],
        typer.Option(help="nndetection reproduces that program's absent classes and NaN."),
    ] = "clean",
    num_classes: Annotated[
        int | None, typer.Option(min=1, help="Number of classes; default: as the tables show.")
    ] = None,
    iou: Annotated[
        list[float] | None,
        typer.Option(help="IoU threshold beside the standard ones, AP and FROC; repeatable."),
    ] = None,
    fppi: Annotated[
        list[float] | None,
        typer.Option(help="False positives per image at which FROC is read; repeatable."),
    ] = None,
    operating_point: Annotated[
        list[float] | None,
        typer.Option(help="Wanted false positives per image; default: FROC's; repeatable."),
    ] = None,
    size_measure: Annotated[
        Literal["volume", "longest-side"], typer.Option(help="What the size of a box is.")
    ] = "volume",
    size_edge: Annotated[
        list[float] | None,
        typer.Option(help="Bound between sizes (mm^3, mm; voxels of a CSV); default terciles."),
    ] = None,
    bootstrap: Annotated[
        int, typer.Option(min=0, help="Resamplings of the images for 95 % intervals.")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of the resamplings.")] = 0,
    plots: Annotated[
        Path | None, typer.Option(help="Folder for the curves and histograms as SVG.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Label maps read at once.")] = 2,
) -> None:
    """Mean average precision, FROC and more of a table of predictions."""
    from voxelbridge.detect.evaluate.measures import requested
    from voxelbridge.detect.evaluate.metrics import evaluate_files

    metrics = evaluate_files(
        ground_truth, predictions, cases=cases, output=output, convention=convention,
        num_classes=num_classes, bootstrap=bootstrap, seed=seed, plots=plots, workers=workers,
        measures=requested(
            iou=iou or [], fppi=fppi or [], operating_rates=operating_point or [],
            size_measure=size_measure, size_edges=size_edge or [],
        ),
    )  # fmt: skip
    print(
        f"{metrics['num_cases']} cases, {metrics['num_objects']} objects: "
        f"mAP@0.10 {_figure(metrics['ap']['0.10']['map'])}, "
        f"FROC@0.10 {_figure(metrics['froc']['0.10']['pooled']['mean'])}; written to {output}"
    )


def rank(
    tables: Annotated[
        list[Path],
        typer.Argument(help="CSV of box tables, of figures per case, or of resamples."),
    ],
    output: Annotated[Path, typer.Option(help="Folder for ranking.csv, ranking.json, figures.")],
    baseline: Annotated[
        str | None,
        typer.Option(
            help="Method to compare with, or its part after the / in each architecture; "
            "default: default or none-default, if there is one."
        ),
    ] = None,
    measure: Annotated[
        list[str] | None,
        typer.Option(
            help="map_0.10, froc_0.30, map_range, ...; repeatable. Default: map_0.10 and froc_0.10."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Resamplings of the images.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the resamplings.")] = 0,
) -> None:
    """Rank methods over data sets in resamplings of the images, with figures."""
    from voxelbridge.detect.rank_files import describe_ranking, run_rank

    rankings = run_rank(
        tables, output, baseline=baseline, measures=measure or [], samples=samples, seed=seed
    )
    for name, ranking in rankings.items():
        print(describe_ranking(name, ranking))
    print(f"written to {output}")


def report(
    folder: Annotated[Path, typer.Argument(help="Run directory, or folder of predictions.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML page to write.")],
    ground_truth: Annotated[
        Path | None, typer.Option(help="ground_truth.csv, if it is not in the folder.")
    ] = None,
) -> None:
    """One HTML page to look through: curves, tables, and slices through every box."""
    from voxelbridge.detect.report_inputs import report_folder

    report_folder(folder, output, ground_truth=ground_truth)
    print(f"written to {output}")


def _figure(value: float | None) -> str:
    return "none (no objects)" if value is None else f"{value:.4f}"
