"""CT-RATE's tree: reconstructions of one scan and of one patient are known by their names.

`train_12_a_2.nii.gz` is reconstruction 2 of scan a of patient train_12. In the first release the
NIfTI headers cannot be trusted: stored values are unscaled and the spacing is not the scan's, both
stand in the metadata tables. The corrected release (folders `train_fixed`, `valid_fixed`) has them
in the headers.
"""

import ast
import csv
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from voxelbridge.core.data.image_io import read_grid, read_image
from voxelbridge.core.data.nifti import read_nifti_header
from voxelbridge.core.data.volume import Grid, Volume
from voxelbridge.core.errors import DataError
from voxelbridge.pretrain_ssl.sources.scan import FileImage, Image, Scan, Source, sorted_scans

VOLUME_NAME = re.compile(r"(?P<split>train|valid)_(?P<patient>\d+)_(?P<scan>[a-z]+)_\d+\.nii\.gz")
COLUMNS = ("VolumeName", "RescaleIntercept", "RescaleSlope", "XYSpacing", "ZSpacing")
EXCLUDED_LISTS = "no_chest_*.txt"
DATASET = "ct-rate"


@dataclass(frozen=True)
class Acquisition:
    """What the metadata table says of a volume: HU = stored value * slope + intercept."""

    slope: float
    intercept: float
    spacing_mm: tuple[float, float, float]  # (z, y, x)


@dataclass(frozen=True)
class UnscaledImage:
    """A volume of the first release, with its values and spacing from the metadata table."""

    path: Path
    acquisition: Acquisition

    def read(self) -> Volume:
        """(1, D, H, W) in HU, on the table's spacing."""
        volume = read_image(self.path)
        header = read_nifti_header(self.path)
        stored = (volume.array.astype(np.float32) - header.intercept) / header.slope
        array = stored * np.float32(self.acquisition.slope) + np.float32(self.acquisition.intercept)
        return Volume(array.astype(np.float32), self._corrected(volume.grid))

    def read_grid(self) -> Grid:
        """The header's grid with the table's spacing."""
        return self._corrected(read_grid(self.path))

    def _corrected(self, grid: Grid) -> Grid:
        return Grid.from_parts(
            grid.shape,
            self.acquisition.spacing_mm,  # slices are the last axis of the files, as published
            directions=grid.directions,
            origin_mm=grid.origin_mm,
        )


def is_ct_rate(names: Iterable[str]) -> bool:
    """Whether all of these image file names are CT-RATE's."""
    listed = list(names)
    return bool(listed) and all(VOLUME_NAME.fullmatch(name) for name in listed)


def find_ct_rate(folder: Path, images: Sequence[Path]) -> Source:
    """The volumes of a CT-RATE tree, without those that its lists exclude as not of the chest.

    Tables (`*metadata*.csv`) and lists (`no_chest_*.txt`) are looked for in `folder` and beside it.
    A volume of the first release that no table knows is refused; where there is no table at all the
    headers are taken and a note says so.
    """
    table = _read_tables(folder)
    excluded = _read_excluded(folder)
    scans, refused, unknown, trusted = [], [], 0, 0
    for path in images:
        parts = VOLUME_NAME.fullmatch(path.name)
        assert parts is not None  # is_ct_rate said so
        if path.name in excluded:
            continue
        image: Image
        if any(parent.name.endswith("_fixed") for parent in path.parents) or not table:
            image = FileImage(path)
            trusted += not any(parent.name.endswith("_fixed") for parent in path.parents)
        elif path.name in table:
            image = UnscaledImage(path, table[path.name])
        else:
            unknown += 1
            refused.append(f"{path}: not in the metadata tables; its header cannot be trusted")
            continue
        patient = f"{parts['split']}_{parts['patient']}"
        name = path.name.removesuffix(".nii.gz")
        scans.append(
            Scan(
                name,
                image,
                where=str(path),
                dataset=DATASET,
                patient=f"{DATASET}:{patient}",
                scan=f"{DATASET}:{patient}_{parts['scan']}",
                modality="CT",
                origin_ids=(f"{DATASET}:{name}",),
            )
        )
    notes = []
    if left_out := len({path.name for path in images} & excluded):
        notes.append(f"{left_out} volumes are left out: listed as not of the chest")
    if trusted:
        notes.append(
            f"no metadata table was found: spacing and values of {trusted} volumes come from their "
            "headers, which are wrong in the first release; put train_metadata.csv and "
            "validation_metadata.csv into a folder metadata beside the images"
        )
    return Source("CT-RATE", sorted_scans(scans), tuple(refused), tuple(notes))


def _read_tables(folder: Path) -> Mapping[str, Acquisition]:
    table: dict[str, Acquisition] = {}
    for path in _beside(folder, "*metadata*.csv"):
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = csv.DictReader(stream)
            if missing := [name for name in COLUMNS if name not in (rows.fieldnames or ())]:
                raise DataError(f"{path}: columns {', '.join(missing)} are missing")
            for number, row in enumerate(rows, start=2):
                table[row["VolumeName"]] = _acquisition(path, number, row)
    return table


def _acquisition(path: Path, line: int, row: Mapping[str, str]) -> Acquisition:
    try:
        x, y = (float(step) for step in ast.literal_eval(row["XYSpacing"]))
        z, slope, intercept = (
            float(row[name]) for name in ("ZSpacing", "RescaleSlope", "RescaleIntercept")
        )
    except (ValueError, SyntaxError, TypeError) as error:
        raise DataError(
            f"{path}, line {line}: spacing or scaling of {row['VolumeName']} cannot be read; "
            "expected XYSpacing like [0.7, 0.7] and numbers"
        ) from error
    if not all(math.isfinite(v) for v in (x, y, z, slope, intercept)) or min(x, y, z) <= 0:
        raise DataError(f"{path}, line {line}: spacing of {row['VolumeName']} is not positive")
    return Acquisition(slope, intercept, (z, y, x))


def _read_excluded(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in _beside(folder, EXCLUDED_LISTS):
        for line in path.read_text(encoding="utf-8-sig").splitlines():
            if name := Path(line.strip()).name:
                names.add(name if name.endswith(".nii.gz") else f"{name}.nii.gz")
    return names


def _beside(folder: Path, pattern: str) -> list[Path]:
    """Files of a name in the folder, in a `metadata` folder, and the same of its two parents."""
    found: dict[Path, None] = {}
    for level in (folder, *folder.resolve().parents[:2]):
        for place in (level, level / "metadata"):
            if place.is_dir():
                found |= dict.fromkeys(path.resolve() for path in sorted(place.glob(pattern)))
    return list(found)
