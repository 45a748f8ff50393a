"""Slices of the case images as 8-bit pictures that a report page carries inside itself.

A small volume is embedded whole, as one montage of all its axial slices, from which the page cuts
the other planes. Of a large volume only the planes through the middle of objects are embedded.
"""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from voxelbridge.core.errors import DataError

IMAGE_BUDGET = 4_500_000  # characters of all pictures in one page
CASE_BUDGET_MIN = 150_000  # characters: with less a case would show a slice or two
MAX_SIDE = 320  # pixels of one slice; larger ones are averaged down
TILE_GRID = 16  # JPEG blocks of two tiles of a montage must not mix
MONTAGE_WIDTH = 2048  # pixels, far below every browser's limit
JPEG_QUALITY = 88
WINDOW_PERCENTILES = (0.5, 99.5)

Planes = Sequence[tuple[int, int]]  # (array axis 0 z, 1 y, 2 x; index along it)
Array = NDArray[Any]


@dataclass(frozen=True)
class CaseImage:
    """A test case whose pixels the report may show.

    `load()` gives the array (C, D, H, W) or (D, H, W) on the grid of the tables' boxes and its
    spacing (z, y, x) in mm; it is called at most once.
    """

    case_id: str
    load: Callable[[], tuple[Array, Sequence[float]]]


@dataclass(frozen=True)
class CasePictures:
    """What the page knows of one case; `content` is JSON-able, `left_out` counts planes that were
    asked for and did not fit."""

    content: dict[str, Any]
    left_out: int


def case_pictures(
    image: CaseImage, planes: Planes, *, extra: Planes = (), budget: int
) -> CasePictures:
    """Pictures of `image` in at most `budget` characters: the whole volume, or the first planes.

    `planes` come in order of importance; `extra` ones fill what room is left. Channel 0 is shown,
    windowed to its 0.5 and 99.5 percentiles.
    """
    array, spacing = image.load()
    volume = _channel_zero(np.asarray(array), image.case_id)
    grey, limits = _to_grey(volume)
    stacks, left_out = _whole_volume(grey, budget), 0
    if stacks is None:
        stacks = _chosen_planes(grey, [*planes, *extra], budget)
        shown = {(stack["axis"], stack["indices"][0]) for stack in stacks}
        left_out = len(_inside(planes, grey.shape) - shown)
    content = {
        "shape": list(volume.shape),
        "spacing": [float(step) for step in spacing],
        "channels": 1 if np.ndim(array) == 3 else int(np.shape(array)[0]),
        "limits": list(limits),
        "window": list(_tissue_window(grey)),
        "stacks": stacks,
    }
    return CasePictures(content, left_out)


def pictures_size(content: dict[str, Any]) -> int:
    """Characters that the pictures of one case take in the page."""
    return sum(len(stack["image"]) for stack in content["stacks"])


def _channel_zero(array: Array, case_id: str) -> Array:
    volume = array[0] if array.ndim == 4 and array.shape[0] else array
    if volume.ndim != 3 or not volume.size:
        raise DataError(
            f"case {case_id}: image of shape {array.shape} cannot be shown, "
            f"expected (C, D, H, W) or (D, H, W) with at least one voxel"
        )
    return volume


def _to_grey(volume: Array) -> tuple[NDArray[np.uint8], tuple[float, float]]:
    """8-bit volume and the intensities that became 0 and 255; voxels that are not finite are 0."""
    values = volume.astype(np.float32)
    finite = np.isfinite(values)
    if not finite.any():
        return np.zeros(volume.shape, np.uint8), (0.0, 1.0)
    low, high = (float(v) for v in np.percentile(values[finite], WINDOW_PERCENTILES))
    if high <= low:
        high = low + 1.0
    scaled = np.where(finite, (values - low) / (high - low), 0.0)
    return np.rint(np.clip(scaled, 0, 1) * 255).astype(np.uint8), (low, high)


