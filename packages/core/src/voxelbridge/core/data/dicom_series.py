"""Frames of one series to the volumes it holds: split by what differs, each checked as a stack.

Image type, b-value and echo time part volumes wherever they differ; time, acquisition and the
order of the files do where positions repeat.
"""

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.data.dicom_duplicates import duplicate_text, one_of_each, without_copies
from voxelbridge.core.data.dicom_headers import Frame
from voxelbridge.core.data.dicom_stack import (
    Stack,
    StackError,
    check_allowances,
    mixed_text,
    plane_axes,
    same_plane,
    stack,
)
from voxelbridge.core.data.volume import FloatArray

SAME_POSITION_MM = 0.01
ECHO_TOLERANCE = 0.02  # relative: makers round an echo time differently from slice to slice

Mark = tuple[str, str]  # what a volume is split by: ("b", "50"), ("te", "4.6"), ...
MARK_WORDS = {"kind": "image types", "b": "b-values", "te": "echo times"}


@dataclass(frozen=True)
class Part:
    """One volume of a series: its marks and its stack, or the reason why it is none."""

    marks: tuple[Mark, ...]
    frames: tuple[Frame, ...]
    result: "Stack | str"


def volumes_of(frames: Sequence[Frame], *, allow: Collection[str] = ()) -> list[Part]:
    """The volumes of one series, each with the marks it was split by (none for a plain series)."""
    allowed = check_allowances(allow)
    ordered = sorted(frames, key=lambda frame: (frame.name, frame.number))
    parts: list[Part] = []
    try:
        groups = _split_by_marks(without_copies(ordered, allowed))
    except StackError as problem:
        return [Part((), tuple(ordered), str(problem))]
    for marks, members in groups:
        try:
            for more, stackable in _split_repeats(members, marks, allowed):
                parts.append(_part(more, stackable, allowed))
        except StackError as problem:
            parts.append(Part(marks, tuple(members), str(problem)))
    return parts


def _part(marks: tuple[Mark, ...], frames: list[Frame], allowed: frozenset[str]) -> Part:
    try:
        return Part(marks, tuple(frames), stack(frames, allow=allowed))
    except StackError as problem:
        return Part(marks, tuple(frames), str(problem))


def _split_by_marks(frames: list[Frame]) -> list[tuple[tuple[Mark, ...], list[Frame]]]:
    """By kind of image, b-value and echo time, wherever they differ."""
    groups: list[tuple[tuple[Mark, ...], list[Frame]]] = [((), frames)]
    for name, key in (("kind", _kind), ("b", _b_value), ("te", _echo_key(frames))):
        divided: list[tuple[tuple[Mark, ...], list[Frame]]] = []
        for marks, members in groups:
            by_value = _grouped(members, key)
            if len(by_value) > 1:
                _check_not_interleaved(list(by_value.values()), name)
                divided += [((*marks, (name, str(v))), found) for v, found in by_value.items()]
            else:
                divided.append((marks, members))
        groups = divided
    return groups


def _split_repeats(
    frames: list[Frame], marks: tuple[Mark, ...], allowed: frozenset[str]
) -> list[tuple[tuple[Mark, ...], list[Frame]]]:
    """By plane (if allowed) and, where positions repeat, by time, acquisition or order."""
    planes = _planes(frames)
    if len(planes) > 1:
        if "mixed_geometry" not in allowed:
            raise StackError(mixed_text(planes))
        return [
            part
            for number, members in enumerate(planes, start=1)
            for part in _split_repeats(members, (*marks, ("plane", str(number))), allowed)
        ]
    places = _places(frames)
    if len(places) < 2 or np.bincount(places).max() == 1:
        return [(marks, frames)]
    for name, key in _REPEAT_KEYS:
        groups = _grouped(frames, key)
        if len(groups) > 1 and _divides(frames, places, groups.values(), strict=name != "t"):
            return [
                part
                for number, (value, members) in enumerate(groups.items(), start=1)
                for part in _split_repeats(
                    members,
                    (*marks, (name, _shown(name, value, number))),
                    allowed,
                )
            ]
    repeats = _in_order(frames, places)
    if repeats is not None:
        return [((*marks, ("r", str(n))), members) for n, members in enumerate(repeats, start=1)]
    if "duplicate" in allowed:
        kept = one_of_each(frames, places)
        if kept is not None:
            return [(marks, kept)]
    raise StackError(duplicate_text(frames, places, allowed))


def _shown(name: str, value: Hashable, number: int) -> str:
    """The value of a mark in names; long texts and broken numbers are counted instead."""
    if name in ("type", "trigger"):
        return str(number)
    return "none" if value is None else str(value)


def _kind(frame: Frame) -> str:
    return frame.marks.kind or "other"


def _b_value(frame: Frame) -> str:
    return "none" if frame.marks.b_value is None else str(frame.marks.b_value)


