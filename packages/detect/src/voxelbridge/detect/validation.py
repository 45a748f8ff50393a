"""Validation during a training: fixed patches of the held-out cases, and some of the cases whole.

Patches: `validation_batches` batches, drawn without augmentation from the seed alone, so they are
the same at every validation, for any number of ranks and workers. Losses are means over the
batches (`val_<name>`); the mean average precision counts each patch as an image (`val_map_0.10`,
`val_map_range` over IoU 0.10:0.50:0.05).
Whole cases: at most `validation_cases`, spread over the sorted case ids, predicted as
`vb-detect predict` does without mirroring, in the stored grid (`val_case_map_0.10`,
`val_case_map_range`, `val_case_froc_0.10`: the mean sensitivity of the FROC). A case that cannot be
predicted is reported and left out (`val_case_failed` counts them).
A figure that does not exist (no annotated object) is left out. Both are due every so many steps
and after the last one. Every rank takes a share; the result is that of one process.
Shapes: see `core.data.patches`; B patches of a batch.
"""

import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from voxelbridge.core.data.augment import SpatialAugmentation
from voxelbridge.core.data.batches import step_batches
from voxelbridge.core.data.case_store import CaseStore
from voxelbridge.core.train.distributed import World
from voxelbridge.core.train.schedule import due
from voxelbridge.core.train.settings import patches_per_pass
from voxelbridge.core.train.steps import autocast, move, step_seed
from voxelbridge.detect.batches import DetectionBatch, PatchSampler, case_objects
from voxelbridge.detect.config import DetectConfig
from voxelbridge.detect.detections import Detections
from voxelbridge.detect.evaluate.measures import RANGE_KEY, Measures
from voxelbridge.detect.evaluate.metrics import compute_metrics
from voxelbridge.detect.evaluate.tables import BoxTable
from voxelbridge.detect.objective import Objective
from voxelbridge.detect.predict import detect_in_patches, predict_volume

Kind = Literal["patches", "cases"]

MEASURES = Measures(ap=(0.1,), froc=(0.1,), sizes=None)
VALIDATION_STREAM = 7  # keeps validation patches apart from training patches


@dataclass(frozen=True, eq=False)
class Image:
    """What was annotated and what was found in one patch or case; plain arrays, to be sent."""

    boxes: NDArray[np.float32]  # (N, 6)
    labels: NDArray[np.int64]  # (N,)
    found_boxes: NDArray[np.float32]  # (M, 6)
    found_scores: NDArray[np.float32]  # (M,)
    found_labels: NDArray[np.int64]  # (M,)


