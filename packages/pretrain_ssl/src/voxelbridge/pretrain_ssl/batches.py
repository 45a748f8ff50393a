"""Patches of a case store as a method wants to see them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from voxelbridge.core.data.augment import SpatialAugmentation, SpatialParams
from voxelbridge.core.data.augment_device import SourceBoxes
from voxelbridge.core.data.case_order import CaseOrder
from voxelbridge.core.data.case_store import CaseStore
from voxelbridge.core.data.patches import Start, centred_start, uniform_start
from voxelbridge.core.errors import DataError
from voxelbridge.core.train.settings import PatchSize
from voxelbridge.pretrain_ssl.failures import FAILED
from voxelbridge.pretrain_ssl.method import Method

MAX_REPLACEMENTS = 20  # cases tried in the place of one that cannot be read
OWN_REPLACEMENTS = 10  # of these from the same stratum: one small data set must not end a run
MAX_PLACES = 10  # looked at for a patch that is not empty; then the least empty one is taken
MASK_TRIES = 200  # random voxels looked up before a mask is read whole
_LOOKUPS = 16  # voxels per axis from which `empty_share` is told
_SAMPLE_STREAM, _VALIDATION_STREAM = 4, 3  # random streams of a seed

Batch = dict[str, Any]  # tensors (B, ...) by name; FAILED: pairs of case and message


class NothingReadableError(DataError):
    """None of the cases tried for a sample could be read.

    `failures` as in a batch; a loader process hands on the message alone.
    """

    def __init__(self, message: str, failures: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.failures = failures


@dataclass(frozen=True, eq=False)
class PatchSampler:
    """Makes the patches of a training's forward pass `pass_number`, of this rank.

    Sample number (pass_number * ranks + rank) * num_patches + i of the whole job has a case from
    `order` and a random stream of its own, so that several ranks draw together exactly the batch
    that one process would. A case that cannot be read is replaced by another one of its stratum,
    or of any where that has none to offer, and named in the batch.
    """

    store: CaseStore
    order: CaseOrder
    patch_size: PatchSize
    num_patches: int
    method: Method
    seed: int
    augmentation: SpatialAugmentation
    centre_mask: str | None = None
    max_empty: float = 1.0  # share of a patch's voxels that may have one and the same value
    rank: int = 0
    ranks: int = 1
    defer: bool = False  # leave turning and scaling to `on_device`, where the method allows it

    def __call__(self, pass_number: int, _rng: np.random.Generator | None = None) -> Batch:
        """Views of the pass's patches, stacked: every value (B, ...)."""
        first = (pass_number * self.ranks + self.rank) * self.num_patches
        return self._batch(range(first, first + self.num_patches), _SAMPLE_STREAM)

    def validation_batch(self, index: int) -> Batch:
        """Validation patch `index`: the same patch and views at every call."""
        return self._batch([index], _VALIDATION_STREAM)

    def for_validation(self, order: CaseOrder) -> "PatchSampler":
        """The sampler of the validation cases: patches as they are, one per batch."""
        none = SpatialAugmentation.none()
        return replace(self, order=order, augmentation=none, defer=False)

    def _batch(self, samples: Sequence[int], stream: int) -> Batch:
        failures: list[tuple[str, str]] = []
        views, cuts = [], []
        for sample in samples:
            rng = np.random.default_rng(np.random.SeedSequence((self.seed, stream, sample)))
            view, cut = self._view(sample, rng, failures)
            views.append(view)
            cuts.append(cut)
        batch = stack_views(views) | {FAILED: failures}
        if self._defers:
            batch["image"] = SourceBoxes(
                tuple(torch.from_numpy(np.ascontiguousarray(cut.source)) for cut in cuts),
                tuple(cut.params for cut in cuts),
            )
        return batch

    @property
    def _defers(self) -> bool:
        return self.defer and not self.method.reads_voxels

    def _view(
        self, sample: int, rng: np.random.Generator, failures: list[tuple[str, str]]
    ) -> tuple[Mapping[str, NDArray[Any]], "_Cut"]:
        case_id = self.order.case(sample)
        for tried in range(MAX_REPLACEMENTS):
            try:
                cut = self._cut(case_id, rng)
            except DataError as error:
                failures.append((case_id, str(error)))
                case_id = self._replacement(sample, rng, anywhere=tried >= OWN_REPLACEMENTS)
                continue
            channels = self.store.record(case_id).shape[0]
            patch = (  # deferred: the views need its shape alone
                np.broadcast_to(np.float32(0), (channels, *self.patch_size))
                if self._defers
                else np.ascontiguousarray(cut.params.apply_image(cut.source))
            )
            return self.method.views(patch, rng, masks=cut.masks), cut
        raise NothingReadableError(
            f"{len(failures)} cases in a row could not be read; the last one: {failures[-1][1]}",
            failures,
        )

    def _replacement(self, sample: int, rng: np.random.Generator, *, anywhere: bool) -> str:
        """A random case of the sample's stratum, or of any stratum by their shares."""
        strata = self.order.strata
        stratum = self.order.draw(sample)[0]
        if anywhere:
            stratum = int(rng.choice(len(strata), p=self.order.shares))
        groups = strata[stratum].groups
        group = groups[int(rng.integers(len(groups)))]
        return group[int(rng.integers(len(group)))]

    def _cut(self, case_id: str, rng: np.random.Generator) -> "_Cut":
        params = self.augmentation.sample(rng, self.patch_size)
        start, size, source = self._place(case_id, params, rng)
        masks = {
            name: np.ascontiguousarray(
                params.apply_labels(self.store.read_mask_patch(case_id, name, start, size))
                if name in self.store.record(case_id).mask_names
                else np.zeros(self.patch_size, dtype=np.uint8)
            )
            for name in self.method.used_masks
        }
        return _Cut(source, params, masks)

    def _place(
        self, case_id: str, params: SpatialParams, rng: np.random.Generator
    ) -> tuple[Start, Start, NDArray[np.float32]]:
        """Where the patch lies: first voxel and size of what it needs, and those voxels."""
        best = None
        least = np.inf
        for _ in range(MAX_PLACES):
            start, size = params.source_box(self._start(case_id, rng))
            source = self.store.read_patch(case_id, start, size, pad_value=0.0)
            if self.max_empty >= 1:
                return start, size, source
            if (share := empty_share(source)) < least:
                best, least = (start, size, source), share
            if least <= self.max_empty:
                break
        assert best is not None
        return best

    def _start(self, case_id: str, rng: np.random.Generator) -> Start:
        record = self.store.record(case_id)
        shape = record.shape[1:]
        if self.centre_mask is not None and self.centre_mask in record.mask_names:
            voxel = self._voxel_in_mask(case_id, self.centre_mask, rng)
            if voxel is not None:
                return centred_start(voxel, shape, self.patch_size)
        return uniform_start(rng, shape, self.patch_size)

    def _voxel_in_mask(
        self, case_id: str, name: str, rng: np.random.Generator
    ) -> NDArray[np.integer] | None:
        """A voxel (3,) uniform over the mask; None where the mask is empty."""
        shape = self.store.record(case_id).shape[1:]
        for _ in range(MASK_TRIES):  # most masks are large: looking up voxels reads a few blocks
            voxel = rng.integers(0, shape)
            if self.store.read_mask_patch(case_id, name, voxel.tolist(), (1, 1, 1))[0, 0, 0]:
                return voxel
        inside = np.argwhere(self.store.read_mask_patch(case_id, name, (0, 0, 0), shape))
        return inside[int(rng.integers(len(inside)))] if len(inside) else None


