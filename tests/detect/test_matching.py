import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from voxelbridge.detect.anchors import AnchorGrid, AnchorLevel, anchor_grid, size_combinations
from voxelbridge.detect.boxes import box_iou
from voxelbridge.detect.matching import BACKGROUND, match_atss, nearest_locations

SIZES = ((4, 8), (4, 6), (5,))


def small_grid() -> AnchorGrid:
    shapes, strides = [(5, 4, 6), (3, 2, 3), (1, 1, 2)], [(4, 4, 4), (8, 8, 8), (16, 16, 16)]
    sizes = [tuple(tuple(2**level * s for s in axis) for axis in SIZES) for level in range(3)]
    return anchor_grid(shapes, strides, [(z, y, x) for z, y, x in sizes])


def plain_atss(boxes: Tensor, grid: AnchorGrid, candidates: int, center_in_box: bool) -> list[int]:
    """The rule of `match_atss` on the full matrix of anchors and boxes."""
    anchors = grid.boxes()
    iou = box_iou(boxes, anchors)
    centers = ((anchors[:, :3] + anchors[:, 3:]) / 2).double()
    best = [(-1.0, BACKGROUND)] * len(anchors)
    for row, box in enumerate(boxes):
        middle = ((box[:3] + box[3:]) / 2).double()
        chosen, first = [], 0
        for level in grid.levels:
            per_location = level.anchors_per_location
            distance = ((centers[first : first + level.num_anchors] - middle) ** 2).sum(1).tolist()
            locations = sorted(
                range(level.num_locations), key=lambda i: (distance[i * per_location], i)
            )[:candidates]
            chosen += [first + i * per_location + a for i in locations for a in range(per_location)]
            first += level.num_anchors
        overlaps = iou[row, chosen]
        threshold = overlaps.mean() + overlaps.std() if len(chosen) > 1 else torch.tensor(math.nan)
        for anchor in chosen:
            inside = bool(((centers[anchor] - box[:3]) > 0.01).all()) and bool(
                ((box[3:] - centers[anchor]) > 0.01).all()
            )
            if iou[row, anchor] < threshold or threshold.isnan() or (center_in_box and not inside):
                continue
            if iou[row, anchor].item() > best[anchor][0]:
                best[anchor] = (iou[row, anchor].item(), row)
    return [row for _, row in best]


@settings(max_examples=30, deadline=None)
@given(
    corners=st.lists(
        st.tuples(*[st.integers(-4, 40)] * 3, *[st.integers(1, 30)] * 3), min_size=1, max_size=6
    ),
    candidates=st.sampled_from([1, 4, 9]),
    center_in_box=st.booleans(),
)
def test_matching_equals_the_plain_rule_also_on_ties(
    corners: list[tuple[int, ...]], candidates: int, center_in_box: bool
) -> None:
    # Whole and half numbers make many equal distances and equal boxes.
    low = torch.tensor([c[:3] for c in corners]) / 2
    boxes = torch.cat([low, low + torch.tensor([c[3:] for c in corners]) / 2], dim=1)
    grid = small_grid()
    matched = match_atss(boxes, grid, candidates=candidates, center_in_box=center_in_box)
    assert matched.tolist() == plain_atss(boxes, grid, candidates, center_in_box)


@settings(max_examples=50, deadline=None)
@given(point=st.tuples(*[st.integers(-40, 80)] * 3), count=st.integers(1, 12))
def test_nearest_locations_equal_a_sort_of_all(point: tuple[int, int, int], count: int) -> None:
    level = small_grid().levels[0]
    target = torch.tensor([point]) / 2
    centers = torch.cartesian_prod(*level.centers)
    distance = ((centers - target) ** 2).sum(1).tolist()
    expected = sorted(range(len(distance)), key=lambda i: (distance[i], i))[:count]
    assert nearest_locations(target, level, count=count)[0].tolist() == expected


def test_no_object_makes_everything_background() -> None:
    matched = match_atss(torch.zeros((0, 6)), small_grid())
    assert matched.shape == (small_grid().num_anchors,)
    assert matched.unique().tolist() == [BACKGROUND]


