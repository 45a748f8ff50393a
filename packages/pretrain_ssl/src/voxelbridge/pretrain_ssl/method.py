"""What a pre-training method is, and the list of all of them."""

from typing import Annotated, Protocol, runtime_checkable

from pydantic import Field
from torch import Tensor

from voxelbridge.core.arch.config import DecoderConfig
from voxelbridge.core.arch.encoder import PlainEncoder, ResEncoder
from voxelbridge.core.arch.unet import UNetDecoder
from voxelbridge.pretrain_ssl.methods.mae import MAE
from voxelbridge.pretrain_ssl.methods.models_genesis import ModelsGenesis
from voxelbridge.pretrain_ssl.methods.s3d import S3D
from voxelbridge.pretrain_ssl.methods.voco import VoCo
from voxelbridge.pretrain_ssl.panels import Picture

# The whole registry: a new method is one file in methods/, one name here, a preset, a test, a page.
Method = Annotated[MAE | S3D | ModelsGenesis | VoCo, Field(discriminator="name")]


@runtime_checkable
class Objective(Protocol):
    """What a method's config builds: an nn.Module around an encoder, which is what remains."""

    @property
    def encoder(self) -> ResEncoder | PlainEncoder: ...
    @property
    def decoder(self) -> UNetDecoder | None: ...
    @property
    def decoder_config(self) -> DecoderConfig | None: ...

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Named losses of a batch, with their weighted sum under "total"."""
        ...

    def trivial(self, batch: dict[str, Tensor]) -> Tensor:
        """What "total" is for a predictor that knows nothing: the mean value, chance overlap."""
        ...

    def pictures(self, batch: dict[str, Tensor]) -> Picture:
        """The first patch of the batch and what the network makes of it."""
        ...
