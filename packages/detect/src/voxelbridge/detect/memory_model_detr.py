"""How much memory a training step of Deformable DETR takes, from its sizes alone.

As `memory_model`, for the modules of `deformable_detr` and `deform_transformer`; the encoder's
share comes from there. Rougher in bf16, where autocast decides which copies are kept.
Letters: S cells of all levels, Q queries, C width, H hidden features, A samples of a query (heads x
levels x points).
"""

from dataclasses import dataclass
from math import prod

from voxelbridge.core.arch.config import EncoderConfig, Triple
from voxelbridge.detect.memory_model import (
    CONV_BYTES,
    FOCAL_BYTES,
    Precision,
    StepMemory,
    encoder_parameters,
    encoder_values,
    stage_cells,
    step_memory,
)

WIDE = 4  # bytes: locations, weights and norms stay float32
BOX_BYTES = 6 * 4 * 6  # per proposal: deltas and refinement of a box, float32


@dataclass(frozen=True)
class DETRShape:
    """What the memory of Deformable DETR depends on beside patch and batch."""

    encoder: EncoderConfig
    head_levels: tuple[int, ...]
    in_channels: int = 1
    num_classes: int = 1
    width: int = 128
    heads: int = 8
    points: int = 4
    encoder_blocks: int = 3
    decoder_blocks: int = 6
    hidden: int = 1024
    queries: int = 300


def detr_memory(
    network: DETRShape,
    *,
    patch_size: Triple,
    batch_size: int,
    precision: Precision = "bf16",
    optimizer_states: int = 2,
    fused: bool = True,
) -> StepMemory:
    """Memory of a step on `batch_size` patches; `optimizer_states` per weight (AMSGrad: 3).

    `fused`: attention runs in one kernel; otherwise the sampled values of every level are kept.
    """
    cells = stage_cells(network.encoder, patch_size)
    narrow = CONV_BYTES[precision]
    tokens = count_tokens(network, patch_size)
    kept = narrow * encoder_values(
        network.encoder, cells, prod(patch_size), in_channels=network.in_channels
    )
    kept += _transformer_bytes(network, tokens, narrow=narrow, fused=fused)
    queries = network.decoder_blocks * min(network.queries, tokens)
    loss = (tokens + queries) * network.num_classes * FOCAL_BYTES + tokens * BOX_BYTES
    return step_memory(
        network.encoder,
        cells,
        num_parameters=count_detr_parameters(network),
        kept=kept,
        losses=loss,
        batch_size=batch_size,
        narrow=narrow,
        optimizer_states=optimizer_states,
    )


def count_tokens(network: DETRShape, patch_size: Triple) -> int:
    """Cells of all levels that the transformer reads."""
    cells = stage_cells(network.encoder, patch_size)
    return sum(cells[level] for level in network.head_levels)


def count_detr_parameters(network: DETRShape) -> int:
    """Weights of encoder, channel mapper and transformer together."""
    width, hidden, levels = network.width, network.hidden, len(network.head_levels)
    samples = network.heads * levels * network.points
    mapper = sum((network.encoder.features[level] + 3) * width for level in network.head_levels)
    attention = _linear(width, samples * 4) + 2 * _linear(width, width)
    norm = 2 * width
    forward = _linear(width, hidden) + _linear(hidden, width) + norm
    encoder_block = attention + norm + forward
    decoder_block = encoder_block + 4 * _linear(width, width) + norm
    head = _linear(width, network.num_classes) + 2 * _linear(width, width) + _linear(width, 6)
    proposals = _linear(width, width) + norm + _linear(3 * width, 2 * width) + 2 * norm
    return (
        encoder_parameters(network.encoder, in_channels=network.in_channels)
        + mapper
        + network.encoder_blocks * encoder_block
        + network.decoder_blocks * decoder_block
        + (network.decoder_blocks + 1) * head
        + proposals
        + levels * width
    )


def _transformer_bytes(network: DETRShape, tokens: int, *, narrow: int, fused: bool) -> int:
    """Bytes kept of one patch between forward and backward."""
    width = network.width
    queries = min(network.queries, tokens)
    mapper = tokens * width * narrow
    encoder = network.encoder_blocks * tokens * _block_bytes(network, narrow=narrow, fused=fused)
    # What the queries read is brought to values of every cell in each block.
    values = network.decoder_blocks * tokens * width * (narrow if fused else WIDE)
    among = width * (2 * WIDE + 5 * narrow)  # self-attention: in, queries, keys, values, out, norm
    per_query = _block_bytes(network, narrow=narrow, fused=fused) + among
    per_query += width * 4 * narrow  # the heads
    decoder = network.decoder_blocks * queries * per_query
    proposals = tokens * width * (2 * WIDE + 4 * narrow)
    return mapper + encoder + values + decoder + proposals


def _block_bytes(network: DETRShape, *, narrow: int, fused: bool) -> int:
    """Per query: attention, feed-forward and their norms."""
    width, samples = network.width, network.heads * len(network.head_levels) * network.points
    # Placed queries and what both norms read; inputs of three linear layers, and the values.
    streams = width * (3 * WIDE + 4 * narrow)
    locations = samples * 4 * WIDE  # three coordinates and the weight
    sampled = 0
    if not fused:
        # grid_sample: values and what it read, a copy of locations and weights, float32.
        sampled = (
            network.points * len(network.head_levels) * width * WIDE
            + samples * 4 * WIDE
            + width * (WIDE if narrow != WIDE else 0)
        )
    return streams + locations + sampled + network.hidden * narrow


def _linear(before: int, after: int) -> int:
    return (before + 1) * after
