"""Folders of DICOM files to volumes: one per series, several where a series holds several.

Files are found by their content, not by their name; what cannot give a correct volume is refused
with its reason. Case names come from folder names below the searched folder, never from what a
header says about a patient.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from voxelbridge.core.data.case_names import safe_case_id, short_hash
from voxelbridge.core.data.dicom_headers import (
    FILE_ENDINGS,
    Frame,
    Unusable,
    is_dicom,
    read_frames,
)
from voxelbridge.core.data.dicom_pixels import read_stack
from voxelbridge.core.data.dicom_series import Mark, Part, volumes_of
from voxelbridge.core.data.dicom_stack import Stack, check_allowances
from voxelbridge.core.data.file_tree import broken_link, walk_files
from voxelbridge.core.data.volume import Grid, Volume
from voxelbridge.core.errors import DataError

DIRECTORY_FILE = "DICOMDIR"  # names files by paths of its own; the folder itself is searched
SHOWN_UID = 8  # characters of a UID in messages


@dataclass(frozen=True, eq=False)
class DicomVolume:
    """One volume of a series, found and checked but not decoded."""

    case_id: str
    origin_id: str | None  # "dicom:<SeriesInstanceUID>", "#b=50" added when split; None: no UID
    modality: str
    marks: tuple[Mark, ...]  # what it was split by within its series
    stack: Stack

    def __str__(self) -> str:
        return f"case {self.case_id}"

    @property
    def grid(self) -> Grid:
        """The grid of the volume, from the headers."""
        return self.stack.grid

    @property
    def files(self) -> tuple[Path, ...]:
        """The files in slice order, each once."""
        return tuple(dict.fromkeys(frame.path for frame in self.stack.frames))

    def read(self) -> Volume:
        """The volume (1, D, H, W) in what its values measure (HU for CT), int16 or float32.

        Raises DataError. Damaged compressed pixels may end the process: see `map_cases`.
        """
        try:
            return read_stack(self.stack)
        except DataError as error:
            raise DataError(f"case {self.case_id}: {error}") from error


@dataclass(frozen=True)
class Refused:
    """A series, a volume of it or a file that is not read, and why; names no patient."""

    where: str  # folder of the series below the searched one, or the file
    series: str  # shortened UID, "" when unknown
    reason: str

    def __str__(self) -> str:
        if not self.series:
            return f"{self.where}: {self.reason}"
        return f"series {self.where} (UID ...{self.series}): {self.reason}"


@dataclass(frozen=True, eq=False)
class DicomFolder:
    """What a folder holds: volumes sorted by case, refusals, files that are no DICOM images."""

    volumes: tuple[DicomVolume, ...]
    refused: tuple[Refused, ...]
    num_skipped: int


def find_series(folder: Path, *, allow: Collection[str] = ()) -> DicomFolder:
    """All volumes of DICOM images below `folder` (or in one file).

    Hidden files and folders, files that are not DICOM and DICOM objects that are not images are
    passed over and counted; links are followed (`file_tree`). `allow` downgrades
    refusals: "gap" and "varying_spacing" interpolate linearly between neighbouring slices,
    "duplicate" drops slices of identical content, "mixed_geometry" makes a volume of each
    orientation, size and pixel spacing. Raises DataError for a missing folder, ConfigError for an
    unknown allowance.
    """
    check_allowances(allow)
    if not (folder.is_dir() or folder.is_file()):
        state = "is neither a folder nor a file" if folder.exists() else "does not exist"
        raise DataError(f"{folder}: {state}")
    frames: list[Frame] = []
    unusable: list[Unusable] = []
    refused: list[Refused] = []
    num_skipped = 0
    for path, name in _files(folder, refused):
        found = read_frames(path, name=name) if _is_candidate(path) else None
        match found:
            case None:
                num_skipped += 1
            case Unusable():
                unusable.append(found)
            case _:
                frames += found
    root = _shown(folder.resolve().name if folder.is_dir() else folder.stem)
    series = _by_series(frames)
    refused += _refuse_damaged(series, unusable, root)
    volumes: list[DicomVolume] = []
    for base, members in _named_series(series, root):
        for part in volumes_of(members, allow=allow):
            if isinstance(part.result, Stack):
                volumes.append(_volume(base, part, part.result))
            else:
                refused.append(_refusal(members, part, part.result, root))
    return DicomFolder(
        tuple(sorted(_unique(volumes), key=lambda volume: volume.case_id)),
        tuple(sorted(refused, key=str)),
        num_skipped,
    )


def _files(folder: Path, refused: list[Refused]) -> Iterator[tuple[Path, str]]:
    """Regular files of a tree, with their names below it."""
    if not folder.is_dir():
        yield folder, folder.name
        return
    for path in map(Path, walk_files(folder)):
        if path.name.upper() == DIRECTORY_FILE:
            continue
        shown = _shown(path.relative_to(folder).as_posix())
        if reason := broken_link(path):
            refused.append(Refused(shown, "", reason))
        elif path.is_file():
            yield path, shown


def _is_candidate(path: Path) -> bool:
    try:
        return is_dicom(path) or path.suffix.lower() in FILE_ENDINGS
    except OSError:
        return True  # reading it gives the reason


def _by_series(frames: Sequence[Frame]) -> dict[tuple[str, ...], list[Frame]]:
    """Frames by SeriesInstanceUID; without one by folder, modality and number of the series."""
    series: dict[tuple[str, ...], list[Frame]] = {}
    for frame in frames:
        folder = str(PurePosixPath(frame.name).parent)
        number = "" if frame.series_number is None else str(frame.series_number)
        key = (frame.series_uid,) if frame.series_uid else (folder, frame.modality, number)
        series.setdefault(key, []).append(frame)
    return series


def _refuse_damaged(
    series: dict[tuple[str, ...], list[Frame]], unusable: Sequence[Unusable], root: str
) -> list[Refused]:
    """Takes series with a damaged file out of `series`: without that slice they are not whole.

    A damaged file without a readable UID counts to the series of its folder if there is just one.
    """
    beside: dict[PurePosixPath, set[tuple[str, ...]]] = {}
    for key, frames in series.items():
        for name in _names(frames):
            beside.setdefault(name.parent, set()).add(key)
    damaged: dict[tuple[str, ...], list[Unusable]] = {}
    for problem in unusable:
        key = (problem.series_uid,)
        if not problem.series_uid:
            neighbours = beside.get(PurePosixPath(problem.name).parent, set())
            key = next(iter(neighbours)) if len(neighbours) == 1 else ("", problem.name)
        damaged.setdefault(key, []).append(problem)
    refused: list[Refused] = []
    for key, problems in damaged.items():
        frames = series.pop(key, [])
        first = problems[0]
        names = [PurePosixPath(item.name) for item in (*problems, *frames)]
        uid = frames[0].series_uid if frames else first.series_uid
        text = f"{first.name} {first.reason}"
        if len(problems) > 1:
            text += f", and {len(problems) - 1} more files of the series are damaged"
        if frames or uid:
            refused.append(Refused(_shown_folder(names, root), uid[-SHOWN_UID:], text))
        else:
            refused.append(Refused(first.name, "", first.reason))
    return refused


def _named_series(
    series: dict[tuple[str, ...], list[Frame]], root: str
) -> list[tuple[str, list[Frame]]]:
    """Series with the base of their case names: their folder, and what they are if it has more."""
    folders = {key: _common_folder(_names(frames)) for key, frames in series.items()}
    shared = Counter(folders.values())
    named: list[tuple[str, list[Frame]]] = []
    for key, frames in series.items():
        folder = folders[key]
        parts = list(folder.parts) or [root]
        if shared[folder] > 1:
            first = frames[0]
            number = "" if first.series_number is None else str(first.series_number)
            parts.append(f"{first.modality}{number}_{short_hash('/'.join(key))[:6]}")
        named.append((safe_case_id(parts), frames))
    return named


def _volume(base: str, part: Part, stack: Stack) -> DicomVolume:
    first = stack.frames[0]
    words = [value if name in ("kind", "folder") else name + value for name, value in part.marks]
    uid = first.series_uid
    split = ",".join(f"{name}={value}" for name, value in part.marks)
    origin = f"dicom:{uid}" + (f"#{split}" if split else "")
    return DicomVolume(
        case_id=safe_case_id([base, *words]),
        origin_id=origin if uid else None,
        modality=first.modality,
        marks=part.marks,
        stack=stack,
    )


def _unique(volumes: Sequence[DicomVolume]) -> list[DicomVolume]:
    """Volumes whose case names differ, on file systems that ignore case as well."""
    counts = Counter(volume.case_id.casefold() for volume in volumes)
    unique: list[DicomVolume] = []
    for volume in volumes:
        case_id = volume.case_id
        if counts[case_id.casefold()] > 1:
            told = f"{volume.stack.frames[0].name}#{volume.stack.frames[0].number}"
            case_id = safe_case_id([case_id, short_hash(told)])
        unique.append(
            DicomVolume(case_id, volume.origin_id, volume.modality, volume.marks, volume.stack)
        )
    return unique


def _refusal(frames: Sequence[Frame], part: Part, reason: str, root: str) -> Refused:
    marks = " ".join(f"{name}={value}" for name, value in part.marks)
    first = f"; first file {part.frames[0].name}" if part.frames[0].name not in reason else ""
    return Refused(
        _shown_folder(_names(frames), root),
        frames[0].series_uid[-SHOWN_UID:],
        (f"volume {marks}: " if marks else "") + reason + first,
    )


def _names(frames: Sequence[Frame]) -> list[PurePosixPath]:
    return [PurePosixPath(frame.name) for frame in frames]


def _common_folder(names: Sequence[PurePosixPath]) -> PurePosixPath:
    folders = {name.parent for name in names}
    common = next(iter(folders)).parts
    for folder in folders:
        same = [a == b for a, b in zip(common, folder.parts, strict=False)]
        common = common[: same.index(False) if False in same else len(same)]
    return PurePosixPath(*common)


def _shown_folder(names: Sequence[PurePosixPath], root: str) -> str:
    common = _common_folder(names)
    return root if common == PurePosixPath() else str(common)


def _shown(name: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in name)
