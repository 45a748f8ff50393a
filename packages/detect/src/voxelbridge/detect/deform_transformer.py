"""The deformable transformer (arXiv 2010.04159) on volumes, with two stages and refined boxes.

Settings and order of operations of nnDetection v2 (arXiv 2509.15947, section 2.1): no dropout,
post-norm, proposals from every cell of the pyramid, one set of heads for each decoder block.
Boxes here are (cz, cy, cx, sz, sy, sx) as parts of the patch. Letters: B batch, S cells of all
levels, Q queries, M heads, L levels, P points, K classes, C = width of the transformer.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from voxelbridge.detect.deform_attn import Backend, deformable_attention_3d
from voxelbridge.detect.sine_encoding import cell_centres, encode_cells, sine_features

Triple = tuple[int, int, int]

PROPOSAL_SIZE = 0.05  # part of the patch, on the finest level; doubles with each coarser one
PROPOSAL_MARGIN = 0.01  # proposals nearer to the patch's border, or to its size, are none
LOGIT_EPS = 1e-5


class DeformableAttention(nn.Module):
    """Attention of queries (B, Q, C) to few points around their references in a pyramid.

    `backend` is the operator's; exports set it to "torch".
    """

    backend: Backend = "auto"

    def __init__(self, width: int, *, heads: int, levels: int, points: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} must be a multiple of the {heads} heads")
        self.heads, self.levels, self.points = heads, levels, points
        self.offsets = nn.Linear(width, heads * levels * points * 3)
        self.weights = nn.Linear(width, heads * levels * points)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def reset_parameters(self) -> None:
        """Point p of a head lies p + 1 cells from the reference in the head's direction."""
        nn.init.zeros_(self.offsets.weight)
        directions = head_directions(self.heads)  # (M, 3)
        steps = torch.arange(1, self.points + 1, dtype=torch.float32)
        bias = directions[:, None, None] * steps[None, None, :, None]  # (M, 1, P, 3)
        with torch.no_grad():
            self.offsets.bias.copy_(bias.expand(-1, self.levels, -1, -1).flatten())
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)
        for layer in (self.value, self.output):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, queries: Tensor, references: Tensor, memory: Tensor, shapes: Sequence[Triple]
    ) -> Tensor:
        """`references` (B, Q, 3) points or (B, Q, 6) boxes; `memory` (B, S, C) in C order."""
        batch, num_queries, _ = queries.shape
        value = self.value(memory).unflatten(2, (self.heads, -1))
        kind = "cpu" if queries.is_meta else queries.device.type  # meta knows no autocast
        # Offsets of half precision would be off by an eighth of a cell: float32, also in autocast.
        with torch.autocast(kind, enabled=False):
            wide = queries.float()
            offsets = F.linear(wide, self.offsets.weight.float(), self.offsets.bias.float())
            logits = F.linear(wide, self.weights.weight.float(), self.weights.bias.float())
            offsets = offsets.view(batch, num_queries, self.heads, self.levels, self.points, 3)
            weights = logits.view(batch, num_queries, self.heads, -1).softmax(dim=-1)
            locations = sampling_locations(references.float(), offsets, shapes)
            sampled = deformable_attention_3d(
                value,
                shapes,
                None,
                locations.flip(-1),  # the operator takes x, y, z
                weights.unflatten(3, (self.levels, self.points)),
                backend=self.backend,
            )
        return self.output(sampled)


def sampling_locations(references: Tensor, offsets: Tensor, shapes: Sequence[Triple]) -> Tensor:
    """(B, Q, M, L, P, 3) as z, y, x parts of the patch from references and learned offsets.

    Around a point (B, Q, 3) offsets count in cells of each level, in a box (B, Q, 6) they count in
    half sizes of the box, shared over the points.
    """
    centres = references[:, :, None, None, None, :3]
    if references.shape[-1] == 3:
        return centres + offsets / offsets.new_tensor(shapes)[:, None, :]
    points = offsets.shape[4]
    return centres + offsets / points * references[:, :, None, None, None, 3:] * 0.5


