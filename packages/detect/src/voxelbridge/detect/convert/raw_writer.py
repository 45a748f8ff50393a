"""Raw data sets written case by case: atomic, resumable, with patients, origins and splits.

Beside the data set's own files, `OUT/.convert/` holds a JSON record per finished case. A record is
written last, so a case is either recorded and whole or redone by the next call.
"""

import hashlib
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, assert_never

import numpy as np
from numpy.typing import ArrayLike, NDArray

from voxelbridge.core.data.executor import Done, Failed, map_cases
from voxelbridge.core.data.image_io import (
    WRITE_ENDINGS,
    describe_grid,
    image_ending,
    read_grid,
    read_image,
    write_image,
)
from voxelbridge.core.data.volume import Grid, Volume
from voxelbridge.core.errors import DataError, VoxelbridgeError
from voxelbridge.core.files import atomic_write, read_json, remove_partial_files, write_json
from voxelbridge.detect.convert.label_files import write_boxes, write_instances

SCHEMA = 1
RECORDS = ".convert"
SETTINGS = "settings.json"  # lies beside the records; no case may be called "settings"
FORBIDDEN = set('/\\:*?"<>|\0')  # in file names of one system or another

SplitName = Literal["train", "test"]
FOLDER = {"train": "Tr", "test": "Ts"}
Folds = Sequence[Mapping[str, Sequence[str]]]  # "train" and "val" -> case ids


@dataclass(frozen=True, eq=False)
class InstanceMap:
    """Objects as a map (D, H, W) of ids on the image's grid (0 = background) and id -> class.

    Ids of `classes` without a voxel and voxels without an id in `classes` are refused.
    """

    array: NDArray[Any]
    classes: Mapping[int, int]


@dataclass(frozen=True, eq=False)
class Boxes:
    """Objects as boxes (N, 6) in voxel edges of the image (z0, y0, x0, z1, y1, x1), labels (N,)."""

    boxes: ArrayLike
    labels: Sequence[int]


@dataclass(frozen=True, eq=False)
class WorldBoxes:
    """Objects as boxes (N, 6) in LPS mm (cx, cy, cz, wx, wy, wz), labels (N,)."""

    boxes_mm: ArrayLike
    labels: Sequence[int]


@dataclass(frozen=True)
class NoObjects:
    """The case was looked at and holds no object."""


@dataclass(frozen=True)
class Unlabelled:
    """Nobody says what the case holds: the image goes in without any label file."""


