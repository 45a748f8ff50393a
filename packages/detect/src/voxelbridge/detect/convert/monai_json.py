"""MONAI data lists for detection: a JSON file that names images, boxes and labels.

The defaults are those of MONAI's LUNA16 lists: boxes as centre and size in LPS mm. (There the
boxes are used with `affine_lps_to_ras=True`, which turns the image's RAS affine to LPS.)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, assert_never

import numpy as np

from voxelbridge.core.data.image_io import image_stem, read_grid
from voxelbridge.core.data.volume import Grid, boxes_from_world_mm
from voxelbridge.core.errors import DataError
from voxelbridge.core.files import read_json
from voxelbridge.detect.convert.image_files import (
    CHANNEL,
    FloatArray,
    clipped_box,
    common_channels,
    ras_to_lps,
)
from voxelbridge.detect.convert.raw_writer import (
    Boxes,
    ConversionReport,
    NoObjects,
    Objects,
    RawDatasetWriter,
    SplitName,
    Unlabelled,
    token_of,
)

BoxMode = Literal["cccwhd", "xyzxyz", "xyzwhd", "xxyyzz"]
Space = Literal["lps", "ras", "voxel"]
SECTIONS = {"training": "train", "validation": "train", "testing": "test", "test": "test"}

Json = Any  # a parsed JSON tree


@dataclass(frozen=True, eq=False)
class _Item:
    section: str
    fold: int | None
    images: tuple[Path, ...]
    boxes: FloatArray | None  # (N, 6) as in the file; None: not labelled
    labels: tuple[int, ...]


def convert(
    src: Path,
    out: Path,
    *,
    seed: int = 0,
    workers: int = 2,
    images: Path | None = None,
    box_mode: BoxMode = "cccwhd",
    space: Space = "lps",
) -> ConversionReport:
    """Converts the data list `src` (or the only JSON file of that folder).

    Relative image paths start at `images`, by default at the list's folder; a list of paths is a
    case of several channels. `training` and `validation` are the train set (validation or `fold`
    numbers become splits.json), `testing` the test set; items without `box` are legal there only.
    `seed` decides nothing.
    """
    del seed
    path = _list_file(src)
    items = _read_items(path, images or path.parent)
    cases = _case_ids(items)
    labels = {label for item in items for label in item.labels}
    names = _class_names(path, max(labels, default=0) + 1)
    writer = RawDatasetWriter(
        out,
        name=path.stem,
        channel_names=common_channels({case: item.images for case, item in cases.items()}),
        class_names=names,
        settings={"list": path.name, "box_mode": box_mode, "space": space},
    )
    split: dict[str, SplitName] = {
        case: "test" if SECTIONS[item.section] == "test" else "train"
        for case, item in cases.items()
    }
    work = partial(_convert_case, writer, cases=cases, splits=split, mode=box_mode, space=space)
    tokens = {
        case: token_of(
            item.images, None if item.boxes is None else item.boxes.tolist(), item.labels
        )
        for case, item in cases.items()
    }
    failures = writer.convert_each(work, split, workers=workers, tokens=tokens)
    return writer.finish(_folds(cases), failures=failures, only=list(split))


def boxes_to_edges(boxes: FloatArray, grid: Grid, *, mode: BoxMode, space: Space) -> FloatArray:
    """Boxes (N, 6) as MONAI writes them -> voxel edges (z0, y0, x0, z1, y1, x1) of the image.

    World boxes stand in mm with their axes along x, y, z. Boxes in "voxel" are half-open ranges of
    voxels along the file's own x, y, z axes.
    """
    low, high = _corners(np.asarray(boxes, dtype=np.float64).reshape(-1, 6), mode)
    match space:
        case "voxel":
            return np.concatenate([low[:, ::-1], high[:, ::-1]], axis=1)
        case "ras":
            low, high = ras_to_lps(low), ras_to_lps(high)
        case "lps":
            pass
        case _:
            assert_never(space)
    return boxes_from_world_mm(np.concatenate([(low + high) / 2, abs(high - low)], axis=1), grid)


def _corners(boxes: FloatArray, mode: BoxMode) -> tuple[FloatArray, FloatArray]:
    match mode:
        case "cccwhd":
            return boxes[:, :3] - boxes[:, 3:] / 2, boxes[:, :3] + boxes[:, 3:] / 2
        case "xyzxyz":
            return boxes[:, :3], boxes[:, 3:]
        case "xyzwhd":
            return boxes[:, :3], boxes[:, :3] + boxes[:, 3:]
        case "xxyyzz":
            return boxes[:, 0::2], boxes[:, 1::2]
        case _:
            assert_never(mode)


def _convert_case(
    writer: RawDatasetWriter,
    case_id: str,
    *,
    cases: Mapping[str, _Item],
    splits: Mapping[str, SplitName],
    mode: BoxMode,
    space: Space,
) -> None:
    item = cases[case_id]
    for path in item.images:
        if not path.is_file():
            raise DataError(f"image {path} is missing; do the paths start in another folder?")
    objects: Objects
    if item.boxes is None:
        objects = Unlabelled()
    elif len(item.boxes) == 0:
        objects = NoObjects()
    else:
        low, high = _corners(item.boxes, mode)
        if not (high > low).all():
            row = int(np.flatnonzero(~(high > low).all(axis=1))[0])
            raise DataError(
                f"box {row}: {item.boxes[row].tolist()} has no extent; is {mode} its mode?"
            )
        grid = read_grid(item.images[0])
        edges = boxes_to_edges(item.boxes, grid, mode=mode, space=space)
        kept = [clipped_box(box, grid, where=f"box {n}") for n, box in enumerate(edges)]
        objects = Boxes(np.array(kept), item.labels)
    writer.add_case(case_id, item.images, objects=objects, split=splits[case_id])


def _list_file(src: Path) -> Path:
    if src.is_dir():
        found = sorted(path for path in src.glob("*.json") if not path.name.startswith("."))
        if len(found) != 1:
            raise DataError(
                f"{src}: {len(found)} JSON files, expected one MONAI data list; name the file"
            )
        return found[0]
    if not src.is_file():
        raise DataError(f"{src}: does not exist; expected a MONAI data list (JSON)")
    return src


def _read_items(path: Path, base: Path) -> list[_Item]:
    content = read_json(path)
    sections = [key for key in SECTIONS if isinstance(content, dict) and key in content]
    if not sections:
        raise DataError(f"{path}: no list 'training', 'validation' or 'testing' at its top")
    items = []
    for section in sections:
        if not isinstance(content[section], list):
            raise DataError(f"{path}: '{section}' is not a list")
        for number, entry in enumerate(content[section]):
            items.append(_item(entry, section, base, where=f"{path}: {section}[{number}]"))
    return items


def _item(entry: Json, section: str, base: Path, *, where: str) -> _Item:
    entry = {"image": entry} if isinstance(entry, str) else entry
    names = entry.get("image") if isinstance(entry, dict) else None
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise DataError(f"{where}: no 'image': expected a path or a list of paths")
    images = tuple(base / name for name in names)
    fold = entry.get("fold")
    if fold is not None and type(fold) is not int:
        raise DataError(f"{where}: 'fold' is {fold!r}, expected a whole number")
    if "box" not in entry:
        if SECTIONS[section] == "train":
            raise DataError(f"{where}: no 'box'; a case without objects has an empty list")
        return _Item(section, fold, images, None, ())
    try:
        boxes = np.array(entry["box"], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: 'box' is not a list of six numbers each") from error
    boxes = boxes.reshape(0, 6) if boxes.size == 0 else boxes
    if boxes.ndim != 2 or boxes.shape[1] != 6 or not np.isfinite(boxes).all():
        raise DataError(f"{where}: 'box' is not a list of six finite numbers each")
    labels = entry.get("label", [0] * len(boxes))
    if not isinstance(labels, list) or len(labels) != len(boxes):
        raise DataError(f"{where}: {len(boxes)} boxes, but 'label' is {labels!r}")
    if not all(type(label) is int and label >= 0 for label in labels):
        raise DataError(f"{where}: 'label' must hold whole numbers from 0, got {labels!r}")
    return _Item(section, fold, images, boxes, tuple(labels))


def _case_ids(items: Sequence[_Item]) -> dict[str, _Item]:
    # The file name; where it repeats (FOLDER/image.nii.gz), as many folder names as it takes.
    names: list[str] = []
    for depth in range(1, 9):
        names = ["_".join((*item.images[0].parts[-depth:-1], _stem(item))) for item in items]
        if len(set(names)) == len(items):
            return dict(zip(names, items, strict=True))
    twice = next(name for name in names if names.count(name) > 1)
    raise DataError(f"image {twice} is listed twice; every case may be listed once")


def _stem(item: _Item) -> str:
    stem = image_stem(item.images[0].name)
    parts = CHANNEL.fullmatch(stem)
    return parts["case"] if parts else stem


def _class_names(path: Path, count: int) -> tuple[str, ...]:
    named = read_json(path).get("labels")
    names = named if isinstance(named, dict) else {}
    default = "object" if count == 1 else "class {}"
    return tuple(str(names.get(str(n), default.format(n))) for n in range(count))


def _folds(cases: Mapping[str, _Item]) -> list[dict[str, list[str]]] | None:
    pool = {case: item for case, item in cases.items() if SECTIONS[item.section] == "train"}
    val = [case for case, item in pool.items() if item.section == "validation"]
    if val:
        return [{"train": [case for case in pool if case not in set(val)], "val": val}]
    numbers = sorted({item.fold for item in pool.values() if item.fold is not None})
    if len(numbers) < 2:
        return None
    return [
        {
            "train": [case for case, item in pool.items() if item.fold != number],
            "val": [case for case, item in pool.items() if item.fold == number],
        }
        for number in numbers
    ]
