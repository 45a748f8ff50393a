"""Pictures of label maps: which slices, which way up, which colours."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from voxelbridge.core.data.volume import Grid, Reorientation, reorientation_to_lps
from voxelbridge.core.drawing import MARGIN, TITLE
from voxelbridge.pretrain_sup.overlays import (
    EDGE,
    MAX_KEYS,
    choose_slices,
    draw_overlay,
    label_colours,
    write_overlay,
)

SHAPE = (12, 16, 20)
GRID = Grid.from_parts(SHAPE, (3.0, 1.0, 1.0))
NAMES = {1: "liver", 4: "tumour"}
TOP = MARGIN + TITLE + 10  # of the first slice in the picture


def volume() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    image = rng.normal(size=SHAPE).astype(np.float32)
    labels = np.zeros(SHAPE, np.uint8)
    labels[3:9, 2:9, 3:10] = 1  # towards the front and the patient's right
    labels[6, 3:5, 4:6] = 4
    return image, labels


def test_slices_are_spread_over_the_labels_and_show_the_most_of_them() -> None:
    labels = np.zeros((40, 6, 6), np.uint8)
    labels[6:30] = 1
    labels[9, 2, 2], labels[13, 1, 1], labels[14, 0, 0] = 2, 2, 3
    labels[16:18, :2] = 2
    labels[17, :3], labels[39, 1, 1] = 2, 4
    # 9 has two labels, 13 and 14 lie between two parts, 16 and 17 have as many labels and voxels
    assert choose_slices(labels) == [9, 16, 24]


def test_slices_of_few_or_no_labels() -> None:
    labels = np.zeros((8, 4, 4), np.uint8)
    assert choose_slices(labels) == [2, 4, 6]
    assert choose_slices(labels[:1]) == [0]
    labels[5, 1, 2] = 1
    assert choose_slices(labels) == [5]


def test_a_label_is_where_it_lies_in_the_patient_whatever_the_file_s_axis_order() -> None:
    image, labels = volume()
    expected = draw_overlay(image, labels, grid=GRID, names=NAMES)
    for permutation, flips in (((2, 0, 1), (True, False, True)), ((1, 0, 2), (False, True, True))):
        turned = Reorientation(SHAPE, permutation, flips)
        grid = turned.apply_grid(GRID)
        assert reorientation_to_lps(grid).target_shape == SHAPE
        drawn = draw_overlay(
            turned.apply_array(image), turned.apply_array(labels), grid=grid, names=NAMES
        )
        np.testing.assert_array_equal(drawn, expected)
    slice_ = expected[TOP : TOP + round(EDGE * 16 / 20), MARGIN : MARGIN + EDGE]
    coloured = np.ptp(slice_.astype(int), axis=2) > 40
    rows, columns = np.nonzero(coloured)
    pixels = EDGE / 20
    assert abs(rows.mean() - 5.5 * pixels) < 2
    assert abs(columns.mean() - 6.5 * pixels) < 2


def test_pixels_have_the_proportions_of_the_patient() -> None:
    image, labels = volume()
    grid = Grid.from_parts(SHAPE, (1.0, 4.0, 1.0))  # 64 mm high, 20 mm wide
    drawn = draw_overlay(image, labels, grid=grid, names=NAMES)
    wide = draw_overlay(image, labels, grid=GRID, names=NAMES)
    assert drawn.shape[0] > wide.shape[0]
    assert wide.shape[1] > drawn.shape[1]


def test_colours_differ_and_stay_when_other_labels_are_missing() -> None:
    colours = label_colours(range(1, 118))
    assert len({tuple(colour.tolist()) for colour in colours.values()}) == 117
    first = np.array([colours[n] for n in range(1, 13)], dtype=int)
    distances = np.abs(first[:, None] - first[None]).sum(-1) + 999 * np.eye(12, dtype=int)
    assert distances.min() > 40


@pytest.mark.parametrize("number", [0, 1, 40])
def test_any_number_of_labels_is_drawn(tmp_path: Path, number: int) -> None:
    image = np.zeros((3, 40, 30), np.int16)  # one grey
    labels = np.zeros(image.shape, np.uint16)
    labels[1, :number] = np.arange(1, 31) + 0 * number
    labels[2, :number] = np.arange(20, 50)
    names = {n: f"structure number {n}" for n in range(1, 60)}
    grid = Grid.from_parts(image.shape, (1.0, 1.0, 1.0))
    write_overlay(tmp_path / "a.png", image, labels, grid=grid, names=names)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width < 1400
        assert picture.height > EDGE
    assert len(np.unique(labels)) - 1 <= 2 * MAX_KEYS + 2
