"""Training patches for detection: where they lie, how they are turned, which boxes they hold.

nnDetection's sampling (arXiv 2106.00817): a part of each batch is placed on a random object of the
whole data set, the rest anywhere; boxes cut by the patch keep their visible part. The transform is
drawn first and only the voxels that it needs are read (core.data.augment). What is not done while
reading waits for the batch to come to its device (`on_device`): intensities always, and with
`defer` turning and scaling too.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from voxelbridge.core.data.augment import SpatialAugmentation
from voxelbridge.core.data.augment_device import SourceBoxes, apply_labels_on, label_extents
from voxelbridge.core.data.augment_intensity import IntensityAugmentation, IntensityParams
from voxelbridge.core.data.case_store import CaseStore
from voxelbridge.core.data.patches import object_start, uniform_start
from voxelbridge.detect.detections import Targets
from voxelbridge.detect.patch_objects import CaseObjects, PatchObjects, Triple
from voxelbridge.detect.patch_sources import BoxMasks, Sample, Source, read_source

UNCHANGED = IntensityAugmentation.none()


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


@dataclass(frozen=True, eq=False)
class SourceBatch:
    """Patches before they are turned and scaled; their parameters and boxes stay on the CPU."""

    images: SourceBoxes
    instances: tuple[Tensor | None, ...]  # source boxes (*size) of the same params
    drawn: tuple[Tensor | None, ...]  # foreground (*patch_size) made of boxes
    objects: tuple[PatchObjects, ...]

    def apply(self, device: torch.device) -> DetectionBatch:
        """The patches, made on `device`; waits for it once, where boxes depend on its voxels."""
        maps = [
            None if source is None else apply_labels_on(source.to(device, non_blocking=True), drawn)
            for source, drawn in zip(self.instances, self.images.params, strict=True)
        ]
        masks = [
            (None if own is None else own.to(device)) if labels is None else labels > 0
            for labels, own in zip(maps, self.drawn, strict=True)
        ]
        known = [mask for mask in masks if mask is not None]
        return DetectionBatch(
            image=self.images.to(device).apply(),
            targets=tuple(target.to(device) for target in self._targets(maps)),
            foreground=torch.stack(known) if len(known) == len(masks) else None,
        )

    def _targets(self, maps: Sequence[Tensor | None]) -> list[Targets]:
        extents = [
            label_extents(labels, count=len(objects.labels))
            for labels, objects in zip(maps, self.objects, strict=True)
            if labels is not None and len(objects.uncertain)
        ]
        tables = iter(
            torch.cat(extents).cpu().split([len(rows) for rows in extents]) if extents else ()
        )
        targets = []
        for objects in self.objects:
            table = next(tables).numpy() if len(objects.uncertain) else np.zeros((0, 6))
            ids = 1 + np.flatnonzero(table[:, 0] >= 0)
            boxes, labels = objects.boxed(ids, table[ids - 1].astype(np.float32))
            targets.append(Targets(torch.from_numpy(boxes), torch.from_numpy(labels)))
        return targets


@dataclass(frozen=True, eq=False)
class LoadedBatch:
    """What a loader process hands over: patches or their sources, and what is left to do."""

    patches: DetectionBatch | SourceBatch
    intensity: Tensor | None  # (B, C, 12) `IntensityParams.to_array()`

    def finish(self, device: torch.device) -> DetectionBatch:
        """The batch on `device`: turned, scaled, boxed and with its intensities changed."""
        match self.patches:
            case DetectionBatch():
                batch = self.patches.to(device)
            case SourceBatch():
                batch = self.patches.apply(device)
        if self.intensity is None:
            return batch
        params = IntensityParams.from_array(self.intensity.numpy())
        return replace(batch, image=params.apply(batch.image))


def on_device(batches: Iterable[LoadedBatch], device: torch.device) -> Iterator[DetectionBatch]:
    """The batches on `device`, with what was left to do there done."""
    for batch in batches:
        yield batch.finish(device)


@dataclass(frozen=True)
class PatchSampler:
    """`sampler(number, rng)` gives the patches of one forward pass; it reads just these.

    Their intensities are as stored. `sampler.load(number, rng)` is for training: the same patches
    with what `on_device` needs to change intensities, and with `defer` to turn and scale. With
    several ranks `rng` must be the same on all of them: each draws its own patches of the job's
    batch, and together they are those that one process draws.
    """

    store: CaseStore
    cases: Mapping[str, CaseObjects]
    patch_size: Triple
    batch_size: int  # patches of one forward pass of one rank
    object_fraction: float  # of the patches of an optimizer step, all ranks and parts together
    augmentation: SpatialAugmentation
    box_masks: BoxMasks = "none"  # foreground of cases that have boxes only
    intensity: IntensityAugmentation = UNCHANGED
    defer: bool = False  # leave turning and scaling to `on_device`
    rank: int = 0
    ranks: int = 1
    parts: int = 1  # forward passes of an optimizer step

    @cached_property
    def _names(self) -> list[str]:
        return list(self.cases)

    @cached_property
    def _objects_up_to(self) -> NDArray[np.int64]:
        """Objects of the first case, of the first two, ...: once, not for every patch."""
        return np.cumsum([len(case.boxes) for case in self.cases.values()])

    def __call__(self, number: int, rng: np.random.Generator) -> DetectionBatch:
        """Patches turned, scaled and boxed; `intensity` and `defer` do not count."""
        return collate([source.transformed() for source, _ in self._sources(number, rng)])

    def load(self, number: int, rng: np.random.Generator) -> LoadedBatch:
        """The same patches, with what is left to `on_device`."""
        sources, streams = zip(*self._sources(number, rng), strict=True)
        patches = (
            collate_sources(sources)
            if self.defer
            else collate([source.transformed() for source in sources])
        )
        if self.intensity.changes_nothing:
            return LoadedBatch(patches, None)
        changes = [
            self.intensity.sample(stream, len(source.image)).to_array()
            for source, stream in zip(sources, streams, strict=True)
        ]
        return LoadedBatch(patches, torch.from_numpy(np.stack(changes)))

    def _sources(
        self, number: int, rng: np.random.Generator
    ) -> list[tuple[Source, np.random.Generator]]:
        """What each patch is made of, and the random stream that drew it."""
        total = self.batch_size * self.ranks * self.parts
        first_on_object = total - round(total * self.object_fraction)
        streams = rng.spawn(self.batch_size * self.ranks)[self.rank :: self.ranks]
        # Places in the step's batch are dealt out in turn: every rank and part has objects.
        first = (number % self.parts) * self.ranks + self.rank
        places = range(first, total, self.ranks * self.parts)
        return [
            (self._draw(stream, on_object=place >= first_on_object), stream)
            for stream, place in zip(streams, places, strict=True)
        ]

    def _draw(self, rng: np.random.Generator, *, on_object: bool) -> Source:
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
        return read_source(self.store, name, case, start, params, box_masks=self.box_masks)


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


def collate_sources(sources: Sequence[Source]) -> SourceBatch:
    """Sources of equal patch size as one batch of tensors, each of its own size."""

    def tensor(array: NDArray[Any] | None) -> Tensor | None:
        return None if array is None else torch.from_numpy(np.ascontiguousarray(array))

    return SourceBatch(
        images=SourceBoxes(
            tuple(torch.from_numpy(np.ascontiguousarray(source.image)) for source in sources),
            tuple(source.params for source in sources),
        ),
        instances=tuple(tensor(source.instances) for source in sources),
        drawn=tuple(tensor(source.drawn) for source in sources),
        objects=tuple(source.objects for source in sources),
    )
