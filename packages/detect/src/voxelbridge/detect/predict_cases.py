"""Prediction for files on disk: any readable images in, tables, world coordinates, pictures out.

Written to OUT: predictions.csv and cases.csv for the whole set (original voxel edges), per case
{case}.json, {case}.mrk.json and {case}.png, and manifest.json (runs, images, settings). Reading and
preprocessing of the next case runs in a process of its own while the network works on this one; a
broken image fails its case alone.
"""

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.data.executor import Done, Failed, map_cases
from voxelbridge.core.data.image_cases import ImageCase, find_image_cases
from voxelbridge.core.data.preprocess import Preprocessed, crop_mapping, preprocess
from voxelbridge.core.data.volume import Grid
from voxelbridge.core.errors import ConfigError, DataError, VoxelbridgeError
from voxelbridge.core.files import write_json
from voxelbridge.core.train.distributed import DeviceChoice, choose_device
from voxelbridge.core.train.steps import place
from voxelbridge.detect.build import Detector
from voxelbridge.detect.config import DetectConfig
from voxelbridge.detect.detections import Detections
from voxelbridge.detect.evaluate.tables import BoxTable, write_cases, write_predictions
from voxelbridge.detect.outputs import write_case_json, write_overlay, write_slicer_markups
from voxelbridge.detect.plan import Plan
from voxelbridge.detect.predict import predict_volume
from voxelbridge.detect.train import load_run

MANIFEST_FILE = "manifest.json"
PREPARED_AHEAD = 1  # cases that wait in memory while the network works


@dataclass(frozen=True, eq=False)
class CaseBoxes:
    """Boxes of one case in voxel edges of its original image, best first."""

    boxes: NDArray[np.float64]  # (N, 6)
    scores: NDArray[np.float64]  # (N,)
    labels: NDArray[np.int64]  # (N,)


def predict_cases(
    runs: Sequence[Path],
    images: Sequence[Path],
    out: Path,
    *,
    device: DeviceChoice = "auto",
    num_mirrorings: int = 1,
    min_score: float = 0.0,
    max_markups: int = 50,
    pictures: bool = True,
    allow: Collection[str] = (),
) -> None:
    """Predicts every case found in `images` (folders and files) with the ensemble of `runs`.

    `allow` downgrades refusals of DICOM series (see `find_series`). Raises DataError at the end
    if cases failed or series were refused; the others are written.
    """
    detectors, plan = _load_ensemble(runs)
    wanted = find_image_cases(images, num_channels=len(plan.channel_names), allow=allow)
    cases = wanted.cases
    for line in wanted.refused:
        print(f"error: {line}", file=sys.stderr)
    if not cases:
        raise DataError(f"none of {len(wanted.refused)} DICOM series can be read")
    target = choose_device(device)
    for detector, config in detectors:
        place(detector, target, config.precision)
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, CaseBoxes] = {}
    failed: list[str] = []
    outcomes = map_cases(
        partial(_read_case, plan), cases, workers=PREPARED_AHEAD, description="predicting"
    )
    for outcome in outcomes:
        try:
            match outcome:
                case Failed(error=error):
                    raise error
                case Done(item=case, value=(picture, prepared)):
                    result = predict_volume(
                        detectors, prepared.image, device=target, num_mirrorings=num_mirrorings
                    )
                    boxes = _to_original(result, prepared, min_score=min_score)
                    _write_case(
                        out, case, boxes, prepared.mapping.original_grid, plan,
                        picture=picture if pictures else None, max_markups=max_markups,
                    )  # fmt: skip
                    found[case.case_id] = boxes
        except VoxelbridgeError as error:
            print(f"error: {error}", file=sys.stderr)
            failed.append(outcome.item.case_id)
    _write_tables(out, found)
    write_json(
        out / MANIFEST_FILE,
        {
            "schema": 1,
            "runs": [str(run) for run in runs],
            "mirrorings": num_mirrorings,
            "min_score": min_score,
            "channel_names": list(plan.channel_names),
            "class_names": list(plan.class_names),
            "cases": {case.case_id: [str(path) for path in case.paths] for case in cases},
            "failed": failed,
            "refused": list(wanted.refused),
        },
    )
    if failed:
        raise DataError(
            f"{len(failed)} of {len(cases)} cases failed ({', '.join(failed[:5])}); "
            f"the other {len(found)} are in {out}"
        )
    if wanted.refused:
        raise DataError(
            f"{len(wanted.refused)} DICOM series or files were refused; "
            f"the {len(found)} cases that could be read are in {out}"
        )


def _load_ensemble(runs: Sequence[Path]) -> tuple[list[tuple[Detector, DetectConfig]], Plan]:
    loaded = [load_run(run) for run in runs]
    plan = loaded[0][2]
    for run, (_, _, other) in zip(runs[1:], loaded[1:], strict=True):
        for key in ("class_names", "channel_names", "spacing_mm", "normalization"):
            if getattr(other, key) != getattr(plan, key):
                raise ConfigError(
                    f"{run}: its plan has another {key} than {runs[0]}; "
                    "an ensemble needs runs on one prepared store"
                )
    return [(detector, config) for detector, config, _ in loaded], plan


def _read_case(plan: Plan, case: ImageCase) -> tuple[NDArray[Any], Preprocessed]:
    """The first channel as stored, for pictures, and what the network sees."""
    volume = case.read()
    mapping = crop_mapping(volume)
    prepared = preprocess(
        volume,
        mapping,
        spacing_mm=plan.spacing_mm,
        normalization=plan.normalization,
        resampling=plan.resampling,
    )
    return volume.array[0], prepared


def _to_original(result: Detections, prepared: Preprocessed, *, min_score: float) -> CaseBoxes:
    """Boxes in the file's voxel edges, clipped to the image; what is clipped away is dropped."""
    boxes = prepared.mapping.boxes_to_original(result.boxes.double().numpy())
    limit = np.tile(np.asarray(prepared.mapping.original_grid.shape, dtype=np.float64), 2)
    boxes = np.clip(boxes, 0.0, limit)
    scores = result.scores.double().numpy()
    kept = (boxes[:, 3:] > boxes[:, :3]).all(axis=1) & (scores >= min_score)
    return CaseBoxes(boxes[kept], scores[kept], result.labels.numpy()[kept])


def _write_case(
    out: Path,
    case: ImageCase,
    boxes: CaseBoxes,
    grid: Grid,
    plan: Plan,
    *,
    picture: NDArray[Any] | None,
    max_markups: int,
) -> None:
    name, names = case.case_id, plan.class_names
    write_case_json(
        out / f"{name}.json", name, grid=grid, boxes=boxes.boxes, scores=boxes.scores,
        labels=boxes.labels, class_names=names,
    )  # fmt: skip
    write_slicer_markups(
        out / f"{name}.mrk.json", grid=grid, boxes=boxes.boxes, scores=boxes.scores,
        labels=boxes.labels, class_names=names, max_boxes=max_markups,
    )  # fmt: skip
    if picture is not None:
        write_overlay(
            out / f"{name}.png", picture.astype(np.float32), grid=grid, boxes=boxes.boxes,
            scores=boxes.scores, labels=boxes.labels, class_names=names,
        )  # fmt: skip


def _write_tables(out: Path, found: dict[str, CaseBoxes]) -> None:
    names = sorted(found)
    table = BoxTable.from_cases(
        [found[name].boxes for name in names],
        [found[name].labels for name in names],
        scores=[found[name].scores for name in names],
    )
    write_cases(out / "cases.csv", names)
    write_predictions(out / "predictions.csv", table, cases=names)
