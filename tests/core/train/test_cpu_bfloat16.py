"""In bfloat16 on a CPU every convolution has the gradients of float64, whatever its map."""

import copy

import pytest
import torch
from torch import Tensor, nn

from voxelbridge.core.train.steps import autocast, place

CPU = torch.device("cpu")
SHAPES = [(2, 2, 2), (2, 6, 5), (1, 1, 1), (4, 1, 3), (3, 4, 5)]


def dirty_the_heap() -> None:
    """What is read without having been written is then wrong by far."""
    junk = [torch.full((size,), 1e30) for size in (300, 1000, 10_000, 100_000)]
    del junk


def gradients(conv: nn.Conv3d, x: Tensor, *, bf16: bool) -> tuple[torch.dtype, list[Tensor]]:
    """Type of the output; gradients of weight, bias and input under a fixed output gradient."""
    x = x.clone().requires_grad_()
    conv.zero_grad()
    dirty_the_heap()
    with autocast(CPU, "bf16" if bf16 else "fp32"):
        y = conv(x)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype))
    found = [conv.weight.grad, conv.bias.grad if conv.bias is not None else None, x.grad]
    return y.dtype, [g.double() for g in found if g is not None]


@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3), (5, 5, 5)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_are_those_of_float64(
    shape: tuple[int, int, int], kernel: tuple[int, int, int], stride: int
) -> None:
    torch.manual_seed(0)
    padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
    conv = nn.Conv3d(16, 16, kernel, stride, padding)
    exact = copy.deepcopy(conv).double()
    place(conv, CPU, "bf16")
    x = torch.randn(2, 16, *shape)
    dtype, found = gradients(conv, x, bf16=True)
    _, expected = gradients(exact, x.double(), bf16=False)
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).norm()) <= 0.02 * float(theirs.norm())
    is_small = min(shape) < 3 or max(kernel) > 3
    assert dtype == (torch.float32 if is_small else torch.bfloat16)


def test_float32_networks_and_unpadded_convolutions_stay_as_they_are() -> None:
    padded, unpadded = nn.Conv3d(1, 1, 3, padding=1), nn.Conv3d(1, 1, 3)
    place(padded, CPU, "fp32")
    place(unpadded, CPU, "bf16")
    assert "forward" not in vars(padded)
    assert "forward" not in vars(unpadded)


def test_a_copy_uses_its_own_weights_and_names_stay() -> None:
    conv = nn.Conv3d(16, 16, 3, padding=1)
    names = list(conv.state_dict())
    place(place(conv, CPU, "bf16"), CPU, "bf16")  # a second time changes nothing
    other = copy.deepcopy(conv)
    x = torch.ones(1, 16, 2, 2, 2)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
        assert float(other(x).abs().max()) == 0
        assert float(conv(x).abs().max()) > 0
    assert list(conv.state_dict()) == names
