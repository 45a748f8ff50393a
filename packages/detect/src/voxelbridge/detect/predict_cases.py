"""Prediction for files on disk: any readable images in, tables, world coordinates, pictures out.

Written to OUT: predictions.csv and cases.csv for the whole set (original voxel edges), per case
{case}.json, {case}.mrk.json, {case}.png and, where asked for, {case}.sr.dcm, and manifest.json
(runs, images, settings). Reading and preprocessing of the next case runs in a process of its own
while the network works on this one, and hands it over in files; a broken image fails its case
alone. The same command continues what was interrupted.
"""

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from voxelbridge.core.data.executor import Done, Failed, map_cases
from voxelbridge.core.data.image_cases import ImageCase, ImageCases, find_image_cases
from voxelbridge.core.data.mapping import StoredToOriginal
from voxelbridge.core.data.raw_problems import few_of
from voxelbridge.core.errors import ConfigError, DataError, VoxelbridgeError
from voxelbridge.core.files import sha256_of
from voxelbridge.core.train.distributed import DeviceChoice, choose_device
from voxelbridge.core.train.steps import place
from voxelbridge.detect.build import Detector
from voxelbridge.detect.case_reading import ReadCase, read_case
from voxelbridge.detect.config import DetectConfig
from voxelbridge.detect.detections import Detections
from voxelbridge.detect.dicom_sr import check_extra, write_structured_report
from voxelbridge.detect.outputs import write_case_json, write_slicer_markups
from voxelbridge.detect.overlay import write_overlay
from voxelbridge.detect.plan import Plan
from voxelbridge.detect.post_processing_file import check_same_merging
from voxelbridge.detect.predict import predict_volume
from voxelbridge.detect.prediction_folder import (
    MANIFEST_FILE as MANIFEST_FILE,  # the report imports it from here
)
from voxelbridge.detect.prediction_folder import (
    CaseBoxes,
    begin,
    case_file,
    finish,
    opened,
    source_of,
)
from voxelbridge.detect.scratch import ScratchArray, remove_scratch
from voxelbridge.detect.train import load_run
from voxelbridge.detect.weights import Which, file_of

PREPARED_AHEAD = 1  # cases that are read, or wait, while the network works


@dataclass(frozen=True, eq=False)
class Ensemble:
    """The detectors of several runs on one plan, and the settings that decide their boxes."""

    detectors: Sequence[tuple[Detector, DetectConfig]]
    plan: Plan
    settings: dict[str, Any]  # Any: JSON values


@dataclass(frozen=True)
class Outputs:
    """Which files are written of a case."""

    max_boxes: int = 50  # in the files for viewers; 3D Slicer bears no more
    pictures: bool = True
    dicom_sr: bool = False


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
    weights: Which = "last",
    dicom_sr: bool = False,
    overwrite: bool = False,
) -> None:
    """Predicts every case found in `images` (folders and files) with the ensemble of `runs`.

    Cases that `out` holds already are left unless `overwrite`; other settings than there are a
    ConfigError. `allow` downgrades refusals of DICOM series (see `find_series`). Raises DataError
    at the end if cases failed or series were refused; the others are written.
    """
    outputs = Outputs(max_boxes=max_markups, pictures=pictures, dicom_sr=dicom_sr)
    if dicom_sr:
        check_extra()
    target = choose_device(device)
    ensemble = load_ensemble(runs, weights=weights)
    found = find_image_cases(images, num_channels=len(ensemble.plan.channel_names), allow=allow)
    for line in found.refused:
        print(f"error: {line}", file=sys.stderr)
    if not found.cases:
        raise DataError(f"none of {len(found.refused)} DICOM series can be read")
    settings = {
        "runs": [str(run) for run in runs],
        **ensemble.settings,
        "mirrorings": num_mirrorings,
        "min_score": min_score,
        "max_boxes": outputs.max_boxes,
        "pictures": outputs.pictures,
        "dicom_sr": outputs.dicom_sr,
        "channel_names": list(ensemble.plan.channel_names),
        "class_names": list(ensemble.plan.class_names),
    }
    with opened(out):
        waiting = begin(out, settings, found, overwrite=overwrite)
        _note_other_images(waiting, outputs)
        errors = _predict(
            ensemble, waiting, out, outputs,
            device=target, num_mirrorings=num_mirrorings, min_score=min_score,
        )  # fmt: skip
        written = finish(out, settings, found, errors)
    _report(found, errors, len(waiting), len(written), out)


