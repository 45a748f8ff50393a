"""A label map over its image, as a picture to look at: three axial slices with their labels named.

Slices lie as radiologists look at them: the patient's right is on the left, the front at the top.
"""

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from voxelbridge.core.data.volume import Grid, reorientation_to_lps
from voxelbridge.core.drawing import (
    GAP,
    MARGIN,
    RGB,
    beside,
    colour_key,
    grey_window,
    page_of,
    rows_of,
    swatch,
    titled,
)
from voxelbridge.core.files import atomic_write

NUM_SLICES = 3
EDGE = 400  # pixels of a slice's longer edge
OPACITY = 0.4  # of a label's inside; its border is opaque
MAX_KEYS = 24  # labels named below the slices
GOLDEN_ANGLE = 0.381966  # of a full turn: neighbours in a list get colours far apart


def write_overlay(
    path: Path,
    image: NDArray[Any],
    labels: NDArray[np.integer[Any]],
    *,
    grid: Grid,
    names: Mapping[int, str],
) -> None:
    """Writes the PNG of a label map (D, H, W) over an image (D, H, W) on one `grid`, atomically.

    `names` of the label ids, in an order that decides their colours.
    """
    picture = draw_overlay(image, labels, grid=grid, names=names)
    with atomic_write(path) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG", optimize=True)


def draw_overlay(
    image: NDArray[Any],
    labels: NDArray[np.integer[Any]],
    *,
    grid: Grid,
    names: Mapping[int, str],
) -> RGB:
    """The picture as (H, W, 3) bytes."""
    reorientation = reorientation_to_lps(grid)
    image, labels = reorientation.apply_array(image), reorientation.apply_array(labels)
    _, height_mm, width_mm = reorientation.apply_grid(grid).spacing_mm
    chosen = choose_slices(labels)
    colours = label_colours(list(names))
    shown = np.stack([image[number] for number in chosen]).astype(np.float32)
    low, high = grey_window(shown)
    tiles = []
    for number, values in zip(chosen, shown, strict=True):
        rows, columns = values.shape
        factor = EDGE / max(rows * height_mm, columns * width_mm)
        size = (
            max(1, round(columns * width_mm * factor)),
            max(1, round(rows * height_mm * factor)),
        )
        grey = np.nan_to_num(np.clip((values - low) / (high - low), 0, 1))
        base = Image.fromarray(np.rint(grey * 255).astype(np.uint8)).resize(
            size, Image.Resampling.BILINEAR
        )
        drawn = _coloured(np.asarray(base), _resized(labels[number], size), colours)
        tiles.append(titled(f"slice {number + 1} of {len(labels)}", drawn))
    width = sum(tile.width + GAP for tile in tiles) - GAP
    grey_key = colour_key(np.arange(0, 256, 4, dtype=np.uint8)[:, None].repeat(3, 1), low, high)
    keys = _label_keys([labels[number] for number in chosen], names, colours)
    return page_of([*rows_of(tiles, per_row=NUM_SLICES), *_wrapped(keys, width)], [grey_key])


def choose_slices(labels: NDArray[np.integer[Any]]) -> list[int]:
    """Up to three slices (first axis) of a label map, increasing.

    The labelled voxels are cut into three equal parts along the axis; of the middle of each part
    the slice with the most labels is taken, among equals the one with the most labelled voxels.
    Without a label the quarters of the volume.
    """
    counts = np.array([np.count_nonzero(plane) for plane in labels])
    if not counts.any():
        return sorted({len(labels) * part // 4 for part in (1, 2, 3)})
    # Where the slice's voxels lie among all of them, from 0 to the number of parts.
    place = (np.cumsum(counts) - counts / 2) * NUM_SLICES / counts.sum()
    chosen = []
    for part in range(NUM_SLICES):
        distance = np.where(counts > 0, abs(place - part - 0.5), np.inf)
        # The middle, so that slices of neighbouring parts are not neighbours.
        members = np.flatnonzero(distance < 0.25)
        if not len(members):
            members = np.flatnonzero(distance <= 0.5)[:1]
        if len(members):
            variety = [(len(np.unique(labels[m])), counts[m], -m) for m in members]
            chosen.append(-max(variety)[2])
    return sorted({int(number) for number in chosen})


def label_colours(ids: Sequence[int]) -> dict[int, NDArray[np.uint8]]:
    """A colour (3,) for each label id by its place among `ids`."""
    colours = {}
    for place, number in enumerate(ids):
        hue, lightness = (place * GOLDEN_ANGLE) % 1.0, (0.52, 0.66, 0.42)[place % 3]
        rgb = colorsys.hls_to_rgb(hue, lightness, 0.9)
        colours[number] = np.rint(np.array(rgb) * 255).astype(np.uint8)
    return colours


def _resized(labels: NDArray[np.integer[Any]], size: tuple[int, int]) -> NDArray[np.integer[Any]]:
    """The nearest labels of (H, W) at `size` (width, height)."""
    width, height = size
    rows = (np.arange(height) + 0.5) * labels.shape[0] / height
    columns = (np.arange(width) + 0.5) * labels.shape[1] / width
    return labels[np.ix_(rows.astype(int), columns.astype(int))]


def _coloured(
    grey: NDArray[np.uint8],
    labels: NDArray[np.integer[Any]],
    colours: Mapping[int, NDArray[np.uint8]],
) -> RGB:
    drawn = grey[..., None].repeat(3, 2).astype(np.float32)
    padded = np.pad(labels, 1, mode="edge")
    neighbours = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    border = np.any([labels != other for other in neighbours], axis=0)
    for number in np.unique(labels[labels > 0]):
        own = labels == number
        weight = np.where(border, 1.0, OPACITY)[own][:, None]
        drawn[own] = drawn[own] * (1 - weight) + colours[int(number)] * weight
    return np.rint(drawn).astype(np.uint8)


def _label_keys(
    planes: Sequence[NDArray[np.integer[Any]]],
    names: Mapping[int, str],
    colours: Mapping[int, NDArray[np.uint8]],
) -> list[Image.Image]:
    """The labels on the slices in the order of `names`; the largest where they are too many."""
    found, counts = np.unique(np.concatenate([p.reshape(-1) for p in planes]), return_counts=True)
    sizes = {int(n): int(c) for n, c in zip(found, counts, strict=True) if n > 0}
    largest = sorted(sizes, key=lambda number: -sizes[number])[:MAX_KEYS]
    keys = [swatch(colours[number], names[number]) for number in names if number in largest]
    paper = np.full(3, 255, np.uint8)
    if not sizes:
        keys.append(swatch(paper, "no label on these slices"))
    if len(sizes) > MAX_KEYS:
        keys.append(swatch(paper, f"and {len(sizes) - MAX_KEYS} smaller ones"))
    return keys


def _wrapped(keys: Sequence[Image.Image], width: int) -> list[Image.Image]:
    """Keys from left to right in rows no wider than `width` pixels (or one key)."""
    rows: list[list[Image.Image]] = [[]]
    for key in keys:
        used = sum(other.width + MARGIN for other in rows[-1])
        if rows[-1] and used + key.width > width:
            rows.append([])
        rows[-1].append(key)
    return [beside(row, gap=MARGIN) for row in rows]
