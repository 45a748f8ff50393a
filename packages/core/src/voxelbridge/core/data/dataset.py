"""Raw data sets: the folders people already have (nnU-Net's and nnDetection's layouts).

docs/formats/raw_dataset.md says what is legal. A data set is opened from names alone; the files of
a case are read, and checked, when the case is read.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.data.dataset_description import FILE_NAME as DESCRIPTION_FILE
from voxelbridge.core.data.dataset_description import Description, read_description
from voxelbridge.core.data.dataset_files import FoundCase, find_cases, named_cases, no_images
from voxelbridge.core.data.dataset_tables import Fold, read_groups, read_origins, read_splits
from voxelbridge.core.data.foreground import MIN_OBJECT_VOXELS
from voxelbridge.core.data.image_io import describe_grid, read_channels, read_grid, read_image
from voxelbridge.core.data.raw_objects import (
    RawObjects,
    Thing,
    instance_classes,
    no_objects,
    objects_from_boxes,
    objects_from_instances,
    objects_from_semantic,
)
from voxelbridge.core.data.raw_problems import (
    Problem,
    RawDataError,
    few_of,
    grid_differences,
    problem,
    same_voxels,
)
from voxelbridge.core.data.volume import Grid, Volume, match_grid
from voxelbridge.core.errors import DataError, VoxelbridgeError
from voxelbridge.core.files import read_json

SPLITS_FILE, GROUPS_FILE, ORIGINS_FILE = "splits.json", "groups.json", "origins.json"


@dataclass(frozen=True)
class RawCase:
    """One case of a raw data set: where its files are; nothing is read before it is asked for.

    Its readers raise RawDataError, a DataError that names the case and lists every problem found.
    """

    case_id: str
    image_paths: tuple[Path, ...]  # one per channel
    label_path: Path | None  # instance or semantic map
    objects_path: Path | None  # {case}.json with instances or boxes
    things: tuple[Thing, ...]  # of semantic maps
    num_classes: int
    min_voxels: int = MIN_OBJECT_VOXELS
    problem: str | None = None  # why its images cannot be read, as far as names tell
    label_ids: frozenset[int] | None = None  # all values of semantic maps; None: not told

    def __str__(self) -> str:
        return f"case {self.case_id}"

    @property
    def has_labels(self) -> bool:
        return self.label_path is not None or self.objects_path is not None

    def read_grid(self) -> Grid:
        """The grid of the image from the headers of all channels, which must agree."""
        try:
            return self._read_grid()
        except VoxelbridgeError as error:
            raise self._named(error) from error

    def read_image(self) -> Volume:
        """All channels as (C, D, H, W) on the first file's own grid."""
        try:
            self._read_grid()
            return read_channels(self.image_paths)
        except VoxelbridgeError as error:
            raise self._named(error) from error

    def read_objects(self, grid: Grid) -> RawObjects:
        """The objects of the case on the image's `grid`."""
        try:
            return self._read_objects(grid)
        except VoxelbridgeError as error:
            raise self._named(error) from error

    def read_semantic(self, grid: Grid) -> NDArray[np.integer[Any]]:
        """The label map (D, H, W) as stored, on the image's `grid`."""
        try:
            return self._read_map(grid)
        except VoxelbridgeError as error:
            raise self._named(error) from error

    def _named(self, error: VoxelbridgeError) -> RawDataError:
        problems = (
            error.problems
            if isinstance(error, RawDataError)
            else (Problem("unreadable", str(error)),)
        )
        return RawDataError(f"case {self.case_id}: {error}", problems)

    def _read_grid(self) -> Grid:
        if self.problem is not None:
            raise problem("channels", self.problem)
        grids: list[tuple[Path, Grid]] = []
        problems: list[Problem] = []
        for path in self.image_paths:
            try:
                grids.append((path, read_grid(path)))
            except VoxelbridgeError as error:
                problems.append(Problem("unreadable", str(error)))
        if not grids:
            raise RawDataError.of(problems)
        reference, first = grids[0]
        problems += [
            Problem(
                "grid",
                f"grid of {path.name} differs from {reference.name}: "
                f"{'; '.join(grid_differences(grid, first))}; resample the channels to one grid",
            )
            for path, grid in grids
            if not same_voxels(grid, first)
        ]
        if problems:
            raise RawDataError.of(problems)
        return first

    def _read_objects(self, grid: Grid) -> RawObjects:
        if self.objects_path is not None:
            return self._read_json(self.objects_path, grid)
        if self.label_path is None:
            raise problem(
                "missing-label",
                "no label: neither a label map nor a JSON file in the labels folder",
            )
        if not self.things:
            raise problem(
                "no-things",
                f"{self.label_path.name} has no JSON file beside it and dataset.json has no "
                '\'things\': name there the labels that are objects, such as "things": ["tumour"]',
            )
        label_map = self._read_map(grid)
        return objects_from_semantic(
            label_map, self.things, self.min_voxels, label_ids=self.label_ids
        )

    def _read_json(self, path: Path, grid: Grid) -> RawObjects:
        try:
            content = read_json(path)
        except DataError as error:
            raise problem("label-json", str(error)) from error
        keys = {"instances", "boxes"} & set(content) if isinstance(content, dict) else set()
        if len(keys) != 1:
            both = "both 'instances' and 'boxes'; keep one" if keys else "neither; add one"
            raise problem(
                "label-json", f"{path.name}: expected a key 'instances' or 'boxes', got {both}"
            )
        if "boxes" in keys:
            return objects_from_boxes(content["boxes"], grid, num_classes=self.num_classes)
        classes = instance_classes(content["instances"], self.num_classes)
        if not classes and self.label_path is None:
            return no_objects(grid)  # a healthy case needs no map of zeros
        return objects_from_instances(self._read_map(grid), classes)

    def _read_map(self, grid: Grid) -> NDArray[np.integer[Any]]:
        path = self.label_path
        if path is None:
            raise problem("missing-label", "the label map is missing")
        if not path.exists():
            raise problem("missing-label", f"the label map {path} does not exist")
        volume = read_image(path)
        matched = match_grid(volume, grid)
        if matched is None:
            raise problem(
                "grid",
                f"label grid {describe_grid(volume.grid)} differs from image grid "
                f"{describe_grid(grid)} ({path.name}: "
                f"{'; '.join(grid_differences(volume.grid, grid))}); "
                "resample the label or fix the file",
            )
        return _whole_numbers(path, matched.array[0])


