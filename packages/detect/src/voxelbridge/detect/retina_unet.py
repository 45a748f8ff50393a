"""Retina U-Net: an encoder, a U-FPN neck, anchor heads on its coarse maps, a segmentation layer.

arXiv 1811.08661 as configured by nnDetection v2 (arXiv 2509.15947, section 2.1). The network knows
nothing about pre-training, targets or losses; see `retina_criterion` and `build`.
Shapes: B batch, C channels, D H W voxels, N anchors of all levels, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from voxelbridge.detect.anchor_planning import AnchorSizes
from voxelbridge.detect.anchors import AnchorGrid, anchor_grid
from voxelbridge.detect.retina_head import RetinaHead

Triple = tuple[int, int, int]


class Encoder(Protocol):
    """What the detector needs of an encoder: maps finest first and voxels per cell of each."""

    @property
    def strides(self) -> tuple[Triple, ...]: ...

    def __call__(self, image: Tensor, /) -> list[Tensor]: ...


@dataclass(frozen=True)
class RetinaOutput:
    """Raw outputs of one batch of patches."""

    logits: Tensor  # (B, N, K)
    deltas: Tensor  # (B, N, 6)
    anchors: AnchorGrid  # of one patch; its N boxes are in voxel edges of the patch
    segmentation: Tensor | None  # (B, 2, D, H, W) logits of background and foreground


class RetinaUNet(nn.Module):
    """Anchor logits and deltas of an image (B, C, D, H, W), and foreground logits on request.

    `anchor_sizes` holds, for each head level, the edge lengths in voxels along z, y and x.
    """

    def __init__(
        self,
        encoder: nn.Module,
        neck: nn.Module,
        head: RetinaHead,
        *,
        segmenter: nn.Module,
        head_levels: Sequence[int],
        anchor_sizes: AnchorSizes,
    ) -> None:
        super().__init__()
        if len(anchor_sizes) != len(head_levels):
            raise ValueError(
                f"{len(anchor_sizes)} anchor levels for {len(head_levels)} head levels"
            )
        self.encoder = encoder
        self.neck = neck
        self.head = head
        self.segmenter = segmenter
        self.head_levels = tuple(head_levels)
        self.anchor_sizes = anchor_sizes

    @property
    def anchor_strides(self) -> tuple[Triple, ...]:
        """Voxels per cell of each head level, finest first."""
        strides: tuple[Triple, ...] = self.encoder.strides  # pyright: ignore[reportAssignmentType] nn.Module hides it
        return tuple(strides[level] for level in self.head_levels)

    def forward(self, image: Tensor, *, segment: bool) -> RetinaOutput:
        # Maps finer than the heads serve the segmentation only; without it they are not computed.
        levels = sorted({0, *self.head_levels}) if segment else list(self.head_levels)
        maps = dict(zip(levels, self.neck(self.encoder(image), levels=levels), strict=True))
        head_maps = [maps[level] for level in self.head_levels]
        logits, deltas = self.head(head_maps)
        return RetinaOutput(
            logits=logits,
            deltas=deltas,
            anchors=anchor_grid(
                [level.shape[2:] for level in head_maps],
                self.anchor_strides,
                self.anchor_sizes,
                device=image.device,
            ),
            segmentation=self.segmenter(maps[0]) if segment else None,
        )