def _echo_key(frames: Sequence[Frame]) -> Callable[[Frame], str]:
    """The echo time in ms, the same text for times that differ by rounding only."""
    times = sorted({frame.marks.echo_time_ms or 0.0 for frame in frames})
    leader: dict[float, str] = {}
    first = times[0]
    for time in times:
        first = time if time > first * (1 + ECHO_TOLERANCE) else first
        leader[time] = f"{first:.6g}"
    return lambda frame: leader[frame.marks.echo_time_ms or 0.0]


# Tried in this order where positions repeat; each must divide the repeats evenly.
_REPEAT_KEYS: tuple[tuple[str, Callable[[Frame], Hashable]], ...] = (
    ("folder", lambda frame: PurePosixPath(frame.name).parent.name),
    ("t", lambda frame: frame.marks.temporal),
    ("echo", lambda frame: frame.marks.echo_number),
    ("type", lambda frame: frame.marks.image_type),
    ("acq", lambda frame: frame.marks.acquisition),
    ("trigger", lambda frame: frame.marks.trigger_ms),
)


def _grouped(
    frames: Sequence[Frame], key: Callable[[Frame], Hashable]
) -> dict[Hashable, list[Frame]]:
    """Frames by value, numbers in their order; the missing value comes first."""
    groups: dict[Hashable, list[Frame]] = {}
    for frame in frames:
        groups.setdefault(key(frame), []).append(frame)
    return dict(sorted(groups.items(), key=lambda item: _sorting_key(item[0])))


def _sorting_key(value: Hashable) -> tuple[int, float, str]:
    try:
        return (1, float(str(value)), "")
    except ValueError:
        return (0 if value is None else 2, 0.0, str(value))


def _divides(
    frames: Sequence[Frame],
    places: NDArray[np.int64],
    groups: Collection[list[Frame]],
    *,
    strict: bool,
) -> bool:
    """Whether the groups part the repeats: the same places in each, or (not strict) none twice."""
    place = {id(frame): int(n) for frame, n in zip(frames, places, strict=True)}
    counts = [Counter(place[id(frame)] for frame in members) for members in groups]
    if not strict:
        return all(max(count.values()) == 1 for count in counts)
    return all(count == counts[0] for count in counts)


def _in_order(frames: Sequence[Frame], places: NDArray[np.int64]) -> list[list[Frame]] | None:
    """Repeats told apart by instance number alone: as many frames at each place, or None."""
    counts = np.bincount(places)
    at_place: list[list[Frame]] = [[] for _ in counts]
    for frame, place in zip(frames, places, strict=True):
        at_place[place].append(frame)
    for members in at_place:
        numbers = {(frame.instance_number, frame.number) for frame in members}
        if len(members) != counts[0] or len(numbers) < len(members) or len(counts) < 2:
            return None
        if any(frame.instance_number is None for frame in members):
            return None
        members.sort(key=lambda frame: (frame.instance_number or 0, frame.number))
    return [[members[n] for members in at_place] for n in range(int(counts[0]))]


def _planes(frames: Sequence[Frame]) -> list[list[Frame]]:
    """Frames by matrix, pixel spacing and orientation, in order of their first file."""
    planes: list[list[Frame]] = []
    for frame in frames:
        for plane in planes:
            if same_plane(plane[0], frame):
                plane.append(frame)
                break
        else:
            planes.append([frame])
    return planes


def _depths(frames: Sequence[Frame]) -> FloatArray:
    """Positions along the first frame's normal in mm."""
    return np.array([frame.position_mm for frame in frames]) @ plane_axes(frames[0])[2]


def _places(frames: Sequence[Frame]) -> NDArray[np.int64]:
    """The rank of each frame's position along the normal; equal positions share one."""
    depths = _depths(frames)
    order = np.argsort(depths, kind="stable")
    ranks = np.zeros(len(frames), dtype=np.int64)
    ranks[order[1:]] = np.cumsum(np.diff(depths[order]) > SAME_POSITION_MM)
    return ranks


def _check_not_interleaved(groups: Sequence[Sequence[Frame]], name: str) -> None:
    """A mark that changes from slice to slice of one stack does not part volumes."""
    depths = [_depths(group) for group in groups]
    for n, low in enumerate(depths):
        for m in range(n):
            if not same_plane(groups[n][0], groups[m][0]):
                continue
            other = depths[m]
            if low.min() < other.max() and other.min() < low.max() and not _share(low, other):
                raise StackError(
                    f"slices of different {MARK_WORDS[name]} alternate and share no position "
                    f"({groups[m][0].name}, {groups[n][0].name})"
                )


def _share(one: FloatArray, other: FloatArray) -> bool:
    """Whether a position of one stack is a position of the other."""
    ordered = np.sort(other)
    first = np.searchsorted(ordered, one - SAME_POSITION_MM, side="left")
    last = np.searchsorted(ordered, one + SAME_POSITION_MM, side="right")
    return bool((last > first).any())
