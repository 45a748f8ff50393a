"""What is public about data sets that show the same scans, whatever their files are called.

Hashes and origin ids (`core.data.overlap`) find a shared scan where its voxels or names survived.
A collection that resamples and renames its images hides both; then only knowing the collections
helps. The knowledge is `known_overlaps.toml`; docs/catalogue.md tells where it comes from. That no
overlap is listed does not mean that there is none.
"""

import re
import tomllib
from collections.abc import Iterable, Iterator
from importlib import resources
from typing import Literal

from pydantic import Field

from voxelbridge.core.config import Config, validate

FILE_NAME = "known_overlaps.toml"
PACKAGE = "voxelbridge.core.data"
SCHEMA = 1
NUMBERED = re.compile(r"^(?:dataset|task)\d{2,3}[a-z]*[_-]", re.IGNORECASE)  # as nnU-Net names


class KnownDataset(Config):
    """A public data set and the names under which people keep it."""

    slug: str
    name: str
    detection: str | None = None  # "D01" to "D08": one that detectors are measured on
    aliases: tuple[str, ...] = ()


class KnownOverlap(Config):
    """Two public data sets that show the same scans (known), or may (possible)."""

    between: tuple[str, str]  # slugs; where a detection data set is one of them, it comes second
    certainty: Literal["known", "possible"]
    reason: str
    exclude: str | None = None  # what must not be learned from before measuring on the second


class KnownOverlaps(Config):
    """All that is known, and under which names to look it up."""

    schema_version: Literal[1] = Field(default=SCHEMA, alias="schema")
    datasets: tuple[KnownDataset, ...]
    overlaps: tuple[KnownOverlap, ...]

    def slug(self, name: str) -> str | None:
        """The data set that a folder's, store's or origin's name stands for; None: not known.

        Case and punctuation do not count, nor does nnU-Net's number where the rest is a name.
        """
        slugs = self._slugs()
        return slugs.get(_squashed(name)) or slugs.get(_squashed(NUMBERED.sub("", name)))

    def dataset(self, slug: str) -> KnownDataset:
        return next(dataset for dataset in self.datasets if dataset.slug == slug)

    def detection(self, number: str) -> KnownDataset | None:
        """The data set D01 to D08 of arXiv 2509.15947."""
        found = [dataset for dataset in self.datasets if dataset.detection == number.upper()]
        return found[0] if found else None

    def of(self, slug: str) -> tuple[KnownOverlap, ...]:
        """Every overlap of one data set."""
        return tuple(overlap for overlap in self.overlaps if slug in overlap.between)

    def between(self, first: Iterable[str], second: Iterable[str]) -> tuple[KnownOverlap, ...]:
        """The overlaps of a data set named in `first` with one named in `second`.

        Names may be any; those not known are passed over, and so are two names of one data set,
        whose cases origin ids and hashes compare.
        """
        a = {slug for name in first if (slug := self.slug(name))}
        b = {slug for name in second if (slug := self.slug(name))}
        return tuple(
            overlap
            for overlap in self.overlaps
            for x, y in (overlap.between, overlap.between[::-1])
            if x in a and y in b
        )

    def describe(self, overlap: KnownOverlap) -> str:
        """The overlap in one line."""
        x, y = (self.dataset(slug).name for slug in overlap.between)
        verb = "share" if overlap.certainty == "known" else "may share"
        advice = f"; leave out: {overlap.exclude}" if overlap.exclude else ""
        return f"{x} and {y} {verb} scans: {overlap.reason}{advice}"

    def _slugs(self) -> dict[str, str]:
        return {
            _squashed(name): dataset.slug for dataset in self.datasets for name in _names(dataset)
        }


def read_known_overlaps() -> KnownOverlaps:
    """The list that is shipped."""
    text = (resources.files(PACKAGE) / FILE_NAME).read_text(encoding="utf-8")
    return validate(KnownOverlaps, tomllib.loads(text), where=FILE_NAME)


def _names(dataset: KnownDataset) -> Iterator[str]:
    yield dataset.slug
    yield dataset.name
    yield from dataset.aliases


def _squashed(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.casefold())
