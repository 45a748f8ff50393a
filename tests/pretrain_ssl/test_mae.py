from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from voxelbridge.core.arch.config import EncoderConfig
from voxelbridge.core.arch.encoder import build_encoder
from voxelbridge.core.arch.presets import RESENC_SMALL
from voxelbridge.pretrain_ssl.methods.mae import MAE, MAEObjective
from voxelbridge.pretrain_ssl.reconstruction import hide


def upsample(hidden: Tensor, factors: tuple[int, int, int]) -> Tensor:
    voxels = hidden[:, None]
    for axis, factor in enumerate(factors):
        voxels = voxels.repeat_interleave(factor, axis + 2)
    return voxels


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
    views = MAE(block_size=8).views(patch, np.random.default_rng(1), masks={})
    assert views["image"] is patch
    assert set(views) == {"image", "hidden"}
    assert views["hidden"].shape == (2, 2, 4)
    assert views["hidden"].sum() == 12


def slow_loss(prediction: Tensor, image: Tensor, hidden: Tensor, excluded: Tensor | None) -> float:
    """Mean squared error, voxel by voxel, over what is hidden and not excluded."""
    total, count = 0.0, 0
    block = [n // g for n, g in zip(image.shape[2:], hidden.shape[1:], strict=True)]
    for b, c, z, y, x in np.ndindex(*image.shape):
        if hidden[b, z // block[0], y // block[1], x // block[2]] and not (
            excluded is not None and excluded[b, z, y, x]
        ):
            total += (float(prediction[b, c, z, y, x]) - float(image[b, c, z, y, x])) ** 2
            count += 1
    return total / max(count, 1)


@pytest.mark.parametrize("with_mask", [False, True])
def test_losses_equal_a_slow_reference(with_mask: bool) -> None:
    torch.manual_seed(0)
    method = MAE(block_size=4, exclude_mask="anonymization" if with_mask else None)
    objective = method.build(build_encoder(RESENC_SMALL, in_channels=2))
    image = torch.randn(2, 2, 16, 8, 8)
    rng = np.random.default_rng(0)
    masks = {"anonymization": (rng.random((16, 8, 8)) < 0.3).astype(np.uint8)}
    views = [method.views(patch.numpy(), rng, masks=masks) for patch in image]
    batch = {name: torch.from_numpy(np.stack([v[name] for v in views])) for name in views[0]}
    assert ("excluded" in batch) == with_mask
    with torch.no_grad():
        prediction = objective.reconstruct(hide(image, batch["hidden"]))
        loss, trivial = objective(batch)["total"], objective.trivial(batch)
    excluded = batch.get("excluded")
    expected = slow_loss(prediction, image, batch["hidden"], excluded)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    visible = ~upsample(batch["hidden"], (4, 4, 4)).expand_as(image)
    means = torch.stack([
        torch.stack([image[b, c][visible[b, c]].mean().expand(16, 8, 8) for c in range(2)])
        for b in range(2)
    ])  # fmt: skip
    expected = slow_loss(means, image, batch["hidden"], excluded)
    assert trivial.item() == pytest.approx(expected, rel=1e-6)


def test_a_patch_that_is_excluded_whole_has_loss_zero() -> None:
    objective = MAE(block_size=8).build(build_encoder(RESENC_SMALL, in_channels=1))
    batch = {
        "image": torch.randn(1, 1, 16, 16, 16),
        "hidden": torch.rand(1, 2, 2, 2) < 0.75,
        "excluded": torch.ones(1, 16, 16, 16, dtype=torch.bool),
    }
    loss = objective(batch)["total"]
    loss.backward()
    assert loss.item() == 0.0
    gradients = [p.grad for p in objective.parameters() if p.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_pictures_show_image_mask_and_reconstruction() -> None:
    objective = MAE(block_size=8).build(build_encoder(RESENC_SMALL, in_channels=1))
    image, hidden = torch.randn(2, 1, 16, 16, 16), torch.rand(2, 2, 2, 2) < 0.75
    with torch.no_grad():
        picture = objective.pictures({"image": image, "hidden": hidden})
    assert [panel.name for panel in picture.panels] == ["image", "visible", "reconstruction"]
    np.testing.assert_array_equal(picture.panels[0].values, image[0, 0, 8].numpy())
    masked = upsample(hidden, (8, 8, 8))[0, 0, 8].numpy()
    np.testing.assert_array_equal(np.isnan(picture.panels[1].values), masked)


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
