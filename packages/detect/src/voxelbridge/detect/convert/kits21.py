"""KiTS21: kidney tumours and cysts, each the majority of its up to three annotations.

Layout: `data/case_00NNN/imaging.nii.gz` and in its `segmentations/` (KiTS23: `instances/`) one file
per structure, instance and annotator, `tumor_instance-1_annotation-2.nii.gz`. The aggregated maps
are not used: in them touching instances are one. The slices of these files run along the first
axis of the NIfTI array; here the affine alone decides what is where.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.data.foreground import boxes_from_instances
from voxelbridge.core.data.image_io import read_grid
from voxelbridge.core.data.volume import Grid, Shape
from voxelbridge.core.errors import DataError
from voxelbridge.detect.convert.label_maps import read_label_map
from voxelbridge.detect.convert.raw_writer import (
    ConversionReport,
    InstanceMap,
    NoObjects,
    RawDatasetWriter,
    SplitName,
)
from voxelbridge.detect.convert.splits import patient_folds, patient_split

NAME = "kits21"
ORIGIN = "kits"  # KiTS19, 21 and 23 share their case names
CLASSES = {"tumor": 0, "cyst": 1}  # kidneys and vessels are no objects
ANNOTATION = re.compile(
    r"(?P<kind>[a-z]+)_instance-(?P<instance>\d+)_annotation-(?P<annotation>\d+)\.nii(\.gz)?"
)
ANNOTATION_FOLDERS = ("segmentations", "instances")
NUM_ANNOTATIONS = 3
TEST_FRACTION = 0.15  # 45 of 300 (arXiv 2509.15947 table 1)


@dataclass(frozen=True, eq=False)
class Part:
    """One object before it is drawn: its name, class, and mask inside a box of the image."""

    name: str
    label: int
    inside: tuple[slice, slice, slice]
    mask: NDArray[np.bool_]

    @property
    def num_voxels(self) -> int:
        return int(self.mask.sum())


def convert(src: Path, out: Path, *, seed: int = 0, workers: int = 2) -> ConversionReport:
    """Converts all cases; 15 % of them, drawn with `seed`, become the test set."""
    folders = _case_folders(src)
    patients = {case_id: case_id for case_id in folders}
    train, test = patient_split(patients, test_fraction=TEST_FRACTION, seed=seed)
    held_out = set(test)
    splits: dict[str, SplitName] = {c: "test" if c in held_out else "train" for c in folders}
    writer = RawDatasetWriter(
        out,
        name=NAME,
        channel_names=("CT",),
        class_names=("tumour", "cyst"),
        settings={"seed": seed},
    )
    failures = writer.convert_each(
        partial(_convert_case, writer, folders, splits), splits, workers=workers
    )
    return writer.finish(
        patient_folds({case: case for case in train}, seed=seed),
        failures=failures,
        only=list(folders),
    )


def majority(votes: NDArray[np.uint8], num_annotations: int) -> NDArray[np.bool_]:
    """Voxels that more than half of the annotations hold; of two annotations, both."""
    return votes * np.uint8(2) > num_annotations


def draw(parts: Sequence[Part], shape: Shape) -> tuple[NDArray[np.int32], list[str]]:
    """One map (D, H, W) of the parts, part n with id n + 1, and what overlap cost.

    Larger parts are drawn first, so that an object inside or beside another keeps its voxels.
    """
    canvas = np.zeros(shape, dtype=np.int32)
    order = sorted(range(len(parts)), key=lambda n: (-parts[n].num_voxels, n))
    for n in order:
        canvas[parts[n].inside][parts[n].mask] = n + 1
    notes = []
    for n, part in enumerate(parts):
        now = canvas[part.inside][part.mask]
        lost = now[now != n + 1]
        if not lost.size:
            continue
        winners = ", ".join(parts[k - 1].name for k in np.unique(lost))
        what = f"{lost.size} of {part.num_voxels} voxels of {part.name} also belong to {winners}"
        gone = lost.size == part.num_voxels
        notes.append(f"{what}; it {'vanishes and is left out' if gone else 'loses them'}")
    return canvas, notes


def _case_folders(src: Path) -> dict[str, Path]:
    for root in (src, src / "data", src / "kits21" / "data", src / "dataset"):
        folders = sorted(path for path in root.glob("case_*") if path.is_dir())
        if folders:
            return {folder.name: folder for folder in folders}
    raise DataError(f"{src}: no folders case_00NNN; give the repository or its folder data")


def _convert_case(
    writer: RawDatasetWriter,
    folders: Mapping[str, Path],
    splits: Mapping[str, SplitName],
    case_id: str,
) -> None:
    folder = folders[case_id]
    image = next((p for p in sorted(folder.glob("imaging.nii*")) if p.is_file()), None)
    if image is None:
        raise DataError(f"case {case_id}: no imaging.nii.gz in {folder}; download the images too")
    grid = read_grid(image)
    parts, notes = _parts(folder, grid)
    canvas, overlaps = draw(parts, grid.shape)
    ids, _ = boxes_from_instances(canvas)
    classes = {int(number): parts[number - 1].label for number in ids}
    writer.add_case(
        case_id,
        [image],
        objects=InstanceMap(canvas, classes) if classes else NoObjects(),
        patient=case_id,
        origins=[f"{ORIGIN}:{case_id}"],
        split=splits[case_id],
        notes=[*notes, *overlaps],
    )


def _parts(folder: Path, grid: Grid) -> tuple[list[Part], list[str]]:
    files: dict[tuple[int, int, str], list[Path]] = {}
    num_files = 0
    for place in ANNOTATION_FOLDERS:
        for path in sorted((folder / place).glob("*_annotation-*")):
            found = ANNOTATION.fullmatch(path.name)
            if found is None:  # also the ._ files of macOS
                continue
            num_files += 1
            if (kind := found["kind"]) in CLASSES:
                key = (CLASSES[kind], int(found["instance"]), kind)
                files.setdefault(key, []).append(path)
    if not num_files:
        raise DataError(
            f"{folder}: no annotation; expected segmentations/tumor_instance-1_annotation-1.nii.gz"
        )
    parts, notes = [], []
    for (label, instance, kind), paths in sorted(files.items()):
        name = f"{kind} {instance}"
        if len(paths) != NUM_ANNOTATIONS:
            notes.append(f"{name} has {len(paths)} annotations, expected {NUM_ANNOTATIONS}")
        votes = np.zeros(grid.shape, dtype=np.uint8)
        for path in paths:
            votes += read_label_map(path, grid) > 0
        agreed = majority(votes, len(paths))
        _, boxes = boxes_from_instances(agreed.view(np.uint8))
        if not len(boxes):
            notes.append(f"{name} has no voxel that most of its annotations share, left out")
            continue
        z0, y0, x0, z1, y1, x1 = (int(edge) for edge in boxes[0])
        inside = (slice(z0, z1), slice(y0, y1), slice(x0, x1))
        parts.append(Part(name, label, inside, agreed[inside].copy()))
    return parts, notes
