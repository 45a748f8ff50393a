"""The fused kernels as torch operators: seen by compile, export, opcheck and autograd.

On devices without the kernel the operators compute by the torch path, so that a traced program runs
on the CPU too. No second derivative.
"""

from typing import Any

import torch
from torch import Tensor

from voxelbridge.detect.deform_kernels.torch_path import sample_levels, sample_levels_backward


@torch.library.custom_op("voxelbridge::deformable_attention_3d", mutates_args=())
def fused_attention(
    value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor
) -> Tensor:
    """(N, Q, M*D); layouts of `deformable_attention_3d`, locations and weights in the wide type."""
    if _has_kernel(value):
        from voxelbridge.detect.deform_kernels.launch import launch_forward

        return launch_forward(value, shapes, starts, locations, weights)
    return sample_levels(value, _tuples(shapes), locations, weights)


@torch.library.custom_op("voxelbridge::deformable_attention_3d_backward", mutates_args=())
def fused_attention_backward(
    grad: Tensor, value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights for the gradient `grad` (N, Q, M*D)."""
    if _has_kernel(value):
        from voxelbridge.detect.deform_kernels.launch import launch_backward

        return launch_backward(grad, value, shapes, starts, locations, weights)
    return sample_levels_backward(grad, value, _tuples(shapes), locations, weights)


@fused_attention.register_fake
def _(value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    del shapes, starts, weights
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


@fused_attention_backward.register_fake
def _(
    grad: Tensor, value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    del grad, shapes, starts
    return (
        torch.empty(value.shape, dtype=value.dtype, device=value.device),
        torch.empty(locations.shape, dtype=locations.dtype, device=value.device),
        torch.empty(weights.shape, dtype=weights.dtype, device=value.device),
    )


# ctx is autograd's untyped context
def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    value, shapes, starts, locations, weights = ctx.saved_tensors
    of_value, of_locations, of_weights = fused_attention_backward(
        grad.contiguous(), value, shapes, starts, locations, weights
    )
    return of_value, None, None, of_locations, of_weights


fused_attention.register_autograd(_backward, setup_context=_keep)


def _has_kernel(value: Tensor) -> bool:
    from voxelbridge.detect.deform_kernels.launch import why_not_here

    return why_not_here(value.device) is None


def _tuples(shapes: Tensor) -> tuple[tuple[int, int, int], ...]:
    return tuple((int(d), int(h), int(w)) for d, h, w in shapes.tolist())
