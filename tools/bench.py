"""All benchmarks, each measured side by side in one run: `make bench`, `make bench-gpu`.

The figures are ratios between ours and a straightforward or a known alternative on this machine at
this moment; absolute times are printed beside them and mean little elsewhere.
"""

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from voxelbridge.core.command_line import run_app

HERE = Path(__file__).parent

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where the networks run.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: does it run?")] = False,
) -> None:
    """The loader against a full-volume reader (CPU), ResEncL against the same network elsewhere."""
    if device == "cpu":
        _section("loader: patches per second", "bench_loader.py", ["--quick"] if quick else [])
    encoder = ["--sizes", "64", "--repeats", "1"] if quick else []
    _section(f"ResEncL on {device}: step time", "bench_encoder.py", [*encoder, "--device", device])


def _section(title: str, script: str, arguments: list[str]) -> None:
    print(f"\n== {title}", flush=True)
    # A process of its own, so that no thread pool or cache of one measurement meets the next.
    subprocess.run([sys.executable, str(HERE / script), *arguments], check=True)


if __name__ == "__main__":
    run_app(app)
