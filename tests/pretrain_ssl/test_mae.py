from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from voxelbridge.core.arch.config import EncoderConfig
from voxelbridge.core.arch.encoder import build_encoder
from voxelbridge.core.arch.presets import RESENC_SMALL
from voxelbridge.pretrain_ssl.methods.mae import MAE, MAEObjective, hide, masked_mse


def upsample(hidden: Tensor, factors: tuple[int, int, int]) -> Tensor:
    voxels = hidden[:, None]
    for axis, factor in enumerate(factors):
        voxels = voxels.repeat_interleave(factor, axis + 2)
    return voxels


def slow_masked_mse(prediction: Tensor, image: Tensor, hidden: Tensor) -> Tensor:
    size = zip(image.shape[2:], hidden.shape[1:], strict=True)
    z, y, x = (edge // blocks for edge, blocks in size)
    mask = upsample(hidden, (z, y, x)).expand_as(image)
    return (prediction.double() - image.double())[mask].square().mean()


@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 2),
    grid=st.tuples(*[st.integers(1, 3)] * 3),
    block=st.tuples(*[st.integers(1, 3)] * 3),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=20)
def test_loss_and_gradient_equal_the_slow_reference(
    batch: int,
    channels: int,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, channels, *(g * b for g, b in zip(grid, block, strict=True)))
    image = torch.randn(shape, generator=generator)
    prediction = torch.randn(shape, generator=generator, requires_grad=True)
    hidden = torch.rand((batch, *grid), generator=generator) < 0.6
    hidden[0, 0, 0, 0] = True
    reference = prediction.detach().requires_grad_()
    loss, expected = (
        masked_mse(prediction, image, hidden),
        slow_masked_mse(reference, image, hidden),
    )
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(prediction.grad, reference.grad, rtol=1e-5, atol=1e-7)


def test_loss_of_a_large_patch_is_exact_in_float32() -> None:
    image, prediction = torch.randn(1, 1, 96, 96, 96), torch.randn(1, 1, 96, 96, 96)
    hidden = torch.rand(1, 6, 6, 6) < 0.75
    expected = slow_masked_mse(prediction, image, hidden).item()
    assert masked_mse(prediction, image, hidden).item() == pytest.approx(expected, rel=1e-6)


def test_loss_is_float32_for_a_bf16_prediction() -> None:
    prediction = torch.full((1, 1, 4, 4, 4), 1.0, dtype=torch.bfloat16, requires_grad=True)
    loss = masked_mse(prediction, torch.zeros(1, 1, 4, 4, 4), torch.ones(1, 2, 2, 2).bool())
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == 1.0
    assert prediction.grad is not None
    assert prediction.grad.dtype == torch.bfloat16


def test_visible_voxels_do_not_count_even_if_not_finite() -> None:
    hidden = torch.tensor([[[[True, False]]]])
    prediction = torch.tensor([[[[[1.0, float("nan")]]]]], requires_grad=True)
    loss = masked_mse(prediction, torch.zeros(1, 1, 1, 1, 2), hidden)
    loss.backward()
    assert loss.item() == 1.0
    assert prediction.grad is not None
    assert prediction.grad.flatten().tolist() == [2.0, 0.0]


def test_hidden_voxels_become_zero_and_the_image_stays() -> None:
    image = torch.randn(2, 1, 8, 8, 8)
    before = image.clone()
    hidden = torch.rand(2, 2, 2, 2) < 0.5
    visible = hide(image, hidden)
    mask = upsample(hidden, (4, 4, 4))
    assert torch.equal(visible, image * ~mask)
    assert torch.equal(image, before)


def test_hidden_voxels_do_not_reach_the_prediction() -> None:
    torch.manual_seed(0)
    objective = MAE(block_size=8).build(build_encoder(RESENC_SMALL, in_channels=1))
    image, hidden = torch.randn(1, 1, 16, 16, 16), torch.rand(1, 2, 2, 2) < 0.75
    hidden[0, 0, 0, 0] = True
    other = torch.where(upsample(hidden, (8, 8, 8)), torch.randn_like(image), image)
    with torch.no_grad():
        first, second = (objective.reconstruct(hide(x, hidden)) for x in (image, other))
    assert torch.equal(first, second)


def test_views_hold_the_patch_and_its_mask() -> None:
    patch = np.random.default_rng(0).standard_normal((2, 16, 16, 32)).astype(np.float32)
    views = MAE(block_size=8).views(patch, np.random.default_rng(1))
    assert views["image"] is patch
    assert views["hidden"].shape == (2, 2, 4)
    assert views["hidden"].sum() == 12


def test_every_parameter_gets_a_gradient() -> None:
    objective = MAE(block_size=8).build(build_encoder(RESENC_SMALL, in_channels=2))
    batch = {"image": torch.randn(1, 2, 16, 16, 16), "hidden": torch.rand(1, 2, 2, 2) < 0.75}
    objective(batch)["total"].backward()
    assert all(parameter.grad is not None for parameter in objective.parameters())


def test_loss_equals_nnssls_on_its_own_weights(shared: Path) -> None:
    folder = shared / "checkpoints" / "nnssl_mae"
    path = folder / "checkpoint_final.pth"
    theirs = torch.load(path, weights_only=True)["network_weights"]  # noqa: TID251
    reference = np.load(folder / "reference_io.npz")
    objective = nnssl_network(theirs)
    image = torch.from_numpy(reference["input"])
    visible_blocks = torch.from_numpy(reference["block_mask"])[:, 0]  # 1 = visible
    hidden = visible_blocks == 0
    with torch.no_grad():
        output = objective.reconstruct(image)
        masked_output = objective.reconstruct(hide(image, hidden))
        loss = objective({"image": image, "hidden": hidden})["total"]
    torch.testing.assert_close(output, torch.from_numpy(reference["output"]), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        masked_output, torch.from_numpy(reference["masked_output"]), rtol=0, atol=1e-5
    )
    assert loss.item() == pytest.approx(float(reference["masked_loss"]), abs=1e-6)


def nnssl_network(theirs: dict[str, Tensor]) -> MAEObjective:
    config = EncoderConfig(
        kind="residual",
        features=(8, 16, 24, 24),
        strides=((1, 1, 1), *((2, 2, 2),) * 3),
        kernels=((3, 3, 3),) * 4,
        blocks=(1, 2, 2, 2),
        conv_bias=True,
    )
    objective = MAE().build(build_encoder(config, in_channels=1))
    objective.load_state_dict({name: theirs[their_name(name)] for name in objective.state_dict()})
    return objective


def their_name(name: str) -> str:
    """Name of one of our tensors in nnssl's file; decoder levels count from the coarsest there."""
    part, *rest = name.split(".")
    match part, rest:
        case "encoder", ["stem", *tail]:
            return ".".join(["encoder.stem.convs.0", *tail])
        case "encoder", ["stages", stage, "blocks", block, "skip", *tail]:
            # index 1: an average pool stands before every projection of this network
            return ".".join([f"encoder.stages.{stage}.blocks.{block}.skip.1", *tail])
        case "decoder", ["upsample", level, *tail]:
            return ".".join([f"decoder.transpconvs.{2 - int(level)}", *tail])
        case "decoder", ["stages", level, "convs", conv, *tail]:
            return ".".join([f"decoder.stages.{2 - int(level)}.convs.{conv}", *tail])
        case "output", tail:
            return ".".join(["decoder.seg_layers.2", *tail])
        case _:
            return name
