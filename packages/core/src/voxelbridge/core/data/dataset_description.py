"""dataset.json of a raw data set: nnU-Net's form (also its older one) or nnDetection's."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxelbridge.core.data.foreground import MIN_OBJECT_VOXELS
from voxelbridge.core.data.image_io import READ_ENDINGS, image_ending
from voxelbridge.core.data.raw_objects import Thing
from voxelbridge.core.data.raw_problems import few_of
from voxelbridge.core.errors import DataError
from voxelbridge.core.files import read_json

FILE_NAME = "dataset.json"
YAML_NAMES = ("dataset.yaml", "dataset.yml")  # nnDetection's other form
BACKGROUND, IGNORE = "background", "ignore"

Json = Any  # a parsed JSON tree


@dataclass(frozen=True)
class CaseFiles:
    """Files of one training case as dataset.json's own `dataset` map names them."""

    images: tuple[Path, ...]
    label: Path | None


@dataclass(frozen=True)
class Description:
    """What dataset.json says."""

    name: str
    channel_names: tuple[str, ...]
    class_names: tuple[str, ...]  # class k is class_names[k]
    things: tuple[Thing, ...]  # what becomes objects in semantic maps; empty: no semantic maps
    labels: Mapping[str, tuple[int, ...]]  # ids of each name in semantic maps; empty: not told
    label_ids: frozenset[int] | None  # all values of semantic maps; None: not told
    ending: str | None  # of image and label files; None: any that can be read
    min_voxels: int
    files: Mapping[str, CaseFiles] | None  # explicit files of the training cases


def read_description(folder: Path) -> Description:
    """Reads `folder`/dataset.json. Keys that are not known are left alone. Raises DataError."""
    path = folder / FILE_NAME
    if not path.is_file():
        raise _no_description(folder)
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object")
    channels = _channel_names(path, content)
    things, class_names, labels = _classes(path, content)
    known = frozenset(number for ids in labels.values() for number in ids) | {0}
    return Description(
        name=str(content.get("name", content.get("task", folder.name))),
        channel_names=channels,
        class_names=class_names,
        things=things,
        labels=labels,
        label_ids=known if labels else None,
        ending=_ending(path, content.get("file_ending")),
        min_voxels=_min_voxels(path, content),
        files=_files(path, content["dataset"]) if "dataset" in content else None,
    )


def _no_description(folder: Path) -> DataError:
    if not folder.is_dir():
        return DataError(f"{folder}: no such folder; expected a raw data set")
    for name in YAML_NAMES:
        if (folder / name).is_file():
            return DataError(
                f"{folder / name}: voxelbridge reads no YAML; write the same keys and values as "
                f"JSON to {folder / FILE_NAME} (with PyYAML: json.dumps(yaml.safe_load(text)))"
            )
    return DataError(f"{folder}: no {FILE_NAME}: not a raw data set")


def _channel_names(path: Path, content: Mapping[str, Json]) -> tuple[str, ...]:
    for key in ("channel_names", "modalities", "modality"):
        names = content.get(key)
        if isinstance(names, dict) and names:
            if set(names) != {str(n) for n in range(len(names))}:
                raise DataError(f"{path}: keys of '{key}' are {sorted(names)}, expected 0, 1, ...")
            return tuple(str(names[str(n)]) for n in range(len(names)))
    raise DataError(f"{path}: no 'channel_names' (nnU-Net) and no 'modalities' (nnDetection)")


def _classes(
    path: Path, content: Mapping[str, Json]
) -> tuple[tuple[Thing, ...], tuple[str, ...], dict[str, tuple[int, ...]]]:
    labels = content.get("labels", {})
    if not isinstance(labels, dict):
        raise DataError(f"{path}: 'labels' must be an object")
    if labels and all(isinstance(name, str) for name in labels.values()):
        # id -> name: nnDetection's classes, or label ids of nnU-Net 1 and the Decathlon
        by_id: dict[str, str] = labels
        if by_id.get("0", "").casefold() != BACKGROUND and "things" not in content:
            return _detection_classes(path, content, by_id)
        labels = {name: _id_key(path, key) for key, name in by_id.items()}
        if len(labels) < len(by_id):
            raise DataError(
                f"{path}: 'labels' gives one name to several ids; list them as a region"
            )
    ids = {str(name): _label_ids(path, str(name), value) for name, value in labels.items()}
    _check_ids(path, ids)
    foreground = [name for name in ids if name != IGNORE and ids[name] != (0,)]
    if "things" not in content:
        return (), tuple(foreground), ids
    things = _thing_names(path, content["things"], ids, foreground)
    return tuple(Thing(name, ids[name]) for name in things), tuple(things), ids


