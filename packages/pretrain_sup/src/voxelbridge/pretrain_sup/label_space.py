"""Which network outputs learn which targets of which data set, so that labels never contradict.

Every data set has outputs of its own: an organ that two data sets draw differently, or that one of
them does not draw at all, is as many targets as there are data sets. Two layouts
(docs/methods/multitalent.md):

"per_dataset": a softmax over background and targets per data set (sigmoids where it has regions), a
data set with many targets in several near-equal parts. The code line behind arXiv 2509.15947.
"joint": one sigmoid per data set and target, all in one output layer (arXiv 2303.14444).

The file `label_space.json`: docs/formats/label_space.md.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from voxelbridge.core.errors import DataError
from voxelbridge.core.files import read_json, write_json
from voxelbridge.pretrain_sup.dataset_labels import DatasetLabels, Target

SCHEMA = 1
FILE_NAME = "label_space.json"
MAX_TARGETS = 20  # of one softmax, as MultiTalent
JOINT_LAYER = "joint"

Layout = Literal["per_dataset", "joint"]


@dataclass(frozen=True)
class Head:
    """Targets that one group of outputs learns: a softmax with the background, or sigmoids.

    `ignore`: label ids whose voxels never count. Ids of the data set that are in neither `targets`
    nor `ignore` are background, those of its other heads too.
    """

    name: str
    dataset: str
    targets: tuple[Target, ...]
    regions: bool
    ignore: tuple[int, ...] = ()


@dataclass(frozen=True)
class LabelSpace:
    """All data sets of one training and the heads that learn them, in output order."""

    layout: Layout
    datasets: tuple[DatasetLabels, ...]
    heads: tuple[Head, ...]
    max_targets: int = MAX_TARGETS

    def dataset(self, name: str) -> DatasetLabels:
        """The data set of that name; DataError lists those there are."""
        for dataset in self.datasets:
            if dataset.name == name:
                return dataset
        names = ", ".join(dataset.name for dataset in self.datasets)
        raise DataError(f"no data set {name!r} in the label space; it has {names}")

    def head(self, name: str) -> Head:
        """The head of that name; DataError lists those there are."""
        for head in self.heads:
            if head.name == name:
                return head
        names = ", ".join(head.name for head in self.heads)
        raise DataError(f"no head {name!r} in the label space; it has {names}")

    def heads_of(self, dataset: str) -> tuple[Head, ...]:
        """The heads that learn one data set: one, or the parts that it was split into."""
        name = self.dataset(dataset).name
        return tuple(head for head in self.heads if head.dataset == name)

    def num_outputs(self, head: Head) -> int:
        """Channels of a head: its targets, and the background where they share a softmax."""
        return len(head.targets) + (0 if head.regions else 1)

    @property
    def output_layers(self) -> dict[str, int]:
        """Channels of each output layer by name: one per head, or the joint one."""
        match self.layout:
            case "per_dataset":
                return {head.name: self.num_outputs(head) for head in self.heads}
            case "joint":
                return {JOINT_LAYER: sum(self.num_outputs(head) for head in self.heads)}

    def layer_of(self, head: Head) -> str:
        """Name of the output layer that holds the head."""
        return head.name if self.layout == "per_dataset" else JOINT_LAYER

    def channels_of(self, head: Head) -> slice:
        """Where the head's channels lie in its output layer."""
        if self.layout == "per_dataset":
            return slice(0, self.num_outputs(head))
        start = 0
        for other in self.heads:
            if other.name == head.name:
                return slice(start, start + self.num_outputs(head))
            start += self.num_outputs(other)
        raise ValueError(f"head {head.name} is not of this label space")

    def extended(self, datasets: Sequence[DatasetLabels]) -> "LabelSpace":
        """This space and more data sets behind its own: every head and channel keeps its place."""
        added = build_label_space(
            [*self.datasets, *datasets], layout=self.layout, max_targets=self.max_targets
        )
        new = {dataset.name for dataset in datasets}
        heads = (*self.heads, *(head for head in added.heads if head.dataset in new))
        return LabelSpace(self.layout, added.datasets, heads, self.max_targets)