def head_directions(heads: int) -> Tensor:
    """(M, 3) directions whose largest part is 1: axes, cube corners, both, or all neighbours.

    8 heads take the corners of the cube, 6 the axes, 14 both, 26 all neighbours; other numbers are
    spread over the sphere by the golden angle.
    """
    cells = [c for c in itertools.product((-1.0, 0.0, 1.0), repeat=3) if any(c)]
    corners = [c for c in cells if all(c)]
    axes = [c for c in cells if sum(map(abs, c)) == 1]
    match heads:
        case 6:
            return torch.tensor(axes)
        case 8:
            return torch.tensor(corners)
        case 14:
            return torch.tensor(axes + corners)
        case 26:
            return torch.tensor(cells)
        case _:
            n = torch.arange(heads, dtype=torch.float32)
            z = 1 - (2 * n + 1) / heads
            around = n * math.pi * (3 - math.sqrt(5.0))
            radius = (1 - z * z).sqrt()
            sphere = torch.stack([z, radius * around.sin(), radius * around.cos()], dim=1)
            return sphere / sphere.abs().amax(dim=1, keepdim=True)


class FeedForward(nn.Module):
    """Two linear layers with ReLU, residual and norm."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.contract(F.relu(self.expand(x))))


class EncoderBlock(nn.Module):
    """Every cell attends to points around itself on all levels."""

    def __init__(self, width: int, *, heads: int, levels: int, points: int, hidden: int) -> None:
        super().__init__()
        self.attention = DeformableAttention(width, heads=heads, levels=levels, points=points)
        self.norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, hidden)

    def forward(
        self, cells: Tensor, positions: Tensor, references: Tensor, shapes: Sequence[Triple]
    ) -> Tensor:
        read = self.attention(cells + positions, references, cells, shapes)
        return self.feed_forward(self.norm(cells + read))


class DecoderBlock(nn.Module):
    """Queries attend to each other, then to points in their boxes."""

    def __init__(self, width: int, *, heads: int, levels: int, points: int, hidden: int) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.self_norm = nn.LayerNorm(width)
        self.attention = DeformableAttention(width, heads=heads, levels=levels, points=points)
        self.norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, hidden)

    def forward(
        self,
        queries: Tensor,
        positions: Tensor,
        boxes: Tensor,
        memory: Tensor,
        shapes: Sequence[Triple],
    ) -> Tensor:
        placed = queries + positions
        among = self.self_attention(placed, placed, queries, need_weights=False)[0]
        queries = self.self_norm(queries + among)
        read = self.attention(queries + positions, boxes, memory, shapes)
        return self.feed_forward(self.norm(queries + read))


@dataclass(frozen=True)
class Stage:
    """Class logits (B, n, K) and boxes (B, n, 6) of one decoder block or of the proposals."""

    logits: Tensor
    boxes: Tensor


@dataclass(frozen=True)
class TransformerOutput:
    """Results of all decoder blocks, the last one being the answer, and of the proposals."""

    blocks: tuple[Stage, ...]
    proposals: Stage
    valid: Tensor  # (S,) bool: cells that may propose


class DeformableTransformer(nn.Module):
    """Pyramid maps to scored boxes: encoder blocks, proposals, decoder blocks with heads.

    `class_heads` and `box_heads` are one more than the decoder blocks: the last of them make the
    proposals. Maps all have the transformer's width, finest first.
    """

    def __init__(
        self,
        encoder: Sequence[EncoderBlock],
        decoder: Sequence[DecoderBlock],
        class_heads: Sequence[nn.Linear],
        box_heads: Sequence[nn.Module],
        *,
        width: int,
        levels: int,
        queries: int,
    ) -> None:
        super().__init__()
        if not len(class_heads) == len(box_heads) == len(decoder) + 1:
            raise ValueError("one class and one box head for each decoder block and the proposals")
        self.width, self.queries = width, queries
        self.encoder = nn.ModuleList(encoder)
        self.decoder = nn.ModuleList(decoder)
        self.class_heads = nn.ModuleList(class_heads)
        self.box_heads = nn.ModuleList(box_heads)
        self.level_embedding = nn.Parameter(torch.empty(levels, width))
        self.proposal_projection = nn.Linear(width, width)
        self.proposal_norm = nn.LayerNorm(width)
        self.query_projection = nn.Linear(3 * width, 2 * width)
        self.query_norm = nn.LayerNorm(2 * width)

    def forward(self, maps: Sequence[Tensor]) -> TransformerOutput:
        shapes: list[Triple] = [(m.shape[2], m.shape[3], m.shape[4]) for m in maps]
        device = maps[0].device
        cells = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)  # (B, S, C)
        positions = torch.cat(
            [
                encode_cells(shape, self.width, device=device) + embedding
                for shape, embedding in zip(shapes, self.level_embedding, strict=True)
            ]
        )
        references = torch.cat([cell_centres(shape, device=device) for shape in shapes])
        references = references.expand(len(cells), -1, -1)
        for block in self.encoder:
            cells = block(cells, positions, references, shapes)
        proposals, valid = self._propose(cells, shapes)
        chosen = self._choose(proposals, valid)
        boxes = proposals.boxes.gather(1, chosen[..., None].expand(-1, -1, 6)).detach()
        return TransformerOutput(self._decode(cells, boxes, shapes), proposals, valid)

    def _propose(self, cells: Tensor, shapes: Sequence[Triple]) -> tuple[Stage, Tensor]:
        anchors, valid = proposal_boxes(shapes, device=cells.device)
        memory = torch.where(valid[:, None], cells, torch.zeros_like(cells))
        memory = self.proposal_norm(self.proposal_projection(memory))
        boxes = refine(self.box_heads[-1](memory), anchors.expand(len(cells), -1, -1))
        return Stage(self.class_heads[-1](memory), boxes), valid

    def _choose(self, proposals: Stage, valid: Tensor) -> Tensor:
        """Cells (B, Q) of the best proposals by their best class; invalid ones only if needed."""
        best = proposals.logits.detach().float().amax(dim=2)
        best = torch.where(valid, best, best - 1e4)
        return best.topk(min(self.queries, best.shape[1]), dim=1).indices

    def _decode(self, memory: Tensor, boxes: Tensor, shapes: Sequence[Triple]) -> tuple[Stage, ...]:
        # 6 coordinates of width / 2 features each
        features = sine_features(boxes, self.width // 2).flatten(2).to(memory.dtype)
        both = self.query_norm(self.query_projection(features))
        positions, queries = both.chunk(2, dim=2)
        stages = []
        for number, block in enumerate(self.decoder):
            queries = block(queries, positions, boxes, memory, shapes)
            refined = refine(self.box_heads[number](queries), boxes)
            stages.append(Stage(self.class_heads[number](queries), refined))
            boxes = refined.detach()
        return tuple(stages)


def proposal_boxes(shapes: Sequence[Triple], *, device: torch.device) -> tuple[Tensor, Tensor]:
    """A box (S, 6) at every cell, and whether it lies well inside the patch (S,).

    The size is 0.05 of the patch on the finest level and doubles with each level; boxes that are
    not valid are set to the middle of the patch and take no part.
    """
    boxes = torch.cat(
        [
            torch.cat([centres, torch.full_like(centres, PROPOSAL_SIZE * 2**level)], dim=1)
            for level, centres in enumerate(cell_centres(shape, device=device) for shape in shapes)
        ]
    )
    valid = ((boxes > PROPOSAL_MARGIN) & (boxes < 1 - PROPOSAL_MARGIN)).all(dim=1)
    return torch.where(valid[:, None], boxes, torch.full_like(boxes, 0.5)), valid


def refine(deltas: Tensor, boxes: Tensor) -> Tensor:
    """Boxes moved by deltas in logit space, in float32; (..., 6), (..., 6) -> (..., 6)."""
    kept = boxes.float().clamp(0, 1)
    logits = torch.log(kept.clamp(min=LOGIT_EPS) / (1 - kept).clamp(min=LOGIT_EPS))
    return (deltas.float() + logits).sigmoid()
