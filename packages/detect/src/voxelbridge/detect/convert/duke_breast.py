"""DUKE breast MRI (TCIA Duke-Breast-Cancer-MRI): one box per patient from a spreadsheet.

Layout: the DICOM tree `Duke-Breast-Cancer-MRI/Breast_MRI_NNN/<study>/<series>/1-NNN.dcm` and
beside or above it `Annotation_Boxes.xlsx` and `Breast-Cancer-MRI-filepath_filename-mapping.xlsx`
(either also as .csv). The mapping names the sequence and the slice number of every file: a box's
slice number is looked up there, and the file's own header says where that slice lies. So no order
of slices is assumed, and none is flipped.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread

from voxelbridge.core.data.dicom import DicomVolume, find_series
from voxelbridge.core.data.image_io import describe_grid
from voxelbridge.core.data.raw_problems import few_of
from voxelbridge.core.data.volume import Grid, Volume, match_grid, world_to_edges
from voxelbridge.core.errors import DataError
from voxelbridge.detect.convert.duke_tables import (
    SliceBox,
    SliceFile,
    read_boxes,
    read_mapping,
    series_files,
)
from voxelbridge.detect.convert.raw_writer import (
    Boxes,
    ConversionReport,
    RawDatasetWriter,
    SplitName,
)
from voxelbridge.detect.convert.splits import patient_folds, patient_split

NAME = "duke-breast"
COLLECTION = "Duke-Breast-Cancer-MRI"
REFERENCE = "pre"  # the sequence that the boxes were drawn on
SEQUENCES = ("pre", "post_1", "post_2", "post_3")
TEST_FRACTION = 0.3  # 274 of 911 (arXiv 2509.15947 table 1)
OFF_GRID = 0.1  # voxels a slice may lie beside the grid of its volume

Mapped = Mapping[tuple[str, str], Sequence[SliceFile]]  # (patient, sequence) -> its slices


def convert(
    src: Path,
    out: Path,
    *,
    seed: int = 0,
    workers: int = 2,
    sequences: Sequence[str] = SEQUENCES,
) -> ConversionReport:
    """Converts every patient of the box table; 30 % of them, drawn with `seed`, are the test set.

    `sequences` become the channels; they must share one grid, or the patient fails. Rows and
    columns of the boxes count from 1 and their ends are inclusive; row is y, column is x.
    """
    boxes = read_boxes(src)
    wanted = tuple(dict.fromkeys((REFERENCE, *sequences)))
    mapped = read_mapping(src, patients=set(boxes), sequences=set(wanted))
    patients = {patient: patient for patient in boxes}
    train, test = patient_split(patients, test_fraction=TEST_FRACTION, seed=seed)
    held_out = set(test)
    splits: dict[str, SplitName] = {p: "test" if p in held_out else "train" for p in boxes}
    writer = RawDatasetWriter(
        out,
        name=NAME,
        channel_names=tuple(sequences),
        class_names=("lesion",),
        settings={"seed": seed, "sequences": " ".join(sequences)},
    )
    function = partial(
        _convert_case, writer, _collection(src), mapped, boxes, splits, tuple(sequences)
    )
    failures = writer.convert_each(function, splits, workers=workers)
    return writer.finish(
        patient_folds({case: case for case in train}, seed=seed),
        failures=failures,
        only=list(splits),
    )


def box_edges(files: Sequence[Path], box: SliceBox, grid: Grid) -> NDArray[np.float64]:
    """The box (6,) in voxel edges of `grid`, from the headers of its first and last slice.

    `files` are the slices in the order of their numbers. DataError when the box leaves the image
    or its slices are not consecutive in space.
    """
    rows, columns, slices = box.rows, box.columns, box.slices
    if slices[1] > len(files):
        raise DataError(f"box ends at slice {slices[1]}, the sequence has {len(files)}")
    centres: list[NDArray[np.float64]] = []
    for path in (files[slices[0] - 1], files[slices[1] - 1]):
        header = dcmread(path, stop_before_pixels=True)
        if rows[1] > header.Rows or columns[1] > header.Columns:
            raise DataError(
                f"box of rows {rows[0]}-{rows[1]}, columns {columns[0]}-{columns[1]} leaves the "
                f"{header.Rows}x{header.Columns} image"
            )
        origin = np.array(header.ImagePositionPatient, dtype=np.float64)
        along_row, along_column = np.array(header.ImageOrientationPatient, float).reshape(2, 3)
        step_y, step_x = (float(value) for value in header.PixelSpacing)
        centres += [
            origin + (column - 1) * step_x * along_row + (row - 1) * step_y * along_column
            for row in rows
            for column in columns
        ]
    corners = world_to_edges(np.array(centres), grid)  # (8, 3), at voxel centres
    edges = np.concatenate([corners.min(axis=0) - 0.5, corners.max(axis=0) + 0.5])
    whole = np.rint(edges)
    if np.abs(edges - whole).max() > OFF_GRID:
        raise DataError(f"the box's slices do not lie on the grid {describe_grid(grid)}")
    size = sorted((whole[3:] - whole[:3]).tolist())
    if size != sorted(end - start + 1 for start, end in (rows, columns, slices)):
        raise DataError(
            f"slices {slices[0]} to {slices[1]} of the mapping are not consecutive in space"
        )
    if (whole[:3] < 0).any() or (whole[3:] > grid.shape).any():
        raise DataError(f"box {whole.tolist()} lies outside the image {grid.shape}")
    return whole


def _collection(src: Path) -> Path:
    """The folder that holds Breast_MRI_001, ...: SRC, or below it the collection's own."""
    nested = sorted(src.glob(f"*/{COLLECTION}"))
    for folder in (src / COLLECTION, *nested, src):
        if next(folder.glob("Breast_MRI_*"), None) is not None:
            return folder
    raise DataError(f"{src}: no folder {COLLECTION} with Breast_MRI_NNN; give TCIA's download")


