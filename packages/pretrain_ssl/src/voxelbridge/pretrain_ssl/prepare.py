"""From images of any source to a case store for pre-training.

Per case, as for detection: read, bring to LPS, crop to the box of voxels other than 0, resample,
z-score over the crop (nnssl resamples last; one order for both keeps the intensities alike). Every
image is one case of one channel, the channel files `_0000`, `_0001` of a raw data set as well:
pre-training learns from single images, and a store of several channels comes from
`vb-detect prepare`. Masks that a source names are stored by their names, on the image's voxels.
"""

import functools
import statistics
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.config import Config, differing_keys, validate
from voxelbridge.core.data.case_index import CaseRecord
from voxelbridge.core.data.case_store import CaseStore, CaseStoreWriter
from voxelbridge.core.data.executor import Failed, map_cases
from voxelbridge.core.data.image_io import describe_grid, read_image
from voxelbridge.core.data.mapping import StoredToOriginal
from voxelbridge.core.data.normalize import ZScore
from voxelbridge.core.data.preprocess import (
    Preprocessed,
    crop_mapping,
    labels_to_stored,
    preprocess,
)
from voxelbridge.core.data.provenance import Provenance, content_hashes
from voxelbridge.core.data.volume import Volume, match_grid, reorientation_to_lps
from voxelbridge.core.errors import ConfigError, DataError, VoxelbridgeError
from voxelbridge.core.files import read_json, write_json
from voxelbridge.pretrain_ssl.sources.bids import Frames
from voxelbridge.pretrain_ssl.sources.find import find_scans
from voxelbridge.pretrain_ssl.sources.scan import Scan, Source

FIXED_SPACING_MM = (1.0, 1.0, 1.0)
PREPARE_FILE = "prepare.json"
MAX_PAIRS = 3  # duplicates named in a note

PlanName = Literal["fixed", "median", "none"]
Spacing = tuple[float, float, float]  # mm, z y x


class PrepareSettings(Config):
    """What a store was prepared with; kept in the store as `prepare.json`."""

    plan: PlanName
    spacing_mm: Spacing | None  # None: every case keeps its own
    crop: bool
    frames: Frames = "mean"  # of time series in a BIDS tree
    normalization: ZScore = ZScore()


@dataclass(frozen=True)
class PrepareReport:
    """How many cases the store holds, how many were there before, and what failed."""

    num_cases: int
    num_skipped: int
    failures: tuple[str, ...]
    notes: tuple[str, ...] = ()


def prepare(
    source: Path,
    store: Path,
    *,
    plan: PlanName,
    workers: int,
    roots: Mapping[str, Path] | None = None,
    allow: Collection[str] = (),
    frames: Frames = "mean",
    modalities: Collection[str] = (),
    executor: Executor | None = None,
) -> PrepareReport:
    """Brings all images of `source` into `store`; cases that are already there are skipped.

    `modalities` keeps only images of these (as the source spells them). A case that fails is
    reported and left out; the others are stored. Raises DataError when `source` holds no image or
    none could be stored, and ConfigError when the store was prepared with another plan.
    """
    found = find_scans(source, roots=roots, allow=allow, frames=frames)
    scans = chosen_scans(found, modalities)
    failures = list(found.refused)
    settings = _settings(plan, frames, scans, store, failures, workers=workers, executor=executor)
    _keep_settings(store, settings)
    writer = CaseStoreWriter(store)
    writer.remove_leftovers()
    pending = [scan for scan in scans if not writer.is_done(scan.case_id)]
    task = functools.partial(prepare_case, writer=writer, settings=settings)
    stored = {scan.case_id for scan in scans} - {scan.case_id for scan in pending}
    for outcome in map_cases(
        task, pending, workers=workers, description="preparing", executor=executor
    ):
        if isinstance(outcome, Failed):
            failures.append(_one_line(outcome.item, outcome.error))
        else:
            stored.add(outcome.item.case_id)
    if not stored:
        raise DataError(
            f"{source}: none of {len(scans) + len(found.refused)} images could be stored; "
            f"{failures[0]}"
        )
    writer.finish()
    notes = (*found.notes, *_duplicates(CaseStore.open(store).cases))
    return PrepareReport(
        len(stored), len(scans) - len(pending), tuple(dict.fromkeys(failures)), notes
    )


