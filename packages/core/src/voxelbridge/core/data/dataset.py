"""Raw data sets: the folders people already have (nnU-Net's and nnDetection's layouts).

docs/formats/case.md describes what becomes of them. A data set is opened from names alone; the
files of a case are read, and checked, when the case is read.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.data.foreground import MIN_OBJECT_VOXELS
from voxelbridge.core.data.image_io import describe_grid, image_ending, read_channels, read_image
from voxelbridge.core.data.raw_objects import (
    RawObjects,
    Thing,
    few_of,
    instance_classes,
    objects_from_boxes,
    objects_from_instances,
    objects_from_semantic,
)
from voxelbridge.core.data.volume import Grid, Volume, match_grid
from voxelbridge.core.errors import DataError, VoxelbridgeError
from voxelbridge.core.files import read_json

IMAGE_NAME = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")

Json = Any  # a parsed JSON tree


@dataclass(frozen=True)
class RawCase:
    """One case of a raw data set: where its files are; nothing is read before it is asked for."""

    case_id: str
    image_paths: tuple[Path, ...]  # one per channel
    label_path: Path | None  # instance or semantic map
    objects_path: Path | None  # {case}.json with instances or boxes
    things: tuple[Thing, ...]  # of semantic maps
    num_classes: int
    min_voxels: int = MIN_OBJECT_VOXELS
    problem: str | None = None  # why its images cannot be read, as far as names tell

    @property
    def has_labels(self) -> bool:
        return self.label_path is not None or self.objects_path is not None

    def read_image(self) -> Volume:
        """All channels as (C, D, H, W) on the file's own grid. DataError naming the case."""
        if self.problem is not None:
            raise DataError(f"case {self.case_id}: {self.problem}")
        try:
            return read_channels(self.image_paths)
        except VoxelbridgeError as error:
            raise DataError(f"case {self.case_id}: {error}") from error

    def read_objects(self, grid: Grid) -> RawObjects:
        """The objects of the case on the image's `grid`. DataError naming the case."""
        try:
            return self._read_objects(grid)
        except VoxelbridgeError as error:
            raise DataError(f"case {self.case_id}: {error}") from error

    def read_semantic(self, grid: Grid) -> NDArray[np.int64]:
        """The label map (D, H, W) as stored, on the image's `grid`. DataError naming the case."""
        try:
            return self._read_map(grid)
        except VoxelbridgeError as error:
            raise DataError(f"case {self.case_id}: {error}") from error

    def _read_objects(self, grid: Grid) -> RawObjects:
        if self.objects_path is not None:
            content = read_json(self.objects_path)
            if isinstance(content, dict) and "boxes" in content:
                return objects_from_boxes(content["boxes"], grid, num_classes=self.num_classes)
            if isinstance(content, dict) and "instances" in content:
                classes = instance_classes(content["instances"], self.num_classes)
                return objects_from_instances(self._read_map(grid), classes)
            raise DataError(f"{self.objects_path.name}: expected a key 'instances' or 'boxes'")
        if self.label_path is None:
            raise DataError("no label: neither a label map nor a JSON file in the labels folder")
        if not self.things:
            raise DataError(
                f"{self.label_path.name} has no JSON file beside it and dataset.json has no "
                "'things': name there the labels that are objects"
            )
        return objects_from_semantic(self._read_map(grid), self.things, self.min_voxels)

    def _read_map(self, grid: Grid) -> NDArray[np.int64]:
        if self.label_path is None:
            raise DataError("the label map is missing")
        volume = read_image(self.label_path)
        matched = match_grid(volume, grid)
        if matched is None:
            raise DataError(
                f"label grid {describe_grid(volume.grid)} differs from image grid "
                f"{describe_grid(grid)}; resample the label or fix the file"
            )
        array = matched.array[0]
        whole = array.astype(np.int64)
        if array.dtype.kind == "f" and not np.array_equal(whole, array):
            raise DataError(f"{self.label_path.name}: label values are not whole numbers")
        return whole


