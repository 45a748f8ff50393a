"""In which shares the cases of a store are drawn, and whether it fits the config."""

from collections.abc import Sequence
from typing import Annotated, Literal, assert_never

from pydantic import Field

from voxelbridge.core.config import Config
from voxelbridge.core.data.case_index import CaseRecord
from voxelbridge.core.data.case_order import CaseOrder, group_cases, weighted_strata
from voxelbridge.core.data.case_store import CaseStore
from voxelbridge.core.errors import ConfigError, DataError

UNKNOWN = "unknown"  # stratum of the cases whose source did not name one
_Factor = Annotated[float, Field(ge=0, le=1e6)]  # larger ones leave nothing to the others


class Sampling(Config):
    """How often which case is drawn; by default every image as often as any other (as nnssl).

    The share of a stratum is its factor in `weights` (1 where not named, 0 leaves it out) times its
    number of groups to the power of `exponent`: 1 draws all groups alike, 0 all strata alike.
    """

    strata: Literal["dataset", "modality", "none"] = "dataset"
    group: Literal["image", "scan", "patient"] = "image"  # what is drawn before any comes again
    exponent: Annotated[float, Field(ge=0, le=1)] = 1.0
    weights: dict[str, _Factor] = Field(default_factory=dict)
    centre_mask: str | None = None  # patches are centred in this stored mask where a case has it
    # A patch with a larger share of voxels of one single value (air that was cut out, padding) is
    # drawn at another place of the volume; 1 takes every patch, as nnssl.
    max_empty: Annotated[float, Field(gt=0, le=1)] = 1.0


def case_order(
    store: CaseStore, case_ids: Sequence[str], sampling: Sampling, *, seed: int
) -> CaseOrder:
    """The order in which a training draws `case_ids`; ConfigError for an unknown stratum."""
    members: dict[str, list[str]] = {}
    groups: dict[str, str] = {}
    for case_id in case_ids:
        record = store.record(case_id)
        members.setdefault(_stratum_of(record, sampling.strata), []).append(case_id)
        if (group := _group_of(record, sampling.group)) is not None:
            groups[case_id] = group
    try:
        strata = weighted_strata(
            {name: group_cases(cases, groups) for name, cases in members.items()},
            exponent=sampling.exponent,
            weights=sampling.weights,
        )
    except ConfigError as error:
        raise ConfigError(f"sampling.{error}") from None
    return CaseOrder(strata, seed=seed)


def check_masks(store: CaseStore, names: Sequence[str]) -> None:
    """ConfigError unless each of the masks that a config names belongs to a case of the store."""
    known = {name for record in store.cases for name in record.mask_names}
    for name in names:
        if name not in known:
            there = f"its masks are {', '.join(sorted(known))}" if known else "it has no masks"
            raise ConfigError(f"mask {name!r}: no case of {store.root} has it; {there}")


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


def _stratum_of(record: CaseRecord, kind: Literal["dataset", "modality", "none"]) -> str:
    match kind:
        case "dataset":
            return record.provenance.dataset or UNKNOWN
        case "modality":
            return record.provenance.modality or UNKNOWN
        case "none":
            return "all"
        case _:
            assert_never(kind)


def _group_of(record: CaseRecord, kind: Literal["image", "scan", "patient"]) -> str | None:
    source = record.provenance
    match kind:
        case "image":
            return None
        # Names of scans and patients need only be unique within their data set.
        case "scan":
            return f"{source.dataset}/{source.patient}/{source.scan}" if source.scan else None
        case "patient":
            return f"{source.dataset}/{source.patient}" if source.patient else None
        case _:
            assert_never(kind)
