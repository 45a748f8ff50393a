"""What reading, preprocessing and windowing a case costs in memory: `vb-detect predict` without a
network, on a volume of noise, watched from outside (Linux).

Anonymous memory is what cannot be given back; mapped pages belong to files. Both are sums over the
process and its reader, without what they had after importing.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import torch
import typer

from voxelbridge.core.data.normalize import CTPercentile
from voxelbridge.core.data.preprocess import DEFAULT_RESAMPLING
from voxelbridge.core.tiles import padded_tiles, read_window
from voxelbridge.detect import predict_cases
from voxelbridge.detect.detections import Detections

FULL = (1200, 1024, 1024)
QUICK = (64, 128, 128)
SPACING_MM = (1.0, 0.7, 0.7)  # of the volume; the plan's is 1 mm
WINDOW = (128, 128, 128)
GIB = 1 << 30

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="A small volume: does it run?")] = False,
    shape: Annotated[tuple[int, int, int], typer.Option(help="Voxels, z y x.")] = FULL,
    cases: Annotated[int, typer.Option(min=1, help="Volumes, one read ahead.")] = 1,
    folder: Annotated[Path | None, typer.Option(help="Where the files go for a while.")] = None,
    victim: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Peak memory of predicting int16 volumes."""
    if victim:
        _predict(Path(victim))
        return
    shape = QUICK if quick else shape
    with tempfile.TemporaryDirectory(dir=folder) as name:
        work = Path(name)
        (work / "images").mkdir()
        for number in range(cases):
            _write(work / "images" / f"case{number}.mha", shape)
        start = time.monotonic()
        anonymous, resident = _watch(work)
    raw = 2 * int(np.prod(shape))
    print(
        f"{'x'.join(map(str, shape))} int16 ({raw / GIB:.2f} GiB), {cases} cases: anonymous memory "
        f"{anonymous / GIB:.2f} GiB ({anonymous / raw:.2f} x raw), with mapped files "
        f"{resident / GIB:.2f} GiB, {time.monotonic() - start:.0f} s"
    )


def _write(path: Path, shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    planes = rng.integers(1, 1000, size=(2, *shape[1:]), dtype=np.int16)
    header = (
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\n"
        f"DimSize = {shape[2]} {shape[1]} {shape[0]}\n"
        f"ElementSpacing = {SPACING_MM[2]} {SPACING_MM[1]} {SPACING_MM[0]}\n"
        "ElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    )
    with path.open("wb") as stream:
        stream.write(header.encode())
        for number in range(shape[0]):
            stream.write(planes[number % 2].tobytes())


def _predict(work: Path) -> None:
    torch.set_num_threads(1)
    plan: Any = SimpleNamespace(  # as much of a plan as reading asks for
        channel_names=("CT",),
        class_names=("lesion",),
        spacing_mm=(1.0, 1.0, 1.0),
        normalization=(CTPercentile(lower=-100, upper=300, mean=40, std=50),),
        resampling=DEFAULT_RESAMPLING,
    )

    def look(_: object, image: np.ndarray, **__: object) -> Detections:
        for start in padded_tiles(image.shape[1:], WINDOW):
            read_window(image, start, WINDOW).sum()
        box = torch.tensor([[10.0, 10.0, 10.0, 30.0, 30.0, 30.0]])
        return Detections(box, torch.tensor([0.5]), torch.tensor([0]))

    predict_cases.load_ensemble = lambda *_, **__: predict_cases.Ensemble([], plan, {})
    predict_cases.predict_volume = look  # type: ignore[attr-defined]  # stands for the network
    (work / "ready").touch()
    time.sleep(0.5)  # until the memory before is noted
    predict_cases.predict_cases([], [work / "images"], work / "out", device="cpu")


def _watch(work: Path) -> tuple[int, int]:
    """Largest anonymous and resident bytes beyond those at the start."""
    program = subprocess.Popen([sys.executable, __file__, "--victim", str(work)])
    while not (work / "ready").exists() and program.poll() is None:
        time.sleep(0.01)
    at_start = _memory(program.pid)
    most = (0, 0)
    while program.poll() is None:
        own = _memory(program.pid)
        try:
            listed = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
        except OSError:
            listed = []
        readers = [_memory(int(pid)) for pid in listed]
        sums = [
            own[n] + sum(max(0, reader[n] - at_start[n]) for reader in readers) - at_start[n]
            for n in (0, 1)
        ]
        most = (max(most[0], sums[0]), max(most[1], sums[1]))
        time.sleep(0.01)
    if program.returncode:
        raise SystemExit(program.returncode)
    return most


def _memory(pid: int) -> tuple[int, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if "kB" in line}
    return sizes.get("RssAnon", 0), sizes.get("VmRSS", 0)


if __name__ == "__main__":
    app()
