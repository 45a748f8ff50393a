"""How much memory a training step of Retina U-Net takes, from its sizes alone.

Counted is what autograd keeps for the backward pass, layer by layer as the modules of
`core.arch` and `retina_head` compute, besides weights, gradients and optimizer. The tests compare
it with the tensors that torch really keeps. It needs no torch, so that planning stays light.
Letters: D H W voxels of the patch, N anchors, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from voxelbridge.core.arch.config import EncoderConfig, Triple, cumulative_strides

Precision = Literal["fp32", "bf16"]

# Beside tensors: the CUDA context and the libraries' workspace; nnDetection's reserve.
RESERVED = 768 * 2**20
CONV_BYTES = {"fp32": 4, "bf16": 2}  # of a value that a convolution reads or writes
# Group norm computes in float32 under autocast: what goes in and what comes out are kept so, and
# the next convolution keeps a narrow copy.
HEAD_LAYER_BYTES = {"fp32": 8, "bf16": 10}
FOCAL_BYTES = 26  # per logit, float32: losses.sigmoid_focal_loss and its sums
SEGMENTATION_BYTES = 32  # per voxel, float32: cross-entropy and Dice of two classes
MIN_FPN_CHANNELS = 8  # as in core.arch.ufpn
HEAD_LAYERS = 2  # of each tower before its last convolution


@dataclass(frozen=True)
class NetworkShape:
    """What the memory of a detector depends on beside patch and batch."""

    encoder: EncoderConfig
    head_levels: tuple[int, ...]
    in_channels: int = 1
    num_classes: int = 1
    channels: int = 128  # of the pyramid's coarse maps and of the heads
    anchors_per_cell: int = 27
    upsample_bias: bool = False


@dataclass(frozen=True)
class StepMemory:
    """Bytes that one training step needs on one device."""

    num_parameters: int
    weights: int  # parameters, their gradients, the optimizer, narrow copies
    activations: int  # kept between forward and backward
    losses: int  # kept by the losses
    workspace: int  # gradients of the largest maps, and the reserve

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.losses + self.workspace


def training_memory(
    network: NetworkShape,
    *,
    patch_size: Triple,
    batch_size: int,
    precision: Precision = "bf16",
    segment: bool = True,
    optimizer_states: int = 1,
) -> StepMemory:
    """Memory of a step on `batch_size` patches; `optimizer_states` per weight (SGD 1, AdamW 2)."""
    cells = stage_cells(network.encoder, patch_size)
    narrow = CONV_BYTES[precision]
    values = encoder_values(
        network.encoder, cells, prod(patch_size), in_channels=network.in_channels
    ) + _pyramid_values(network, cells, segment=segment)
    head_cells = sum(cells[level] for level in network.head_levels)
    head_layers = 2 * HEAD_LAYERS * head_cells * network.channels * HEAD_LAYER_BYTES[precision]
    deltas = head_cells * network.anchors_per_cell * 6 * narrow  # kept to scale them per level
    kept = values * narrow + head_layers + deltas
    loss = head_cells * network.anchors_per_cell * network.num_classes * FOCAL_BYTES
    if segment:
        loss += prod(patch_size) * SEGMENTATION_BYTES
    return step_memory(
        network.encoder,
        cells,
        num_parameters=count_parameters(network),
        kept=kept,
        losses=loss,
        batch_size=batch_size,
        narrow=narrow,
        optimizer_states=optimizer_states,
    )


def stage_cells(encoder: EncoderConfig, patch_size: Triple) -> list[int]:
    """Cells of each stage's map of one patch, finest first."""
    return [
        prod(-(-edge // step) for edge, step in zip(patch_size, stride, strict=True))
        for stride in cumulative_strides(encoder.strides)
    ]


def step_memory(
    encoder: EncoderConfig,
    cells: Sequence[int],
    *,
    num_parameters: int,
    kept: int,
    losses: int,
    batch_size: int,
    narrow: int,
    optimizer_states: int,
) -> StepMemory:
    """The parts of a step from the bytes `kept` and those of the `losses` for one patch."""
    copies = num_parameters * narrow if narrow < 4 else 0  # autocast's
    largest = max(cell * width for cell, width in zip(cells, encoder.features, strict=True))
    return StepMemory(
        num_parameters=num_parameters,
        weights=num_parameters * 4 * (2 + optimizer_states) + copies,
        activations=kept * batch_size,
        losses=losses * batch_size,
        # A layer's gradient is computed while the one that it comes from is still there.
        workspace=2 * largest * narrow * batch_size + RESERVED,
    )


def count_parameters(network: NetworkShape) -> int:
    """Weights of encoder, pyramid, heads and segmentation layer together."""
    width = network.channels
    fpn = pyramid_channels(network)
    strides = network.encoder.strides
    pyramid = 0
    for level, (features, here) in enumerate(zip(network.encoder.features, fpn, strict=True)):
        pyramid += (features + 1) * here  # lateral
        pyramid += (27 * here + 1) * here  # output
        if level + 1 < len(fpn):
            pyramid += fpn[level + 1] * here * prod(strides[level + 1])  # upsampling
            pyramid += here if network.upsample_bias else 0
    outputs = network.anchors_per_cell * (network.num_classes + 6)
    towers = 2 * HEAD_LAYERS * (27 * width * width + 2 * width) + (27 * width + 1) * outputs
    return (
        encoder_parameters(network.encoder, in_channels=network.in_channels)
        + pyramid
        + towers
        + len(network.head_levels)
        + 2 * (fpn[0] + 1)
    )


def pyramid_channels(network: NetworkShape) -> tuple[int, ...]:
    """Channels of each level of the pyramid (`core.arch.ufpn`), finest first."""
    first = network.head_levels[0]
    return tuple(
        max(MIN_FPN_CHANNELS, network.channels >> max(0, first - level))
        for level in range(len(network.encoder.features))
    )


def encoder_values(
    encoder: EncoderConfig, cells: Sequence[int], voxels: int, *, in_channels: int
) -> int:
    """Values that an encoder keeps of one patch; two per convolution: before norm, after all.

    `cells` are those of each stage's map.
    """
    total = in_channels * voxels
    before = encoder.features[0]
    if encoder.kind == "residual":
        total += 2 * voxels * before  # the stem runs at full resolution
    for features, cell, blocks, stride in zip(
        encoder.features, cells, encoder.blocks, encoder.strides, strict=True
    ):
        if encoder.kind == "plain":
            total += 2 * blocks * cell * features
        else:
            total += 4 * blocks * cell * features
            if before != features:  # the projected shortcut: its norm's input, its pooled input
                total += cell * features + (cell * before if stride != (1, 1, 1) else 0)
        before = features
    return total


def encoder_parameters(encoder: EncoderConfig, *, in_channels: int) -> int:
    """Weights of an encoder."""
    bias = int(encoder.conv_bias)
    before, total = encoder.features[0], 0
    if encoder.kind == "residual":
        total += _conv(in_channels, before, encoder.kernels[0], bias)
    else:
        before = in_channels
    for features, kernel, blocks in zip(
        encoder.features, encoder.kernels, encoder.blocks, strict=True
    ):
        convs = blocks if encoder.kind == "plain" else 2 * blocks
        total += _conv(before, features, kernel, bias)
        total += (convs - 1) * _conv(features, features, kernel, bias)
        if encoder.kind == "residual" and before != features:
            total += _conv(before, features, (1, 1, 1), 0)
        before = features
    return total


def _pyramid_values(network: NetworkShape, cells: Sequence[int], *, segment: bool) -> int:
    wanted = {*network.head_levels, *((0,) if segment else ())}
    return sum(
        cell * channels * (1 + (level in wanted))
        for level, (cell, channels) in enumerate(zip(cells, pyramid_channels(network), strict=True))
        if level >= min(wanted)
    )


def _conv(before: int, after: int, kernel: Triple, bias: int) -> int:
    """Parameters of a convolution and its affine norm."""
    return after * (before * prod(kernel) + bias + 2)
