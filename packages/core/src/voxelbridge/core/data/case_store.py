"""The case store: preprocessed cases as compressed arrays and JSON, hashed, read in patches.

Layout (docs/formats/case.md): STORE/index.jsonl and, in STORE/cases/, {case}.json, {case}.b2nd and
where they exist {case}.instances.b2nd and {case}.segmentation.b2nd.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import blosc2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from voxelbridge.core.data.array_file import open_array, read_padded, read_whole, write_array
from voxelbridge.core.data.case_index import (
    CASES_FOLDER,
    ENDINGS,
    INDEX_NAME,
    SCHEMA,
    CaseRecord,
    Role,
    case_path,
    files_from_json,
    index_line,
    read_index,
)
from voxelbridge.core.data.mapping import StoredToOriginal
from voxelbridge.core.data.volume import Grid
from voxelbridge.core.errors import DataError
from voxelbridge.core.files import atomic_write, read_json, remove_partial_files, sha256_of

BOX_TOLERANCE = 1e-3  # voxels: rounding of float32 edges at the border of the volume
DEFAULT_PATCH_SIZE = (128, 128, 128)


@dataclass(frozen=True, eq=False)
class CaseDetails:
    """What {case}.json says beyond the record: geometry and whatever preprocessing added."""

    grid: Grid  # of the stored array
    mapping: StoredToOriginal
    extra: Mapping[str, Any]  # Any: JSON of the part that prepared the case


class CaseStoreWriter:
    """Writes a case store; several processes may write different cases of one store at once."""

    def __init__(self, root: Path, *, patch_size: Sequence[int] = DEFAULT_PATCH_SIZE) -> None:
        self.root = root
        self.patch_size = tuple(patch_size)

    def is_done(self, case_id: str) -> bool:
        """Whether the case is complete on disk: its JSON and files of the sizes that it states."""
        path = case_path(self.root, case_id, "case")
        if not path.is_file():
            return False
        try:
            files = files_from_json(read_json(path)["files"])
        except (DataError, KeyError, TypeError, ValueError):
            return False  # written by a killed or older program: write it again
        paths = {role: case_path(self.root, case_id, role) for role in files}
        return all(
            paths[role].is_file() and paths[role].stat().st_size == file.num_bytes
            for role, file in files.items()
        )

    def write_case(
        self,
        case_id: str,
        image: NDArray[Any],
        *,
        grid: Grid,
        boxes: ArrayLike,
        labels: ArrayLike,
        mapping: StoredToOriginal | None = None,
        instances: NDArray[Any] | None = None,
        segmentation: NDArray[Any] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes one case: all of it or nothing, the JSON last.

        `image` (C, D, H, W), stored as float32; `boxes` (N, 6) in voxel edges of this array;
        `instances` and `segmentation` (D, H, W), stored as int32. Without `mapping` the stored
        grid counts as the original. Raises DataError naming the case for NaN or infinite voxels
        and for boxes that are inverted or outside.
        """
        _check_case_id(case_id)
        mapping = mapping or StoredToOriginal.build(grid)
        _check_arrays(case_id, image, grid, mapping, instances, segmentation)
        checked_boxes, checked_labels = _check_boxes(case_id, boxes, labels, grid)
        arrays: dict[Role, NDArray[Any]] = {"image": image.astype(np.float32, copy=False)}
        if instances is not None:
            arrays["instances"] = instances.astype(np.int32, copy=False)
        if segmentation is not None:
            arrays["segmentation"] = segmentation.astype(np.int32, copy=False)
        files: dict[str, dict[str, Any]] = {}
        for role, array in arrays.items():
            kind = "image" if role == "image" else "labels"
            with atomic_write(case_path(self.root, case_id, role)) as temporary:
                write_array(temporary, array, patch_size=self.patch_size, kind=kind)
                files[role] = {
                    "bytes": temporary.stat().st_size,
                    "sha256": sha256_of(temporary),
                }
        content = {
            "schema": SCHEMA,
            "case_id": case_id,
            "shape": list(image.shape),
            "spacing_mm": list(grid.spacing_mm),
            "boxes": checked_boxes.tolist(),
            "labels": checked_labels.tolist(),
            "grid": grid.to_json(),
            "stored_to_original": mapping.to_json(),
            "files": files,
            "extra": dict(extra or {}),
        }
        text = json.dumps(content, allow_nan=False, indent=1) + "\n"
        with atomic_write(case_path(self.root, case_id, "case")) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def finish(self, *, only: Collection[str] | None = None) -> Path:
        """Writes the index over all complete cases, or those in `only`; the store can then be read.

        Raises DataError when a case of `only` is not complete. Returns the index's path.
        """
        found = {path.name[: -len(ENDINGS["case"])] for path in self._folder.glob("[!.]*.json")}
        names = sorted(found if only is None else only)
        lines = []
        for name in names:
            if not self.is_done(name):
                raise DataError(f"{self.root}: case {name} is not complete; prepare it again")
            lines.append(index_line(self.root, name))
        body = "".join(line + "\n" for line in lines).encode()
        header = {
            "schema": SCHEMA,
            "num_cases": len(names),
            "cases_sha256": hashlib.sha256(body).hexdigest(),
        }
        path = self.root / INDEX_NAME
        with atomic_write(path) as temporary:
            temporary.write_bytes(json.dumps(header).encode() + b"\n" + body)
        return path

    def remove_leftovers(self) -> None:
        """Deletes half-written files of killed writers; only while no other process writes here."""
        if self._folder.is_dir():
            remove_partial_files(self._folder)

    @property
    def _folder(self) -> Path:
        return self.root / CASES_FOLDER


