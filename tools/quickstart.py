"""The main job once through, on made-up or on your own data, in minutes on a CPU.

    uv run tools/quickstart.py                      # phantoms
    uv run tools/quickstart.py --data RAW_DATASET   # your volumes

raw volumes -> case store -> MAE pre-training -> checkpoint -> encoder transferred into Retina U-Net
-> fine-tuning, from scratch and from the pre-trained encoder -> boxes on unseen cases -> mAP and
FROC -> report.html. The networks are tiny and trained for a minute: this shows that everything
works together, and says nothing about how well pre-training works.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from voxelbridge.core.command_line import run_app

PRETRAIN_PRESET = "mae_small"
DETECT_PRESET = "resenc_retunet_small"
PHANTOM_TRAIN, PHANTOM_TEST = 64, 12
HELD_OUT_SHARE = 5  # one patient in five is kept for the test
MAX_VOXELS = 600_000  # per stored volume: larger data are resampled coarser, to stay in minutes
ARMS = ("scratch", "pretrained")

Device = Literal["auto", "cpu", "cuda"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Task:
    """What is trained on and what is tested on."""

    dataset: Path
    train: list[str]
    test: list[Any]  # RawCase; torch and SimpleITK are imported late
    note: str


@app.command()
def main(
    data: Annotated[
        Path | None, typer.Option(help="Raw data set; without it phantoms are made.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for everything that is written.")] = Path(
        "quickstart-run"
    ),
    pretrain_steps: Annotated[int, typer.Option(min=1, help="Steps of MAE pre-training.")] = 60,
    steps: Annotated[int, typer.Option(min=20, help="Steps of fine-tuning, per arm.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Seed of phantoms, weights and patches.")] = 0,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read and load.")] = 2,
    device: Annotated[Device, typer.Option(help="auto takes a GPU if there is one.")] = "auto",
) -> None:
    """Pre-train, transfer, fine-tune, predict, evaluate and report, once through."""
    clock = time.monotonic()
    task = choose_task(data, out, seed=seed)
    store = out / "store"
    prepare_store(task, store, workers=workers)
    encoder = pretrain(store, out, steps=pretrain_steps, seed=seed, device=device)
    metrics: dict[str, Any] = {}
    for arm in ARMS:
        print(f"\n== fine-tuning: {arm}")
        init = encoder if arm == "pretrained" else None
        run = fine_tune(store, out / "runs" / arm, init, steps=steps, seed=seed, device=device)
        metrics[arm] = predict_and_evaluate(task, run, out, arm, device=device)
    seconds = time.monotonic() - clock
    write_results(task, out, metrics, seconds=seconds, seed=seed, steps=steps)


def choose_task(data: Path | None, out: Path, *, seed: int) -> Task:
    """The training and the unseen cases: of `data`, or of phantoms made in `out`."""
    from phantom import write_phantom_dataset
    from voxelbridge.core.data.dataset import RawDataset
    from voxelbridge.core.errors import ConfigError

    if (out / "metrics.json").exists() or (out / "store").exists():
        raise ConfigError(f"--out {out}: holds an earlier run; name a new folder or delete it")
    if data is None:
        print("== phantoms")
        data = out / "raw"
        write_phantom_dataset(data, num_train=PHANTOM_TRAIN, num_test=PHANTOM_TEST, seed=seed)
    raw = RawDataset.open(data)
    ids = [case.case_id for case in raw.cases]
    labelled = [case for case in raw.test_cases if case.has_labels]
    if labelled:
        return Task(data, ids, labelled, "tested on the unseen cases of imagesTs")
    if len({raw.groups.get(name, name) for name in ids}) == 1:
        note = (
            "TESTED ON ITS OWN TRAINING CASES: the data set has a single patient and no imagesTs, "
            "so these figures say nothing about unseen cases"
        )
        return Task(data, ids, list(raw.cases), note)
    held_out = hold_out(ids, raw.groups)
    return Task(
        data,
        [name for name in ids if name not in held_out],
        [case for case in raw.cases if case.case_id in held_out],
        f"tested on {len(held_out)} held-out of {len(ids)} cases, unseen in both trainings",
    )


def hold_out(case_ids: list[str], groups: Any) -> set[str]:
    """Cases of one patient in five (at least one), chosen by a fixed seed."""
    import numpy as np

    patients = sorted({groups.get(name, name) for name in case_ids})
    count = max(1, len(patients) // HELD_OUT_SHARE)
    chosen = set(np.random.default_rng(12345).permutation(patients)[:count].tolist())
    return {name for name in case_ids if groups.get(name, name) in chosen}


def prepare_store(task: Task, store: Path, *, workers: int) -> None:
    """The case store of the training cases, all of them in one fold."""
    from voxelbridge.core.data.case_store import CaseStore
    from voxelbridge.detect.prepare import prepare
    from voxelbridge.detect.splits import write_splits

    print("\n== case store")
    spacing = coarse_spacing(task)
    prepare(task.dataset, store, workers=workers, spacing_mm=spacing, only=task.train)
    stored = [record.case_id for record in CaseStore.open(store).cases]
    write_splits(store, [{"train": stored, "val": []}])


def coarse_spacing(task: Task) -> tuple[float, float, float] | None:
    """A spacing at which the median volume has MAX_VOXELS; None where it is small already."""
    import numpy as np

    from voxelbridge.core.data.dataset import RawDataset
    from voxelbridge.core.data.image_io import read_grid
    from voxelbridge.core.data.volume import reorientation_to_lps

    grids = []
    for case in RawDataset.open(task.dataset).cases:
        if case.case_id in task.train:
            grid = read_grid(case.image_paths[0])
            grids.append(reorientation_to_lps(grid).apply_grid(grid))
    voxels = float(np.median([np.prod(grid.shape) for grid in grids]))
    if voxels <= MAX_VOXELS:
        return None
    factor = (voxels / MAX_VOXELS) ** (1 / 3)
    z, y, x = np.median([grid.spacing_mm for grid in grids], axis=0) * factor
    print(f"volumes of {voxels:,.0f} voxels are resampled to {z:.2f} x {y:.2f} x {x:.2f} mm")
    return (float(z), float(y), float(x))


def pretrain(store: Path, out: Path, *, steps: int, seed: int, device: Device) -> Path:
    """MAE on the training images; the exported checkpoint."""
    from voxelbridge.core.config import load_config, preset_path
    from voxelbridge.pretrain_ssl.config import PretrainConfig
    from voxelbridge.pretrain_ssl.export import export
    from voxelbridge.pretrain_ssl.train import train

    print("\n== MAE pre-training")
    overrides = [f"schedule.steps={steps}", f"seed={seed}"]
    preset = preset_path("voxelbridge.pretrain_ssl", PRETRAIN_PRESET)
    config = load_config(PretrainConfig, preset, overrides).config
    run = out / "runs" / "pretraining"
    train(config, store=store, run=run, device=device, workers=0)
    checkpoint = out / "encoder.safetensors"
    export(run, checkpoint)
    return checkpoint


def fine_tune(
    store: Path, run: Path, init: Path | None, *, steps: int, seed: int, device: Device
) -> Path:
    """One arm of the comparison."""
    from voxelbridge.detect.train import train

    overrides = [f"schedule.steps={steps}", f"seed={seed}"]
    return train(
        DETECT_PRESET, store=store, run=run, overrides=overrides, init=init, device=device,
        workers=0,
    )  # fmt: skip


def predict_and_evaluate(
    task: Task, run: Path, out: Path, arm: str, *, device: Device
) -> dict[str, Any]:
    """Boxes of the test cases in out/predictions/ARM, and their metrics."""
    from voxelbridge.detect.evaluate.metrics import evaluate_files
    from voxelbridge.detect.plan import read_plan
    from voxelbridge.detect.predict_cases import predict_cases
    from voxelbridge.detect.prepare import write_tables_of

    folder = out / "predictions" / arm
    images = [path for case in task.test for path in case.image_paths]
    predict_cases([run], images, folder, device=device)
    truth = out / "predictions" / "ground_truth.csv"
    if not truth.exists():
        write_tables_of(truth.parent, task.test)
    return evaluate_files(
        truth,
        folder / "predictions.csv",
        cases=truth.parent / "cases.csv",
        output=folder / "metrics.json",
        num_classes=len(read_plan(run).class_names),
    )


def write_results(
    task: Task, out: Path, metrics: dict[str, Any], *, seconds: float, seed: int, steps: int
) -> None:
    """metrics.json, report.html and what a person wants to know on the terminal."""
    from voxelbridge.core.files import write_json
    from voxelbridge.detect.report_inputs import report_folder

    write_json(out / "metrics.json", {"schema": 1, "arms": metrics})
    report_folder(
        out / "predictions",
        out / "report.html",
        ground_truth=out / "predictions" / "ground_truth.csv",
        pretraining_run=out / "runs" / "pretraining",
        title=f"voxelbridge quickstart: {task.dataset.resolve().name}",
        facts={
            "data set": str(task.dataset),
            "training cases": str(len(task.train)),
            "test cases": f"{len(task.test)} ({task.note})",
            "fine-tuning": f"{DETECT_PRESET}, {steps} steps per arm, seed {seed}",
            "pre-training": f"{PRETRAIN_PRESET}, on the training images only",
            "time": f"{seconds:.0f} s before this page",
        },
        notes=[task.note],
    )
    print(f"\n== result ({task.note})")
    for arm in ARMS:
        print(f"{arm:<11} " + json.dumps(key_figures(metrics[arm])))
    print("One run per arm: this comparison is no evidence for or against pre-training.")
    print(f"{seconds:.0f} s; look at {out / 'report.html'}")


def key_figures(metrics: dict[str, Any]) -> dict[str, float | None]:
    """The figures a detection paper quotes first."""
    return {
        "mAP@0.10": metrics["ap"]["0.10"]["map"],
        "mAP@0.50": metrics["ap"]["0.50"]["map"],
        "FROC@0.10": metrics["froc"]["0.10"]["pooled"]["mean"],
    }


if __name__ == "__main__":
    run_app(app)
