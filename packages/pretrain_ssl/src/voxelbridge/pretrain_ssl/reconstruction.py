"""Hiding blocks of an image, and how well they were reconstructed."""

from math import prod
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
    return _apply(prediction, image, hidden, None)


def masked_mse_outside(
    prediction: Tensor, image: Tensor, hidden: Tensor, excluded: Tensor
) -> Tensor:
    """`masked_mse` over the hidden voxels that are not `excluded` (B, D, H, W), True = left out."""
    return _apply(prediction, image, hidden, excluded)


def visible_means(image: Tensor, hidden: Tensor) -> Tensor:
    """Each patch and channel's mean over its visible voxels, (B, C, 1, 1, 1) in float32."""
    voxels = as_blocks(image.float(), hidden.shape[1:])
    count = (~hidden).sum(dim=(1, 2, 3)).clamp(min=1) * (image[0, 0].numel() // hidden[0].numel())
    sums = torch.where(over_blocks(hidden), 0.0, voxels).sum(dim=(2, 3, 4, 5, 6, 7))  # (B, C)
    return (sums / count[:, None])[:, :, None, None, None]


class _MaskedMSE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, prediction: Tensor, image: Tensor, hidden: Tensor, excluded: Tensor | None
    ) -> Tensor:
        # Any: torch's context object takes whatever is put on it
        count = _counted(prediction, hidden, excluded)
        ctx.save_for_backward(prediction, image, hidden, excluded, count)
        squares = _difference(prediction, image, excluded).square_()
        per_block = as_blocks(squares, hidden.shape[1:]).sum(dim=(1, 3, 5, 7))  # (B, gz, gy, gx)
        # where, not a product: what was visible must not matter even if it is not finite
        return torch.where(hidden, per_block, 0.0).sum() / count

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:
        prediction, image, hidden, excluded, count = ctx.saved_tensors
        difference = _difference(prediction, image, excluded)
        blocks = as_blocks(difference, hidden.shape[1:])
        blocks.masked_fill_(over_blocks(~hidden), 0).mul_(gradients[0].float() * 2 / count)
        return difference.to(prediction.dtype), None, None, None


def _apply(prediction: Tensor, image: Tensor, hidden: Tensor, excluded: Tensor | None) -> Tensor:
    loss = _MaskedMSE.apply(prediction, image, hidden, excluded)
    assert isinstance(loss, Tensor)
    return loss


def _difference(prediction: Tensor, image: Tensor, excluded: Tensor | None) -> Tensor:
    """In float32, 0 where excluded: there, too, a value that is not finite must not matter."""
    difference = torch.empty(image.shape, dtype=torch.float32, device=image.device)
    torch.sub(prediction, image, out=difference)
    return difference if excluded is None else difference.masked_fill_(excluded[:, None], 0)


def _counted(prediction: Tensor, hidden: Tensor, excluded: Tensor | None) -> Tensor:
    """Number of elements (voxels x channels) of the batch that count, on the device."""
    batch, channels, *size = prediction.shape
    voxels = hidden.sum() * (batch * prod(size) // hidden.numel())
    if excluded is not None:
        left_out = as_blocks(excluded[:, None], hidden.shape[1:]).sum(dim=(1, 3, 5, 7))
        voxels = voxels - torch.where(hidden, left_out, 0).sum()
    return voxels.clamp(min=1) * channels
