"""LIDC-IDRI from its TCIA download: CT series in DICOM, four readers, one mask per nodule.

The split of the published experiments is not known; ours is seeded and keeps patients together.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError

from voxelbridge.core.data.dicom import find_series
from voxelbridge.core.data.volume import Grid, Volume, world_to_edges
from voxelbridge.core.errors import DataError
from voxelbridge.detect.convert.lidc_consensus import (
    MalignancyRule,
    VoxelMask,
    consensus,
    group_readings,
    is_malignant,
    reading_masks,
)
from voxelbridge.detect.convert.lidc_readings import Reading, read_annotations
from voxelbridge.detect.convert.raw_writer import (
    ConversionReport,
    InstanceMap,
    NoObjects,
    RawDatasetWriter,
    SplitName,
    tell_failure,
)
from voxelbridge.detect.convert.splits import patient_folds, patient_split

CLASSES = ("benign", "malignant")
TEST_FRACTION = 0.15  # 155 of 1018 in the published table
PATIENT = re.compile(r"LIDC-IDRI-\d{4}")
SLICE_TOLERANCE = 0.1  # slices an outline may lie off its slice (rounding of positions)
IN_PLANE_TOLERANCE = 1e-3  # of the direction cosines: outlines live on axial slices


@dataclass(frozen=True)
class _Series:
    folder: Path
    uid: str
    patient: str


def convert(
    src: Path,
    out: Path,
    *,
    seed: int = 0,
    workers: int = 2,
    annotations: Path | None = None,
    malignancy: MalignancyRule = "nndetection",
    allow: Sequence[str] = (),
) -> ConversionReport:
    """Converts the download at `src` (LIDC-IDRI-XXXX/STUDY/SERIES/*.dcm with an XML file).

    `annotations` is a folder with the XML files or with the tables scans.csv, readings.csv and
    contours.csv.gz, where they do not lie beside the images. CT series that no annotation names
    are left out and counted, since nobody says that they are free of nodules. `allow` downgrades
    refusals of series as in `find_series` ("gap", "varying_spacing", ...).
    """
    readings, broken = read_annotations([src] if annotations is None else [annotations, src])
    found, unreadable = _ct_series(src)
    if not found:
        raise DataError(
            f"{src}: no CT series; expected LIDC-IDRI-XXXX/STUDY/SERIES/*.dcm, as TCIA delivers it"
        )
    series = [item for item in found if item.uid in readings]
    notes = []
    if unknown := len(found) - len(series):
        notes.append(f"{unknown} CT series without reader annotations were left out")
    if not series:
        raise DataError(f"{src}: none of the {len(found)} CT series is named by the annotations")
    by_case = _case_ids(series)
    patients = {case: item.patient for case, item in by_case.items()}
    train, test = patient_split(patients, test_fraction=TEST_FRACTION, seed=seed)
    held_out = set(test)
    split: dict[str, SplitName] = {c: "test" if c in held_out else "train" for c in patients}
    writer = RawDatasetWriter(
        out,
        name="lidc",
        channel_names=("CT",),
        class_names=CLASSES,
        settings={"seed": seed, "malignancy": malignancy, "allow": ", ".join(sorted(allow))},
    )
    work = partial(
        _convert_case,
        writer,
        cases=by_case,
        readings=readings,
        splits=split,
        rule=malignancy,
        allow=allow,
    )
    failures = [tell_failure(line) for line in (*broken, *unreadable)]
    failures += writer.convert_each(work, split, workers=workers)
    folds = patient_folds({case: patients[case] for case in train}, seed=seed)
    return writer.finish(folds, failures=failures, notes=notes, only=list(split))


def nodules_of(
    readings: Sequence[Reading], grid: Grid
) -> tuple[list[VoxelMask], list[list[Reading]], int]:
    """Consensus masks on the CT's `grid`, the readings of each, and how many nodules vanished.

    A nodule vanishes when no voxel is shared by two readers, as all of a single reader do. Of two
    nodules that overlap, the voxels go to the one of more readings.
    """
    masks = [reading_masks(reading, _slices(reading, grid)) for reading in readings]
    groups = group_readings(
        readings,
        [touched for _, touched in masks],
        spacing_mm=grid.spacing_mm,
        tolerance_mm=grid.spacing_mm[0],
    )
    agreed = [(consensus([masks[index][0] for index in group]), group) for group in groups]
    kept = [(mask, [readings[i] for i in group]) for mask, group in agreed if mask is not None]
    kept.sort(key=lambda pair: len(pair[1]))  # drawn in this order: the later one stays on top
    return [mask for mask, _ in kept], [group for _, group in kept], len(groups) - len(kept)


def _convert_case(
    writer: RawDatasetWriter,
    case_id: str,
    *,
    cases: Mapping[str, _Series],
    readings: Mapping[str, tuple[Reading, ...]],
    splits: Mapping[str, SplitName],
    rule: MalignancyRule,
    allow: Sequence[str],
) -> None:
    series = cases[case_id]
    volume = _read_series(series, allow)
    masks, groups, vanished = nodules_of(readings[series.uid], volume.grid)
    instances = np.zeros(volume.grid.shape, dtype=np.uint16)
    for number, mask in enumerate(masks, start=1):
        inside = tuple(slice(a, b) for a, b in zip(mask.start, mask.stop, strict=True))
        region = instances[inside]
        if region.shape != mask.array.shape:
            raise DataError(f"series {series.uid}: an outline leaves the image")
        region[mask.array] = number
    present = [int(number) for number in np.unique(instances) if number > 0]
    classes = {
        number: int(is_malignant([r.malignancy for r in groups[number - 1]], rule))
        for number in present
    }
    vanished += len(masks) - len(present)
    notes = [f"{vanished} nodules without a voxel of two readers were dropped"] if vanished else []
    writer.add_case(
        case_id,
        volume,
        objects=InstanceMap(instances, classes) if classes else NoObjects(),
        patient=series.patient,
        origins=[f"dicom:{series.uid}"],
        split=splits[case_id],
        notes=notes,
    )


def _slices(reading: Reading, grid: Grid) -> list[int]:
    # Outlines are in pixels of axial slices: only z has to be found, from its position in mm.
    if abs(grid.directions[2, 0]) < 1 - IN_PLANE_TOLERANCE:
        raise DataError("the slices are not axial, so the outlines cannot be placed")
    x, y, _ = grid.origin_mm
    positions = [[x, y, contour.z_mm] for contour in reading.contours]
    exact = world_to_edges(positions, grid)[:, 0] - 0.5
    whole = np.rint(exact).astype(int)
    if (np.abs(exact - whole) > SLICE_TOLERANCE).any() or not (
        (whole >= 0) & (whole < grid.shape[0])
    ).all():
        raise DataError("an outline lies on none of the slices; are slices missing?")
    return whole.tolist()


def _ct_series(src: Path) -> tuple[list[_Series], list[str]]:
    """CT series below `src`, and a line for each folder whose files cannot be told."""
    folders: dict[Path, list[Path]] = {}
    for path in sorted(src.rglob("*")):
        if path.suffix.lower() == ".dcm" and not path.name.startswith("."):
            folders.setdefault(path.parent, []).append(path)
    found, unreadable = [], []
    for folder, files in folders.items():
        # One header tells: TCIA gives every series a folder of its own.
        header = next((read for path in files if (read := _header(path)) is not None), None)
        if header is None:
            unreadable.append(f"{folder}: none of its .dcm files can be read")
        elif header.get("Modality") == "CT":
            named = PATIENT.search(str(header.get("PatientID", ""))) or PATIENT.search(str(folder))
            if named is None:
                unreadable.append(f"{folder}: neither PatientID nor a folder is LIDC-IDRI-XXXX")
            else:
                uid = str(header.get("SeriesInstanceUID", ""))
                found.append(_Series(folder, uid, named[0]))
    return found, unreadable


def _header(path: Path) -> Any | None:  # Any: pydicom's data set
    tags = ["Modality", "PatientID", "SeriesInstanceUID"]
    try:
        return pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags)
    except (InvalidDicomError, OSError, EOFError, ValueError):
        return None


def _case_ids(series: Sequence[_Series]) -> dict[str, _Series]:
    # Patients with several scans get a letter per scan, in the order of their series UIDs.
    count = Counter(item.patient for item in series)
    seen: Counter[str] = Counter()
    cases = {}
    for item in sorted(series, key=lambda item: (item.patient, item.uid)):
        letter = chr(ord("a") + seen[item.patient]) if count[item.patient] > 1 else ""
        seen[item.patient] += 1
        cases[f"{item.patient}{letter}"] = item
    return cases


def _read_series(series: _Series, allow: Sequence[str]) -> Volume:
    content = find_series(series.folder, allow=allow)
    for volume in content.volumes:
        if volume.origin_id == f"dicom:{series.uid}":
            return volume.read()
    reasons = "; ".join(str(refused) for refused in content.refused) or "it was not found"
    raise DataError(f"series {series.uid} cannot be read: {reasons}")
