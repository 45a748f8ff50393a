"""Training patches of many data sets: ragged in channels, labels with their original ids."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from voxelbridge.core.data.augment import SpatialAugmentation
from voxelbridge.core.data.case_order import CaseOrder
from voxelbridge.core.data.case_store import CaseStore
from voxelbridge.core.errors import DataError
from voxelbridge.core.train.settings import PatchSize
from voxelbridge.pretrain_sup.dataset_labels import PADDING
from voxelbridge.pretrain_sup.label_space import LabelSpace
from voxelbridge.pretrain_sup.sampling import (
    Sampling,
    case_order,
    choose_head,
    choose_place,
    dataset_of,
)

_SAMPLE_STREAM, _VALIDATION_STREAM = 4, 3  # random streams of a seed


class SegmentationBatch(TypedDict):
    """The samples of one forward pass; every list has one entry per sample."""

    images: list[Tensor]  # (C_d, D, H, W) float32, 0 outside the volume
    segmentations: list[Tensor]  # (D, H, W) int32, the data set's own label ids, -1 outside
    datasets: list[str]
    heads: list[str]
    cases: list[str]


@dataclass(frozen=True, eq=False)
class MultiDatasetSampler:
    """Makes the patches of a training's forward pass `pass_number`, of this rank.

    Sample number (pass_number * ranks + rank) * num_patches + i of the whole job has a case from
    `order` and a random stream of its own, so that several ranks draw together exactly the batch
    that one process would.
    """

    store: CaseStore
    space: LabelSpace
    order: CaseOrder
    patch_size: PatchSize
    num_patches: int  # in one pass of one rank
    foreground_probability: float
    augmentation: SpatialAugmentation
    seed: int
    rank: int = 0
    ranks: int = 1

    @classmethod
    def build(
        cls,
        store: CaseStore,
        space: LabelSpace,
        case_ids: Sequence[str],
        *,
        patch_size: PatchSize,
        num_patches: int,
        seed: int,
        sampling: Sampling | None = None,
        augmentation: SpatialAugmentation | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> "MultiDatasetSampler":
        """A sampler of `case_ids`; None: MultiTalent's sampling, nnU-Net's augmentation.

        Raises DataError where the store does not fit the label space.
        """
        sampling = sampling or Sampling()
        check_store(store, space, case_ids)
        return cls(
            store,
            space,
            case_order(store, case_ids, sampling, seed=seed),
            patch_size,
            num_patches,
            sampling.foreground_probability,
            SpatialAugmentation() if augmentation is None else augmentation,
            seed,
            rank,
            ranks,
        )

    def __call__(
        self, pass_number: int, _rng: np.random.Generator | None = None
    ) -> SegmentationBatch:
        """The pass's samples; all randomness comes from their own streams."""
        first = (pass_number * self.ranks + self.rank) * self.num_patches
        return self._batch(range(first, first + self.num_patches), _SAMPLE_STREAM)

    def for_validation(self, case_ids: Sequence[str]) -> "MultiDatasetSampler":
        """The sampler of validation cases: patches as they are, every data set as often."""
        sampling = Sampling(dataset_exponent=0.0)
        order = case_order(self.store, case_ids, sampling, seed=self.seed)
        return replace(self, order=order, augmentation=SpatialAugmentation.none())

    def validation_batch(self, index: int) -> SegmentationBatch:
        """Validation patch `index`, a batch of one: the same patch and head at every call."""
        return self._batch([index], _VALIDATION_STREAM)

    def _batch(self, samples: Sequence[int], stream: int) -> SegmentationBatch:
        batch = SegmentationBatch(images=[], segmentations=[], datasets=[], heads=[], cases=[])
        for sample in samples:
            rng = np.random.default_rng(np.random.SeedSequence((self.seed, stream, sample)))
            self._add(batch, self.order.case(sample), rng)
        return batch

    def _add(self, batch: SegmentationBatch, case_id: str, rng: np.random.Generator) -> None:
        dataset = dataset_of(self.store.record(case_id))
        head = choose_head(rng, self.space, dataset)
        params = self.augmentation.sample(rng, self.patch_size)
        place = choose_place(
            rng,
            self.store,
            case_id,
            head,
            params,
            foreground_probability=self.foreground_probability,
        )
        first, size = params.source_box(place.start)
        image = params.apply_image(self.store.read_patch(case_id, first, size, pad_value=0.0))
        stored = self.store.read_segmentation_patch(case_id, first, size, pad_value=PADDING)
        segmentation = params.apply_labels(stored)
        batch["images"].append(torch.from_numpy(np.ascontiguousarray(image)))
        batch["segmentations"].append(torch.from_numpy(np.ascontiguousarray(segmentation)))
        batch["datasets"].append(dataset)
        batch["heads"].append(head.name)
        batch["cases"].append(case_id)


def check_store(store: CaseStore, space: LabelSpace, case_ids: Sequence[str]) -> None:
    """DataError unless the label space knows every case's data set, with as many channels."""
    for case_id in case_ids:
        record = store.record(case_id)
        labels = space.dataset(dataset_of(record))
        if record.shape[0] != len(labels.channels):
            raise DataError(
                f"{store.root}: case {case_id} has {record.shape[0]} channels, data set "
                f"{labels.name} has {len(labels.channels)} ({', '.join(labels.channels)}); "
                "prepare it again"
            )
        if "segmentation" not in record.files or "locations" not in record.files:
            raise DataError(f"{store.root}: case {case_id} has no labels; prepare it again")
