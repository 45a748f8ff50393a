"""The losses of Retina U-Net against a plain float64 reference."""

import math

import pytest
import torch
from torch import Tensor

from voxelbridge.detect.anchors import anchor_grid
from voxelbridge.detect.batches import DetectionBatch
from voxelbridge.detect.config import HardNegatives, RetinaUNetConfig
from voxelbridge.detect.detections import Targets
from voxelbridge.detect.matching import match_atss
from voxelbridge.detect.objective import RetinaObjective
from voxelbridge.detect.retina_criterion import (
    PositiveAnchorAverage,
    RetinaCriterion,
    class_targets,
    sampled_cross_entropy,
)
from voxelbridge.detect.retina_unet import RetinaOutput

SIZES = (((4.0, 8.0), (4.0, 8.0), (4.0,)),)


def _output(batch: int, classes: int) -> RetinaOutput:
    generator = torch.Generator().manual_seed(3)
    grid = anchor_grid([(4, 4, 4)], [(4, 4, 4)], SIZES)
    count = grid.num_anchors
    return RetinaOutput(
        logits=torch.randn(batch, count, classes, generator=generator, requires_grad=True),
        deltas=torch.randn(batch, count, 6, generator=generator, requires_grad=True),
        anchors=grid,
        segmentation=torch.randn(batch, 2, 16, 16, 16, generator=generator, requires_grad=True),
    )


def _criterion() -> RetinaCriterion:
    return RetinaCriterion(RetinaUNetConfig())


def _targets() -> list[Targets]:
    boxes = torch.tensor([[2.0, 2, 2, 8, 8, 6], [9.0, 8, 9, 15, 14, 13]])
    return [Targets(boxes, torch.tensor([1, 0])), Targets.empty()]


def _reference(output: RetinaOutput, targets: list[Targets]) -> tuple[float, float]:
    anchors = output.anchors.boxes().double()
    focal = box = 0.0
    positives = 0
    for index, target in enumerate(targets):
        match = match_atss(target.boxes, output.anchors, candidates=4)
        for anchor, row in enumerate(match.tolist()):
            logits = output.logits[index, anchor].detach().double()
            per_class = []
            for label, logit in enumerate(logits.tolist()):
                hit = row >= 0 and int(target.labels[row]) == label
                p = 1 / (1 + math.exp(-logit))
                right = p if hit else 1 - p
                weight = 0.75 if hit else 0.25
                per_class.append(-weight * (1 - right) * math.log(right))
            focal += sum(per_class) / len(per_class)
            if row >= 0:
                positives += 1
                box += _plain_l1(
                    output.deltas[index, anchor].detach().double(),
                    target.boxes[row],
                    anchors[anchor],
                )
    return focal / positives, box / positives


def _plain_l1(deltas: Tensor, box: Tensor, anchor: Tensor) -> float:
    total = 0.0
    for axis in range(3):
        size = float(anchor[axis + 3] - anchor[axis])
        wanted_size = float(box[axis + 3] - box[axis])
        shift = (float(box[axis]) + wanted_size / 2 - float(anchor[axis]) - size / 2) / size
        total += abs(float(deltas[axis]) - shift)
        total += abs(float(deltas[axis + 3]) - math.log(wanted_size / size))
    return total


def test_losses_equal_the_plain_reference() -> None:
    output, targets = _output(2, 2), _targets()
    losses = _criterion()(output, targets, None)
    focal, box = _reference(output, targets)
    assert losses.keys() == {"classification", "box"}
    torch.testing.assert_close(losses["classification"].item(), focal, rtol=1e-5, atol=0)
    torch.testing.assert_close(losses["box"].item(), box, rtol=1e-5, atol=0)


def test_a_batch_without_objects_has_no_box_loss_and_finite_gradients() -> None:
    output = _output(1, 1)
    losses = _criterion()(output, [Targets.empty()], torch.zeros(1, 16, 16, 16, dtype=torch.bool))
    assert losses["box"].item() == 0.0
    torch.stack(list(losses.values())).sum().backward()
    assert output.logits.grad is not None
    assert torch.isfinite(output.logits.grad).all()
    assert output.logits.grad.abs().sum() > 0


