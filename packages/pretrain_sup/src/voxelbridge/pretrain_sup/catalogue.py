"""The 65 pre-training data sets of arXiv 2509.15947, and what of them must not be measured on.

`catalogue.toml` is table 4 of the paper's appendix B with its mistakes corrected and every
correction noted. Which data sets share scans is `core.data.known_overlaps`, which the checks of
all parts read. docs/catalogue.md has the corrections and the leakage notes as a page.
"""

import difflib
import re
import tomllib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, StringConstraints, model_validator

from voxelbridge.core.config import Config, validate
from voxelbridge.core.data.known_overlaps import (
    KnownDataset,
    KnownOverlap,
    KnownOverlaps,
    read_known_overlaps,
)
from voxelbridge.core.errors import ConfigError

FILE_NAME = "catalogue.toml"
PACKAGE = "voxelbridge.pretrain_sup"
SCHEMA = 1
UNKNOWN = "unknown"

ModalityName = Literal["CT", "CTA", "CBCT", "MRI", "MRA", "PET"]
CorrectedField = Literal["name", "images", "modality", "targets", "links"]
Link = Annotated[str, StringConstraints(pattern=r"^https://[^\s/]+\.[^\s/]+(/\S*)?$")]
Slug = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]


class Correction(Config):
    """A cell of the table that is wrong."""

    field: CorrectedField
    printed: str  # as in the table, links with https
    right: str
    why: str
    # table: follows from the table itself; public: a public page or file says so; memory: known
    # in the field, not looked up.
    basis: Literal["table", "public", "memory"]


class CatalogueEntry(Config):
    """A data set: one row of the table. Values are the right ones, see `corrections`."""

    row: PositiveInt  # in the table, from 1
    id: Slug  # as in `core.data.known_overlaps`
    name: str
    images: PositiveInt  # that the paper trained on
    modality: tuple[ModalityName, ...]
    channels: tuple[str, ...] | None = None  # of one image, in no stated order; None: not known
    targets: str
    links: tuple[Link, ...]
    licence: str | None = None  # None: not known
    note: str | None = None
    corrections: tuple[Correction, ...] = ()

    def cell(self, field: CorrectedField) -> str:
        """A value as text, in the table's form."""
        match field:
            case "name" | "targets":
                return str(getattr(self, field))
            case "images":
                return str(self.images)
            case "modality" | "links":
                return ", ".join(getattr(self, field))

    def printed(self, field: CorrectedField) -> str:
        """What the table prints, right or wrong."""
        wrong = [correction.printed for correction in self.corrections if correction.field == field]
        return wrong[0] if wrong else self.cell(field)

    @model_validator(mode="after")
    def _corrections_lead_to_the_values(self) -> Self:
        for correction in self.corrections:
            cell = self.cell(correction.field)
            if correction.right != cell or correction.printed == cell:
                raise ValueError(
                    f"{self.id}: correction of {correction.field} from {correction.printed!r} to "
                    f"{correction.right!r}, but the value is {cell!r}"
                )
        if max(Counter(c.field for c in self.corrections).values(), default=0) > 1:
            raise ValueError(f"{self.id}: a field is corrected twice")
        return self


class TableFinding(Config):
    """Something about the table or the paper's text that is no single cell."""

    what: str
    printed: str
    found: str
    why: str


class Catalogue(Config):
    """All rows, and what does not fit between them and what the paper says about them."""

    schema_version: Literal[1] = Field(default=SCHEMA, alias="schema")
    source: str
    printed_datasets: PositiveInt
    printed_images: PositiveInt
    findings: tuple[TableFinding, ...]
    datasets: tuple[CatalogueEntry, ...]

    @property
    def num_images(self) -> int:
        return sum(entry.images for entry in self.datasets)

    def find(self, name: str) -> CatalogueEntry | None:
        """The entry of this id or name; case and punctuation do not count."""
        wanted = _squashed(name)
        for entry in self.datasets:
            if wanted in (_squashed(entry.id), _squashed(entry.name)):
                return entry
        return None

    @model_validator(mode="after")
    def _rows_are_in_order_and_ids_are_unique(self) -> Self:
        if [entry.row for entry in self.datasets] != list(range(1, len(self.datasets) + 1)):
            raise ValueError("rows are not numbered 1, 2, 3 ... in order")
        for names in ([e.id for e in self.datasets], [_squashed(e.name) for e in self.datasets]):
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise ValueError(f"listed twice: {', '.join(twice)}")
        return self


