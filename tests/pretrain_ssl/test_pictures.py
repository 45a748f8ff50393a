"""Pictures: one window for all panels, hidden voxels in a colour of their own, legible numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from voxelbridge.pretrain_ssl.panels import Panel, Picture, slice_panel
from voxelbridge.pretrain_ssl.pictures import (
    HIDDEN,
    MIN_EDGE,
    PANELS_PER_ROW,
    draw_picture,
    find_pictures,
    picture_path,
    write_picture,
)


def slices(*values: ArrayLike) -> Picture:
    return Picture(
        "slices", tuple(Panel(f"panel {k}", np.array(v, np.float32)) for k, v in enumerate(values))
    )


def panels_of(picture: Picture) -> list[NDArray[np.uint8]]:
    """The panels of one row as they were enlarged, cut out of the picture."""
    drawn = draw_picture(picture)
    assert drawn.dtype == np.uint8
    height, width = picture.panels[0].values.shape
    scale = -(-MIN_EDGE // max(height, width))
    top, left, gap = 12 + 27, 12, 14  # under margin and name
    cut = []
    for number in range(len(picture.panels)):
        x = left + number * (width * scale + gap)
        cut.append(drawn[top : top + height * scale, x : x + width * scale])
    return cut


def test_first_panel_sets_the_window_of_all() -> None:
    ramp = np.linspace(0, 100, 288 * 10, dtype=np.float32).reshape(288, 10)
    first, second = panels_of(slices(ramp, ramp + 50))
    expected = np.rint(np.clip((ramp - 1) / 98, 0, 1) * 255)
    assert np.abs(first[..., 0] - expected).max() <= 1
    assert np.abs(second[..., 0] - np.rint(np.clip((ramp + 49) / 98, 0, 1) * 255)).max() <= 1
    assert (first == first[..., :1]).all()


def test_hidden_voxels_have_a_colour_that_no_grey_has() -> None:
    values = np.arange(64, dtype=np.float32).reshape(8, 8)
    masked = values.copy()
    masked[2:4, 4:6] = np.nan
    full, part = panels_of(slices(values, masked))
    scale = MIN_EDGE // 8
    hidden = np.kron(np.isnan(masked), np.ones((scale, scale))) > 0
    assert (part[hidden] == HIDDEN).all()
    assert (part[~hidden] == full[~hidden]).all()
    assert len(set(HIDDEN)) == 3


def test_small_slices_are_enlarged_without_smoothing() -> None:
    (panel,) = panels_of(slices([[0, 1], [1, 0]]))
    assert panel.shape == (MIN_EDGE, MIN_EDGE, 3)
    assert set(np.unique(panel).tolist()) == {0, 255}


@pytest.mark.parametrize("value", [0.0, -3.5, np.nan, np.inf])
def test_constant_and_broken_panels_are_drawn(value: float) -> None:
    assert draw_picture(slices(np.full((4, 6), value, np.float32))).shape[2] == 3


def test_many_panels_are_wrapped_into_rows() -> None:
    panel = np.zeros((16, 16), np.float32)
    one_row = draw_picture(slices(*[panel] * PANELS_PER_ROW))
    two_rows = draw_picture(slices(*[panel] * (PANELS_PER_ROW + 1)))
    assert two_rows.shape[1] == one_row.shape[1]
    assert two_rows.shape[0] > one_row.shape[0] + MIN_EDGE


def test_overlap_scale_is_zero_to_one_in_every_panel() -> None:
    half = Panel("half", np.full((2, 2), 0.5, np.float32))
    other = Panel("other", np.array([[0.5, 1.0], [0.0, -2.0]], np.float32))
    drawn = draw_picture(Picture("overlap", (half, other)))
    width = 64 + 2 * 52 + 1
    cells = []
    for panel in range(2):
        x, y = 12 + panel * (width + 14) + 64 + 5, 12 + 27 + 42 + 5  # a corner without digits
        cells.append([drawn[y + 34 * row, x + 52 * column] for row in (0, 1) for column in (0, 1)])
    assert all((cell == cells[0][0]).all() for cell in cells[0])
    assert (cells[1][0] == cells[0][0]).all()
    assert (cells[1][2] == 255).all()  # nothing shared: white
    assert (cells[1][3] == 255).all()  # below the scale: as 0
    assert cells[1][1].sum() < cells[0][0].sum() < 3 * 255


def test_numbers_differ_between_cells_of_equal_colour() -> None:
    def drawn(value: float) -> NDArray[np.uint8]:
        return draw_picture(Picture("overlap", (Panel("x", np.full((1, 1), value, np.float32)),)))

    assert not np.array_equal(drawn(-0.25), drawn(-0.5))
    assert np.array_equal(drawn(-0.001), drawn(0.0))  # no "-0.00"


def test_wide_heat_maps_stand_below_each_other() -> None:
    narrow = Panel("n", np.zeros((4, 8), np.float32))
    wide = Panel("w", np.zeros((4, 16), np.float32))
    beside = draw_picture(Picture("overlap", (narrow, narrow)))
    below = draw_picture(Picture("overlap", (wide, wide)))
    assert beside.shape[1] < below.shape[1] + 8 * 52
    assert below.shape[0] > beside.shape[0] + 4 * 34


def test_long_names_are_cut_and_do_not_widen_the_picture() -> None:
    values = np.zeros((16, 16), np.float32)
    short = draw_picture(Picture("slices", (Panel("a", values),)))
    assert draw_picture(Picture("slices", (Panel("name" * 40, values),))).shape == short.shape


def test_picture_without_panels_is_refused() -> None:
    with pytest.raises(ValueError, match="one panel"):
        draw_picture(Picture("slices", ()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_slice_panel_is_the_middle_of_the_first_channel(dtype: torch.dtype) -> None:
    volume = torch.arange(2 * 5 * 3 * 4).reshape(2, 5, 3, 4).to(dtype).requires_grad_()
    panel = slice_panel("x", volume)
    assert panel.values.dtype == np.float32
    assert np.array_equal(panel.values, np.arange(24, 36).reshape(3, 4))


def test_slice_panel_hides_voxels_and_leaves_the_volume_alone() -> None:
    volume = np.ones((1, 3, 2, 2), np.float32)
    hidden = np.zeros((3, 2, 2), bool)
    hidden[1, 0, 1] = True
    for mask in (hidden, torch.from_numpy(hidden), hidden.astype(np.uint8)):
        panel = slice_panel("x", volume, mask)
        assert np.isnan(panel.values).tolist() == [[False, True], [False, False]]
    assert (volume == 1).all()


def test_written_picture_is_the_drawn_one(tmp_path: Path) -> None:
    picture = slices(np.random.default_rng(0).normal(size=(16, 16)))
    path = picture_path(tmp_path, 41, 0)
    write_picture(path, picture)
    assert path == tmp_path / "pictures" / "step-00000041-0.png"
    assert np.array_equal(np.asarray(Image.open(path)), draw_picture(picture))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_pictures_are_found_in_the_order_of_steps(tmp_path: Path) -> None:
    assert find_pictures(tmp_path) == []
    (tmp_path / "pictures").mkdir()
    for step, sample in ((1000, 0), (9, 1), (9, 0), (123456789, 2)):
        picture_path(tmp_path, step, sample).touch()
    for name in ("step-x-1.png", "other.png", "step-00000009-0.png.txt"):
        (tmp_path / "pictures" / name).touch()
    found = [(picture.step, picture.sample) for picture in find_pictures(tmp_path)]
    assert found == [(9, 0), (9, 1), (1000, 0), (123456789, 2)]
