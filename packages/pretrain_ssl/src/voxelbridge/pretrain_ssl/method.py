"""What a pre-training method is, and the list of all of them."""

from typing import Protocol, runtime_checkable

from torch import Tensor

from voxelbridge.core.arch.config import DecoderConfig
from voxelbridge.core.arch.encoder import PlainEncoder, ResEncoder
from voxelbridge.core.arch.unet import UNetDecoder
from voxelbridge.pretrain_ssl.methods.mae import MAE

# The whole registry: a new method is one file in methods/, one name here (with
# Field(discriminator="name") from the second on), a preset, a test and a page.
Method = MAE


@runtime_checkable
class Objective(Protocol):
    """An nn.Module whose forward gives named losses with "total"; the encoder is what remains."""

    @property
    def encoder(self) -> ResEncoder | PlainEncoder: ...
    @property
    def decoder(self) -> UNetDecoder: ...
    @property
    def decoder_config(self) -> DecoderConfig: ...
    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]: ...
