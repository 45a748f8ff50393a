"""All images of a path, whatever they are: image files, DICOM series, a tree of both."""

import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from voxelbridge.core.data.case_names import safe_case_id, short_hash
from voxelbridge.core.data.dicom import DicomVolume, find_series
from voxelbridge.core.data.dicom_headers import is_dicom
from voxelbridge.core.data.dicom_stack import check_allowances
from voxelbridge.core.data.file_tree import broken_link, walk_files
from voxelbridge.core.data.image_io import (
    READ_ENDINGS,
    image_ending,
    image_stem,
    read_grid,
    read_image,
)
from voxelbridge.core.data.volume import Grid, Volume
from voxelbridge.core.errors import DataError

# A file named by a DICOM UID holds that series: LUNA16 and LIDC exports are named so.
UID_NAME = re.compile(r"[0-2](?:\.(?:0|[1-9]\d*)){6,}")


@dataclass(frozen=True, eq=False)
class ImageSource:
    """One image that can be read: its case name and where it lies."""

    case_id: str
    origin: Path | DicomVolume

    def __str__(self) -> str:
        return f"case {self.case_id}"

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the image; slices of a DICOM volume in their order."""
        return self.origin.files if isinstance(self.origin, DicomVolume) else (self.origin,)

    @property
    def provenance_names(self) -> tuple[str, ...]:
        """Names under which the image is known elsewhere, "dicom:<SeriesInstanceUID>" or none."""
        if isinstance(self.origin, DicomVolume):
            return () if self.origin.origin_id is None else (self.origin.origin_id,)
        stem = image_stem(self.origin.name)
        return (f"dicom:{stem}",) if len(stem) <= 64 and UID_NAME.fullmatch(stem) else ()

    def read(self) -> Volume:
        """The image as (1, D, H, W); raises DataError."""
        return (
            self.origin.read() if isinstance(self.origin, DicomVolume) else read_image(self.origin)
        )

    def read_grid(self) -> Grid:
        """The image's grid from its headers; raises DataError."""
        return self.origin.grid if isinstance(self.origin, DicomVolume) else read_grid(self.origin)


@dataclass(frozen=True, eq=False)
class ImageSources:
    """The images of a path sorted by case, and a line for everything that was refused."""

    images: tuple[ImageSource, ...]
    refused: tuple[str, ...]


def find_images(source: Path, *, allow: Collection[str] = ()) -> ImageSources:
    """Every image of a file or a folder tree, each a case with a name of its own.

    Names are the path below `source` without the ending, its parts joined by "__"; series are
    named by their folder (see `find_series`, also for `allow`). Where two would be called the
    same, both get something added that tells them apart. Hidden files are passed over, links are
    followed (`file_tree`). Raises DataError for a path that does not exist or holds nothing to
    read.
    """
    check_allowances(allow)
    if not source.exists():
        raise DataError(f"{source}: does not exist; expected an image file or a folder of images")
    if source.is_dir():
        found, refused = _image_files(source)
        dicom = find_series(source, allow=allow)
    elif image_ending(source.name):
        return ImageSources((ImageSource(safe_case_id([image_stem(source.name)]), source),), ())
    elif is_dicom(source):
        found, refused = [], []
        dicom = find_series(source, allow=allow)
    else:
        raise DataError(f"{source}: not an image; readable are {', '.join(READ_ENDINGS)} and DICOM")
    found += [
        (volume.case_id, volume.origin_id or str(volume.marks), volume) for volume in dicom.volumes
    ]
    refused += [str(line) for line in dicom.refused]
    if not found and not refused:
        raise DataError(
            f"{source}: no image found; readable are {', '.join(READ_ENDINGS)} and DICOM series"
        )
    images = sorted(_unique(found), key=lambda image: image.case_id)
    return ImageSources(tuple(images), tuple(refused))


def _image_files(folder: Path) -> tuple[list[tuple[str, str, Path | DicomVolume]], list[str]]:
    found: list[tuple[str, str, Path | DicomVolume]] = []
    refused: list[str] = []
    for path in map(Path, walk_files(folder)):
        if not image_ending(path.name):
            continue
        below = path.relative_to(folder)
        if broken_link(path):
            continue  # refused among the DICOM files, which are searched everywhere
        if path.is_file():
            parts = (*below.parts[:-1], image_stem(path.name))
            found.append((safe_case_id(parts), below.as_posix(), path))
        else:
            refused.append(f"{below.as_posix()}: is not a file")
    return found, refused


def _unique(found: list[tuple[str, str, Path | DicomVolume]]) -> Iterator[ImageSource]:
    """Case names that differ: an ending is added where that is enough, else a hash of the path."""
    counts = Counter(name.casefold() for name, _, _ in found)
    longer: list[tuple[str, str, Path | DicomVolume]] = []
    for name, told, origin in found:
        if counts[name.casefold()] > 1:
            kind = image_ending(origin.name) if isinstance(origin, Path) else ".dicom"
            name = safe_case_id([name + (kind or "").replace(".", "_")])
        longer.append((name, told, origin))
    counts = Counter(name.casefold() for name, _, _ in longer)
    for name, told, origin in longer:
        clash = counts[name.casefold()] > 1
        yield ImageSource(safe_case_id([name, short_hash(told)]) if clash else name, origin)
