"""The case store: preprocessed cases as compressed arrays and JSON, hashed, read in patches.

Layout (docs/formats/case.md): STORE/index.jsonl and, in STORE/cases/, {case}.json, {case}.b2nd and
where they exist {case}.instances.b2nd, {case}.segmentation.b2nd, {case}.mask.{name}.b2nd and
{case}.locations.safetensors.
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

from voxelbridge.core.data.array_file import (
    open_array,
    read_locations,
    read_padded,
    read_whole,
    write_array,
    write_locations,
)
from voxelbridge.core.data.case_checks import MASK_NAME, check_arrays, check_boxes, check_case_id
from voxelbridge.core.data.case_index import (
    CASES_FOLDER,
    ENDINGS,
    INDEX_NAME,
    MASK_PREFIX,
    SCHEMA,
    CaseRecord,
    Role,
    case_path,
    file_name,
    files_from_json,
    index_line,
    provenance_to_json,
    read_index,
)
from voxelbridge.core.data.mapping import StoredToOriginal
from voxelbridge.core.data.provenance import Provenance
from voxelbridge.core.data.volume import Grid
from voxelbridge.core.errors import DataError
from voxelbridge.core.files import atomic_write, read_json, remove_partial_files, sha256_of

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
        return self._line_of(case_id) is not None

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
        provenance: Provenance | None = None,
        locations: Mapping[int, NDArray[Any]] | None = None,
        masks: Mapping[str, NDArray[Any]] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes one case: all of it or nothing, the JSON last.

        `image` (C, D, H, W), stored as float32; `boxes` (N, 6) in voxel edges of this array;
        `instances` and `segmentation` (D, H, W), stored as int32; `masks` by name (letters, digits,
        `_` and `-`), (D, H, W), not 0 = inside; `locations` (N, 3) voxels of each class, kept in
        their order. Without `mapping` the stored grid counts as the original. Raises DataError
        naming the case for NaN or infinite voxels and for boxes that are inverted or outside.
        """
        check_case_id(case_id)
        mapping = mapping or StoredToOriginal.build(grid)
        maps = _label_maps(case_id, instances, segmentation, masks)
        check_arrays(case_id, image, grid, mapping=mapping, maps=maps, locations=locations)
        checked_boxes, checked_labels = check_boxes(case_id, boxes, labels, grid)
        files = {"image": self._write_file(case_id, "image", image.astype(np.float32, copy=False))}
        for role, array in maps.items():
            files[role] = self._write_file(case_id, role, array.astype(_dtype(role), copy=False))
        if locations is not None:
            with atomic_write(case_path(self.root, case_id, "locations")) as temporary:
                write_locations(temporary, locations)
                files["locations"] = _stamp(temporary)
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
        if provenance is not None:
            content["provenance"] = provenance_to_json(provenance)
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
            line = self._line_of(name)
            if line is None:
                raise DataError(f"{self.root}: case {name} is not complete; prepare it again")
            lines.append(line)
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

    def _line_of(self, case_id: str) -> str | None:
        """The index line of a case, or None while it is not complete: one read, one stat a file."""
        try:
            raw = case_path(self.root, case_id, "case").read_bytes()
            content = json.loads(raw)
            files = files_from_json(content["files"])
            for role, file in files.items():
                if case_path(self.root, case_id, role).stat().st_size != file.num_bytes:
                    return None
            return index_line(raw, content)
        except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError):
            return None  # missing, or written by a killed or older program: write it again

    def _write_file(self, case_id: str, role: Role, array: NDArray[Any]) -> dict[str, Any]:
        kind = "image" if role == "image" else "labels"
        with atomic_write(case_path(self.root, case_id, role)) as temporary:
            write_array(temporary, array, patch_size=self.patch_size, kind=kind)
            return _stamp(temporary)

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

    def read_mask_patch(
        self,
        case_id: str,
        name: str,
        start: Sequence[int],
        size: Sequence[int],
        *,
        pad_value: int = 0,
    ) -> NDArray[np.uint8]:
        """The mask `name` (*size), 1 = inside, of the same voxels as `read_patch`."""
        return read_padded(
            self._open(case_id, MASK_PREFIX + name), start, size, pad_value=pad_value
        )

    def read_locations(self, case_id: str) -> dict[int, NDArray[np.int32]]:
        """Voxels (N, 3) of each class of the stored grid, to draw patches around."""
        return read_locations(self._checked_path(self.record(case_id), "locations"))

    def verify(self) -> list[str]:
        """Every file that is missing, changed or unknown to the index, one line each."""
        problems = []
        expected: set[str] = set()
        for record in self.cases:
            for role in record.files:
                expected.add(file_name(record.case_id, role))
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
        return open_array(path, shape=record.shape[1:], dtype=_dtype(role))

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


def _label_maps(
    case_id: str,
    instances: NDArray[Any] | None,
    segmentation: NDArray[Any] | None,
    masks: Mapping[str, NDArray[Any]] | None,
) -> dict[Role, NDArray[Any]]:
    maps: dict[Role, NDArray[Any]] = {}
    if instances is not None:
        maps["instances"] = instances
    if segmentation is not None:
        maps["segmentation"] = segmentation
    for name, mask in (masks or {}).items():
        if not MASK_NAME.fullmatch(name):
            raise DataError(
                f"case {case_id}: mask name {name!r}; use up to 64 letters, digits, '_' and '-'"
            )
        maps[MASK_PREFIX + name] = mask != 0
    return maps


def _dtype(role: Role) -> type[np.generic]:
    return np.uint8 if role.startswith(MASK_PREFIX) else np.int32


def _stamp(path: Path) -> dict[str, Any]:
    """What the index says about a file of a case."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
