"""VoCo: crops and overlaps by voxel counting, losses by loops, the teacher step by step."""

import json
import math
import tomllib
from importlib import resources
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from voxelbridge.core.arch.config import cumulative_strides
from voxelbridge.core.arch.encoder import build_encoder
from voxelbridge.core.arch.init import initialize
from voxelbridge.core.arch.presets import ENCODER_PRESETS, PLAIN_SMALL, RESENC_L, RESENC_SMALL
from voxelbridge.core.data.augment_intensity import IntensityParams
from voxelbridge.core.train.optim import SGD, build_optimizer
from voxelbridge.pretrain_ssl.methods.voco import VoCo, VoCoObjective
from voxelbridge.pretrain_ssl.voco_crops import (
    base_starts,
    cut_crops,
    overlap_fractions,
    random_orientations,
    random_starts,
)
from voxelbridge.pretrain_ssl.voco_losses import base_similarity, cosines, overlap_loss

PATCH = (16, 16, 16)
SMALL = VoCo(base_grid=(2, 1, 1), target_crops=2, head_width=8, rot90_axes=(1, 2))
PARITIES: tuple[Literal["paper", "nnssl"], ...] = ("paper", "nnssl")

triples = st.tuples(*[st.integers(1, 3)] * 3)


def batch_of(
    method: VoCo, *, count: int = 2, seed: int = 0, channels: int = 1
) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    patches = rng.normal(size=(count, channels, *PATCH)).astype(np.float32)
    views = [method.views(patch, rng, masks={}) for patch in patches]
    return {name: torch.from_numpy(np.stack([view[name] for view in views])) for name in views[0]}


def objective_of(method: VoCo, *, seed: int = 0, channels: int = 1) -> VoCoObjective:
    torch.manual_seed(seed)
    return method.build(build_encoder(RESENC_SMALL, in_channels=channels))


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Of two vectors, cut at 0."""
    lengths = torch.sqrt((a * a).sum()) * torch.sqrt((b * b).sum())
    return torch.clamp((a * b).sum() / lengths, min=0)


def slow_overlap_loss(c: Tensor, o: Tensor, *, counts: str) -> Tensor:
    """L_pos + L_neg with a loop over every pair; c and o (B, k, n)."""
    if counts == "volume":
        parts = [
            slow_overlap_loss(x[None], y[None], counts="batch") for x, y in zip(c, o, strict=True)
        ]
        return sum(parts[1:], parts[0]) / len(parts)
    positive, negative = c.new_zeros(()), c.new_zeros(())
    weight, apart = 1e-6, 1e-6
    for predicted, true in zip(c.flatten(), o.flatten(), strict=True):
        positive = positive - true * torch.log(1 - torch.abs(true - predicted) + 1e-6)
        weight = weight + float(true)
        if true == 0:
            negative = negative + predicted * predicted
            apart += 1
    return positive / weight + negative / apart


def slow_similarity(bases: Tensor, *, parity: str) -> Tensor:
    total, pairs = bases.new_zeros(()), 0
    for volume in bases:
        for i in range(len(volume)):
            for j in range(i + 1, len(volume)):
                alike = cosine(volume[i], volume[j])
                total = total + (alike * alike if parity == "paper" else alike)
                pairs += 1
    return total / pairs


def slow_total(
    bases: Tensor,
    targets: Tensor,
    overlap: Tensor,
    *,
    parity: str,
    teacher: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Everything after the embeddings (B, n, E) and (B, k, E), pair by pair in float64."""
    predicted = torch.zeros_like(overlap, dtype=torch.float64)
    for v, t, b in np.ndindex(*overlap.shape):
        if teacher is None:
            predicted[v, t, b] = cosine(targets[v, t], bases[v, b].detach())
        else:
            steady_bases, steady_targets = (x.detach() for x in teacher)
            there = cosine(targets[v, t], steady_bases[v, b])
            back = cosine(steady_targets[v, t], bases[v, b])
            predicted[v, t, b] = (there + back) / 2
    counts = "volume" if parity == "paper" else "batch"
    loss = slow_overlap_loss(predicted, overlap.double(), counts=counts)
    return loss + slow_similarity(bases, parity=parity)


# ---- crops and labels