def build_label_space(
    datasets: Sequence[DatasetLabels], *, layout: Layout, max_targets: int = MAX_TARGETS
) -> LabelSpace:
    """The label space of `datasets` in their order.

    In layout "per_dataset" a data set of more than `max_targets` targets is split into parts of
    near-equal size, named `<dataset>.0`, `<dataset>.1`, ...; none is lost. Raises DataError for two
    data sets of one name and for a data set without cases.
    """
    if max_targets < 1:
        raise ValueError(f"max_targets must be at least 1, got {max_targets}")
    if not datasets:
        raise DataError("a label space needs at least one data set")
    seen: dict[str, str] = {}
    for dataset in datasets:
        # Names begin the names of files: they must differ on any file system.
        other = seen.setdefault(dataset.name.casefold(), dataset.name)
        if other is not dataset.name or [d.name for d in datasets].count(dataset.name) > 1:
            raise DataError(
                f"two data sets are named {dataset.name!r}"
                + (f" (the other {other!r})" if other != dataset.name else "")
                + "; declare another name for one of them"
            )
        if dataset.num_cases < 1:
            raise DataError(f"data set {dataset.name}: no case with a label")
    match layout:
        case "per_dataset":
            heads = [head for dataset in datasets for head in _parts(dataset, max_targets)]
        case "joint":
            heads = [_head(dataset, dataset.name, dataset.targets, True) for dataset in datasets]
    return LabelSpace(layout, tuple(datasets), tuple(heads), max_targets)


def encode_target(head: Head, segmentation: Tensor) -> tuple[Tensor, Tensor]:
    """What `head` must predict for label ids (D, H, W), and where it counts: (target, annotated).

    Softmax: `target` (D, H, W) int64, 0 = background, k + 1 = `head.targets[k]`, -1 = not counted.
    Regions: `target` (n, D, H, W) bool, False where it does not count. `annotated` (D, H, W)
    bool. Values below 0 are padding. Runs on the segmentation's device.
    """
    ids = [number for target in head.targets for number in target.ids]
    other = max([*ids, *head.ignore]) + 1  # the entry of all larger ids, which are background
    rows = [_table(other + 1, target.ids) for target in head.targets]
    counted = ~_table(other + 1, head.ignore)
    place = segmentation.long()  # not every type compares with 0
    padding = place < 0
    place = place.clamp(0, other)
    annotated = torch.from_numpy(counted).to(segmentation.device)[place] & ~padding
    if head.regions:
        table = torch.from_numpy(np.stack(rows) & counted).to(segmentation.device)
        return table[:, place] & annotated, annotated
    classes = np.zeros(other + 1, dtype=np.int64)
    for number, row in enumerate(rows, start=1):
        classes[row] = number
    target = torch.from_numpy(classes).to(segmentation.device)[place]
    return target.masked_fill_(~annotated, -1), annotated


def decode_target(head: Head, prediction: Tensor) -> Tensor:
    """Label ids (D, H, W) of a prediction in `head`'s terms, 0 where it holds nothing.

    `prediction`: softmax (D, H, W) with 0 = background and k + 1 = `head.targets[k]`; regions
    (n, D, H, W) bool. Regions are painted in their order with `Target.paint`; where a data set told
    none, the largest first, each with its own id that no smaller one has.
    """
    if not head.regions:
        ids = [0, *(target.paint or target.ids[0] for target in head.targets)]
        return torch.tensor(ids, device=prediction.device)[prediction.long()]
    painted = torch.zeros(prediction.shape[1:], dtype=torch.int64, device=prediction.device)
    for number, paint in _painting(head.targets):
        painted.masked_fill_(prediction[number].bool(), paint)
    return painted


