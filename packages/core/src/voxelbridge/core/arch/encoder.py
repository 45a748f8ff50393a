"""The two encoders: residual (nnU-Net's ResEnc) and plain (nnDetection's)."""

from typing import assert_never

import torch
from torch import Tensor, nn

from voxelbridge.core.arch.blocks import ConvNormAct, PlainStage, ResidualStage
from voxelbridge.core.arch.config import EncoderConfig, Triple, cumulative_strides


class ResEncoder(nn.Module):
    """Residual encoder: (B, C, D, H, W) -> list of stage outputs, finest first.

    Every edge of the input must be a multiple of the deepest stride, and the deepest map must
    hold more than one cell (a norm over one cell is undefined); anything else is a ValueError.
    """

    def __init__(self, config: EncoderConfig, in_channels: int = 1) -> None:
        super().__init__()
        if config.kind != "residual":
            raise ValueError(f"a ResEncoder takes a residual config, got kind={config.kind!r}")
        self._config = config
        self._in_channels = in_channels
        self._strides = cumulative_strides(config.strides)
        width = config.features[0]
        self.stem = build_stem(config, in_channels=in_channels)
        self.stages = nn.ModuleList(
            ResidualStage(
                before,
                features,
                blocks=blocks,
                kernel=kernel,
                stride=stride,
                bias=config.conv_bias,
            )
            for before, features, blocks, kernel, stride in zip(
                (width, *config.features[:-1]),
                config.features,
                config.blocks,
                config.kernels,
                config.strides,
                strict=True,
            )
        )

    @property
    def config(self) -> EncoderConfig:
        return self._config

    @property
    def in_channels(self) -> int:
        return self._in_channels

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each stage output, finest first."""
        return self._config.features

    @property
    def strides(self) -> tuple[Triple, ...]:
        """Input voxels per cell of each stage output (z, y, x), finest first."""
        return self._strides

    def forward(self, image: Tensor) -> list[Tensor]:
        check_input_shape(image.shape, self._in_channels, self._strides[-1])
        return _stage_outputs(self.stem(image), self.stages)


class PlainEncoder(nn.Module):
    """Plain encoder: (B, C, D, H, W) -> list of stage outputs, finest first.

    `stem` is the first convolution of stage 0, which therefore has one fewer. The rule for input
    sizes is the one of `ResEncoder`.
    """

    def __init__(self, config: EncoderConfig, in_channels: int = 1) -> None:
        super().__init__()
        if config.kind != "plain":
            raise ValueError(f"a PlainEncoder takes a plain config, got kind={config.kind!r}")
        self._config = config
        self._in_channels = in_channels
        self._strides = cumulative_strides(config.strides)
        width = config.features[0]
        self.stem = build_stem(config, in_channels=in_channels)
        self.stages = nn.ModuleList(
            PlainStage(
                before, features, convs=convs, kernel=kernel, stride=stride, bias=config.conv_bias
            )
            for before, features, convs, kernel, stride in zip(
                (width, *config.features[:-1]),
                config.features,
                (config.blocks[0] - 1, *config.blocks[1:]),
                config.kernels,
                ((1, 1, 1), *config.strides[1:]),
                strict=True,
            )
        )

    @property
    def config(self) -> EncoderConfig:
        return self._config

    @property
    def in_channels(self) -> int:
        return self._in_channels

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each stage output, finest first."""
        return self._config.features

    @property
    def strides(self) -> tuple[Triple, ...]:
        """Input voxels per cell of each stage output (z, y, x), finest first."""
        return self._strides

    def forward(self, image: Tensor) -> list[Tensor]:
        check_input_shape(image.shape, self._in_channels, self._strides[-1])
        return _stage_outputs(self.stem(image), self.stages)


Encoder = ResEncoder | PlainEncoder


def build_encoder(config: EncoderConfig, *, in_channels: int) -> Encoder:
    """The encoder that `config` describes, with the weights that torch's constructors draw."""
    match config.kind:
        case "residual":
            return ResEncoder(config, in_channels)
        case "plain":
            return PlainEncoder(config, in_channels)
        case _:
            assert_never(config.kind)


def build_stem(config: EncoderConfig, *, in_channels: int) -> ConvNormAct:
    """The first convolution of the encoder that `config` describes.

    Strided in a plain encoder, whose first stage begins with it; of stride 1 in a residual one.
    """
    return ConvNormAct(
        in_channels,
        config.features[0],
        kernel=config.kernels[0],
        bias=config.conv_bias,
        stride=config.strides[0] if config.kind == "plain" else (1, 1, 1),
    )


def check_input_shape(shape: torch.Size, in_channels: int, stride: Triple) -> None:
    """ValueError unless (B, C, D, H, W) has `in_channels` and fits the total `stride`."""
    if len(shape) != 5 or shape[1] != in_channels:
        raise ValueError(f"expected an image (B, {in_channels}, D, H, W), got {tuple(shape)}")
    size = shape[2:]
    if any(edge % step for edge, step in zip(size, stride, strict=True)):
        raise ValueError(
            f"image size {tuple(size)} (z, y, x) is no multiple of the encoder's total stride "
            f"{stride}; pad or crop it"
        )
    if size.numel() == stride[0] * stride[1] * stride[2]:
        raise ValueError(
            f"image size {tuple(size)} leaves one cell in the deepest map, whose norm is "
            f"undefined; take at least twice the total stride {stride} on one axis"
        )


def _stage_outputs(x: Tensor, stages: nn.ModuleList) -> list[Tensor]:
    outputs = []
    for stage in stages:
        x = stage(x)
        outputs.append(x)
    return outputs
