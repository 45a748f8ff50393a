"""What `make bench-gpu` runs needs torch, triton, numpy, safetensors, typer and pydantic alone."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[1] / "tools"

# of the packages' extras and of detect's own dependencies: a GPU machine may have none of them
ABSENT = (
    "SimpleITK", "acvl_utils", "batchgenerators", "blosc2", "dask", "distributed", "matplotlib",
    "onnx", "onnxruntime", "onnxscript", "openpyxl", "PIL", "pydicom", "rich", "scipy", "skimage",
    "sklearn", "tensorboard", "threadpoolctl",
)  # fmt: skip

SCRIPT = """
import sys
sys.modules |= dict.fromkeys(sys.argv[2].split(","))
sys.path.insert(0, sys.argv[1])
import bench, bench_attention, bench_detectors, bench_encoder, bench_methods, bench_multitalent
import bench_predict
bench_attention.main(device="cpu", quick=True, threads=1)
bench_detectors.bench(device="cpu", quick=True, repeats=1, threads=1)
print("methods")
bench_methods.bench(device="cpu", quick=True, rounds=1, threads=1)
print("multitalent")
bench_multitalent.bench(device="cpu", quick=True, repeats=1, threads=1)
"""


@pytest.mark.slow
@pytest.mark.long
def test_gpu_benchmarks_run_without_the_libraries_that_read_files() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(TOOLS), ",".join(ABSENT)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.splitlines()[-3:]
    detectors, _, others = done.stdout.partition("\nmethods\n")
    methods, _, multitalent = others.partition("\nmultitalent\n")
    rows = [line for line in detectors.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[1:]] == [
        "| retunet_small",
        "| resenc_retunet_small",
        "| defdetr_small",
        "| resenc_defdetr_small",
    ]
    assert "matched greedily" in done.stdout
    assert "x ours" in done.stdout
    assert [row.split(" | ")[1] for row in methods.splitlines()[2:]] == [
        "mae",
        "s3d",
        "models_genesis",
        "voco",
    ]
    assert "ratio " in multitalent
