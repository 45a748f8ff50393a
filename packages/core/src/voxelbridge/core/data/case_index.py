"""The index of a case store: one line per case, with the size and hash of each of its files."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.data.provenance import Provenance
from voxelbridge.core.errors import DataError

SCHEMA = 1
INDEX_NAME = "index.jsonl"
CASES_FOLDER = "cases"

Role = str  # one of ENDINGS, or MASK_PREFIX and the name of a mask
MASK_PREFIX = "mask."
MASK_ROLE = re.compile(r"mask\.[A-Za-z0-9_-]{1,64}")
ENDINGS: Mapping[Role, str] = {
    "case": ".json",
    "image": ".b2nd",
    "instances": ".instances.b2nd",
    "segmentation": ".segmentation.b2nd",
    "locations": ".locations.safetensors",
}
NO_PROVENANCE = Provenance()


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
    provenance: Provenance = NO_PROVENANCE  # empty where the store was written without

    @property
    def mask_names(self) -> tuple[str, ...]:
        """The names of the case's masks, sorted."""
        return tuple(
            sorted(role[len(MASK_PREFIX) :] for role in self.files if role.startswith(MASK_PREFIX))
        )


def file_name(case_id: str, role: Role) -> str:
    """The name of a file of a case within the cases folder."""
    return f"{case_id}.{role}.b2nd" if role.startswith(MASK_PREFIX) else case_id + ENDINGS[role]


def case_path(root: Path, case_id: str, role: Role) -> Path:
    """Where a file of a case lies in the store at `root`."""
    return root / CASES_FOLDER / file_name(case_id, role)


def index_line(raw: bytes, content: Mapping[str, Any]) -> str:
    """The index line of a complete case, from its JSON file and what that holds."""
    own = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    keys = ("case_id", "shape", "spacing_mm", "boxes", "labels")
    line = {key: content[key] for key in keys} | {"files": {"case": own, **content["files"]}}
    if "provenance" in content:
        line["provenance"] = content["provenance"]
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
    if "/" in content["case_id"]:
        raise ValueError(f"case_id {content['case_id']!r}")  # would lead out of the store
    return CaseRecord(
        content["case_id"],
        (channels, depth, height, width),
        (z, y, x),
        np.array(content["boxes"], dtype=np.float32).reshape(-1, 6),
        np.array(content["labels"], dtype=np.int64),
        files_from_json(content["files"]),
        provenance_from_json(content["provenance"]) if "provenance" in content else NO_PROVENANCE,
    )


def files_from_json(content: Mapping[str, Any]) -> dict[Role, StoredFile]:
    """The `files` object of a case or an index line; a role of a later version is left out."""
    return {
        role: StoredFile(int(file["bytes"]), str(file["sha256"]))
        for role, file in content.items()
        if role in ENDINGS or MASK_ROLE.fullmatch(role)  # nothing that leads out of the store
    }


def provenance_to_json(provenance: Provenance) -> dict[str, Any]:
    """The `provenance` object of a case or an index line: only what is known."""
    content = {
        "patient": provenance.patient,
        "origins": list(provenance.origin_ids),
        "content_sha256": list(provenance.content_sha256),
        "dataset": provenance.dataset,
        "scan": provenance.scan,
        "modality": provenance.modality,
    }
    return {key: value for key, value in content.items() if value}


def provenance_from_json(content: Mapping[str, Any]) -> Provenance:
    """What `provenance_to_json` gave."""
    return Provenance(
        content.get("patient"),
        tuple(content.get("origins", ())),
        tuple(content.get("content_sha256", ())),
        content.get("dataset"),
        content.get("scan"),
        content.get("modality"),
    )
