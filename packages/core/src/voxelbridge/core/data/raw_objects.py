"""The objects of one case from what people label: instance maps, semantic maps or boxes."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.data.foreground import boxes_from_instances, instances_from_semantic
from voxelbridge.core.data.raw_problems import Kind, Problem, RawDataError, few_of, problem
from voxelbridge.core.data.volume import Grid, boxes_from_world_mm

OUTSIDE_TOLERANCE = 1.0  # voxels: rounding of boxes drawn up to the border; more is an error
FARTHEST_MM = 1e6  # a kilometre: no world coordinate is larger, and none overflows
MAX_COUNTED_VALUE = 1 << 16  # label values up to this are counted instead of sorted

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
    """Class of each instance id from the `instances` object of a case's JSON file."""
    if not isinstance(content, dict):
        raise problem(
            "label-json", f"'instances' must be an object of id -> class, got {content!r}"
        )
    classes: dict[int, int] = {}
    problems: list[Problem] = []
    for key, value in content.items():
        if not key.isdecimal() or int(key) < 1:
            problems.append(Problem("label-json", f"instance id {key!r} is not a positive integer"))
        elif int(key) in classes:
            problems.append(Problem("label-json", f"instance {int(key)} is listed twice"))
        elif wrong := _class_problem(value, num_classes, f"instance {key}"):
            problems.append(wrong)
        else:
            classes[int(key)] = value
    if problems:
        raise RawDataError.of(problems)
    return classes


def objects_from_instances(
    instance_map: NDArray[np.integer[Any]], classes: Mapping[int, int]
) -> RawObjects:
    """Objects of an instance map (D, H, W); `classes` must name exactly the ids of the map."""
    if instance_map.min(initial=0) < 0:
        raise problem("label-values", "the label map has values below 0; instance ids start at 1")
    if instance_map.max(initial=0) > np.iinfo(np.int32).max:
        raise problem("label-values", "the label map has ids above 2147483647; renumber them")
    ids, boxes = boxes_from_instances(instance_map)
    present = set(ids.tolist())
    problems: list[Problem] = []
    if missing := sorted(set(classes) - present):
        message = f"instances {few_of(missing)} of the JSON file have no voxel in the label map"
        problems.append(Problem("vanished-instance", message))
    if extra := sorted(present - set(classes)):
        message = f"instances {few_of(extra)} of the label map are not in the JSON file"
        problems.append(Problem("unlisted-instance", message))
    if problems:
        raise RawDataError.of(problems)
    labels = np.array([classes[number] for number in ids.tolist()], dtype=np.int64)
    return RawObjects(instance_map.astype(np.int32), ids, boxes, labels)


def objects_from_semantic(
    label_map: NDArray[np.integer[Any]],
    things: Sequence[Thing],
    min_voxels: int,
    *,
    label_ids: Collection[int] | None = None,
) -> RawObjects:
    """Objects of a semantic map (D, H, W): the components of each thing, classes in their order.

    `label_ids` are the values that the map may hold (None: any); others are an error, since an
    object in them would be lost.
    """
    if label_ids is not None and (unknown := sorted(values_of(label_map) - {0, *label_ids})):
        raise problem(
            "unknown-label",
            f"the label map holds {few_of(unknown)}, which 'labels' of dataset.json does not name "
            f"({few_of(sorted(label_ids))})",
        )
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
    """Objects of the `boxes` list of a case's JSON file; boxes may overlap, touch and repeat.

    Every wrong box is named. Boxes up to one voxel over the border are clipped to it.
    """
    if not isinstance(content, list):
        raise problem("label-json", f"'boxes' must be a list, got {type(content).__name__}")
    boxes, labels = np.zeros((len(content), 6)), np.zeros(len(content), dtype=np.int64)
    problems: list[Problem] = []
    for row, item in enumerate(content):
        try:
            boxes[row], labels[row] = _box(item, grid, num_classes=num_classes, where=f"box {row}")
        except RawDataError as error:
            problems += error.problems
    if problems:
        raise RawDataError.of(problems)
    ids = np.arange(1, len(content) + 1, dtype=np.int64)
    return RawObjects(None, ids, boxes.astype(np.float32), labels)


