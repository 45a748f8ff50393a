"""The compiled Triton kernels of deformable attention on a CUDA device."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from voxelbridge.detect.deform_attn import deformable_attention_3d
from voxelbridge.detect.deform_kernels import launch
from voxelbridge.detect.deform_kernels.op import fused_attention, fused_attention_backward
from voxelbridge.detect.deform_transformer import DeformableAttention

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
KEYS = ("output", "grad_value", "grad_sampling_locations", "grad_attention_weights")
# relative L2; half types round output and gradient of the values, sums are float32
TOLERANCES = {
    torch.float64: (1e-12, 1e-12, 1e-12, 1e-12),
    torch.float32: (1e-6, 1e-6, 1e-5, 1e-5),
    torch.bfloat16: (4e-3, 1e-2, 1e-2, 1e-2),
    torch.float16: (2e-3, 2e-3, 2e-3, 2e-3),
}
SHAPES = ((5, 6, 7), (3, 3, 4), (1, 2, 2))
CELLS = sum(d * h * w for d, h, w in SHAPES)
Inputs = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def _kernels() -> None:
    reason = launch.why_not_here(torch.device(DEVICE, 0))
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random_inputs(
    seed: int,
    *,
    batch: int = 2,
    queries: int = 37,
    heads: int = 8,
    channels: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """Value, locations (some outside) and weights on the device, as leaves."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    points = (batch, queries, heads, len(SHAPES), 4)
    value = torch.randn(batch, CELLS, heads, channels, generator=generator)
    locations = torch.rand(*points, 3, generator=generator) * 1.6 - 0.3
    weights = torch.rand(*points, generator=generator)
    return (
        value.to(DEVICE, dtype).requires_grad_(),
        locations.to(DEVICE, wide).requires_grad_(),
        weights.to(DEVICE, wide).requires_grad_(),
    )


def attend(inputs: Inputs, backend: str = "triton") -> Tensor:
    value, locations, weights = inputs
    chosen = "torch" if backend == "torch" else "triton"
    return deformable_attention_3d(value, SHAPES, None, locations, weights, backend=chosen)


def gradients(inputs: Inputs, grad: Tensor, backend: str = "triton") -> tuple[Tensor, ...]:
    """Output and gradients of the inputs."""
    out = attend(inputs, backend)
    return (out.detach(), *torch.autograd.grad(out, inputs, grad))


def relative(got: Tensor, expected: Tensor) -> float:
    difference = (got.double().cpu() - expected.double().cpu()).norm()
    return float(difference / expected.double().cpu().norm().clamp(min=1e-300))


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_kernels_give_all_golden_vectors(shared: Path, dtype: torch.dtype) -> None:
    files = sorted((shared / "golden" / "msda").glob("c*.npz"))
    assert files
    wide = torch.promote_types(dtype, torch.float32)
    for path in files:
        golden = {name: torch.from_numpy(array) for name, array in np.load(path).items()}
        value = golden["value"].to(DEVICE, dtype).requires_grad_()
        locations = golden["sampling_locations"].to(DEVICE, wide).requires_grad_()
        weights = golden["attention_weights"].to(DEVICE, wide).requires_grad_()
        out = deformable_attention_3d(
            value,
            golden["spatial_shapes"].to(DEVICE),
            golden["level_start_index"].to(DEVICE),
            locations,
            weights,
            backend="triton",
        )
        assert out.dtype == dtype
        out.backward(golden["grad_output"].to(DEVICE, dtype))
        got = (out.detach(), value.grad, locations.grad, weights.grad)
        for key, tensor, tolerance in zip(KEYS, got, TOLERANCES[dtype], strict=True):
            assert tensor is not None
            assert relative(tensor, golden[key]) <= tolerance, (path.name, key)


@pytest.mark.parametrize("channels", [3, 8, 16, 32, 64])
@pytest.mark.parametrize("queries", [1, 37, 300])
def test_kernels_equal_the_torch_path(channels: int, queries: int) -> None:
    inputs = random_inputs(1, queries=queries, heads=2, channels=channels)
    grad = torch.randn(2, queries, 2 * channels, device=DEVICE)
    for ours, plain in zip(
        gradients(inputs, grad), gradients(inputs, grad, backend="torch"), strict=True
    ):
        assert relative(ours, plain) < 1e-5


def test_auto_takes_the_kernel_and_gives_its_result() -> None:
    value, locations, weights = random_inputs(2)
    out = deformable_attention_3d(value, SHAPES, None, locations, weights)
    assert "deformable_attention_3d" in type(out.grad_fn).__name__
    assert torch.equal(out, attend((value, locations, weights)))


def test_gradients_that_are_not_contiguous_are_accepted() -> None:
    inputs = random_inputs(3)
    dense = torch.randn(128, 37, 2, device=DEVICE)
    for grad in (torch.ones((), device=DEVICE).expand(2, 37, 128), dense.permute(2, 1, 0)):
        assert not grad.is_contiguous()
        for ours, plain in zip(
            gradients(inputs, grad), gradients(inputs, grad, backend="torch"), strict=True
        ):
            assert relative(ours, plain) < 1e-5


