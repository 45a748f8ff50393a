"""Deformable DETR on volumes: an encoder, a channel mapper, a deformable transformer with heads.

The network knows nothing about pre-training, targets or losses; see `detr_criterion` and `build`.
"""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from voxelbridge.core.arch.encoder import Encoder
from voxelbridge.detect.boxes import centre_size_to_edges
from voxelbridge.detect.deform_transformer import (
    DeformableAttention,
    DeformableTransformer,
    TransformerOutput,
)

MAPPER_GROUPS = 16  # of the mapper's GroupNorm (nnDetection v2); fewer where they do not divide


class ChannelMapper(nn.Module):
    """Brings maps of different channels to one width: 1x1x1 convolution and GroupNorm, no more."""

    def __init__(self, in_channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv3d(channels, width, 1) for channels in in_channels)
        self.norms = nn.ModuleList(
            nn.GroupNorm(math.gcd(MAPPER_GROUPS, width), width) for _ in in_channels
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [
            norm(conv(level))
            for conv, norm, level in zip(self.convs, self.norms, maps, strict=True)
        ]


class BoxHead(nn.Sequential):
    """Three linear layers with ReLU between them: width -> 6 numbers to refine a box."""

    def __init__(self, width: int) -> None:
        super().__init__(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
            nn.Linear(width, 6),
        )  # fmt: skip


class DeformableDETR(nn.Module):
    """Scored boxes of an image (B, C, D, H, W) from the encoder maps of `levels`, finest first."""

    def __init__(
        self,
        encoder: Encoder,
        projection: ChannelMapper,
        transformer: DeformableTransformer,
        *,
        levels: Sequence[int],
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.projection = projection
        self.transformer = transformer
        self.levels = tuple(levels)

    def idle_parameters(self) -> list[nn.Parameter]:
        """Parameters of stages coarser than the levels read: no output depends on them."""
        coarser = self.encoder.stages[max(self.levels) + 1 :]
        return [parameter for stage in coarser for parameter in stage.parameters()]

    def forward(self, image: Tensor) -> TransformerOutput:
        maps = self.encoder(image)
        return self.transformer(self.projection([maps[level] for level in self.levels]))

    def candidates(self, patches: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Per patch boxes (Q, 6) in voxel edges and class probabilities (Q, K)."""
        answer = self(patches).blocks[-1]
        size = answer.boxes.new_tensor([*patches.shape[2:], *patches.shape[2:]])
        boxes = centre_size_to_edges(answer.boxes) * size
        return list(zip(boxes, answer.logits.float().sigmoid(), strict=True))


def initialize_transformer(
    projection: ChannelMapper,
    transformer: DeformableTransformer,
    *,
    class_prior: float,
    zero_box_heads: bool,
) -> None:
    """Xavier for matrices, cube directions for offsets, `class_prior` as first probability.

    Box heads keep torch's initial values (nnDetection v2) or start from zero corrections
    (Deformable DETR, arXiv 2010.04159).
    """
    for name, parameter in [*projection.named_parameters(), *transformer.named_parameters()]:
        if parameter.dim() > 1 and "box_heads" not in name:
            nn.init.xavier_uniform_(parameter)
    for conv in projection.convs:
        assert isinstance(conv, nn.Conv3d)
        assert conv.bias is not None
        nn.init.zeros_(conv.bias)
    nn.init.normal_(transformer.level_embedding)
    for module in transformer.modules():
        if isinstance(module, DeformableAttention):
            module.reset_parameters()
    prior = -math.log((1 - class_prior) / class_prior)
    for head in transformer.class_heads:
        assert isinstance(head, nn.Linear)
        nn.init.constant_(head.bias, prior)
    if zero_box_heads:
        for head in transformer.box_heads:
            assert isinstance(head, BoxHead)
            last = head[-1]
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
