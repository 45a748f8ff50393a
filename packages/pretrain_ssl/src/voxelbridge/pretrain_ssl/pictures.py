"""Pictures of a run: drawn from their panels, written, found again.

    write_picture(picture_path(run, step, 0), picture)          # PNG, shown by `vb-ssl report`
    board.add_image("sample0", draw_picture(picture), step, dataformats="HWC")

A panel's voxel is hidden where its value is NaN: it is drawn in a flat blue that no grey is.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from voxelbridge.core.drawing import (
    GAP,
    INK,
    PAPER,
    RGB,
    SOFT,
    TEXT,
    colour_key,
    font_of,
    grey_window,
    page_of,
    rows_of,
    swatch,
    titled,
)
from voxelbridge.core.files import atomic_write
from voxelbridge.pretrain_ssl.panels import Panel, Picture

PICTURE_FOLDER = "pictures"  # in the run directory
PANELS_PER_ROW = 4
MIN_EDGE = 288  # pixels of a panel's longer edge; smaller slices are enlarged by whole factors
CELL = (34, 52)  # pixels (height, width) of a heat map's cell: room for "-0.25"
MAX_ROW_WIDTH = 1200  # pixels: wider heat maps stand below each other

HIDDEN = (64, 106, 163)
# Overlap 0 .. 1 from white over light to dark blue, evenly spaced.
SHARES = np.array([[255, 255, 255], [178, 212, 236], [84, 155, 208], [18, 92, 165], [8, 42, 88]])


class StoredPicture(NamedTuple):
    """A picture of a run directory: the one of validation sample `sample` at `step`."""

    step: int
    sample: int
    path: Path


def picture_path(run: Path, step: int, sample: int) -> Path:
    """Where the picture of validation sample `sample` at `step` belongs in a run directory."""
    return run / PICTURE_FOLDER / f"step-{step:08d}-{sample}.png"


def find_pictures(run: Path) -> list[StoredPicture]:
    """The pictures of a run directory by step and sample; none where nothing was drawn yet."""
    found = []
    for path in (run / PICTURE_FOLDER).glob("step-*.png"):
        match = re.fullmatch(r"step-(\d+)-(\d+)\.png", path.name)
        if match:
            found.append(StoredPicture(int(match[1]), int(match[2]), path))
    return sorted(found)


def write_picture(path: Path, picture: Picture) -> None:
    """Writes the picture as PNG, atomically."""
    with atomic_write(path) as temporary:
        Image.fromarray(draw_picture(picture)).save(temporary, format="PNG", optimize=True)


def draw_picture(picture: Picture) -> RGB:
    """The picture as (H, W, 3) bytes, with the panels' names and a key to grey or colour."""
    if not picture.panels:
        raise ValueError("a picture needs one panel at least")
    match picture.kind:
        case "slices":
            return _draw_slices(picture.panels)
        case "overlap":
            return _draw_overlaps(picture.panels)


def _draw_slices(panels: tuple[Panel, ...]) -> RGB:
    low, high = grey_window(panels[0].values)
    longest = max(max(panel.values.shape) for panel in panels)
    scale = -(-MIN_EDGE // longest)
    tiles = [
        titled(panel.name, _grey(panel.values, low, high).repeat(scale, 0).repeat(scale, 1))
        for panel in panels
    ]
    keys = [colour_key(np.linspace(0, 255, 64).astype(np.uint8)[:, None].repeat(3, 1), low, high)]
    if any(np.isnan(panel.values).any() for panel in panels):
        keys.append(swatch(np.array(HIDDEN, np.uint8), "hidden"))
    return page_of(rows_of(tiles, per_row=PANELS_PER_ROW), keys)


def _draw_overlaps(panels: tuple[Panel, ...]) -> RGB:
    tiles = [titled(panel.name, _heat_map(panel.values)) for panel in panels]
    width = sum(tile.width + GAP for tile in tiles) - GAP
    keys = [colour_key(_share_colours(np.linspace(0, 1, 64)), 0.0, 1.0)]
    return page_of(rows_of(tiles, per_row=len(tiles) if width <= MAX_ROW_WIDTH else 1), keys)


def _grey(values: NDArray[np.float32], low: float, high: float) -> RGB:
    shares = np.clip((values.astype(np.float64) - low) / (high - low), 0, 1)
    grey = np.rint(np.nan_to_num(shares) * 255).astype(np.uint8)
    return np.where(np.isnan(values)[..., None], np.array(HIDDEN, np.uint8), grey[..., None])


def _share_colours(shares: NDArray[Any]) -> NDArray[np.uint8]:
    """Colours (..., 3) of shares (...), clipped to 0 .. 1."""
    stops = np.linspace(0, 1, len(SHARES))
    clipped = np.clip(shares, 0, 1)
    channels = [np.interp(clipped, stops, SHARES[:, channel]) for channel in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def _heat_map(values: NDArray[np.float32]) -> RGB:
    """Cells with their numbers, rows and columns numbered from 0."""
    rows, columns = values.shape
    height, width = CELL
    left, top = 64, 42  # room for the numbers of rows and columns, and what they count
    canvas = Image.new("RGB", (left + columns * width + 1, top + rows * height + 1), PAPER)
    draw, font = ImageDraw.Draw(canvas), font_of(TEXT)
    colours = _share_colours(np.nan_to_num(values))
    draw.text((left + columns * width / 2, 8), "base crop", SOFT, font, anchor="mm")
    draw.text((0, top - 14), "target", SOFT, font, anchor="lm")
    for column in range(columns):
        at = (left + (column + 0.5) * width, top - 12)
        draw.text(at, f"{column}", SOFT, font, anchor="mm")
    for row in range(rows):
        y = top + row * height
        draw.text((left - 10, y + height / 2), f"{row}", SOFT, font, anchor="rm")
        for column in range(columns):
            x, value = left + column * width, float(values[row, column])
            fill = HIDDEN if np.isnan(value) else tuple(colours[row, column].tolist())
            draw.rectangle((x, y, x + width, y + height), fill, (216, 221, 227))
            ink = INK if sum(fill) > 380 else PAPER
            at = (x + width / 2, y + height / 2)
            draw.text(at, _number(value), ink, font, anchor="mm")
    return np.asarray(canvas)


def _number(value: float) -> str:
    """Two decimals; a plain 0 for what rounds to it, so that the others stand out."""
    if np.isnan(value):
        return "-"
    text = f"{value:.2f}"
    return "0" if float(text) == 0 else text