@dataclass(frozen=True, eq=False)
class _Cut:
    """Voxels around a patch, the transform to it, and the masks that the method uses.

    Masks (*patch_size) are transformed already; 0 where a case has none, and outside.
    """

    source: NDArray[np.float32]
    params: SpatialParams
    masks: Mapping[str, NDArray[np.uint8]]


def empty_share(voxels: NDArray[np.floating]) -> float:
    """Share of (C, D, H, W) that has the commonest value, in the channel where that is least.

    Looked up on at most 16 x 16 x 16 voxels, evenly spread.
    """
    steps = tuple(slice(None, None, -(-edge // _LOOKUPS)) for edge in voxels.shape[1:])
    shares = []
    for channel in voxels:
        few = channel[steps]
        shares.append(int(np.unique(few, return_counts=True)[1].max()) / few.size)
    return min(shares)


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches, with deferred turning and scaling done on `device`."""
    for batch in batches:
        if isinstance(image := batch["image"], SourceBoxes):
            batch["image"] = image.to(device).apply()
        yield batch


def stack_views(views: Sequence[Mapping[str, NDArray[Any]]]) -> Batch:
    """A batch of the views of several patches: each value gets a leading axis B."""
    return {name: torch.from_numpy(np.stack([view[name] for view in views])) for name in views[0]}
