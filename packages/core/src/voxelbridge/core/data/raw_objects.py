"""The objects of one case from what people label: instance maps, semantic maps or boxes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.data.foreground import boxes_from_instances, instances_from_semantic
from voxelbridge.core.data.volume import Grid, boxes_from_world_mm
from voxelbridge.core.errors import DataError

OUTSIDE_TOLERANCE = 1.0  # voxels: rounding of boxes drawn up to the border; more is an error

Json = Any  # a parsed JSON tree


@dataclass(frozen=True)
class Thing:
    """A class of objects in semantic maps: its name and the label ids that make it up."""

    name: str
    ids: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class RawObjects:
    """The objects of a case on the image's own grid and axis order, before any preprocessing."""

    instances: NDArray[np.int32] | None  # (D, H, W), 0 = background; None: only boxes are known
    ids: NDArray[np.int64]  # (N,) value of each object in `instances`
    boxes: NDArray[np.float32]  # (N, 6) voxel edges
    labels: NDArray[np.int64]  # (N,) 0-based class
    num_specks: int = 0  # components of a semantic map that were too small to count


def instance_classes(content: Json, num_classes: int) -> dict[int, int]:
    if not isinstance(content, dict):
        raise DataError(f"'instances' must be an object of id -> class, got {content!r}")
    classes: dict[int, int] = {}
    for key, value in content.items():
        if not key.isdecimal() or int(key) < 1:
            raise DataError(f"instance id {key!r} is not a positive integer")
        classes[int(key)] = _class(value, num_classes, f"instance {key}")
    return classes


def _class(value: Json, num_classes: int, where: str) -> int:
    if type(value) is not int or not 0 <= value < num_classes:
        raise DataError(f"{where} has class {value!r}, expected 0 to {num_classes - 1}")
    return value


def objects_from_instances(
    instance_map: NDArray[np.int64], classes: Mapping[int, int]
) -> RawObjects:
    ids, boxes = boxes_from_instances(instance_map)
    present = set(ids.tolist())
    if missing := sorted(set(classes) - present):
        raise DataError(
            f"instances {few_of(missing)} of the JSON file have no voxel in the label map"
        )
    if extra := sorted(present - set(classes)):
        raise DataError(f"instances {few_of(extra)} of the label map are not in the JSON file")
    labels = np.array([classes[number] for number in ids.tolist()], dtype=np.int64)
    return RawObjects(instance_map.astype(np.int32), ids, boxes, labels)


def objects_from_semantic(
    label_map: NDArray[np.int64], things: Sequence[Thing], min_voxels: int
) -> RawObjects:
    instances = np.zeros(label_map.shape, dtype=np.int32)
    boxes = [np.zeros((0, 6), dtype=np.float32)]
    labels: list[int] = []
    num_specks = 0
    for index, thing in enumerate(things):
        found, specks = instances_from_semantic(label_map, thing.ids, min_voxels=min_voxels)
        ids, of_thing = boxes_from_instances(found)
        # Things may overlap (regions): the later one is seen in the map, all are boxed whole.
        np.copyto(instances, found + len(labels), where=found > 0)
        boxes.append(of_thing)
        labels += [index] * len(ids)
        num_specks += specks
    ids = np.arange(1, len(labels) + 1, dtype=np.int64)
    return RawObjects(instances, ids, np.concatenate(boxes), np.array(labels, np.int64), num_specks)


def objects_from_boxes(content: Json, grid: Grid, *, num_classes: int) -> RawObjects:
    if not isinstance(content, list):
        raise DataError(f"'boxes' must be a list, got {type(content).__name__}")
    boxes, labels = np.zeros((len(content), 6)), np.zeros(len(content), dtype=np.int64)
    for row, item in enumerate(content):
        where = f"box {row}"
        if not isinstance(item, dict) or ("box" in item) == ("box_mm" in item):
            raise DataError(f"{where}: expected an object with 'label' and 'box' or 'box_mm'")
        labels[row] = _class(item.get("label"), num_classes, where)
        key = "box" if "box" in item else "box_mm"
        values = _six_numbers(item[key], f"{where}: {key}")
        boxes[row] = _edges(values, grid, in_mm=key == "box_mm", where=where)
    ids = np.arange(1, len(content) + 1, dtype=np.int64)
    return RawObjects(None, ids, boxes.astype(np.float32), labels)


def _six_numbers(values: Json, where: str) -> NDArray[np.float64]:
    numbers = isinstance(values, list) and len(values) == 6
    if not numbers or not all(type(item) in (int, float) for item in values):
        raise DataError(f"{where} is {values!r}, expected six numbers")
    array = np.array(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise DataError(f"{where} is {values!r}, expected finite numbers")
    return array


def _edges(
    values: NDArray[np.float64], grid: Grid, *, in_mm: bool, where: str
) -> NDArray[np.float64]:
    if in_mm and (values[3:] <= 0).any():
        raise DataError(f"{where}: widths {values[3:].tolist()} mm must be positive")
    box = boxes_from_world_mm(values[None], grid)[0] if in_mm else values
    if not (box[3:] > box[:3]).all():
        raise DataError(f"{where}: {box.tolist()} is inverted; expected z0 < z1, y0 < y1, x0 < x1")
    centre = (box[:3] + box[3:]) / 2
    overhang = max(float((-box[:3]).max()), float((box[3:] - np.asarray(grid.shape)).max()))
    # On an oblique grid the tight box of a world box legally overhangs.
    if (
        (centre < 0).any()
        or (centre > grid.shape).any()
        or (not in_mm and overhang > OUTSIDE_TOLERANCE)
    ):
        raise DataError(
            f"{where}: {np.round(box, 2).tolist()} lies outside the image {grid.shape}; "
            "check its units (voxel edges, or LPS mm in 'box_mm') and axis order"
        )
    return np.concatenate([np.maximum(box[:3], 0.0), np.minimum(box[3:], grid.shape)])


def few_of(names: Sequence[object]) -> str:
    shown = ", ".join(str(name) for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