def _detection_classes(
    path: Path, content: Mapping[str, Json], names: Mapping[str, str]
) -> tuple[tuple[Thing, ...], tuple[str, ...], dict[str, tuple[int, ...]]]:
    if set(names) != {str(n) for n in range(len(names))}:
        raise DataError(f"{path}: ids in 'labels' are {sorted(names)}, expected 0, 1, 2, ...")
    classes = tuple(names[str(n)] for n in range(len(names)))
    semantic = content.get("seg2det_things")  # of a semantic source that nnDetection converts
    if not semantic:
        return (), classes, {}
    ids = _label_ids(path, "seg2det_things", semantic)
    if len(ids) != len(classes) or 0 in ids:
        raise DataError(
            f"{path}: 'seg2det_things' is {list(ids)}, expected one label id above 0 for each of "
            f"the {len(classes)} 'labels'"
        )
    things = tuple(Thing(name, (number,)) for name, number in zip(classes, ids, strict=True))
    return things, classes, {}


def _id_key(path: Path, key: str) -> int:
    if not re.fullmatch(r"\d{1,9}", key):
        raise DataError(f"{path}: label id {key!r} in 'labels' is not a number")
    return int(key)


def _label_ids(path: Path, name: str, value: Json) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    if not values or not all(type(item) is int and item >= 0 for item in values):
        raise DataError(f"{path}: label {name!r} is {value!r}, expected an id or a list of ids")
    return tuple(values)


def _check_ids(path: Path, ids: Mapping[str, tuple[int, ...]]) -> None:
    name_of: dict[int, str] = {}
    for name, of_name in ids.items():
        if name == BACKGROUND and of_name != (0,):
            raise DataError(f"{path}: label 'background' is {list(of_name)}, expected 0")
        if name != BACKGROUND and 0 in of_name and len(of_name) > 1:
            raise DataError(f"{path}: region {name!r} contains 0, which is the background")
        if len(of_name) > 1:
            continue  # regions may share ids with others
        number = min(of_name)
        if (other := name_of.setdefault(number, name)) != name:
            raise DataError(f"{path}: labels {other!r} and {name!r} have the same id {number}")


def _thing_names(
    path: Path, things: Json, ids: Mapping[str, tuple[int, ...]], foreground: list[str]
) -> list[str]:
    if not isinstance(things, list) or not all(type(name) in (str, int) for name in things):
        raise DataError(f"{path}: 'things' must be a list of label names, got {things!r}")
    name_of_id = {of_name[0]: name for name, of_name in ids.items() if len(of_name) == 1}
    named: list[str | int] = things
    # a thing may be named by its id
    names = [name if isinstance(name, str) else name_of_id.get(name, str(name)) for name in named]
    if unknown := [name for name in names if name not in foreground]:
        raise DataError(
            f"{path}: 'things' names {few_of(unknown)}; labels are {few_of(foreground)}"
        )
    if len(set(names)) < len(names):
        raise DataError(f"{path}: 'things' names a label twice: {few_of(names)}")
    return names


def _ending(path: Path, ending: Json) -> str | None:
    if ending is None:
        return None
    if not isinstance(ending, str) or image_ending(f"x.{ending.lstrip('.')}") is None:
        legal = ", ".join(READ_ENDINGS)
        raise DataError(f"{path}: 'file_ending' is {ending!r}, expected one of {legal}")
    return "." + ending.lstrip(".")


def _min_voxels(path: Path, content: Mapping[str, Json]) -> int:
    value = content.get("min_voxels", content.get("min_vol", MIN_OBJECT_VOXELS))
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**31:
        raise DataError(f"{path}: 'min_voxels' is {value!r}, expected a number of voxels")
    return int(value)


def _files(path: Path, content: Json) -> dict[str, CaseFiles]:
    if not isinstance(content, dict):
        raise DataError(f"{path}: 'dataset' must be an object of case -> files")
    files = {}
    for case_id, named in content.items():
        where = f"{path}: case {case_id!r} of 'dataset'"
        if not case_id or Path(case_id).name != case_id:
            raise DataError(f"{where}: not usable as a file name")
        images = named.get("images") if isinstance(named, dict) else None
        images = [images] if isinstance(images, str) else images
        label = named.get("label") if isinstance(named, dict) else None
        legal = isinstance(images, list) and all(isinstance(item, str) for item in images)
        if not legal or not images or not (label is None or isinstance(label, str)):
            raise DataError(f"{where}: expected {{'images': [path, ...], 'label': path}}")
        files[case_id] = CaseFiles(
            tuple(path.parent / item for item in images),
            None if label is None else path.parent / label,
        )
    return files
