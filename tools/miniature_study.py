"""A whole study on made-up data: two phantom data sets, an MAE encoder, studies/miniature.toml.

    uv run tools/miniature_study.py --out DIR [--jobs 2]

What DIR holds already is not made again: the same command goes on after a stop. At the end the
report is in DIR/study/report (index.html). It shows that everything works together.
"""

import shutil
from pathlib import Path
from typing import Annotated, Literal

import typer

from voxelbridge.core.command_line import run_app

ROOT = Path(__file__).resolve().parents[1]
STUDY = ROOT / "studies" / "miniature.toml"
NUM_TRAIN, NUM_TEST = 32, 12

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder for everything that is written.")] = Path(
        "miniature-study"
    ),
    pretrain_steps: Annotated[int, typer.Option(min=1, help="Steps of MAE pre-training.")] = 60,
    steps: Annotated[
        int | None, typer.Option(min=25, help="Steps of each training; default: the file's.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Jobs at once.")] = 1,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="auto takes a GPU if there is one.")
    ] = "auto",
) -> None:
    """Make the data, pre-train, run the study, report."""
    from voxelbridge.detect.study import command

    out.mkdir(parents=True, exist_ok=True)
    write_data(out)
    pretrain(out, steps=pretrain_steps, device=device)
    study = out / "study.toml"
    if not study.exists():
        shutil.copyfile(STUDY, study)
        if steps is not None:
            text = study.read_text(encoding="utf-8")
            study.write_text(
                text.replace("schedule.steps=150", f"schedule.steps={steps}"), encoding="utf-8"
            )
    command.run(
        str(study), jobs=jobs, device=device, executor="local", gpus=None, workers=0,
        dry_run=False,
    )  # fmt: skip
    command.status(str(study), json=False)
    command.report(str(study), None, compare=None, samples=1000)


def write_data(out: Path) -> None:
    """Two data sets that differ in their seed."""
    from phantom import write_phantom_dataset

    for seed, name in enumerate(("raw_a", "raw_b")):
        done = out / name / ".complete"
        if not done.exists():
            write_phantom_dataset(out / name, num_train=NUM_TRAIN, num_test=NUM_TEST, seed=seed)
            done.touch()


def pretrain(out: Path, *, steps: int, device: Literal["auto", "cpu", "cuda"]) -> None:
    """MAE on the training images of the first data set; DIR/mae.safetensors."""
    from voxelbridge.core.config import load_config, preset_path
    from voxelbridge.detect.prepare import prepare
    from voxelbridge.pretrain_ssl.config import PretrainConfig
    from voxelbridge.pretrain_ssl.export import export
    from voxelbridge.pretrain_ssl.train import train

    checkpoint = out / "mae.safetensors"
    if checkpoint.exists():
        return
    store = out / "pretraining_store"
    prepare(out / "raw_a", store, rule="fixed", spacing_mm=(1.5, 1.5, 1.5), workers=0)
    preset = preset_path("voxelbridge.pretrain_ssl", "mae_small")
    config = load_config(PretrainConfig, preset, [f"schedule.steps={steps}"]).config
    run = out / "pretraining"
    train(config, store=store, run=run, device=device, workers=0)
    export(run, checkpoint)


if __name__ == "__main__":
    run_app(app)
