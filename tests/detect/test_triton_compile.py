"""The shipped kernels compile for real GPUs, on a machine without one.

That the interpreter runs them does not mean that they compile.
"""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed on this platform")

from triton.backends.compiler import GPUTarget  # noqa: E402 - only where triton exists
from triton.compiler import ASTSource  # noqa: E402

from voxelbridge.detect.deform_kernels.launch import (  # noqa: E402
    BLOCK_SIZES,
    WARPS,
    fits_registers,
)
from voxelbridge.detect.deform_kernels.triton_kernels import (  # noqa: E402
    backward_kernel,
    forward_kernel,
)

POINTERS = {
    "value_ptr": "*bf16", "out_ptr": "*bf16", "grad_ptr": "*bf16",
    "shapes_ptr": "*i64", "starts_ptr": "*i64", "locations_ptr": "*fp32", "weights_ptr": "*fp32",
    "scale_ptr": "*fp32", "grad_locations_ptr": "*fp32", "grad_weights_ptr": "*fp32",
}  # fmt: skip
NUMBERS = ("num_cells", "num_queries", "query_bucket")


def compile_ptx(
    kernel: Any, capability: int, channels: int, block: int, warps: int, *, fixed: bool
) -> str:
    """PTX of a kernel at the paper's shape: 8 heads, 4 levels, 4 points."""
    constants = {
        "M": 8, "L": 4, "P": 4, "D": channels, "BLOCK_D": channels,
        "WIDE": triton.language.float32, "FIXED": fixed, "BLOCK_Q": block,
    }  # fmt: skip
    types = {
        **POINTERS, "grad_value_ptr": "*i64" if fixed else "*fp32", **dict.fromkeys(NUMBERS, "i32"),
    }  # fmt: skip
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(i,): constants[name] for i, name in enumerate(names) if name in constants},
        attrs={
            (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith("_ptr")
        },
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": 1},
    )
    return compiled.asm["ptx"]


def spilled_bytes(ptx: str, capability: int, folder: Path) -> int:
    """What the assembler says; it comes with triton."""
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    target = f"sm_{capability}a" if capability == 90 else f"sm_{capability}"
    report = subprocess.run(
        [assembler, "-v", f"-arch={target}", source, "-o", folder / "kernel.cubin"],
        capture_output=True, text=True, check=True,
    ).stderr  # fmt: skip
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", report))


def shipped_settings(channels: int) -> list[tuple[int, int]]:
    return [
        (block, warps)
        for block in BLOCK_SIZES
        for warps in WARPS
        if fits_registers(block, channels, warps)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("channels", [16, 32])
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_without_spills_and_read_sixteen_bytes_at_once(
    capability: int, channels: int, tmp_path: Path
) -> None:
    settings = shipped_settings(channels)
    assert len(settings) >= 3
    for block, warps in settings:
        for kernel in (forward_kernel, backward_kernel):
            ptx = compile_ptx(kernel, capability, channels, block, warps, fixed=False)
            where = (kernel.__name__, block, warps)
            assert spilled_bytes(ptx, capability, tmp_path) == 0, where
            reads = re.findall(r"ld\.global[\w.:]*\.v4\.b32", ptx)
            assert len(reads) >= 8, where  # one or more for each of the eight corners
            narrow = re.findall(r"ld\.global[\w.:]*\.b16", ptx)
            assert narrow == [], where


@pytest.mark.slow
def test_integer_sums_compile(tmp_path: Path) -> None:
    ptx = compile_ptx(backward_kernel, 90, 16, 64, 4, fixed=True)
    assert spilled_bytes(ptx, 90, tmp_path) == 0
    assert "atom.global.gpu.relaxed.add.u64" in ptx
