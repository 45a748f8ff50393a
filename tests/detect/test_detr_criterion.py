"""Losses and matching of Deformable DETR against brute force and by hand."""

import itertools
import math

import pytest
import torch

from voxelbridge.detect.boxes import centre_size_to_edges, edges_to_centre_size, paired_giou
from voxelbridge.detect.deform_transformer import Stage, TransformerOutput
from voxelbridge.detect.detections import Targets
from voxelbridge.detect.detr_criterion import DETRCriterion

SHAPE = (16, 24, 32)


def criterion() -> DETRCriterion:
    return DETRCriterion(
        focal_gamma=1.0, focal_alpha=0.75, class_cost=2.0, l1_cost=5.0, giou_cost=2.0
    )


def random_stage(seed: int, *, batch: int = 2, queries: int = 4, classes: int = 2) -> Stage:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(batch, queries, 3, generator=generator) * 0.6 + 0.2
    sizes = torch.rand(batch, queries, 3, generator=generator) * 0.3 + 0.05
    logits = torch.randn(batch, queries, classes, generator=generator)
    return Stage(logits.requires_grad_(), torch.cat([centres, sizes], dim=2).requires_grad_())


def random_targets(seed: int, count: int) -> Targets:
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 3, generator=generator) * 8
    size = torch.rand(count, 3, generator=generator) * 6 + 1
    labels = torch.randint(0, 2, (count,), generator=generator)
    return Targets(torch.cat([low, low + size], dim=1), labels)


def output_of(stages: list[Stage], proposals: Stage) -> TransformerOutput:
    valid = torch.ones(proposals.boxes.shape[1], dtype=torch.bool)
    return TransformerOutput(tuple(stages), proposals, valid)


@pytest.mark.parametrize("seed", range(5))
def test_matching_is_the_cheapest_of_all_assignments(seed: int) -> None:
    stage, target = random_stage(seed, batch=1), random_targets(seed, 3)
    extent = torch.tensor([*SHAPE, *SHAPE], dtype=torch.float32)
    wanted = edges_to_centre_size(target.boxes / extent)
    logits, boxes = stage.logits[0].detach(), stage.boxes[0].detach()
    rows, columns = criterion().match(logits, boxes, wanted, target.labels)

    def price(row: int, column: int) -> float:
        p = 1 / (1 + math.exp(-float(logits[row, target.labels[column]])))
        positive = -0.75 * (1 - p) * math.log(p + 1e-8)
        negative = -0.25 * p * math.log(1 - p + 1e-8)
        l1 = float((boxes[row] - wanted[column]).abs().sum())
        giou = paired_giou(
            centre_size_to_edges(boxes[row : row + 1]),
            centre_size_to_edges(wanted[column : column + 1]),
        )
        return 2 * (positive - negative) + 5 * l1 - 2 * float(giou)

    got = sum(price(int(r), int(c)) for r, c in zip(rows, columns, strict=True))
    best = min(
        sum(price(row, column) for column, row in enumerate(order))
        for order in itertools.permutations(range(4), 3)
    )
    assert sorted(columns.tolist()) == [0, 1, 2]
    assert got == pytest.approx(best, abs=1e-5)


def test_losses_are_those_written_by_hand() -> None:
    target = Targets(
        torch.tensor([[4.0, 6.0, 8.0, 8.0, 18.0, 24.0]]), torch.tensor([1])
    )  # centre 6/16, 12/24, 16/32; size 4/16, 12/24, 16/32
    boxes = torch.tensor([[[0.375, 0.5, 0.5, 0.25, 0.5, 0.4], [0.9, 0.9, 0.9, 0.1, 0.1, 0.1]]])
    logits = torch.zeros(1, 2, 2)
    stage = Stage(logits, boxes)
    losses = criterion()(output_of([stage, stage], stage), [target], SHAPE)
    half = 0.5 * math.log(2)  # focal factor (1 - p) ** 1 times -log p at p = 0.5
    assert float(losses["classification"]) == pytest.approx(0.75 * half + 3 * 0.25 * half)
    assert float(losses["l1"]) == pytest.approx(0.1, abs=1e-6)
    assert float(losses["giou"]) == pytest.approx(1 - 0.8, abs=1e-5)
    for part in ("classification", "l1", "giou"):
        assert float(losses[f"aux_{part}"]) == pytest.approx(float(losses[part]), abs=1e-6)
        assert float(losses[f"proposal_{part}"]) == pytest.approx(float(losses[part]), abs=1e-6)


def test_auxiliary_losses_come_from_the_earlier_blocks() -> None:
    first, last, proposals = (random_stage(seed) for seed in (1, 2, 3))
    targets = [random_targets(4, 2), random_targets(5, 1)]
    losses = criterion()(output_of([first, last], proposals), targets, SHAPE)
    alone = criterion()(output_of([first], proposals), targets, SHAPE)
    for part in ("classification", "l1", "giou"):
        torch.testing.assert_close(losses[f"aux_{part}"], alone[part])
        assert float(alone[f"aux_{part}"].detach()) == 0.0
    losses["aux_l1"].backward()
    assert first.boxes.grad is not None
    assert last.boxes.grad is None


def test_without_objects_only_the_classification_pushes() -> None:
    stage = random_stage(6)
    losses = criterion()(output_of([stage], stage), [Targets.empty()] * 2, SHAPE)
    assert float(losses["l1"].detach()) == 0.0
    assert float(losses["giou"].detach()) == 0.0
    assert float(losses["classification"].detach()) > 0
    torch.stack(list(losses.values())).sum().backward()
    assert stage.logits.grad is not None
    assert stage.logits.grad.isfinite().all()


def test_more_objects_than_queries_leaves_some_unmatched() -> None:
    stage = random_stage(7, batch=1, queries=2)
    losses = criterion()(output_of([stage], stage), [random_targets(8, 5)], SHAPE)
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_invalid_proposals_take_no_part() -> None:
    stage, proposals = random_stage(9), random_stage(10, queries=3)
    targets = [random_targets(11, 1), random_targets(12, 1)]
    valid = torch.tensor([True, False, True])
    losses = criterion()(TransformerOutput((stage,), proposals, valid), targets, SHAPE)
    losses["proposal_classification"].backward()
    assert proposals.logits.grad is not None
    assert (proposals.logits.grad[:, 1] == 0).all()
    assert (proposals.logits.grad[:, 0] != 0).all()