class CaseStore:
    """A finished store, read-only. Two processes may read it at once; forked workers share it."""

    def __init__(self, root: Path, cases: list[CaseRecord], *, digest: str, verify: bool) -> None:
        self.root = root
        self.cases = cases
        self.digest = digest
        self._by_id = {record.case_id: record for record in cases}
        self._verify = verify
        self._verified: set[tuple[str, Role]] = set()

    @classmethod
    def open(
        cls, root: Path, *, verify: Literal["first_read", "never"] = "first_read"
    ) -> "CaseStore":
        """Opens a store by its index alone, which is checked against its own SHA-256.

        `verify="first_read"` hashes every file once per process before its first use, so that a
        changed byte stops the run instead of training silently: blosc2 has no checksum of its own.
        It reads a file whole once (about 1 GB/s), after which the patches come from memory anyway.
        `verify="never"` is for slow shared disks after `store.verify()` was run.
        `digest` is then the identity of the data: equal digests are equal stores.
        """
        cases, digest = read_index(root / INDEX_NAME)
        return cls(root, cases, digest=digest, verify=verify == "first_read")

    def record(self, case_id: str) -> CaseRecord:
        """The index record of a case; an unknown one is a DataError."""
        try:
            return self._by_id[case_id]
        except KeyError:
            raise DataError(f"{self.root}: no case {case_id!r} in the store") from None

    def details(self, case_id: str) -> CaseDetails:
        """Grid, mapping to the original file and extra facts, from {case}.json."""
        path = self._checked_path(self.record(case_id), "case")
        try:
            content = read_json(path)
            return CaseDetails(
                Grid.from_json(content["grid"]),
                StoredToOriginal.from_json(content["stored_to_original"]),
                content["extra"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: not a case of schema {SCHEMA} ({error!r})") from error

    def read_image(self, case_id: str) -> NDArray[np.float32]:
        """The whole image (C, D, H, W)."""
        return read_whole(self._open(case_id, "image"))

    def read_patch(
        self, case_id: str, start: Sequence[int], size: Sequence[int], *, pad_value: float = 0.0
    ) -> NDArray[np.float32]:
        """(C, *size) cut at voxel `start` (z, y, x), which may reach outside: `pad_value` there."""
        return read_padded(self._open(case_id, "image"), start, size, pad_value=pad_value)

    def read_instances(self, case_id: str) -> NDArray[np.int32]:
        """The whole instance map (D, H, W), 0 = background."""
        return read_whole(self._open(case_id, "instances"))

    def read_instances_patch(
        self, case_id: str, start: Sequence[int], size: Sequence[int], *, pad_value: int = 0
    ) -> NDArray[np.int32]:
        """The instance map (*size) of the same voxels as `read_patch`."""
        return read_padded(self._open(case_id, "instances"), start, size, pad_value=pad_value)

    def read_segmentation_patch(
        self, case_id: str, start: Sequence[int], size: Sequence[int], *, pad_value: int = 0
    ) -> NDArray[np.int32]:
        """The semantic map (*size) of the same voxels as `read_patch`."""
        return read_padded(self._open(case_id, "segmentation"), start, size, pad_value=pad_value)

    def verify(self) -> list[str]:
        """Every file that is missing, changed or unknown to the index, one line each."""
        problems = []
        expected: set[str] = set()
        for record in self.cases:
            for role in record.files:
                expected.add(record.case_id + ENDINGS[role])
                if problem := self._problem(record, role):
                    problems.append(problem)
        present = {path.name for path in (self.root / CASES_FOLDER).iterdir()}
        problems += [
            f"{self.root / CASES_FOLDER / name}: not in the index; finish the store again"
            for name in sorted(present - expected)
        ]
        return problems

    def _open(self, case_id: str, role: Role) -> blosc2.NDArray:
        record = self.record(case_id)
        path = self._checked_path(record, role)
        if role == "image":
            return open_array(path, shape=record.shape, dtype=np.float32)
        return open_array(path, shape=record.shape[1:], dtype=np.int32)

    def _checked_path(self, record: CaseRecord, role: Role) -> Path:
        if role not in record.files:
            raise DataError(f"{self.root}: case {record.case_id} has no {role}")
        key = (record.case_id, role)
        if self._verify and key not in self._verified:
            if problem := self._problem(record, role):
                raise DataError(problem)
            self._verified.add(key)
        return case_path(self.root, record.case_id, role)

    def _problem(self, record: CaseRecord, role: Role) -> str | None:
        path = case_path(self.root, record.case_id, role)
        where = f"{path}: case {record.case_id}:"
        file = record.files[role]
        try:
            size = path.stat().st_size
            if size != file.num_bytes:
                return f"{where} {size} bytes, the index says {file.num_bytes}; prepare it again"
            if sha256_of(path) != file.sha256:
                return f"{where} its content changed (SHA-256 differs); prepare it again"
        except OSError as error:
            return f"{where} cannot be read ({error.strerror}); prepare it again"
        return None


def _check_case_id(case_id: str) -> None:
    reserved = tuple(ENDINGS[role].removesuffix(".b2nd") for role in ("instances", "segmentation"))
    legal = case_id and case_id == Path(case_id).name and not case_id.startswith(".")
    if not legal or "\0" in case_id or "\n" in case_id or case_id.endswith(reserved):
        raise DataError(f"case {case_id!r}: not usable as a file name in a case store; rename it")


def _check_arrays(
    case_id: str,
    image: NDArray[Any],
    grid: Grid,
    mapping: StoredToOriginal,
    instances: NDArray[Any] | None,
    segmentation: NDArray[Any] | None,
) -> None:
    if image.ndim != 4 or image.shape[1:] != grid.shape or mapping.stored_shape != grid.shape:
        raise ValueError(
            f"case {case_id}: image {image.shape}, grid {grid.shape}, mapping "
            f"{mapping.stored_shape} must agree"
        )
    for name, array in (("instances", instances), ("segmentation", segmentation)):
        if array is not None and array.shape != grid.shape:
            raise ValueError(f"case {case_id}: {name} {array.shape} on grid {grid.shape}")
    if not np.isfinite(image).all():
        count = int(np.count_nonzero(~np.isfinite(image)))
        raise DataError(f"case {case_id}: {count} voxels are NaN or infinite; correct the image")


def _check_boxes(
    case_id: str, boxes: ArrayLike, labels: ArrayLike, grid: Grid
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    edges = np.asarray(boxes, dtype=np.float32).reshape(-1, 6)
    classes = np.asarray(labels, dtype=np.int64).reshape(-1)
    if len(edges) != len(classes):
        raise ValueError(f"case {case_id}: {len(edges)} boxes but {len(classes)} labels")
    low, high = edges[:, :3], edges[:, 3:]
    wrong = ~(high > low).all(axis=1)  # also True for NaN
    outside = (low < -BOX_TOLERANCE).any(axis=1)
    outside |= (high > np.asarray(grid.shape) + BOX_TOLERANCE).any(axis=1)
    for rows, what in ((wrong, "inverted or empty"), (outside, "outside the image")):
        if rows.any():
            box = edges[rows][0].tolist()
            raise DataError(f"case {case_id}: box {box} is {what} {grid.shape}; correct the label")
    if (classes < 0).any():
        raise DataError(f"case {case_id}: class {classes.min()} is negative; classes start at 0")
    return edges, classes