def test_the_average_of_positives_is_corrected_for_its_start() -> None:
    average = PositiveAnchorAverage(0.7)
    assert average(torch.tensor(10)).item() == 10.0
    # 0.7 * 3 + 0.3 * 20 over 1 - 0.49
    torch.testing.assert_close(average(torch.tensor(20)).item(), (0.7 * 3 + 6) / 0.51)
    average.eval()
    before = average.average.clone()
    average(torch.tensor(1000))
    assert torch.equal(average.average, before)


def test_the_divisor_is_never_below_one() -> None:
    assert PositiveAnchorAverage(0.7)(torch.tensor(0)).item() == 1.0


def test_boxes_only_batches_keep_the_names_of_the_losses() -> None:
    """Losses are averaged by name over steps, so every step has the same names."""
    output = _output(2, 2)

    class Fixed(torch.nn.Module):
        def forward(self, image: Tensor, *, segment: bool) -> RetinaOutput:
            return output

        def idle_parameters(self, *, segment: bool) -> list[torch.nn.Parameter]:
            return []

    objective = RetinaObjective(Fixed(), _criterion(), RetinaUNetConfig())  # pyright: ignore[reportArgumentType] a stand-in network
    image = torch.zeros(2, 1, 16, 16, 16)
    mask = torch.zeros(2, 16, 16, 16, dtype=torch.bool)
    with_mask = objective(DetectionBatch(image, tuple(_targets()), mask))
    without = objective(DetectionBatch(image, tuple(_targets()), None))
    assert with_mask.keys() == without.keys()
    expected = 0.3 * without["classification"] + without["box"]
    torch.testing.assert_close(without["total"], expected)
    more = (with_mask["segmentation_ce"] + with_mask["segmentation_dice"]) / 2
    weighted = 0.3 * with_mask["classification"] + with_mask["box"] + more
    torch.testing.assert_close(with_mask["total"], weighted)


V001 = RetinaUNetConfig(
    classification_loss="hard_negatives", box_loss="giou", class_weight=1.0, dice_smoothing=1e-5
)


def _all_drawn() -> RetinaUNetConfig:
    """Every positive and negative anchor is in the sample, so that nothing is left to chance."""
    every = HardNegatives(anchors_per_image=100_000, positive_fraction=1e-3)
    return V001.model_copy(update={"hard_negatives": every})


def _plain_giou_loss(a: list[float], b: list[float]) -> float:
    inside = hull = 1.0
    volumes = [math.prod(box[i + 3] - box[i] for i in range(3)) for box in (a, b)]
    for i in range(3):
        inside *= max(min(a[i + 3], b[i + 3]) - max(a[i], b[i]), 0.0)
        hull *= max(a[i + 3], b[i + 3]) - min(a[i], b[i])
    union = sum(volumes) - inside
    return 1 - (inside / union - (hull - union) / hull)


def _plain_decode(deltas: list[float], anchor: list[float]) -> list[float]:
    low, high = [], []
    for axis in range(3):
        size = anchor[axis + 3] - anchor[axis]
        centre = anchor[axis] + size / 2 + deltas[axis] * size
        half = size * math.exp(min(deltas[axis + 3], math.log(1000 / 16))) / 2
        low.append(centre - half)
        high.append(centre + half)
    return [*low, *high]


