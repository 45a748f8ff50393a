"""Which cases of two collections show the same scan: content hashes, origin ids, patients.

Weights that were pre-trained on a scan must not be measured on it. Nothing here reads an image:
hashes and origins come from what the stores' indexes keep (`core.data.provenance`). Data sets that
are known to share scans (`core.data.known_overlaps`) are named even where no case shows it.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from voxelbridge.core.data.case_index import INDEX_NAME, read_index
from voxelbridge.core.data.known_overlaps import KnownOverlap, read_known_overlaps
from voxelbridge.core.data.provenance import Provenance

SCHEMA = 1  # of the JSON output
# Spaces of origin ids whose names are unique by themselves, so that they do not tell a data set.
GLOBAL_SPACES = frozenset({"dicom"})

Reason = Literal["image", "origin", "patient"]
Key = tuple[Reason, str]


@dataclass(frozen=True)
class Overlap:
    """Two cases that show the same scan or patient, and how that is known."""

    first: str
    second: str
    reasons: tuple[Reason, ...]


@dataclass(frozen=True)
class StoreOverlap:
    """What two case stores share, and how much of them could be compared."""

    overlaps: tuple[Overlap, ...]
    num_cases: tuple[int, int]
    without_provenance: tuple[int, int]  # cases with neither an origin id nor a content hash
    known: tuple[KnownOverlap, ...] = ()  # of the data sets, whatever their cases show

    def as_json(self, first: Path, second: Path) -> dict[str, Any]:
        """What `vb-core overlap --json` prints."""
        return {
            "schema": SCHEMA,
            "stores": [str(first), str(second)],
            "num_cases": list(self.num_cases),
            "without_provenance": list(self.without_provenance),
            "overlaps": [
                {"a": pair.first, "b": pair.second, "reasons": list(pair.reasons)}
                for pair in self.overlaps
            ],
            "known_overlaps": [known.model_dump(mode="json") for known in self.known],
        }

    def lines(self, first: Path, second: Path) -> Iterator[str]:
        """The table and what it rests on, as plain lines."""
        width = max((len(pair.first) for pair in self.overlaps), default=0)
        for pair in self.overlaps:
            yield f"{pair.first:<{width}}  {pair.second}  (same {', '.join(pair.reasons)})"
        for store, total, unknown in zip(
            (first, second), self.num_cases, self.without_provenance, strict=True
        ):
            note = f", {unknown} without provenance that cannot be compared" if unknown else ""
            yield f"{store}: {total} cases{note}"
        if self.known:
            list_of_all = read_known_overlaps()
            yield from (f"warning: {list_of_all.describe(known)}" for known in self.known)
        yield f"{len(self.overlaps)} overlapping pairs"


def origin_key(origin_id: str) -> str:
    """An origin id without what follows "#": the b-values of one DICOM series are one scan."""
    return origin_id.partition("#")[0]


def provenance_keys(provenance: Provenance) -> set[Key]:
    """What two cases of different data sets must not have in common.

    A patient's name counts only together with the data set that gave it, which the spaces of the
    origin ids tell; without an origin id it cannot be compared.
    """
    origins = {origin_key(name) for name in provenance.origin_ids}
    keys: set[Key] = {("image", digest) for digest in provenance.content_sha256}
    keys |= {("origin", origin) for origin in origins}
    if provenance.patient is not None:
        spaces = _spaces(provenance)
        keys |= {("patient", f"{space}:{provenance.patient}") for space in spaces}
    return keys


def dataset_names(provenances: Iterable[Provenance]) -> set[str]:
    """The names of the data sets that cases come from, as stores and origin ids give them."""
    names: set[str] = set()
    for provenance in provenances:
        names |= _spaces(provenance)
        if provenance.dataset is not None:
            names.add(provenance.dataset)
    return names


def find_overlaps(
    first: Mapping[str, Provenance], second: Mapping[str, Provenance]
) -> list[Overlap]:
    """Every pair of a case of `first` and a case of `second` (case id -> provenance) that agree.

    Sorted by case ids; an equal hash of any channel counts. Takes time proportional to the cases.
    """
    holders: dict[Key, list[str]] = {}
    for case_id, provenance in second.items():
        for key in provenance_keys(provenance):
            holders.setdefault(key, []).append(case_id)
    found: dict[tuple[str, str], set[Reason]] = {}
    for case_id, provenance in first.items():
        for key in provenance_keys(provenance):
            for other in holders.get(key, ()):
                found.setdefault((case_id, other), set()).add(key[0])
    return [Overlap(a, b, tuple(sorted(reasons))) for (a, b), reasons in sorted(found.items())]


def read_provenances(store: Path) -> dict[str, Provenance]:
    """The provenance of every case of a case store, from its index alone. Raises DataError."""
    cases, _ = read_index(store / INDEX_NAME)
    return {record.case_id: record.provenance for record in cases}


def compare_stores(first: Path, second: Path) -> StoreOverlap:
    """What two case stores have in common. Raises DataError for a folder that is no store."""
    a, b = read_provenances(first), read_provenances(second)
    return StoreOverlap(
        tuple(find_overlaps(a, b)),
        (len(a), len(b)),
        (num_unknown(a), num_unknown(b)),
        read_known_overlaps().between(
            {first.resolve().name, *dataset_names(a.values())},
            {second.resolve().name, *dataset_names(b.values())},
        ),
    )


def num_unknown(provenances: Mapping[str, Provenance]) -> int:
    """How many cases cannot be compared, having neither an origin id nor a content hash."""
    return sum(not p.origin_ids and not p.content_sha256 for p in provenances.values())


def _spaces(provenance: Provenance) -> set[str]:
    names = provenance.origin_ids
    return {name.partition(":")[0] for name in names if ":" in name} - GLOBAL_SPACES
