"""The fingerprint of a data set: what planning needs of each case, measured once and kept.

Every case is reduced to its extent, its objects and a sample of its intensities. Finished cases
are appended to STORE/fingerprint_cases.jsonl with the size and time of their files, so that a
preparation that was interrupted reads only what it has not read; fingerprint.json is for people.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.data.dataset import RawCase
from voxelbridge.core.data.foreground import MIN_SAMPLES
from voxelbridge.core.data.preprocess import crop_mapping
from voxelbridge.core.data.raw_objects import RawObjects
from voxelbridge.core.data.raw_problems import image_problems
from voxelbridge.core.errors import DataError
from voxelbridge.core.files import atomic_write

FILE_NAME = "fingerprint.json"
CASES_FILE = "fingerprint_cases.jsonl"
SCHEMA = 2
DIGITS = 9  # of a sample: they give every float32 back exactly
PERCENTILES = {"percentile_00_5": 0.5, "median": 50.0, "percentile_99_5": 99.5}


@dataclass(frozen=True, eq=False)
class CaseFingerprint:
    """One case, measured after bringing it to LPS and cropping it to voxels other than 0."""

    case_id: str
    shape: tuple[int, int, int]  # voxels z, y, x after the crop
    spacing_mm: tuple[float, float, float]
    kept_by_crop: float  # share of the file's voxels, in (0, 1]
    boxes: NDArray[np.float32]  # (N, 6) voxel edges of the original file
    labels: NDArray[np.int64]  # (N,)
    centres_mm: NDArray[np.float64]  # (N, 3) from the corner of the crop
    sizes_mm: NDArray[np.float64]  # (N, 3)
    samples: NDArray[np.float32]  # (C, S) intensities in objects; of the whole image without any

    def to_json(self) -> dict[str, Any]:
        """All of it, samples included."""
        samples = [[float(f"{value:.{DIGITS}g}") for value in row] for row in self.samples]
        return self._facts() | {"samples": samples}

    def summary(self) -> dict[str, Any]:
        """What fingerprint.json says about the case: the samples by their statistics."""
        return self._facts() | {"intensities": [_statistics(row) for row in self.samples]}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "CaseFingerprint":
        z, y, x = content["shape"]
        sz, sy, sx = content["spacing_mm"]
        return cls(
            case_id=content["case_id"],
            shape=(int(z), int(y), int(x)),
            spacing_mm=(float(sz), float(sy), float(sx)),
            kept_by_crop=float(content["kept_by_crop"]),
            boxes=np.array(content["boxes"], dtype=np.float32).reshape(-1, 6),
            labels=np.array(content["labels"], dtype=np.int64),
            centres_mm=np.array(content["centres_mm"], dtype=np.float64).reshape(-1, 3),
            sizes_mm=np.array(content["object_sizes_mm"], dtype=np.float64).reshape(-1, 3),
            samples=np.array(content["samples"], dtype=np.float32),
        )

    def digest(self) -> str:
        """SHA-256 of the case; it does not depend on how many intensities were drawn."""
        short = trimmed(self, min(MIN_SAMPLES, self.samples.shape[1]))
        text = json.dumps(short.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def _facts(self) -> dict[str, Any]:
        return {
            "case_id": self.case_id,
            "shape": list(self.shape),
            "spacing_mm": list(self.spacing_mm),
            "kept_by_crop": self.kept_by_crop,
            "boxes": self.boxes.tolist(),
            "labels": self.labels.tolist(),
            "centres_mm": self.centres_mm.tolist(),
            "object_sizes_mm": self.sizes_mm.tolist(),
        }


class FingerprintCache:
    """The cases measured so far, on disk; one process writes at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, tuple[str, CaseFingerprint]] = {}
        self._stream: IO[str] | None = None
        for line in _lines(path):
            try:
                content = json.loads(line)
                case = CaseFingerprint.from_json(content["case"])
                self._known[case.case_id] = (str(content["source"]), case)
            except (ValueError, KeyError, TypeError):
                continue  # the last line of a killed writer: that case is measured again

    def find(self, case: RawCase, *, num_samples: int) -> CaseFingerprint | None:
        """The case's fingerprint, if its files are those that were measured."""
        source, found = self._known.get(case.case_id, ("", None))
        if found is None or source != source_stamp(case):
            return None
        if found.samples.shape[1] < num_samples:
            return None
        return trimmed(found, num_samples)

    def add(self, case: RawCase, fingerprint: CaseFingerprint) -> None:
        """Appends a measured case."""
        if self._stream is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self._path.open("a", encoding="utf-8")
            self._stream.write("\n")  # ends the torn line of a killed writer
        content = {"source": source_stamp(case), "case": fingerprint.to_json()}
        self._stream.write(json.dumps(content, separators=(",", ":")) + "\n")
        self._stream.flush()

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def measure_case(case: RawCase, *, num_samples: int) -> CaseFingerprint:
    """Reads one case and measures it; the draw of intensities depends on its name only."""
    grid_of_file = case.read_grid()
    objects = case.read_objects(grid_of_file)
    rng = np.random.default_rng(zlib.crc32(case.case_id.encode()))
    places = _draw_voxels(objects, grid_of_file.shape, count=num_samples, rng=rng)
    found, labels = objects.boxes, objects.labels
    del objects  # its map is larger than the image that is read now
    volume = case.read_image()
    if problems := image_problems(volume):
        raise DataError(f"case {case.case_id}: {problems[0].message}")
    mapping = crop_mapping(volume, boxes=found)
    grid = mapping.stored_grid
    boxes = mapping.boxes_to_stored(found) * np.tile(grid.spacing_mm, 2)
    return CaseFingerprint(
        case_id=case.case_id,
        shape=grid.shape,
        spacing_mm=grid.spacing_mm,
        kept_by_crop=float(np.prod(grid.shape) / np.prod(volume.grid.shape)),
        boxes=found,
        labels=labels,
        centres_mm=(boxes[:, :3] + boxes[:, 3:]) / 2,
        sizes_mm=boxes[:, 3:] - boxes[:, :3],
        samples=np.stack([channel[places].astype(np.float32) for channel in volume.array]),
    )


