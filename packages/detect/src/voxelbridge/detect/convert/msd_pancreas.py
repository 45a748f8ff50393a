"""MSD Task07 Pancreas: tumours as the connected components of label 2.

Layout: `Task07_Pancreas/{imagesTr,labelsTr,imagesTs}/pancreas_NNN.nii.gz` and `dataset.json`.
Labels: 1 pancreas (no object), 2 tumour or cyst. `imagesTs` has no labels and is not used.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.data.foreground import boxes_from_instances, instances_from_semantic
from voxelbridge.core.data.image_io import image_ending, read_grid
from voxelbridge.core.errors import DataError
from voxelbridge.core.files import read_json
from voxelbridge.detect.convert.label_maps import check_labels, images_in, read_label_map
from voxelbridge.detect.convert.raw_writer import (
    ConversionReport,
    InstanceMap,
    NoObjects,
    RawDatasetWriter,
    SplitName,
)
from voxelbridge.detect.convert.splits import patient_folds, patient_split

NAME = "msd-pancreas"
TUMOUR = 2
KNOWN_LABELS = {0, 1, TUMOUR}
TEST_FRACTION = 0.3  # nnDetection's; of 281 it leaves 196, held out 85 (arXiv 2509.15947 table 1)
MIN_SIZE_MM = 3.0  # nnDetection's min_size of this task
ROUNDING_MM = 1e-3  # spacings are stored in 32 bits: 5 x 0.6 mm must count as 3 mm


def convert(
    src: Path,
    out: Path,
    *,
    seed: int = 0,
    workers: int = 2,
    min_size_mm: float = MIN_SIZE_MM,
) -> ConversionReport:
    """Converts the training images; 30 % of them, drawn with `seed`, become the test set.

    Components smaller than `min_size_mm` along one of the two finest axes are no objects.
    """
    root = _root(src)
    pairs = _pairs(root)
    patients = {case_id: case_id for case_id in pairs}  # the data set names no patients
    train, test = patient_split(patients, test_fraction=TEST_FRACTION, seed=seed)
    held_out = set(test)
    splits: dict[str, SplitName] = {c: "test" if c in held_out else "train" for c in pairs}
    writer = RawDatasetWriter(
        out,
        name=NAME,
        channel_names=("CT",),
        class_names=("tumour",),
        settings={"seed": seed, "min_size_mm": min_size_mm},
    )
    failures = writer.convert_each(
        partial(_convert_case, writer, pairs, splits, min_size_mm), splits, workers=workers
    )
    notes = []
    if unlabelled := len(images_in(root / "imagesTs")):
        notes.append(f"{unlabelled} images of imagesTs have no labels and were not converted")
    return writer.finish(
        patient_folds({case: case for case in train}, seed=seed),
        failures=failures,
        notes=notes,
        only=list(pairs),
    )


def drop_small(
    instances: NDArray[np.int32], spacing_mm: tuple[float, float, float], min_size_mm: float
) -> tuple[NDArray[np.int32], int]:
    """Instances renumbered from 1 without the small ones, and how many were small.

    Small is what measures less than `min_size_mm` along one of the two axes of finer spacing: the
    coarsest axis says little about size. Differs from nnDetection, which adds one voxel to every
    extent before it compares.
    """
    _, boxes = boxes_from_instances(instances)
    sizes_mm = (boxes[:, 3:] - boxes[:, :3]) * np.asarray(spacing_mm)  # (N, 3)
    fine = np.delete(sizes_mm, int(np.argmax(spacing_mm)), axis=1)
    kept = (fine >= min_size_mm - ROUNDING_MM).all(axis=1)
    numbers = np.concatenate([[0], np.where(kept, np.cumsum(kept), 0)]).astype(np.int32)
    return numbers[instances], int((~kept).sum())


def _root(src: Path) -> Path:
    for folder in (src, src / "Task07_Pancreas"):
        if (folder / "imagesTr").is_dir():
            return folder
    raise DataError(f"{src}: no imagesTr; give the extracted folder Task07_Pancreas")


def _pairs(root: Path) -> dict[str, tuple[Path | None, Path | None]]:
    """Image and label of each case, from the folders and from dataset.json; None: no such file."""
    images, labels = images_in(root / "imagesTr"), images_in(root / "labelsTr")
    names = {*images, *labels, *_declared(root / "dataset.json")}
    if not names:
        raise DataError(f"{root / 'imagesTr'}: no images; expected pancreas_NNN.nii.gz")
    return {name: (images.get(name), labels.get(name)) for name in sorted(names)}


def _declared(path: Path) -> list[str]:
    if not path.is_file():
        return []
    content = read_json(path)
    listed: Any = content.get("training", []) if isinstance(content, dict) else []
    names = [str(row["image"]) for row in listed if isinstance(row, dict) and "image" in row]
    files = [name.rsplit("/", 1)[-1] for name in names]
    return [file[: -len(image_ending(file) or "")] for file in files if image_ending(file)]


def _convert_case(
    writer: RawDatasetWriter,
    pairs: Mapping[str, tuple[Path | None, Path | None]],
    splits: Mapping[str, SplitName],
    min_size_mm: float,
    case_id: str,
) -> None:
    image, label = pairs[case_id]
    if image is None or label is None:
        raise DataError(f"case {case_id}: no file in {'imagesTr' if image is None else 'labelsTr'}")
    grid = read_grid(image)
    labels = read_label_map(label, grid)
    check_labels(label, labels, KNOWN_LABELS)
    components, _ = instances_from_semantic(labels, (TUMOUR,), min_voxels=1)
    instances, num_small = drop_small(components, grid.spacing_mm, min_size_mm)
    classes = dict.fromkeys(range(1, int(instances.max()) + 1), 0)
    writer.add_case(
        case_id,
        [image],
        objects=InstanceMap(instances, classes) if classes else NoObjects(),
        patient=case_id,
        origins=[f"{NAME}:{case_id}"],
        split=splits[case_id],
        notes=[f"{num_small} components below {min_size_mm:g} mm left out"] if num_small else [],
    )
