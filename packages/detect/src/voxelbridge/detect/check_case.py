"""Everything that is wrong or odd about one case of a raw data set.

Errors are exactly what reading the case raises (`core.data.raw_problems`), so that a case with an
error cannot be prepared; warnings are this module's own.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from voxelbridge.core.data.case_checks import check_case_id
from voxelbridge.core.data.dataset import RawCase
from voxelbridge.core.data.foreground import FULL_CONNECTIVITY
from voxelbridge.core.data.image_io import read_grid, read_image
from voxelbridge.core.data.nifti import nifti_header_problems
from voxelbridge.core.data.provenance import content_hashes
from voxelbridge.core.data.raw_objects import RawObjects
from voxelbridge.core.data.raw_problems import Problem, RawDataError, channel_problem, few_of
from voxelbridge.core.data.volume import Grid
from voxelbridge.core.errors import DataError, VoxelbridgeError
from voxelbridge.detect.check_findings import Finding, Severity, finding_of

MAX_ANISOTROPY = 10.0  # of the spacings; thicker slices hide lesions between them
MIN_AXIS_VOXELS = 8  # a shorter axis cannot be pooled even three times
LEGAL_SPACING_MM = (0.05, 25.0)  # outside, the unit is probably not millimetres
FAR_APART_MM = 10.0  # parts of one object farther apart than this are probably two objects
MAX_PARTS = 50  # parts of one object that are looked at, the largest first
PADDING_HU = -1500  # CT values below this are padding of the scanner, air is -1000
MIN_HU_RANGE = 100  # a CT that spans less was rescaled
NIFTI_ENDINGS = (".nii", ".nii.gz")
MAX_HU = 32767  # no scanner's values go beyond 16 bits


@dataclass(frozen=True)
class CaseToCheck:
    """A case and what is expected of it."""

    case: RawCase
    needs_labels: bool  # training cases; test cases may have none
    channel_names: tuple[str, ...]

    def __str__(self) -> str:
        return str(self.case)


@dataclass(frozen=True)
class CaseFacts:
    """What one case tells about itself and, for comparisons, about the set."""

    case_id: str
    findings: tuple[Finding, ...]
    labels: tuple[int, ...] | None  # class of each object; None: unknown
    hashes: tuple[str, ...]  # content of the channels, without constant ones; empty: not deep


def check_case(item: CaseToCheck, *, deep: bool) -> CaseFacts:
    """Reads the headers, the label and, if `deep`, every voxel of a case."""
    case = item.case
    problems: list[Problem] = []
    odd: list[tuple[str, str]] = []  # check and message of each warning
    objects = None
    grid = _readable_grid(case, problems)
    if grid is not None:
        odd += _odd_grid(grid)
        if item.needs_labels or case.has_labels:
            objects = _readable_objects(case, grid, problems)
        if objects is not None:
            odd += _odd_objects(objects, grid)
    broken = [problem.message for problem in problems if problem.kind == "unreadable"]
    odd += _odd_headers(case, broken)
    findings = [finding_of(problem, case.case_id) for problem in problems]
    findings += [Finding("warning", case.case_id, check, message) for check, message in odd]
    hashes: tuple[str, ...] = ()
    if deep:
        of_voxels, hashes = _check_voxels(item, broken)
        findings += of_voxels
        if objects is None or objects.instances is None:
            findings += _unread_map(case, broken)
    return CaseFacts(
        case.case_id,
        tuple(dict.fromkeys(findings)),
        None if objects is None else tuple(int(label) for label in objects.labels),
        hashes,
    )


def case_hashes(case: RawCase) -> tuple[str, ...]:
    """Content hashes of the channels, constant ones left out: they say nothing about the scan."""
    found = []
    for path in case.image_paths:
        volume = read_image(path)
        if volume.array.min() != volume.array.max():
            found += content_hashes(volume)
    return tuple(found)


def _readable_grid(case: RawCase, problems: list[Problem]) -> Grid | None:
    """The grid to judge the label by: of the case, or of the first channel that can be read."""
    try:
        check_case_id(case.case_id)
    except DataError as error:
        problems.append(Problem("case-name", str(error)))
    try:
        return case.read_grid()
    except RawDataError as error:
        problems += error.problems
    for path in case.image_paths:
        try:
            return read_grid(path)
        except VoxelbridgeError:  # already among the problems
            continue
    return None


def _readable_objects(case: RawCase, grid: Grid, problems: list[Problem]) -> RawObjects | None:
    try:
        return case.read_objects(grid)
    except RawDataError as error:
        problems += error.problems
        return None


def _odd_headers(case: RawCase, broken: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What NIfTI headers say that readers pass over or disagree about; `broken` files left out."""
    for path in (*case.image_paths, *([case.label_path] if case.label_path else [])):
        if not path.name.lower().endswith(NIFTI_ENDINGS):
            continue
        if not path.is_file() or any(str(path) in message for message in broken):
            continue
        try:
            for message in nifti_header_problems(path):
                yield "header", message if str(path) in message else f"{path.name}: {message}"
        except VoxelbridgeError:  # not to be parsed: reading the file says so
            continue