@dataclass(frozen=True)
class RawDataset:
    """A raw data set: its cases and what dataset.json says about them."""

    folder: Path
    name: str
    channel_names: tuple[str, ...]
    class_names: tuple[str, ...]  # class k is class_names[k]
    cases: tuple[RawCase, ...]  # imagesTr, sorted by id
    test_cases: tuple[RawCase, ...]  # imagesTs
    splits: tuple[Fold, ...] | None
    groups: Mapping[str, str]  # patient of each case; a case that is not listed is its own
    origins: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # "space:name" ids

    @classmethod
    def open(cls, folder: Path) -> "RawDataset":
        """Opens a data set folder by its dataset.json and file names; reads no image.

        Raises DataError when dataset.json, splits.json, groups.json or origins.json cannot be used
        and when there are no images. What is wrong with one case is told when that case is read.
        """
        dataset, problems = cls.survey(folder)
        if fatal := [item for item in problems if item.kind != "orphan-label"]:
            raise RawDataError(f"{folder}: {RawDataError.of(fatal)}", fatal)
        return dataset

    @classmethod
    def survey(cls, folder: Path) -> "tuple[RawDataset, tuple[Problem, ...]]":
        """As `open`, but what is wrong with the set as a whole is returned, as far as it goes on.

        Raises DataError when dataset.json or a table beside it cannot be understood at all.
        """
        description = read_description(folder)
        images = folder / "raw_splitted" if (folder / "raw_splitted").is_dir() else folder
        problems: list[Problem] = []
        if description.files is not None:
            found = named_cases(description.files, images / "labelsTr", description)
        else:
            found, orphans = find_cases(images, "Tr", description)
            problems += orphans
        found_test, orphans = find_cases(images, "Ts", description)
        problems += orphans
        cases = tuple(_raw_case(case, description) for case in found)
        test_cases = tuple(_raw_case(case, description) for case in found_test)
        if not cases and not test_cases:
            raise no_images(images, description)
        in_training = {case.case_id for case in cases}
        if twice := sorted(case.case_id for case in test_cases if case.case_id in in_training):
            message = f"cases in imagesTr and in imagesTs: {few_of(twice)}"
            problems.append(Problem("duplicate-case", message))
        known = in_training | {case.case_id for case in test_cases}
        splits, wrong = read_splits(folder / SPLITS_FILE, in_training)
        problems += wrong
        groups, wrong = read_groups(folder / GROUPS_FILE, known)
        problems += wrong
        origins, wrong = read_origins(folder / ORIGINS_FILE, known)
        problems += wrong
        dataset = cls(
            folder,
            description.name,
            description.channel_names,
            description.class_names,
            cases,
            test_cases,
            splits,
            groups,
            origins,
        )
        return dataset, tuple(problems)

    def require_things(self) -> None:
        """DataError where no training case can have objects, as 'things' is missing.

        It is one line for what would else be told of each case once its image was read.
        """
        maps = [case for case in self.cases if case.label_path is not None]
        if not maps or any(case.things or case.objects_path for case in self.cases):
            return
        example = json.dumps(self.class_names[-1] if self.class_names else "tumour")
        raise DataError(
            f"{self.folder / DESCRIPTION_FILE}: no 'things', and none of {len(maps)} label maps "
            f"({few_of([case.case_id for case in maps])}) has a JSON file beside it; name there "
            f'the labels that are objects, for instance "things": [{example}]'
        )


def _raw_case(found: FoundCase, description: Description) -> RawCase:
    return RawCase(
        found.case_id,
        found.images,
        found.label,
        found.objects,
        description.things,
        len(description.class_names),
        description.min_voxels,
        found.problem,
        description.label_ids,
    )


def _whole_numbers(path: Path, array: NDArray[Any]) -> NDArray[np.integer[Any]]:
    if array.dtype.kind in "iu":
        return array
    if array.dtype.kind == "b":
        return array.astype(np.uint8)
    wrong = ~np.isfinite(array)
    wrong |= array != np.rint(array)
    if count := int(np.count_nonzero(wrong)):
        first = array[wrong][0]
        raise problem(
            "label-values",
            f"{path.name}: label values are not whole numbers ({count} voxels, such as {first:g}); "
            "a label map must be resampled with the nearest voxel",
        )
    if np.abs(array).max(initial=0) > np.iinfo(np.int64).max / 2:
        raise problem("label-values", f"{path.name}: label values are beyond any id")
    return array.astype(np.int64)