def describe_source(
    source: Path,
    store: Path,
    *,
    roots: Mapping[str, Path] | None = None,
    allow: Collection[str] = (),
    frames: Frames = "mean",
    modalities: Collection[str] = (),
) -> str:
    """What `prepare` would do, from names alone; nothing is written."""
    found = find_scans(source, roots=roots, allow=allow, frames=frames)
    scans = chosen_scans(found, modalities)
    writer = CaseStoreWriter(store)
    done = sum(writer.is_done(scan.case_id) for scan in scans)
    patients = len({scan.patient or scan.case_id for scan in scans})
    kinds = Counter(scan.modality or "unknown" for scan in scans)
    masks = Counter(name for scan in scans for name in scan.masks)
    lines = [
        f"{source}: {found.kind}, {len(scans)} images of {patients} patients",
        "modalities: " + ", ".join(f"{name} {count}" for name, count in sorted(kinds.items())),
        *(f"mask {name}: {count} images" for name, count in sorted(masks.items())),
        f"{store}: {done} are there, {len(scans) - done} would be prepared",
        *found.notes,
        *(f"refused: {line}" for line in found.refused),
    ]
    return "\n".join(lines)


def chosen_scans(found: Source, modalities: Collection[str]) -> tuple[Scan, ...]:
    """The scans of the wanted modalities; all without any. ConfigError when none is left."""
    if not modalities:
        return found.scans
    chosen = tuple(scan for scan in found.scans if scan.modality in modalities)
    if not chosen:
        known = sorted({scan.modality or "unknown" for scan in found.scans})
        raise ConfigError(
            f"--modality {' '.join(sorted(modalities))}: no image has it; there are "
            f"{', '.join(known[:10])}"
        )
    return chosen


def prepare_case(scan: Scan, *, writer: CaseStoreWriter, settings: PrepareSettings) -> None:
    """Reads, preprocesses and stores one image; DataError without naming the case."""
    volume = scan.image.read()
    if not np.isfinite(volume.array).all():
        count = int(np.count_nonzero(~np.isfinite(volume.array)))
        raise DataError(f"{count} voxels are NaN or infinite; correct the image")
    if (volume.array == (value := volume.array.flat[0])).all():
        raise DataError(
            f"all voxels are {value:g}; there is nothing to learn from, remove the image"
        )
    provenance = Provenance(
        patient=scan.patient,
        origin_ids=scan.origin_ids,
        content_sha256=content_hashes(volume),
        dataset=scan.dataset,
        scan=scan.scan,
        modality=scan.modality,
    )
    masks = {name: _read_mask(path, volume) for name, path in scan.masks.items()}
    prepared = preprocess_image(volume, settings)
    writer.write_case(
        scan.case_id,
        prepared.image,
        grid=prepared.mapping.stored_grid,
        boxes=np.zeros((0, 6), dtype=np.float32),
        labels=np.zeros(0, dtype=np.int64),
        mapping=prepared.mapping,
        masks={name: labels_to_stored(mask, prepared.mapping) for name, mask in masks.items()},
        provenance=provenance,
        extra={"normalization": [settings.normalization.model_dump(mode="json")]},
    )


def preprocess_image(volume: Volume, settings: PrepareSettings) -> Preprocessed:
    """The stored array (C, D, H, W) of a volume and its relation to the file."""
    mapping = crop_mapping(volume) if settings.crop else StoredToOriginal.build(volume.grid)
    schemes = [settings.normalization] * len(volume.array)
    return preprocess(volume, mapping, spacing_mm=settings.spacing_mm, normalization=schemes)


