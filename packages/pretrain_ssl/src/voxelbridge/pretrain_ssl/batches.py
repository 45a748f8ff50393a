"""Patches of a case store as a method wants to see them, and which cases are for validation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from voxelbridge.core.data.case_store import CaseStore
from voxelbridge.core.data.patches import uniform_start
from voxelbridge.core.errors import DataError
from voxelbridge.core.train.settings import PatchSize
from voxelbridge.pretrain_ssl.method import Method

MIN_PATIENTS_TO_SPLIT = 10  # fewer patients all train
PATIENTS_PER_VALIDATION_PATIENT = 20
MAX_VALIDATION_PATIENTS = 50
_SPLIT_STREAM = 2  # keep the random streams of split and validation apart from training's
_VALIDATION_STREAM = 3


@dataclass(frozen=True, eq=False)
class PatchSampler:
    """Makes the batch of a step: cases uniform with replacement, positions uniform, 0 outside.

    Patches are mirrored along each axis with probability 0.5 where `mirror` is set.
    """

    store: CaseStore
    case_ids: Sequence[str]
    patch_size: PatchSize
    num_patches: int
    method: Method
    mirror: bool = True

    def __call__(self, step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        """Views of `num_patches` patches, stacked: every value (B, ...)."""
        del step  # everything random comes from rng
        return stack_views([self._view(rng) for _ in range(self.num_patches)])

    def _view(self, rng: np.random.Generator) -> Mapping[str, NDArray[Any]]:
        case_id = self.case_ids[int(rng.integers(len(self.case_ids)))]
        start = uniform_start(rng, self.store.record(case_id).shape[1:], self.patch_size)
        patch = self.store.read_patch(case_id, start, self.patch_size, pad_value=0.0)
        if self.mirror:
            patch = mirror(patch, rng)
        return self.method.views(np.ascontiguousarray(patch), rng)


def validation_sampler(training: PatchSampler, case_ids: Sequence[str]) -> PatchSampler:
    """One patch per batch from the validation cases, as they are."""
    return PatchSampler(
        training.store, case_ids, training.patch_size, 1, training.method, mirror=False
    )


def validation_batch(sampler: PatchSampler, index: int, *, seed: int) -> dict[str, Tensor]:
    """Validation batch `index`: the same patch and mask at every call."""
    rng = np.random.default_rng(np.random.SeedSequence((seed, _VALIDATION_STREAM, index)))
    return sampler(index, rng)


def split_cases(patients: Mapping[str, str], *, seed: int) -> tuple[list[str], list[str]]:
    """Training and validation cases, both sorted, from the patient of each case.

    One patient in 20 validates with all cases, at least one and at most 50, drawn by `seed` from
    the sorted names; with fewer than 10 patients none does.
    """
    names = sorted(set(patients.values()))
    if len(names) < MIN_PATIENTS_TO_SPLIT:
        return sorted(patients), []
    count = min(MAX_VALIDATION_PATIENTS, max(1, len(names) // PATIENTS_PER_VALIDATION_PATIENT))
    rng = np.random.default_rng(np.random.SeedSequence((seed, _SPLIT_STREAM)))
    chosen = {names[index] for index in rng.permutation(len(names))[:count]}
    training = sorted(case for case, patient in patients.items() if patient not in chosen)
    return training, sorted(case for case, patient in patients.items() if patient in chosen)


def patients_of(store: CaseStore) -> dict[str, str]:
    """The patient of each case of a store; a case whose patient is not known is its own."""
    return {record.case_id: record.provenance.patient or record.case_id for record in store.cases}


def channel_count(store: CaseStore) -> int:
    """Channels of the store's images; DataError unless all cases have the same number."""
    if not store.cases:
        raise DataError(f"{store.root}: the store has no case; prepare some images first")
    first = store.cases[0]
    for record in store.cases:
        if record.shape[0] != first.shape[0]:
            raise DataError(
                f"{store.root}: case {record.case_id} has {record.shape[0]} channels, case "
                f"{first.case_id} has {first.shape[0]}; all cases need the same number"
            )
    return first.shape[0]


def mirror(patch: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """A view of (C, D, H, W), flipped along each spatial axis with probability 0.5."""
    axes = tuple(axis + 1 for axis, flips in enumerate(rng.random(3) < 0.5) if flips)
    return np.flip(patch, axes)


def stack_views(views: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, Tensor]:
    """A batch of the views of several patches: each value gets a leading axis B."""
    return {name: torch.from_numpy(np.stack([view[name] for view in views])) for name in views[0]}