Objects = InstanceMap | Boxes | WorldBoxes | NoObjects | Unlabelled


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion wrote, which cases failed (one line each) and what is worth knowing."""

    num_cases: int
    num_objects: int
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class RawDatasetWriter:
    """Writes one raw data set into `out`; see docs/convert.md for what lies where.

    `settings` are the options that decide the content (seed, thresholds): a folder written with
    others is refused, and so is a folder with files that are not ours.
    """

    def __init__(
        self,
        out: Path,
        *,
        name: str,
        channel_names: Sequence[str],
        class_names: Sequence[str],
        ending: str = ".nii.gz",
        settings: Mapping[str, str | int | float] | None = None,
    ) -> None:
        if ending not in WRITE_ENDINGS:
            raise ValueError(f"ending {ending!r} is none of {WRITE_ENDINGS}")
        self.out = out
        self.name = name
        self.channel_names = tuple(channel_names)
        self.class_names = tuple(class_names)
        self.ending = ending
        self._tokens: dict[str, str] = {}
        self._claim({"name": name, **(settings or {})})

    def is_done(self, case_id: str, *, split: SplitName | None = None) -> bool:
        """Whether the case is written whole (and to `split`, if one is given)."""
        record = self._record_path(case_id)
        if not record.is_file():
            return False
        content = read_json(record)
        written = content["split"]
        if split not in (None, written) or content["token"] != self._tokens.get(
            case_id, content["token"]
        ):
            return False
        return all(path.is_file() for path in self._image_paths(case_id, written))

    def add_case(
        self,
        case_id: str,
        channels: Sequence[Path] | Volume,
        *,
        objects: Objects,
        patient: str | None = None,
        origins: Sequence[str] = (),
        split: SplitName = "train",
        notes: Sequence[str] = (),
    ) -> None:
        """Writes images and labels of one case; a file that already has the ending is copied.

        Copies are byte for byte. `notes` come back in the report of `finish`. DataError when the
        case cannot be written; it then leaves no file.
        """
        _check_case_id(case_id)
        self.remove_case(case_id)
        try:
            grid = self._write_images(case_id, channels, split)
            num_objects = self._write_objects(case_id, objects, grid, split)
            record = {
                "schema": SCHEMA,
                "split": split,
                "patient": patient,
                "origins": list(origins),
                "num_objects": num_objects,
                "token": self._tokens.get(case_id, ""),
                "notes": list(notes),
            }
            write_json(self._record_path(case_id), record)
        except BaseException:
            self.remove_case(case_id)
            raise

    def remove_case(self, case_id: str) -> None:
        """Deletes whatever there is of a case."""
        self._record_path(case_id).unlink(missing_ok=True)
        for split in FOLDER:
            for path in (*self._image_paths(case_id, split), *self._label_paths(case_id, split)):
                path.unlink(missing_ok=True)

    def convert_each(
        self,
        function: Callable[[str], None],
        cases: Mapping[str, SplitName],
        *,
        workers: int,
        tokens: Mapping[str, str] | None = None,
    ) -> list[str]:
        """Calls `function(case_id)`, which adds the case, for each case that is not done yet.

        `tokens` stand for what a case is made of (see `token_of`): one whose token is another than
        when it was written is done again. Cases run in parallel processes. A failing one costs a
        line on stderr, is left out, and its line is returned.
        """
        self._tokens = dict(tokens or {})
        waiting = [case for case, split in cases.items() if not self.is_done(case, split=split)]
        failures = []
        call = partial(_named, function)
        for outcome in map_cases(call, waiting, workers=workers, description="converting"):
            match outcome:
                case Done():
                    pass
                case Failed(item, error):
                    self.remove_case(item)  # a killed process could not
                    line = str(error) if item in str(error) else f"case {item}: {error}"
                    failures.append(tell_failure(line))
                case _:
                    assert_never(outcome)
        return failures

    def finish(
        self,
        splits: Folds | None = None,
        *,
        failures: Sequence[str] = (),
        notes: Sequence[str] = (),
        only: Sequence[str] | None = None,
    ) -> ConversionReport:
        """Writes dataset.json, groups.json, origins.json and splits.json of the finished cases.

        Cases that are not done are dropped from `splits`, and what there is of them is deleted;
        with `only`, so are cases of an earlier call that it does not name.
        """
        records = self._records()
        for case_id in sorted(set(records) - set(records if only is None else only)):
            self.remove_case(case_id)
            del records[case_id]
        self._remove_unfinished(set(records))
        if not records:
            raise DataError(f"{self.out}: no case could be converted")
        train = {case for case, record in records.items() if record["split"] == "train"}
        groups = {case: r["patient"] for case, r in records.items() if r["patient"] is not None}
        origins = {case: r["origins"] for case, r in records.items() if r["origins"]}
        folds = [
            {side: [case for case in fold[side] if case in train] for side in ("train", "val")}
            for fold in splits or ()
        ]
        for file, content in (("groups", groups), ("origins", origins), ("splits", folds)):
            if content:
                write_json(self.out / f"{file}.json", content)
            else:
                (self.out / f"{file}.json").unlink(missing_ok=True)
        self._write_description()
        return ConversionReport(
            len(records),
            sum(record["num_objects"] for record in records.values()),
            list(failures),
            [*notes, *(f"{case}: {note}" for case, r in records.items() for note in r["notes"])],
        )

    def _claim(self, settings: dict[str, Any]) -> None:
        path = self.out / RECORDS / SETTINGS
        if path.is_file():
            before = read_json(path)
            if before != settings:
                raise DataError(
                    f"{self.out}: was converted with {_shown(before)}, now asked with "
                    f"{_shown(settings)}; use the same options or an empty folder"
                )
            return
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise DataError(f"{self.out}: exists and is no conversion; give an empty folder")
        write_json(path, settings)

    def _write_description(self) -> None:
        has_test = any((self.out / "labelsTs").glob("*.json"))
        write_json(
            self.out / "dataset.json",
            {
                "schema": SCHEMA,
                "name": self.name,
                "dim": 3,
                "modalities": {str(n): name for n, name in enumerate(self.channel_names)},
                "labels": {str(n): name for n, name in enumerate(self.class_names)},
                "target_class": None,
                "test_labels": has_test,
                "file_ending": self.ending,
            },
        )

    def _records(self) -> dict[str, Any]:
        paths = sorted((self.out / RECORDS).glob("*.json"))
        records = {path.stem: read_json(path) for path in paths if path.name != SETTINGS}
        return {case: record for case, record in records.items() if self.is_done(case)}

    def _remove_unfinished(self, done: set[str]) -> None:
        remove_partial_files(self.out / RECORDS)
        for split in FOLDER.values():
            for folder in (self.out / f"images{split}", self.out / f"labels{split}"):
                remove_partial_files(folder)
                for path in folder.glob("*"):
                    name = path.name.removesuffix(".json").removesuffix(self.ending)
                    case = name[:-5] if folder.name.startswith("images") else name
                    if case not in done:
                        path.unlink()

    def _record_path(self, case_id: str) -> Path:
        return self.out / RECORDS / f"{case_id}.json"

    def _image_paths(self, case_id: str, split: str) -> list[Path]:
        folder = self.out / f"images{FOLDER[split]}"
        return [
            folder / f"{case_id}_{channel:04d}{self.ending}"
            for channel in range(len(self.channel_names))
        ]

    def _label_paths(self, case_id: str, split: str) -> tuple[Path, Path]:
        folder = self.out / f"labels{FOLDER[split]}"
        return folder / f"{case_id}{self.ending}", folder / f"{case_id}.json"

    def _write_images(
        self, case_id: str, channels: Sequence[Path] | Volume, split: SplitName
    ) -> Grid:
        targets = self._image_paths(case_id, split)
        count = len(channels.array) if isinstance(channels, Volume) else len(channels)
        if count != len(targets):
            raise DataError(
                f"case {case_id}: {count} channels, expected {', '.join(self.channel_names)}"
            )
        if isinstance(channels, Volume):
            for path, channel in zip(targets, channels.array, strict=True):
                write_image(path, Volume(channel[None], channels.grid))
            return channels.grid
        grids = [self._bring(*pair) for pair in zip(channels, targets, strict=True)]
        for source, grid in zip(channels[1:], grids[1:], strict=True):
            if grid.shape != grids[0].shape or not grid.agrees_with(grids[0]):
                raise DataError(
                    f"case {case_id}: {source}: grid {describe_grid(grid)} differs from "
                    f"{channels[0].name}: {describe_grid(grids[0])}; resample to one grid"
                )
        return grids[0]

    def _bring(self, source: Path, target: Path) -> Grid:
        if image_ending(source.name) == self.ending and source.name.endswith(self.ending):
            grid = read_grid(source)
            with atomic_write(target) as temporary:
                shutil.copyfile(source, temporary)
            return grid
        volume = read_image(source)
        write_image(target, volume)
        return volume.grid

    def _write_objects(self, case_id: str, objects: Objects, grid: Grid, split: SplitName) -> int:
        map_path, json_path = self._label_paths(case_id, split)
        count = len(self.class_names)
        match objects:
            case InstanceMap(array, classes):
                return write_instances(map_path, array, classes, grid=grid, num_classes=count)
            case Boxes(boxes, labels):
                return write_boxes(json_path, boxes, labels, key="box", num_classes=count)
            case WorldBoxes(boxes, labels):
                return write_boxes(json_path, boxes, labels, key="box_mm", num_classes=count)
            case NoObjects():  # a map of zeros says more than a missing one: all is background
                empty = np.zeros(grid.shape, dtype=np.uint8)
                return write_instances(map_path, empty, {}, grid=grid, num_classes=count)
            case Unlabelled():
                return 0
            case _:
                assert_never(objects)


def token_of(*content: object) -> str:
    """A short hash of values by their `repr`: equal for equal annotations of a case."""
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def tell_failure(line: str) -> str:
    """Prints one line about a failure to stderr and returns it for the report."""
    print(f"error: {line}", file=sys.stderr)
    return line


def _named(function: Callable[[str], None], case_id: str) -> None:
    try:
        function(case_id)
    except VoxelbridgeError as error:
        if case_id in str(error):
            raise
        raise DataError(f"case {case_id}: {error}") from error


def _check_case_id(case_id: str) -> None:
    if not case_id or case_id.startswith(".") or FORBIDDEN & set(case_id):
        raise DataError(f"case id {case_id!r} cannot be a file name; rename it")
    if case_id == SETTINGS.removesuffix(".json"):
        raise DataError(f"case id {case_id!r} is reserved; rename it")


def _shown(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())