def _convert_case(
    writer: RawDatasetWriter,
    collection: Path,
    mapped: Mapped,
    boxes: Mapping[str, Sequence[SliceBox]],
    splits: Mapping[str, SplitName],
    sequences: tuple[str, ...],
    case_id: str,
) -> None:
    if not (collection / case_id).is_dir():
        raise DataError(f"case {case_id}: no folder {case_id} in {collection}")
    wanted = dict.fromkeys((REFERENCE, *sequences))
    if missing := [name for name in wanted if (case_id, name) not in mapped]:
        raise DataError(f"case {case_id}: the mapping has no sequence {few_of(missing)}")
    files = {name: series_files(collection, mapped[case_id, name], name) for name in wanted}
    found = {name: _volume_of(paths, name) for name, paths in files.items()}
    reference = found[REFERENCE].grid
    edges = [box_edges(files[REFERENCE], box, reference) for box in boxes[case_id]]
    writer.add_case(
        case_id,
        _stacked([(name, found[name]) for name in sequences], reference),
        objects=Boxes(np.array(edges), [0] * len(edges)),
        patient=case_id,
        origins=[origin for name in sequences if (origin := found[name].origin_id)],
        split=splits[case_id],
    )


def _volume_of(files: Sequence[Path], name: str) -> DicomVolume:
    """The one volume that holds exactly the files of a sequence."""
    folder = find_series(files[0].parent)
    for volume in folder.volumes:
        if set(volume.files) == set(files):
            return volume
    if folder.refused:
        raise DataError(f"sequence {name}: {folder.refused[0]}")
    held = ", ".join(str(len(volume.files)) for volume in folder.volumes) or "no"
    raise DataError(
        f"sequence {name}: the mapping names {len(files)} files, the series has {held}; "
        "download it again"
    )


def _stacked(volumes: Sequence[tuple[str, DicomVolume]], grid: Grid) -> Volume:
    channels = []
    for name, found in volumes:
        matched = match_grid(found.read(), grid)
        if matched is None:
            raise DataError(
                f"sequence {name}: grid {describe_grid(found.grid)} differs from {REFERENCE}: "
                f"{describe_grid(grid)}"
            )
        channels.append(matched.array[0])
    return Volume(np.stack(channels), grid)
