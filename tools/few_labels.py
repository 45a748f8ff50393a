"""Does pre-training help with few labels? Every method against scratch, on phantoms, many seeds.

    uv run tools/few_labels.py --out few-labels                 # small encoder, CPU, about an hour
    uv run tools/few_labels.py --out few-labels --scale full    # ResEnc-L on a GPU
    uv run tools/few_labels.py --out again --first-seed 11 --method mae --method voco --labels 8

Per seed, on phantoms of its own: pre-training on unlabelled volumes with each method, then
fine-tuning one detector with 4, 8 and 16 labelled volumes from each encoder, from scratch, and from
controls with a method's weights shuffled within every tensor; all measured on the same unseen
phantoms. The same command goes on where it stopped: finished cells are kept. The protocols, fixed
before the first run, and what came out are in docs/experiments/few_labels.md.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from enum import StrEnum
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from few_labels_results import PRIMARY, SCRATCH, SHUFFLED, write_results

from voxelbridge.core.command_line import run_app
from voxelbridge.core.errors import ConfigError

LABELS = (4, 8, 16)

Device = Literal["auto", "cpu", "cuda"]
Scale = Literal["small", "full"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Method(StrEnum):
    """Pre-trainings that are compared."""

    mae = "mae"
    s3d = "s3d"
    models_genesis = "models_genesis"
    voco = "voco"


@dataclass(frozen=True)
class Protocol:
    """The budget of every arm, the same for all of them."""

    size: tuple[int, int, int]  # voxels of a phantom and of every patch, z y x
    unlabelled: int
    test: int
    pretrain_steps: int
    finetune_steps: int
    encoder: str
    detector: str
    suffix: str  # of the methods' presets
    overrides: tuple[str, ...] = ()  # of the fine-tuning


PROTOCOLS = {
    "small": Protocol(
        size=(32, 32, 32), unlabelled=96, test=24, pretrain_steps=150, finetune_steps=100,
        encoder="resenc_small", detector="resenc_retunet_small", suffix="_small",
    ),
    "full": Protocol(
        size=(128, 128, 128), unlabelled=256, test=48, pretrain_steps=2000, finetune_steps=1000,
        encoder="resenc_l", detector="resenc_retunet", suffix="",
        overrides=("schedule.frozen=null", "schedule.warmup_steps=50", "batch_size=4"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One fine-tuning of the experiment, or (labels 0) one pre-training."""

    seed: int
    arm: str
    labels: int

    @property
    def name(self) -> str:
        return f"seed{self.seed:02d}-{self.arm}-{self.labels:02d}"


@app.command(help=__doc__)
def main(
    out: Annotated[Path, typer.Option(help="Folder for everything that is written.")],
    seeds: Annotated[int, typer.Option(min=2, help="Paired repetitions.")] = 10,
    workers: Annotated[int, typer.Option(min=1, help="Trainings side by side.")] = 2,
    scale: Annotated[Scale, typer.Option(help="small: CPU; full: ResEnc-L on a GPU.")] = "small",
    device: Annotated[Device, typer.Option(help="auto takes a GPU if there is one.")] = "auto",
    first_seed: Annotated[int, typer.Option(min=0, help="0 is for rehearsals.")] = 1,
    method: Annotated[
        list[Method] | None, typer.Option(help="Pre-training to compare; repeatable; or all.")
    ] = None,
    shuffle: Annotated[
        list[Method] | None,
        typer.Option(help="Method whose shuffled weights are a control; repeatable; or MAE."),
    ] = None,
    labels: Annotated[
        list[int] | None, typer.Option(help="Labelled volumes: 4, 8, 16; repeatable; or all.")
    ] = None,
) -> None:
    protocol = PROTOCOLS[scale]
    methods = [name.value for name in method or Method]
    controls = [name.value for name in shuffle or [Method.mae]]
    counts = labels or LABELS
    if unknown := set(counts) - set(LABELS):
        raise ConfigError(f"--labels {sorted(unknown)}: expected some of {list(LABELS)}")
    if strangers := set(controls) - set(methods):
        raise ConfigError(f"--shuffle {sorted(strangers)}: name the same as --method")
    arms = [SCRATCH, *methods, *(SHUFFLED + name for name in controls)]
    chosen = range(first_seed, first_seed + seeds)
    stages = [
        [Cell(seed, "data", 0) for seed in chosen],
        [Cell(seed, name, 0) for seed in chosen for name in methods],
        [Cell(seed, arm, count) for seed in chosen for count in counts for arm in arms],
    ]
    for stage in stages:
        run_cells(stage, out, protocol, workers=workers, device=device)
    results = [json.loads((out / "cells" / f"{cell.name}.json").read_text()) for cell in stages[2]]
    write_results(out, results)


def run_cells(
    cells: Sequence[Cell], out: Path, protocol: Protocol, *, workers: int, device: Device
) -> None:
    """Works off the cells that are not done; a failing one stops the experiment by its name."""
    from voxelbridge.core.progress import track

    pending = [cell for cell in cells if not (out / "cells" / f"{cell.name}.json").exists()]
    if not pending:
        return
    # Fresh processes: a forked child would inherit torch's threads.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(run_cell, cell, out, protocol, device): cell for cell in pending}
        for future in track(as_completed(futures), description="cells", total=len(futures)):
            future.result()


def run_cell(cell: Cell, out: Path, protocol: Protocol, device: Device) -> None:
    """One cell; its result is written last, what it prints goes to a log."""
    import torch

    from voxelbridge.core.files import write_json

    torch.set_num_threads(1)  # as many trainings as cores run side by side
    folder = out / f"seed{cell.seed:02d}"
    log = out / "logs" / f"{cell.name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stream, redirect_stdout(stream):
        if cell.arm == "data":
            result = make_data(folder, cell.seed, protocol)
        elif cell.labels == 0:
            result = pretrain(folder, cell, protocol, device)
        else:
            result = fine_tune(folder, cell, protocol, device)
    write_json(out / "cells" / f"{cell.name}.json", {**asdict(cell), **result})


