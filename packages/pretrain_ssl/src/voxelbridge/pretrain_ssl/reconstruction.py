"""Hiding blocks of an image, and how well they were reconstructed."""

from typing import Any

import torch
from torch import Tensor

from voxelbridge.pretrain_ssl.masking import as_blocks, over_blocks


def hide(image: Tensor, hidden: Tensor) -> Tensor:
    """A copy of `image` (B, C, D, H, W) with the `hidden` blocks (B, gz, gy, gx) set to 0."""
    visible = image.clone(memory_format=torch.contiguous_format)
    as_blocks(visible, hidden.shape[1:]).masked_fill_(over_blocks(hidden), 0)
    return visible


def masked_mse(prediction: Tensor, image: Tensor, hidden: Tensor) -> Tensor:
    """Mean of (prediction - image)^2 over the hidden voxels of the batch, in float32.

    Shapes as in `hide`; gradients go to `prediction` only; 0 where nothing is hidden. Forward and
    backward hold one full-size temporary each.
    """
    loss = _MaskedMSE.apply(prediction, image, hidden)
    assert isinstance(loss, Tensor)
    return loss


def masked_mse_outside(
    prediction: Tensor, image: Tensor, hidden: Tensor, excluded: Tensor
) -> Tensor:
    """`masked_mse` over the hidden voxels that are not `excluded` (B, D, H, W), True = left out."""
    left_out = excluded[:, None]
    loss = masked_mse(torch.where(left_out, image, prediction), image, hidden)
    blocks = as_blocks(left_out, hidden.shape[1:]).sum(dim=(1, 3, 5, 7))  # (B, gz, gy, gx)
    all_hidden = hidden.sum() * (excluded.numel() // hidden.numel())
    counted = all_hidden - torch.where(hidden, blocks, 0).sum()
    return loss * (all_hidden / counted.clamp(min=1))


def visible_means(image: Tensor, hidden: Tensor) -> Tensor:
    """Each patch and channel's mean over its visible voxels, (B, C, 1, 1, 1) in float32."""
    voxels = as_blocks(image.float(), hidden.shape[1:])
    count = (~hidden).sum(dim=(1, 2, 3)).clamp(min=1) * (image[0, 0].numel() // hidden[0].numel())
    sums = torch.where(over_blocks(hidden), 0.0, voxels).sum(dim=(2, 3, 4, 5, 6, 7))  # (B, C)
    return (sums / count[:, None])[:, :, None, None, None]


class _MaskedMSE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, prediction: Tensor, image: Tensor, hidden: Tensor) -> Tensor:
        # Any: torch's context object takes whatever is put on it
        ctx.save_for_backward(prediction, image, hidden)
        squares = _difference(prediction, image).square_()
        per_block = as_blocks(squares, hidden.shape[1:]).sum(dim=(1, 3, 5, 7))  # (B, gz, gy, gx)
        # where, not a product: what was visible must not matter even if it is not finite
        total = torch.where(hidden, per_block, 0.0).sum()
        return total / _hidden_voxels(prediction, hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        prediction, image, hidden = ctx.saved_tensors
        difference = _difference(prediction, image)
        scale = gradients[0].float() * 2 / _hidden_voxels(prediction, hidden)
        blocks = as_blocks(difference, hidden.shape[1:])
        blocks.masked_fill_(over_blocks(~hidden), 0).mul_(scale)
        return difference.to(prediction.dtype), None, None


def _difference(prediction: Tensor, image: Tensor) -> Tensor:
    difference = torch.empty(image.shape, dtype=torch.float32, device=image.device)
    return torch.sub(prediction, image, out=difference)


def _hidden_voxels(prediction: Tensor, hidden: Tensor) -> Tensor:
    """Number of hidden elements (voxels x channels) of the batch, on the device."""
    return hidden.sum().clamp(min=1) * (prediction.numel() / hidden.numel())
