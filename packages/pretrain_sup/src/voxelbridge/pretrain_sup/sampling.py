"""Which data set, case, head and patch a sample of multi-data-set training is.

MultiTalent's rules (arXiv 2303.14444): a data set of n cases is drawn with probability ~ sqrt(n), a
third of the patches lie on a target. Label ids are those of the data set's own maps throughout: a
head that is one part of a data set finds its targets under the same numbers as any other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from voxelbridge.core.config import Config
from voxelbridge.core.data.augment import SpatialParams
from voxelbridge.core.data.case_index import CaseRecord
from voxelbridge.core.data.case_order import CaseOrder, weighted_strata
from voxelbridge.core.data.case_store import CaseStore
from voxelbridge.core.data.patches import Start, centred_start, uniform_start
from voxelbridge.core.data.patient_split import split_cases
from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.pretrain_sup.dataset_labels import Target
from voxelbridge.pretrain_sup.label_space import Head, LabelSpace

Fraction = Annotated[float, Field(ge=0, le=1)]
Factor = Annotated[float, Field(ge=0)]


class Sampling(Config):
    """How often which data set is drawn, and how often a patch lies on a target.

    The share of a data set is its factor in `dataset_weights` (1 where not named, 0 leaves it out)
    times its number of cases to the power of `dataset_exponent`: 0.5 is MultiTalent's rule, 1 draws
    all cases alike, 0 all data sets. With exponent 0 the factors are the shares themselves.
    """

    dataset_exponent: Fraction = 0.5
    dataset_weights: dict[str, Factor] = Field(default_factory=dict)
    foreground_probability: Fraction = 0.33  # of each sample on its own


@dataclass(frozen=True)
class Place:
    """Where a patch is cut; `target` is the one it was placed on, None for a patch anywhere."""

    start: Start
    target: Target | None
    voxel: tuple[int, int, int] | None  # of `target`, in the stored grid


def dataset_of(record: CaseRecord) -> str:
    """The data set of a case. DataError where the store was not prepared for several data sets."""
    if record.provenance.dataset is None:
        raise DataError(
            f"case {record.case_id}: its data set is not known; prepare the store with "
            "`vb-sup prepare`"
        )
    return record.provenance.dataset


def case_order(
    store: CaseStore, case_ids: Sequence[str], sampling: Sampling, *, seed: int
) -> CaseOrder:
    """The order in which a training draws `case_ids`: data sets by their shares, cases in turn."""
    members: dict[str, list[str]] = {}
    for case_id in sorted(case_ids):
        members.setdefault(dataset_of(store.record(case_id)), []).append(case_id)
    try:
        strata = weighted_strata(
            {name: tuple((case_id,) for case_id in cases) for name, cases in members.items()},
            exponent=sampling.dataset_exponent,
            weights=sampling.dataset_weights,
        )
    except ConfigError as error:
        raise ConfigError(f"sampling.dataset_{error}") from None
    return CaseOrder(strata, seed=seed)


def split_datasets(store: CaseStore, *, seed: int) -> tuple[list[str], list[str]]:
    """Training and validation cases of the store, both sorted; each data set is split on its own.

    Of a data set's patients one in 20 validates with all cases, at least one and at most 50, drawn
    by `seed`; where there are fewer than 10 patients none does.
    """
    patients: dict[str, dict[str, str]] = {}
    for record in store.cases:
        # Names of patients need only be unique within their data set.
        of_dataset = patients.setdefault(dataset_of(record), {})
        of_dataset[record.case_id] = record.provenance.patient or record.case_id
    splits = [split_cases(of_dataset, seed=seed) for of_dataset in patients.values()]
    training = sorted(case for split in splits for case in split[0])
    return training, sorted(case for split in splits for case in split[1])


def choose_head(rng: np.random.Generator, space: LabelSpace, dataset: str) -> Head:
    """The head that a sample trains: of a data set in several parts each is as likely."""
    heads = space.heads_of(dataset)
    return heads[int(rng.integers(len(heads)))]


def choose_voxel(
    rng: np.random.Generator, head: Head, locations: Mapping[int, NDArray[np.int32]]
) -> tuple[Target, NDArray[np.int32]] | None:
    """A target of `head` that a case has, each as likely, and a voxel (3,) of it; None without any.

    `locations` are the case's voxels (N, 3) by label id. Of a target with several ids each that the
    case has is as likely, then each of its voxels.
    """
    present = [
        (target, ids)
        for target in head.targets
        if (ids := [number for number in target.ids if len(locations.get(number, ()))])
    ]
    if not present:
        return None
    target, ids = present[int(rng.integers(len(present)))]
    voxels = locations[ids[int(rng.integers(len(ids)))]]
    return target, voxels[int(rng.integers(len(voxels)))]


def choose_place(
    rng: np.random.Generator,
    store: CaseStore,
    case_id: str,
    head: Head,
    params: SpatialParams,
    *,
    foreground_probability: float,
) -> Place:
    """Where to cut a patch of a case for `head`.

    With `foreground_probability` the patch is centred on a voxel of a target that the case has;
    otherwise, and where the case has none, it is uniform over the volume. It never leaves a volume
    that is larger than it (nnU-Net's may, at the upper bound alone), except as far as a rotated or
    magnified patch must to still show the voxel.
    """
    shape = store.record(case_id).shape[1:]
    if rng.random() < foreground_probability:
        chosen = choose_voxel(rng, head, store.read_locations(case_id))
        if chosen is not None:
            target, voxel = chosen
            start = centred_start(voxel, shape, params.patch_size)
            start = params.keep_inside(start, np.concatenate([voxel, voxel + 1]))
            z, y, x = (int(index) for index in voxel)
            return Place(start, target, (z, y, x))
    return Place(uniform_start(rng, shape, params.patch_size), None, None)