def test_the_losses_of_v001_equal_a_plain_loop() -> None:
    output, targets = _output(2, 2), _targets()
    losses = RetinaCriterion(_all_drawn())(output, targets, None)
    anchors = output.anchors.boxes().tolist()
    terms, boxes = [], []
    for index, target in enumerate(targets):
        match = match_atss(target.boxes, output.anchors, candidates=4)
        for anchor, row in enumerate(match.tolist()):
            for label, logit in enumerate(output.logits[index, anchor].tolist()):
                hit = row >= 0 and int(target.labels[row]) == label
                p = 1 / (1 + math.exp(-logit))
                terms.append(-math.log(p if hit else 1 - p))
            if row >= 0:
                found = _plain_decode(output.deltas[index, anchor].tolist(), anchors[anchor])
                boxes.append(_plain_giou_loss(found, target.boxes[row].tolist()))
    assert boxes
    expected = sum(terms) / len(terms)
    torch.testing.assert_close(losses["classification"].item(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(losses["box"].item(), sum(boxes) / len(boxes), rtol=1e-5, atol=0)


def test_mined_anchors_alone_get_a_gradient() -> None:
    torch.manual_seed(0)
    output, targets = _output(2, 2), _targets()
    losses = RetinaCriterion(V001)(output, targets, None)
    (losses["classification"] + losses["box"]).backward()
    assert output.logits.grad is not None
    assert output.deltas.grad is not None
    matches = [match_atss(t.boxes, output.anchors, candidates=4) >= 0 for t in targets]
    positive = torch.stack(matches)
    seen = output.logits.grad.abs().sum(dim=2) > 0
    boxes = output.deltas.grad.abs().sum(dim=2) > 0
    count = min(int(positive.sum()), int(64 * 0.33))
    assert int((seen & positive).sum()) == int(boxes.sum()) == count
    assert not (boxes & ~positive).any()
    assert int((seen & ~positive).sum()) == int(count * (1 / 0.33 - 1))


def test_a_batch_without_objects_trains_on_two_negatives() -> None:
    output = _output(2, 1)
    losses = RetinaCriterion(V001)(output, [Targets.empty(), Targets.empty()], None)
    losses["classification"].backward()
    assert output.logits.grad is not None
    assert int((output.logits.grad != 0).sum()) == 2
    assert losses["box"].item() == 0.0


def test_draws_repeat_with_torchs_seed_and_in_validation() -> None:
    output, targets = _output(2, 2), _targets()
    criterion = RetinaCriterion(V001)

    def classification() -> float:
        return float(criterion(output, targets, None)["classification"].detach())

    torch.manual_seed(1)
    first, other = classification(), classification()
    torch.manual_seed(1)
    assert classification() == first != other
    criterion.eval()
    assert classification() == classification()


@pytest.mark.parametrize("prefix", ["two", "one_empty", "all_empty"])
def test_cross_entropy_of_the_sample_equals_the_reference(boxops, prefix: str) -> None:
    golden = boxops("detection_loss")
    logits = golden.tensor(f"{prefix}_box_logits").unflatten(0, (2, -1))
    labels = golden.tensor(f"{prefix}_anchor_labels").unflatten(0, (2, -1)).long() - 1
    # Each class stands for one object of it, so that labels can serve as matches.
    target = Targets(torch.tensor([[0.0, 0, 0, 1, 1, 1]]).repeat(2, 1), torch.tensor([0, 1]))
    rows = [golden.tensor(f"{prefix}_sampled_{kind}") for kind in ("pos", "neg")]
    count = logits.shape[1]
    drawn = [[row[row // count == image] - image * count for image in range(2)] for row in rows]
    hot = [class_targets(match, target, 2) for match in labels]
    loss = sampled_cross_entropy(logits, hot, drawn[0], drawn[1])
    torch.testing.assert_close(loss, golden.tensor(f"{prefix}_cls_loss"), rtol=1e-5, atol=1e-6)


def test_dice_is_smoothed_as_asked() -> None:
    output = _output(1, 1)
    mask = torch.zeros(1, 16, 16, 16, dtype=torch.bool)
    losses = [
        RetinaCriterion(RetinaUNetConfig(dice_smoothing=value))(output, [Targets.empty()], mask)
        for value in (0.0, 1e3)
    ]
    assert losses[0]["segmentation_dice"].item() == 1.0
    assert losses[1]["segmentation_dice"].item() < 1.0