@dataclass(frozen=True)
class RawDataset:
    """A raw data set: its cases and what dataset.json says about them."""

    folder: Path
    name: str
    channel_names: tuple[str, ...]
    class_names: tuple[str, ...]  # class k is class_names[k]
    cases: tuple[RawCase, ...]  # imagesTr, sorted by id
    test_cases: tuple[RawCase, ...]  # imagesTs
    splits: tuple[Mapping[Literal["train", "val"], tuple[str, ...]], ...] | None
    groups: Mapping[str, str]  # patient of each case; a case that is not listed is its own

    @classmethod
    def open(cls, folder: Path) -> "RawDataset":
        """Opens a data set folder by its dataset.json and file names; reads no image.

        Raises DataError when dataset.json, splits.json or groups.json cannot be used and when
        there are no images. What is wrong with one case is told when that case is read.
        """
        description = folder / "dataset.json"
        if not description.is_file():
            raise DataError(f"{folder}: no dataset.json: not a raw data set")
        content = read_json(description)
        if not isinstance(content, dict):
            raise DataError(f"{description}: expected a JSON object")
        channels = _channel_names(description, content)
        things, class_names = _classes(description, content)
        images = folder / "raw_splitted" if (folder / "raw_splitted").is_dir() else folder
        common = {
            "num_channels": len(channels),
            "things": things,
            "num_classes": len(class_names),
            "ending": content.get("file_ending"),
            "min_voxels": int(content.get("min_voxels", MIN_OBJECT_VOXELS)),
        }
        cases = _find_cases(images / "imagesTr", images / "labelsTr", **common)
        test_cases = _find_cases(images / "imagesTs", images / "labelsTs", **common)
        if not cases and not test_cases:
            raise DataError(f"{images}: no images in imagesTr; expected {{case}}_0000.nii.gz")
        ids = [case.case_id for case in (*cases, *test_cases)]
        if twice := sorted({name for name in ids if ids.count(name) > 1}) if _repeats(ids) else []:
            raise DataError(f"{folder}: cases in imagesTr and in imagesTs: {few_of(twice)}")
        return cls(
            folder,
            str(content.get("name", content.get("task", folder.name))),
            channels,
            class_names,
            cases,
            test_cases,
            _read_splits(folder / "splits.json", {case.case_id for case in cases}),
            _read_groups(folder / "groups.json", set(ids)),
        )


def _repeats(ids: Sequence[str]) -> bool:
    return len(set(ids)) < len(ids)


def _find_cases(
    images: Path,
    labels: Path,
    *,
    num_channels: int,
    things: tuple[Thing, ...],
    num_classes: int,
    ending: str | None,
    min_voxels: int,
) -> tuple[RawCase, ...]:
    if not images.is_dir():
        return ()
    channels: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted(images.iterdir()):
        found = _ending_of(path.name, ending)
        if found is None or path.name.startswith("."):  # macOS leaves ._* files in archives
            continue
        parts = IMAGE_NAME.fullmatch(path.name[: -len(found)])
        if parts is None:
            raise DataError(f"{path}: no channel number in its name; expected CASE_0000{found}")
        channels.setdefault(parts["case"], []).append((int(parts["channel"]), path))
    label_names = {path.name for path in labels.iterdir()} if labels.is_dir() else set()
    cases = []
    for case_id, of_case in sorted(channels.items()):
        of_case.sort()
        numbers = [number for number, _ in of_case]
        problem = None
        if numbers != list(range(num_channels)):
            problem = (
                f"channels {numbers} in {images.name}, dataset.json declares "
                f"{num_channels}; add or remove files"
            )
        suffix = _ending_of(of_case[0][1].name, ending)
        label_path = labels / f"{case_id}{suffix}"
        objects_path = labels / f"{case_id}.json"
        cases.append(
            RawCase(
                case_id,
                tuple(path for _, path in of_case),
                label_path if label_path.name in label_names else None,
                objects_path if objects_path.name in label_names else None,
                things,
                num_classes,
                min_voxels,
                problem,
            )
        )
    return tuple(cases)


