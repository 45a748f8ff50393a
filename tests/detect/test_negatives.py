import pytest
import torch

from voxelbridge.detect.anchors import AnchorGrid, AnchorLevel, size_combinations
from voxelbridge.detect.box_coder import decode, encode
from voxelbridge.detect.losses import (
    binary_cross_entropy,
    giou_loss,
    one_hot_labels,
    smooth_l1_loss,
)
from voxelbridge.detect.matching import match_atss
from voxelbridge.detect.negatives import sample_hard_negatives


def sample(positive: int, negative: int) -> tuple[int, int]:
    """How many positives and negatives are drawn from as many of each, four images."""
    mask = torch.arange(positive + negative) < positive
    rows = sample_hard_negatives(
        mask, ~mask, foreground_probability=torch.rand(len(mask)), num_samples=128
    )
    return len(rows[0]), len(rows[1])


@pytest.mark.parametrize(
    ("positives", "expected"), [(0, (0, 2)), (1, (1, 2)), (5, (5, 10)), (50, (42, 85))]
)
def test_numbers_follow_the_reference(positives: int, expected: tuple[int, int]) -> None:
    assert sample(positives, 5000) == expected


def test_without_negatives_none_are_drawn() -> None:
    assert sample(3, 0) == (3, 0)
    assert sample(0, 0) == (0, 0)


def test_a_generator_draws_from_the_hardest_pool_reproducibly() -> None:
    positive = torch.zeros(2000, dtype=torch.bool)
    positive[:60] = True
    ignored = torch.arange(2000) % 7 == 0
    positive &= ~ignored
    probability = torch.linspace(0, 1, 2000)
    draws = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(5)
        draws.append(
            sample_hard_negatives(
                positive,
                ~positive & ~ignored,
                foreground_probability=probability,
                num_samples=32,
                pool_factor=2.0,
                generator=generator,
            )
        )
    (pos, neg), again = draws
    assert torch.equal(pos, again[0])
    assert torch.equal(neg, again[1])
    assert len(pos.unique()) == 10
    assert len(neg.unique()) == 20
    assert positive[pos].all()
    assert not (positive[neg] | ignored[neg]).any()
    hardest = (~positive & ~ignored).nonzero().squeeze(1)[-40:]
    assert torch.isin(neg, hardest).all()
    assert not torch.equal(neg.sort().values, hardest[-20:])


def test_a_fraction_outside_its_range_is_refused() -> None:
    mask = torch.zeros(3, dtype=torch.bool)
    with pytest.raises(ValueError, match="positive_fraction"):
        sample_hard_negatives(
            mask, ~mask, foreground_probability=torch.rand(3), num_samples=8, positive_fraction=1.0
        )


@pytest.mark.parametrize("prefix", list("abcde"))
def test_batch_sample_equals_the_reference(boxops, prefix: str) -> None:
    golden = boxops("sampler")
    labels = golden.tensor(f"{prefix}_labels")
    images = len(golden.tensor(f"{prefix}_anchors_per_image"))
    positive, negative = sample_hard_negatives(
        labels > 0,
        labels == 0,
        foreground_probability=golden.tensor(f"{prefix}_fg_prob"),
        num_samples=32 * images,
    )
    for rows, name in ((positive, "pos"), (negative, "neg")):
        mask = torch.zeros(len(labels), dtype=torch.bool)
        mask[rows] = True
        assert torch.equal(mask, golden.tensor(f"{prefix}_batch_{name}_mask"))
    pool = golden.tensor(f"{prefix}_batch_pool")
    assert torch.equal(negative, pool[: len(negative)])


@pytest.mark.parametrize("prefix", list("abcde"))
def test_samples_per_image_equal_the_reference(boxops, prefix: str) -> None:
    golden = boxops("sampler")
    labels, probability = golden.tensor(f"{prefix}_labels"), golden.tensor(f"{prefix}_fg_prob")
    first = 0
    for count in golden.tensor(f"{prefix}_anchors_per_image").tolist():
        part = slice(first, first + count)
        positive, negative = sample_hard_negatives(
            labels[part] > 0,
            labels[part] == 0,
            foreground_probability=probability[part],
            num_samples=32,
        )
        for rows, name in ((positive, "pos"), (negative, "neg")):
            expected = golden.tensor(f"{prefix}_image_{name}_mask")[part]
            assert rows.sort().values.tolist() == expected.nonzero().squeeze(1).tolist()
        first += count


@pytest.mark.parametrize("prefix", ["two", "one_empty", "all_empty"])
def test_the_whole_detection_loss_equals_the_reference(boxops, prefix: str) -> None:
    golden, anchors = boxops("detection_loss"), boxops("anchors")
    axes = [anchors.tensor(f"b_size_axis{axis}").tolist() for axis in range(3)]
    levels = []
    for shape, stride, sizes in zip(
        anchors.tensor("b_feature_shapes").tolist(),
        anchors.tensor("b_strides").tolist(),
        zip(*axes, strict=True),
        strict=True,
    ):
        z, y, x = (torch.arange(n).float() * s for n, s in zip(shape, stride, strict=True))
        levels.append(AnchorLevel(centers=(z, y, x), sizes=size_combinations(sizes)))
    grid = AnchorGrid(levels=tuple(levels))
    labels, wanted = [], []
    for image in range(2):
        boxes = golden.boxes(f"{prefix}_boxes_{image}")
        match = match_atss(boxes, grid)
        classes = golden.tensor(f"{prefix}_classes_{image}")
        background = torch.full_like(match, -1)
        labels.append(torch.where(match >= 0, classes[match], background) if len(boxes) else match)
        wanted.append(boxes[match.clamp(min=0)] if len(boxes) else torch.zeros((len(match), 6)))
    label, target = torch.cat(labels), torch.cat(wanted)
    assert torch.equal(label.to(torch.int8) + 1, golden.tensor(f"{prefix}_anchor_labels"))
    logits = golden.tensor(f"{prefix}_box_logits")
    positive, negative = sample_hard_negatives(
        label >= 0,
        label < 0,
        foreground_probability=logits.sigmoid().amax(1),
        num_samples=64,
    )
    assert torch.equal(positive, golden.tensor(f"{prefix}_sampled_pos"))
    assert negative.sort().values.tolist() == golden.tensor(f"{prefix}_sampled_neg").tolist()
    sampled = torch.cat([positive, negative])
    loss = binary_cross_entropy(logits[sampled], one_hot_labels(label[sampled], 2)).mean()
    torch.testing.assert_close(loss, golden.tensor(f"{prefix}_cls_loss"), rtol=1e-5, atol=1e-6)
    if not len(positive):
        assert golden.tensor(f"{prefix}_reg_loss_giou").isnan()
        return
    all_anchors = torch.cat([grid.boxes()] * 2)
    deltas = golden.boxes(f"{prefix}_box_deltas")
    giou = giou_loss(decode(deltas, all_anchors)[positive], target[positive]).sum()
    giou = giou / len(positive) - 1  # there the loss is minus the GIoU
    smooth = smooth_l1_loss(
        deltas[positive], encode(target[positive], all_anchors[positive]), beta=1.0
    ).sum() / len(positive)
    for computed, name in ((giou, "reg_loss_giou"), (smooth, "reg_loss_smooth_l1")):
        torch.testing.assert_close(
            computed, golden.tensor(f"{prefix}_{name}"), rtol=1e-5, atol=1e-6
        )