@given(grid=triples, crop=triples, count=st.integers(1, 4), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=40)
def test_overlaps_equal_counting_voxels(
    grid: tuple[int, int, int], crop: tuple[int, int, int], count: int, seed: int
) -> None:
    size = [parts * edge for parts, edge in zip(grid, crop, strict=True)]
    bases = base_starts(grid, crop)
    owner = np.full(size, -1)  # which base crop a voxel belongs to
    for number, (z, y, x) in enumerate(bases):
        box = owner[z : z + crop[0], y : y + crop[1], x : x + crop[2]]
        assert (box == -1).all()
        box[...] = number
    assert (owner >= 0).all()
    targets = random_starts(np.random.default_rng(seed), count, patch_size=size, crop=crop)
    overlaps = overlap_fractions(targets, bases, crop)
    for row, (z, y, x) in enumerate(targets):
        inside = owner[z : z + crop[0], y : y + crop[1], x : x + crop[2]]
        assert inside.shape == crop
        counted = np.bincount(inside.ravel(), minlength=len(bases)) / inside.size
        np.testing.assert_array_equal(overlaps[row], counted.astype(np.float32))
    assert overlaps.dtype == np.float32
    np.testing.assert_allclose(overlaps.sum(axis=1), 1, atol=1e-6)


def test_target_positions_are_uniform_up_to_the_border() -> None:
    starts = random_starts(np.random.default_rng(0), 30_000, patch_size=(6, 4, 4), crop=(2, 2, 4))
    for axis, positions in enumerate((5, 3, 1)):
        share = np.bincount(starts[:, axis], minlength=positions) / len(starts)
        np.testing.assert_allclose(share, 1 / positions, atol=0.01)


def test_orientations_have_the_stated_probabilities() -> None:
    drawn = random_orientations(np.random.default_rng(0), 20_000, mirror=0.5, rot90=0.3)
    np.testing.assert_allclose(drawn[:, :3].mean(axis=0), 0.5, atol=0.015)
    share = np.bincount(drawn[:, 3]) / len(drawn)
    np.testing.assert_allclose(share, [0.7, 0.1, 0.1, 0.1], atol=0.015)


def test_crops_are_slices_mirrored_then_turned() -> None:
    rng = np.random.default_rng(0)
    image = rng.normal(size=(2, 3, 6, 7, 5)).astype(np.float32)
    starts = rng.integers(0, 3, size=(2, 8, 3))
    orientations = np.concatenate(
        [rng.integers(0, 2, size=(2, 8, 3)), rng.integers(0, 4, size=(2, 8, 1))], axis=-1
    )
    crops = cut_crops(
        torch.from_numpy(image), starts, (2, 3, 3), orientations=orientations, turned_axes=(1, 2)
    )
    for b, m in np.ndindex(2, 8):
        z, y, x = starts[b, m]
        expected = image[b, :, z : z + 2, y : y + 3, x : x + 3]
        *mirrored, turns = orientations[b, m]
        expected = np.flip(expected, tuple(axis + 1 for axis in range(3) if mirrored[axis]))
        np.testing.assert_array_equal(crops[b, m], np.rot90(expected, turns, (2, 3)))
    plain = cut_crops(torch.from_numpy(image), starts, (2, 3, 3))
    z, y, x = starts[1, 2]
    np.testing.assert_array_equal(plain[1, 2], image[1, :, z : z + 2, y : y + 3, x : x + 3])


def test_views_hold_what_the_objective_needs_and_depend_on_the_generator_alone() -> None:
    method = VoCo(base_grid=(2, 2, 1), target_crops=3)
    patch = np.random.default_rng(0).normal(size=(2, 16, 16, 8)).astype(np.float32)
    one, two, other = (method.views(patch, np.random.default_rng(s), masks={}) for s in (1, 1, 2))
    assert one["image"] is patch
    shapes = {name: value.shape for name, value in one.items() if name != "image"}
    assert shapes == {
        "starts": (7, 3),
        "overlap": (3, 4),
        "orientation": (7, 4),
        "intensity": (7, 2, 12),
    }
    np.testing.assert_array_equal(one["starts"][:4], base_starts((2, 2, 1), (8, 8, 8)))
    for name, value in one.items():
        np.testing.assert_array_equal(value, two[name])
    assert any(not np.array_equal(value, other[name]) for name, value in one.items())