def _ending_of(name: str, ending: str | None) -> str | None:
    if ending is None:
        return image_ending(name)
    return ending if name.endswith(ending) else None


def _channel_names(path: Path, content: Mapping[str, Json]) -> tuple[str, ...]:
    for key in ("channel_names", "modalities", "modality"):
        names = content.get(key)
        if isinstance(names, dict) and names:
            if set(names) != {str(n) for n in range(len(names))}:
                raise DataError(f"{path}: keys of '{key}' are {sorted(names)}, expected 0, 1, ...")
            return tuple(str(names[str(n)]) for n in range(len(names)))
    raise DataError(f"{path}: no 'channel_names' (nnU-Net) and no 'modalities' (nnDetection)")


def _classes(path: Path, content: Mapping[str, Json]) -> tuple[tuple[Thing, ...], tuple[str, ...]]:
    labels = content.get("labels", {})
    if not isinstance(labels, dict):
        raise DataError(f"{path}: 'labels' must be an object")
    if labels and all(isinstance(name, str) for name in labels.values()):  # nnDetection: id -> name
        if set(labels) != {str(n) for n in range(len(labels))}:
            raise DataError(f"{path}: ids in 'labels' are {sorted(labels)}, expected 0, 1, 2, ...")
        return (), tuple(labels[str(n)] for n in range(len(labels)))
    ids = {str(name): _label_ids(path, str(name), value) for name, value in labels.items()}
    foreground = [name for name in ids if name != "ignore" and ids[name] != (0,)]
    if "things" not in content:
        return (), tuple(foreground)
    things: Json = content["things"]
    if not isinstance(things, list) or not all(isinstance(name, str | int) for name in things):
        raise DataError(f"{path}: 'things' must be a list of label names, got {things!r}")
    name_of_id = {of_name[0]: name for name, of_name in ids.items() if len(of_name) == 1}
    things = [name_of_id.get(name, name) for name in things]  # a thing may be named by its id
    if unknown := [name for name in things if name not in foreground]:
        raise DataError(
            f"{path}: 'things' names {few_of(unknown)}; labels are {few_of(foreground)}"
        )
    return tuple(Thing(name, ids[name]) for name in things), tuple(things)


def _label_ids(path: Path, name: str, value: Json) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    if not values or not all(type(item) is int and item >= 0 for item in values):
        raise DataError(f"{path}: label {name!r} is {value!r}, expected an id or a list of ids")
    return tuple(values)


def _read_splits(
    path: Path, known: set[str]
) -> tuple[Mapping[Literal["train", "val"], tuple[str, ...]], ...] | None:
    if not path.is_file():
        return None
    content = read_json(path)
    if not isinstance(content, list) or not content:
        raise DataError(f'{path}: expected a list of {{"train": [...], "val": [...]}}')
    folds = []
    for number, fold in enumerate(content):
        if not isinstance(fold, dict) or not {"train", "val"} <= set(fold):
            raise DataError(f"{path}: fold {number} needs 'train' and 'val'")
        train, val = tuple(map(str, fold["train"])), tuple(map(str, fold["val"]))
        if unknown := sorted({*train, *val} - known):
            raise DataError(f"{path}: fold {number} names unknown cases: {few_of(unknown)}")
        if both := sorted(set(train) & set(val)):
            raise DataError(f"{path}: fold {number} has cases in train and val: {few_of(both)}")
        folds.append({"train": train, "val": val})
    return tuple(folds)


def _read_groups(path: Path, known: set[str]) -> Mapping[str, str]:
    if not path.is_file():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected an object of case -> patient")
    if unknown := sorted(set(content) - known):
        raise DataError(f"{path}: names unknown cases: {few_of(unknown)}")
    return {case: str(patient) for case, patient in content.items()}
