"""Convolution blocks of the nnU-Net family; every parameter is registered once."""

from torch import Tensor, nn
from torch.nn import functional as F

from voxelbridge.core.arch.config import Triple

NORM_EPS = 1e-5  # nnU-Net
LEAKY_SLOPE = 0.01  # nnU-Net


class ConvNormAct(nn.Module):
    """Convolution, affine instance norm and (unless `activation` is off) LeakyReLU.

    (B, C, D, H, W) -> (B, out_channels, ceil(D / stride), ...); kernel edges are odd.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: Triple,
        bias: bool,
        stride: Triple = (1, 1, 1),
        activation: bool = True,
    ) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride, padding, bias=bias)
        self.norm = nn.InstanceNorm3d(out_channels, eps=NORM_EPS, affine=True)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        # In place: the norm's backward needs its input, so its output may be overwritten.
        return F.leaky_relu(x, LEAKY_SLOPE, inplace=True) if self.activation else x


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut; the stride sits in the first one (ResNet-D, 1812.01187).

    The shortcut pools (average) where the block is strided, then projects with a bias-free
    1x1x1 convolution and a norm where the channels change; otherwise it has no parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: Triple,
        bias: bool,
        stride: Triple = (1, 1, 1),
    ) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = ConvNormAct(in_channels, out_channels, kernel=kernel, bias=bias, stride=stride)
        self.conv2 = ConvNormAct(
            out_channels, out_channels, kernel=kernel, bias=bias, activation=False
        )
        self.skip = (
            ConvNormAct(in_channels, out_channels, kernel=(1, 1, 1), bias=False, activation=False)
            if in_channels != out_channels
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.stride != (1, 1, 1):
            shortcut = F.avg_pool3d(shortcut, self.stride, self.stride)
        if self.skip is not None:
            shortcut = self.skip(shortcut)
        out = self.conv2(self.conv1(x))
        out += shortcut
        return F.leaky_relu(out, LEAKY_SLOPE, inplace=True)


class ResidualStage(nn.Module):
    """`blocks` residual blocks, the first of which changes resolution and channels."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        blocks: int,
        kernel: Triple,
        stride: Triple,
        bias: bool,
    ) -> None:
        super().__init__()
        first = ResidualBlock(in_channels, out_channels, kernel=kernel, bias=bias, stride=stride)
        rest = [
            ResidualBlock(out_channels, out_channels, kernel=kernel, bias=bias)
            for _ in range(blocks - 1)
        ]
        self.blocks = nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class PlainStage(nn.Module):
    """`convs` convolution blocks (none gives the identity), the first of which is strided."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        convs: int,
        kernel: Triple,
        stride: Triple,
        bias: bool,
    ) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            *(
                ConvNormAct(
                    in_channels if index == 0 else out_channels,
                    out_channels,
                    kernel=kernel,
                    bias=bias,
                    stride=stride if index == 0 else (1, 1, 1),
                )
                for index in range(convs)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.convs(x)
