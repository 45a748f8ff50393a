"""What a run found in its held-out cases before merging, kept in RUN/validation/.

RUN/validation/{weights}_tta{N}/ holds `key.json`, which states everything the boxes depend on, and
one {case}.safetensors per case: boxes, scores, labels and weights of all mirrorings one after the
other, and how many rows each has. What was found with another key is deleted and predicted again.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from voxelbridge.core.errors import DataError
from voxelbridge.core.files import atomic_write, read_json, remove_partial_files, write_json
from voxelbridge.detect.detections import Detections
from voxelbridge.detect.held_out import HeldOutRun
from voxelbridge.detect.predict import OVERLAP, PATCH_MIN_SIDE, Proposals

SCHEMA = 1
FOLDER = "validation"
KEY_FILE = "key.json"
# The settings that decide what is proposed; all others act when proposals are merged.
PROPOSING = ("candidates_per_patch", "patch_iou", "boxes_per_patch", "min_score", "model_top_k")

Key = dict[str, object]


class ProposalCache:
    """The proposals of one run; one process writes at a time."""

    def __init__(self, folder: Path, key: Key) -> None:
        self.folder = folder
        self._key_hash = _hash_of_key(key)
        self._complete: set[str] = set()

    @classmethod
    def open(cls, run: HeldOutRun, *, num_mirrorings: int) -> "ProposalCache":
        """The cache of a run, emptied where it was filled with another key (which is told)."""
        folder = run.path / FOLDER / f"{run.weights}_tta{num_mirrorings}"
        key = cache_key(run, num_mirrorings=num_mirrorings)
        if folder.is_dir():
            before = _key_in(folder)
            changed = sorted(name for name in before | key if before.get(name) != key.get(name))
            if changed:
                print(f"{folder}: made with other {', '.join(changed)}; predicting again")
                shutil.rmtree(folder)
            else:
                remove_partial_files(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / KEY_FILE).exists():
            write_json(folder / KEY_FILE, key)
        return cls(folder, key)

    def has(self, case_id: str) -> bool:
        """Whether the case is there, whole and of this key."""
        if case_id not in self._complete:
            if not self._path(case_id).is_file():
                return False
            try:
                self.read(case_id)
            except DataError as error:
                print(f"{error}; predicting the case again")
                return False
            self._complete.add(case_id)
        return True

    def write(self, case_id: str, proposals: Sequence[Proposals]) -> None:
        """Keeps what was found in a case, atomically."""
        from safetensors.torch import save_file

        found = [proposal.detections for proposal in proposals]
        tensors = {
            "boxes": torch.cat([part.boxes for part in found]),
            "scores": torch.cat([part.scores for part in found]),
            "labels": torch.cat([part.labels for part in found]),
            "weights": torch.cat([proposal.weights for proposal in proposals]),
            "counts": torch.tensor([len(part) for part in found]),
        }
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        stated = {"key": self._key_hash, "case_id": case_id, "sha256": _hash_of(tensors)}
        with atomic_write(self._path(case_id)) as temporary:
            save_file(tensors, temporary, metadata=stated)
        self._complete.add(case_id)

    def read(self, case_id: str) -> list[Proposals]:
        """What was found in a case, one entry per mirroring; a damaged file is a DataError."""
        from safetensors import SafetensorError, safe_open

        path = self._path(case_id)
        try:
            with safe_open(path, framework="pt") as archive:
                stated = archive.metadata() or {}
                tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path}: damaged ({str(error).splitlines()[0]})") from error
        if (stated.get("key"), stated.get("case_id")) != (self._key_hash, case_id):
            raise DataError(f"{path}: of another run, case or setting")
        if stated.get("sha256") != _hash_of(tensors):
            raise DataError(f"{path}: damaged (its SHA-256 differs)")
        counts = tensors["counts"].tolist()
        columns = [tensors[name].split(counts) for name in ("boxes", "scores", "labels", "weights")]
        return [
            Proposals(Detections(boxes=boxes, scores=scores, labels=labels), weights)
            for boxes, scores, labels, weights in zip(*columns, strict=True)
        ]

    def _path(self, case_id: str) -> Path:
        return self.folder / f"{case_id}.safetensors"


def cache_key(run: HeldOutRun, *, num_mirrorings: int) -> Key:
    """Everything that a run's proposals depend on."""
    post = run.config.post_processing
    return {
        "schema": SCHEMA,
        "weights": run.weights_sha256,
        "store": run.store_digest,
        "mirrorings": num_mirrorings,
        "patch_size": list(run.config.patch_size),
        "precision": run.config.precision,
        "overlap": OVERLAP,
        "patch_min_side": PATCH_MIN_SIDE,
        **{name: getattr(post, name) for name in PROPOSING},
    }


def _key_in(folder: Path) -> Key:
    try:
        key = read_json(folder / KEY_FILE)
    except DataError:  # killed before it was written, or damaged: nothing can be trusted
        return {"schema": None}
    return key if isinstance(key, dict) else {"schema": None}


def _hash_of_key(key: Key) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def _hash_of(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
