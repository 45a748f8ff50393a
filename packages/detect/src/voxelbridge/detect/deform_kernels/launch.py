"""Starts the Triton kernels: grids, tuning, integer sums in deterministic mode."""

import importlib.util
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

INTEGER_BITS = 62  # of the integer sums in deterministic mode; one is the sign's, one is spare
BLOCK_SIZES = (16, 32, 64, 128)
WARPS = (1, 2, 4, 8)
THREADS_PER_WARP = 32
MIN_CAPABILITY = (8, 0)  # older devices have no bfloat16


def why_not_here(device: torch.device) -> str | None:
    """Why the kernels cannot run on `device`; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu":
        return None if _interpreted() else "it needs a CUDA device (or Triton's interpreter)"
    if device.type != "cuda":
        return "it needs a CUDA device"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return f"it needs compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
    return None


def launch_forward(
    value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor
) -> Tensor:
    """The forward kernel on contiguous copies where needed."""
    value, locations, weights = (t.contiguous() for t in (value, locations, weights))
    batch, cells, heads, channels = value.shape
    queries = locations.shape[1]
    # The interpreter cuts digits off where a GPU rounds: there the result is rounded by torch.
    kept = value.dtype if value.is_cuda else locations.dtype
    out = torch.empty((batch, queries, heads * channels), dtype=kept, device=value.device)
    if out.numel() == 0:
        return out.to(value.dtype)
    _start(
        "forward",
        (value, shapes.contiguous(), starts.contiguous(), locations, weights, out),
        cells, weights, channels, wide=locations.dtype, options={},
    )  # fmt: skip
    return out.to(value.dtype)


def launch_backward(
    grad: Tensor, value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward kernel; bit-equal between calls under `use_deterministic_algorithms`."""
    grad, value, locations, weights = (t.contiguous() for t in (grad, value, locations, weights))
    wide = locations.dtype
    of_locations, of_weights = torch.empty_like(locations), torch.empty_like(weights)
    if weights.numel() == 0 or value.shape[3] == 0:
        return torch.zeros_like(value), of_locations.zero_(), of_weights.zero_()
    fixed = torch.are_deterministic_algorithms_enabled()
    scale = _integer_scale(grad, weights) if fixed else grad.new_ones(1, dtype=wide)
    of_value = torch.zeros(value.shape, dtype=torch.int64 if fixed else wide, device=value.device)
    _start(
        "backward",
        (
            grad, value, shapes.contiguous(), starts.contiguous(), locations, weights,
            scale, of_value, of_locations, of_weights,
        ),
        value.shape[1], weights, value.shape[3], wide=wide, options={"FIXED": fixed},
    )  # fmt: skip
    if fixed:
        of_value = of_value.double().div_(scale.double())
    return of_value.to(value.dtype), of_locations, of_weights


def _integer_scale(grad: Tensor, weights: Tensor) -> Tensor:
    """(1,) power of two: no sum of shares can exceed 2 ** INTEGER_BITS of these units."""
    per_cell = weights.shape[1] * weights.shape[4]  # every point of every query in one cell
    largest = grad.abs().amax().double() * weights.abs().amax().double() * per_cell
    exponent = (INTEGER_BITS - torch.log2(largest.clamp_min(1e-300)).ceil()).clamp(-120, 120)
    return torch.exp2(exponent).to(weights.dtype).reshape(1)


def _start(
    name: str,
    tensors: tuple[Tensor, ...],
    cells: int,
    weights: Tensor,
    channels: int,
    *,
    wide: torch.dtype,
    options: dict[str, bool],
) -> None:
    import triton
    import triton.language as tl

    batch, queries, heads, levels, points = weights.shape
    bucket = triton.next_power_of_2(queries)
    sizes = (cells, queries, bucket)
    fixed_arguments: dict[str, Any] = {
        "M": heads, "L": levels, "P": points, "D": channels,
        "BLOCK_D": triton.next_power_of_2(channels),
        "WIDE": tl.float64 if wide == torch.float64 else tl.float32,
        **options,
    }  # fmt: skip
    if weights.is_cuda:
        tuned = _tuned(name)
        with torch.cuda.device(weights.device):
            tuned[lambda chosen: (triton.cdiv(queries, chosen["BLOCK_Q"]) * heads, batch)](
                *tensors, *sizes, **fixed_arguments
            )
    else:  # interpreted: the cost is per program, so one block holds all queries
        kernel = _kernel(name)
        kernel[(heads, batch)](*tensors, *sizes, **fixed_arguments, BLOCK_Q=max(bucket, 1))


@lru_cache(maxsize=2)
def _tuned(name: str) -> Any:  # Any: triton's tuner is untyped
    """The kernel that measures its block size and warps once per kind of problem, kept on disk."""
    import triton

    configs = [
        triton.Config({"BLOCK_Q": block}, num_warps=warps, num_stages=1)
        for block in BLOCK_SIZES
        for warps in WARPS
    ]
    # The number of queries enters as the next power of two: every patch size its own measurement
    # would measure for ever. Sums must start from zero at each trial.
    return triton.autotune(
        configs=configs,
        key=["query_bucket", "M", "L", "P", "D", "WIDE"],
        reset_to_zero=["grad_value_ptr"] if name == "backward" else None,
        prune_configs_by={"early_config_prune": _fitting},
        cache_results=True,
    )(_kernel(name))


# triton hands over its own objects and the call's arguments
def _fitting(configs: list[Any], arguments: dict[str, Any], **options: Any) -> list[Any]:
    channels = {**arguments, **options}["BLOCK_D"]
    return [c for c in configs if fits_registers(c.kwargs["BLOCK_Q"], channels, c.num_warps)]


def fits_registers(block: int, channels: int, warps: int) -> bool:
    """Whether a thread holds 8 elements of a block (16 bytes of bfloat16), or 16 in narrow heads.

    With more the kernels keep registers in memory (compiled for sm_80 and sm_90).
    """
    elements = block * channels / (THREADS_PER_WARP * warps)
    return elements == 8 or (elements == 16 and channels <= 16)


def _kernel(name: str) -> Any:  # Any: triton's functions are untyped
    from voxelbridge.detect.deform_kernels import triton_kernels

    return triton_kernels.forward_kernel if name == "forward" else triton_kernels.backward_kernel


def _interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)  # type: ignore[attr-defined]  # made at import
