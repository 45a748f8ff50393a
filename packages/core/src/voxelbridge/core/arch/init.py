"""Weight initialisation in place; the method is written into checkpoints."""

import math
from typing import Literal, assert_never

import torch
from torch import nn

from voxelbridge.core.arch.blocks import LEAKY_SLOPE, ResidualBlock

InitMethod = Literal["kaiming", "torch_default"]


@torch.no_grad()
def initialize(
    module: nn.Module,
    method: InitMethod,
    *,
    generator: torch.Generator | None = None,
    fan: Literal["fan_in", "fan_out"] = "fan_in",
) -> None:
    """Redraws every convolution and resets every norm of `module`, in place.

    `kaiming` is nnU-Net's: normal for LeakyReLU 0.01, biases 0, and the last norm of each residual
    block 0, so that a block starts as its shortcut. `fan` counts inputs (nnU-Net) or outputs
    (nnDetection's pyramid). `torch_default` is what the constructors of torch draw. Without a
    `generator` the numbers come from torch's global stream.
    """
    for part in module.modules():
        match part:
            case nn.Conv3d() | nn.ConvTranspose3d():
                _draw(part, method, generator, fan)
            case nn.InstanceNorm3d() | nn.GroupNorm():
                nn.init.ones_(part.weight)
                nn.init.zeros_(part.bias)
            case _:
                pass
    if method == "kaiming":
        for part in module.modules():
            if isinstance(part, ResidualBlock):
                nn.init.zeros_(part.conv2.norm.weight)
                nn.init.zeros_(part.conv2.norm.bias)


def _draw(
    conv: nn.Conv3d | nn.ConvTranspose3d,
    method: InitMethod,
    generator: torch.Generator | None,
    fan: Literal["fan_in", "fan_out"],
) -> None:
    match method:
        case "kaiming":
            nn.init.kaiming_normal_(conv.weight, a=LEAKY_SLOPE, mode=fan, generator=generator)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
        case "torch_default":
            nn.init.kaiming_uniform_(conv.weight, a=math.sqrt(5), generator=generator)
            if conv.bias is not None:
                # torch counts the second axis as inputs for transposed convolutions too.
                bound = 1 / math.sqrt(conv.weight[0].numel())
                nn.init.uniform_(conv.bias, -bound, bound, generator=generator)
        case _:
            assert_never(method)
