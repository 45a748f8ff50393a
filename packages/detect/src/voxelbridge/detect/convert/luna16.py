"""LUNA16 from its download: MetaImage scans in ten subsets, nodules as spheres in world space."""

import csv
import io
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.data.image_io import read_image
from voxelbridge.core.data.volume import Grid, edges_to_world, world_to_edges
from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.detect.convert.raw_writer import (
    Boxes,
    ConversionReport,
    InstanceMap,
    NoObjects,
    Objects,
    RawDatasetWriter,
    SplitName,
    token_of,
)
from voxelbridge.detect.evaluate.tables import read_text

NUM_SUBSETS = 10
COLUMNS = ("seriesuid", "coordX", "coordY", "coordZ", "diameter_mm")

Spheres = NDArray[np.float64]  # (N, 4): x, y, z in LPS mm, diameter in mm
Voxels = tuple[NDArray[np.int64], ...]


def convert(
    src: Path, out: Path, *, seed: int = 0, workers: int = 2, test_subset: int = 9
) -> ConversionReport:
    """Converts subset0 ... subset9 (`*.mhd` with `*.raw`) and annotations.csv at `src`.

    Folds are the official subsets, so `seed` decides nothing: `test_subset` becomes the test set,
    each other subset is the validation set of one fold. Scans without a row have no nodule.
    """
    del seed
    if not 0 <= test_subset < NUM_SUBSETS:
        raise ConfigError(f"test subset {test_subset}: expected 0 to {NUM_SUBSETS - 1}")
    nodules = read_nodules(src / "annotations.csv")
    scans, subsets = _find_scans(src)
    notes = []
    if missing := len(set(nodules) - {path.stem for path in scans.values()}):
        notes.append(f"{missing} scans of annotations.csv are not in the folder")
    split: dict[str, SplitName] = {
        case: "test" if subset == test_subset else "train" for case, subset in subsets.items()
    }
    if "train" not in split.values():
        raise DataError(f"{src}: all scans are in subset{test_subset}, the test set")
    writer = RawDatasetWriter(
        out,
        name="luna16",
        channel_names=("CT",),
        class_names=("nodule",),
        settings={"test_subset": test_subset},
    )
    work = partial(_convert_case, writer, scans=scans, nodules=nodules, splits=split)
    found = {case: nodules.get(path.stem) for case, path in scans.items()}
    tokens = {c: token_of(None if n is None else n.tolist()) for c, n in found.items()}
    failures = writer.convert_each(work, split, workers=workers, tokens=tokens)
    return writer.finish(
        subset_folds(subsets, test_subset=test_subset),
        failures=failures,
        notes=notes,
        only=list(split),
    )


def case_name(uid: str) -> str:
    """The case id of a series: its UID with dots turned into underscores, as nnDetection has it."""
    return uid.replace(".", "_")


def subset_folds(subsets: Mapping[str, int], *, test_subset: int) -> list[dict[str, list[str]]]:
    """One fold per official subset but the test set: that subset validates, the others train."""
    pool = sorted(case for case, subset in subsets.items() if subset != test_subset)
    present = sorted({subsets[case] for case in pool})
    if len(present) < 2:
        return []
    return [
        {
            "train": [case for case in pool if subsets[case] != held_out],
            "val": [case for case in pool if subsets[case] == held_out],
        }
        for held_out in present
    ]


def read_nodules(path: Path) -> dict[str, Spheres]:
    """Spheres of each series UID, in the table's order. DataError naming the line of a bad row."""
    rows: dict[str, list[list[float]]] = {}
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
        raise DataError(f"{path}: no column {', '.join(missing)}")
    for row in reader:
        try:
            values = [float(row[name]) for name in COLUMNS[1:]]
        except (TypeError, ValueError) as error:
            raise DataError(f"{path}: line {reader.line_num}: not a number") from error
        if not (np.isfinite(values).all() and values[3] > 0):
            raise DataError(
                f"{path}: line {reader.line_num}: expected finite numbers and a positive "
                f"diameter, got {values}"
            )
        rows.setdefault(row["seriesuid"], []).append(values)
    return {uid: np.array(values) for uid, values in rows.items()}