def _read_mask(path: Path, volume: Volume) -> NDArray[np.uint8]:
    """A mask (D, H, W) on the image's grid: 1 where the file is above 0."""
    mask = match_grid(stored := read_image(path), volume.grid)
    if mask is None:
        raise DataError(
            f"{path}: mask grid {describe_grid(stored.grid)} differs from the image's "
            f"{describe_grid(volume.grid)}; resample the mask or leave it out"
        )
    return (mask.array[0] > 0).astype(np.uint8)


def _settings(
    plan: PlanName,
    frames: Frames,
    scans: Sequence[Scan],
    store: Path,
    failures: list[str],
    *,
    workers: int,
    executor: Executor | None,
) -> PrepareSettings:
    match plan:
        case "fixed":
            return PrepareSettings(plan=plan, spacing_mm=FIXED_SPACING_MM, crop=True, frames=frames)
        case "none":
            return PrepareSettings(plan=plan, spacing_mm=None, crop=False, frames=frames)
        case "median":
            before = _read_settings(store)
            if before is not None and before.plan == plan:
                # More images may have come since; the stored cases decide the spacing.
                return before.model_copy(update={"frames": frames})
            spacing = _median_spacing(scans, failures, workers=workers, executor=executor)
            return PrepareSettings(plan=plan, spacing_mm=spacing, crop=True, frames=frames)


def _median_spacing(
    scans: Sequence[Scan], failures: list[str], *, workers: int, executor: Executor | None
) -> Spacing:
    spacings: list[Spacing] = []
    for outcome in map_cases(
        _lps_spacing,
        scans,
        workers=workers,
        description="reading image headers",
        executor=executor,
    ):
        if isinstance(outcome, Failed):
            failures.append(_one_line(outcome.item, outcome.error))
        else:
            spacings.append(outcome.value)
    if not spacings:
        raise DataError(f"no image header could be read; {failures[0]}")
    z, y, x = (statistics.median(axis) for axis in zip(*spacings, strict=True))
    return z, y, x


def _lps_spacing(scan: Scan) -> Spacing:
    grid = scan.image.read_grid()
    return reorientation_to_lps(grid).apply_grid(grid).spacing_mm


def _read_settings(store: Path) -> PrepareSettings | None:
    path = store / PREPARE_FILE
    if not path.exists():
        return None
    tree = read_json(path)
    if not isinstance(tree, dict) or tree.pop("schema", None) != 1:
        raise DataError(f"{path}: expected schema 1; prepare into a new folder")
    return validate(PrepareSettings, tree, where=str(path))


def _keep_settings(store: Path, settings: PrepareSettings) -> None:
    before = _read_settings(store)
    if before is None:
        if store.is_dir() and any(store.iterdir()):
            raise ConfigError(
                f"{store}: holds files but no {PREPARE_FILE}; take an empty or a new folder"
            )
        content = {"schema": 1, **settings.model_dump(mode="json")}
        write_json(store / PREPARE_FILE, content)
    elif before != settings:
        keys = "; ".join(differing_keys(before, settings))
        raise ConfigError(f"{store}: was prepared otherwise ({keys}); take a new folder")


def _duplicates(cases: Sequence[CaseRecord]) -> list[str]:
    """A line about images that the store has more than once, whatever they are called."""
    first: dict[tuple[str, ...], str] = {}
    pairs = []
    for record in cases:
        hashes = record.provenance.content_sha256
        if hashes and (other := first.setdefault(hashes, record.case_id)) != record.case_id:
            pairs.append(f"{record.case_id} = {other}")
    if not pairs:
        return []
    more = f" and {len(pairs) - MAX_PAIRS} more" if len(pairs) > MAX_PAIRS else ""
    return [
        f"{len(pairs)} of {len(cases)} cases repeat the voxels of another one "
        f"({', '.join(pairs[:MAX_PAIRS])}{more}); they are drawn more often than "
        "others: remove their images if that is not meant"
    ]


def _one_line(scan: Scan, error: VoxelbridgeError) -> str:
    text = " ".join(str(error).split())
    return text if scan.case_id in text else f"case {scan.case_id}: {text}"
