"""The commands of `vb-detect` for data: convert, prepare, check."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from voxelbridge.core.command_line import DryPrepare

ConvertSource = Literal[
    "msd-pancreas", "ribfrac", "kits21", "lidc", "duke-breast", "luna16", "pn9", "cta-a",
    "monai-json", "csv", "slicer",
]  # fmt: skip


def convert(
    source: Annotated[ConvertSource, typer.Argument(help="What SRC is.")],
    src: Annotated[Path, typer.Argument(help="Download, list or table; see docs/convert.md.")],
    out: Annotated[Path, typer.Argument(help="Raw data set to write; what is done is skipped.")],
    seed: Annotated[int, typer.Option(min=0, help="Decides splits that nobody published.")] = 0,
    workers: Annotated[int, typer.Option(min=0, help="Cases converted at once.")] = 2,
    annotations: Annotated[
        Path | None, typer.Option(help="lidc: folder of the XML files, or of the tables.")
    ] = None,
    malignancy: Annotated[
        Literal["nndetection", "mean-of-readers"] | None,
        typer.Option(help="lidc: nndetection (default) counts a missing reader as score 0."),
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(help="lidc: take DICOM series with gap, varying_spacing, duplicate slices."),
    ] = None,
    test_subset: Annotated[
        int | None, typer.Option(help="luna16: official subset kept for the test (default 9).")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="monai-json, csv, slicer: folder of the images.")
    ] = None,
    box_mode: Annotated[
        Literal["cccwhd", "xyzxyz", "xyzwhd", "xxyyzz"] | None,
        typer.Option(help="monai-json: order of the six numbers (default cccwhd)."),
    ] = None,
    space: Annotated[
        Literal["lps", "ras", "voxel"] | None,
        typer.Option(help="monai-json, csv: what the coordinates are (default lps, in mm)."),
    ] = None,
    class_names: Annotated[
        list[str] | None,
        typer.Option("--class", help="slicer: name of a class, in the model's order; repeatable."),
    ] = None,
    classes: Annotated[
        Literal["fracture", "types"] | None,
        typer.Option(help="ribfrac: one class (default) or the type of each fracture."),
    ] = None,
    test_set: Annotated[
        Literal["internal", "external"] | None,
        typer.Option(help="cta-a: which test images (default internal)."),
    ] = None,
) -> None:
    """Turn a public data set, a list or corrected predictions into a raw data set."""
    from voxelbridge.detect.convert.run import Options
    from voxelbridge.detect.convert.run import convert as run_convert

    options = Options(
        annotations=annotations, malignancy=malignancy, allow=tuple(allow or ()) or None,
        test_subset=test_subset, images=images, box_mode=box_mode, space=space,
        class_names=tuple(class_names or ()) or None, classes=classes, test_set=test_set,
    )  # fmt: skip
    run_convert(source, src, out, seed=seed, workers=workers, options=options)


def prepare(
    dataset: Annotated[Path, typer.Argument(help="Raw data set (nnU-Net or nnDetection folder).")],
    store: Annotated[Path, typer.Argument(help="Folder to write; what is done is skipped.")],
    plan: Annotated[
        Literal["default", "fixed"],
        typer.Option(help="default = fitted to the data, fixed = 1 mm and 128 voxels (the paper)."),
    ] = "default",
    gpu_memory: Annotated[
        str, typer.Option(help="What the default plan's training step may need, such as 24GiB.")
    ] = "11GiB",
    spacing: Annotated[
        tuple[float, float, float] | None,
        typer.Option(help="Target spacing in mm (z y x) instead of the plan's."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Set a field of the plan; repeatable."),
    ] = None,
    resampling: Annotated[
        Literal["cubic", "nnunet"],
        typer.Option(help="nnunet = its shortcut for anisotropic volumes, and its label rule."),
    ] = "cubic",
    workers: Annotated[int, typer.Option(min=0, help="Cases preprocessed at once.")] = 2,
    executor: Annotated[
        str, typer.Option(metavar="local|dask:ADDRESS", help="Where the cases are preprocessed.")
    ] = "local",
    dry_run: DryPrepare = False,
) -> None:
    """Measure a raw data set, plan for it and preprocess its cases into a store."""
    from voxelbridge.detect.plan_request import parse_request

    request = parse_request(
        plan, gpu_memory=gpu_memory, spacing_mm=spacing, settings=settings or [],
        resampling=resampling,
    )  # fmt: skip
    if dry_run:
        from voxelbridge.detect.prepare_survey import survey

        print(survey(dataset, store, request).describe())
        return
    from voxelbridge.detect.prepare import describe
    from voxelbridge.detect.prepare import prepare as run_prepare

    prepared = run_prepare(dataset, store, request=request, workers=workers, executor=executor)
    print(describe(prepared, store))


def check(
    dataset: Annotated[Path, typer.Argument(help="Raw data set (nnU-Net or nnDetection folder).")],
    deep: Annotated[
        bool, typer.Option("--deep", help="Decode and hash every image whole too.")
    ] = False,
    against: Annotated[
        list[Path] | None,
        typer.Option(help="Raw data set or case store with none of the same scans; repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    workers: Annotated[int, typer.Option(min=0, help="Cases checked at once.")] = 2,
) -> None:
    """Every problem of a raw data set in one table; exit status 1 if there are errors."""
    from voxelbridge.detect.check import run_check

    run_check(dataset, deep=deep, against=against or [], workers=workers, as_json=as_json)
