"""vb-detect: check, prepare, train, predict, look. Heavy imports wait until a command runs."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from voxelbridge.core.command_line import make_app, run_app
from voxelbridge.detect.cli_protocols import add_protocol_commands

app = make_app("Find lesions in 3D medical images: prepare, train, predict, evaluate, report.")

Device = Annotated[
    Literal["auto", "cpu", "cuda"], typer.Option(help="auto takes a GPU if there is one.")
]
ConvertSource = Literal[
    "msd-pancreas", "ribfrac", "kits21", "lidc", "duke-breast", "luna16", "pn9", "cta-a",
    "monai-json", "csv", "slicer",
]  # fmt: skip
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the preset; repeatable."),
]
Store = Annotated[Path, typer.Option(help="Case store written by `prepare`.")]
RunStore = Annotated[
    Path | None, typer.Option(help="Store of the runs; default: where their training found it.")
]
Objective = Annotated[
    Literal["map_range", "map_0.10", "map_0.30", "map_0.50", "froc_0.10", "froc_0.30"],
    typer.Option(help="What is to be large; map_range is the mean AP at IoU 0.10 to 0.50."),
]
SkippedSteps = Annotated[
    list[str] | None,
    typer.Option(help="Setting to leave alone, such as min_size for tiny lesions; repeatable."),
]
SweptSteps = Annotated[
    list[str] | None, typer.Option(help="Setting to try, the others left alone; repeatable.")
]
SweepTTA = Annotated[
    int, typer.Option(min=0, max=8, help="Mirrored copies: 0 none, 4 in-plane, 8 all axes.")
]
Weights = Annotated[
    Literal["last", "best"], typer.Option(help="After the last step, or best on validation.")
]
Mergers = Annotated[int, typer.Option(min=0, help="Processes that merge boxes.")]


@app.command()
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


@app.command()
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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what would be done; write nothing.")
    ] = False,
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


@app.command()
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


@app.command()
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
    from voxelbridge.detect.train import train as run_train

    run_train(
        preset, store=store, run=run, overrides=overrides or [], init=init, stem=stem,
        init_parts=init_parts, tune=tune, fold=fold, device=device, workers=workers,
        dry_run=dry_run, tensorboard=tensorboard,
    )  # fmt: skip


@app.command()
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


@app.command()
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


@app.command(name="cross-validate")
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
    from voxelbridge.detect.cross_validation import out_of_fold as run_out_of_fold
    from voxelbridge.detect.cross_validation import parse_folds, train_folds
    from voxelbridge.detect.cross_validation import report as report_figures
    from voxelbridge.detect.sweep import chosen_steps

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


@app.command(name="out-of-fold")
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


@app.command()
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


add_protocol_commands(app)


@app.command()
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


@app.command()
def info(
    preset: Annotated[str, typer.Argument(help="Name of a shipped preset, or a TOML file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
    channels: Annotated[int, typer.Option(min=1, help="Input channels.")] = 1,
    classes: Annotated[int, typer.Option(min=1, help="Foreground classes.")] = 1,
    store: Annotated[
        Path | None, typer.Option(help="Store whose plan a preset with that architecture takes.")
    ] = None,
) -> None:
    """What a preset costs: parameters, operations, anchors, memory."""
    from voxelbridge.detect.info import describe_preset
    from voxelbridge.detect.plan import read_plan

    facts = describe_preset(
        preset, in_channels=channels, num_classes=classes, plan=read_plan(store) if store else None
    )
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    print(f"{preset}: patch {facts['patch_size']}, batch {facts['batch_size']}")
    for name, count in facts["parameters"].items():
        print(f"  {name:<12} {count:>12,} parameters")
    sizes = ", ".join(
        f"{facts[name]:,} {name}" for name in ("anchors", "tokens", "queries") if name in facts
    )
    print(f"  {facts['gflop']:,} GFLOP for one patch forward, {sizes}")
    print(f"  about {facts['memory_gib']} GiB for a training step of the batch")


@app.command()
def show(
    preset: Annotated[
        str, typer.Argument(help="Name of a shipped preset, a TOML file, or a run directory.")
    ],
    overrides: Overrides = None,
    store: Annotated[
        Path | None, typer.Option(help="Store whose plan a preset with that architecture takes.")
    ] = None,
) -> None:
    """Print the resolved settings, each with its origin."""
    from voxelbridge.detect.origins import describe_settings

    print(describe_settings(preset, overrides or [], store=store))


@app.command()
def schedule(
    preset: Annotated[str, typer.Argument(help="Name of a shipped preset, or a TOML file.")],
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the phases as JSON.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the learning rate too.")
    ] = None,
    epoch: Annotated[int, typer.Option(min=1, help="Steps that count as an epoch.")] = 2500,
    store: Annotated[
        Path | None, typer.Option(help="Store whose plan a preset with that architecture takes.")
    ] = None,
) -> None:
    """What a training does when: steps, learning rates, what is frozen, averaged, restarted."""
    from voxelbridge.detect.build import load_detect_config
    from voxelbridge.detect.plan import read_plan
    from voxelbridge.detect.show_schedule import describe_schedule, plot_schedule, schedule_facts

    plan = read_plan(store) if store else None
    config = load_detect_config(preset, overrides or [], plan=plan)
    if plot:
        plot_schedule(config, plot)
    if as_json:
        print(json.dumps(schedule_facts(config, epoch_steps=epoch), indent=2))
        return
    print(describe_schedule(config, epoch_steps=epoch))


@app.command()
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


@app.command()
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


study_app = typer.Typer(no_args_is_help=True)
app.add_typer(study_app, name="study", help="A whole experiment matrix from one file.")

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


def main() -> None:
    """Entry point of the `vb-detect` command."""
    run_app(app)


def _figure(value: float | None) -> str:
    return "none (no objects)" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    main()
