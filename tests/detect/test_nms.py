import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from voxelbridge.detect.boxes import box_iou
from voxelbridge.detect.nms import batched_nms, nms

THRESHOLDS = {"1em05": 1e-5, "0_1": 0.1, "0_3": 0.3, "0_5": 0.5, "0_6": 0.6, "0_9": 0.9}


def plain_nms(boxes: Tensor, scores: Tensor, threshold: float) -> list[int]:
    iou = box_iou(boxes, boxes) > threshold
    kept: list[int] = []
    for row in sorted(range(len(boxes)), key=lambda i: (-scores[i].item(), i)):
        if not any(bool(iou[best, row]) for best in kept):
            kept.append(row)
    return kept


def clustered_boxes(count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    middle = torch.randint(0, 30, (count, 3), generator=generator).float()
    size = torch.randint(0, 12, (count, 3), generator=generator).float()
    scores = torch.randint(0, 40, (count,), generator=generator).float() / 40  # many ties
    return torch.cat([middle, middle + size], dim=1), scores


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(0, 60), seed=st.integers(0, 10_000), threshold=st.sampled_from([0, 0.1, 0.5])
)
def test_nms_equals_the_plain_loop_with_ties_and_flat_boxes(
    count: int, seed: int, threshold: float
) -> None:
    boxes, scores = clustered_boxes(count, seed=seed)
    assert nms(boxes, scores, threshold).tolist() == plain_nms(boxes, scores, threshold)


@pytest.mark.parametrize("threshold", [0.05, 0.5])
def test_nms_over_several_blocks_equals_the_plain_loop(threshold: float) -> None:
    boxes, scores = clustered_boxes(900, seed=3)
    assert nms(boxes, scores, threshold).tolist() == plain_nms(boxes, scores, threshold)


@pytest.mark.parametrize("limit", [1, 7, 300])
def test_a_limit_gives_the_first_survivors(limit: int) -> None:
    boxes, scores = clustered_boxes(900, seed=4)
    labels = torch.arange(900) % 5
    everything = batched_nms(boxes, scores, labels, 0.05)
    assert torch.equal(batched_nms(boxes, scores, labels, 0.05, limit=limit), everything[:limit])
    assert torch.equal(nms(boxes, scores, 0.05, limit=limit), nms(boxes, scores, 0.05)[:limit])


def test_a_chain_of_overlaps_is_settled_from_the_best_box() -> None:
    # Each box overlaps its neighbours only: the first, third, fifth ... survive.
    start = torch.arange(300.0)
    boxes = torch.stack([start * 2, start * 0, start * 0, start * 2 + 3, start + 1, start + 1], 1)
    boxes[:, 4:] = 1
    kept = nms(boxes, -start, 0.1)
    assert kept.tolist() == list(range(0, 300, 2))


def test_classes_do_not_suppress_each_other() -> None:
    box = torch.tensor([[0.0, 0, 0, 4, 4, 4]]).repeat(4, 1)
    scores = torch.tensor([0.1, 0.9, 0.9, 0.5])
    labels = torch.tensor([2, 0, 2, 0])
    assert batched_nms(box, scores, labels, 0.5).tolist() == [1, 2]


def test_negative_coordinates_keep_classes_apart() -> None:
    boxes = torch.tensor([[-50.0, -50, -50, -40, -40, -40], [0.0, 0, 0, 10, 10, 10]])
    kept = batched_nms(boxes, torch.tensor([0.5, 0.6]), torch.tensor([1, 0]), 0.1)
    assert kept.tolist() == [1, 0]


def test_no_boxes_give_no_rows() -> None:
    none = torch.zeros((0, 6))
    assert nms(none, torch.zeros(0), 0.5).shape == (0,)
    assert batched_nms(none, torch.zeros(0), torch.zeros(0, dtype=torch.int64), 0.5).shape == (0,)


@pytest.mark.parametrize("name", THRESHOLDS)
def test_nms_equals_the_reference(boxops, name: str) -> None:
    golden = boxops("nms")
    boxes, scores, labels = golden.boxes("boxes"), golden.tensor("scores"), golden.tensor("labels")
    threshold = THRESHOLDS[name]
    assert torch.equal(nms(boxes, scores, threshold), golden.tensor(f"keep_iou_{name}"))
    per_class = golden.tensor(f"keep_per_class_iou_{name}")
    assert torch.equal(batched_nms(boxes, scores, labels, threshold), per_class)


@pytest.mark.parametrize(("name", "threshold"), [("0_5", 0.5), ("0_1", 0.1), ("0", 0.0)])
def test_an_overlap_equal_to_the_threshold_is_kept(boxops, name: str, threshold: float) -> None:
    golden = boxops("nms")
    kept = nms(golden.boxes("exact_boxes"), golden.tensor("exact_scores"), threshold)
    assert torch.equal(kept, golden.tensor(f"exact_keep_iou_{name}"))
