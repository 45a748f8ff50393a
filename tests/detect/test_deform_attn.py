"""Deformable attention: the formula by loops, golden vectors, tracing, both backends."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelbridge.core.errors import VoxelbridgeError
from voxelbridge.detect.deform_attn import deformable_attention_3d
from voxelbridge.detect.deform_kernels.op import fused_attention, fused_attention_backward
from voxelbridge.detect.deform_kernels.reference import attention_by_loops

GOLDEN = ("c01_hand", "c02_multilevel", "c05_odd_dims")
KEYS = ("output", "grad_value", "grad_sampling_locations", "grad_attention_weights")
# tolerances stated with the golden vectors: relative L2
TOLERANCES = {
    "f64": dict.fromkeys(KEYS, 1e-12),
    "f32": dict(zip(KEYS, (1e-6, 1e-6, 1e-5, 1e-5), strict=True)),
    "bf16": dict(zip(KEYS, (4e-3, 1e-2, 1e-2, 1e-2), strict=True)),
}
SHAPES = ((2, 3, 4), (1, 2, 2))
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def random_inputs(seed: int, *, heads: int = 2, dtype: torch.dtype = torch.float64) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(2, 28, heads, 3, generator=generator, dtype=torch.float64)
    locations = (
        torch.rand(2, 5, heads, 2, 2, 3, generator=generator, dtype=torch.float64) * 1.8 - 0.4
    )
    weights = torch.rand(2, 5, heads, 2, 2, generator=generator, dtype=torch.float64)
    return value.to(dtype), locations, weights


def attend(inputs: Inputs) -> torch.Tensor:
    value, locations, weights = inputs
    return deformable_attention_3d(value, SHAPES, None, locations, weights)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**31))
def test_torch_path_equals_the_formula_written_as_loops(seed: int) -> None:
    inputs = random_inputs(seed)
    value, locations, weights = (t.numpy() for t in inputs)
    expected = attention_by_loops(value, np.array(SHAPES, float), locations, weights)
    np.testing.assert_allclose(attend(inputs).numpy(), expected, atol=1e-13)


@pytest.mark.parametrize("name", GOLDEN)
def test_torch_path_gives_the_golden_vectors(shared: Path, name: str) -> None:
    golden = dict(np.load(shared / "golden" / "msda" / f"{name}.npz"))
    value, locations, weights = (
        torch.tensor(golden[key]).requires_grad_()
        for key in ("value", "sampling_locations", "attention_weights")
    )
    out = deformable_attention_3d(
        value,
        torch.tensor(golden["spatial_shapes"]),
        torch.tensor(golden["level_start_index"]),
        locations,
        weights,
        backend="torch",
    )
    out.backward(torch.tensor(golden["grad_output"]))
    got = (out.detach(), value.grad, locations.grad, weights.grad)
    for key, tensor in zip(KEYS, got, strict=True):
        assert tensor is not None
        np.testing.assert_allclose(tensor.numpy(), golden[key], atol=1e-12, err_msg=key)


@pytest.mark.parametrize(
    "name",  # the interpreter takes most of a minute for the second
    ["c01_hand", pytest.param("c02_multilevel", marks=pytest.mark.long), "c05_odd_dims"],
)
def test_interpreted_kernels_give_the_golden_vectors(shared: Path, name: str) -> None:
    errors = interpret(str(shared / "golden" / "msda" / f"{name}.npz"))
    for dtype, tolerances in TOLERANCES.items():
        for key, tolerance in tolerances.items():
            assert errors[dtype][key] <= tolerance, (dtype, key, errors[dtype][key])


@pytest.mark.long
def test_interpreted_kernels_hold_at_the_edges() -> None:
    facts = interpret("edges")
    assert len(facts) == 8
    assert [name for name, holds in facts.items() if not holds] == []


def interpret(argument: str) -> dict[str, dict[str, float]]:
    pytest.importorskip("triton", reason="triton is not installed on this platform")
    script = Path(__file__).with_name("interpreted_attention.py")
    done = subprocess.run(
        ["env", "TRITON_INTERPRET=1", sys.executable, "-W", "ignore", str(script), argument],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_gradients_are_those_of_finite_differences() -> None:
    value, locations, weights = random_inputs(1)
    inputs = [t[:1, :3].clone().requires_grad_() for t in (locations, weights)]
    assert torch.autograd.gradcheck(
        lambda v, x, w: deformable_attention_3d(v, SHAPES, None, x, w),
        [value[:1].clone().requires_grad_(), *inputs],
    )


def test_operators_pass_torchs_own_checks() -> None:
    value, locations, weights = random_inputs(2)
    tensors = (torch.tensor(SHAPES), torch.tensor([0, 24]))
    leaves = [t.requires_grad_() for t in (value, locations, weights)]
    forward = torch.library.opcheck(fused_attention, (leaves[0], *tensors, *leaves[1:]))
    assert set(forward.values()) == {"SUCCESS"}
    grad = torch.ones(2, 5, 6, dtype=torch.float64)
    detached = [t.detach() for t in leaves]
    backward = torch.library.opcheck(
        fused_attention_backward,
        (grad, detached[0], *tensors, *detached[1:]),
        test_utils=("test_schema", "test_faketensor"),
    )
    assert set(backward.values()) == {"SUCCESS"}


@pytest.mark.parametrize("as_tensor", [False, True], ids=["integers", "tensor"])
def test_whole_graph_compiles_with_equal_results(as_tensor: bool) -> None:
    shapes = torch.tensor(SHAPES) if as_tensor else SHAPES

    def attention(v: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return deformable_attention_3d(v, shapes, None, x, w)

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    leaves = [t.requires_grad_() for t in random_inputs(3)]
    others = [t.requires_grad_() for t in random_inputs(3)]
    out = compiled(*leaves)
    out.square().sum().backward()
    attention(*others).square().sum().backward()
    for leaf, other in zip(leaves, others, strict=True):
        assert leaf.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(leaf.grad, other.grad)


def test_torch_path_exports() -> None:
    class Attention(torch.nn.Module):
        def forward(self, v: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return deformable_attention_3d(v, SHAPES, None, x, w, backend="torch")

    inputs = random_inputs(4)
    exported = torch.export.export(Attention(), inputs).module()
    torch.testing.assert_close(exported(*inputs), attend(inputs))


def test_result_has_the_type_of_the_values_and_sums_are_wide() -> None:
    exact = attend(random_inputs(5))
    for dtype, tolerance in ((torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        inputs = random_inputs(5, dtype=dtype)
        out = attend(inputs)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), exact, atol=tolerance, rtol=tolerance)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, locations, weights = (t.float() for t in random_inputs(5))
        out = deformable_attention_3d(value, SHAPES, None, locations, weights)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)


def test_permuted_queries_permute_the_result() -> None:
    value, locations, weights = random_inputs(6)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(
        attend((value, locations[:, order], weights[:, order])),
        attend((value, locations, weights))[:, order],
    )


def test_axes_swapped_with_their_sizes_change_nothing() -> None:
    value, locations, weights = random_inputs(7)
    levels = value.split([24, 4], dim=1)
    swapped = torch.cat(
        [
            level.unflatten(1, shape).transpose(1, 3).flatten(1, 3)
            for level, shape in zip(levels, SHAPES, strict=True)
        ],
        dim=1,
    )
    out = deformable_attention_3d(
        swapped, [shape[::-1] for shape in SHAPES], None, locations.flip(-1), weights
    )
    torch.testing.assert_close(out, attend((value, locations, weights)))


def test_far_and_nan_locations_read_nothing() -> None:
    value, locations, weights = random_inputs(8)
    for far in (1e30, float("inf"), float("nan")):
        locations[0, 0] = far
        out = attend((value, locations, weights))
        assert torch.isfinite(out).all()
        assert (out[0, 0] == 0).all()


def test_no_query_gives_an_empty_result() -> None:
    value, locations, weights = random_inputs(9)
    assert attend((value, locations[:, :0], weights[:, :0])).shape == (2, 0, 6)


def test_triton_without_a_gpu_is_a_clear_error() -> None:
    value, locations, weights = random_inputs(10)
    with pytest.raises(VoxelbridgeError, match='backend="triton" cannot run on cpu'):
        deformable_attention_3d(value, SHAPES, None, locations, weights, backend="triton")


@pytest.mark.parametrize(
    ("shapes", "starts", "message"),
    [
        (((2, 3, 4), (1, 2, 3)), None, "do not have the 28 cells"),
        (((2, 3, 4), (0, 2, 2)), None, "must be positive"),
        (SHAPES, (0, 20), r"level starts \(0, 20\), not \(0, 24\)"),
        (((2, 3, 4),), None, "do not fit"),
    ],
)
def test_inconsistent_shapes_are_refused(
    shapes: tuple[tuple[int, int, int], ...], starts: tuple[int, ...] | None, message: str
) -> None:
    value, locations, weights = random_inputs(11)
    with pytest.raises(ValueError, match=message):
        deformable_attention_3d(value, shapes, starts, locations, weights)
