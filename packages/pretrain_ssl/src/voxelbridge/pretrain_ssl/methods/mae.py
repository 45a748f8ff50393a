"""Masked autoencoder for volumes: hide blocks of the image, reconstruct them (arXiv 2111.06377).

Reproduced: the dense variant of nnssl that the paper pre-trains with. Exactly int(ratio * blocks)
blocks of each patch are set to 0 (the image mean after z-score), a U-Net with all skip connections
sees the whole patch, and the loss is the mean squared error over the hidden voxels of the batch,
against the z-scored image itself.

Differs from He et al.: no token is dropped, the target is not normalised per block, the decoder has
skip connections. Differs from nnssl: the decoder has one output layer only (nnssl registers unused
ones per level), masks are drawn from the sample's own generator, and bf16 instead of fp16 with loss
scaling. `parity` changes nothing here: nnssl's MAE has no defect to mend.
"""

from typing import Literal

from torch import Tensor, nn

from voxelbridge.core.arch.config import DecoderConfig
from voxelbridge.core.arch.encoder import PlainEncoder, ResEncoder
from voxelbridge.core.arch.unet import UNetDecoder, build_decoder, one_conv_per_level
from voxelbridge.pretrain_ssl.block_masking import BlockMasking
from voxelbridge.pretrain_ssl.masking import (
    over_voxels,
)
from voxelbridge.pretrain_ssl.panels import Picture, slice_panel
from voxelbridge.pretrain_ssl.reconstruction import (
    hide,
    masked_mse,
    masked_mse_outside,
    visible_means,
)

CITATIONS = (
    "He et al., Masked Autoencoders Are Scalable Vision Learners, CVPR 2022 (arXiv 2111.06377)",
    "Wald et al., Revisiting MAE pre-training for 3D medical image segmentation, CVPR 2025 "
    "(arXiv 2410.23132)",
)


class MAE(BlockMasking):
    """Settings of the method, and how they become an objective and views of a patch."""

    name: Literal["mae"] = "mae"
    parity: Literal["paper", "nnssl"] = "paper"

    @property
    def citations(self) -> tuple[str, ...]:
        """Whom to cite."""
        return CITATIONS

    def build(self, encoder: ResEncoder | PlainEncoder) -> "MAEObjective":
        """The U-Net around `encoder`, with one convolution per decoder level (nnU-Net ResEnc)."""
        shape = one_conv_per_level(encoder.config)
        return MAEObjective(encoder, build_decoder(shape, encoder.config), decoder_config=shape)


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
        """`image` (B, C, D, H, W) and `hidden` (B, gz, gy, gx) bool, True = masked out.

        With `excluded` (B, D, H, W) bool, these voxels do not count.
        """
        prediction = self.reconstruct(hide(batch["image"], batch["hidden"]))
        return {"total": _loss(prediction, batch)}

    def trivial(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss of predicting each patch's mean over its visible voxels."""
        means = visible_means(batch["image"], batch["hidden"])
        return _loss(means.expand(batch["image"].shape), batch)

    def pictures(self, batch: dict[str, Tensor]) -> Picture:
        """Middle slices of the first patch: image, what the network sees, reconstruction."""
        image, hidden = batch["image"][:1], batch["hidden"][:1]
        reconstruction = self.reconstruct(hide(image, hidden))[0]
        voxels = over_voxels(hidden, image.shape[2:])[0]
        return Picture(
            "slices",
            (
                slice_panel("image", image[0]),
                slice_panel("visible", image[0], voxels),
                slice_panel("reconstruction", reconstruction),
            ),
        )

    def reconstruct(self, image: Tensor) -> Tensor:
        """(B, C, D, H, W) -> reconstruction of the same shape."""
        return self.output(self.decoder(self.encoder(image))[0])


def _loss(prediction: Tensor, batch: dict[str, Tensor]) -> Tensor:
    image, hidden = batch["image"], batch["hidden"]
    if "excluded" in batch:
        return masked_mse_outside(prediction, image, hidden, batch["excluded"])
    return masked_mse(prediction, image, hidden)
