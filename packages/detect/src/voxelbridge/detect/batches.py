"""Training patches for detection: where they lie, which boxes they hold, how they are mirrored.

nnDetection's sampling (arXiv 2106.00817): a part of each batch is placed on a random object of the
whole data set, the rest anywhere; boxes cut by the patch keep their visible part.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from voxelbridge.core.data.case_store import CaseStore
from voxelbridge.core.data.patches import boxes_in_patch, object_start, uniform_start
from voxelbridge.detect.detections import Targets

MIN_VISIBLE_VOXELS = 1.0  # per axis: less of an object cannot be seen in a patch
Triple = tuple[int, int, int]


@dataclass(frozen=True)
class DetectionBatch:
    """Patches and their objects; `foreground` is None where a case has no voxel labels."""

    image: Tensor  # (B, C, D, H, W) float32
    targets: tuple[Targets, ...]  # boxes in voxel edges of the patch
    foreground: Tensor | None  # (B, D, H, W) bool, True = object

    def to(self, device: torch.device) -> "DetectionBatch":
        """The batch on `device`; copies from pinned memory do not wait."""
        return DetectionBatch(
            image=self.image.to(device, non_blocking=True),
            targets=tuple(target.to(device) for target in self.targets),
            foreground=None
            if self.foreground is None
            else self.foreground.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class CaseObjects:
    """What sampling needs of one case: its shape and its objects, in voxels of the stored grid."""

    shape: Triple
    boxes: NDArray[np.float32]  # (N, 6)
    labels: NDArray[np.int64]  # (N,)
    has_instances: bool


@dataclass(frozen=True)
class PatchSampler:
    """`sampler(step, rng)` gives the batch of a training step; it reads just its patches."""

    store: CaseStore
    cases: Mapping[str, CaseObjects]
    patch_size: Triple
    batch_size: int
    object_fraction: float
    mirror: bool

    @cached_property
    def _names(self) -> list[str]:
        return list(self.cases)

    @cached_property
    def _objects_up_to(self) -> NDArray[np.int64]:
        """Objects of the first case, of the first two, ...: once, not for every patch."""
        return np.cumsum([len(case.boxes) for case in self.cases.values()])

    def __call__(self, step: int, rng: np.random.Generator) -> DetectionBatch:
        del step  # all randomness of a step is in its generator
        num_on_objects = round(self.batch_size * self.object_fraction)
        samples = [
            self._sample(rng, on_object=index >= self.batch_size - num_on_objects)
            for index in range(self.batch_size)
        ]
        return collate(samples)

    def _sample(self, rng: np.random.Generator, *, on_object: bool) -> "Sample":
        num_objects = int(self._objects_up_to[-1])
        if on_object and num_objects > 0:
            # Every object of the data set is equally likely (nnDetection).
            chosen = int(rng.integers(num_objects))
            index = int(np.searchsorted(self._objects_up_to, chosen, side="right"))
            name = self._names[index]
            case = self.cases[name]
            row = chosen - int(self._objects_up_to[index]) + len(case.boxes)
            start = object_start(rng, case.shape, self.patch_size, case.boxes[row])
        else:
            name = self._names[int(rng.integers(len(self._names)))]
            case = self.cases[name]
            start = uniform_start(rng, case.shape, self.patch_size)
        sample = read_sample(self.store, name, case, start, self.patch_size)
        if not self.mirror:
            return sample
        return flip_sample(sample, axes=[axis for axis in range(3) if rng.random() < 0.5])


@dataclass(frozen=True)
class Sample:
    """One patch: image (C, D, H, W), boxes (N, 6) in its voxel edges, labels, foreground."""

    image: NDArray[np.float32]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    foreground: NDArray[np.bool_] | None


def case_objects(store: CaseStore, case_ids: Sequence[str]) -> dict[str, CaseObjects]:
    """The sampling table of the given cases, from the store's index."""
    table = {}
    for case_id in case_ids:
        record = store.record(case_id)
        _, depth, height, width = record.shape
        table[case_id] = CaseObjects(
            shape=(depth, height, width),
            boxes=record.boxes,
            labels=record.labels,
            has_instances="instances" in record.files,
        )
    return table


def read_sample(
    store: CaseStore, case_id: str, case: CaseObjects, start: Sequence[int], size: Triple
) -> Sample:
    """The patch of `size` voxels at `start`, zero-padded where it leaves the volume."""
    image = store.read_patch(case_id, start, size, pad_value=0.0)
    foreground = None
    if case.has_instances:
        foreground = store.read_instances_patch(case_id, start, size, pad_value=0) > 0
    boxes, kept = crop_boxes(case.boxes, start, size)
    return Sample(image=image, boxes=boxes, labels=case.labels[kept], foreground=foreground)


def crop_boxes(
    boxes: NDArray[np.float32], start: Sequence[int], size: Sequence[int]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Visible parts (M, 6) of boxes (N, 6) in a patch, in its voxel edges, and their rows (M,).

    Slices thinner than a voxel (and than the object itself) are left out: nobody can see them.
    """
    visible, rows = boxes_in_patch(boxes, start, size)
    whole = boxes[rows, 3:] - boxes[rows, :3]
    seen = visible[:, 3:] - visible[:, :3] >= np.minimum(MIN_VISIBLE_VOXELS, whole) - 1e-4
    kept = np.flatnonzero(seen.all(axis=1))
    return visible[kept], rows[kept]


def flip_sample(sample: Sample, *, axes: Sequence[int]) -> Sample:
    """The sample mirrored along spatial `axes` (0 = z): voxels and boxes, exactly."""
    if not axes:
        return sample
    boxes = sample.boxes.copy()
    for axis in axes:
        size = sample.image.shape[1 + axis]
        boxes[:, axis] = size - sample.boxes[:, axis + 3]
        boxes[:, axis + 3] = size - sample.boxes[:, axis]
    foreground = sample.foreground
    return Sample(
        image=np.flip(sample.image, axis=tuple(1 + axis for axis in axes)),
        boxes=boxes,
        labels=sample.labels,
        foreground=None if foreground is None else np.flip(foreground, axis=tuple(axes)),
    )


def collate(samples: Sequence[Sample]) -> DetectionBatch:
    """Samples of equal patch size as one batch of tensors."""
    masks = [sample.foreground for sample in samples if sample.foreground is not None]
    return DetectionBatch(
        image=torch.from_numpy(np.stack([sample.image for sample in samples])),
        targets=tuple(
            Targets(torch.from_numpy(sample.boxes), torch.from_numpy(sample.labels))
            for sample in samples
        ),
        foreground=torch.from_numpy(np.stack(masks)) if len(masks) == len(samples) else None,
    )
