"""A dense encoder walked sparsely: only what is visible is computed, normalised and passed on.

What SparK (arXiv 2301.03580) gets from sparse convolutions: a convolution reads 0 where the map is
hidden, what it gives there is dropped, and a norm counts visible cells only. The encoder keeps its
modules and parameters; this module runs them in another way. While cells fit into blocks
(`sparse_levels`) convolutions run on the visible blocks with a halo of their neighbours, all else
on the visible blocks alone: at 75 % hidden a quarter of the data.
"""

from dataclasses import dataclass
from math import prod
from typing import assert_never

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from voxelbridge.core.arch.blocks import (
    LEAKY_SLOPE,
    ConvNormAct,
    PlainStage,
    ResidualBlock,
    ResidualStage,
)
from voxelbridge.core.arch.config import Triple
from voxelbridge.core.arch.encoder import PlainEncoder, ResEncoder, check_input_shape
from voxelbridge.core.train.placement import is_recomputed
from voxelbridge.pretrain_ssl.sparse_levels import (
    BlockLevel,
    CellLevel,
    Level,
    fill_hidden,
    layer_strides,
    make_levels,
)
from voxelbridge.pretrain_ssl.visible_blocks import find_visible, gather, with_halo

# Above this share of a dense convolution's work, gathering windows costs more than it saves.
MAX_WINDOW_SHARE = 0.8


@dataclass(frozen=True, eq=False)
class SparseMap:
    """A stage's output: `values` in the form of its `level`."""

    values: Tensor
    level: Level

    def dense(self) -> Tensor:
        """(B, C, D, H, W), exactly 0 where hidden."""
        return fill_hidden(self.values, self.level, None)


def sparse_stages(
    encoder: ResEncoder | PlainEncoder,
    image: Tensor,
    hidden: Tensor,
    *,
    num_hidden: int,
    hide_input: bool = True,
    dense_below_blocks: bool = False,
) -> list[SparseMap]:
    """The stage outputs of `encoder` over the visible part of `image`, finest first.

    `image` (B, C, D, H, W); `hidden` (B, gz, gy, gx) bool, True = masked out, `num_hidden` in each
    sample. `hide_input=False` lets the first convolution read hidden voxels next to visible blocks;
    `dense_below_blocks` counts every cell as visible where cells do not fit into blocks. Both are
    what nnssl does.
    """
    check_input_shape(image.shape, encoder.in_channels, encoder.strides[-1])
    _check_count(hidden, num_hidden)
    blocks = find_visible(hidden, num_hidden=num_hidden)
    start, *levels = make_levels(
        blocks, image.shape[2:], layer_strides(encoder), dense_below_blocks=dense_below_blocks
    )
    if hide_input:
        x = _conv_norm_act(encoder.stem, gather(image, blocks), start, levels[0])
    else:
        x = _conv_norm_act(encoder.stem, image, CellLevel(None), levels[0])
    outputs = []
    for stage, before, after in zip(encoder.stages, levels[:-1], levels[1:], strict=True):
        if is_recomputed(stage) and torch.is_grad_enabled():
            x = checkpoint(_stage, stage, x, before, after, use_reentrant=False)
            assert isinstance(x, Tensor)
        else:
            x = _stage(stage, x, before, after)
        outputs.append(SparseMap(x, after))
    return outputs


