"""What an encoder or a decoder is made of; these models are also the `arch` of a checkpoint."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from voxelbridge.core.config import Config

Triple = tuple[int, int, int]  # z, y, x

# The bounds keep a hostile checkpoint from asking for a network that takes minutes to lay out.
_Width = Annotated[int, Field(ge=1, le=65_536)]
_Stride = Annotated[int, Field(ge=1, le=16)]
_Kernel = Annotated[int, Field(ge=1, le=15)]
_Depth = Annotated[int, Field(ge=1, le=64)]


class EncoderConfig(Config):
    """An encoder of convolution, instance norm and LeakyReLU; one entry per stage, finest first.

    `residual`: a stride-1 convolution as stem, then `blocks` residual blocks per stage.
    `plain`: `blocks` convolutions per stage; the first one of all is called the stem.
    """

    kind: Literal["residual", "plain"]
    features: tuple[_Width, ...] = Field(min_length=1, max_length=12)
    strides: tuple[tuple[_Stride, _Stride, _Stride], ...]  # z, y, x, relative to the stage before
    kernels: tuple[tuple[_Kernel, _Kernel, _Kernel], ...]  # z, y, x, odd
    blocks: tuple[_Depth, ...]
    conv_bias: bool  # of the main convolutions; a residual shortcut never has one

    @model_validator(mode="after")
    def _stages_agree(self) -> "EncoderConfig":
        for name in ("strides", "kernels", "blocks"):
            if len(getattr(self, name)) != len(self.features):
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries for "
                    f"{len(self.features)} stages (the length of features)"
                )
        if any(edge % 2 == 0 for kernel in self.kernels for edge in kernel):
            raise ValueError("kernels must be odd, so that a map keeps its size")
        return self


class DecoderConfig(Config):
    """A U-Net decoder over an encoder's stages (`unet.UNetDecoder`)."""

    kind: Literal["unet"] = "unet"
    convs_per_stage: tuple[_Depth, ...] = Field(
        min_length=1, max_length=11
    )  # per level, finest first
    conv_bias: bool


class UFPNConfig(Config):
    """The pyramid of a Retina U-Net over an encoder's stages (`ufpn.UFPN`)."""

    kind: Literal["ufpn"] = "ufpn"
    out_channels: _Width = 128  # of the levels from first_level on
    first_level: int = Field(default=2, ge=0, le=11)
    min_channels: _Width = 8
    kernel: tuple[_Kernel, _Kernel, _Kernel] = (3, 3, 3)  # z, y, x, odd
    upsample_bias: bool = False

    @model_validator(mode="after")
    def _keeps_size(self) -> "UFPNConfig":
        if any(edge % 2 == 0 for edge in self.kernel):
            raise ValueError("kernel must be odd, so that a map keeps its size")
        return self


def _decoder_kind(value: object) -> object:
    """Which decoder a table is for; files from before there were two do not say it."""
    if isinstance(value, dict):
        return value.get("kind", "unet")
    return getattr(value, "kind", None)


AnyDecoderConfig = Annotated[
    Annotated[DecoderConfig, Tag("unet")] | Annotated[UFPNConfig, Tag("ufpn")],
    Discriminator(_decoder_kind),
]


def cumulative_strides(strides: tuple[Triple, ...]) -> tuple[Triple, ...]:
    """Voxels of the input per cell of each stage, from the strides of each stage."""
    z, y, x = 1, 1, 1
    total: list[Triple] = []
    for stride in strides:
        z, y, x = z * stride[0], y * stride[1], x * stride[2]
        total.append((z, y, x))
    return tuple(total)
