"""Training patches for detection: where they lie, how they are turned, which boxes they hold.

nnDetection's sampling (arXiv 2106.00817): a part of each batch is placed on a random object of the
whole data set, the rest anywhere; boxes cut by the patch keep their visible part. The transform is
drawn first and only the voxels that it needs are read (core.data.augment).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from voxelbridge.core.data.augment import SpatialAugmentation, SpatialParams
from voxelbridge.core.data.case_store import CaseStore
from voxelbridge.core.data.foreground import boxes_from_instances
from voxelbridge.core.data.patches import boxes_in_patch, object_start, uniform_start
from voxelbridge.detect.detections import Targets

MIN_VISIBLE_VOXELS = 1.0  # per axis: less of an object cannot be seen in a patch
CUT_TOLERANCE = 1e-3  # voxels outside the patch that do not make an object a cut one
Triple = tuple[int, int, int]
BoxMasks = Literal["none", "ellipsoid"]


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
    augmentation: SpatialAugmentation
    box_masks: BoxMasks = "none"  # foreground of cases that have boxes only

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
        params = self.augmentation.sample(rng, self.patch_size)
        num_objects = int(self._objects_up_to[-1])
        if on_object and num_objects > 0:
            # Every object of the data set is equally likely (nnDetection).
            chosen = int(rng.integers(num_objects))
            index = int(np.searchsorted(self._objects_up_to, chosen, side="right"))
            name = self._names[index]
            case = self.cases[name]
            row = chosen - int(self._objects_up_to[index]) + len(case.boxes)
            start = object_start(rng, case.shape, self.patch_size, case.boxes[row])
            start = params.keep_inside(start, case.boxes[row])
        else:
            name = self._names[int(rng.integers(len(self._names)))]
            case = self.cases[name]
            start = uniform_start(rng, case.shape, self.patch_size)
        return read_sample(self.store, name, case, start, params, box_masks=self.box_masks)


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
    store: CaseStore,
    case_id: str,
    case: CaseObjects,
    start: Sequence[int],
    params: SpatialParams,
    *,
    box_masks: BoxMasks = "none",
) -> Sample:
    """The patch at `start` as `params` shows it, 0 where it leaves the volume.

    Where the case has voxel labels, objects that are rotated or cut by the patch are boxed anew,
    tightly around the voxels that are left; an object without any is dropped. Boxes-only cases keep
    the transformed boxes and get the `foreground` that `box_masks` names.
    """
    first, size = params.source_box(start)
    image = params.apply_image(store.read_patch(case_id, first, size, pad_value=0.0))
    whole = params.apply_boxes(case.boxes, start=start)
    boxes, rows = crop_boxes(whole, (0, 0, 0), params.patch_size)
    foreground = None
    if case.has_instances:
        stored = store.read_instances_patch(case_id, first, size, pad_value=0)
        instances = params.apply_labels(stored)
        foreground = instances > 0
        boxes, rows = _boxes_of_voxels(whole, boxes, rows, instances, params)
    elif box_masks == "ellipsoid":
        near, _ = boxes_in_patch(whole, (0, 0, 0), params.patch_size)
        foreground = params.draw_ellipsoids(case.boxes, start=start) if len(near) else None
        if foreground is None:
            foreground = np.zeros(params.patch_size, dtype=bool)
    return Sample(image=image, boxes=boxes, labels=case.labels[rows], foreground=foreground)


def _boxes_of_voxels(
    whole: NDArray[np.float64],
    boxes: NDArray[np.float32],
    rows: NDArray[np.int64],
    instances: NDArray[np.int32],
    params: SpatialParams,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Boxes and rows with those that need it taken from the patch's map, in which row n is n + 1.

    `whole` are the boxes of all rows before they were cut, `boxes` the visible parts of `rows`.
    """
    if params.axis_aligned:
        size = np.asarray(params.patch_size, dtype=np.float64)
        outside = np.concatenate([-whole[rows, :3], whole[rows, 3:] - size], axis=1)
        renewed = (outside > CUT_TOLERANCE).any(axis=1)
        if not renewed.any():
            return boxes, rows
        kept, kept_rows = boxes[~renewed], rows[~renewed]
        candidates = rows[renewed]
    else:  # the estimate may have missed a corner of an object, so all rows are looked for
        kept, kept_rows = boxes[:0], rows[:0]
        candidates = np.arange(len(whole))
    ids, tight = boxes_from_instances(instances)
    found = np.isin(ids - 1, candidates)
    all_boxes = np.concatenate([kept, tight[found]])
    all_rows = np.concatenate([kept_rows, ids[found] - 1])
    order = np.argsort(all_rows)
    return all_boxes[order], all_rows[order]


def crop_boxes(
    boxes: ArrayLike, start: Sequence[int], size: Sequence[int]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Visible parts (M, 6) of boxes (N, 6) in a patch, in its voxel edges, and their rows (M,).

    Slices thinner than a voxel (and than the object itself) are left out: nobody can see them.
    """
    visible, rows = boxes_in_patch(boxes, start, size)
    edges = np.asarray(boxes, dtype=np.float64).reshape(-1, 6)
    whole = edges[rows, 3:] - edges[rows, :3]
    seen = visible[:, 3:] - visible[:, :3] >= np.minimum(MIN_VISIBLE_VOXELS, whole) - 1e-4
    kept = np.flatnonzero(seen.all(axis=1))
    return visible[kept], rows[kept]


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
