from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from voxelbridge.core.arch.encoder import build_encoder
from voxelbridge.core.arch.presets import RESENC_SMALL
from voxelbridge.pretrain_ssl.methods.models_genesis import (
    ModelsGenesis,
    ModelsGenesisObjective,
    counted_mse,
    spoil,
)

SHAPE = (16, 24, 32)


def patch_of(channels: int = 1, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> NDArray[Any]:
    return np.random.default_rng(seed).standard_normal((channels, *shape)).astype(np.float32)


def views_of(method: ModelsGenesis, patch: NDArray[Any], seed: int = 0) -> dict[str, NDArray[Any]]:
    return method.views(patch, np.random.default_rng(seed), masks={})


def batch_of(
    method: ModelsGenesis,
    *,
    samples: int = 2,
    channels: int = 1,
    shape: tuple[int, ...] = SHAPE,
    first_seed: int = 0,
) -> dict[str, Tensor]:
    views = [
        views_of(method, patch_of(channels, shape, seed), seed + 100)
        for seed in range(first_seed, first_seed + samples)
    ]
    return {name: torch.from_numpy(np.stack([view[name] for view in views])) for name in views[0]}


def only(**probabilities: float) -> ModelsGenesis:
    """A method that does nothing but what is named."""
    nothing = dict.fromkeys(("flip", "shuffle", "nonlinear", "paint"), 0.0)
    wanted = {f"{name}_probability": value for name, value in (nothing | probabilities).items()}
    return ModelsGenesis.model_validate(wanted)


def small_objective(method: ModelsGenesis, channels: int = 1) -> ModelsGenesisObjective:
    torch.manual_seed(0)
    return method.build(build_encoder(RESENC_SMALL, in_channels=channels))


# --------------------------------------------------------------------------------- corruption


def test_without_any_corruption_the_network_sees_the_clean_patch() -> None:
    batch = batch_of(only(), channels=2)
    assert torch.equal(spoil(batch, parity="paper"), batch["image"])
    assert np.array_equal(batch["image"][0], patch_of(2, seed=0))


def test_the_order_is_shuffle_then_curve_then_paint() -> None:
    every = only(shuffle=1.0, nonlinear=1.0, paint=1.0)
    batch = batch_of(every, shape=(32, 32, 32))
    spoiled = spoil(batch, parity="paper")
    nothing = {
        "windows": torch.zeros_like(batch["windows"]),
        "direction": torch.zeros_like(batch["direction"]),
        "paint": torch.zeros_like(batch["paint"]),
    }
    step = batch["image"]
    for corruption in ("windows", "direction", "paint"):
        others = {name: value for name, value in nothing.items() if name != corruption}
        step = spoil(batch | {"image": step} | others, parity="paper")
    assert torch.equal(spoiled, step)


def test_corruption_is_a_function_of_the_batch() -> None:
    method = ModelsGenesis()
    batch = batch_of(method, samples=4)
    before = {name: value.clone() for name, value in batch.items()}
    first = spoil(batch, parity="paper")
    torch.manual_seed(5)
    assert torch.equal(first, spoil(batch, parity="paper"))
    assert all(torch.equal(batch[name], before[name]) for name in batch)
    for number in range(4):
        alone = {name: value[number : number + 1] for name, value in batch.items()}
        assert torch.equal(first[number : number + 1], spoil(alone, parity="paper"))


def test_views_are_a_function_of_the_generator() -> None:
    one, same, other = (views_of(ModelsGenesis(), patch_of(), seed) for seed in (1, 1, 2))
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert not np.array_equal(one["noise_seed"], other["noise_seed"])


@pytest.mark.parametrize("parity", ["paper", "nnssl"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 7), (1, 9, 40), (6, 6, 6), (11, 3, 22)])
def test_any_patch_can_be_spoiled(parity: Any, shape: tuple[int, ...]) -> None:
    method = ModelsGenesis(
        parity=parity, shuffle_probability=1, paint_probability=1, shuffle_windows=20
    )
    method.check_patch((1, 1, 1))
    batch = batch_of(method, samples=6, channels=2, shape=shape)
    spoiled = spoil(batch, parity=parity)
    assert spoiled.shape == (6, 2, *shape)
    assert spoiled.dtype == torch.float32
    assert spoiled.isfinite().all()


