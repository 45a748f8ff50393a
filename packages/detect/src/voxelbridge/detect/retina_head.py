"""The two convolutional heads of Retina U-Net, shared by all pyramid levels.

Layout and initialisation after nnDetection v2 (RetinaUNetFocalV002), which the paper
(arXiv 2509.15947, section 2.1) fine-tunes. Shapes: B batch, D H W cells, A anchors per cell,
K classes, N anchors of all levels.
"""

import math
from collections.abc import Sequence
from typing import Literal, assert_never

import torch
from torch import Tensor, nn

CHANNELS_PER_GROUP = 16  # nnDetection: group norm with 16 channels in a group
PRIOR = 0.01  # initial foreground probability of every anchor (focal loss, arXiv 1708.02002)
WEIGHT_DEVIATION = 0.01

Activation = Literal["leaky_relu", "relu"]  # nnDetection v2, nnDetection v0.1


class RetinaHead(nn.Module):
    """Class logits and deltas of every anchor: list of (B, C, D, H, W) -> (B, N, K), (B, N, 6).

    Anchors are ordered level by level as given, then cell by cell in C order, then by anchor of
    the cell: the order of `anchors.anchor_boxes`.
    """

    def __init__(
        self,
        channels: int,
        num_anchors: int,
        *,
        num_classes: int,
        num_levels: int,
        activation: Activation = "leaky_relu",
    ) -> None:
        super().__init__()
        if channels % CHANNELS_PER_GROUP and channels > CHANNELS_PER_GROUP:
            raise ValueError(f"head channels {channels} are not a multiple of {CHANNELS_PER_GROUP}")
        self.classifier = _tower(channels, num_anchors * num_classes, activation)
        self.regressor = _tower(channels, num_anchors * 6, activation)
        self.level_scales = nn.Parameter(torch.ones(num_levels))
        self.num_classes = num_classes
        self._initialise()

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        logits = [_per_anchor(self.classifier(level), self.num_classes) for level in maps]
        deltas = [
            _per_anchor(self.regressor(level) * scale, 6)
            for level, scale in zip(maps, self.level_scales, strict=True)
        ]
        return torch.cat(logits, dim=1), torch.cat(deltas, dim=1)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.normal_(module.weight, std=WEIGHT_DEVIATION)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        output = self.classifier[-1]
        assert isinstance(output, nn.Conv3d)
        assert output.bias is not None
        nn.init.constant_(output.bias, -math.log((1 - PRIOR) / PRIOR))


def _tower(channels: int, outputs: int, activation: Activation) -> nn.Sequential:
    return nn.Sequential(
        *_conv_norm_act(channels, activation),
        *_conv_norm_act(channels, activation),
        nn.Conv3d(channels, outputs, kernel_size=3, padding=1),
    )


def _conv_norm_act(channels: int, activation: Activation) -> tuple[nn.Module, ...]:
    return (
        nn.Conv3d(channels, channels, kernel_size=3, padding=1, bias=False),
        nn.GroupNorm(max(channels // CHANNELS_PER_GROUP, 1), channels),
        _activation(activation),
    )


def _activation(name: Activation) -> nn.Module:
    match name:
        case "leaky_relu":
            return nn.LeakyReLU(0.01, inplace=True)
        case "relu":
            return nn.ReLU(inplace=True)
        case _:
            assert_never(name)


def _per_anchor(level: Tensor, values: int) -> Tensor:
    # (B, A * values, D, H, W) -> (B, D * H * W * A, values)
    return level.permute(0, 2, 3, 4, 1).reshape(level.shape[0], -1, values)