def trimmed(case: CaseFingerprint, num_samples: int) -> CaseFingerprint:
    """The fingerprint as if `num_samples` had been drawn: a draw begins like a longer one."""
    if case.samples.shape[1] == num_samples:
        return case
    return replace(case, samples=case.samples[:, :num_samples])


def source_stamp(case: RawCase) -> str:
    """What changes when the case's files, or their meaning in dataset.json, change."""
    paths = [*case.image_paths, case.label_path, case.objects_path]
    files = []
    for path in paths:
        try:
            found = path.stat() if path is not None else None
        except OSError:
            found = None
        files.append(None if found is None else [str(path), found.st_size, found.st_mtime_ns])
    things = [[thing.name, *thing.ids] for thing in case.things]
    content = [SCHEMA, files, things, case.num_classes, case.min_voxels]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def write_fingerprint(folder: Path, cases: Sequence[CaseFingerprint]) -> None:
    """Writes fingerprint.json, a case per line, with the digest of each."""
    head = {"schema": SCHEMA, "num_cases": len(cases), "digest": data_digest(cases)}
    lines = (json.dumps(case.summary() | {"digest": case.digest()}) for case in cases)
    with atomic_write(folder / FILE_NAME) as temporary, temporary.open("w") as stream:
        stream.write(json.dumps(head)[:-1] + ', "cases": [')
        for number, line in enumerate(lines):
            stream.write(("\n" if number == 0 else ",\n") + line)
        stream.write("\n]}\n")


def data_digest(cases: Iterable[CaseFingerprint]) -> str:
    """SHA-256 over the cases in the order of their names."""
    total = hashlib.sha256()
    for case in sorted(cases, key=lambda case: case.case_id):
        total.update(case.digest().encode())
    return total.hexdigest()


def _statistics(values: NDArray[np.float32]) -> dict[str, Any]:
    wide = values.astype(np.float64)
    figures = {name: float(np.percentile(wide, rank)) for name, rank in PERCENTILES.items()}
    return {
        "num_samples": len(wide),
        "mean": float(wide.mean()),
        "std": float(wide.std()),
        "minimum": float(wide.min()),
        "maximum": float(wide.max()),
        **figures,
    }


def _draw_voxels(
    objects: RawObjects, shape: Sequence[int], *, count: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], ...]:
    """Indices (z, y, x) of `count` voxels drawn with replacement in objects; without any, anywhere.

    Only the part of the volume that holds the objects is looked at.
    """
    low, high = np.zeros(3, dtype=np.int64), np.asarray(shape, dtype=np.int64)
    inside = _object_mask(objects, shape)
    if inside is not None:
        low, high, mask = inside
        voxels = np.flatnonzero(mask)
        chosen = voxels[rng.integers(len(voxels), size=count)]
    else:
        chosen = rng.integers(int(np.prod(high)), size=count)
    found = np.unravel_index(chosen, tuple(int(n) for n in high - low))
    return tuple(axis + start for axis, start in zip(found, low, strict=True))


def _object_mask(
    objects: RawObjects, shape: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]] | None:
    """Start, end and mask of the part that holds all objects; None where no voxel is in one."""
    if len(objects.boxes) == 0:
        return None
    low = np.clip(np.floor(objects.boxes[:, :3].min(axis=0)), 0, shape).astype(np.int64)
    high = np.clip(np.ceil(objects.boxes[:, 3:].max(axis=0)), low, shape).astype(np.int64)
    if objects.instances is not None:
        mask = objects.instances[_slices(low, high)] > 0
    else:
        mask = np.zeros(tuple(high - low), dtype=bool)
        for box in objects.boxes:
            start = np.clip(np.floor(box[:3]), low, high).astype(np.int64) - low
            end = np.clip(np.ceil(box[3:]), low, high).astype(np.int64) - low
            mask[_slices(start, end)] = True
    return (low, high, mask) if mask.any() else None


def _slices(start: NDArray[np.int64], end: NDArray[np.int64]) -> tuple[slice, ...]:
    return tuple(slice(int(a), int(b)) for a, b in zip(start, end, strict=True))


def _lines(path: Path) -> Iterable[str]:
    try:
        with path.open(encoding="utf-8", errors="replace") as stream:
            yield from stream
    except FileNotFoundError:
        return
