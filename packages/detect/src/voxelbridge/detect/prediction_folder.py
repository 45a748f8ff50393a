"""A folder of predictions: what is in it, with which settings, and which cases are done.

    manifest.json   settings, images and failures; written before the first case and at the end
    {case}.json     a finished case; written after everything else of it
    predictions.csv, cases.csv   all finished cases, written at the end

A command on such a folder continues it: finished cases stay, unless their image has changed.
"""

import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.data.image_cases import ImageCase, ImageCases
from voxelbridge.core.data.raw_problems import few_of
from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.core.files import read_json, remove_partial_files, write_json
from voxelbridge.detect.evaluate.tables import BoxTable, write_cases, write_predictions

MANIFEST_FILE = "manifest.json"
LOCK_FILE = ".lock"
SCHEMA = 1

Settings = Mapping[str, Any]  # Any: JSON values


@dataclass(frozen=True, eq=False)
class CaseBoxes:
    """Boxes of one case in voxel edges of its original image, best first."""

    boxes: NDArray[np.float64]  # (N, 6)
    scores: NDArray[np.float64]  # (N,)
    labels: NDArray[np.int64]  # (N,)


@contextmanager
def opened(out: Path) -> Iterator[None]:
    """`out` for this process alone; unfinished files are removed at the start and at the end."""
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with this process
        except OSError as error:
            raise DataError(
                f"{out}: another process predicts into it; wait for it or take another folder"
            ) from error
        remove_partial_files(out)
        try:
            yield
        finally:
            remove_partial_files(out)
    finally:
        os.close(descriptor)


def begin(
    out: Path, settings: Settings, found: ImageCases, *, overwrite: bool
) -> tuple[ImageCase, ...]:
    """The cases that wait; ConfigError where `out` holds something else than such predictions."""
    _check_separate(out, found.cases)
    known = _check_settings(out, settings, found.cases, overwrite=overwrite)
    waiting = tuple(case for case in found.cases if overwrite or not _is_done(out, case))
    if overwrite:
        for case in waiting:  # an end half-way must not leave cases of two settings
            case_file(out, case.case_id).unlink(missing_ok=True)
    if len(waiting) < len(found.cases):
        print(
            f"note: {len(found.cases) - len(waiting)} of {len(found.cases)} cases are in {out} "
            "already; --overwrite predicts them again"
        )
    cases = {**known, **_paths(found.cases)}
    _write_manifest(out, settings, cases, errors={}, refused=found.refused, finished=False)
    return waiting


def finish(
    out: Path, settings: Settings, found: ImageCases, errors: Mapping[str, str]
) -> list[str]:
    """Writes the tables of all cases that are done, and the manifest; returns their names."""
    cases: dict[str, list[str]] = read_json(out / MANIFEST_FILE)["cases"]
    for name in errors:  # of an earlier command perhaps
        case_file(out, name).unlink(missing_ok=True)
    names = sorted(name for name in cases if case_file(out, name).is_file())
    boxes = [read_boxes(case_file(out, name)) for name in names]
    table = BoxTable.from_cases(
        [case.boxes for case in boxes],
        [case.labels for case in boxes],
        scores=[case.scores for case in boxes],
    )
    write_cases(out / "cases.csv", names)
    write_predictions(out / "predictions.csv", table, cases=names)
    _write_manifest(out, settings, cases, errors=errors, refused=found.refused, finished=True)
    return names


def case_file(out: Path, case_id: str) -> Path:
    return out / f"{case_id}.json"


def source_of(case: ImageCase) -> dict[str, Any]:
    """What tells whether an image is still the same: where it lies, its bytes, its age."""
    stats = [path.stat() for path in case.files]
    return {
        "paths": [str(path.resolve()) for path in case.paths],
        "num_files": len(stats),
        "num_bytes": sum(found.st_size for found in stats),
        "modified_ns": max(found.st_mtime_ns for found in stats),
    }


def read_boxes(path: Path) -> CaseBoxes:
    """The boxes of a case file, bit for bit as they were written. Raises DataError."""
    content = read_json(path)
    try:
        rows = content["boxes"]
        return CaseBoxes(
            np.array([row["box"] for row in rows], dtype=np.float64).reshape(-1, 6),
            np.array([row["score"] for row in rows], dtype=np.float64),
            np.array([row["label"] for row in rows], dtype=np.int64),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: not a file of `vb-detect predict` ({error}); take another folder"
        ) from error


def _check_separate(out: Path, cases: Sequence[ImageCase]) -> None:
    folder = out.resolve()
    for case in cases:
        if any(folder == path.resolve().parent for path in case.files):
            raise ConfigError(f"{out}: holds the images themselves; take another folder for --out")


def _check_settings(
    out: Path, settings: Settings, cases: Sequence[ImageCase], *, overwrite: bool
) -> dict[str, list[str]]:
    """The cases that `out` knows already."""
    path = out / MANIFEST_FILE
    if not path.is_file():
        done = [case.case_id for case in cases if case_file(out, case.case_id).exists()]
        if done and not overwrite:
            raise ConfigError(
                f"{out}: holds {done[0]}.json but no {MANIFEST_FILE} that tells where it comes "
                "from; take another folder or --overwrite"
            )
        return {}
    before = read_json(path)
    if not isinstance(before, dict) or not isinstance(before.get("cases"), dict):
        raise ConfigError(f"{path}: not a manifest of predictions; take another folder")
    different = [key for key, value in settings.items() if before.get(key) != value]
    stale = sorted(set(before["cases"]) - {case.case_id for case in cases})
    if different and (stale or not overwrite):
        raise ConfigError(
            f"{out}: holds predictions with other settings ({few_of(different)}); "
            + ("take another folder" if stale else "take another folder or --overwrite")
        )
    return before["cases"]


def _is_done(out: Path, case: ImageCase) -> bool:
    path = case_file(out, case.case_id)
    return path.is_file() and read_json(path).get("source") == source_of(case)


def _paths(cases: Sequence[ImageCase]) -> dict[str, list[str]]:
    return {case.case_id: [str(path) for path in case.paths] for case in cases}


def _write_manifest(
    out: Path,
    settings: Settings,
    cases: Mapping[str, Sequence[str]],
    *,
    errors: Mapping[str, str],
    refused: Sequence[str],
    finished: bool,
) -> None:
    write_json(
        out / MANIFEST_FILE,
        {
            "schema": SCHEMA,
            **settings,
            "cases": cases,
            "failed": list(errors),
            "errors": errors,
            "refused": list(refused),
            "finished": finished,
        },
    )
