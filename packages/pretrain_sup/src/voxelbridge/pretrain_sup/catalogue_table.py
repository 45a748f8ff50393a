"""How `vb-sup catalogue` shows the data sets: a table on a terminal, plain lines anywhere else."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from voxelbridge.core.data.known_overlaps import KnownDataset, KnownOverlaps, read_known_overlaps
from voxelbridge.pretrain_sup.catalogue import (
    SCHEMA,
    UNKNOWN,
    Catalogue,
    CatalogueEntry,
    Conflict,
    ModalityName,
    conflicts,
    detection_dataset,
    entry_json,
    overlaps_of,
    read_catalogue,
)

HEADINGS = ("row", "name", "images", "modality", "ch", "licence", "D01-D08", "targets", "link")
CONFLICT_HEADINGS = ("row", "name", "overlap", "why", "leave out before measuring")


def show_catalogue(*, modality: ModalityName | None, detection: str | None, as_json: bool) -> None:
    """The command: prints the data sets of a modality, or those that spoil a detection data set."""
    catalogue, known = read_catalogue(), read_known_overlaps()
    measured = None if detection is None else detection_dataset(detection, known)
    entries = [e for e in catalogue.datasets if modality is None or modality in e.modality]
    against: list[Conflict] = []
    if measured is not None:
        against = conflicts([entry.id for entry in entries], measured.slug)
        named = {conflict.dataset for conflict in against}
        entries = [entry for entry in entries if entry.id in named]
    if as_json:
        print(json.dumps(_as_json(catalogue, entries, measured, against, known), indent=2))
        return
    if measured is None:
        _print_rows(HEADINGS, [_row(entry, known) for entry in entries])
    elif against:
        _print_rows(CONFLICT_HEADINGS, list(_conflict_rows(catalogue, against)))
    for line in _summary(catalogue, entries, measured):
        print(line)


def _as_json(
    catalogue: Catalogue,
    entries: Sequence[CatalogueEntry],
    measured: KnownDataset | None,
    against: Sequence[Conflict],
    known: KnownOverlaps,
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "source": catalogue.source,
        "num_datasets": len(entries),
        "num_images": sum(entry.images for entry in entries),
        "printed": {"datasets": catalogue.printed_datasets, "images": catalogue.printed_images},
        "findings": [finding.model_dump(mode="json") for finding in catalogue.findings],
        "conflicts_with": None if measured is None else measured.detection,
        "conflicts": [asdict(conflict) for conflict in against],
        "datasets": [entry_json(entry, known) for entry in entries],
    }


def _row(entry: CatalogueEntry, known: KnownOverlaps) -> tuple[str, ...]:
    marks = []
    for overlap in overlaps_of(entry, known):
        number = known.dataset(overlap.between[1]).detection
        if number:
            marks.append(number + ("?" if overlap.certainty == "possible" else ""))
    return (
        str(entry.row),
        entry.name,
        str(entry.images),
        ", ".join(entry.modality),
        "?" if entry.channels is None else str(len(entry.channels)),
        entry.licence or UNKNOWN,
        " ".join(sorted(marks)),
        entry.targets,
        entry.links[0],
    )


def _conflict_rows(catalogue: Catalogue, against: Sequence[Conflict]) -> Iterator[tuple[str, ...]]:
    entries = {entry.id: entry for entry in catalogue.datasets}
    for conflict in against:
        entry = entries[conflict.dataset]
        advice = conflict.exclude or ""
        yield str(entry.row), entry.name, conflict.certainty, conflict.reason, advice


def _summary(
    catalogue: Catalogue, entries: Sequence[CatalogueEntry], measured: KnownDataset | None
) -> Iterator[str]:
    if measured is not None:
        what = f"{measured.detection} ({measured.name})"
        if entries:
            plural = "" if len(entries) == 1 else "s"
            yield f"{what}: {len(entries)} data set{plural}; of the others no overlap is known"
        else:
            yield f"{what}: no overlap is known"
        yield "What is not known may still overlap: compare stores with vb-core overlap"
        return
    total = len(catalogue.datasets)
    counted = f"{len(entries)} of {total}" if len(entries) < total else str(total)
    images = sum(entry.images for entry in entries)
    yield f"{counted} data sets, {images:,} images ({catalogue.source}); ?: possible or not known"
    wrong = sum(len(entry.corrections) for entry in entries)
    yield f"{wrong} cells of the table are corrected here; --json has them, and notes"


def _print_rows(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
        for cells in (headings, *rows):
            padded = [f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)]
            print("  ".join(padded).rstrip())
        return
    table = Table(box=box.SIMPLE_HEAD)
    *others, before, last = headings  # the last column goes below the one before: links are long
    for heading in (*others, f"{before}, {last}"):
        numeric = heading in ("row", "images", "ch")
        table.add_column(heading, justify="right" if numeric else "left", overflow="fold")
    for *cells, above, below in rows:
        both = Text.assemble(above, "\n", (below, "dim")) if below else Text(above)
        table.add_row(*(Text(cell) for cell in cells), both)
    console.print(table)