def _odd_grid(grid: Grid) -> Iterator[tuple[str, str]]:
    spacing = grid.spacing_mm
    words = " x ".join(f"{step:.4g}" for step in spacing)
    if max(spacing) > MAX_ANISOTROPY * min(spacing):
        yield "anisotropic", f"spacing {words} mm: slices over {MAX_ANISOTROPY:g} times the pixels"
    if min(spacing) < LEGAL_SPACING_MM[0] or max(spacing) > LEGAL_SPACING_MM[1]:
        yield "spacing", f"spacing {words} mm is improbable; is its unit millimetres?"
    if min(grid.shape) < MIN_AXIS_VOXELS:
        size = "x".join(str(n) for n in grid.shape)
        yield "tiny-image", f"{size} voxels: an axis has fewer than {MIN_AXIS_VOXELS}"


def _odd_objects(objects: RawObjects, grid: Grid) -> Iterator[tuple[str, str]]:
    if objects.num_specks:
        yield (
            "specks",
            f"{objects.num_specks} components of the label map are too small to be objects and "
            "are left out ('min_voxels' in dataset.json)",
        )
    rows = [
        (*box.tolist(), label) for box, label in zip(objects.boxes, objects.labels, strict=True)
    ]
    if twice := [row for row, count in Counter(rows).items() if count > 1]:
        yield "repeated-box", f"{len(twice)} boxes are listed more than once: {few_of(twice)}"
    if objects.instances is not None:
        yield from _parts(objects.instances, objects, grid)


def _parts(
    instances: NDArray[np.int32], objects: RawObjects, grid: Grid
) -> Iterator[tuple[str, str]]:
    for number, box in zip(objects.ids.tolist(), objects.boxes.astype(int), strict=True):
        inside = tuple(slice(box[axis], box[axis + 3]) for axis in range(3))
        own = instances[inside] == number
        parts = np.zeros(own.shape, dtype=np.int32)
        ndimage.label(own, structure=FULL_CONNECTIVITY, output=parts)
        count = int(parts.max(initial=0))
        if count > 1 and (gap := _largest_gap_mm(parts, grid)) > FAR_APART_MM:
            yield (
                "far-parts",
                f"instance {number} has {count} parts, {gap:.0f} mm apart; are they one object?",
            )


def _largest_gap_mm(parts: NDArray[np.int32], grid: Grid) -> float:
    """How far the loneliest part is from its nearest neighbour, between their boxes."""
    sizes = np.bincount(parts.ravel())[1:]
    spans = ndimage.find_objects(parts)
    largest = np.argsort(-sizes, kind="stable")[:MAX_PARTS]
    low = np.array([[part.start for part in spans[n]] for n in largest], dtype=float)
    high = np.array([[part.stop for part in spans[n]] for n in largest], dtype=float)
    gaps = np.maximum(low[:, None] - high[None], low[None] - high[:, None]).clip(min=0)
    distances = np.linalg.norm(gaps * np.asarray(grid.spacing_mm), axis=2)
    np.fill_diagonal(distances, np.inf)
    return float(distances.min(axis=1).max())


def _check_voxels(
    item: CaseToCheck, broken: Sequence[str]
) -> tuple[list[Finding], tuple[str, ...]]:
    """Decodes every channel whole, one at a time; the findings and the content hashes.

    Files that messages of `broken` name are known to be unreadable from their headers.
    """
    case = item.case
    found: list[Finding] = []
    constant: list[Problem] = []
    hashes: list[str] = []
    for number, path in enumerate(case.image_paths):
        if any(str(path) in message for message in broken):
            continue
        try:
            volume = read_image(path)
        except VoxelbridgeError as error:
            found.append(finding_of(Problem("unreadable", str(error)), case.case_id))
            continue
        wrong = channel_problem(volume.array[0], path.name)
        if wrong is not None and wrong.kind == "constant":
            constant.append(wrong)
            continue
        hashes += content_hashes(volume)
        if wrong is not None:
            found.append(finding_of(wrong, case.case_id))
        elif number < len(item.channel_names) and _is_ct(item.channel_names[number]):
            found += [
                Finding("warning", case.case_id, "intensity", f"{path.name}: {message}")
                for message in _odd_hounsfield(volume.array)
            ]
    severity: Severity = "error" if len(constant) == len(case.image_paths) else "warning"
    found += [Finding(severity, case.case_id, p.kind, p.message) for p in constant]
    if len(set(hashes)) < len(hashes):
        message = "channels hold the same voxels; was a file copied by mistake?"
        found.append(Finding("warning", case.case_id, "duplicate-channel", message))
    return found, tuple(dict.fromkeys(hashes))


def _unread_map(case: RawCase, broken: Sequence[str]) -> list[Finding]:
    """Whether a label map that was not needed, or not reached, can be decoded."""
    path = case.label_path
    if path is None or not path.exists() or any(str(path) in message for message in broken):
        return []
    try:
        read_image(path)
    except VoxelbridgeError as error:
        return [finding_of(Problem("unreadable", str(error)), case.case_id)]
    return []


def _is_ct(channel_name: str) -> bool:
    name = channel_name.casefold()
    return name in ("ct", "cta", "cbct") or name.startswith(("ct ", "ct_", "ct-"))


def _odd_hounsfield(array: NDArray[Any]) -> Iterator[str]:
    low, high = float(array.min()), float(array.max())
    if low < PADDING_HU:
        yield (
            f"minimum {low:g}: padding outside the field of view, which moves the intensity "
            "percentiles; set it to -1024"
        )
    if low >= 0:
        yield f"minimum {low:g}: no voxel of air; was the rescale intercept left out?"
    if high > MAX_HU:
        yield f"maximum {high:g} is beyond every scanner's range"
    if high - low < MIN_HU_RANGE:
        yield f"values span {high - low:g}: they seem rescaled, not Hounsfield units"
