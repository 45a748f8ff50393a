"""PN9 from its release of arrays: `PID_zoom.npy`, lists of PIDs, a table of boxes.

The volumes are 8-bit, 1 mm, without orientation: they are written with identity direction.
"""

import csv
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.data.volume import Grid, Volume
from voxelbridge.core.errors import DataError
from voxelbridge.detect.convert.raw_writer import (
    Boxes,
    ConversionReport,
    NoObjects,
    RawDatasetWriter,
    SplitName,
    tell_failure,
)

ENDING = "_zoom.npy"
LISTS = ("train", "val", "test")
EDGES = ("zmin", "ymin", "xmin", "zmax", "ymax", "xmax")  # first and last voxel, both inside
SPACING_MM = (1.0, 1.0, 1.0)

BoxRows = Mapping[int, Sequence[Sequence[float]]]  # pid -> rows in the order of EDGES


def convert(src: Path, out: Path, *, seed: int = 0, workers: int = 2) -> ConversionReport:
    """Converts `*_zoom.npy`, train.txt, val.txt, test.txt and tables with pid, xmin ... zmax.

    They may lie anywhere below `src`. The published lists are the split, so `seed` decides
    nothing: test.txt is the test set, val.txt the validation set of the only fold. Slices as JPEG
    are not read. All nine classes of nodules become one.
    """
    del seed
    arrays = {path.name.removesuffix(ENDING): path for path in sorted(src.rglob(f"*{ENDING}"))}
    if not arrays:
        raise DataError(f"{src}: no PID{ENDING} below it (JPEG slices are not read)")
    lists = {name: _read_list(src, name) for name in LISTS}
    boxes = _read_boxes(src)
    split: dict[str, SplitName] = {}
    failures = []
    for name, pids in lists.items():
        absent = [pid for pid in pids if pid not in arrays]
        if absent:
            shown = ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else "")
            line = f"{name}.txt: {len(absent)} scans have no array: {shown}"
            failures.append(tell_failure(line))
        split |= dict.fromkeys(
            (pid for pid in pids if pid in arrays), "test" if name == "test" else "train"
        )
    notes = []
    if unlisted := len(set(arrays) - set(split)):
        notes.append(f"{unlisted} arrays are in none of the lists and were left out")
    writer = RawDatasetWriter(out, name="pn9", channel_names=("CT",), class_names=("nodule",))
    work = partial(_convert_case, writer, arrays=arrays, boxes=boxes, splits=split)
    failures += writer.convert_each(work, split, workers=workers)
    fold = {side: [pid for pid in lists[side] if pid in split] for side in ("train", "val")}
    return writer.finish(
        [fold] if fold["val"] else None, failures=failures, notes=notes, only=list(split)
    )


def _convert_case(
    writer: RawDatasetWriter,
    case_id: str,
    *,
    arrays: Mapping[str, Path],
    boxes: BoxRows,
    splits: Mapping[str, SplitName],
) -> None:
    array = _read_array(arrays[case_id])
    rows = np.array(boxes.get(_number(case_id), ()), dtype=float).reshape(-1, 6)
    rows[:, 3:] += 1  # the last voxel is inside
    inside = np.concatenate(
        [np.maximum(rows[:, :3], 0), np.minimum(rows[:, 3:], array.shape)], axis=1
    )
    kept = (inside[:, 3:] > inside[:, :3]).all(axis=1)
    notes = []
    if lost := int((~kept).sum()):
        notes.append(f"{lost} boxes lie outside the volume and were dropped")
    if clipped := int((kept & (inside != rows).any(axis=1)).sum()):
        notes.append(f"{clipped} boxes were cut at the border of the volume")
    objects = Boxes(inside[kept], [0] * int(kept.sum())) if kept.any() else NoObjects()
    volume = Volume(array[None], Grid.from_parts(array.shape, SPACING_MM))
    writer.add_case(
        case_id,
        volume,
        objects=objects,
        patient=case_id,
        origins=[f"pn9:{case_id}"],
        split=splits[case_id],
        notes=notes,
    )


def _read_array(path: Path) -> NDArray[Any]:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: not a whole array file ({error})") from error
    if array.ndim == 4 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 3 or array.dtype.kind not in "uif" or array.size == 0:
        raise DataError(
            f"{path}: {array.dtype} array {array.shape}, expected (z, y, x) or (1, z, y, x)"
        )
    return array


def _read_list(src: Path, name: str) -> list[str]:
    found = sorted(src.rglob(f"{name}.txt"))
    if len(found) != 1:
        shown = ", ".join(str(path.relative_to(src)) for path in found) or "none"
        raise DataError(f"{src}: expected one {name}.txt below it, found {shown}")
    lines = found[0].read_text(encoding="utf-8").split("\n")
    return [line.strip() for line in lines if line.strip()]


def _read_boxes(src: Path) -> BoxRows:
    found: dict[int, dict[tuple[float, ...], None]] = {}  # tables repeat each other's rows
    tables = 0
    for path in sorted(src.rglob("*.csv")):
        if path.name.startswith("."):
            continue
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            if not {"pid", *EDGES} <= set(reader.fieldnames or ()):
                continue  # centre tables and the like
            tables += 1
            for row in reader:
                try:
                    edges = tuple(float(row[name]) for name in EDGES)
                    pid = _number(row["pid"])
                except (TypeError, ValueError) as error:
                    raise DataError(f"{path}: line {reader.line_num}: not a number") from error
                if any(high < low for low, high in zip(edges[:3], edges[3:], strict=True)):
                    raise DataError(f"{path}: line {reader.line_num}: inverted box {edges}")
                found.setdefault(pid, {})[edges] = None
    if not tables:
        raise DataError(f"{src}: no table with the columns pid, {', '.join(EDGES)} below it")
    return {pid: list(rows) for pid, rows in found.items()}


def _number(pid: str) -> int:
    # Tables drop the leading zeros that lists and file names have.
    return int(float(pid))
