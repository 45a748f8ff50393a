"""Multi-scale deformable attention in three dimensions (arXiv 2010.04159, equation 3, on volumes).

Every query reads a few points of every level of a feature pyramid, trilinearly, and adds them up
with its attention weights. Two backends: `torch` (grid_sample per level, everywhere) and `triton`
(one fused kernel forward and one backward, on CUDA devices).
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from voxelbridge.core.errors import VoxelbridgeError
from voxelbridge.detect.deform_kernels.op import fused_attention
from voxelbridge.detect.deform_kernels.torch_path import sample_levels

Backend = Literal["auto", "triton", "torch"]
Shapes = Tensor | Sequence[Sequence[int]]


def deformable_attention_3d(
    value: Tensor,
    spatial_shapes: Shapes,
    level_start_index: Tensor | Sequence[int] | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """(N, Q, M*D): for each query and head the weighted sum over levels and points of `value`.

    `value` (N, S, M, D) with S the cells of all levels, each level in C order; `spatial_shapes`
    (L, 3) the levels' (D, H, W); `level_start_index` (L,) their first cells (None: computed);
    `sampling_locations` (N, Q, M, L, P, 3) as (x, y, z), 0 and 1 being the outer edges of the
    level; `attention_weights` (N, Q, M, L, P), used as given.

    A location at continuous index c = loc * size - 0.5 counts if -1 < c < size on all axes; corners
    outside are 0, NaN counts as outside. Values may be float64, float32, bfloat16 or float16; sums
    are taken in float32 (float64), to which locations and weights are brought, and the result has
    the type of `value`. Differentiable once in value, locations and weights.

    Shapes given as integers, not as a tensor on a GPU, spare the torch backend a synchronisation.
    `auto` takes Triton on CUDA devices that have it. Raises ValueError for inconsistent shapes and
    VoxelbridgeError where `triton` cannot run.
    """
    _check(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    wide = torch.promote_types(value.dtype, torch.float32)
    locations, weights = sampling_locations.to(wide), attention_weights.to(wide)
    fused = _choose(backend, value)
    opaque = torch.compiler.is_compiling() and isinstance(spatial_shapes, Tensor)
    if not fused and not opaque:
        return sample_levels(value, _as_tuples(spatial_shapes), locations, weights)
    shapes, starts = _as_tensors(spatial_shapes, level_start_index, value.device)
    return fused_attention(value, shapes, starts, locations, weights)


def _choose(backend: Backend, value: Tensor) -> bool:
    """Whether the Triton kernel runs."""
    if backend == "torch" or (backend == "auto" and not value.is_cuda):
        return False
    from voxelbridge.detect.deform_kernels.launch import why_not_here

    reason = why_not_here(value.device)
    if reason is not None and backend == "triton":
        raise VoxelbridgeError(
            f'deformable attention: backend="triton" cannot run on {value.device}: {reason}; '
            'take backend="auto" or "torch"'
        )
    return reason is None


def _check(
    value: Tensor,
    spatial_shapes: Shapes,
    level_start_index: Tensor | Sequence[int] | None,
    locations: Tensor,
    weights: Tensor,
) -> None:
    if value.ndim != 4 or locations.ndim != 6 or weights.ndim != 5:
        raise ValueError(
            f"deformable attention: value {tuple(value.shape)} must be (N, S, M, D), locations "
            f"{tuple(locations.shape)} (N, Q, M, L, P, 3), weights {tuple(weights.shape)} "
            "(N, Q, M, L, P)"
        )
    batch, cells, heads, _ = value.shape
    levels = len(spatial_shapes)
    queries, points = weights.shape[1], weights.shape[4]
    expected = (batch, queries, heads, levels, points)
    if tuple(weights.shape) != expected or tuple(locations.shape) != (*expected, 3):
        raise ValueError(
            f"deformable attention: locations {tuple(locations.shape)} and weights "
            f"{tuple(weights.shape)} do not fit (N, Q, M, L, P) = {expected}"
        )
    if not value.is_floating_point() or not locations.is_floating_point():
        raise ValueError("deformable attention: value and locations must be floating point")
    if isinstance(spatial_shapes, Tensor) and (
        spatial_shapes.is_cuda or torch.compiler.is_compiling()
    ):
        return  # its numbers are on the device: reading them would wait for it
    shapes = _as_tuples(spatial_shapes)
    if any(len(shape) != 3 or min(shape) < 1 for shape in shapes) or not shapes:
        raise ValueError(f"deformable attention: level shapes {shapes} must be positive (D, H, W)")
    if sum(d * h * w for d, h, w in shapes) != cells:
        raise ValueError(f"deformable attention: {shapes} do not have the {cells} cells of value")
    if level_start_index is not None and not isinstance(level_start_index, Tensor):
        given = tuple(int(start) for start in level_start_index)
        if given != _starts(shapes):
            raise ValueError(f"deformable attention: level starts {given}, not {_starts(shapes)}")


def _as_tuples(shapes: Shapes) -> tuple[tuple[int, int, int], ...]:
    rows = shapes.tolist() if isinstance(shapes, Tensor) else shapes
    return tuple(tuple(int(n) for n in row) for row in rows)  # type: ignore[misc]  # checked: 3


def _as_tensors(
    shapes: Shapes, starts: Tensor | Sequence[int] | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    if not isinstance(shapes, Tensor):
        return _constant_tensors(_as_tuples(shapes), device)
    if isinstance(starts, Tensor):
        return shapes.to(device, torch.int64), starts.to(device, torch.int64)
    cells = shapes.to(device, torch.int64).prod(dim=1)
    return shapes.to(device, torch.int64), cells.cumsum(0) - cells


def _constant_tensors(
    shapes: tuple[tuple[int, int, int], ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling():  # a cached real tensor may not enter a traced graph
        return _new_tensors(shapes, device)
    return _cached_tensors(shapes, device)


@lru_cache(maxsize=32)
def _cached_tensors(
    shapes: tuple[tuple[int, int, int], ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    return _new_tensors(shapes, device)


def _new_tensors(
    shapes: tuple[tuple[int, int, int], ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    return (
        torch.tensor(shapes, dtype=torch.int64, device=device),
        torch.tensor(_starts(shapes), dtype=torch.int64, device=device),
    )


def _starts(shapes: tuple[tuple[int, int, int], ...]) -> tuple[int, ...]:
    total, starts = 0, []
    for d, h, w in shapes:
        starts.append(total)
        total += d * h * w
    return tuple(starts)
