"""3D Slicer markups read back as labels: what `vb-detect predict` wrote and somebody corrected.

Boxes are ROI nodes. A file without ROI nodes is a case without objects; an image without a file
was not looked at and is left out.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from voxelbridge.core.data.volume import Grid, world_to_edges
from voxelbridge.core.errors import DataError
from voxelbridge.core.files import read_json
from voxelbridge.detect.convert.image_files import (
    FloatArray,
    Images,
    clipped_box,
    common_channels,
    content_of,
    find_case_images,
    grid_of,
    origins_of,
    ras_to_lps,
)
from voxelbridge.detect.convert.raw_writer import (
    Boxes,
    ConversionReport,
    NoObjects,
    RawDatasetWriter,
    tell_failure,
    token_of,
)

ENDING = ".mrk.json"
SCORE = re.compile(r"\s+\(?\d*\.\d+\)?$")  # " 0.873" at the end of our labels
UNNAMED = re.compile(r"(R|ROI|F|MarkupsROI|\d*)([-_ ]?\d+)*")  # what Slicer calls a new ROI
ALIGNED = 1e-4  # of the direction cosines: beyond it an ROI counts as rotated
SIGNS = np.array(list(product((-0.5, 0.5), repeat=3)))  # (8, 3) corners of a unit box

Json = Any  # a parsed JSON tree


@dataclass(frozen=True, eq=False)
class Roi:
    """A box of a markups file: centre and sizes in LPS mm, unit vectors of its axes in columns."""

    centre_mm: FloatArray
    size_mm: FloatArray
    axes: FloatArray  # (3, 3)
    label: str | None  # None: still the name that Slicer gives


def convert(
    src: Path,
    out: Path,
    *,
    seed: int = 0,
    workers: int = 2,
    images: Path | None = None,
    class_names: Sequence[str] = (),
) -> ConversionReport:
    """Converts the `*.mrk.json` files below `src` with the images below `images` (default `src`).

    `CASE.mrk.json`, `CASE_....mrk.json` and files in a folder called CASE belong to that image.
    `class_names` fixes the order of the classes (give the model's); else they are sorted. An ROI
    that was never named is of the only class, or an error. `seed` decides nothing.
    """
    del seed
    channels, refused = find_case_images(images or src)
    files = _files_by_case(src, set(channels))
    rois: dict[str, list[Roi]] = {}
    notes = []
    failures = [tell_failure(line) for line in refused]
    for case, paths in files.items():
        try:
            read = [read_markups(path) for path in paths]
        except DataError as error:
            failures.append(tell_failure(f"case {case}: {error}"))
            continue
        rois[case] = [roi for found, _ in read for roi in found]
        notes += [f"{case}: {note}" for _, more in read for note in more]
    names = _class_names(rois, class_names)
    if left := len(channels) - len(files):
        notes.append(f"{left} images have no {ENDING} file and were left out")
    writer = RawDatasetWriter(
        out,
        name="slicer",
        channel_names=common_channels({case: channels[case] for case in files}),
        class_names=names,
    )
    work = partial(_convert_case, writer, channels=channels, rois=rois, names=names)
    tokens = {case: _token(of_case, names) for case, of_case in rois.items()}
    failures += writer.convert_each(
        work, dict.fromkeys(rois, "train"), workers=workers, tokens=tokens
    )
    return writer.finish(failures=failures, notes=notes, only=list(rois))


def read_markups(path: Path) -> tuple[list[Roi], list[str]]:
    """The ROIs of a markups file and notes on what else it holds.

    Positions are LPS unless `coordinateSystem` says RAS (or 0). Hidden and locked ROIs count: to
    reject a box in Slicer, delete it. Raises DataError.
    """
    content = read_json(path)
    markups = content.get("markups") if isinstance(content, dict) else None
    if not isinstance(markups, list):
        raise DataError(f"{path}: no list 'markups'; expected a 3D Slicer markups file")
    rois = []
    others: Counter[str] = Counter()
    for number, markup in enumerate(markups):
        kind = str(markup.get("type")) if isinstance(markup, dict) else "no object"
        if kind not in ("ROI", "ROIJson"):
            others[kind] += 1
        elif (roi := _roi(markup, f"{path}: markup {number}")) is not None:
            rois.append(roi)
        else:
            others["ROI without a position"] += 1
    notes = [f"{count} markups of type {kind} were passed over" for kind, count in others.items()]
    return rois, notes


def roi_box(roi: Roi, grid: Grid) -> FloatArray:
    """Tight box (6,) in voxel edges around an ROI; exact when its axes are the image's."""
    corners = roi.centre_mm + (SIGNS * roi.size_mm) @ roi.axes.T  # (8, 3)
    edges = world_to_edges(corners, grid)
    return np.concatenate([edges.min(axis=0), edges.max(axis=0)])


def _convert_case(
    writer: RawDatasetWriter,
    case_id: str,
    *,
    channels: Mapping[str, Images],
    rois: Mapping[str, Sequence[Roi]],
    names: Sequence[str],
) -> None:
    grid = grid_of(channels[case_id])
    boxes, labels = [], []
    turned = 0
    for number, roi in enumerate(rois[case_id]):
        where = f"ROI {number} ({roi.label or 'unnamed'})"
        if roi.label is None and len(names) > 1:
            raise DataError(f"{where}: name it after its class: {', '.join(names)}")
        if roi.label is not None and roi.label not in names:
            raise DataError(f"{where}: unknown class; expected {', '.join(names)}")
        boxes.append(clipped_box(roi_box(roi, grid), grid, where=where))
        labels.append(0 if roi.label is None else names.index(roi.label))
        shared = np.abs(grid.directions.T @ roi.axes)  # a permutation when axes agree
        turned += bool((shared.max(axis=0) < 1 - ALIGNED).any())
    notes = [f"{turned} rotated ROIs became the upright boxes around them"] if turned else []
    writer.add_case(
        case_id,
        content_of(channels[case_id]),
        objects=Boxes(np.array(boxes), labels) if boxes else NoObjects(),
        origins=origins_of(channels[case_id]),
        notes=notes,
    )


def _token(rois: Sequence[Roi], names: Sequence[str]) -> str:
    values = [(r.centre_mm.tolist(), r.size_mm.tolist(), r.axes.tolist(), r.label) for r in rois]
    return token_of(values, tuple(names))


def _roi(markup: Mapping[str, Json], where: str) -> Roi | None:
    points = [p for p in markup.get("controlPoints") or () if isinstance(p, dict)]
    point = points[0] if points else {}
    centre = markup.get("center") or point.get("position")
    if centre is None or point.get("positionStatus", "defined") != "defined":
        return None
    if markup.get("insideOut"):
        raise DataError(f"{where}: the ROI is inside out; switch that off in Slicer")
    units = markup.get("coordinateUnits", "mm")
    if units != "mm" and not (isinstance(units, list | dict) and "mm" in str(units)):
        raise DataError(f"{where}: units {units!r}, expected mm")
    size = _numbers(markup.get("size"), 3, f"{where}: size")
    if not (size > 0).all():
        raise DataError(f"{where}: size {size.tolist()} must be positive")
    turned = markup.get("orientation") or np.eye(3).ravel().tolist()
    axes = _numbers(turned, 9, f"{where}: orientation").reshape(3, 3)
    lengths = np.linalg.norm(axes, axis=0)
    if not np.allclose(axes.T @ axes, np.eye(3), atol=1e-3):
        raise DataError(f"{where}: orientation {axes.ravel().tolist()} is no rotation")
    middle = _numbers(centre, 3, f"{where}: centre")
    match str(markup.get("coordinateSystem", "LPS")):
        case "LPS" | "1":
            pass
        case "RAS" | "0":
            middle, axes = ras_to_lps(middle), ras_to_lps(axes.T).T
        case other:
            raise DataError(f"{where}: coordinate system {other!r}, expected LPS or RAS")
    return Roi(middle, size, axes / lengths, _label(markup, point))


def _label(markup: Mapping[str, Json], point: Mapping[str, Json]) -> str | None:
    # Renaming the node in Slicer changes `name`; the label of the point is what we wrote.
    for text in (markup.get("name"), point.get("label")):
        cleaned = SCORE.sub("", str(text or "").strip())
        if not UNNAMED.fullmatch(cleaned):
            return cleaned
    return None


def _numbers(values: Json, count: int, where: str) -> FloatArray:
    numbers = isinstance(values, list) and all(type(value) in (int, float) for value in values)
    if not numbers or len(values) != count or not np.isfinite(values).all():
        raise DataError(f"{where} is {values!r}, expected {count} numbers")
    return np.array(values, dtype=np.float64)


def _files_by_case(src: Path, cases: set[str]) -> dict[str, list[Path]]:
    paths = sorted(p for p in src.rglob(f"*{ENDING}") if not p.name.startswith("."))
    if not paths:
        raise DataError(f"{src}: no {ENDING} files below it; expected CASE{ENDING} per image")
    found: dict[str, list[Path]] = {}
    for path in paths:
        name = path.name.removesuffix(ENDING)
        starts = [c for c in cases if name == c or re.match(rf"{re.escape(c)}[^0-9A-Za-z]", name)]
        case = max(starts, key=len, default=path.parent.name)
        if case not in cases:
            raise DataError(f"{path}: belongs to no image; call it CASE{ENDING}")
        found.setdefault(case, []).append(path)
    return found


def _class_names(rois: Mapping[str, Sequence[Roi]], given: Sequence[str]) -> tuple[str, ...]:
    if given:
        return tuple(given)
    found = {roi.label for of_case in rois.values() for roi in of_case if roi.label is not None}
    return tuple(sorted(found)) or ("object",)