@dataclass(frozen=True)
class Conflict:
    """A data set that must not, or perhaps not, be learned from before measuring on another."""

    dataset: str  # id of the data set for pre-training
    detection: str  # D01 to D08
    certainty: Literal["same", "known", "possible"]
    reason: str
    exclude: str | None


def read_catalogue() -> Catalogue:
    """The catalogue that is shipped. Raises ConfigError where it was edited into nonsense."""
    text = (resources.files(PACKAGE) / FILE_NAME).read_text(encoding="utf-8")
    return validate(Catalogue, tomllib.loads(text), where=FILE_NAME)


def conflicts(pretraining: Iterable[str], detection: str) -> list[Conflict]:
    """What speaks against measuring on `detection` after pre-training on `pretraining`.

    `pretraining`: ids, names or folder names (Dataset009_Spleen); `detection`: D01 to D08 or the
    data set's name. An empty list says that no overlap is known, not that there is none. Raises
    ConfigError for a name that is neither in the catalogue nor in the list of known overlaps.
    """
    catalogue, known = read_catalogue(), read_known_overlaps()
    measured = detection_dataset(detection, known)
    slugs = {name: _slug(name, catalogue, known) for name in pretraining}
    found: list[Conflict] = []
    for slug in dict.fromkeys(slugs.values()):
        found += _conflicts_of(slug, measured, known)
    return found


def overlaps_of(entry: CatalogueEntry, known: KnownOverlaps) -> tuple[KnownOverlap, ...]:
    """Every data set that shows scans of `entry` too, also others of the catalogue."""
    return known.of(entry.id)


def detection_dataset(name: str, known: KnownOverlaps) -> KnownDataset:
    """D01 to D08 by number or name; ConfigError lists them."""
    found = known.detection(name)
    slug = known.slug(name)
    if found is None and slug is not None and known.dataset(slug).detection:
        found = known.dataset(slug)
    if found is None:
        legal = [f"{d.detection} ({d.slug})" for d in known.datasets if d.detection]
        raise ConfigError(f"{name}: no detection data set; there are {', '.join(legal)}")
    return found


def leakage_notes(names: Iterable[str]) -> list[str]:
    """A line for every detection data set that data sets of these names spoil; others say none."""
    known = read_known_overlaps()
    measured = [dataset for dataset in known.datasets if dataset.detection]
    notes = []
    for name in names:
        slug = known.slug(name)
        if slug is None:
            continue
        for dataset in measured:
            for conflict in _conflicts_of(slug, dataset, known):
                what = "may hold" if conflict.certainty == "possible" else "holds"
                advice = f"; leave out: {conflict.exclude}" if conflict.exclude else ""
                notes.append(
                    f"{name} {what} scans of {conflict.detection} ({dataset.name}): "
                    f"{conflict.reason}{advice}"
                )
    return notes


def entry_json(entry: CatalogueEntry, known: KnownOverlaps) -> dict[str, Any]:
    """One data set as `vb-sup catalogue --json` prints it."""
    facts = entry.model_dump(mode="json")
    facts["licence"] = entry.licence or UNKNOWN
    facts["num_channels"] = None if entry.channels is None else len(entry.channels)
    facts["overlaps"] = []
    for overlap in overlaps_of(entry, known):
        other = known.dataset(next(slug for slug in overlap.between if slug != entry.id))
        facts["overlaps"].append(
            {
                "with": other.slug,
                "detection": other.detection,
                "certainty": overlap.certainty,
                "reason": overlap.reason,
                "exclude": overlap.exclude,
            }
        )
    return facts


def _conflicts_of(slug: str, measured: KnownDataset, known: KnownOverlaps) -> list[Conflict]:
    number = measured.detection or measured.slug
    if slug == measured.slug:
        return [Conflict(slug, number, "same", "it is the same data set", "its test cases")]
    return [
        Conflict(slug, number, overlap.certainty, overlap.reason, overlap.exclude)
        for overlap in known.of(slug)
        if measured.slug in overlap.between
    ]


def _slug(name: str, catalogue: Catalogue, known: KnownOverlaps) -> str:
    entry = catalogue.find(name)
    slug = known.slug(name) if entry is None else entry.id
    if slug is None:
        names = [entry.id for entry in catalogue.datasets] + [d.slug for d in known.datasets]
        near = difflib.get_close_matches(name.casefold(), names, n=1)
        hint = f"; did you mean {near[0]}?" if near else "; vb-sup catalogue lists them"
        raise ConfigError(f"{name}: not a data set of the catalogue{hint}")
    return slug


def _squashed(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.casefold())
