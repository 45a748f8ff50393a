"""The decoder of a U-Net, without output layers and without a hold on the encoder."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from voxelbridge.core.arch.blocks import PlainStage
from voxelbridge.core.arch.config import DecoderConfig, EncoderConfig, Triple


class UNetDecoder(nn.Module):
    """List of encoder maps, finest first -> list of decoder maps, finest first, one fewer.

    Level l is as fine and as wide as the encoder's stage l: the level below goes through a
    transposed convolution (kernel = stride), is put before the encoder's map, and both pass
    `convs_per_stage[l]` convolution blocks. All arguments are listed finest first;
    `strides_per_stage` are relative to the stage before (`EncoderConfig.strides`).
    A 1x1x1 output layer is the caller's.
    """

    def __init__(
        self,
        encoder_channels: Sequence[int],
        strides_per_stage: Sequence[Triple],
        *,
        convs_per_stage: Sequence[int],
        conv_bias: bool,
        kernels: Sequence[Triple] | None = None,
    ) -> None:
        super().__init__()
        levels = len(encoder_channels) - 1
        kernels = ((3, 3, 3),) * (levels + 1) if kernels is None else kernels
        if len(strides_per_stage) != levels + 1 or len(kernels) != levels + 1:
            raise ValueError(f"strides_per_stage and kernels need {levels + 1} entries each")
        if levels < 1 or len(convs_per_stage) != levels or min(convs_per_stage) < 1:
            raise ValueError(f"convs_per_stage needs {levels} positive entries, finest first")
        self._channels = tuple(encoder_channels[:-1])
        self.upsample = nn.ModuleList(
            nn.ConvTranspose3d(below, here, stride, stride, bias=conv_bias)
            for here, below, stride in zip(
                encoder_channels[:-1], encoder_channels[1:], strides_per_stage[1:], strict=True
            )
        )
        self.stages = nn.ModuleList(
            PlainStage(2 * here, here, convs=convs, kernel=kernel, stride=(1, 1, 1), bias=conv_bias)
            for here, convs, kernel in zip(
                encoder_channels[:-1], convs_per_stage, kernels[:-1], strict=True
            )
        )

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each decoder map, finest first."""
        return self._channels

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        if len(features) != len(self.stages) + 1:
            raise ValueError(f"expected {len(self.stages) + 1} encoder maps, got {len(features)}")
        x = features[-1]
        outputs: list[Tensor] = []
        for level in reversed(range(len(self.stages))):
            x = torch.cat((self.upsample[level](x), features[level]), dim=1)
            x = self.stages[level](x)
            outputs.append(x)
        return outputs[::-1]


def build_decoder(config: DecoderConfig, encoder: EncoderConfig) -> UNetDecoder:
    """The decoder that `config` describes, over an encoder described by `encoder`."""
    return UNetDecoder(
        encoder.features,
        encoder.strides,
        convs_per_stage=config.convs_per_stage,
        conv_bias=config.conv_bias,
        kernels=encoder.kernels,
    )


def one_conv_per_level(encoder: EncoderConfig) -> DecoderConfig:
    """The decoder of nnU-Net's residual presets: one convolution block per level."""
    levels = len(encoder.features) - 1
    return DecoderConfig(convs_per_stage=(1,) * levels, conv_bias=encoder.conv_bias)
