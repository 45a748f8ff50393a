"""What to predict: image files and DICOM volumes among files and folders, as cases."""

import itertools
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from voxelbridge.core.data.dataset_files import IMAGE_NAME
from voxelbridge.core.data.dicom import DicomVolume, find_series
from voxelbridge.core.data.dicom_headers import is_dicom
from voxelbridge.core.data.dicom_stack import check_allowances
from voxelbridge.core.data.image_io import (
    READ_ENDINGS,
    image_ending,
    image_stem,
    iterate_channels,
    read_channels,
)
from voxelbridge.core.data.volume import Volume
from voxelbridge.core.errors import DataError


@dataclass(frozen=True)
class ImageCase:
    """A case to predict: its name and one image file per channel, or a DICOM volume."""

    case_id: str
    paths: tuple[Path, ...]  # of a DICOM volume: the folder that holds its files
    volume: DicomVolume | None = None

    def __str__(self) -> str:
        return f"case {self.case_id}"

    def read(self) -> Volume:
        """All channels (C, D, H, W); raises DataError."""
        return read_channels(self.paths) if self.volume is None else self.volume.read()

    def channels(self) -> Iterator[Volume]:
        """The same, channel by channel (1, D, H, W), each read when it is asked for."""
        if self.volume is None:
            yield from iterate_channels(self.paths)
        else:
            yield self.volume.read()

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the image; slices of a DICOM volume in their order."""
        return self.paths if self.volume is None else self.volume.files


@dataclass(frozen=True)
class ImageCases:
    """What is to be predicted, and a line for every DICOM series that was refused."""

    cases: tuple[ImageCase, ...]
    refused: tuple[str, ...]


def count_channels(images: Sequence[Path]) -> int:
    """Channels of the first case among files and folders, from names alone; DICOM has one."""
    files, _ = _image_files(images)
    numbers: dict[str, int] = {}
    for path in files:
        name, channel = _channel_of(path)
        numbers[name] = max(numbers.get(name, 0), channel + 1)
    return numbers[min(numbers)] if numbers else 1


def find_image_cases(
    images: Sequence[Path], *, num_channels: int, allow: Collection[str] = ()
) -> ImageCases:
    """Cases among files and folders: `{case}_0000.nii.gz`, ... per channel, or DICOM series.

    For one channel a file without a channel number is a case too. A folder without image files is
    searched for DICOM series with its subfolders; each of their volumes is a case of one channel.
    Raises DataError where a channel is missing or two files claim one channel, ConfigError for an
    unknown allowance.
    """
    check_allowances(allow)
    files, series = _image_files(images)
    channels: dict[str, dict[int, Path]] = {}
    for path in files:
        name, channel = _channel_of(path)
        known = channels.setdefault(name, {})
        if channel in known:
            raise DataError(f"case {name}: {known[channel]} and {path} are both channel {channel}")
        known[channel] = path
    for name, known in channels.items():
        if sorted(known) != list(range(num_channels)):
            raise DataError(
                f"case {name}: channels {sorted(known)}, the model needs {num_channels} "
                f"(files {name}_0000 to {name}_{num_channels - 1:04d})"
            )
    cases = [
        ImageCase(name, tuple(known[channel] for channel in range(num_channels)))
        for name, known in channels.items()
    ]
    found, refused = _dicom_cases(series, num_channels=num_channels, allow=allow)
    cases = sorted([*cases, *found], key=lambda case: case.case_id)
    for before, case in itertools.pairwise(cases):
        if before.case_id == case.case_id:
            raise DataError(
                f"case {case.case_id}: {before.paths[0]} and {case.paths[0]} have one name; "
                "predict them into two folders"
            )
    if not cases and not refused:
        raise DataError(
            f"{', '.join(str(path) for path in images)}: no image found; "
            f"readable are {', '.join(READ_ENDINGS)} and DICOM series"
        )
    return ImageCases(tuple(cases), tuple(refused))


def _channel_of(path: Path) -> tuple[str, int]:
    stem = image_stem(path.name)
    parts = IMAGE_NAME.fullmatch(stem)
    return (parts["case"], int(parts["channel"])) if parts else (stem, 0)


def _image_files(images: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Image files, and the folders and files to search for DICOM."""
    files: list[Path] = []
    series: list[Path] = []
    for path in images:
        if path.is_dir():
            visible = [file for file in sorted(path.iterdir()) if not file.name.startswith(".")]
            inside = [file for file in visible if image_ending(file.name)]
            stray = next((file for file in visible if inside and is_dicom(file)), None)
            if stray is not None:
                raise DataError(
                    f"{path}: holds image files and DICOM ({stray.name}); put them in two folders"
                )
            files += inside
            series += [] if inside else [path]
        elif image_ending(path.name):
            files.append(path)
        elif is_dicom(path):
            series.append(path)
        else:
            raise DataError(
                f"{path}: not an image; readable are {', '.join(READ_ENDINGS)} and DICOM series"
            )
    return files, series


def _dicom_cases(
    folders: Sequence[Path], *, num_channels: int, allow: Collection[str]
) -> tuple[list[ImageCase], list[str]]:
    cases: list[ImageCase] = []
    refused: list[str] = []
    for path in folders:
        found = find_series(path, allow=allow)
        if found.volumes and num_channels > 1:
            raise DataError(
                f"{path}: DICOM series serve models of one channel, this one has {num_channels}; "
                "convert them to one image file per channel ({case}_0000.nii.gz, ...) on one grid"
            )
        for volume in found.volumes:
            holder = Path(os.path.commonpath([file.parent for file in volume.files]))
            cases.append(ImageCase(volume.case_id, (holder,), volume))
        refused += [str(line) for line in found.refused]
    return cases, refused
