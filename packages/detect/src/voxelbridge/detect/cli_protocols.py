"""The commands of `vb-detect` for official scores: LUNA16, PN9, CTA-A, RibFrac."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

Marks = Annotated[
    Path, typer.Option(help="CSV of marks, or a folder that `predict` wrote (centres of boxes).")
]
Output = Annotated[Path, typer.Option(help="metrics.json to write.")]
Reading = Annotated[
    Literal["interpolated", "next"],
    typer.Option(help="Between points of the curve on a straight line, or the next point."),
]
Bootstrap = Annotated[
    int, typer.Option(min=0, help="Resamplings of the scans for mean and 95 % intervals.")
]
Seed = Annotated[int, typer.Option(min=0, help="Of the resamplings.")]
Workers = Annotated[int, typer.Option(min=0, help="Label maps read at once.")]


def add_protocol_commands(app: typer.Typer) -> None:
    """Adds evaluate-luna16, evaluate-pn9, evaluate-cta-a and evaluate-ribfrac."""
    app.command(name="evaluate-luna16")(evaluate_luna16)
    app.command(name="evaluate-pn9")(evaluate_pn9)
    app.command(name="evaluate-cta-a")(evaluate_cta_a)
    app.command(name="evaluate-ribfrac")(evaluate_ribfrac)


def evaluate_luna16(
    annotations: Annotated[
        Path, typer.Option(help="annotations.csv: seriesuid,coordX,coordY,coordZ,diameter_mm.")
    ],
    excluded: Annotated[Path, typer.Option(help="annotations_excluded.csv: the same columns.")],
    scans: Annotated[Path, typer.Option(help="seriesuids.csv: one UID a line, no header.")],
    predictions: Marks,
    output: Output,
    reading: Reading = "interpolated",
    bootstrap: Bootstrap = 0,
    seed: Seed = 0,
) -> None:
    """Official LUNA16 score of marks: seriesuid,coordX,coordY,coordZ,probability."""
    from voxelbridge.detect.evaluate.protocols.luna16 import evaluate_luna16 as run

    content = run(
        annotations, excluded, scans=scans, predictions=predictions, output=output,
        reading=reading, samples=bootstrap, seed=seed,
    )  # fmt: skip
    _report(content, output)


def evaluate_pn9(
    annotations: Annotated[
        Path, typer.Option(help="CSV: pid,center_x,center_y,center_z,diameter.")
    ],
    scans: Annotated[Path, typer.Option(help="Text file: one pid a line.")],
    predictions: Marks,
    output: Output,
    reading: Reading = "next",
    bootstrap: Bootstrap = 0,
    seed: Seed = 0,
) -> None:
    """PN9 score of marks as SANet computes it: pid,center_x,center_y,center_z,probability."""
    from voxelbridge.detect.evaluate.protocols.pn9 import evaluate_pn9 as run

    content = run(
        annotations, scans=scans, predictions=predictions, output=output, reading=reading,
        samples=bootstrap, seed=seed,
    )  # fmt: skip
    _report(content, output)


def evaluate_cta_a(
    ground_truth: Annotated[Path, typer.Option(help="CSV, raw data set or store, as `evaluate`.")],
    predictions: Annotated[Path, typer.Option(help="CSV of scored boxes, as `evaluate`.")],
    output: Output,
    cases: Annotated[
        Path | None,
        typer.Option(help="CSV: case_id of every evaluated case; default: beside the predictions."),
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(min=1, help="Number of classes; default: as the tables show.")
    ] = None,
    bootstrap: Bootstrap = 0,
    seed: Seed = 0,
    workers: Workers = 2,
) -> None:
    """CTA-A score as the paper describes it: FROC of boxes at IoU 0.3."""
    from voxelbridge.detect.evaluate.protocols.cta_a import evaluate_cta_a as run

    content = run(
        ground_truth, predictions, cases=cases, output=output, num_classes=num_classes,
        samples=bootstrap, seed=seed, workers=workers,
    )  # fmt: skip
    _report(content, output)


def evaluate_ribfrac(
    ground_truth: Annotated[
        Path, typer.Option(help="Folder: ID-label.nii.gz and ribfrac-gt-info.csv.")
    ],
    predictions: Annotated[Path, typer.Option(help="Folder: ID.nii.gz and ribfrac-pred-info.csv.")],
    output: Output,
    undefined: Annotated[
        Literal["count", "ignore"],
        typer.Option(help="Fractures of label_code -1; the official detection score counts them."),
    ] = "count",
    workers: Workers = 2,
) -> None:
    """Official RibFrac detection score of instance maps."""
    from voxelbridge.detect.evaluate.protocols.ribfrac import evaluate_ribfrac as run

    content = run(ground_truth, predictions, output=output, undefined=undefined, workers=workers)
    _report(content, output)


def _report(content: dict[str, Any], output: Path) -> None:  # Any: JSON values
    counts = content["counts"]
    dropped = {name: n for name, n in content.get("dropped", {}).items() if n}
    for name, number in dropped.items():
        reason = "scans that are not listed" if name == "unknown_scans" else "surplus marks"
        print(f"note: {number} marks dropped: {reason}")
    found = counts["true_positives"]
    print(
        f"{content['protocol']}: score {content['score']:.6f}, {found} of "
        f"{found + counts['missed']} found, {counts['false_positives']} false positives; "
        f"written to {output}"
    )
