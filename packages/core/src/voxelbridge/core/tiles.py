"""Windows that cover a volume: where a network with a fixed patch size looks."""

from collections.abc import Iterator, Sequence
from itertools import product

Triple = tuple[int, int, int]


def tile_starts(size: int, patch: int, *, overlap: float = 0.5) -> list[int]:
    """First voxels of the windows along one axis, increasing, without repeats.

    nnDetection's symmetric grid: windows step by patch minus overlap, centred on the axis; those
    that stick out are moved inside. An axis shorter than the patch gets one window at 0, which the
    caller pads.
    """
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
