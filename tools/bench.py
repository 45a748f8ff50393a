"""All benchmarks, each measured side by side in one run: `make bench`, `make bench-gpu`.

The figures are ratios between ours and a straightforward or a known alternative on this machine at
this moment; absolute times are printed beside them and mean little elsewhere.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from voxelbridge.core.command_line import run_app

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
VOLUMES = ROOT.parent / "shared" / "data"  # the reference folder beside the checkout

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where the networks run.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: does it run?")] = False,
    volumes: Annotated[
        Path, typer.Option(help="Folder of real volumes for resampling and preparing.")
    ] = VOLUMES,
    nnunet: Annotated[
        bool, typer.Option(help="Compare with nnU-Net v2, installed into its own environment.")
    ] = True,
) -> None:
    """Resampling, preparing, loading against others (CPU); the networks' training steps."""
    if device == "cpu":
        _preprocessing(volumes, quick=quick, nnunet=nnunet)
        _section("loader: patches per second", "bench_loader.py", ["--quick"] if quick else [])
        title = "evaluation: intervals from resampled images, CPU seconds"
        _section(title, "bench_evaluate.py", ["--quick"] if quick else [])
    encoder = ["--sizes", "64", "--repeats", "1"] if quick else []
    _section(f"ResEncL on {device}: step time", "bench_encoder.py", [*encoder, "--device", device])
    options = ["--device", device, *(["--quick"] if quick else [])]
    _section(f"deformable attention on {device}", "bench_attention.py", options)
    _section(f"detectors on {device}: training steps", "bench_detectors.py", options)
    _section(f"inference of a whole case on {device}", "bench_predict.py", options)
    if device == "cpu":
        _section("predicting: memory", "bench_predict_memory.py", ["--quick"] if quick else [])
    _section(f"pre-training methods on {device}: one step", "bench_methods.py", options)
    _section(f"MultiTalent on {device}: many stems, or one", "bench_multitalent.py", options)


def _preprocessing(volumes: Path, *, quick: bool, nnunet: bool) -> None:
    options = ["--quick"] if quick else []
    peer = nnunet and shutil.which("uv") is not None
    real = volumes.is_dir()
    if real:
        options += ["--volumes", str(volumes)]
    _section("resampling to 1 mm: CPU seconds", "bench_resample.py", options, with_nnunet=peer)
    if real:
        _section("preparing cases: CPU seconds", "bench_prepare.py", options, with_nnunet=peer)
        title = "augmented patches per CPU second"
        _section(title, "bench_augment.py", options, with_nnunet=peer)
    else:
        print(f"\n== preparing cases: left out, there are no volumes in {volumes} (--volumes)")


def _section(title: str, script: str, arguments: list[str], *, with_nnunet: bool = False) -> None:
    print(f"\n== {title}", flush=True)
    # A process of its own, so that no thread pool or cache of one measurement meets the next.
    python = [sys.executable]
    if with_nnunet:  # its torch may be another one than ours
        core = str(ROOT / "packages" / "core") + "[data]"
        python = [
            "uv",
            "run",
            "--isolated",
            "--no-project",
            "--python",
            f"3.{sys.version_info.minor}",
        ]
        python += ["--with", "nnunetv2", "--with-editable", core, "python"]
    subprocess.run([*python, str(HERE / script), *arguments], check=True)


if __name__ == "__main__":
    run_app(app)