def make_data(folder: Path, seed: int, protocol: Protocol) -> dict[str, Any]:  # Any: JSON values
    """Phantoms of this seed: a store with labels (fold k has LABELS[k] of them) and one without."""
    import shutil

    from phantom import write_phantom_dataset
    from voxelbridge.core.data.dataset import RawDataset
    from voxelbridge.detect.prepare import prepare, write_tables_of
    from voxelbridge.detect.splits import write_splits
    from voxelbridge.pretrain_ssl.prepare import prepare as prepare_images

    shutil.rmtree(folder, ignore_errors=True)
    labelled, unlabelled = folder / "labelled", folder / "unlabelled"
    write_phantom_dataset(
        labelled, num_train=max(LABELS), num_test=protocol.test, size=protocol.size, seed=seed
    )
    # Seeds apart from those of every labelled data set, so that no phantom is in both.
    write_phantom_dataset(
        unlabelled, num_train=protocol.unlabelled, num_test=0, size=protocol.size, seed=1000 + seed
    )
    prepare(labelled, folder / "store", workers=0)
    names = sorted(case.case_id for case in RawDataset.open(labelled).cases)
    write_splits(folder / "store", [{"train": names[:count], "val": []} for count in LABELS])
    prepare_images(unlabelled / "imagesTr", folder / "images", plan="none", workers=0)
    write_tables_of(folder, RawDataset.open(labelled).test_cases)
    return {}


def pretrain(
    folder: Path, cell: Cell, protocol: Protocol, device: Device
) -> dict[str, Any]:  # Any: JSON values
    """One method on the unlabelled phantoms, and its encoder's shuffled control."""
    from voxelbridge.core.config import load_config, preset_path
    from voxelbridge.core.train.metrics import read_metrics
    from voxelbridge.pretrain_ssl.config import PretrainConfig
    from voxelbridge.pretrain_ssl.export import export
    from voxelbridge.pretrain_ssl.train import train

    preset = preset_path("voxelbridge.pretrain_ssl", cell.arm + protocol.suffix)
    overrides = [
        f"seed={cell.seed}", f"schedule.steps={protocol.pretrain_steps}",
        f"patch_size={list(protocol.size)}", f"encoder={protocol.encoder}",
        "checkpoint_every_steps=100000", "validate_every_steps=50", "validation_patches=8",
        "pictures=1",
    ]  # fmt: skip
    if cell.arm == "voco":
        overrides.append("method.base_grid=[2,2,2]")  # its preset's patch is no cube
    config = load_config(PretrainConfig, preset, overrides).config
    run = folder / "runs" / cell.arm
    train(config, store=folder / "images", run=run, device=device, workers=0)
    export(run, encoder_of(folder, cell.arm))
    shuffled = encoder_of(folder, SHUFFLED + cell.arm)
    shuffle_weights(encoder_of(folder, cell.arm), shuffled, cell.seed)
    last = read_metrics(run / "metrics.jsonl")[-1]
    return {name: last[name] for name in ("val_loss", "val_trivial")}


def fine_tune(
    folder: Path, cell: Cell, protocol: Protocol, device: Device
) -> dict[str, Any]:  # Any: JSON values
    """One detector from one encoder with some labels; its figures on the unseen phantoms."""
    import shutil

    from voxelbridge.detect.evaluate.metrics import evaluate_files
    from voxelbridge.detect.predict_cases import predict_cases
    from voxelbridge.detect.train import train

    run, predictions = folder / "runs" / cell.name, folder / "predictions" / cell.name
    overrides = [
        f"seed={cell.seed}", f"schedule.steps={protocol.finetune_steps}",
        f"patch_size={list(protocol.size)}", "checkpoint_every_steps=100000", *protocol.overrides,
    ]  # fmt: skip
    train(
        protocol.detector, store=folder / "store", run=run, overrides=overrides,
        init=None if cell.arm == SCRATCH else encoder_of(folder, cell.arm),
        fold=LABELS.index(cell.labels), device=device, workers=0,
    )  # fmt: skip
    images = folder / "labelled" / "imagesTs"
    predict_cases([run], [images], predictions, device=device, pictures=False)
    metrics = evaluate_files(
        folder / "ground_truth.csv", predictions / "predictions.csv", cases=folder / "cases.csv",
        output=predictions / "metrics.json",
    )  # fmt: skip
    shutil.rmtree(run)  # the network is not needed again, and there are hundreds
    return {
        PRIMARY: metrics["ap"]["0.10"]["map"],
        "mAP@0.50": metrics["ap"]["0.50"]["map"],
        "FROC@0.10": metrics["froc"]["0.10"]["pooled"]["mean"],
    }


def encoder_of(folder: Path, arm: str) -> Path:
    """Where the encoder of an arm lies."""
    return folder / "encoders" / f"{arm}.safetensors"


def shuffle_weights(source: Path, target: Path, seed: int) -> None:
    """The same checkpoint with the values of every tensor in random order."""
    import torch

    from voxelbridge.core.checkpoint import Checkpoint, read_checkpoint, write_checkpoint

    checkpoint = read_checkpoint(source)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)].view_as(tensor)
        for name, tensor in checkpoint.tensors.items()
    }
    metadata = checkpoint.metadata.model_copy(update={"method": target.stem})
    write_checkpoint(target, Checkpoint(metadata, tensors))


if __name__ == "__main__":
    run_app(app)