def _tissue_window(grey: NDArray[np.uint8]) -> tuple[int, int]:
    """Grey levels first shown as black and white: the foreground's range, by Otsu's threshold.

    Half of a CT is air; shown in full range its soft tissues would all look alike.
    """
    counts = np.bincount(grey.ravel(), minlength=256).astype(np.float64)
    below, levels = np.cumsum(counts), np.arange(256)
    moment = np.cumsum(counts * levels)
    above = below[-1] - below
    valid = (below > 0) & (above > 0)
    if not valid.any():
        return 0, 255
    mean_below = moment / np.maximum(below, 1)
    mean_above = (moment[-1] - moment) / np.maximum(above, 1)
    between = np.where(valid, below * above * (mean_above - mean_below) ** 2, -1.0)
    foreground = grey[grey > int(between.argmax())]
    low, high = (int(v) for v in np.percentile(foreground, WINDOW_PERCENTILES))
    return max(0, low - (high - low) // 8), max(high, low + 1)


def _whole_volume(grey: NDArray[np.uint8], budget: int) -> list[dict[str, Any]] | None:
    if grey.size > 8 * budget or max(grey.shape[1:]) > MAX_SIDE:
        return None  # no JPEG gets below an eighth of a byte per voxel with readable lesions
    for lossless in (True, False):
        stack = _stack(0, list(range(grey.shape[0])), list(grey), lossless=lossless)
        if len(stack["image"]) <= budget:
            return [{**stack, "whole": True}]
    return None


def _chosen_planes(grey: NDArray[np.uint8], planes: Planes, budget: int) -> list[dict[str, Any]]:
    stacks: list[dict[str, Any]] = []
    spent, inside = 0, _inside(planes, grey.shape)
    for axis, index in dict.fromkeys(planes):
        if (axis, index) not in inside:
            continue
        tile = _reduced(np.moveaxis(grey, axis, 0)[index])
        stack = _stack(axis, [index], [tile], lossless=False)
        if spent + len(stack["image"]) > budget:
            break
        spent += len(stack["image"])
        stacks.append(stack)
    return stacks


def _inside(planes: Planes, shape: Sequence[int]) -> set[tuple[int, int]]:
    return {(axis, index) for axis, index in planes if 0 <= index < shape[axis]}


def _reduced(plane: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if max(plane.shape) <= MAX_SIDE:
        return plane
    factor = MAX_SIDE / max(plane.shape)
    height, width = (max(1, round(side * factor)) for side in plane.shape)
    return np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BOX))


def _stack(
    axis: int, indices: list[int], tiles: list[NDArray[np.uint8]], *, lossless: bool
) -> dict[str, Any]:
    """One picture with equal tiles in rows, and what the page needs to find a tile in it."""
    height, width = tiles[0].shape
    pitch_y, pitch_x = ((side + TILE_GRID - 1) // TILE_GRID * TILE_GRID for side in (height, width))
    columns = max(1, min(len(tiles), MONTAGE_WIDTH // pitch_x))
    rows = -(-len(tiles) // columns)
    canvas = np.zeros((rows * pitch_y, columns * pitch_x), np.uint8)
    for number, tile in enumerate(tiles):
        padded = np.pad(tile, ((0, pitch_y - height), (0, pitch_x - width)), mode="edge")
        y, x = number // columns * pitch_y, number % columns * pitch_x
        canvas[y : y + pitch_y, x : x + pitch_x] = padded
    return {
        "axis": axis,
        "indices": indices,
        "tile": [height, width],
        "pitch": [pitch_y, pitch_x],
        "columns": columns,
        "whole": False,
        "image": _data_uri(canvas, lossless=lossless),
    }


def _data_uri(pixels: NDArray[np.uint8], *, lossless: bool) -> str:
    stream, picture = io.BytesIO(), Image.fromarray(pixels)
    if lossless:
        picture.save(stream, "PNG", optimize=True)
    else:
        picture.save(stream, "JPEG", quality=JPEG_QUALITY)
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