@dataclass(frozen=True, eq=False)
class Validation:
    """What a training is validated on; every rank holds the same and calls `measure` together."""

    store: CaseStore
    case_ids: Sequence[str]  # of the held-out fold
    config: DetectConfig
    num_classes: int
    world: World

    def due(self, step: int, *, steps: int) -> frozenset[Kind]:
        """What is to be validated after `step` (from 0) of a run of `steps` steps."""
        wanted: dict[Kind, int] = {}  # kind -> every so many steps
        if self.case_ids and self.config.validation_batches:
            wanted["patches"] = self.config.validate_every_steps
        if self.case_ids and self.config.validate_cases_every_steps:
            wanted["cases"] = self.config.validate_cases_every_steps
        is_last = step + 1 == steps
        return frozenset(kind for kind, every in wanted.items() if is_last or due(every, step))

    def measure(self, objective: Objective, kinds: Collection[Kind]) -> dict[str, float]:
        """The figures of patches, cases or both by their names in the record; equal on all ranks.

        Modes, buffers and random streams are afterwards what they were.
        """
        values: dict[str, float] = {}
        with _undisturbed(objective, self.world):
            if "patches" in kinds:
                values |= self._measure_patches(objective)
            if "cases" in kinds:
                values |= self._measure_cases(objective)
        if self.world.is_main:
            values = _finite(values)
        return self.world.gather(values)[0]

    @cached_property
    def whole_cases(self) -> list[str]:
        """The cases that are predicted whole: evenly spread over the sorted ids."""
        names = sorted(self.case_ids)
        count = min(self.config.validation_cases, len(names))
        return [names[(2 * index + 1) * len(names) // (2 * count)] for index in range(count)]

    @cached_property
    def deciding(self) -> tuple[str, ...]:
        """The figures that say which weights are best; the first of them that exists counts.

        They exist at every validation of their kind or at none: patches and cases stay the same.
        """
        if self.config.best_metric != "auto":
            return (self.config.best_metric,)
        annotated = any(len(self.store.record(name).boxes) for name in self.whole_cases)
        if self.config.validate_cases_every_steps and annotated:
            return ("val_case_map_range",)
        return ("val_map_range", "val_total")

    @cached_property
    def _sampler(self) -> PatchSampler:
        return PatchSampler(
            store=self.store,
            cases=case_objects(self.store, self.case_ids),
            patch_size=self.config.patch_size,
            batch_size=patches_per_pass(self.config, ranks=1),
            object_fraction=self.config.object_fraction,
            augmentation=SpatialAugmentation.none(),
            box_masks=self.config.box_masks,
        )

    def _measure_patches(self, objective: Objective) -> dict[str, float]:
        count = self.config.validation_batches
        own = {
            index: self._measure_batch(objective, index)
            for index in range(self.world.rank, count, self.world.size)
        }
        every = {index: part for parts in self.world.gather(own) for index, part in parts.items()}
        batches = [every[index] for index in range(count)]  # sums in one order for any ranks
        losses = {
            f"val_{name}": sum(batch[name] for batch, _ in batches) / count
            for name in batches[0][0]
        }
        images = [image for _, found in batches for image in found]
        figures = self._figures(images) if self.world.is_main else {}
        return losses | {f"val_{name}": figures[name] for name in figures if "map" in name}

    def _measure_batch(
        self, objective: Objective, index: int
    ) -> tuple[dict[str, float], list[Image]]:
        """Losses of one batch of patches, and what was found in each of them."""
        batch = self.batch(index)
        seed = self.config.seed + VALIDATION_STREAM
        torch.manual_seed(step_seed(seed, 0, index))  # whatever a forward pass may draw
        moved: DetectionBatch = move(batch, self.world.device)
        with autocast(self.world.device, self.config.precision):
            losses = objective(moved)
            found = detect_in_patches(objective.detector, moved.image, self.config.post_processing)
        values = torch.stack([loss.float() for loss in losses.values()]).tolist()
        images = [
            _image(target.boxes.numpy(), target.labels.numpy(), detections)
            for target, detections in zip(batch.targets, found, strict=True)
        ]
        return dict(zip(losses, values, strict=True)), images

    def batch(self, index: int) -> DetectionBatch:
        """The validation patches of one batch, on the CPU; the same whenever it is asked for."""
        # One batch in memory at a time, made here: a loader forked next to a running training
        # would take its memory and its threads along.
        batch = next(
            step_batches(
                self._sampler,
                seed=self.config.seed + VALIDATION_STREAM,
                first_step=index,
                steps=index + 1,
                workers=0,
            )
        )
        assert isinstance(batch, DetectionBatch)  # nothing is left to do on the device
        return batch

    def _measure_cases(self, objective: Objective) -> dict[str, float]:
        images: list[Image] = []
        failures: list[str] = []
        # Ranks meet after each case, so that none waits longer than one case takes.
        for first in range(0, len(self.whole_cases), self.world.size):
            own = self._measure_case(objective, first + self.world.rank)
            for outcome in self.world.gather(own):
                match outcome:
                    case Image():
                        images.append(outcome)
                    case str():
                        failures.append(outcome)
                    case None:
                        pass
        if not self.world.is_main:
            return {}
        for line in failures:
            print(f"validation: {line}; the case is left out", file=sys.stderr, flush=True)
        figures = self._figures(images) if images else {}
        failed = {"val_case_failed": float(len(failures))} if failures else {}
        return {f"val_case_{name}": value for name, value in figures.items()} | failed

    def _measure_case(self, objective: Objective, index: int) -> Image | str | None:
        """What was found in a whole case, the reason why it failed, or None beyond the last."""
        if index >= len(self.whole_cases):
            return None
        name = self.whole_cases[index]
        try:
            record = self.store.record(name)
            found = predict_volume(
                [(objective.detector, self.config)],
                self.store.read_image(name),
                device=self.world.device,
                num_mirrorings=1,
            )
            return _image(record.boxes, record.labels, found)
        except Exception as error:  # days of training are worth more than one figure; it is told
            reason = str(error).strip().splitlines() or [""]
            return f"{name}: {type(error).__name__}: {reason[0]}"

    def _figures(self, images: Sequence[Image]) -> dict[str, float]:
        metrics = compute_metrics(
            [str(index) for index in range(len(images))],
            BoxTable.from_cases([i.boxes for i in images], [i.labels for i in images]),
            BoxTable.from_cases(
                [image.found_boxes for image in images],
                [image.found_labels for image in images],
                scores=[image.found_scores for image in images],
            ),
            num_classes=self.num_classes,
            measures=MEASURES,
        )
        figures = {
            "map_0.10": metrics["ap"]["0.10"]["map"],
            "map_range": metrics["ap"][RANGE_KEY]["map"],
            "froc_0.10": metrics["froc"]["0.10"]["pooled"]["mean"],
        }
        return {name: value for name, value in figures.items() if value is not None}


def _finite(values: dict[str, float]) -> dict[str, float]:
    unusable = [name for name, value in values.items() if not np.isfinite(value)]
    if unusable:
        print(f"validation: not finite and left out: {', '.join(unusable)}", file=sys.stderr)
    return {name: value for name, value in values.items() if name not in unusable}


def _image(boxes: NDArray[np.float32], labels: NDArray[np.int64], detections: Detections) -> Image:
    on_cpu = detections.to("cpu")
    return Image(
        boxes=boxes,
        labels=labels,
        found_boxes=on_cpu.boxes.numpy(),
        found_scores=on_cpu.scores.numpy(),
        found_labels=on_cpu.labels.numpy(),
    )


@contextmanager
def _undisturbed(objective: nn.Module, world: World) -> Iterator[None]:
    """Inference inside the block, with the buffers of rank 0 on every rank; nothing stays of it.

    Ranks differ in their buffers between two steps (each has counted its own positive anchors).
    """
    modes = [(module, module.training) for module in objective.modules()]
    buffers = dict(objective.named_buffers())
    before = {name: buffer.detach().cpu().clone() for name, buffer in buffers.items()}
    common = world.gather(before)[0]
    devices = [world.device] if world.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        try:
            _fill(buffers, common)
            objective.eval()
            yield
        finally:
            _fill(buffers, before)
            for module, training in modes:
                module.training = training


def _fill(buffers: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> None:
    for name, buffer in buffers.items():
        buffer.copy_(values[name])