def test_curve_and_noise_follow_each_patchs_own_range() -> None:
    method = only(shuffle=1.0, nonlinear=1.0, paint=1.0)
    shift, width = 40.0, 8.0
    patch = patch_of(2, (24, 24, 24))
    for seed in range(4):
        plain, moved = (views_of(method, p, seed) for p in (patch, shift + width * patch))
        one, other = (
            spoil({n: torch.from_numpy(v[None]) for n, v in views.items()}, parity="paper")
            for views in (plain, moved)
        )
        torch.testing.assert_close(other, shift + width * one, rtol=0, atol=2e-3)


def test_noise_spans_the_range_of_the_patch() -> None:
    method = ModelsGenesis.model_validate(
        {"flip_probability": 0, "nonlinear_probability": 0, "paint_probability": 1,
         "shuffle_probability": 0, "outpaint_share": 1, "range_percentile": 0}
    )  # fmt: skip
    batch = batch_of(method, shape=(32, 32, 32))
    noise = spoil(batch, parity="paper")[:, :, 0]  # the border is outside every cuboid
    image = batch["image"]
    low, high = image.amin(dim=(1, 2, 3, 4)), image.amax(dim=(1, 2, 3, 4))
    torch.testing.assert_close(noise.amin(dim=(1, 2, 3)), low, rtol=0, atol=0.05)
    torch.testing.assert_close(noise.amax(dim=(1, 2, 3)), high, rtol=0, atol=0.05)
    torch.testing.assert_close(noise.mean(dim=(1, 2, 3)), (low + high) / 2, rtol=0, atol=0.3)


