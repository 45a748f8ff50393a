"""One image to pre-train on, whatever it comes from, and the names that keep patients together."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from voxelbridge.core.data.image_io import read_grid, read_image
from voxelbridge.core.data.nifti import Frames
from voxelbridge.core.data.volume import Grid, Volume
from voxelbridge.core.errors import DataError


class Image(Protocol):
    """Something that can be read as a volume, wholly or its grid alone."""

    def read(self) -> Volume: ...

    def read_grid(self) -> Grid: ...


@dataclass(frozen=True)
class FileImage:
    """An image file; of several frames in a NIfTI file the one volume that `frames` means."""

    path: Path
    frames: Frames = "only"

    def read(self) -> Volume:
        """The volume as (1, D, H, W)."""
        return read_image(self.path, frames=self.frames)

    def read_grid(self) -> Grid:
        """The volume's grid, from the header."""
        return read_grid(self.path, frames=self.frames)


@dataclass(frozen=True)
class Scan:
    """An image, and what it belongs to.

    Images of one `patient` never lie on both sides of a split; images of one `scan` are
    reconstructions or contrasts of one acquisition.
    """

    case_id: str
    image: Image
    where: str  # for messages: the file or folder
    dataset: str | None = None
    patient: str | None = None
    scan: str | None = None
    modality: str | None = None
    origin_ids: tuple[str, ...] = ()
    masks: Mapping[str, Path] = field(default_factory=dict)  # name -> file on the image's grid

    def __str__(self) -> str:
        return f"case {self.case_id} ({self.where})"


@dataclass(frozen=True)
class Source:
    """All images of a source, sorted by case; what could not be used; what a person should know."""

    kind: str
    scans: tuple[Scan, ...]
    refused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def sorted_scans(scans: Iterable[Scan]) -> tuple[Scan, ...]:
    """Sorted by case name; two cases of one name are a DataError."""
    found: dict[str, Scan] = {}
    for scan in scans:
        if (other := found.get(scan.case_id)) is not None:
            raise DataError(
                f"{scan.where}: the same case name {scan.case_id} as {other.where}; "
                "rename one of them"
            )
        found[scan.case_id] = scan
    return tuple(found[name] for name in sorted(found))
