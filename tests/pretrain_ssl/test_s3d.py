from itertools import product
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from voxelbridge.core.arch.blocks import ConvNormAct, ResidualBlock
from voxelbridge.core.arch.config import EncoderConfig, Triple
from voxelbridge.core.arch.encoder import PlainEncoder, ResEncoder, build_encoder
from voxelbridge.core.arch.init import initialize
from voxelbridge.core.arch.presets import RESENC_SMALL
from voxelbridge.core.arch.unet import UNetDecoder
from voxelbridge.pretrain_ssl.masking import hidden_count, random_block_mask
from voxelbridge.pretrain_ssl.methods.mae import MAE
from voxelbridge.pretrain_ssl.methods.s3d import S3D, Densify, S3DObjective, normalized_blocks

Parity = Literal["paper", "nnssl"]


class SlowS3D:
    """S3D by dense convolutions, products with masks, and norms over gathered voxels."""

    def __init__(self, objective: S3DObjective, image: Tensor, hidden: Tensor) -> None:
        self.objective, self.image, self.hidden = objective, image, hidden
        self.nnssl = objective.config.parity == "nnssl"
        self.known: dict[torch.Size, Tensor] = {}

    def visible(self, cells: torch.Size) -> Tensor:
        """(B, 1, *cells) bool: does a cell hold a voxel that is not hidden? Voxel by voxel."""
        if cells in self.known:
            return self.known[cells]
        size = self.image.shape[2:]
        visible = torch.zeros(len(self.image), 1, *cells, dtype=torch.bool)
        for b, *voxel in product(range(len(self.image)), *map(range, size)):
            block = scaled(voxel, size, self.hidden.shape[1:])
            if not self.hidden[b][block]:
                visible[b, 0][scaled(voxel, size, cells)] = True
        if self.nnssl and any(c < g for c, g in zip(cells, self.hidden.shape[1:], strict=True)):
            visible[:] = True
        self.known[cells] = visible
        return visible

    def norm(self, x: Tensor, *affine: Tensor) -> Tensor:
        """Per sample and channel: gathers what is visible, norms it, puts it back among zeros."""
        result = torch.zeros_like(x)
        visible = self.visible(x.shape[2:])
        for b, c in product(range(x.shape[0]), range(x.shape[1])):
            found = x[b, c][visible[b, 0]]
            variance = ((found - found.mean()) ** 2).mean()
            normed = (found - found.mean()) / torch.sqrt(variance + 1e-5)
            if affine:
                normed = normed * affine[0][c] + affine[1][c]
            result[b, c][visible[b, 0]] = normed
        return result

    def masked(self, x: Tensor) -> Tensor:
        return x * self.visible(x.shape[2:])

    def layer(self, layer: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(layer, ConvNormAct)
        x = self.norm(self.masked(layer.conv(x)), layer.norm.weight, layer.norm.bias)
        return F.leaky_relu(x, 0.01) if layer.activation else x

    def block(self, block: ResidualBlock, x: Tensor) -> Tensor:
        shortcut = self.masked(F.avg_pool3d(x, block.stride, block.stride))
        if block.skip is not None:
            shortcut = self.layer(block.skip, shortcut)
        return F.leaky_relu(self.layer(block.conv2, self.layer(block.conv1, x)) + shortcut, 0.01)

    def stages(self) -> list[Tensor]:
        encoder = self.objective.encoder
        x = self.layer(encoder.stem, self.image if self.nnssl else self.masked(self.image))
        outputs = []
        for stage in encoder.stages:
            parts = next(iter(stage.children()))
            assert isinstance(parts, nn.Sequential)
            for part in parts:
                x = self.block(part, x) if isinstance(part, ResidualBlock) else self.layer(part, x)
            outputs.append(x)
        return outputs

    def loss(self) -> Tensor:
        """Mean of the squares over the hidden voxels, one by one."""
        dense = []
        for densify, features in zip(densifiers(self.objective), self.stages(), strict=True):
            filled, visible = self.norm(features), self.visible(features.shape[2:])
            if not visible.all():
                assert densify.token is not None
                filled = torch.where(visible, filled, densify.token)
            dense.append(densify.conv(filled))
        prediction = self.objective.output(self.objective.decoder(dense)[0])
        visible = self.visible(self.image.shape[2:]).expand_as(self.image)
        squares = [
            (prediction[voxel] - self.image[voxel]) ** 2
            for voxel in product(*map(range, self.image.shape))
            if not visible[voxel]
        ]
        return torch.stack(squares).mean()


def densifiers(objective: S3DObjective) -> list[Densify]:
    return [part for part in objective.densify if isinstance(part, Densify)]


def tokens(objective: S3DObjective) -> list[Tensor]:
    return [part.token for part in densifiers(objective) if part.token is not None]


def scaled(voxel: list[int], size: torch.Size, cells: torch.Size) -> tuple[int, ...]:
    return tuple(v * n // edge for v, n, edge in zip(voxel, cells, size, strict=True))


def tiny_encoder(
    kind: Literal["residual", "plain"] = "residual", stride: Triple = (2, 2, 2), channels: int = 1
) -> ResEncoder | PlainEncoder:
    flat = (1, 3, 3)
    config = EncoderConfig(
        kind=kind,
        features=(3, 4, 5),
        strides=((1, 1, 1), stride, (2, 2, 2)),
        kernels=(flat if stride[0] == 1 else (3, 3, 3), (3, 3, 3), (3, 3, 3)),
        blocks=(1, 2, 1),
        conv_bias=True,
    )
    return build_encoder(config, in_channels=channels)


def tiny_batch(
    config: S3D, *, channels: int = 1, size: Triple = (8, 12, 8), samples: int = 2
) -> dict[str, Tensor]:
    rng = np.random.default_rng(0)
    patches = [rng.standard_normal((channels, *size)).astype(np.float32) for _ in range(samples)]
    views = [config.views(patch, rng, masks={}) for patch in patches]
    return {name: torch.from_numpy(np.stack([v[name] for v in views])) for name in views[0]}


def over(hidden: Tensor, size: torch.Size) -> Tensor:
    voxels = hidden[:, None]
    for axis, (edge, count) in enumerate(zip(size, hidden.shape[1:], strict=True)):
        voxels = voxels.repeat_interleave(edge // count, axis + 2)
    return voxels


def ruffled(objective: S3DObjective) -> S3DObjective:
    """In float64, with norms that scale and shift: 1 and 0 would hide a forgotten factor."""
    with torch.no_grad():
        for part in objective.modules():
            if isinstance(part, nn.InstanceNorm3d):
                part.weight.add_(torch.randn_like(part.weight), alpha=0.3)
                part.bias.add_(torch.randn_like(part.bias), alpha=0.3)
    return objective.double()


@pytest.mark.parametrize("parity", ["paper", "nnssl"])
@pytest.mark.parametrize(
    ("kind", "stride", "block"),
    [
        ("residual", (2, 2, 2), 4),
        ("residual", (2, 2, 2), 2),  # the deepest cells hold eight blocks
        ("residual", (1, 2, 2), 4),
        ("plain", (2, 2, 2), 2),
        ("plain", (1, 2, 2), 4),
    ],
)
def test_maps_loss_and_gradients_equal_the_slow_reference(
    kind: Literal["residual", "plain"], stride: Triple, block: int, parity: Parity
) -> None:
    torch.manual_seed(0)
    config = S3D(block_size=block, parity=parity)
    objective = ruffled(config.build(tiny_encoder(kind, stride)))
    batch = tiny_batch(config)
    image, hidden = batch["image"].double(), batch["hidden"]
    slow = SlowS3D(objective, image, hidden)
    fast_maps = [level.dense() for level in objective.encode(image, hidden)]
    torch.testing.assert_close(fast_maps, slow.stages(), rtol=1e-10, atol=1e-10)
    loss, expected = objective({"image": image, "hidden": hidden})["total"], slow.loss()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    parameters = list(objective.parameters())
    # The loss is taken in float32, which its gradient is as exact as.
    torch.testing.assert_close(
        torch.autograd.grad(loss, parameters),
        torch.autograd.grad(expected, parameters, allow_unused=False),
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.parametrize("block", [2, 4])
@pytest.mark.parametrize("stride", [(2, 2, 2), (1, 2, 2)])
def test_prediction_does_not_change_by_a_bit_with_the_hidden_voxels(
    block: int, stride: Triple
) -> None:
    torch.manual_seed(0)
    config = S3D(block_size=block)
    objective = config.build(tiny_encoder(stride=stride))
    batch = tiny_batch(config)
    image, hidden = batch["image"], batch["hidden"]
    other = torch.where(over(hidden, image.shape[2:]), torch.randn_like(image), image)
    with torch.no_grad():
        assert torch.equal(
            objective.reconstruct(image, hidden), objective.reconstruct(other, hidden)
        )


def test_prediction_changes_with_the_hidden_voxels_as_in_nnssl() -> None:
    torch.manual_seed(0)
    config = S3D(block_size=4, parity="nnssl")
    objective = config.build(tiny_encoder())
    batch = tiny_batch(config)
    image, hidden = batch["image"], batch["hidden"]
    other = torch.where(over(hidden, image.shape[2:]), torch.randn_like(image), image)
    visible = ~over(hidden, image.shape[2:]).expand(-1, 3, -1, -1, -1)
    with torch.no_grad():
        first, second = (objective.encode(x, hidden)[0].dense()[visible] for x in (image, other))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("ratio", [0.3, 0.6, 0.75])
@pytest.mark.parametrize("size", [(16, 16, 16), (24, 16, 40)])
def test_masks_hide_exactly_the_stated_share(ratio: float, size: Triple) -> None:
    config = S3D(block_size=8, mask_ratio=ratio)
    patch = np.zeros((1, *size), dtype=np.float32)
    rng = np.random.default_rng(1)
    blocks = size[0] * size[1] * size[2] // 8**3
    for _ in range(5):
        views = config.views(patch, rng, masks={})
        assert views["image"] is patch
        assert views["hidden"].shape == tuple(edge // 8 for edge in size)
        assert views["hidden"].sum() == int(ratio * blocks)


@pytest.mark.parametrize("parity", ["paper", "nnssl"])
@pytest.mark.parametrize("block", [2, 4, 8])
@pytest.mark.parametrize("bf16", [False, True])
def test_every_parameter_gets_a_gradient(parity: Parity, block: int, bf16: bool) -> None:
    config = S3D(block_size=block, parity=parity)
    objective = config.build(tiny_encoder(channels=2))
    # Blocks of 2 in cells of 4: chance decides whether a cell of the deepest map is hidden at all.
    batch = tiny_batch(config, channels=2, size=(8, 8, 16))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        losses = objective(batch)
    losses["total"].backward()
    assert losses["total"].dtype == torch.float32
    assert [name for name, p in objective.named_parameters() if p.grad is None] == []
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())


def test_a_token_without_a_hidden_cell_gets_a_zero_gradient() -> None:
    config = S3D(block_size=2, mask_ratio=0.3)
    objective = config.build(tiny_encoder())
    hidden = torch.zeros(1, 4, 4, 4, dtype=torch.bool)
    hidden[0, ::2, ::2, ::2] = True  # one of the eight blocks of each deepest cell, and more
    hidden[0, 1::2, ::2, ::2] = True
    hidden[0, 1, 1, 0:3] = True
    assert int(hidden.sum()) == hidden_count((4, 4, 4), 0.3)
    objective({"image": torch.randn(1, 1, 8, 8, 8), "hidden": hidden})["total"].backward()
    gradients = [token.grad for token in tokens(objective)]
    assert [g is not None and bool(g.any()) for g in gradients] == [True, True, False]
    assert gradients[2] is not None


@pytest.mark.parametrize(
    ("parity", "block", "count"),
    [("paper", 2, 3), ("paper", 4, 3), ("nnssl", 2, 2), ("nnssl", 4, 3)],
)
def test_tokens_exist_where_something_can_be_hidden(parity: Parity, block: int, count: int) -> None:
    objective = S3D(block_size=block, parity=parity).build(tiny_encoder())
    assert [part.token is not None for part in densifiers(objective)] == [
        i < count for i in range(3)
    ]


def test_tokens_are_drawn_within_one_standard_deviation_and_kept_by_initialize() -> None:
    torch.manual_seed(0)
    objective = S3D().build(build_encoder(RESENC_SMALL, in_channels=1))
    before = [token.clone() for token in tokens(objective)]
    initialize(objective, "torch_default")
    for token, after in zip(before, tokens(objective), strict=True):
        assert torch.equal(token, after)
        assert 0 < token.abs().max() <= 0.02


def test_only_the_finest_map_is_not_convolved_after_filling() -> None:
    objective = S3D().build(build_encoder(RESENC_SMALL, in_channels=1))
    kinds = [type(part.conv) for part in densifiers(objective)]
    assert kinds == [nn.Identity, nn.Conv3d, nn.Conv3d, nn.Conv3d]


def test_training_reconstructs_and_leaves_a_plain_encoder() -> None:
    torch.manual_seed(0)
    config = S3D(block_size=2)
    objective = config.build(tiny_encoder())
    ramp = torch.linspace(0, 3, 8)
    image = torch.sin(ramp)[:, None, None] + torch.cos(ramp)[:, None] + torch.sin(2 * ramp)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    rng = np.random.default_rng(0)
    names = list(tiny_encoder().state_dict())
    losses = []
    for _ in range(35):
        hidden = random_block_mask(rng, (4, 4, 4), ratio=0.75)
        batch = {"image": image[None, None], "hidden": torch.from_numpy(hidden)[None]}
        optimizer.zero_grad()
        loss = objective(batch)["total"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item() / objective.trivial(batch).item())
    assert np.mean(losses[-5:]) < 0.5
    assert list(objective.encoder.state_dict()) == names
    plain = tiny_encoder()
    plain.load_state_dict(objective.encoder.state_dict())
    assert torch.equal(plain(image[None, None])[-1], objective.encoder(image[None, None])[-1])


def test_each_parameter_is_registered_once_and_the_encoder_keeps_its_names() -> None:
    objective = S3D().build(build_encoder(RESENC_SMALL, in_channels=1))
    state = objective.state_dict()
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)
    encoder = [name.removeprefix("encoder.") for name in state if name.startswith("encoder.")]
    assert encoder == list(build_encoder(RESENC_SMALL, in_channels=1).state_dict())
    others = {name.split(".")[0] for name in state} - {"encoder"}
    assert others == {"decoder", "densify", "output"}
    assert isinstance(objective.decoder, UNetDecoder)


def test_trivial_loss_is_that_of_the_visible_mean() -> None:
    config = S3D(block_size=4)
    objective = config.build(tiny_encoder())
    batch = tiny_batch(config, samples=2)
    hidden = over(batch["hidden"], batch["image"].shape[2:])
    squares = []
    for image, mask in zip(batch["image"].double(), hidden, strict=True):
        squares.append((image[mask] - image[~mask].mean()) ** 2)
    assert objective.trivial(batch).item() == pytest.approx(
        torch.cat(squares).mean().item(), rel=1e-5
    )


def test_excluded_voxels_count_in_neither_loss() -> None:
    config = S3D(block_size=4, exclude_mask="anonymization")
    assert config.used_masks == ("anonymization",)
    patch = np.random.default_rng(0).standard_normal((1, 8, 12, 8)).astype(np.float32)
    mask = np.zeros((8, 12, 8), dtype=np.uint8)
    mask[:, :6] = 1
    views = config.views(patch, np.random.default_rng(1), masks={"anonymization": mask})
    batch = {name: torch.from_numpy(view)[None] for name, view in views.items()}
    objective = config.build(tiny_encoder())
    counted = over(batch["hidden"], batch["image"].shape[2:])[0, 0] & (torch.from_numpy(mask) == 0)
    with torch.no_grad():
        prediction = objective.reconstruct(batch["image"], batch["hidden"])[0, 0]
        expected = (prediction - batch["image"][0, 0])[counted].square().mean()
        assert objective(batch)["total"].item() == pytest.approx(expected.item(), rel=1e-5)
        batch["excluded"][:] = True
        assert objective(batch)["total"].item() == 0
        assert objective.trivial(batch).item() == 0


def test_target_is_normed_per_block_and_channel_where_asked() -> None:
    config = S3D(block_size=4, normalize_target=True)
    batch = tiny_batch(config, channels=2)
    batch["image"] = 5 + 3 * batch["image"]
    target = normalized_blocks(batch["image"], batch["hidden"].shape[1:])
    block = batch["image"][1, 1, 4:8, 8:12, 0:4]
    expected = (block - block.mean()) / torch.sqrt(block.var() + 1e-6)
    torch.testing.assert_close(target[1, 1, 4:8, 8:12, 0:4], expected)
    objective = config.build(tiny_encoder(channels=2))
    with torch.no_grad():
        prediction = objective.reconstruct(batch["image"], batch["hidden"])
        mask = over(batch["hidden"], batch["image"].shape[2:]).expand_as(target)
        expected_loss = (prediction - target)[mask].square().mean()
        assert objective(batch)["total"].item() == pytest.approx(expected_loss.item(), rel=1e-5)
        # Blocks of variance 1 (63/64 with the biased mean) around the mean: nothing to guess.
        assert objective.trivial(batch).item() == pytest.approx(63 / 64, rel=1e-3)


def test_a_target_normed_over_blocks_of_one_voxel_is_refused() -> None:
    with pytest.raises(ValueError, match="one voxel has no variance"):
        S3D(block_size=1, normalize_target=True)


def test_picture_shows_image_visible_part_and_reconstruction() -> None:
    config = S3D(block_size=4)
    batch = tiny_batch(config)
    with torch.no_grad():
        picture = config.build(tiny_encoder()).pictures(batch)
    assert [panel.name for panel in picture.panels] == ["image", "visible", "reconstruction"]
    hidden = over(batch["hidden"], batch["image"].shape[2:])[0, 0, 4].numpy()
    assert np.array_equal(np.isnan(picture.panels[1].values), hidden)
    assert all(panel.values.shape == (12, 8) for panel in picture.panels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 7}, "blocks of 7 voxels do not divide the patch"),
        ({"block_size": 24, "mask_ratio": 0.5}, "hides none of the"),
    ],
)
def test_patches_that_do_not_suit_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        S3D.model_validate(settings).check_patch((24, 24, 24))


def test_network_is_maes_with_tokens_and_convolutions() -> None:
    s3d, mae = (
        config.build(build_encoder(RESENC_SMALL, in_channels=1)) for config in (S3D(), MAE())
    )
    extra = sum(p.numel() for p in s3d.parameters()) - sum(p.numel() for p in mae.parameters())
    assert extra == (8 + 16 + 32 + 64) + sum(c * (27 * c + 1) for c in (16, 32, 64))
