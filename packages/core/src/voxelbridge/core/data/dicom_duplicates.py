"""Slices that are there twice: found, and dropped where that is allowed and they are identical."""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.data.dicom_headers import Frame
from voxelbridge.core.data.dicom_stack import StackError, hint, listed


def without_copies(frames: list[Frame], allowed: frozenset[str]) -> list[Frame]:
    """Frames without second files of one instance; those are refused unless allowed."""
    by_instance: dict[tuple[str, int], Frame] = {}
    kept: list[Frame] = []
    for frame in frames:
        key = (frame.instance_uid, frame.number)
        other = by_instance.setdefault(key, frame) if frame.instance_uid else frame
        if other is frame:
            kept.append(frame)
        elif "duplicate" not in allowed:
            raise StackError(
                f"duplicate: {frame.name} is the same instance as {other.name}; remove one"
                + hint("duplicate")
            )
        elif _content(frame) != _content(other):
            raise StackError(
                f"duplicate: {frame.name} and {other.name} claim one instance, with other content"
            )
    return kept


def one_of_each(frames: Sequence[Frame], places: NDArray[np.int64]) -> list[Frame] | None:
    """One frame per place, or None where frames of a place differ in content."""
    kept: dict[int, Frame] = {}
    for frame, place in zip(frames, places, strict=True):
        other = kept.setdefault(int(place), frame)
        if other is not frame and _content(other) != _content(frame):
            return None
    return list(kept.values())


def duplicate_text(
    frames: Sequence[Frame], places: NDArray[np.int64], allowed: frozenset[str]
) -> str:
    """Why slices at one position are refused, with their files."""
    counts = np.bincount(places)
    place = int(counts.argmax())
    names = [frame.name for frame, n in zip(frames, places, strict=True) if n == place]
    more = int((counts > 1).sum()) - 1
    other = f", and at {more} other positions" if more else ""
    text = f"duplicate positions: {listed(names)} lie at one position{other}"
    if "duplicate" in allowed:
        return f"{text}, with different content"
    return f"{text}; keep one of them" + hint("duplicate")


def _content(frame: Frame) -> tuple[Hashable, bytes]:
    """What decides about the voxels of a frame, without decoding them."""
    layout = frame.pixels
    with frame.path.open("rb") as stream:
        stream.seek(layout.start)
        raw = stream.read(layout.num_bytes)
    return (frame.number, frame.rescale, layout.transfer_syntax, layout.signed), raw
