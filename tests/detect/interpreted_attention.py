"""Runs the Triton kernels in Triton's interpreter; a program of its own, because the choice between
interpreting and compiling (TRITON_INTERPRET=1) is made when triton is imported.

    python interpreted_attention.py GOLDEN.npz   prints JSON: relative errors per type
    python interpreted_attention.py edges        prints JSON: named facts, all true
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from voxelbridge.detect.deform_attn import deformable_attention_3d
from voxelbridge.detect.deform_kernels.op import fused_attention

torch.set_num_threads(1)

KEYS = ("output", "grad_value", "grad_sampling_locations", "grad_attention_weights")


def golden_errors(path: Path) -> dict[str, dict[str, float]]:
    """Relative L2 errors of output and gradients for each type of value."""
    golden = dict(np.load(path))
    errors = {}
    for name, dtype in (("f64", torch.float64), ("f32", torch.float32), ("bf16", torch.bfloat16)):
        wide = torch.promote_types(dtype, torch.float32)
        value = torch.tensor(golden["value"]).to(dtype).requires_grad_()
        locations = torch.tensor(golden["sampling_locations"]).to(wide).requires_grad_()
        weights = torch.tensor(golden["attention_weights"]).to(wide).requires_grad_()
        out = deformable_attention_3d(
            value,
            torch.tensor(golden["spatial_shapes"]),
            torch.tensor(golden["level_start_index"]),
            locations,
            weights,
            backend="triton",
        )
        assert out.dtype == dtype
        out.backward(torch.tensor(golden["grad_output"]).to(dtype))
        got = (out.detach(), value.grad, locations.grad, weights.grad)
        errors[name] = {
            key: relative(tensor, golden[key]) for key, tensor in zip(KEYS, got, strict=True)
        }
    return errors


def relative(got: torch.Tensor | None, expected: np.ndarray) -> float:
    """Relative L2 distance."""
    assert got is not None
    difference = got.double().numpy() - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))


def edges() -> dict[str, bool]:
    """Far and NaN locations, expanded gradients, no query, integer sums, gradcheck, opcheck."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 4), (1, 2, 2))
    value = torch.rand(2, 28, 2, 3, generator=generator, dtype=torch.float64)
    locations = torch.rand(2, 5, 2, 2, 2, 3, generator=generator, dtype=torch.float64) * 1.6 - 0.3
    weights = torch.rand(2, 5, 2, 2, 2, generator=generator, dtype=torch.float64)
    facts = {}

    far = locations.clone()
    far[0, 0] = 1e12
    far[0, 1] = float("nan")
    far[0, 2] = float("-inf")
    out = deformable_attention_3d(value, shapes, None, far, weights, backend="triton")
    facts["far, NaN and infinite locations read nothing"] = bool((out[0, :3] == 0).all())
    facts["other queries do not notice"] = torch.equal(
        out[1],
        deformable_attention_3d(value, shapes, None, locations, weights, backend="triton")[1],
    )

    leaves = [t.clone().requires_grad_() for t in (value, locations, weights)]
    deformable_attention_3d(
        leaves[0], shapes, None, leaves[1], leaves[2], backend="triton"
    ).sum().backward()  # an expanded gradient, which is not contiguous
    others = [t.clone().requires_grad_() for t in (value, locations, weights)]
    deformable_attention_3d(
        others[0], shapes, None, others[1], others[2], backend="torch"
    ).sum().backward()
    facts["expanded gradients are accepted"] = all(
        a.grad is not None and b.grad is not None and torch.allclose(a.grad, b.grad, atol=1e-12)
        for a, b in zip(leaves, others, strict=True)
    )

    none = deformable_attention_3d(
        value, shapes, None, locations[:, :0], weights[:, :0], backend="triton"
    )
    facts["no query gives an empty result"] = none.shape == (2, 0, 6)

    torch.use_deterministic_algorithms(True)
    repeated = []
    for _ in range(2):
        again = [t.float().requires_grad_() for t in (value, locations, weights)]
        out = deformable_attention_3d(again[0], shapes, None, again[1], again[2], backend="triton")
        out.sum().backward()
        repeated.append(again[0].grad)
    torch.use_deterministic_algorithms(False)
    first, second = repeated
    expected = others[0].grad
    assert first is not None
    assert second is not None
    assert expected is not None
    facts["integer sums repeat to the bit"] = torch.equal(first, second)
    facts["integer sums are right"] = torch.allclose(first.double(), expected, atol=1e-5)

    small = (value[:1, :4, :1, :2], locations[:1, :2, :1, :1], weights[:1, :2, :1, :1])
    facts["gradcheck"] = torch.autograd.gradcheck(
        lambda v, x, w: deformable_attention_3d(v, ((1, 2, 2),), None, x, w, backend="triton"),
        [t.clone().requires_grad_() for t in small],
    )
    tensors = (torch.tensor([[1, 2, 2]]), torch.tensor([0]))
    checks = torch.library.opcheck(
        fused_attention,
        (small[0].clone().requires_grad_(), *tensors, *(t.requires_grad_() for t in small[1:])),
    )
    facts["opcheck"] = set(checks.values()) == {"SUCCESS"}
    return facts


if __name__ == "__main__":
    print(json.dumps(edges() if sys.argv[1] == "edges" else golden_errors(Path(sys.argv[1]))))
