"""What jobs read from outside of the study's folder, and whether it has changed since."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, assert_never

from voxelbridge.core.data.case_index import INDEX_NAME
from voxelbridge.core.files import sha256_of
from voxelbridge.detect.plan import FILE_NAME as PLAN_FILE
from voxelbridge.detect.splits import FILE_NAME as SPLITS_FILE

TABLES = ("dataset.json", "splits.json", "groups.json", "origins.json")

Description = dict[str, Any]  # Any: JSON values


@dataclass(frozen=True)
class Input:
    """A file (by content), raw data (by names and sizes), or a store (by its index)."""

    kind: Literal["file", "raw-train", "raw-test", "raw", "store"]
    path: Path


def describe_input(source: Input) -> Description | None:
    """What a done marker records of an input; None where it is not there."""
    path = source.path
    if not path.exists():
        return None
    match source.kind:
        case "file":
            stat = path.stat()
            known = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
            return {**known, "sha256": sha256_of(path)}
        case "raw-train":
            return {"listing": _listing(path, ("imagesTr", "labelsTr"))}
        case "raw-test":
            return {"listing": _listing(path, ("imagesTs", "labelsTs"))}
        case "raw":
            folders = ("imagesTr", "labelsTr", "imagesTs", "labelsTs")
            return {"listing": _listing(path, folders)}
        case "store":
            names = (INDEX_NAME, PLAN_FILE, SPLITS_FILE)
            return {name: sha256_of(path / name) for name in names if (path / name).is_file()}
        case _:
            assert_never(source.kind)


def is_unchanged(recorded: Description | None, source: Input) -> bool:
    """Whether an input is as it was recorded; one that is away now counts as unchanged."""
    if recorded is None or not source.path.exists():
        return True
    if source.kind == "file":
        stat = source.path.stat()
        if (stat.st_size, stat.st_mtime_ns) == (recorded["size"], recorded["mtime_ns"]):
            return True
        return recorded["sha256"] == sha256_of(source.path)
    return describe_input(source) == recorded


def identity(recorded: Mapping[str, Description | None]) -> dict[str, Any]:
    """What of the recorded inputs makes two results the same: no times."""
    return {
        name: None if item is None else {k: v for k, v in item.items() if k != "mtime_ns"}
        for name, item in recorded.items()
    }


def _listing(folder: Path, names: tuple[str, ...]) -> str:
    """SHA-256 over names and sizes of the files in `folder`/names, and the tables' contents."""
    digest = hashlib.sha256()
    for table in TABLES:
        if (folder / table).is_file():
            digest.update(f"{table} {sha256_of(folder / table)}\n".encode())
    for name in names:
        if (folder / name).is_dir():
            with os.scandir(folder / name) as entries:
                sizes = sorted((entry.name, entry.stat().st_size) for entry in entries)
            digest.update("".join(f"{name}/{file} {size}\n" for file, size in sizes).encode())
    return digest.hexdigest()