def no_objects(grid: Grid) -> RawObjects:
    """A case that is known to hold no object: background everywhere."""
    return RawObjects(
        np.zeros(grid.shape, dtype=np.int32),
        np.zeros(0, dtype=np.int64),
        np.zeros((0, 6), dtype=np.float32),
        np.zeros(0, dtype=np.int64),
    )


def values_of(label_map: NDArray[np.integer[Any]]) -> set[int]:
    """The distinct values of a label map (D, H, W)."""
    found: set[int] = set()
    for plane in label_map:  # counting a plane is ten times faster than sorting a volume
        if plane.size == 0:
            continue
        if plane.min() < 0 or plane.max() >= MAX_COUNTED_VALUE:
            found |= set(np.unique(plane).tolist())
        else:
            found |= set(np.flatnonzero(np.bincount(plane.ravel())).tolist())
    return found


def _class_problem(value: Json, num_classes: int, where: str) -> Problem | None:
    if type(value) is int and 0 <= value < num_classes:
        return None
    legal = f"expected 0 to {num_classes - 1}" if num_classes else "dataset.json names no class"
    return Problem("unknown-class", f"{where} has class {value!r}, {legal}")


def _box(
    item: Json, grid: Grid, *, num_classes: int, where: str
) -> tuple[NDArray[np.float64], int]:
    if not isinstance(item, dict) or ("box" in item) == ("box_mm" in item):
        message = f"{where}: expected an object with 'label' and 'box' or 'box_mm'"
        raise problem("box-malformed", message)
    if wrong := _class_problem(item.get("label"), num_classes, where):
        raise RawDataError.of([wrong])
    key = "box" if "box" in item else "box_mm"
    values = _six_numbers(item[key], f"{where}: {key}")
    return _edges(values, grid, in_mm=key == "box_mm", where=where), item["label"]


def _six_numbers(values: Json, where: str) -> NDArray[np.float64]:
    numbers = isinstance(values, list) and len(values) == 6
    if not numbers or not all(type(item) in (int, float) for item in values):
        raise problem("box-malformed", f"{where} is {_short(values)}, expected six numbers")
    try:
        array = np.array([float(item) for item in values])
    except OverflowError:  # an integer of a thousand digits
        array = np.full(6, np.inf)
    if not np.isfinite(array).all():
        raise problem("box-malformed", f"{where} is {_short(values)}, expected finite numbers")
    return array


def _edges(
    values: NDArray[np.float64], grid: Grid, *, in_mm: bool, where: str
) -> NDArray[np.float64]:
    def wrong(kind: Kind, message: str) -> RawDataError:
        return problem(kind, f"{where}: {message}")

    if in_mm and (values[3:] <= 0).any():
        widths = values[3:].tolist()
        raise wrong("box-inverted", f"widths {widths} mm must be positive")
    if in_mm and (np.abs(values) > FARTHEST_MM).any():
        raise wrong("box-outside", f"{values.tolist()} mm lies outside the image")
    box = boxes_from_world_mm(values[None], grid)[0] if in_mm else values
    if not (box[3:] > box[:3]).all():
        raise wrong(
            "box-inverted", f"{box.tolist()} is inverted; expected z0 < z1, y0 < y1, x0 < x1"
        )
    centre = (box[:3] + box[3:]) / 2
    overhang = max(float((-box[:3]).max()), float((box[3:] - np.asarray(grid.shape)).max()))
    # On an oblique grid the tight box of a world box legally overhangs.
    tight = not in_mm or _is_axis_aligned(grid)
    if (
        (centre < 0).any()
        or (centre > grid.shape).any()
        or (tight and overhang > OUTSIDE_TOLERANCE)
    ):
        raise wrong(
            "box-outside",
            f"{np.round(box, 2).tolist()} lies outside the image {grid.shape}; "
            "check its units (voxel edges, or LPS mm in 'box_mm') and axis order",
        )
    clipped = np.concatenate([np.maximum(box[:3], 0.0), np.minimum(box[3:], grid.shape)])
    if not (clipped[3:].astype(np.float32) > clipped[:3].astype(np.float32)).all():
        raise wrong("box-inverted", f"{box.tolist()} has no extent inside the image {grid.shape}")
    return clipped


def _is_axis_aligned(grid: Grid) -> bool:
    return bool((np.abs(grid.directions).max(axis=0) > 1 - 1e-6).all())


def _short(values: Json) -> str:
    text = repr(values)
    return text if len(text) <= 100 else text[:97] + "..."
