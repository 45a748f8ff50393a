import math

import pytest
import torch

from voxelbridge.detect.anchors import anchor_boxes, anchor_grid, size_combinations
from voxelbridge.detect.boxes import box_centers, box_sizes

SIZES = ((4, 8), (6,), (3, 5))


def test_centres_lie_in_the_middle_of_the_cells() -> None:
    boxes = anchor_boxes([(2, 1, 3)], [(4, 8, 2)], [((4,), (4,), (4,))])
    centers = box_centers(boxes).tolist()
    assert centers == [[z, 4.0, x] for z in (2.0, 6.0) for x in (1.0, 3.0, 5.0)]


def test_order_is_levels_then_locations_then_sizes_with_the_last_axis_fastest() -> None:
    grid = anchor_grid([(2, 2, 2), (1, 1, 1)], [(4, 4, 4), (8, 8, 8)], [SIZES, SIZES])
    boxes = grid.boxes()
    assert grid.anchors_per_level == (32, 4)
    assert len(boxes) == grid.num_anchors == 36
    assert box_sizes(boxes[:4]).tolist() == [[4, 6, 3], [4, 6, 5], [8, 6, 3], [8, 6, 5]]
    assert box_centers(boxes[4]).tolist() == [2, 2, 6]  # x is the second fastest
    assert box_centers(boxes[32]).tolist() == [4, 4, 4]


def test_odd_sizes_keep_their_halves() -> None:
    boxes = anchor_boxes([(1, 1, 1)], [(2, 2, 2)], [((3,), (3,), (3,))])
    assert boxes.tolist() == [[-0.5, -0.5, -0.5, 2.5, 2.5, 2.5]]


def test_a_cube_of_128_voxels_has_a_million_anchors() -> None:
    strides = [(4,) * 3, (8,) * 3, (16,) * 3, (32,) * 3]
    shapes = [tuple(128 // s for s in stride) for stride in strides]
    axis = (4, 8, 16)
    sizes = [(axis, axis, axis)] * 4
    assert anchor_grid(shapes, strides, sizes).num_anchors == 1_010_880


def test_levels_of_unequal_number_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        anchor_boxes([(1, 1, 1)], [(2, 2, 2)], [SIZES, SIZES])


@pytest.mark.parametrize("prefix", ["a", "b"])
def test_anchors_equal_the_reference_up_to_half_a_stride(boxops, prefix: str) -> None:
    golden = boxops("anchors")
    axes = [golden.tensor(f"{prefix}_size_axis{axis}").tolist() for axis in range(3)]
    sizes = [(z, y, x) for z, y, x in zip(*axes, strict=True)]
    strides = golden.tensor(f"{prefix}_strides")
    shapes = golden.tensor(f"{prefix}_feature_shapes").tolist()
    grid = anchor_grid(shapes, strides.tolist(), sizes)
    # There a cell's anchors are centred on its first voxel index, here on its middle.
    shift = [
        (stride / 2).repeat(count, 2)
        for stride, count in zip(strides, grid.anchors_per_level, strict=True)
    ]
    expected = golden.boxes(f"{prefix}_anchors") + torch.cat(shift)
    torch.testing.assert_close(grid.boxes(), expected, rtol=0, atol=1e-5)
    assert list(grid.anchors_per_level) == golden.tensor(f"{prefix}_anchors_per_level").tolist()
    per_location = {level.anchors_per_location for level in grid.levels}
    assert per_location == {int(golden.number(f"{prefix}_anchors_per_location"))}
    for level, base in zip(grid.levels, golden.boxes(f"{prefix}_base_anchors"), strict=True):
        half = level.sizes / 2
        torch.testing.assert_close(torch.cat([-half, half], 1), base, rtol=0, atol=1e-6)


def test_size_combinations_are_the_product_of_the_axes() -> None:
    assert size_combinations(SIZES).shape == (math.prod(len(axis) for axis in SIZES), 3)