class Recorder(nn.Module):
    """Keeps what an encoder is called with."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.inner = encoder
        self.seen: list[Tensor] = []

    def forward(self, image: Tensor) -> list[Tensor]:
        self.seen.append(image)
        return self.inner(image)


def test_the_encoder_sees_augmented_crops_in_training_and_plain_ones_otherwise() -> None:
    method = SMALL.model_copy(update={"teacher": "none"})
    batch = batch_of(method, count=2, channels=2)
    objective = objective_of(method, channels=2)
    recorder = Recorder(objective.encoder)
    objective._modules["encoder"] = recorder
    objective(batch)
    objective.eval()
    objective(batch)
    objective.pictures(batch)
    trained, validated, drawn = recorder.seen
    starts, intensity = batch["starts"].numpy(), batch["intensity"].numpy()
    plain = cut_crops(batch["image"], starts, (8, 16, 16))
    turned = cut_crops(
        batch["image"],
        starts,
        (8, 16, 16),
        orientations=batch["orientation"].numpy(),
        turned_axes=(1, 2),
    )
    augmented = IntensityParams.from_array(intensity).apply  # (B, M, C) leading axes
    assert torch.equal(validated, plain.flatten(0, 1))
    assert torch.equal(drawn, plain[0])
    torch.testing.assert_close(trained, augmented(turned).flatten(0, 1), rtol=0, atol=1e-6)
    assert not torch.equal(trained, validated)


# ---- losses


def test_losses_are_nnssls_on_its_fixed_numbers() -> None:
    bases = torch.sin(0.7 * torch.arange(1, 49, dtype=torch.float64)).view(2, 4, 6)
    targets = torch.cos(0.3 * torch.arange(1, 37, dtype=torch.float64)).view(2, 3, 6)
    overlap = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25] * 4]).expand(2, 3, 4)
    for dtype in (torch.float64, torch.float32):
        p, q = bases.to(dtype), targets.to(dtype)
        prediction = overlap_loss(cosines(q, p), overlap, counts="batch").sum.item()
        similarity = base_similarity(p, form="nnssl").item()
        assert prediction == pytest.approx(0.816474, abs=1e-6)
        assert similarity == pytest.approx(0.166592, abs=1e-6)
        assert prediction + similarity == pytest.approx(0.983067, abs=1e-6)


@pytest.mark.parametrize("parity", PARITIES)
@pytest.mark.parametrize("with_teacher", [False, True])
def test_loss_and_gradient_equal_the_loops_in_float64(
    parity: Literal["paper", "nnssl"], with_teacher: bool
) -> None:
    method = SMALL.model_copy(
        update={"parity": parity, "teacher": "momentum" if with_teacher else "none"}
    )
    batch, objective = batch_of(method), objective_of(method).double()
    batch["image"] = batch["image"].double()
    objective(batch)  # the teacher starts as the student ..
    with torch.no_grad():
        for parameter in objective.parameters():  # .. and differs from it afterwards
            parameter.add_(0.05 * torch.randn_like(parameter))
    losses = objective(batch)
    losses["total"].backward()
    gradients = [parameter.grad for parameter in objective.parameters()]
    objective.zero_grad()
    crops = objective._crops(batch, augmented=True)
    bases, targets = objective._embed(crops, objective.encoder, objective.head)
    teacher = objective._embed(crops, *objective.teacher.parts) if objective.teacher else None
    expected = slow_total(bases, targets, batch["overlap"], parity=parity, teacher=teacher)
    expected.backward()
    assert losses["total"].item() == pytest.approx(expected.item(), abs=1e-9)
    for gradient, parameter in zip(gradients, objective.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("parity", PARITIES)
def test_float32_losses_equal_the_loops_in_float64(parity: Literal["paper", "nnssl"]) -> None:
    torch.manual_seed(0)
    bases, targets = torch.randn(2, 4, 16) + 0.5, torch.randn(2, 3, 16) + 0.5
    overlap = batch_of(VoCo(base_grid=(2, 2, 1), target_crops=3))["overlap"]
    counts = "volume" if parity == "paper" else "batch"
    loss = overlap_loss(cosines(targets, bases), overlap, counts=counts).sum
    total = loss + base_similarity(bases, form=parity)
    assert total.dtype == torch.float32
    expected = slow_total(bases.double(), targets.double(), overlap, parity=parity, teacher=None)
    assert total.item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("parity", PARITIES)
@pytest.mark.parametrize("scale", [1.0, 1e25])
def test_small_cosines_of_crops_that_are_the_same_do_not_drown_in_rounding(
    parity: Literal["paper", "nnssl"], scale: float
) -> None:
    # o = 1, c near 0: the logarithm is taken of c + 1e-6
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    bases = directions[None, :4] + 0.1 * directions[:1]
    targets = directions[None, 8:] + torch.logspace(-6, -2, 8)[:, None] * directions[:1]
    overlap = torch.eye(4)[None, [0] * 8]
    bases, targets = (x.mul(scale).requires_grad_() for x in (bases, targets))
    counts = "volume" if parity == "paper" else "batch"
    total = overlap_loss(cosines(targets, bases), overlap, counts=counts).sum
    total = total + base_similarity(bases, form=parity)
    total.backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (bases, targets))
    p, q = (x.detach().double() for x in (bases, targets))
    expected = slow_total(p, q, overlap, parity=parity, teacher=None)
    assert total.item() == pytest.approx(expected.item(), abs=1e-6)


@given(seed=st.integers(0, 999), counts=st.sampled_from(["volume", "batch"]))
@settings(deadline=None, max_examples=20)
def test_overlap_loss_equals_the_loop(seed: int, counts: Literal["volume", "batch"]) -> None:
    generator = torch.Generator().manual_seed(seed)
    predicted = torch.rand((2, 3, 4), generator=generator)
    overlap = torch.rand((2, 3, 4), generator=generator)
    overlap[torch.rand((2, 3, 4), generator=generator) < 0.4] = 0
    expected = slow_overlap_loss(predicted.double(), overlap.double(), counts=counts)
    loss = overlap_loss(predicted, overlap, counts=counts).sum
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)


def test_losses_stay_finite_without_terms_and_at_the_extremes() -> None:
    nothing, everything = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    for counts in ("volume", "batch"):
        for predicted in (nothing, everything):
            for overlap in (nothing, everything):
                leaf = predicted.clone().requires_grad_()
                loss = overlap_loss(leaf, overlap, counts=counts).sum
                loss.backward()
                assert torch.isfinite(loss)
                assert leaf.grad is not None
                assert torch.isfinite(leaf.grad).all()
        assert overlap_loss(nothing, nothing, counts=counts).sum.item() == 0
        assert overlap_loss(everything, everything, counts=counts).negative.item() == 0
    assert base_similarity(torch.randn(2, 1, 4), form="paper").item() == 0
    embedding = torch.zeros(1, 3, 4, requires_grad=True)  # a zero vector has no direction
    base_similarity(embedding, form="paper").backward()
    assert embedding.grad is not None
    assert torch.isfinite(embedding.grad).all()


def test_losses_are_float32_under_autocast() -> None:
    objective, batch = objective_of(SMALL), batch_of(SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        losses = objective(batch)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    losses["total"].backward()
    bases, targets = torch.randn(2, 3, 64), torch.randn(2, 2, 64)
    with torch.autocast("cpu", torch.bfloat16):
        inside = cosines(targets, bases)
    assert torch.equal(inside, cosines(targets, bases))


def test_paper_loss_of_a_batch_is_the_mean_over_its_volumes() -> None:
    # so that ranks and parts of a step add up to the batch exactly
    batch = batch_of(SMALL, count=3)
    objective = objective_of(SMALL)
    objective(batch)
    objective.eval()
    whole = objective(batch)
    single = [objective({name: v[i : i + 1] for name, v in batch.items()}) for i in range(3)]
    for name, loss in whole.items():
        mean = sum(part[name].item() for part in single) / 3
        assert loss.item() == pytest.approx(mean, abs=1e-6)


def test_trivial_loss_is_the_one_of_predicting_the_mean_overlap() -> None:
    for parity in PARITIES:
        method = SMALL.model_copy(update={"parity": parity})
        batch = batch_of(method, count=3)
        chance = torch.full_like(batch["overlap"], 0.5, dtype=torch.float64)
        counts = "volume" if parity == "paper" else "batch"
        expected = slow_overlap_loss(chance, batch["overlap"].double(), counts=counts)
        trivial = objective_of(method).trivial(batch)
        assert trivial.item() == pytest.approx(expected.item(), abs=1e-6)


def test_total_is_the_sum_of_its_named_parts() -> None:
    losses = objective_of(SMALL)(batch_of(SMALL))
    assert set(losses) == {"total", "overlap", "positive", "negative", "similarity"}
    assert losses["overlap"].item() == pytest.approx(
        (losses["positive"] + losses["negative"]).item()
    )
    assert losses["total"].item() == pytest.approx(
        (losses["overlap"] + losses["similarity"]).item()
    )


# ---- network and teacher


@pytest.mark.parametrize("config", [RESENC_SMALL, PLAIN_SMALL], ids=["residual", "plain"])
@pytest.mark.parametrize("parity", PARITIES)
def test_every_parameter_gets_a_gradient(config: Any, parity: Literal["paper", "nnssl"]) -> None:
    method = SMALL.model_copy(update={"parity": parity})
    objective = method.build(build_encoder(config, in_channels=1))
    objective(batch_of(method))["total"].backward()
    assert all(parameter.grad is not None for parameter in objective.parameters())
    encoder = {name for name, _ in build_encoder(config, in_channels=1).named_parameters()}
    own = {name for name, _ in objective.named_parameters()}
    heads = {
        f"{layer}.{kind}" for layer in ("first", "second", "third") for kind in ("weight", "bias")
    }
    assert own == {f"encoder.{name}" for name in encoder} | {f"head.{name}" for name in heads}
    assert (objective.decoder, objective.decoder_config) == (None, None)


def test_head_takes_the_means_of_all_stages_of_resenc_l() -> None:
    with torch.device("meta"):
        objective = VoCo(teacher="none").build(build_encoder(RESENC_L, in_channels=1))
    assert objective.head.first.weight.shape == (2048, 1120)
    count = sum(p.numel() for p in objective.parameters())
    assert count == 90_296_576 + 2048 * (1120 + 1) + 2 * 2048 * (2048 + 1)


@pytest.mark.parametrize("norm", ["crop", "volume"])
def test_norm_of_the_head_is_over_one_crop_or_the_crops_of_a_volume(
    norm: Literal["crop", "volume"],
) -> None:
    torch.manual_seed(0)
    head = objective_of(SMALL.model_copy(update={"head_norm": norm})).head
    features = torch.randn(2, 5, sum(RESENC_SMALL.features))
    x = features
    for layer in (head.first, head.second):
        x = layer(x)
        if norm == "crop":
            x = nn.functional.layer_norm(x, x.shape[-1:])
        else:  # a batch norm on the crops of each volume
            x = torch.stack([nn.functional.batch_norm(v, None, None, training=True) for v in x])
        x = x.relu()
    torch.testing.assert_close(head(features), head.third(x), rtol=1e-4, atol=1e-5)


def test_parity_chooses_teacher_and_norm_unless_they_are_given() -> None:
    assert objective_of(VoCo(parity="paper")).teacher is not None
    assert objective_of(VoCo(parity="nnssl")).teacher is None
    assert objective_of(VoCo(parity="paper", teacher="none")).teacher is None
    assert objective_of(VoCo(parity="nnssl", teacher="momentum")).teacher is not None


def test_teacher_follows_once_per_training_forward_before_its_pass() -> None:
    batch, objective = batch_of(SMALL), objective_of(SMALL)
    initialize(objective, "kaiming")  # draws the teacher's convolutions anew, too
    assert objective.teacher is not None
    optimizer = build_optimizer(SGD(), objective)
    optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in objective.parameters()}
    expected: dict[str, Tensor] = {}
    for _ in range(3):
        optimizer.zero_grad()
        for name, value in objective.named_parameters():
            student = value.detach().clone()
            before = expected.get(name, student)
            expected[name] = 0.9 * before + 0.1 * student
        objective(batch)["total"].backward()
        optimizer.step()
        for name, value in zip(expected, teacher_tensors(objective), strict=True):
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)


def teacher_tensors(objective: VoCoObjective) -> list[Tensor]:
    """The teacher's tensors in the order of the student's parameters."""
    assert objective.teacher is not None
    encoder, head = (dict(part.named_buffers()) for part in objective.teacher.parts)
    own = {"encoder": encoder, "head": head}
    names = [name.split(".", 1) for name, _ in objective.named_parameters()]
    return [own[part][name] for part, name in names]


def test_validation_and_pictures_leave_the_teacher_alone() -> None:
    batch, objective = batch_of(SMALL), objective_of(SMALL)
    objective.eval()
    assert torch.isfinite(objective(batch)["total"])  # before the first step
    objective.train()
    objective(batch)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(0.1)
    before = [value.clone() for value in teacher_tensors(objective)]
    objective.eval()
    with torch.no_grad():
        first, second = objective(batch), objective(batch)
    objective.train()
    objective.pictures(batch)
    assert first["total"] == second["total"]
    assert all(torch.equal(*pair) for pair in zip(before, teacher_tensors(objective), strict=True))


def test_training_goes_on_bit_for_bit_from_a_saved_state() -> None:
    def steps(objective: VoCoObjective, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            optimizer.zero_grad()
            objective(batch_of(SMALL, seed=seed))["total"].backward()
            optimizer.step()

    whole = objective_of(SMALL)
    optimizer = build_optimizer(SGD(), whole)
    steps(whole, optimizer, range(2))
    state = {name: value.clone() for name, value in whole.state_dict().items()}
    rest = optimizer.state_dict()
    resumed = objective_of(SMALL, seed=1)
    resumed.load_state_dict(state)
    second = build_optimizer(SGD(), resumed)
    second.load_state_dict(copy_of(rest))
    steps(whole, optimizer, range(2, 4))
    steps(resumed, second, range(2, 4))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def copy_of(state: dict[str, Any]) -> dict[str, Any]:  # Any: an optimizer's state
    momentum = {
        index: {name: value.clone() for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": momentum}


def test_ranks_do_not_exchange_the_teacher() -> None:
    objective = objective_of(SMALL)
    ignored = set(vars(objective)["_ddp_params_and_buffers_to_ignore"])  # what DDP reads
    assert ignored == {name for name, _ in objective.named_buffers()}


def test_pictures_show_true_beside_predicted_overlap() -> None:
    batch, objective = batch_of(SMALL), objective_of(SMALL)
    objective(batch)
    picture = objective.pictures(batch)
    assert picture.kind == "overlap"
    true, predicted = (panel.values for panel in picture.panels)
    np.testing.assert_array_equal(true, batch["overlap"][0])
    assert predicted.shape == (2, 2)
    assert (predicted >= 0).all()
    assert (predicted <= 1 + 1e-6).all()


# ---- settings


@pytest.mark.parametrize(
    ("method", "patch", "problem"),
    [
        (VoCo(base_grid=(3, 3, 1)), (64, 48, 16), "does not divide"),
        (VoCo(base_grid=(1, 1, 1)), (16, 16, 16), "nothing to tell apart"),
        (VoCo(base_grid=(2, 1, 1)), (16, 16, 16), "cannot be turned"),
        (VoCo(base_grid=(2, 2, 1), rot90_axes=(0, 0)), (16, 16, 16), "cannot be turned"),
    ],
)
def test_patches_that_do_not_fit_are_refused(
    method: VoCo, patch: tuple[int, int, int], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        method.check_patch(patch)


def test_crops_need_no_square_plane_when_they_are_not_turned() -> None:
    method = VoCo(base_grid=(2, 1, 1), rot90_probability=0.0)
    method.check_patch((16, 16, 16))
    assert method.network_input((16, 16, 16)) == (8, 16, 16)
    assert method.used_masks == ()


def preset(name: str) -> dict[str, Any]:  # Any: a TOML tree
    folder = resources.files("voxelbridge.pretrain_ssl") / "presets"
    return tomllib.loads((folder / f"{name}.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["voco", "voco_24gb", "voco_small"])
def test_presets_fit_their_encoder_and_have_no_spatial_augmentation(name: str) -> None:
    tree = preset(name)
    method = VoCo.model_validate_json(json.dumps(tree["method"]))
    patch = tuple(tree["patch_size"])
    method.check_patch(patch)
    crop = method.network_input(patch)
    strides = cumulative_strides(ENCODER_PRESETS[tree["encoder"]].strides)[-1]
    assert all(edge % step == 0 for edge, step in zip(crop, strides, strict=True))
    assert math.prod(crop) > math.prod(strides)  # more than one cell in the deepest map
    assert set(tree["augmentation"].values()) == {0.0}


def test_paper_preset_has_the_stated_values() -> None:
    tree = preset("voco")
    method = VoCo.model_validate_json(json.dumps(tree["method"]))
    assert (tree["patch_size"], tree["batch_size"]) == ([192, 192, 64], 12)
    assert (method.base_grid, method.target_crops) == ((3, 3, 1), 4)
    assert (method.parity, method.has_teacher, method.teacher_momentum) == ("paper", True, 0.9)
    assert (tree["encoder"], tree["precision"], tree["clip_norm"]) == ("resenc_l", "bf16", 12.0)
    optim = tree["optim"]
    assert (optim["name"], optim["lr"], optim["momentum"]) == ("sgd", 1e-2, 0.99)
    assert (optim["nesterov"], optim["weight_decay"]) == (True, 3e-5)
    assert (tree["schedule"]["steps"], tree["schedule"]["power"]) == (1_000_000, 0.9)
