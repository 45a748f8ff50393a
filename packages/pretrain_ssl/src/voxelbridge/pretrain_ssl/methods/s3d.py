"""S3D: a masked autoencoder whose encoder sees and computes visible blocks only (SparkMAE).

Reproduced: nnssl's 3D adaptation (arXiv 2410.23132) of SparK (arXiv 2301.03580), which the
detection paper pre-trains with. The encoder is walked sparsely (`sparse`); each of its maps is
normalised over visible cells, filled up with a mask token, smoothed by a convolution (all but the
finest) and given to the U-Net decoder of MAE; the loss is the mean squared error of hidden voxels.

`parity="nnssl"` keeps two of its defects: the first convolution reads hidden voxels across the
borders of blocks, and stages whose cells are larger than a block are dense. Of SparK itself the
light decoder, mask ratio 0.6, blocks of the total stride and LAMB are not reproduced; its target
normalisation is `normalize_target`.
"""

from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from voxelbridge.core.arch.blocks import NORM_EPS
from voxelbridge.core.arch.config import DecoderConfig, Triple
from voxelbridge.core.arch.encoder import PlainEncoder, ResEncoder
from voxelbridge.core.arch.unet import UNetDecoder, build_decoder, one_conv_per_level
from voxelbridge.pretrain_ssl.block_masking import BlockMasking
from voxelbridge.pretrain_ssl.masking import (
    as_blocks,
    hidden_count,
    over_voxels,
)
from voxelbridge.pretrain_ssl.panels import Picture, slice_panel
from voxelbridge.pretrain_ssl.reconstruction import masked_mse, masked_mse_outside, visible_means
from voxelbridge.pretrain_ssl.sparse import SparseMap, sparse_stages, visible_norm
from voxelbridge.pretrain_ssl.sparse_levels import fill_hidden, stages_inside_blocks

CITATIONS = (
    "Tian et al., Designing BERT for convolutional networks: sparse and hierarchical masked "
    "modeling, ICLR 2023 (arXiv 2301.03580)",
    "Wald et al., Revisiting MAE pre-training for 3D medical image segmentation, CVPR 2025 "
    "(arXiv 2410.23132)",
)
TOKEN_STD = 0.02  # SparK; nnssl draws within one standard deviation
TARGET_EPS = 1e-6  # SparK


class S3D(BlockMasking):
    """Settings of the method, and how they become an objective and views of a patch."""

    name: Literal["s3d"] = "s3d"
    parity: Literal["paper", "nnssl"] = "paper"
    normalize_target: bool = False  # SparK: reconstruct each block with mean 0 and variance 1

    @model_validator(mode="after")
    def _blocks_have_a_variance(self) -> "S3D":
        if self.normalize_target and self.block_size == 1:
            raise ValueError(
                "normalize_target needs block_size 2 or more: one voxel has no variance"
            )
        return self

    @property
    def citations(self) -> tuple[str, ...]:
        """Whom to cite."""
        return CITATIONS

    def build(self, encoder: ResEncoder | PlainEncoder) -> "S3DObjective":
        """The U-Net around `encoder`, with one convolution per decoder level (nnU-Net ResEnc)."""
        shape = one_conv_per_level(encoder.config)
        return S3DObjective(
            encoder, build_decoder(shape, encoder.config), decoder_config=shape, config=self
        )