def visible_norm(
    values: Tensor,
    level: Level,
    *,
    eps: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Instance norm over visible cells only: biased variance, optional affine, 0 where hidden.

    The only visible cell of a sample and channel becomes its bias.
    """
    match level:
        case BlockLevel():
            return _block_norm(values, level, eps, weight, bias)
        case CellLevel():
            if level.visible is None:
                return F.instance_norm(values, weight=weight, bias=bias, eps=eps)
            return _cell_norm(values, level.visible, eps, weight, bias)
        case _:
            assert_never(level)


def _block_norm(
    values: Tensor, level: BlockLevel, eps: float, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    # (n * B, C, ...) is (n, B * C, ...): a batch norm over it is one per sample and channel.
    count, channels, *edges = values.shape
    copies = level.blocks.batch_size
    grouped = values.reshape(count // copies, copies * channels, *edges)
    scale, shift = (None if p is None else p.repeat(copies) for p in (weight, bias))
    # Not F.batch_norm, which refuses a single visible cell.
    normed = torch.batch_norm(
        grouped, scale, shift, None, None, True, 0.0, eps, torch.backends.cudnn.enabled
    )
    return normed.view(count, channels, *edges)


def _cell_norm(
    values: Tensor, visible: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    axes = (2, 3, 4)
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    count = visible.sum(axes, keepdim=True).clamp(min=1)
    # where, not a product: what is hidden must not matter even if it is not finite
    mean = torch.where(visible, wide, 0).sum(axes, keepdim=True) / count
    centered = torch.where(visible, wide - mean, 0)
    variance = centered.square().sum(axes, keepdim=True) / count
    result = centered * (variance + eps).rsqrt()
    if weight is not None:
        result = result * weight[:, None, None, None]
    if bias is not None:
        result = torch.where(visible, result + bias[:, None, None, None], 0)
    return result.to(values.dtype)


def _stage(stage: nn.Module, x: Tensor, before: Level, after: Level) -> Tensor:
    match stage:
        case ResidualStage():
            for block in stage.blocks:
                assert isinstance(block, ResidualBlock)
                x = _residual_block(block, x, before, after)
                before = after
        case PlainStage():
            for layer in stage.convs:
                assert isinstance(layer, ConvNormAct)
                x = _conv_norm_act(layer, x, before, after)
                before = after
        case _:
            raise ValueError(f"no sparse walk is known for a {type(stage).__name__}")
    return x


def _residual_block(block: ResidualBlock, x: Tensor, before: Level, after: Level) -> Tensor:
    shortcut = x
    if block.stride != (1, 1, 1):
        # A window lies in one block as long as the pooled cells fit into blocks.
        whole = x if isinstance(after, BlockLevel) else fill_hidden(x, before, None)
        shortcut = F.avg_pool3d(whole, block.stride, block.stride)
    if block.skip is not None:
        shortcut = _conv_norm_act(block.skip, shortcut, after, after)
    out = _conv_norm_act(block.conv1, x, before, after)
    out = _conv_norm_act(block.conv2, out, after, after)
    out += shortcut
    return F.leaky_relu(out, LEAKY_SLOPE, inplace=True)


def _conv_norm_act(layer: ConvNormAct, x: Tensor, before: Level, after: Level) -> Tensor:
    norm = layer.norm
    x = _conv(layer.conv, x, before, after)
    x = visible_norm(x, after, eps=norm.eps, weight=norm.weight, bias=norm.bias)
    return F.leaky_relu(x, LEAKY_SLOPE, inplace=True) if layer.activation else x


def _conv(conv: nn.Conv3d, x: Tensor, before: Level, after: Level) -> Tensor:
    """The convolution in the form of `after`; a dense result still has values at hidden cells."""
    z, y, width = (kernel // 2 for kernel in conv.kernel_size)
    halo = (z, y, width)
    if (
        isinstance(before, BlockLevel)
        and isinstance(after, BlockLevel)
        and _windows_pay(before, halo)
    ):
        windows = with_halo(x, before.blocks, halo)
        return F.conv3d(windows, conv.weight, conv.bias, conv.stride)
    out = conv(fill_hidden(x, before, None))
    return gather(out, after.blocks) if isinstance(after, BlockLevel) else out


def _windows_pay(level: BlockLevel, halo: Triple) -> bool:
    if any(width > edge for width, edge in zip(halo, level.edges, strict=True)):
        return False  # the halo reaches past the next block
    # A list: torch.compile cannot follow a generator into prod.
    window = prod([edge + 2 * width for edge, width in zip(level.edges, halo, strict=True)])
    share = level.blocks.per_sample / prod(level.blocks.grid)
    return halo == (0, 0, 0) or share * window <= MAX_WINDOW_SHARE * prod(level.edges)


def _check_count(hidden: Tensor, num_hidden: int) -> None:
    # Reading it from a GPU would stall the device, and a compiler cannot look at values.
    if hidden.device.type != "cpu" or torch.compiler.is_compiling():
        return
    counts = hidden.flatten(1).sum(1).tolist()
    if any(count != num_hidden for count in counts):
        raise ValueError(f"every sample must hide {num_hidden} blocks, got {counts}")