def test_nnssl_takes_z_scores_for_values_between_zero_and_one() -> None:
    method = ModelsGenesis(
        parity="nnssl", nonlinear_probability=1, paint_probability=0, shuffle_probability=0
    )
    batch = batch_of(method, samples=6)
    image, bent = batch["image"], spoil(batch, parity="nnssl")
    rising = (batch["direction"] > 0).view(-1, 1, 1, 1, 1)
    below = torch.where(rising, 0.0, 1.0).expand_as(image)
    torch.testing.assert_close(bent[image <= 0], below[image <= 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(bent[image >= 1], 1 - below[image >= 1], rtol=0, atol=1e-6)
    assert len(batch["direction"].unique()) == 2


def test_nnssl_shuffles_the_first_channel_alone() -> None:
    method = only(shuffle=1.0)
    batch = batch_of(method, channels=2, shape=(24, 24, 24))
    image = batch["image"]
    ours, theirs = (spoil(batch, parity=parity) for parity in ("paper", "nnssl"))
    assert torch.equal(theirs[:, 0], ours[:, 0])
    assert torch.equal(theirs[:, 1], image[:, 1])
    assert not torch.equal(ours[:, 1], image[:, 1])


# --------------------------------------------------------------------------------------- views


def test_flips_are_along_the_spatial_axes_and_take_the_mask_along() -> None:
    method = only(flip=0.9).model_copy(update={"exclude_mask": "anonymization"})
    patch = patch_of(2)
    mask = (patch[0] > 1).astype(np.uint8)
    seen = set()
    for seed in range(60):
        views = method.views(patch, np.random.default_rng(seed), masks={"anonymization": mask})
        np.testing.assert_array_equal(views["excluded"], views["image"][0] > 1)
        seen.add(flip_of(views["image"], patch))
    assert seen >= {(), (1,), (2,), (3,), (1, 2, 3)}
    assert all(0 not in axes for axes in seen)


def test_nnssl_flips_channels_and_never_the_last_axis() -> None:
    method = ModelsGenesis(parity="nnssl", flip_probability=0.9)
    patch = patch_of(2)
    seen = {flip_of(views_of(method, patch, seed)["image"], patch) for seed in range(60)}
    assert seen >= {(), (0,), (1,), (2,)}
    assert all(3 not in axes for axes in seen)


def flip_of(image: NDArray[Any], patch: NDArray[Any]) -> tuple[int, ...]:
    subsets = [tuple(axis for axis in range(4) if bits >> axis & 1) for bits in range(16)]
    return next(axes for axes in subsets if np.array_equal(image, np.flip(patch, axes)))


def test_two_of_five_patches_are_flipped_and_at_most_thrice() -> None:
    method = ModelsGenesis(shuffle_windows=1, range_percentile=0)
    patch = patch_of(1, (2, 2, 2))
    flips = [flip_of(views_of(method, patch, seed)["image"], patch) for seed in range(2000)]
    # two flips along one axis (0.4^2 * 0.6 / 3) are none; so is no triple
    assert flips.count(()) / 2000 == pytest.approx(0.6 + 0.096 / 3, abs=0.04)
    assert flips.count((1, 2, 3)) / 2000 == pytest.approx(0.064 * 6 / 27, abs=0.012)


def test_default_probabilities_are_the_original_ones() -> None:
    method = ModelsGenesis(shuffle_windows=1, range_percentile=0)
    patch = patch_of(1, (4, 4, 4))
    views = [views_of(method, patch, seed) for seed in range(3000)]
    share = {
        "shuffled": np.mean([view["windows"].any() for view in views]),
        "rising": np.mean([view["direction"] == 1 for view in views]),
        "falling": np.mean([view["direction"] == -1 for view in views]),
        "in": np.mean([view["paint"] == 1 for view in views]),
        "out": np.mean([view["paint"] == 2 for view in views]),
    }
    stated = {"shuffled": 0.5, "rising": 0.45, "falling": 0.45, "in": 0.18, "out": 0.72}
    assert share == pytest.approx(stated, abs=0.03)


def test_views_have_the_same_shapes_whatever_is_drawn() -> None:
    method = ModelsGenesis(shuffle_windows=7)
    shapes = [
        {
            name: (value.shape, value.dtype)
            for name, value in views_of(method, patch_of(), s).items()
        }
        for s in range(20)
    ]
    assert all(shape == shapes[0] for shape in shapes)
    assert shapes[0]["windows"] == ((7, 6), np.int16)
    assert shapes[0]["limits"] == ((1, 2), np.float32)


def test_masks_are_used_only_where_one_is_excluded() -> None:
    assert ModelsGenesis().used_masks == ()
    assert "excluded" not in views_of(ModelsGenesis(), patch_of())
    assert ModelsGenesis(exclude_mask="anonymization").used_masks == ("anonymization",)


def test_the_encoder_sees_the_whole_patch() -> None:
    assert ModelsGenesis().network_input((32, 48, 64)) == (32, 48, 64)


# ---------------------------------------------------------------------------------------- loss


def slow_mse(prediction: Tensor, image: Tensor, excluded: Tensor | None) -> float:
    """Voxel by voxel, in float64."""
    total, count = 0.0, 0
    for index in np.ndindex(*image.shape):
        sample, _, z, y, x = index
        if excluded is not None and bool(excluded[sample, z, y, x]):
            continue
        total += (float(prediction[index]) - float(image[index])) ** 2
        count += 1
    return total / count if count else 0.0


@pytest.mark.parametrize("share", [None, 0.0, 0.4, 1.0])
def test_loss_equals_the_loop_over_voxels(share: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    image, prediction = (torch.randn(2, 2, 5, 6, 7, generator=generator) for _ in range(2))
    excluded = None if share is None else torch.rand(2, 5, 6, 7, generator=generator) < share
    prediction.requires_grad_()
    reference = prediction.detach().double().requires_grad_()
    loss = counted_mse(prediction, image, excluded)
    assert loss.item() == pytest.approx(slow_mse(prediction.detach(), image, excluded), rel=1e-6)
    loss.backward()
    kept = torch.ones_like(reference) if excluded is None else (~excluded[:, None]).double()
    squares = (reference - image.double()).square() * kept
    (squares.sum() / kept.expand_as(squares).sum().clamp(min=1)).backward()
    torch.testing.assert_close(prediction.grad, reference.grad, check_dtype=False)


def test_loss_of_a_fixed_batch_equals_the_loop_over_voxels() -> None:
    method = ModelsGenesis(shuffle_windows=200)
    batch = batch_of(method, channels=2, shape=(16, 16, 16))
    objective = small_objective(method, channels=2)
    with torch.no_grad():
        total = objective(batch)["total"].item()
        restored = objective.restore(spoil(batch, parity="paper"))
    assert total == pytest.approx(slow_mse(restored, batch["image"], None), rel=1e-6)


def test_excluded_voxels_do_not_count_even_if_not_finite() -> None:
    image = torch.tensor([[[[[0.0, float("nan"), 2.0]]]]])
    prediction = torch.tensor([[[[[1.0, float("inf"), 2.0]]]]], requires_grad=True)
    loss = counted_mse(prediction, image, torch.tensor([[[[False, True, False]]]]))
    loss.backward()
    assert loss.item() == 0.5
    assert prediction.grad is not None
    assert prediction.grad.flatten().tolist() == [1.0, 0.0, 0.0]


def test_loss_is_float32_for_a_bf16_prediction() -> None:
    prediction = torch.full((1, 1, 4, 4, 4), 1.0, dtype=torch.bfloat16, requires_grad=True)
    loss = counted_mse(prediction, torch.full((1, 1, 4, 4, 4), 1e-3), None)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0.999**2, rel=1e-6)


def test_trivial_loss_predicts_the_mean_of_the_volume() -> None:
    method = ModelsGenesis(shuffle_windows=10)
    batch = batch_of(method, channels=2, shape=(16, 16, 16))
    objective = small_objective(method, channels=2)
    squares = batch["image"].double().square()
    assert objective.trivial(batch).item() == pytest.approx(squares.mean().item(), rel=1e-6)
    excluded = torch.rand(2, 16, 16, 16) < 0.5
    counted = squares[~excluded[:, None].expand_as(squares)]
    trivial = objective.trivial(batch | {"excluded": excluded}).item()
    assert trivial == pytest.approx(counted.mean().item(), rel=1e-6)


def test_a_batch_of_excluded_voxels_costs_nothing() -> None:
    method = ModelsGenesis(shuffle_windows=10)
    batch = batch_of(method, shape=(16, 16, 16))
    batch["excluded"] = torch.ones(2, 16, 16, 16, dtype=torch.bool)
    objective = small_objective(method)
    loss = objective(batch)["total"]
    loss.backward()
    assert loss.item() == 0
    assert objective.trivial(batch).item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in objective.parameters())


@pytest.mark.parametrize("parity", ["paper", "nnssl"])
def test_every_parameter_gets_a_gradient(parity: Any) -> None:
    method = ModelsGenesis(parity=parity, shuffle_windows=50)
    objective = small_objective(method, channels=2)
    objective(batch_of(method, channels=2, shape=(16, 16, 16)))["total"].backward()
    assert all(parameter.grad is not None for parameter in objective.parameters())


def test_a_few_steps_lower_the_loss_of_a_batch() -> None:
    method = ModelsGenesis(shuffle_windows=200)
    batch = batch_of(method, shape=(16, 16, 16))
    objective = small_objective(method)
    losses = []
    for _ in range(8):
        loss = objective(batch)["total"]
        gradients = torch.autograd.grad(loss, list(objective.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(objective.parameters(), gradients, strict=True):
                parameter -= 0.05 * gradient
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


def test_pictures_show_image_corruption_and_reconstruction() -> None:
    method = ModelsGenesis(paint_probability=1, shuffle_windows=20)
    batch = batch_of(method)
    picture = small_objective(method).pictures(batch)
    assert picture.kind == "slices"
    assert [panel.name for panel in picture.panels] == ["image", "corrupted", "reconstruction"]
    assert all(panel.values.shape == SHAPE[1:] for panel in picture.panels)
    spoiled = spoil(batch, parity="paper")
    np.testing.assert_array_equal(picture.panels[0].values, batch["image"][0, 0, SHAPE[0] // 2])
    np.testing.assert_array_equal(picture.panels[1].values, spoiled[0, 0, SHAPE[0] // 2])


@pytest.mark.slow
def test_compiled_objective_compiles_the_network_alone_and_once() -> None:
    method = ModelsGenesis(shuffle_windows=20)
    objective = small_objective(method)
    graphs = []

    def count_graphs(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(objective, backend=count_graphs)
    for first_seed in (0, 10, 20):
        batch = batch_of(method, shape=(16, 16, 16), first_seed=first_seed)
        assert torch.equal(compiled(batch)["total"], objective(batch)["total"])
    assert len(graphs) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("parity", ["paper", "nnssl"])
def test_a_cuda_device_spoils_alike(parity: Any) -> None:
    method = ModelsGenesis(parity=parity, shuffle_probability=0.8)
    batch = batch_of(method, samples=6, channels=2, shape=(48, 64, 56))
    on_device = {name: value.cuda() for name, value in batch.items()}
    spoiled = spoil(on_device, parity=parity).cpu()
    torch.testing.assert_close(spoiled, spoil(batch, parity=parity), rtol=1e-4, atol=1e-5)
