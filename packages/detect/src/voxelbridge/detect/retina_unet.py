"""Retina U-Net: an encoder, a U-FPN neck, anchor heads on its coarse maps, a segmentation layer.

arXiv 1811.08661 as configured by nnDetection v2 (arXiv 2509.15947, section 2.1). The network knows
nothing about pre-training, targets or losses; see `retina_criterion` and `build`.
Shapes: B batch, C channels, D H W voxels, N anchors of all levels, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from voxelbridge.core.arch.encoder import Encoder
from voxelbridge.core.arch.ufpn import UFPN
from voxelbridge.detect.anchor_planning import AnchorSizes
from voxelbridge.detect.anchors import AnchorGrid, anchor_grid
from voxelbridge.detect.box_coder import decode
from voxelbridge.detect.nms import best_rows
from voxelbridge.detect.retina_head import RetinaHead

Triple = tuple[int, int, int]


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
        encoder: Encoder,
        neck: UFPN,
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
        return tuple(self.encoder.strides[level] for level in self.head_levels)

    def idle_parameters(self, *, segment: bool) -> list[nn.Parameter]:
        """Parameters that no output of `forward` depends on: they belong to unused levels.

        The paper's count includes them; ranks that average gradients must be told of them.
        """
        used = set(self._levels(segment))
        idle: list[nn.Module] = [
            module for level, module in enumerate(self.neck.out) if level not in used
        ]
        idle += list(self.neck.lateral)[: min(used)] + list(self.neck.upsample)[: min(used)]
        if not segment:
            idle.append(self.segmenter)
        return [parameter for module in idle for parameter in module.parameters()]

    def forward(self, image: Tensor, *, segment: bool) -> RetinaOutput:
        levels = self._levels(segment)
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

    def candidates(self, patches: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Per patch boxes (N, 6) in voxel edges and class probabilities (N, K)."""
        output = self(patches, segment=False)
        anchors = output.anchors.boxes()
        return [
            (decode(deltas.float(), anchors), logits.float().sigmoid())
            for logits, deltas in zip(output.logits, output.deltas, strict=True)
        ]

    def best_candidates(
        self, patches: Tensor, *, top_k: int
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Per patch boxes (k, 6), scores (k,) and labels (k,) of the best candidates, best first.

        The min(top_k, N) best pairs of box and class of `candidates`; no other box is decoded.
        """
        output = self(patches, segment=False)
        anchors = output.anchors.boxes()
        num_classes = output.logits.shape[2]
        best = []
        for logits, deltas in zip(output.logits, output.deltas, strict=True):
            scores = logits.float().sigmoid().flatten()
            order = best_rows(scores, min(top_k, len(anchors)))
            rows = order // num_classes
            boxes = decode(deltas[rows], anchors[rows])
            best.append((boxes, scores[order], order % num_classes))
        return best

    def _levels(self, segment: bool) -> list[int]:
        # Maps finer than the heads serve the segmentation only; without it they are not computed.
        return sorted({0, *self.head_levels}) if segment else list(self.head_levels)
