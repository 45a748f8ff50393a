"""Tables of nodule centres (or boxes) with a folder of images."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal, assert_never

import numpy as np

from voxelbridge.core.data.dicom import DicomVolume
from voxelbridge.core.data.image_io import image_stem
from voxelbridge.core.data.volume import Grid, boxes_from_world_mm
from voxelbridge.core.errors import DataError
from voxelbridge.detect.convert.csv_table import Row, Table, read_table
from voxelbridge.detect.convert.image_files import (
    CHANNEL,
    FloatArray,
    Images,
    clipped_box,
    common_channels,
    content_of,
    find_case_images,
    grid_of,
    origins_of,
    ras_to_lps,
    sphere_box,
)
from voxelbridge.detect.convert.raw_writer import (
    Boxes,
    ConversionReport,
    NoObjects,
    RawDatasetWriter,
    tell_failure,
    token_of,
)

Space = Literal["lps", "ras", "voxel"]
TABLE_ENDINGS = (".csv", ".tsv", ".txt")


def convert(
    src: Path,
    out: Path,
    *,
    seed: int = 0,
    workers: int = 2,
    images: Path | None = None,
    space: Space = "lps",
) -> ConversionReport:
    """Converts the table `src` (or the only .csv of that folder) with the images below `images`.

    By default the images lie below the table's folder. Images without a row are cases without
    objects; rows without an image are one failure. All cases are training cases; `seed` decides
    nothing. In "voxel" space a centre is a voxel index (a whole number is the middle of a voxel).
    """
    del seed
    path = _table_file(src)
    table = read_table(path)
    channels, refused = find_case_images(images or path.parent)
    by_case, absent = _match(table, _aliases(channels))
    failures = [tell_failure(line) for line in refused]
    if absent:
        shown = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if absent[5:] else "")
        failures.append(tell_failure(f"{path}: {len(absent)} cases have no image: {shown}"))
    if not by_case:
        raise DataError(
            f"{path}: none of its {len(table.rows)} cases is an image of {images or path.parent}; "
            "the case column must hold file names (without ending)"
        )
    class_of = _classes({row.label for rows in table.rows.values() for row in rows})
    writer = RawDatasetWriter(
        out,
        name=path.stem,
        channel_names=common_channels(channels),
        class_names=list(class_of[1]),
        settings={"table": path.name, "space": space},
    )
    names = {case: by_case.get(case) for case in channels}
    work = partial(
        _convert_case,
        writer,
        channels=channels,
        names=names,
        table=table,
        classes=class_of[0],
        space=space,
        path=path,
    )
    tokens = {case: _token(table, name, class_of[0]) for case, name in names.items()}
    failures += writer.convert_each(
        work, dict.fromkeys(channels, "train"), workers=workers, tokens=tokens
    )
    without = sum(name is None for name in names.values())
    notes = [f"{without} images have no row: cases without objects"] if without else []
    return writer.finish(failures=failures, notes=notes, only=list(channels))


def row_box(row: Row, grid: Grid, *, space: Space) -> FloatArray:
    """The box (6,) of a row in voxel edges of the image, not cut to it."""
    if row.shape == "edges":
        return np.array(row.values)
    first, second = np.array(row.values[:3]), np.array(row.values[3:])
    if space == "voxel":  # x, y, z along the file's own axes
        if row.shape == "corners":
            return np.concatenate([first[::-1], second[::-1]])
        middle, half = first[::-1] + 0.5, second[::-1] / 2
        return np.concatenate([middle - half, middle + half])
    if row.shape == "corners":
        first, second = (first + second) / 2, second - first
    centre = ras_to_lps(first) if space == "ras" else first
    match row.shape:
        case "sphere":
            return sphere_box(centre, row.values[3], grid)
        case "box" | "corners":
            return boxes_from_world_mm([[*centre, *second]], grid)[0]
        case _:
            assert_never(row.shape)


def _convert_case(
    writer: RawDatasetWriter,
    case_id: str,
    *,
    channels: Mapping[str, Images],
    names: Mapping[str, str | None],
    table: Table,
    classes: Mapping[str, int],
    space: Space,
    path: Path,
) -> None:
    name = names[case_id]
    rows = table.rows[name] if name is not None else ()
    grid = grid_of(channels[case_id])
    boxes = [
        clipped_box(row_box(row, grid, space=space), grid, where=f"{path.name}: line {row.line}")
        for row in rows
    ]
    labels = [classes[row.label] for row in rows]
    writer.add_case(
        case_id,
        content_of(channels[case_id]),
        objects=Boxes(np.array(boxes), labels) if boxes else NoObjects(),
        patient=table.patients.get(name) if name is not None else None,
        origins=origins_of(channels[case_id]),
    )


def _token(table: Table, name: str | None, classes: Mapping[str, int]) -> str:
    if name is None:
        return ""
    objects = [(row.shape, row.values, classes[row.label]) for row in table.rows[name]]
    return token_of(objects, table.patients.get(name))


def _table_file(src: Path) -> Path:
    if src.is_dir():
        found = sorted(path for path in src.glob("*.csv") if not path.name.startswith("."))
        if len(found) != 1:
            raise DataError(f"{src}: {len(found)} .csv files, expected one; name the table itself")
        return found[0]
    if not src.is_file() or src.suffix.lower() not in TABLE_ENDINGS:
        raise DataError(f"{src}: expected a table ({', '.join(TABLE_ENDINGS)}) or its folder")
    return src


def _aliases(channels: Mapping[str, Images]) -> dict[str, str]:
    # A series may be named by its folder or by its UID.
    aliases = {case: case for case in channels}
    for case, images in channels.items():
        if isinstance(images, DicomVolume) and images.origin_id is not None:
            aliases.setdefault(images.origin_id.removeprefix("dicom:"), case)
    return aliases


def _match(table: Table, aliases: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    # Tables name images by their case, by a file name, a path, or with the channel's number.
    found: dict[str, str] = {}
    absent = []
    for name in table.rows:
        stem = image_stem(name.replace("\\", "/").rpartition("/")[2])
        parts = CHANNEL.fullmatch(stem)
        candidates = (name, stem, parts["case"] if parts else stem)
        case = next((aliases[choice] for choice in candidates if choice in aliases), None)
        if case is None:
            absent.append(name)
        elif case in found:
            raise DataError(f"rows named {found[case]!r} and {name!r} are the same image")
        else:
            found[case] = name
    return found, absent


def _classes(labels: set[str]) -> tuple[dict[str, int], tuple[str, ...]]:
    """Class of each label text and the class names.

    Whole numbers from 0 keep their value; other texts are numbered in order. Without a label there
    is one class.
    """
    if not labels or labels == {""}:
        return {"": 0}, ("object",)
    if "" in labels:
        raise DataError("some rows have a label and some have none; fill the column")
    if all(label.isdecimal() for label in labels) and min(map(int, labels)) == 0:
        top = max(map(int, labels))
        names = tuple(str(n) for n in range(top + 1))
        return {label: int(label) for label in labels}, names if top else ("object",)
    numeric = all(label.isdecimal() for label in labels)
    ordered = sorted(labels, key=lambda label: (int(label) if numeric else 0, label))
    return {label: n for n, label in enumerate(ordered)}, tuple(ordered)