def test_inputs_that_are_not_contiguous_are_accepted() -> None:
    value, locations, weights = (t.detach() for t in random_inputs(4))
    expected = attend((value, locations, weights))
    turned = tuple(t.transpose(0, 1).contiguous().transpose(0, 1) for t in (locations, weights))
    assert torch.equal(attend((value, turned[0], turned[1])), expected)


def test_far_infinite_and_nan_locations_read_nothing() -> None:
    value, locations, weights = (t.detach().clone() for t in random_inputs(5))
    for row, far in enumerate((1e12, -1e30, float("inf"), float("-inf"), float("nan"))):
        locations[0, row] = far
    out = attend((value, locations, weights))
    assert torch.isfinite(out).all()
    assert (out[0, :5] == 0).all()
    assert out[0, 5:].abs().sum() > 0


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_mode_repeats_to_the_bit(dtype: torch.dtype) -> None:
    # All points of 4096 queries in few cells: float atomics would meet in changing order.
    inputs = random_inputs(6, queries=4096, dtype=dtype)
    grad = torch.randn(2, 4096, 128, device=DEVICE, dtype=dtype)
    first = gradients(inputs, grad)
    for _ in range(5):
        for a, b in zip(first, gradients(inputs, grad), strict=True):
            assert torch.equal(a, b)
    torch.use_deterministic_algorithms(False)
    for fixed, free in zip(first, gradients(inputs, grad), strict=True):
        assert relative(fixed, free) < (1e-5 if dtype == torch.float32 else 1e-2)


def test_offsets_beyond_32_bits_are_right() -> None:
    # 520 images of 4.2 million values: the last ones lie beyond 2**31 elements, 2**32 bytes.
    shapes, batch = ((32, 32, 32),), 520
    free = torch.cuda.mem_get_info()[0]
    if free < 30e9:
        pytest.skip(f"needs 30 GB of GPU memory, {free / 1e9:.0f} GB are free")
    generator = torch.Generator(DEVICE).manual_seed(7)
    value = torch.zeros(batch, 32**3, 8, 16, device=DEVICE, dtype=torch.bfloat16)
    assert value.numel() > 2**31
    kind = {"device": DEVICE, "generator": generator}
    value[-1] = torch.randn(32**3, 8, 16, **kind).to(torch.bfloat16)
    value.requires_grad_()
    locations = torch.rand(batch, 4, 8, 1, 4, 3, **kind)
    weights = torch.rand(batch, 4, 8, 1, 4, **kind)
    out = deformable_attention_3d(value, shapes, None, locations, weights, backend="triton")
    last = value.detach()[-1:].clone().requires_grad_()
    alone = deformable_attention_3d(
        last, shapes, None, locations[-1:], weights[-1:], backend="torch"
    )
    assert (out[:-1] == 0).all()
    assert relative(out[-1:], alone) < 1e-2
    out.sum().backward()
    alone.sum().backward()
    assert value.grad is not None
    assert last.grad is not None
    assert relative(value.grad[-1:], last.grad) < 1e-2


def test_tuning_is_done_once_for_similar_numbers_of_queries() -> None:
    tuner = launch._tuned("forward")
    attend(random_inputs(8, queries=130))
    known = len(tuner.cache)
    attend(random_inputs(8, queries=255))  # the same power of two
    assert len(tuner.cache) == known
    attend(random_inputs(8, queries=1025, channels=24))
    assert len(tuner.cache) == known + 1
    assert launch._tuned("forward") is tuner


def test_operators_pass_torchs_own_checks() -> None:
    value, locations, weights = random_inputs(9, queries=5, heads=2, channels=8)
    starts = torch.tensor([0, 210, 246], device=DEVICE)
    tensors = (torch.tensor(SHAPES, device=DEVICE), starts)
    forward = torch.library.opcheck(fused_attention, (value, *tensors, locations, weights))
    assert set(forward.values()) == {"SUCCESS"}
    grad = torch.ones(2, 5, 16, device=DEVICE)
    detached = [t.detach() for t in (value, locations, weights)]
    backward = torch.library.opcheck(
        fused_attention_backward,
        (grad, detached[0], *tensors, *detached[1:]),
        test_utils=("test_schema", "test_faketensor"),
    )
    assert set(backward.values()) == {"SUCCESS"}


def test_whole_graph_compiles_with_equal_results() -> None:
    compiled = torch.compile(attend, fullgraph=True)
    inputs = random_inputs(10)
    grad = torch.randn(2, 37, 128, device=DEVICE)
    out = compiled(inputs)
    found = (out.detach(), *torch.autograd.grad(out, inputs, grad))
    for ours, plain in zip(found, gradients(inputs, grad), strict=True):
        assert relative(ours, plain) < 1e-5


def test_autocast_keeps_the_locations_in_float32() -> None:
    torch.manual_seed(0)
    module = DeformableAttention(128, heads=8, levels=3, points=4).to(DEVICE)
    module.reset_parameters()
    queries = torch.randn(2, 50, 128, device=DEVICE)
    references = torch.rand(2, 50, 3, device=DEVICE)
    memory = torch.randn(2, CELLS, 128, device=DEVICE)
    exact = module(queries, references, memory, SHAPES)
    with torch.autocast("cuda", torch.bfloat16):
        out = module(queries, references, memory, SHAPES)
    assert out.dtype == torch.bfloat16
    assert relative(out.detach(), exact.detach()) < 2e-2
    out.float().square().mean().backward()
    for parameter in module.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