def spheres_to_objects(spheres: Spheres, grid: Grid) -> tuple[Objects, list[str]]:
    """The nodules of a scan as an instance map, and what had to be decided.

    A voxel belongs to a nodule when its centre lies within the radius in world space. A nodule
    that reaches no voxel centre gets the voxel around its own centre. Where spheres share voxels
    no map can hold both, so the case gets boxes: those around the voxels of each.
    """
    if len(spheres) == 0:
        return NoObjects(), []
    notes = []
    voxels: list[Voxels] = []
    for number, sphere in enumerate(spheres):
        inside = _sphere_voxels(sphere, grid)
        if len(inside[0]) == 0:
            inside = _centre_voxel(sphere, grid, number)
            notes.append(f"nodule {number} reaches no voxel centre: it became one voxel")
        voxels.append(inside)
    instances = np.zeros(grid.shape, dtype=np.uint16)
    for number, inside in enumerate(voxels, start=1):
        instances[inside] = number
    whole = all((instances[inside] == n).all() for n, inside in enumerate(voxels, start=1))
    if whole:
        return InstanceMap(instances, dict.fromkeys(range(1, len(voxels) + 1), 0)), notes
    boxes = [
        [*(axis.min() for axis in inside), *(axis.max() + 1 for axis in inside)]
        for inside in voxels
    ]
    notes.append("nodules overlap: written as boxes")
    return Boxes(np.array(boxes, dtype=float), [0] * len(boxes)), notes


def _convert_case(
    writer: RawDatasetWriter,
    case_id: str,
    *,
    scans: Mapping[str, Path],
    nodules: Mapping[str, Spheres],
    splits: Mapping[str, SplitName],
) -> None:
    uid = scans[case_id].stem
    volume = read_image(scans[case_id])
    objects, notes = spheres_to_objects(nodules.get(uid, np.zeros((0, 4))), volume.grid)
    writer.add_case(
        case_id,
        volume,
        objects=objects,
        origins=[f"dicom:{uid}"],
        split=splits[case_id],
        notes=notes,
    )


def _find_scans(src: Path) -> tuple[dict[str, Path], dict[str, int]]:
    scans: dict[str, Path] = {}
    subsets: dict[str, int] = {}
    for subset in range(NUM_SUBSETS):
        for path in sorted(_subset_folder(src, subset).glob("*.mhd")):
            if path.name.startswith("."):
                continue
            case = case_name(path.stem)
            if case in scans:
                raise DataError(f"{path}: the scan is also {scans[case]}; remove one")
            scans[case], subsets[case] = path, subset
    if not scans:
        raise DataError(f"{src}: no scans; expected subset0/*.mhd to subset9/*.mhd")
    return scans, subsets


def _subset_folder(src: Path, subset: int) -> Path:
    # unpacking each archive into a folder of its name gives subset0/subset0
    folder = src / f"subset{subset}"
    nested = folder / folder.name
    return nested if nested.is_dir() else folder


def _sphere_voxels(sphere: Spheres, grid: Grid) -> Voxels:
    centre, radius = sphere[:3], sphere[3] / 2
    # How far an array axis runs inside a sphere: the length of the inverse affine's row.
    reach = radius * np.linalg.norm(np.linalg.inv(grid.affine[:, :3]), axis=1)
    middle = world_to_edges(centre, grid) - 0.5
    low = np.maximum(np.floor(middle - reach).astype(int), 0)
    high = np.minimum(np.ceil(middle + reach).astype(int) + 1, grid.shape)
    if (high <= low).any():
        return tuple(np.zeros(0, dtype=np.int64) for _ in range(3))
    near = np.stack(
        np.meshgrid(*(np.arange(a, b) for a, b in zip(low, high, strict=True)), indexing="ij"),
        axis=-1,
    ).reshape(-1, 3)
    distance = np.linalg.norm(edges_to_world(near + 0.5, grid) - centre, axis=1)
    return tuple(near[distance <= radius].T)


def _centre_voxel(sphere: Spheres, grid: Grid, number: int) -> Voxels:
    index = np.floor(world_to_edges(sphere[:3], grid)).astype(int)
    if (index < 0).any() or (index >= grid.shape).any():
        raise DataError(
            f"nodule {number} at {sphere[:3].tolist()} mm lies outside the image; "
            "is annotations.csv of this download?"
        )
    return tuple(index[:, None])
