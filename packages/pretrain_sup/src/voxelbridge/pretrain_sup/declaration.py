"""What a person changes about the labels of data sets, in TOML (docs/formats/label_space.md).

Names in it are those of dataset.json. `targets` comes first, then `leave_out` and `not_annotated`,
then `merge`, and `rename` last.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import Field, PositiveInt

from voxelbridge.core.config import Config, load_config
from voxelbridge.core.data.dataset_description import BACKGROUND
from voxelbridge.core.data.raw_problems import few_of
from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.pretrain_sup.dataset_labels import DatasetLabels, Target, read_dataset_labels
from voxelbridge.pretrain_sup.label_space import MAX_TARGETS, LabelSpace, Layout, build_label_space


class DatasetDeclaration(Config):
    """Changes to the labels of one data set."""

    name: str | None = None  # of stem, heads and cases; None: the folder's
    targets: dict[str, int | tuple[int, ...]] | None = None  # in place of dataset.json's
    regions: bool | None = None  # sigmoids (may overlap) or a softmax; None: as read
    leave_out: tuple[str, ...] = ()  # their voxels become background
    not_annotated: tuple[str, ...] = ()  # their voxels are never counted; may name "background"
    merge: dict[str, tuple[str, ...]] = Field(default_factory=dict)  # new name -> members
    rename: dict[str, str] = Field(default_factory=dict)  # old name -> new name


class LabelDeclaration(Config):
    """Layout, and changes per data set; the keys of `datasets` are folder names or paths."""

    layout: Layout = "per_dataset"
    max_targets: PositiveInt = MAX_TARGETS
    datasets: dict[str, DatasetDeclaration] = Field(default_factory=dict)


def read_declaration(path: Path) -> LabelDeclaration:
    """The declaration in a TOML file; ConfigError names file, key and what is legal."""
    return load_config(LabelDeclaration, path).config


def declared_label_space(folders: Sequence[Path], declaration: LabelDeclaration) -> LabelSpace:
    """The label space of raw data set folders with the changes of `declaration`.

    Raises ConfigError where the declaration names what is not there, DataError for data sets that
    cannot be used.
    """
    datasets = read_datasets(folders, declaration.datasets)
    return build_label_space(
        datasets, layout=declaration.layout, max_targets=declaration.max_targets
    )


def read_datasets(
    folders: Sequence[Path], declared: Mapping[str, DatasetDeclaration]
) -> list[DatasetLabels]:
    """The labels of every folder with the changes that `declared` holds under its name or path."""
    names = [folder.resolve().name for folder in folders]
    for key in declared:
        if key not in names and Path(key) not in folders:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {few_of(names)}"
            raise ConfigError(f"datasets.{key}: no data set folder has this name{hint}")
    datasets = []
    for folder, key in zip(folders, names, strict=True):
        change = declared.get(str(folder), declared.get(key, DatasetDeclaration()))
        labels = read_dataset_labels(folder, name=change.name)
        datasets.append(apply_declaration(labels, change, where=f"datasets.{key}"))
    return datasets


def apply_declaration(
    labels: DatasetLabels, change: DatasetDeclaration, *, where: str
) -> DatasetLabels:
    """`labels` with the changes; `where` begins the text of a ConfigError."""
    targets = {target.name: target for target in labels.targets}
    regions = change.regions
    left_out, not_annotated = list(labels.left_out), list(labels.not_annotated)
    if change.targets is not None:
        declared = {
            name: Target(name, (ids,) if isinstance(ids, int) else ids)
            for name, ids in change.targets.items()
        }
        left_out += [n for target in targets.values() for n in target.ids]
        targets = declared
        regions = _overlap(targets) if regions is None else regions
    for name in change.leave_out:
        left_out += _taken(targets, name, where=f"{where}.leave_out").ids
    for name in change.not_annotated:
        if name == BACKGROUND and name not in targets:
            not_annotated.append(0)
        else:
            not_annotated += _taken(targets, name, where=f"{where}.not_annotated").ids
    for name, members in change.merge.items():
        _merge(targets, name, members, where=f"{where}.merge.{name}")
    renamed = _renamed(targets, change.rename, where=f"{where}.rename")
    of_targets = {number for target in renamed for number in target.ids}
    try:
        return replace(
            labels,
            targets=renamed,
            regions=labels.regions if regions is None else regions,
            not_annotated=tuple(dict.fromkeys(not_annotated)),
            left_out=tuple(n for n in dict.fromkeys(left_out) if n not in of_targets),
        )
    except DataError as error:
        raise ConfigError(f"{where}: {error}") from error


def _overlap(targets: Mapping[str, Target]) -> bool:
    ids = [number for target in targets.values() for number in target.ids]
    return len(set(ids)) < len(ids)


def _taken(targets: dict[str, Target], name: str, *, where: str) -> Target:
    """Takes a target out of `targets`."""
    if name not in targets:
        near = difflib.get_close_matches(name, targets, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there are {few_of(list(targets))}"
        raise ConfigError(f"{where}: no target {name!r}{hint}")
    return targets.pop(name)


def _merge(targets: dict[str, Target], name: str, members: Sequence[str], *, where: str) -> None:
    """Replaces `members` by one target of all their ids, at the place of the first member."""
    if not members:
        raise ConfigError(f"{where}: no target is named; expected those that become one")
    order = list(targets)
    merged = [_taken(targets, member, where=where) for member in members]
    if name in targets:
        raise ConfigError(f"{where}: there is another target {name!r}; merge it too or rename it")
    ids = tuple(dict.fromkeys(number for target in merged for number in target.ids))
    targets[name] = Target(name, ids, merged[0].paint)
    order[min(order.index(member) for member in members)] = name
    ordered = {key: targets[key] for key in order if key in targets}
    targets.clear()
    targets.update(ordered)


def _renamed(
    targets: Mapping[str, Target], names: Mapping[str, str], *, where: str
) -> tuple[Target, ...]:
    remaining = dict(targets)
    for name in names:
        _taken(remaining, name, where=where)
    return tuple(replace(t, name=names.get(t.name, t.name)) for t in targets.values())
