"""The small files beside dataset.json: splits.json, groups.json, origins.json."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from voxelbridge.core.data.raw_problems import Problem, few_of
from voxelbridge.core.errors import DataError
from voxelbridge.core.files import read_json

Side = Literal["train", "val"]
Fold = Mapping[Side, tuple[str, ...]]


def read_splits(
    path: Path, known: Collection[str]
) -> tuple[tuple[Fold, ...] | None, list[Problem]]:
    """The folds of splits.json (None: no such file) and what is wrong with the cases they name.

    Raises DataError when the file itself cannot be understood.
    """
    if not path.is_file():
        return None, []
    content = read_json(path)
    if not isinstance(content, list) or not content:
        raise DataError(f'{path}: expected a list of {{"train": [...], "val": [...]}}')
    folds: list[Fold] = []
    problems = []
    for number, fold in enumerate(content):
        where = f"{path.name}: fold {number}"
        if not isinstance(fold, dict) or not {"train", "val"} <= set(fold):
            raise DataError(f"{path}: fold {number} needs 'train' and 'val'")
        if not all(isinstance(fold[side], list) for side in ("train", "val")):
            raise DataError(f"{path}: fold {number}: 'train' and 'val' must be lists of cases")
        train, val = tuple(map(str, fold["train"])), tuple(map(str, fold["val"]))
        if unknown := sorted({*train, *val}.difference(known)):
            problems.append(Problem("splits", f"{where} names unknown cases: {few_of(unknown)}"))
        if both := sorted(set(train) & set(val)):
            problems.append(
                Problem("splits", f"{where} has cases in train and val: {few_of(both)}")
            )
        folds.append({"train": train, "val": val})
    return tuple(folds), problems


def read_groups(path: Path, known: Collection[str]) -> tuple[dict[str, str], list[Problem]]:
    """The patient of each case that groups.json names, and whether it names unknown cases."""
    content = _object(path, "an object of case -> patient")
    for case_id, patient in content.items():
        if isinstance(patient, bool) or not isinstance(patient, str | int):
            raise DataError(f"{path}: the patient of {case_id} is {patient!r}, expected a name")
    problems = _unknown(path, content, known, "groups")
    return {case_id: str(patient) for case_id, patient in content.items()}, problems


def read_origins(
    path: Path, known: Collection[str]
) -> tuple[dict[str, tuple[str, ...]], list[Problem]]:
    """The origin ids of each case that origins.json names, and whether it names unknown cases."""
    content = _object(path, "an object of case -> [origin ids]")
    origins = {}
    for case_id, names in content.items():
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"{path}: the origins of {case_id} are {names!r}, expected names")
        origins[case_id] = tuple(names)
    return origins, _unknown(path, content, known, "origins")


def _object(path: Path, expected: str) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected {expected}")
    return content


def _unknown(
    path: Path,
    content: Mapping[str, object],
    known: Collection[str],
    kind: Literal["groups", "origins"],
) -> list[Problem]:
    unknown = sorted(set(content).difference(known))
    return (
        [Problem(kind, f"{path.name}: names unknown cases: {few_of(unknown)}")] if unknown else []
    )
