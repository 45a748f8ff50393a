"""What one data set labels: its targets, the label ids that make them up, what is not annotated.

Read from the dataset.json of a raw data set (docs/formats/raw_dataset.md), in any of its forms.
Label ids are the values of the data set's own label maps; nothing is renumbered.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.checkpoint import RESERVED_STEM_NAMES, is_stem_name
from voxelbridge.core.data.raw_problems import few_of
from voxelbridge.core.data.volume import Grid
from voxelbridge.core.errors import DataError
from voxelbridge.core.files import read_json

if TYPE_CHECKING:  # what reads files is imported where files are read: networks do without it
    from voxelbridge.core.data.dataset import RawCase
    from voxelbridge.core.data.dataset_description import Description
    from voxelbridge.core.data.raw_objects import RawObjects

PADDING = -1  # value of voxels outside a case: not annotated
MAX_ID = (1 << 16) - 1  # ids are looked up in tables
MAX_NAME = 64  # characters of a data set's name: it begins file names and tensor names
# Names of other things: stem policies of a transfer, values of metrics.jsonl.
TAKEN_NAMES = RESERVED_STEM_NAMES | {
    "step", "loss", "total", "ce", "dice", "learning_rate", "gradient_norm"
}  # fmt: skip
NAME = re.compile(r"[A-Za-z0-9]+(?:[_-][A-Za-z0-9]+)*")


@dataclass(frozen=True)
class Target:
    """Something to segment: the voxels that hold any of `ids`.

    `paint` is the id written for it where predictions of regions become one label map (an entry of
    nnU-Net's `regions_class_order`); None: not told.
    """

    name: str
    ids: tuple[int, ...]
    paint: int | None = None


@dataclass(frozen=True)
class DatasetLabels:
    """The targets of one data set. Raises DataError where they contradict each other.

    `regions`: targets may overlap, each is a yes or no of its own. Voxels of `ignore`, of
    `not_annotated` and below 0 (padding) are never counted; voxels of every other id that no
    target names (0 and `left_out`) are background. `class_ids[k]` is the label id of class k where
    a case has an instance map in place of a semantic one.
    """

    name: str
    channels: tuple[str, ...]
    targets: tuple[Target, ...]
    ignore: int | None
    num_cases: int
    regions: bool = False
    not_annotated: tuple[int, ...] = ()
    left_out: tuple[int, ...] = ()
    class_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_name(self.name)
        where = f"data set {self.name}"
        if not self.channels:
            raise DataError(f"{where}: no channel")
        if not self.targets:
            raise DataError(f"{where}: no target: nothing is left to learn from its labels")
        _check_targets(where, self.targets, regions=self.regions)
        of_targets = {number for target in self.targets for number in target.ids}
        if both := sorted(of_targets & set(self.uncounted)):
            raise DataError(
                f"{where}: label ids {few_of(both)} belong to a target and are not annotated too"
            )

    @property
    def uncounted(self) -> tuple[int, ...]:
        """Label ids whose voxels never count."""
        return (*(() if self.ignore is None else (self.ignore,)), *self.not_annotated)

    @property
    def legal_ids(self) -> frozenset[int]:
        """All values that the label maps may hold."""
        of_targets = {number for target in self.targets for number in target.ids}
        return frozenset({0, *of_targets, *self.uncounted, *self.left_out})

    def target(self, name: str) -> Target:
        """The target of that name; DataError lists those there are."""
        for target in self.targets:
            if target.name == name:
                return target
        raise DataError(
            f"data set {self.name}: no target {name!r}; it has "
            f"{few_of([target.name for target in self.targets])}"
        )


def unreadable_paint(labels: DatasetLabels) -> str | None:
    """Why predictions painted in the stated order cannot be read back as regions; None: they can.

    A region's id must be its own and of no region that is painted over it.
    """
    for place, target in enumerate(labels.targets):
        if target.paint is None:
            continue
        others = [t.name for t in labels.targets[place + 1 :] if target.paint in t.ids]
        if target.paint not in target.ids or others:
            reason = f"is also one of {others[0]}" if others else "is none of its own ids"
            return (
                f"{labels.name}: 'regions_class_order' paints {target.name} as {target.paint}, "
                f"which {reason}: label maps painted so cannot be read as the regions they were; "
                "mend the order in dataset.json, or leave it out"
            )
    return None


def read_dataset_labels(folder: Path, *, name: str | None = None) -> DatasetLabels:
    """The labels of a raw data set folder; `name` None: the folder's own name.

    nnU-Net's labels become targets in their order, and regions where one lists several ids. Classes
    of nnDetection's form have the ids 1, 2, ... Opens no image. Raises DataError.
    """
    from voxelbridge.core.data.dataset import RawDataset
    from voxelbridge.core.data.dataset_description import FILE_NAME, read_description

    dataset, description = RawDataset.open(folder), read_description(folder)
    own_name = folder.resolve().name if name is None else name
    num_cases = sum(case.has_labels for case in dataset.cases)
    if num_cases == 0:
        raise DataError(f"{folder}: no training case with a label; expected files in labelsTr")
    if not description.labels and not description.class_names:
        raise DataError(f"{folder / FILE_NAME}: 'labels' names nothing to learn")
    if not description.labels:
        return _of_classes(own_name, description, num_cases, path=folder / FILE_NAME)
    return _of_labels(own_name, description, num_cases, path=folder / FILE_NAME)


def read_segmentation(
    case: "RawCase", labels: DatasetLabels, grid: Grid
) -> NDArray[np.integer[Any]]:
    """Label ids (D, H, W) of a case on the image's `grid`, whatever form its labels have.

    Raises DataError naming the case: boxes without a map, and ids that the data set does not have.
    """
    from voxelbridge.core.data.raw_objects import values_of

    if case.objects_path is None:
        found = case.read_semantic(grid)
        check_values(labels, values_of(found), where=str(case))
        return found
    objects = case.read_objects(grid)
    if objects.instances is None:
        raise DataError(f"{case}: has boxes only; a segmentation needs a label map")
    return segmentation_of_objects(objects, labels)


def segmentation_of_objects(objects: "RawObjects", labels: DatasetLabels) -> NDArray[np.int32]:
    """Label ids (D, H, W) of an instance map: each instance becomes the id of its class."""
    assert objects.instances is not None
    of_instance = np.zeros(int(objects.instances.max(initial=0)) + 1, dtype=np.int32)
    of_instance[objects.ids] = np.asarray(labels.class_ids, dtype=np.int32)[objects.labels]
    return of_instance[objects.instances]


def check_values(labels: DatasetLabels, values: Collection[int], *, where: str) -> None:
    """DataError unless the data set knows all `values` of a label map; `where` names the case."""
    if unknown := sorted(set(values) - labels.legal_ids):
        raise DataError(
            f"{where}: the label map holds {few_of(unknown)}, expected the ids of data set "
            f"{labels.name} ({few_of(sorted(labels.legal_ids), limit=12)}); name it in 'labels' of "
            "dataset.json"
        )


def check_name(name: str) -> None:
    """DataError unless `name` can begin a case's name and name a stem and a head."""
    if NAME.fullmatch(name) and is_stem_name(name) and name not in TAKEN_NAMES:
        return
    proposal = "_".join(re.findall(r"[A-Za-z0-9]+", name))[:MAX_NAME].strip("_") or "dataset"
    if proposal in TAKEN_NAMES:
        proposal += "_data"
    raise DataError(
        f"data set {name!r}: the name cannot be that of a stem or head (letters and digits, joined "
        f"by single _ or -, at most {MAX_NAME}, not {', '.join(sorted(TAKEN_NAMES))}); declare "
        f"another, such as {proposal}"
    )


def _check_targets(where: str, targets: Sequence[Target], *, regions: bool) -> None:
    names = sorted(target.name for target in targets)
    if twice := [a for a, b in pairwise(names) if a == b]:
        raise DataError(f"{where}: two targets are named {twice[0]!r}")
    owner: dict[int, str] = {}
    for target in targets:
        if not target.name.strip() or not target.name.isprintable():
            raise DataError(f"{where}: {target.name!r} cannot name a target")
        if not target.ids or len(set(target.ids)) < len(target.ids):
            raise DataError(
                f"{where}: target {target.name!r} has ids {list(target.ids)}, "
                "expected one or more, each once"
            )
        for number in target.ids:
            if not 0 < number <= MAX_ID:
                raise DataError(
                    f"{where}: target {target.name!r} has id {number}, expected 1 to {MAX_ID}"
                )
            other = owner.setdefault(number, target.name)
            if other != target.name and not regions:
                raise DataError(
                    f"{where}: id {number} belongs to {other!r} and to {target.name!r}; "
                    "targets that overlap must be regions"
                )


def _of_classes(
    name: str, description: "Description", num_cases: int, *, path: Path
) -> DatasetLabels:
    """nnDetection's form: classes of instance maps, or of a semantic source with `things`."""
    names = description.class_names
    ids = [(number,) for number in range(1, len(names) + 1)]
    if description.things:
        ids = [thing.ids for thing in description.things]
    stuff = read_json(path).get("seg2det_stuff") or []
    targets = tuple(Target(*pair) for pair in zip(names, ids, strict=True))
    class_ids = tuple(of_class[0] for of_class in ids)
    channels = description.channel_names
    return DatasetLabels(
        name,
        channels,
        targets,
        None,
        num_cases,
        left_out=tuple(stuff) if isinstance(stuff, list) else (stuff,),
        class_ids=class_ids,
    )


def _of_labels(
    name: str, description: "Description", num_cases: int, *, path: Path
) -> DatasetLabels:
    from voxelbridge.core.data.dataset_description import IGNORE

    labels = description.labels
    ignored = labels.get(IGNORE, ())
    foreground = {key: ids for key, ids in labels.items() if key != IGNORE and ids != (0,)}
    regions = any(len(ids) > 1 for ids in foreground.values())
    order = _region_order(path, len(foreground)) if regions else None
    paints = [None] * len(foreground) if order is None else order
    targets = tuple(
        Target(key, tuple(dict.fromkeys(ids)), paint)
        for (key, ids), paint in zip(foreground.items(), paints, strict=True)
    )
    return DatasetLabels(
        name,
        description.channel_names,
        targets,
        ignored[0] if ignored else None,
        num_cases,
        regions=regions,
        not_annotated=ignored[1:],
        class_ids=tuple(labels[key][0] for key in description.class_names),
    )


def _region_order(path: Path, count: int) -> list[int] | None:
    order = read_json(path).get("regions_class_order")
    if order is None:  # only predictions need it
        return None
    legal = isinstance(order, list) and all(type(number) is int for number in order)
    if not legal or len(order) != count:
        raise DataError(
            f"{path}: 'regions_class_order' is {order!r}, expected one label id for each of the "
            f"{count} labels"
        )
    return order
