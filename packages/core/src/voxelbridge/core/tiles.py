"""Windows that cover a volume: where a network with a fixed patch size looks."""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Triple = tuple[int, int, int]


class Sliceable(Protocol):
    """A normalised volume (C, D, H, W) that is read window by window: an array, a memory map."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: Any, /) -> Any: ...  # Any: tuples of slices -> arrays


def tile_starts(size: int, patch: int, *, overlap: float = 0.5) -> list[int]:
    """First voxels of the windows along one axis, increasing, without repeats.

    nnDetection's symmetric grid: windows step by patch minus overlap, centred on the axis; those
    that stick out are moved inside. An axis shorter than the patch gets one window at 0, which the
    caller pads. `overlap` is a part of the patch, below 1.
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap: got {overlap}, expected 0 or more and below 1")
    if size <= patch:
        return [0]
    step = patch - int(patch * overlap)
    start = (size % step - patch) // 2
    starts = []
    while True:
        starts.append(min(max(start, 0), size - patch))
        if start + patch >= size:
            return sorted(set(starts))
        start += step


def tiles(shape: Sequence[int], patch: Triple, *, overlap: float = 0.5) -> Iterator[Triple]:
    """First voxels (z, y, x) of all windows over a volume of `shape`, z slowest."""
    z, y, x = (
        tile_starts(size, edge, overlap=overlap) for size, edge in zip(shape, patch, strict=True)
    )
    yield from product(z, y, x)


def padded_tiles(shape: Sequence[int], patch: Triple, *, overlap: float = 0.5) -> Iterator[Triple]:
    """As `tiles`; an axis shorter than the patch is centred in it, as in training (start < 0)."""
    z, y, x = (
        -((edge - extent) // 2) if extent < edge else 0
        for extent, edge in zip(shape, patch, strict=True)
    )
    for a, b, c in tiles(shape, patch, overlap=overlap):
        yield a + z, b + y, c + x


def read_window(image: Sliceable, start: Triple, size: Triple) -> NDArray[np.float32]:
    """The window (C, *size) of (C, D, H, W) at `start`, 0 outside (the mean after z-scoring)."""
    inside = tuple(
        slice(max(begin, 0), max(begin + edge, 0)) for begin, edge in zip(start, size, strict=True)
    )
    window = image[(slice(None), *inside)]
    pads = [(0, 0)]
    for begin, edge, found in zip(start, size, window.shape[1:], strict=True):
        before = min(max(-begin, 0), edge - found)
        pads.append((before, edge - before - found))
    return np.pad(window, pads) if window.shape[1:] != size else window
