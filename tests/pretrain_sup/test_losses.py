"""Losses against loops over voxels and classes, in float64."""

import json
import math
import multiprocessing
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from voxelbridge.pretrain_sup.dataset_labels import Target
from voxelbridge.pretrain_sup.label_space import Head, encode_target
from voxelbridge.pretrain_sup.losses import (
    JointSample,
    Reduction,
    head_loss,
    joint_loss,
    level_weights,
    nearest,
    over_samples,
)

SOFTMAX = Head("organs", "organs", (Target("a", (1,)), Target("b", (2, 5)), Target("c", (3,))), False, (4,))  # fmt: skip  # noqa: E501
REGIONS = Head("lesions", "lesions", (Target("whole", (1, 2, 3)), Target("core", (2,))), True, (4,))


Drawn = tuple[list[Tensor], Tensor, Head, slice]  # logits per level, label ids, head, its channels


def gradient_of(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def labels_of(seed: int, *, values: tuple[int, ...] = (-1, 0, 1, 2, 3, 4, 5, 7)) -> Tensor:
    """A label map with background, targets, the ignored id 4, ids of nobody and padding."""
    return torch.from_numpy(np.random.default_rng(seed).choice(values, size=(4, 6, 5)))


def logits_of(seed: int, channels: int, *sizes: tuple[int, int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(channels, *size, generator=generator, dtype=torch.float64).requires_grad_()
        for size in sizes
    ]


# --- the slow truth -----------------------------------------------------------------------------


def at_voxel(values: Tensor, size: tuple[int, ...], voxel: tuple[int, ...]) -> int:
    """Value of the voxel that holds the centre of a coarse one."""
    place = [
        math.floor((i + 0.5) * old / new)
        for i, old, new in zip(voxel, values.shape, size, strict=True)
    ]
    return int(values[tuple(place)])


def voxels_of(level: Tensor) -> list[tuple[int, ...]]:
    return list(product(*(range(n) for n in level.shape[1:])))


def softmax(values: list[float]) -> list[float]:
    powers = [math.exp(value) for value in values]
    return [power / sum(powers) for power in powers]


def dice_shortfall(probability: list[float], member: list[bool]) -> float:
    if not any(member):
        return 0.0
    overlap = sum(p for p, m in zip(probability, member, strict=True) if m)
    return 1 - 2 * overlap / (sum(probability) + sum(member))


def slow_head_level(level: Tensor, labels: Tensor, head: Head) -> float:
    """Cross entropy and Dice of one level, from label ids on."""
    ids, columns = [], []
    for voxel in voxels_of(level):
        number = at_voxel(labels, tuple(level.shape[1:]), voxel)
        if number >= 0 and number not in head.ignore:
            ids.append(number)
            columns.append([level[(k, *voxel)].item() for k in range(level.shape[0])])
    if not ids:
        return 0.0
    costs, dices = [], []
    for k, target in enumerate(head.targets):
        member = [number in target.ids for number in ids]
        if head.regions:
            p = [1 / (1 + math.exp(-column[k])) for column in columns]
            costs += [-math.log(q if m else 1 - q) for q, m in zip(p, member, strict=True)]
        else:
            p = [softmax(column)[k + 1] for column in columns]
        dices.append(dice_shortfall(p, member))
    if not head.regions:
        for number, column in zip(ids, columns, strict=True):
            true = [k + 1 for k, target in enumerate(head.targets) if number in target.ids]
            costs.append(-math.log(softmax(column)[true[0] if true else 0]))
    return sum(costs) / len(costs) + sum(dices) / len(dices)


def slow_joint(
    samples: list[Drawn],
    weights: tuple[float, ...],
    channels: int,
    reduction: Reduction,
) -> float:
    """The joint loss from label ids on."""
    total = 0.0
    for number, weight in enumerate(weights):
        for channel in range(channels):
            cross_entropy, probability, member = 0.0, [], []
            for levels, labels, head, own in samples:
                if not own.start <= channel < own.stop:
                    continue
                target, level = head.targets[channel - own.start], levels[number]
                costs = []
                for voxel in voxels_of(level):
                    value = at_voxel(labels, tuple(level.shape[1:]), voxel)
                    if value < 0 or value in head.ignore:
                        continue
                    p = 1 / (1 + math.exp(-level[(channel, *voxel)].item()))
                    probability.append(p)
                    member.append(value in target.ids)
                    costs.append(-math.log(p if member[-1] else 1 - p))
                cross_entropy += sum(costs) / max(len(costs), 1)
            share = len(samples) if reduction == "mean" else 1
            total += weight * (cross_entropy / share + dice_shortfall(probability, member))
    return total


# --- per data set -------------------------------------------------------------------------------

SIZES = ((4, 6, 5), (2, 3, 5), (1, 3, 2))
ALL = (-1, 0, 1, 2, 3, 4, 5, 7)
CASES = {
    "all": ALL,
    "absent": (0, 1, 4),  # targets b and c, or core, have no voxel
    "background": (0, 7),
    "ignored": (-1, 4),
    "nothing_ignored": (0, 1, 2, 3),
}


@pytest.mark.parametrize("head", [SOFTMAX, REGIONS], ids=lambda head: head.name)
@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
@pytest.mark.parametrize("coarsest", [False, True])
def test_head_loss_equals_loops(head: Head, values: tuple[int, ...], coarsest: bool) -> None:
    labels = labels_of(3, values=values)
    channels = len(head.targets) + (0 if head.regions else 1)
    levels, weights = logits_of(5, channels, *SIZES), level_weights(3, coarsest=coarsest)
    target, annotated = encode_target(head, labels)
    loss = head_loss(levels, target, head, weights, annotated=annotated)
    expected = sum(
        weight * slow_head_level(level, labels, head)
        for level, weight in zip(levels, weights, strict=True)
    )
    assert loss["total"].item() == pytest.approx(expected, abs=1e-6)
    assert loss["total"].item() == pytest.approx((loss["ce"] + loss["dice"]).item())


@pytest.mark.parametrize("head", [SOFTMAX, REGIONS], ids=lambda head: head.name)
def test_head_loss_of_a_one_voxel_object_equals_loops(head: Head) -> None:
    labels = torch.zeros(4, 6, 5, dtype=torch.int16)
    labels[3, 0, 4] = 2
    levels = logits_of(1, 4 if head is SOFTMAX else 2, SIZES[0])
    target, annotated = encode_target(head, labels)
    loss = head_loss(levels, target, head, (1.0,), annotated=annotated)
    assert loss["total"].item() == pytest.approx(slow_head_level(levels[0], labels, head), abs=1e-6)


@pytest.mark.parametrize("head", [SOFTMAX, REGIONS], ids=lambda head: head.name)
def test_gradient_of_head_loss_equals_differences_of_loops(head: Head) -> None:
    labels = labels_of(9)
    (level,) = logits_of(2, 4 if head is SOFTMAX else 2, (4, 6, 5))
    target, annotated = encode_target(head, labels)
    head_loss([level], target, head, (1.0,), annotated=annotated)["total"].backward()
    for place in ((0, 0, 0, 0), (1, 2, 3, 4), (1, 3, 5, 0)):
        ends = []
        for step in (1e-5, -1e-5):
            moved = level.detach().clone()
            moved[place] += step
            ends.append(slow_head_level(moved, labels, head))
        slope = (ends[0] - ends[1]) / 2e-5
        assert gradient_of(level)[place].item() == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize("head", [SOFTMAX, REGIONS], ids=lambda head: head.name)
def test_fully_ignored_patch_costs_nothing_and_has_zero_gradient(head: Head) -> None:
    levels = logits_of(2, 4 if head is SOFTMAX else 2, (4, 6, 5))
    target, annotated = encode_target(head, labels_of(0, values=(-1, 4)))
    loss = head_loss(levels, target, head, (1.0,), annotated=annotated)["total"]
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(gradient_of(levels[0]), torch.zeros_like(levels[0]))


@pytest.mark.parametrize("head", [SOFTMAX, REGIONS], ids=lambda head: head.name)
def test_voxels_that_do_not_count_have_exactly_zero_gradient(head: Head) -> None:
    labels = labels_of(8)
    levels = logits_of(2, 4 if head is SOFTMAX else 2, (4, 6, 5))
    target, annotated = encode_target(head, labels)
    head_loss(levels, target, head, (1.0,), annotated=annotated)["total"].backward()
    gradient = gradient_of(levels[0])
    assert torch.equal(gradient[:, ~annotated], torch.zeros_like(gradient[:, ~annotated]))
    assert (gradient[:, annotated] != 0).all()


def test_absent_target_has_no_dice_gradient_and_certain_logits_give_no_nan() -> None:
    labels = torch.zeros(4, 6, 5, dtype=torch.int64)
    level = torch.full((2, 4, 6, 5), -1e4, requires_grad=True)  # sigmoid is exactly 0
    target, annotated = encode_target(REGIONS, labels)
    losses = head_loss([level], target, REGIONS, (1.0,), annotated=annotated)
    losses["total"].backward()
    assert losses["total"].item() == 0.0
    assert torch.equal(gradient_of(level), torch.zeros_like(level))
    unsure = torch.zeros(2, 4, 6, 5, requires_grad=True)
    head_loss([unsure], target, REGIONS, (1.0,), annotated=annotated)["dice"].backward()
    assert torch.equal(gradient_of(unsure), torch.zeros_like(unsure))


@pytest.mark.parametrize("head", [SOFTMAX, REGIONS], ids=lambda head: head.name)
def test_low_precision_logits_are_reckoned_in_float32_under_autocast(head: Head) -> None:
    labels = labels_of(6)
    channels = 4 if head is SOFTMAX else 2
    level = logits_of(4, channels, (4, 6, 5))[0].detach().bfloat16().requires_grad_()
    target, annotated = encode_target(head, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head_loss([level], target, head, (1.0,), annotated=annotated)["total"]
    expected = slow_head_level(level.detach().double(), labels, head)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    loss.backward()
    assert gradient_of(level).dtype == torch.bfloat16


def test_loss_of_regions_without_their_mask_is_a_mistake_of_the_caller() -> None:
    target, _ = encode_target(REGIONS, labels_of(0))
    with pytest.raises(ValueError, match="head lesions has regions"):
        head_loss(logits_of(0, 2, (4, 6, 5)), target, REGIONS, (1.0,))


def test_levels_of_weight_zero_are_not_looked_at() -> None:
    levels = logits_of(5, 4, *SIZES)
    broken = [
        torch.full_like(levels[0], torch.nan),
        levels[1],
        torch.full_like(levels[2], torch.inf),
    ]
    target, _ = encode_target(SOFTMAX, labels_of(1))
    loss = head_loss(broken, target, SOFTMAX, (0.0, 1.0, 0.0))["total"]
    assert loss.item() == pytest.approx(slow_head_level(levels[1], labels_of(1), SOFTMAX))


def test_level_weights_halve_end_with_zero_and_sum_to_one() -> None:
    assert level_weights(1) == (1.0,)
    assert level_weights(2) == (1.0, 0.0)
    assert level_weights(5) == pytest.approx([8 / 15, 4 / 15, 2 / 15, 1 / 15, 0.0])
    assert level_weights(3, coarsest=True) == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    with pytest.raises(ValueError, match="at least one level"):
        level_weights(0)


@pytest.mark.parametrize("size", [(4, 6, 5), (2, 3, 5), (3, 4, 2), (1, 1, 1), (8, 6, 10)])
def test_nearest_equals_torchs_nearest_exact(size: tuple[int, int, int]) -> None:
    labels = labels_of(2)
    expected = torch.nn.functional.interpolate(
        labels[None, None].double(), size, mode="nearest-exact"
    )
    assert torch.equal(nearest(labels, size), expected[0, 0].long())
    several = torch.stack((labels > 0, labels > 1))
    assert torch.equal(nearest(several, size), nearest(labels, size)[None] > torch.tensor([0, 1])[:, None, None, None])  # fmt: skip  # noqa: E501


def test_sum_over_samples_does_not_depend_on_the_parts_but_mean_and_sum_differ() -> None:
    losses = [{"total": torch.tensor(float(value))} for value in (1, 2, 3, 6)]
    whole = over_samples(losses, reduction="sum")["total"].item()
    halves = [over_samples(half, reduction="sum", parts=2) for half in (losses[:2], losses[2:])]
    assert whole == 12.0
    assert sum(half["total"].item() for half in halves) / 2 == whole
    assert over_samples(losses, reduction="mean")["total"].item() == 3.0


# --- joint --------------------------------------------------------------------------------------

FIRST = Head("first", "first", (Target("liver", (1, 2)), Target("tumour", (2,))), True, (4,))
SECOND = Head("second", "second", (Target("liver", (1,)), Target("spleen", (3,)), Target("gone", (9,))), True)  # fmt: skip  # noqa: E501
OWN = {"first": slice(0, 2), "second": slice(2, 5)}
CHANNELS = 6  # the last one belongs to a data set that is never drawn


def joint_batch(*heads: Head, levels: int = 3) -> list[Drawn]:
    return [
        (logits_of(11 + n, CHANNELS, *SIZES[:levels]), labels_of(n), head, OWN[head.name])
        for n, head in enumerate(heads)
    ]


def as_samples(
    batch: list[Drawn],
) -> list[JointSample]:
    return [
        JointSample(levels, own, *encode_target(head, labels))
        for levels, labels, head, own in batch
    ]


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(
    "heads", [(FIRST,), (FIRST, SECOND), (SECOND, FIRST, SECOND)], ids=["one", "two", "three"]
)
def test_joint_loss_equals_loops(heads: tuple[Head, ...], reduction: Reduction) -> None:
    batch, weights = joint_batch(*heads), level_weights(3, coarsest=True)
    loss = joint_loss(as_samples(batch), weights, reduction=reduction)
    expected = slow_joint(batch, weights, CHANNELS, reduction)
    assert loss["total"].item() == pytest.approx(expected, abs=1e-6)
    assert loss["total"].item() == pytest.approx((loss["ce"] + loss["dice"]).item())
    per_channel = loss["ce_per_channel"] + loss["dice_per_channel"]
    assert per_channel.sum().item() == pytest.approx(expected, abs=1e-6)
    assert loss["ce_per_channel"].sum().item() == pytest.approx(loss["ce"].item(), abs=1e-6)
    used = {channel for *_, own in batch for channel in range(own.start, own.stop)}
    assert set(per_channel.nonzero().flatten().tolist()) == used
    assert not per_channel.requires_grad


def test_channels_that_a_sample_does_not_annotate_have_exactly_zero_gradient() -> None:
    batch = joint_batch(FIRST, SECOND, levels=1)
    joint_loss(as_samples(batch), (1.0,))["total"].backward()
    for levels, _, _, own in batch:
        gradient = gradient_of(levels[0])
        others = torch.ones(CHANNELS, dtype=torch.bool)
        others[own] = False
        assert torch.equal(gradient[others], torch.zeros_like(gradient[others]))
        assert gradient[own].abs().sum(dim=(1, 2, 3)).min() > 0


def test_annotated_absent_target_is_pushed_down_by_cross_entropy_alone() -> None:
    batch = joint_batch(SECOND, levels=1)
    joint_loss(as_samples(batch), (1.0,))["dice"].backward()
    gradient = gradient_of(batch[0][0][0])
    assert torch.equal(gradient[4], torch.zeros_like(gradient[4]))  # "gone"
    assert gradient[3].abs().max() > 0
    joint_loss(as_samples(batch), (1.0,))["ce"].backward()
    assert gradient[4].max() > 0
    assert gradient[4].min() >= 0


def test_joint_batch_that_is_fully_ignored_costs_nothing() -> None:
    levels = logits_of(0, CHANNELS, (4, 6, 5))
    sample = JointSample(levels, OWN["first"], *encode_target(FIRST, labels_of(0, values=(-1, 4))))
    loss = joint_loss([sample, sample], (1.0,))["total"]
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(gradient_of(levels[0]), torch.zeros_like(levels[0]))


def test_joint_loss_of_low_precision_logits_is_reckoned_in_float32() -> None:
    batch = [
        ([level.detach().bfloat16() for level in levels], labels, head, own)
        for levels, labels, head, own in joint_batch(FIRST, SECOND)
    ]
    weights = level_weights(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = joint_loss(as_samples(batch), weights)["total"]
    exact = [
        ([level.double() for level in levels], labels, head, own)
        for levels, labels, head, own in batch
    ]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(slow_joint(exact, weights, CHANNELS, "sum"), rel=1e-6)


def rank_gradients(rank: int, folder: str) -> None:
    """What one of two ranks does with its two samples of four."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    batch = joint_batch(FIRST, SECOND, SECOND, FIRST)[2 * rank : 2 * rank + 2]
    scale = torch.full((), 1.5, dtype=torch.float64, requires_grad=True)
    scaled = [
        ([level * scale for level in levels], labels, head, own)
        for levels, labels, head, own in batch
    ]
    loss = joint_loss(as_samples(scaled), level_weights(3), ranks=2, parts=2)["total"]
    loss.backward()
    leaves = [gradient_of(level).flatten().tolist() for levels, *_ in batch for level in levels[:2]]
    content = {"loss": loss.item(), "scale": gradient_of(scale).item(), "leaves": leaves}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(content))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_have_the_gradients_of_one_process_on_the_joined_batch(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")  # spares both the import of torch
    ranks = [context.Process(target=rank_gradients, args=(rank, str(tmp_path))) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=200)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]

    batch = joint_batch(FIRST, SECOND, SECOND, FIRST)
    scale = torch.full((), 1.5, dtype=torch.float64, requires_grad=True)
    scaled = [
        ([level * scale for level in levels], labels, head, own)
        for levels, labels, head, own in batch
    ]
    loss = joint_loss(as_samples(scaled), level_weights(3))["total"]
    loss.backward()
    # Gradients of a parameter are averaged over ranks; those of a leaf are only its own rank's.
    assert sum(rank["loss"] for rank in found) / 2 == pytest.approx(loss.item(), rel=1e-9)
    assert sum(rank["scale"] for rank in found) / 2 == pytest.approx(
        gradient_of(scale).item(), rel=1e-9
    )
    expected = [gradient_of(level) for levels, *_ in batch for level in levels[:2]]
    for leaf, gradient in zip(found[0]["leaves"] + found[1]["leaves"], expected, strict=True):
        got = torch.tensor(leaf, dtype=torch.float64) / 2
        torch.testing.assert_close(got, gradient.flatten(), rtol=1e-9, atol=1e-12)
