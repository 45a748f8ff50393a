import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from voxelbridge.detect.boxes import (
    box_centers,
    box_giou,
    box_iou,
    box_sizes,
    box_volume,
    clip_boxes,
    flip_boxes,
    has_min_side,
    paired_giou,
    paired_iou,
    permute_box_axes,
    points_in_boxes,
)

SHAPE = (20, 16, 24)


def random_boxes(count: int, *, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand((count, 3), generator=generator, dtype=torch.float64) * 12
    size = torch.rand((count, 3), generator=generator, dtype=torch.float64) * 8 + 0.5
    return torch.cat([low, low + size], dim=1).to(dtype)


def plain_iou_and_giou(a: list[float], b: list[float]) -> tuple[float, float]:
    inter = enclosing = volume_a = volume_b = 1.0
    for axis in range(3):
        low, high = a[axis], a[axis + 3]
        other_low, other_high = b[axis], b[axis + 3]
        inter *= max(min(high, other_high) - max(low, other_low), 0.0)
        enclosing *= max(high, other_high) - min(low, other_low)
        volume_a *= high - low
        volume_b *= other_high - other_low
    union = volume_a + volume_b - inter
    return inter / union, inter / union - (enclosing - union) / enclosing


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_pairwise_overlaps_equal_a_plain_loop(seed: int) -> None:
    a = random_boxes(4, seed=seed, dtype=torch.float64)
    b = random_boxes(5, seed=seed + 1, dtype=torch.float64)
    expected = [[plain_iou_and_giou(p, q) for q in b.tolist()] for p in a.tolist()]
    iou = torch.tensor([[pair[0] for pair in row] for row in expected], dtype=torch.float64)
    giou = torch.tensor([[pair[1] for pair in row] for row in expected], dtype=torch.float64)
    torch.testing.assert_close(box_iou(a, b), iou, rtol=0, atol=1e-12)
    torch.testing.assert_close(box_giou(a, b), giou, rtol=0, atol=1e-12)
    torch.testing.assert_close(paired_iou(a, b[:4]), iou.diagonal(), rtol=0, atol=1e-12)
    torch.testing.assert_close(paired_giou(a, b[:4]), giou.diagonal(), rtol=0, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), axes=st.lists(st.integers(0, 2), unique=True))
def test_flipping_twice_gives_the_boxes_back_and_keeps_overlaps(seed: int, axes: list[int]) -> None:
    boxes = random_boxes(6, seed=seed, dtype=torch.float64)
    flipped = flip_boxes(boxes, SHAPE, axes=axes)
    torch.testing.assert_close(flip_boxes(flipped, SHAPE, axes=axes), boxes, rtol=0, atol=1e-12)
    torch.testing.assert_close(box_iou(flipped, flipped), box_iou(boxes, boxes), rtol=0, atol=1e-9)


def test_a_flipped_box_covers_the_voxels_of_the_flipped_mask() -> None:
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[2:5, 0:3, 10:24] = True
    flipped = flip_boxes(torch.tensor([[2.0, 0, 10, 5, 3, 24]]), SHAPE, axes=(0, 1, 2))
    occupied = mask.flip((0, 1, 2)).nonzero()
    tight = [*occupied.amin(0).tolist(), *(occupied.amax(0) + 1).tolist()]
    assert flipped[0].tolist() == tight


def test_permuting_axes_moves_each_side_with_its_axis() -> None:
    boxes = torch.tensor([[0.0, 10, 20, 1, 12, 23]])
    assert permute_box_axes(boxes, (2, 0, 1)).tolist() == [[20, 0, 10, 23, 1, 12]]


def test_iou_of_touching_boxes_is_zero() -> None:
    a = torch.tensor([[0.0, 0, 0, 4, 4, 4]])
    b = torch.tensor([[4.0, 0, 0, 8, 4, 4]])
    assert box_iou(a, b).item() == 0.0


def test_boxes_without_volume_never_match() -> None:
    flat = torch.tensor([[3.0, 3, 3, 8, 8, 3]])
    solid = torch.tensor([[0.0, 0, 0, 9, 9, 9]])
    assert math.isnan(box_iou(flat, flat).item())
    assert box_iou(flat, solid).item() == 0.0


def test_empty_inputs_give_empty_results() -> None:
    none, some = torch.zeros((0, 6)), random_boxes(3, seed=0)
    assert box_iou(none, some).shape == (0, 3)
    assert box_giou(some, none).shape == (3, 0)
    assert box_volume(none).shape == (0,)
    assert clip_boxes(none, SHAPE).shape == (0, 6)
    assert flip_boxes(none, SHAPE, axes=(0,)).shape == (0, 6)


def test_half_precision_boxes_are_computed_in_float32() -> None:
    boxes = torch.tensor([[0.0, 0, 0, 100, 100, 100]], dtype=torch.float16)
    assert box_volume(boxes).item() == 1e6  # more than float16 can hold
    assert box_iou(boxes, boxes).dtype == torch.float32


def test_giou_gradient_passes_gradcheck() -> None:
    a = random_boxes(4, seed=1, dtype=torch.float64).requires_grad_()
    b = random_boxes(4, seed=2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda p, q: paired_giou(p, q, eps=1e-7), (a, b))


def test_overlaps_equal_the_reference(boxops) -> None:
    golden = boxops("iou_giou")
    a, b = golden.boxes("boxes1"), golden.boxes("boxes2")
    for computed, name in (
        (box_iou(a, b), "iou"),
        (box_iou(a.double(), b.double()), "iou_float64"),
        (box_giou(a, b), "giou"),
        (box_giou(a, b, eps=1e-7), "giou_eps_1e7"),
        (box_volume(a), "area1"),
        (box_volume(b), "area2"),
    ):
        torch.testing.assert_close(computed, golden.tensor(name), rtol=1e-6, atol=1e-6)
    degenerate = golden.boxes("degenerate")
    assert math.isnan(box_iou(degenerate, degenerate).item())


def test_geometry_equals_the_reference(boxops) -> None:
    golden = boxops("geometry")
    boxes = golden.boxes("boxes")
    clipped = clip_boxes(boxes, golden.tensor("image_shape").tolist())
    distance = torch.cdist(box_centers(boxes[:10]), box_centers(boxes[10:22]))
    for computed, expected in (
        (box_centers(boxes), golden.tensor("center")),
        (box_sizes(boxes), golden.tensor("size")),
        (box_volume(boxes), golden.tensor("volume")),
        (distance, golden.tensor("dist_boxes_0_10_to_10_22")),
        (clipped, golden.boxes("clipped")),
        (permute_box_axes(boxes, (2, 0, 1)), golden.boxes("permuted_2_0_1")),
    ):
        torch.testing.assert_close(computed, expected, rtol=1e-6, atol=1e-5)
    inside = points_in_boxes(golden.tensor("points"), boxes, margin=0.01)
    assert torch.equal(inside, golden.tensor("point_in_box_eps_0_01"))


@pytest.mark.parametrize(
    ("name", "side", "clip"),
    [
        ("keep_min_size_0_01", 0.01, False),
        ("keep_min_size_0_01_after_clip", 0.01, True),
        ("keep_min_size_5", 5.0, False),
    ],
)
def test_small_boxes_are_those_of_the_reference(boxops, name: str, side: float, clip: bool) -> None:
    golden = boxops("geometry")
    boxes = golden.boxes("boxes")
    if clip:
        boxes = clip_boxes(boxes, golden.tensor("image_shape").tolist())
    assert torch.equal(has_min_side(boxes, side).nonzero().squeeze(1), golden.tensor(name))
