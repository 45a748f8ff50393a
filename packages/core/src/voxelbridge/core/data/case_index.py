"""The index of a case store: one line per case, with the size and hash of each of its files."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.errors import DataError

SCHEMA = 1
INDEX_NAME = "index.jsonl"
CASES_FOLDER = "cases"

Role = Literal["case", "image", "instances", "segmentation"]
ENDINGS: Mapping[Role, str] = {
    "case": ".json",
    "image": ".b2nd",
    "instances": ".instances.b2nd",
    "segmentation": ".segmentation.b2nd",
}


@dataclass(frozen=True, slots=True)
class StoredFile:
    """Size and SHA-256 of one file of a case."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, eq=False, slots=True)
class CaseRecord:
    """One line of the index: all that sampling patches needs, without opening a file."""

    case_id: str
    shape: tuple[int, int, int, int]  # (C, D, H, W)
    spacing_mm: tuple[float, float, float]  # (z, y, x)
    boxes: NDArray[np.float32]  # (N, 6) voxel edges of the stored grid
    labels: NDArray[np.int64]  # (N,) 0-based classes
    files: Mapping[Role, StoredFile]


def case_path(root: Path, case_id: str, role: Role) -> Path:
    """Where a file of a case lies in the store at `root`."""
    return root / CASES_FOLDER / f"{case_id}{ENDINGS[role]}"


def index_line(root: Path, case_id: str) -> str:
    """The index line of a complete case, from its JSON file."""
    path = case_path(root, case_id, "case")
    raw = path.read_bytes()
    content = json.loads(raw)
    own = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    keys = ("case_id", "shape", "spacing_mm", "boxes", "labels")
    line = {key: content[key] for key in keys} | {"files": {"case": own, **content["files"]}}
    return json.dumps(line, separators=(",", ":"), allow_nan=False)


def read_index(path: Path) -> tuple[list[CaseRecord], str]:
    """The records of an index and the hash of its lines, which is checked. Raises DataError."""
    digest = hashlib.sha256()
    cases = []
    try:
        with path.open("rb") as stream:
            header = json.loads(stream.readline())
            schema, count, expected = (
                header[key] for key in ("schema", "num_cases", "cases_sha256")
            )
            if schema != SCHEMA:
                raise DataError(
                    f"{path}: schema {schema}, this version reads {SCHEMA}; prepare the store again"
                )
            for line in stream:  # line by line: an index of 100 000 cases has 60 MB
                digest.update(line)
                cases.append(_record_from_json(json.loads(line)))
    except FileNotFoundError:
        raise DataError(f"{path.parent}: no {INDEX_NAME}: not a finished case store") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged ({error!r}); finish the store again") from error
    if digest.hexdigest() != expected or len(cases) != count:
        raise DataError(f"{path}: its content changed (SHA-256 differs); finish the store again")
    return cases, expected


def _record_from_json(content: dict[str, Any]) -> CaseRecord:
    channels, depth, height, width = content["shape"]
    z, y, x = content["spacing_mm"]
    return CaseRecord(
        content["case_id"],
        (channels, depth, height, width),
        (z, y, x),
        np.array(content["boxes"], dtype=np.float32).reshape(-1, 6),
        np.array(content["labels"], dtype=np.int64),
        files_from_json(content["files"]),
    )


def files_from_json(content: Mapping[str, Any]) -> dict[Role, StoredFile]:
    """The `files` object of a case or an index line."""
    return {
        role: StoredFile(int(content[role]["bytes"]), str(content[role]["sha256"]))
        for role in ENDINGS
        if role in content
    }