def write_label_space(path: Path, space: LabelSpace) -> None:
    """Writes the space as JSON (docs/formats/label_space.md), atomically."""
    heads = [
        {"name": head.name, "dataset": head.dataset, "targets": [t.name for t in head.targets]}
        for head in space.heads
    ]
    content = {
        "schema": SCHEMA,
        "layout": space.layout,
        "max_targets": space.max_targets,
        "datasets": [asdict(dataset) for dataset in space.datasets],
        "heads": heads,
    }
    write_json(path, content)


def read_label_space(path: Path) -> LabelSpace:
    """Reads what `write_label_space` wrote; a damaged or foreign file is a DataError naming it."""
    content = read_json(path)
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise DataError(f"{path}: schema {schema!r}, this version reads {SCHEMA}")
    try:
        written = TypeAdapter(_Written).validate_json(json.dumps(content), strict=True)
        datasets = {dataset.name: dataset for dataset in written.datasets}
        heads = tuple(_read_head(head, datasets, written.layout) for head in written.heads)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path}: {key or 'the whole file'}: {first['msg']}") from None
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    space = LabelSpace(written.layout, written.datasets, heads, written.max_targets)
    _check_complete(path, space)
    return space


@dataclass(frozen=True)
class _WrittenHead:
    name: str
    dataset: str
    targets: tuple[str, ...]


@dataclass(frozen=True)
class _Written:
    """The file's content; pydantic checks it."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    schema: int
    layout: Layout
    max_targets: int
    datasets: tuple[DatasetLabels, ...]
    heads: tuple[_WrittenHead, ...]


def _read_head(
    written: _WrittenHead, datasets: Mapping[str, DatasetLabels], layout: Layout
) -> Head:
    if written.dataset not in datasets:
        raise DataError(f"head {written.name}: no data set {written.dataset!r}")
    dataset = datasets[written.dataset]
    targets = tuple(dataset.target(name) for name in written.targets)
    return _head(dataset, written.name, targets, layout == "joint")


def _check_complete(path: Path, space: LabelSpace) -> None:
    """Every target in exactly one head: nothing is lost and nothing learnt twice."""
    names = [head.name for head in space.heads]
    if len(set(names)) < len(names) or len({d.name for d in space.datasets}) < len(space.datasets):
        raise DataError(f"{path}: two heads or two data sets have one name")
    for dataset in space.datasets:
        learnt = [t.name for head in space.heads_of(dataset.name) for t in head.targets]
        if sorted(learnt) != sorted(target.name for target in dataset.targets):
            raise DataError(
                f"{path}: the heads of data set {dataset.name} do not hold each of its "
                f"{len(dataset.targets)} targets once"
            )


def _head(dataset: DatasetLabels, name: str, targets: Sequence[Target], regions: bool) -> Head:
    return Head(name, dataset.name, tuple(targets), regions or dataset.regions, dataset.uncounted)


def _parts(dataset: DatasetLabels, max_targets: int) -> list[Head]:
    count = -(-len(dataset.targets) // max_targets)
    if count == 1:
        return [_head(dataset, dataset.name, dataset.targets, False)]
    parts = np.array_split(np.arange(len(dataset.targets)), count)
    return [
        _head(dataset, f"{dataset.name}.{k}", [dataset.targets[n] for n in part], False)
        for k, part in enumerate(parts)
    ]


def _table(size: int, ids: Sequence[int]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """(size,) True at `ids`."""
    table = np.zeros(size, dtype=bool)
    table[list(ids)] = True
    return table


def _painting(targets: Sequence[Target]) -> list[tuple[int, int]]:
    """(number of the target, id to paint) in painting order."""
    if all(target.paint is not None for target in targets):
        return [(number, target.paint or 0) for number, target in enumerate(targets)]
    order = sorted(range(len(targets)), key=lambda number: -len(targets[number].ids))
    painting = []
    for place, number in enumerate(order):
        smaller = {i for later in order[place + 1 :] for i in targets[later].ids}
        own = [i for i in targets[number].ids if i not in smaller]
        painting.append((number, (own or targets[number].ids)[0]))
    return painting