class S3DObjective(nn.Module):
    """Encoder, densification per stage, decoder, output layer; `forward` gives the loss."""

    def __init__(
        self,
        encoder: ResEncoder | PlainEncoder,
        decoder: UNetDecoder,
        *,
        decoder_config: DecoderConfig,
        config: S3D,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.output = nn.Conv3d(decoder.channels[0], encoder.in_channels, 1)
        self.decoder_config = decoder_config
        self.config = config
        # A stage that nnssl computes densely hides nothing: its token would never train.
        has_hidden = stages_inside_blocks(encoder, config.block_size)
        self.densify = nn.ModuleList(
            Densify(
                channels,
                has_token=inside or config.parity == "paper",
                has_conv=index > 0,
            )
            for index, (channels, inside) in enumerate(
                zip(encoder.channels, has_hidden, strict=True)
            )
        )

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`image` (B, C, D, H, W) and `hidden` (B, gz, gy, gx) bool, True = masked out.

        Every sample hides exactly `hidden_count` blocks. With `excluded` (B, D, H, W) bool, these
        voxels do not count.
        """
        image, hidden = batch["image"], batch["hidden"]
        prediction = self.reconstruct(image, hidden)
        return {"total": _loss(prediction, self._target(image, hidden), batch)}

    def trivial(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss of predicting each patch's mean over its visible voxels."""
        target = self._target(batch["image"], batch["hidden"])
        means = visible_means(target, batch["hidden"])
        return _loss(means.expand(target.shape), target, batch)

    def pictures(self, batch: dict[str, Tensor]) -> Picture:
        """Middle slices of the first patch: image, what the network sees, reconstruction."""
        image, hidden = batch["image"][:1], batch["hidden"][:1]
        voxels = over_voxels(hidden, image.shape[2:])[0]
        return Picture(
            "slices",
            (
                slice_panel("image", self._target(image, hidden)[0]),
                slice_panel("visible", image[0], voxels),
                slice_panel("reconstruction", self.reconstruct(image, hidden)[0]),
            ),
        )

    def reconstruct(self, image: Tensor, hidden: Tensor) -> Tensor:
        """(B, C, D, H, W) and its hidden blocks -> reconstruction of the shape of `image`."""
        maps = self.encode(image, hidden)
        dense = [densify(level) for densify, level in zip(self.densify, maps, strict=True)]
        return self.output(self.decoder(dense)[0])

    def encode(self, image: Tensor, hidden: Tensor) -> list[SparseMap]:
        """The encoder's maps of the visible blocks, finest first."""
        is_paper = self.config.parity == "paper"
        return sparse_stages(
            self.encoder,
            image,
            hidden,
            num_hidden=hidden_count(_triple(hidden.shape[1:]), self.config.mask_ratio),
            hide_input=is_paper,
            dense_below_blocks=not is_paper,
        )

    def _target(self, image: Tensor, hidden: Tensor) -> Tensor:
        return normalized_blocks(image, hidden.shape[1:]) if self.config.normalize_target else image


class Densify(nn.Module):
    """A sparse map as a dense one: normed without affine, a token where hidden, 3x3x3 convolved."""

    def __init__(self, channels: int, *, has_token: bool, has_conv: bool) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.empty(1, channels, 1, 1, 1)) if has_token else None
        if self.token is not None:
            nn.init.trunc_normal_(self.token, std=TOKEN_STD, a=-TOKEN_STD, b=TOKEN_STD)
        self.conv = nn.Conv3d(channels, channels, 3, padding=1) if has_conv else nn.Identity()

    def forward(self, features: SparseMap) -> Tensor:
        """-> (B, C, D, H, W)."""
        normed = visible_norm(features.values, features.level, eps=NORM_EPS)
        fill = None if self.token is None else self.token.flatten()
        return self.conv(fill_hidden(normed, features.level, fill))


def normalized_blocks(image: Tensor, grid: Triple | torch.Size) -> Tensor:
    """(B, C, D, H, W) in float32 with each block and channel at mean 0 and unbiased variance 1."""
    blocks = as_blocks(image.float(), grid)
    axes = (3, 5, 7)
    variance, mean = torch.var_mean(blocks, axes, correction=1, keepdim=True)
    return ((blocks - mean) * (variance + TARGET_EPS).rsqrt()).view(image.shape)


def _loss(prediction: Tensor, target: Tensor, batch: dict[str, Tensor]) -> Tensor:
    if "excluded" in batch:
        return masked_mse_outside(prediction, target, batch["hidden"], batch["excluded"])
    return masked_mse(prediction, target, batch["hidden"])


def _triple(size: torch.Size) -> Triple:
    z, y, x = size
    return z, y, x