def test_an_object_far_from_all_anchors_takes_all_its_candidates() -> None:
    grid = small_grid()
    matched = match_atss(torch.tensor([[500.0, 500, 500, 502, 502, 502]]), grid)
    per_level = [min(4 * 4, level.num_anchors) for level in grid.levels]
    assert (matched == 0).sum().item() == sum(per_level)


def test_a_single_candidate_is_never_matched(boxops) -> None:
    golden = boxops("atss")
    low, high = golden.boxes("single_anchor")[0].split(3)
    z, y, x = ((low + high) / 2).split(1)
    level = AnchorLevel(centers=(z, y, x), sizes=(high - low)[None])
    matched = match_atss(golden.boxes("single_box"), AnchorGrid(levels=(level,)))
    assert torch.equal(matched, golden.tensor("single_match"))
    assert matched.tolist() == [BACKGROUND]


def test_equal_objects_leave_the_anchors_to_the_first() -> None:
    box = torch.tensor([[2.0, 2, 2, 9, 9, 9]])
    once, twice = match_atss(box, small_grid()), match_atss(box.repeat(2, 1), small_grid())
    assert torch.equal(once, twice)
    assert 0 in once


def test_a_contested_anchor_goes_to_the_highest_overlap() -> None:
    grid = small_grid()
    boxes = torch.tensor([[1.0, 1, 1, 7, 7, 7], [2.0, 2, 2, 9, 8, 8]])
    matched = match_atss(boxes, grid)
    iou = box_iou(boxes, grid.boxes())
    alone = [match_atss(boxes[row : row + 1], grid) == 0 for row in (0, 1)]
    contested = alone[0] & alone[1]
    assert contested.any()
    assert torch.equal(matched[contested], iou[:, contested].argmax(0))


def test_more_objects_than_one_chunk_match_as_one_by_one() -> None:
    grid = small_grid()
    generator = torch.Generator().manual_seed(0)
    low = torch.rand((1500, 3), generator=generator) * 400
    boxes = torch.cat([low, low + torch.rand((1500, 3), generator=generator) * 9 + 1], dim=1)
    matched = match_atss(boxes, grid)
    iou = box_iou(boxes, grid.boxes())
    best = torch.full_like(iou, -1.0)
    for row in range(len(boxes)):
        won = match_atss(boxes[row : row + 1], grid) == 0
        best[row, won] = iou[row, won]
    highest, first = best.max(dim=0)
    assert torch.equal(matched >= 0, highest >= 0)
    taken = highest > 0  # elsewhere all claims tie at 0
    assert torch.equal(matched[taken], first[taken])


def reference_grid(boxops, prefix: str) -> AnchorGrid:
    """The reference's anchors: centres at cell * stride, without the half stride."""
    golden = boxops("anchors")
    axes = [golden.tensor(f"{prefix}_size_axis{axis}").tolist() for axis in range(3)]
    shapes: Sequence[Sequence[int]] = golden.tensor(f"{prefix}_feature_shapes").tolist()
    strides: Sequence[Sequence[int]] = golden.tensor(f"{prefix}_strides").tolist()
    levels = []
    for shape, stride, sizes in zip(shapes, strides, zip(*axes, strict=True), strict=True):
        z, y, x = (torch.arange(n).float() * s for n, s in zip(shape, stride, strict=True))
        levels.append(AnchorLevel(centers=(z, y, x), sizes=size_combinations(sizes)))
    grid = AnchorGrid(levels=tuple(levels))
    assert torch.equal(grid.boxes(), golden.boxes(f"{prefix}_anchors"))
    return grid


@pytest.mark.parametrize("prefix", [f"s{number}" for number in range(8)])
@pytest.mark.parametrize(
    ("name", "candidates", "center"),
    [("match_c4", 4, False), ("match_c4_center", 4, True), ("match_c9", 9, False)],
)
def test_matching_equals_the_reference(
    boxops, prefix: str, name: str, candidates: int, center: bool
) -> None:
    golden = boxops("atss")
    grid = reference_grid(boxops, golden.text(f"{prefix}_anchor_set"))
    boxes = golden.boxes(f"{prefix}_boxes")
    matched = match_atss(boxes, grid, candidates=candidates, center_in_box=center)
    assert torch.equal(matched, golden.tensor(f"{prefix}_{name}"))
