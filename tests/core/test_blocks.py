"""Blocks against a plain reference, and what each of them registers."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from voxelbridge.core.arch.blocks import ConvNormAct, PlainStage, ResidualBlock, ResidualStage
from voxelbridge.core.arch.init import initialize


def fill_with_ramps(module: nn.Module) -> None:
    """Deterministic parameters that no generator of a torch version can change."""
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            ramp = torch.arange(parameter.numel(), dtype=torch.float64)
            values = torch.sin(ramp * 0.7 + index) * 0.3
            if parameter.ndim == 1:
                values = values + 0.5
            parameter.copy_(values.reshape(parameter.shape))


def slow_norm(x: Tensor, norm: nn.InstanceNorm3d) -> Tensor:
    mean = x.mean(dim=(2, 3, 4), keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=(2, 3, 4), keepdim=True)
    shape = (1, -1, 1, 1, 1)
    return (x - mean) / torch.sqrt(variance + 1e-5) * norm.weight.view(shape) + norm.bias.view(
        shape
    )


def slow_leaky(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.01 * x)


def slow_conv(x: Tensor, conv: nn.Conv3d) -> Tensor:
    """Sum over the kernel's offsets of shifted, strided copies of the padded input."""
    kernel, stride = conv.weight.shape[2:], conv.stride
    pad = [p for edge in reversed(kernel) for p in (edge // 2, edge // 2)]
    padded = F.pad(x, pad)
    sizes = [-(-edge // step) for edge, step in zip(x.shape[2:], stride, strict=True)]
    out = torch.zeros(x.shape[0], conv.weight.shape[0], *sizes, dtype=x.dtype)
    for z in range(kernel[0]):
        for y in range(kernel[1]):
            for w in range(kernel[2]):
                part = padded[
                    :,
                    :,
                    z : z + sizes[0] * stride[0] : stride[0],
                    y : y + sizes[1] * stride[1] : stride[1],
                    w : w + sizes[2] * stride[2] : stride[2],
                ]
                out = out + torch.einsum(
                    "bcdhw,oc->bodhw", part[:, :, : sizes[0]], conv.weight[:, :, z, y, w]
                )
    return out if conv.bias is None else out + conv.bias.view(1, -1, 1, 1, 1)


def slow_block(x: Tensor, block: ResidualBlock) -> Tensor:
    shortcut = x
    if block.stride != (1, 1, 1):
        sz, sy, sx = block.stride
        b, c, d, h, w = x.shape
        shortcut = x.reshape(b, c, d // sz, sz, h // sy, sy, w // sx, sx).mean(dim=(3, 5, 7))
    if block.skip is not None:
        shortcut = slow_norm(slow_conv(shortcut, block.skip.conv), block.skip.norm)
    out = slow_leaky(slow_norm(slow_conv(x, block.conv1.conv), block.conv1.norm))
    out = slow_norm(slow_conv(out, block.conv2.conv), block.conv2.norm)
    return slow_leaky(out + shortcut)


@pytest.mark.parametrize(
    ("channels", "stride", "kernel"),
    [
        ((3, 3), (1, 1, 1), (3, 3, 3)),
        ((3, 5), (2, 2, 2), (3, 3, 3)),
        ((4, 4), (2, 2, 2), (3, 3, 3)),
        ((2, 4), (1, 2, 2), (1, 3, 3)),
        ((2, 4), (1, 1, 1), (3, 3, 3)),
    ],
)
def test_residual_block_equals_slow_reference_forward_and_gradient(
    channels: tuple[int, int], stride: tuple[int, int, int], kernel: tuple[int, int, int]
) -> None:
    block = ResidualBlock(*channels, kernel=kernel, stride=stride, bias=True).double()
    fill_with_ramps(block)
    x = torch.sin(torch.arange(2 * channels[0] * 4 * 6 * 8, dtype=torch.float64) ** 1.3)
    x = x.reshape(2, channels[0], 4, 6, 8)
    results = []
    for function in (block, lambda image: slow_block(image, block)):
        image = x.clone().requires_grad_()
        out = function(image)
        loss = (out * torch.cos(torch.arange(out.numel()).reshape(out.shape))).sum()
        results.append((out.detach(), *torch.autograd.grad(loss, [image, *block.parameters()])))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)


def test_block_leaves_its_input_unchanged() -> None:
    block = ResidualBlock(2, 2, kernel=(3, 3, 3), bias=True)
    x = torch.linspace(-1, 1, 2 * 64).reshape(1, 2, 4, 4, 4)
    before = x.clone()
    block(x)
    assert torch.equal(x, before)


def test_shortcut_has_parameters_only_where_channels_change() -> None:
    same = ResidualBlock(4, 4, kernel=(3, 3, 3), stride=(2, 2, 2), bias=True)
    wider = ResidualBlock(4, 8, kernel=(3, 3, 3), stride=(2, 2, 2), bias=True)
    assert not [name for name in same.state_dict() if name.startswith("skip")]
    assert [name for name in wider.state_dict() if name.startswith("skip")] == [
        "skip.conv.weight",
        "skip.norm.weight",
        "skip.norm.bias",
    ]


def test_conv_block_has_the_fixed_norm_and_slope() -> None:
    block = ConvNormAct(1, 2, kernel=(3, 3, 3), bias=False)
    assert block.norm.eps == 1e-5
    assert block.norm.affine
    assert not block.norm.track_running_stats
    assert block.conv.bias is None
    x = torch.randn(1, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = slow_leaky(slow_norm(F.conv3d(x, block.conv.weight, padding=1), block.norm))
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


def test_plain_stage_of_no_convolutions_is_the_identity() -> None:
    stage = PlainStage(2, 2, convs=0, kernel=(3, 3, 3), stride=(1, 1, 1), bias=False)
    x = torch.ones(1, 2, 3, 3, 3)
    assert torch.equal(stage(x), x)
    assert not list(stage.parameters())


def test_only_the_first_block_of_a_stage_is_strided() -> None:
    stage = ResidualStage(2, 4, blocks=3, kernel=(3, 3, 3), stride=(2, 2, 2), bias=True)
    assert [block.stride for block in stage.blocks] == [(2, 2, 2), (1, 1, 1), (1, 1, 1)]


def test_kaiming_has_the_variance_of_leaky_relu_and_zero_last_norms() -> None:
    block = ResidualBlock(16, 32, kernel=(3, 3, 3), bias=True)
    initialize(block, "kaiming", generator=torch.Generator().manual_seed(1))
    expected = (2 / (1 + 0.01**2) / (16 * 27)) ** 0.5
    assert block.conv1.conv.weight.std().item() == pytest.approx(expected, rel=0.03)
    assert not block.conv1.conv.bias.any()  # type: ignore[union-attr]
    assert not block.conv2.norm.weight.any()
    assert not block.conv2.norm.bias.any()
    assert block.conv1.norm.weight.eq(1).all()
    assert block.skip is not None
    assert block.skip.norm.weight.eq(1).all()


def test_kaiming_block_starts_as_its_shortcut() -> None:
    block = ResidualBlock(3, 3, kernel=(3, 3, 3), bias=True)
    initialize(block, "kaiming", generator=torch.Generator().manual_seed(1))
    x = torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 4, 4, 4)
    assert torch.equal(block(x), F.leaky_relu(x, 0.01))


def test_kaiming_fan_out_counts_outputs() -> None:
    conv = nn.Conv3d(4, 64, 3)
    initialize(conv, "kaiming", generator=torch.Generator().manual_seed(1), fan="fan_out")
    assert conv.weight.std().item() == pytest.approx((2 / (64 * 27)) ** 0.5, rel=0.05)


def test_same_generator_seed_gives_same_weights() -> None:
    first = ResidualBlock(2, 4, kernel=(3, 3, 3), bias=True)
    second = ResidualBlock(2, 4, kernel=(3, 3, 3), bias=True)
    for block in (first, second):
        initialize(block, "kaiming", generator=torch.Generator().manual_seed(5))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_torch_default_equals_what_the_constructors_draw() -> None:
    def build() -> nn.Module:
        return nn.Sequential(
            ResidualBlock(2, 4, kernel=(3, 3, 3), bias=True), nn.ConvTranspose3d(4, 3, 2)
        )

    with torch.random.fork_rng():
        torch.manual_seed(3)
        constructed = build()
    redrawn = build()
    initialize(redrawn, "torch_default", generator=torch.Generator().manual_seed(3))
    for a, b in zip(constructed.parameters(), redrawn.parameters(), strict=True):
        assert torch.equal(a, b)