def load_ensemble(runs: Sequence[Path], *, weights: Which) -> Ensemble:
    """The detectors of `runs`, which must share one prepared store's way of seeing an image."""
    loaded = [load_run(run, weights=weights) for run in runs]
    plan = loaded[0][2]
    for run, (_, _, other) in zip(runs[1:], loaded[1:], strict=True):
        for key in ("class_names", "channel_names", "spacing_mm", "normalization", "resampling"):
            if getattr(other, key) != getattr(plan, key):
                raise ConfigError(
                    f"{run}: its plan has another {key} than {runs[0]}; "
                    "an ensemble needs runs on one prepared store"
                )
    check_same_merging(runs, [config.post_processing for _, config, _ in loaded])
    settings = {
        "weights": weights,
        "weights_sha256": [sha256_of(file_of(run, weights)) for run in runs],
        "post_processing": [
            config.post_processing.model_dump(mode="json") for _, config, _ in loaded
        ],
    }
    return Ensemble([(detector, config) for detector, config, _ in loaded], plan, settings)


def to_original(
    result: Detections, mapping: StoredToOriginal, *, min_score: float = 0.0
) -> CaseBoxes:
    """Boxes in the file's voxel edges, clipped to the image; what is clipped away is dropped."""
    boxes = mapping.boxes_to_original(result.boxes.double().numpy())
    limit = np.tile(np.asarray(mapping.original_grid.shape, dtype=np.float64), 2)
    boxes = np.clip(boxes, 0.0, limit)
    scores = result.scores.double().numpy()
    kept = (boxes[:, 3:] > boxes[:, :3]).all(axis=1) & (scores >= min_score)
    return CaseBoxes(boxes[kept], scores[kept], result.labels.numpy()[kept])


def _predict(
    ensemble: Ensemble,
    waiting: Sequence[ImageCase],
    out: Path,
    outputs: Outputs,
    *,
    device: torch.device,
    num_mirrorings: int,
    min_score: float,
) -> dict[str, str]:
    """Predicts and writes `waiting`; returns why cases failed, each told on stderr."""
    for detector, config in ensemble.detectors:
        place(detector, device, config.precision)
    errors: dict[str, str] = {}
    outcomes = map_cases(
        partial(read_case, ensemble.plan, out, picture=outputs.pictures),
        waiting,
        workers=PREPARED_AHEAD,
        description="predicting",
    )
    for outcome in outcomes:
        case = outcome.item
        try:
            match outcome:
                case Failed(error=error):
                    raise error
                case Done(value=read):
                    with ScratchArray(read.image) as image:
                        result = predict_volume(
                            ensemble.detectors, image, device=device, num_mirrorings=num_mirrorings
                        )
                    boxes = to_original(result, read.mapping, min_score=min_score)
                    _write_case(out, case, boxes, read, ensemble, outputs)
        except VoxelbridgeError as error:
            text = f"{case}: {str(error).removeprefix(f'{case}: ')}"
            print(f"error: {text}", file=sys.stderr)
            errors[case.case_id] = text
        finally:
            remove_scratch(out, case.case_id)
    return errors


def _write_case(
    out: Path,
    case: ImageCase,
    found: CaseBoxes,
    read: ReadCase,
    ensemble: Ensemble,
    outputs: Outputs,
) -> None:
    name, names, grid = case.case_id, ensemble.plan.class_names, read.mapping.original_grid
    boxes, scores, labels = found.boxes, found.scores, found.labels
    write_slicer_markups(
        out / f"{name}.mrk.json", grid=grid, boxes=boxes, scores=scores, labels=labels,
        class_names=names, max_boxes=outputs.max_boxes,
    )  # fmt: skip
    if read.picture is not None:
        with ScratchArray(read.picture) as picture:
            write_overlay(
                out / f"{name}.png", picture, grid=grid, boxes=boxes, scores=scores,
                labels=labels, class_names=names,
            )  # fmt: skip
    if outputs.dicom_sr and case.volume is not None:
        write_structured_report(
            out / f"{name}.sr.dcm", case.volume, boxes=boxes, scores=scores, labels=labels,
            class_names=names, weights=ensemble.settings.get("weights_sha256", []),
            max_boxes=outputs.max_boxes,
        )  # fmt: skip
    write_case_json(  # last: it says that the case is done
        case_file(out, name), name, grid=grid, boxes=boxes, scores=scores, labels=labels,
        class_names=names, source=source_of(case),
    )  # fmt: skip


def _note_other_images(waiting: Sequence[ImageCase], outputs: Outputs) -> None:
    others = [case.case_id for case in waiting if case.volume is None]
    if outputs.dicom_sr and others:
        print(f"note: --dicom-sr: no DICOM series, so no structured report: {few_of(others)}")


def _report(
    found: ImageCases, errors: dict[str, str], num_waiting: int, num_written: int, out: Path
) -> None:
    """DataError where something is missing."""
    if errors:
        raise DataError(
            f"{len(errors)} of {num_waiting} cases failed ({few_of(list(errors))}); "
            f"the other {num_written} are in {out}"
        )
    if found.refused:
        raise DataError(
            f"{len(found.refused)} DICOM series or files were refused; "
            f"the {num_written} cases that could be read are in {out}"
        )
