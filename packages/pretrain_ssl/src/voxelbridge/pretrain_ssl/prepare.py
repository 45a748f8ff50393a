"""From a folder of images to a case store for pre-training.

Per case, as for detection: read, bring to LPS, crop to the box of voxels other than 0, resample,
z-score over the crop (nnssl resamples last; one order for both keeps the intensities alike). Every
image file is one case of one channel, the channel files `_0000`, `_0001` of a raw data set as well:
pre-training learns from single images, and a store of several channels comes from
`vb-detect prepare`.
"""

import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from voxelbridge.core.config import Config, differing_keys, validate
from voxelbridge.core.data.case_store import CaseStoreWriter
from voxelbridge.core.data.executor import Failed, map_cases
from voxelbridge.core.data.image_io import image_ending, read_grid, read_image
from voxelbridge.core.data.mapping import StoredToOriginal
from voxelbridge.core.data.normalize import ZScore
from voxelbridge.core.data.preprocess import Preprocessed, crop_mapping, preprocess
from voxelbridge.core.data.volume import Volume, reorientation_to_lps
from voxelbridge.core.errors import ConfigError, DataError, VoxelbridgeError
from voxelbridge.core.files import read_json, write_json

FIXED_SPACING_MM = (1.0, 1.0, 1.0)
PREPARE_FILE = "prepare.json"
ACCEPTED = (
    "accepted are a folder of .nii.gz, .nii, .nrrd, .mha or .mhd images (searched with its "
    "subfolders) and a raw data set with dataset.json and imagesTr"
)

PlanName = Literal["fixed", "median", "none"]
Spacing = tuple[float, float, float]  # mm, z y x


class PrepareSettings(Config):
    """What a store was prepared with; kept in the store as `prepare.json`."""

    plan: PlanName
    spacing_mm: Spacing | None  # None: every case keeps its own
    crop: bool
    normalization: ZScore = ZScore()


@dataclass(frozen=True)
class SourceImage:
    """One image file and the name of its case."""

    case_id: str
    path: Path

    def __str__(self) -> str:
        return f"case {self.case_id} ({self.path})"


@dataclass(frozen=True)
class PrepareReport:
    """How many cases the store holds, how many were there before, and what failed."""

    num_cases: int
    num_skipped: int
    failures: tuple[str, ...]


def prepare(source: Path, store: Path, *, plan: PlanName, workers: int) -> PrepareReport:
    """Brings all images of `source` into `store`; cases that are already there are skipped.

    A case that fails is reported and left out; the others are stored. Raises DataError when
    `source` holds no image or none could be stored, and ConfigError when the store was prepared
    with another plan.
    """
    images = find_images(source)
    failures: list[str] = []
    settings = _settings(plan, images, store, failures, workers=workers)
    _keep_settings(store, settings)
    writer = CaseStoreWriter(store)
    writer.remove_leftovers()
    pending = [image for image in images if not writer.is_done(image.case_id)]
    task = functools.partial(prepare_case, writer=writer, settings=settings)
    for outcome in map_cases(task, pending, workers=workers, description="preparing"):
        if isinstance(outcome, Failed):
            failures.append(_one_line(outcome.item, outcome.error))
    stored = [image.case_id for image in images if writer.is_done(image.case_id)]
    if not stored:
        raise DataError(f"{source}: none of {len(images)} images could be stored; {failures[0]}")
    writer.finish()
    return PrepareReport(len(stored), len(images) - len(pending), tuple(dict.fromkeys(failures)))


def find_images(source: Path) -> list[SourceImage]:
    """All images of a folder or raw data set, sorted by case; names come from relative paths."""
    if not source.is_dir():
        what = "no folder" if source.exists() else "does not exist"
        raise DataError(f"{source}: {what}; {ACCEPTED}")
    is_raw = (source / "dataset.json").is_file() and (source / "imagesTr").is_dir()
    root = source / "imagesTr" if is_raw else source
    found: dict[str, SourceImage] = {}
    for path in sorted(root.rglob("*")):
        ending = image_ending(path.name)
        if ending is None or path.name.startswith(".") or not path.is_file():
            continue
        name = "__".join(path.relative_to(root).parts)[: -len(ending)]
        if name in found:
            raise DataError(
                f"{path}: the same case name {name} as {found[name].path}; rename one of them"
            )
        found[name] = SourceImage(name, path)
    if not found:
        raise DataError(f"{source}: no image found; {ACCEPTED}")
    return [found[name] for name in sorted(found)]


def prepare_case(image: SourceImage, *, writer: CaseStoreWriter, settings: PrepareSettings) -> None:
    """Reads, preprocesses and stores one image; DataError without naming the case."""
    volume = read_image(image.path)
    if not np.isfinite(volume.array).all():
        count = int(np.count_nonzero(~np.isfinite(volume.array)))
        raise DataError(f"{count} voxels are NaN or infinite; correct the image")
    if not volume.array.any():
        raise DataError("all voxels are 0; there is nothing to learn from, remove the image")
    prepared = preprocess_image(volume, settings)
    writer.write_case(
        image.case_id,
        prepared.image,
        grid=prepared.mapping.stored_grid,
        boxes=np.zeros((0, 6), dtype=np.float32),
        labels=np.zeros(0, dtype=np.int64),
        mapping=prepared.mapping,
        extra={"normalization": [settings.normalization.model_dump(mode="json")]},
    )


def preprocess_image(volume: Volume, settings: PrepareSettings) -> Preprocessed:
    """The stored array (C, D, H, W) of a volume and its relation to the file."""
    mapping = crop_mapping(volume) if settings.crop else StoredToOriginal.build(volume.grid)
    schemes = [settings.normalization] * len(volume.array)
    return preprocess(volume, mapping, spacing_mm=settings.spacing_mm, normalization=schemes)


def _settings(
    plan: PlanName,
    images: Sequence[SourceImage],
    store: Path,
    failures: list[str],
    *,
    workers: int,
) -> PrepareSettings:
    match plan:
        case "fixed":
            return PrepareSettings(plan=plan, spacing_mm=FIXED_SPACING_MM, crop=True)
        case "none":
            return PrepareSettings(plan=plan, spacing_mm=None, crop=False)
        case "median":
            before = _read_settings(store)
            if before is not None and before.plan == plan:
                return before  # more images may have come since; the stored cases decide
            spacing = _median_spacing(images, failures, workers=workers)
            return PrepareSettings(plan=plan, spacing_mm=spacing, crop=True)


def _median_spacing(images: Sequence[SourceImage], failures: list[str], *, workers: int) -> Spacing:
    spacings: list[Spacing] = []
    for outcome in map_cases(
        _lps_spacing, images, workers=workers, description="reading image headers"
    ):
        if isinstance(outcome, Failed):
            failures.append(_one_line(outcome.item, outcome.error))
        else:
            spacings.append(outcome.value)
    if not spacings:
        raise DataError(f"no image header could be read; {failures[0]}")
    z, y, x = (statistics.median(axis) for axis in zip(*spacings, strict=True))
    return z, y, x


def _lps_spacing(image: SourceImage) -> Spacing:
    grid = read_grid(image.path)
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


def _one_line(image: SourceImage, error: VoxelbridgeError) -> str:
    text = " ".join(str(error).split())
    return text if image.case_id in text else f"case {image.case_id}: {text}"
