"""Masked autoencoder for volumes: hide blocks of the image, reconstruct them (arXiv 2111.06377).

Reproduced: the dense variant of nnssl that the paper pre-trains with. Exactly int(ratio * blocks)
blocks of each patch are set to 0 (the image mean after z-score), a U-Net with all skip connections
sees the whole patch, and the loss is the mean squared error over the hidden voxels of the batch,
against the z-scored image itself.

Differs from He et al.: no token is dropped, the target is not normalised per block, the decoder has
skip connections. Differs from nnssl: the decoder has one output layer only (nnssl registers unused
ones per level), masks are drawn from the batch's own generator, bf16 instead of fp16 with loss
scaling, and rotation and scaling are not among the augmentations yet (mirroring is).
"""

from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from voxelbridge.core.arch.config import DecoderConfig
from voxelbridge.core.arch.encoder import PlainEncoder, ResEncoder
from voxelbridge.core.arch.unet import UNetDecoder, build_decoder
from voxelbridge.core.config import Config
from voxelbridge.pretrain_ssl.masking import (
    as_blocks,
    block_grid,
    hidden_count,
    over_blocks,
    random_block_mask,
)

CITATIONS = (
    "He et al., Masked Autoencoders Are Scalable Vision Learners, CVPR 2022 (arXiv 2111.06377)",
    "Wald et al., Revisiting MAE pre-training for 3D medical image segmentation, CVPR 2025 "
    "(arXiv 2410.23132)",
)


class MAE(Config):
    """Settings of the method, and how they become an objective and views of a patch."""

    name: Literal["mae"] = "mae"
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75  # of the blocks of a patch
    block_size: PositiveInt = 16  # edge of a mask block in voxels

    @property
    def citations(self) -> tuple[str, ...]:
        """Whom to cite."""
        return CITATIONS

    def check_patch(self, patch_size: tuple[int, int, int]) -> None:
        """ValueError unless the blocks divide the patch, some are hidden and some are not."""
        grid = block_grid(patch_size, self.block_size)
        if hidden_count(grid, self.mask_ratio) == 0:
            raise ValueError(f"mask_ratio {self.mask_ratio} hides none of the {grid} blocks")

    def build(self, encoder: ResEncoder | PlainEncoder) -> "MAEObjective":
        """The U-Net around `encoder`, with one convolution per decoder level (nnU-Net ResEnc)."""
        levels = len(encoder.channels) - 1
        shape = DecoderConfig(convs_per_stage=(1,) * levels, conv_bias=encoder.config.conv_bias)
        return MAEObjective(encoder, build_decoder(shape, encoder.config), decoder_config=shape)

    def views(
        self, patch: NDArray[np.float32], rng: np.random.Generator
    ) -> dict[str, NDArray[Any]]:
        """What the objective needs of a patch (C, D, H, W): `image` and its `hidden` blocks."""
        size = patch.shape[1:]
        grid = block_grid(size, self.block_size)
        return {"image": patch, "hidden": random_block_mask(rng, grid, ratio=self.mask_ratio)}


class MAEObjective(nn.Module):
    """Encoder, decoder and a 1x1x1 output layer; `forward` gives the reconstruction loss."""

    def __init__(
        self,
        encoder: ResEncoder | PlainEncoder,
        decoder: UNetDecoder,
        *,
        decoder_config: DecoderConfig,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.output = nn.Conv3d(decoder.channels[0], encoder.in_channels, 1)
        self.decoder_config = decoder_config

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`image` (B, C, D, H, W) and `hidden` (B, gz, gy, gx) bool, True = masked out."""
        image, hidden = batch["image"], batch["hidden"]
        prediction = self.reconstruct(hide(image, hidden))
        return {"total": masked_mse(prediction, image, hidden)}

    def reconstruct(self, image: Tensor) -> Tensor:
        """(B, C, D, H, W) -> reconstruction of the same shape."""
        return self.output(self.decoder(self.encoder(image))[0])


def hide(image: Tensor, hidden: Tensor) -> Tensor:
    """A copy of `image` (B, C, D, H, W) with the `hidden` blocks (B, gz, gy, gx) set to 0."""
    visible = image.clone(memory_format=torch.contiguous_format)
    as_blocks(visible, hidden.shape[1:]).masked_fill_(over_blocks(hidden), 0)
    return visible


def masked_mse(prediction: Tensor, image: Tensor, hidden: Tensor) -> Tensor:
    """Mean of (prediction - image)^2 over the hidden voxels of the batch, in float32.

    Shapes as in `hide`; gradients go to `prediction` only. Forward and backward hold one
    full-size temporary each.
    """
    loss = _MaskedMSE.apply(prediction, image, hidden)
    assert isinstance(loss, Tensor)
    return loss


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
    return hidden.sum() * (prediction.numel() / hidden.numel())
