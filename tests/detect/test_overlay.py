"""The picture of a predicted case."""

from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from voxelbridge.core.data.volume import Grid, reorientation_to_lps
from voxelbridge.detect.overlay import Hanging, write_overlay

SHAPE = (6, 9, 7)
ORDERS = [
    (order, signs) for order in permutations(range(3)) for signs in product((1.0, -1.0), repeat=3)
]


def grid_of(order: tuple[int, ...], signs: tuple[float, ...]) -> Grid:
    """Array axis a runs along world axis order[a] (0 = x), forwards or backwards."""
    directions = np.zeros((3, 3))
    for axis, (world, sign) in enumerate(zip(order, signs, strict=True)):
        directions[world, axis] = sign
    return Grid.from_parts(SHAPE, (1.0, 2.0, 3.0), directions=directions)


@pytest.mark.parametrize(("order", "signs"), ORDERS)
def test_slices_hang_with_head_or_front_up_and_left_on_the_right(
    order: tuple[int, ...], signs: tuple[float, ...]
) -> None:
    grid = grid_of(order, signs)
    hanging = Hanging.of(grid)
    # Every voxel holds its own world position, x y z in LPS: left, back, head.
    index = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"), axis=-1)
    position = index @ grid.affine[:, :3].T
    across = np.argmax(np.abs(grid.directions[:, 0]))
    down, right = {2: (1, 0), 1: (2, 0), 0: (2, 1)}[int(across)]
    expected = {1: 1.0, 2: -1.0}[down]  # the back or the feet are down
    rows = hanging.picture(position[2, :, :, down])
    columns = hanging.picture(position[2, :, :, right])
    assert (expected * np.diff(rows, axis=0) > 0).all()
    assert (np.diff(columns, axis=1) > 0).all()
    assert (np.diff(rows, axis=1) == 0).all()
    assert rows.shape == hanging.shape


@pytest.mark.parametrize(("order", "signs"), ORDERS[::5])
def test_boxes_lie_on_their_voxels(order: tuple[int, ...], signs: tuple[float, ...]) -> None:
    grid = grid_of(order, signs)
    hanging = Hanging.of(grid)
    box = np.array([1.0, 2.0, 1.0, 4.0, 7.0, 5.0])
    pixels = np.zeros(SHAPE[1:])
    pixels[2:7, 1:5] = 1.0
    top, left, bottom, right = (int(edge) for edge in hanging.rectangle(box))
    picture = hanging.picture(pixels)
    assert picture[top:bottom, left:right].all()
    assert picture.sum() == (bottom - top) * (right - left)
    assert reorientation_to_lps(grid).source_shape == SHAPE


def test_overlays_are_pictures_with_and_without_boxes(tmp_path: Path) -> None:
    grid = grid_of((2, 1, 0), (1.0, 1.0, 1.0))
    image = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    boxes = np.array([[1.0, 2.0, 1.0, 4.0, 7.0, 5.0], [0.0, 0.0, 0.0, 2.0, 3.0, 3.0]])
    for count in (0, 2):
        path = tmp_path / f"{count}.png"
        write_overlay(
            path, image, grid=grid, boxes=boxes[:count], scores=np.array([0.75, 0.5])[:count],
            labels=np.array([0, 1])[:count], class_names=["nodule", "mass"],
        )  # fmt: skip
        with Image.open(path) as picture:
            assert picture.size[0] > 200
