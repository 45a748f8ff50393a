"""Label maps for image files on disk, in their own grid and orientation, with a picture of each.

Written to OUT: per case {case}.nii.gz (the data set's own label ids) and {case}.png, and
predictions.json (weights, data set, heads, settings, files). What is there is not predicted again.
Reading and preprocessing of the next case runs in a process of its own while the network works on
this one; a case that fails is named and fails alone.
"""

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from voxelbridge.core.data.executor import Done, Failed, map_cases
from voxelbridge.core.data.image_cases import (
    ImageCase,
    ImageCases,
    count_channels,
    find_image_cases,
)
from voxelbridge.core.data.image_io import write_image
from voxelbridge.core.data.mapping import StoredToOriginal
from voxelbridge.core.data.preprocess import Preprocessed, crop_mapping, preprocess
from voxelbridge.core.data.raw_problems import few_of
from voxelbridge.core.data.volume import Volume
from voxelbridge.core.errors import ConfigError, DataError, VoxelbridgeError
from voxelbridge.core.files import read_json, sha256_of, write_json
from voxelbridge.core.train.distributed import DeviceChoice, choose_device
from voxelbridge.core.train.steps import place
from voxelbridge.pretrain_sup.dataset_labels import DatasetLabels
from voxelbridge.pretrain_sup.label_space import Head, LabelSpace
from voxelbridge.pretrain_sup.overlays import write_overlay
from voxelbridge.pretrain_sup.plan import DatasetPlan, StorePlan
from voxelbridge.pretrain_sup.predict import Predictor, merge_heads, predict_labels
from voxelbridge.pretrain_sup.weights import (
    NETWORK_FILE,
    TrainedNetwork,
    read_network,
    read_run,
)

MANIFEST_FILE = "predictions.json"
SCHEMA = 1
ENDING = ".nii.gz"
PREPARED_AHEAD = 1  # cases that wait in memory while the network works


@dataclass(frozen=True)
class PredictionRequest:
    """What a person asks for. None or empty: what the run and the images leave to choose from."""

    dataset: str | None = None  # all heads of it
    heads: tuple[str, ...] = ()  # or some
    stem: str | None = None  # also whose normalisation; None: that of the heads' data set
    mirror: bool = True  # over the axes that were mirrored in training
    overwrite: bool = False
    pictures: bool = True


@dataclass(frozen=True)
class Choice:
    """Whose labels are predicted, and through whose stem."""

    dataset: str
    heads: tuple[str, ...]
    stem: str


def predict_cases(
    run: Path,
    images: Sequence[Path],
    out: Path,
    *,
    request: PredictionRequest | None = None,
    device: DeviceChoice = "auto",
    allow: Collection[str] = (),
) -> int:
    """Predicts every case found in `images` (folders and files); returns how many were predicted.

    `allow` downgrades refusals of DICOM series (see `find_series`). Raises ConfigError where the
    request leaves a choice, and DataError at the end if cases failed or series were refused; the
    others are written.
    """
    request = request or PredictionRequest()
    trained = read_network(run)
    choice = choose(trained.space, request, num_channels=count_channels(images))
    channels = trained.network.encoder.stem_channels[choice.stem]
    found = find_image_cases(images, num_channels=channels, allow=allow)
    predictor = _predictor(trained, choice, request, choose_device(device))
    settings = _settings(run, choice, predictor)
    waiting = _begin(out, settings, found.cases, overwrite=request.overwrite)
    for line in found.refused:
        print(f"error: {line}", file=sys.stderr)
    failed = _predict(predictor, trained.plan, choice, waiting, out, pictures=request.pictures)
    _write_manifest(out, settings, found, failed)
    _report(found, waiting, failed, out)
    return len(waiting) - len(failed)


def choose(space: LabelSpace, request: PredictionRequest, *, num_channels: int) -> Choice:
    """Data set, heads and stem of a request, for images of `num_channels` channels.

    ConfigError lists what there is where the request is not legal or leaves a choice.
    """
    channels = {dataset.name: len(dataset.channels) for dataset in space.datasets}
    known_heads = {head.name: head.dataset for head in space.heads}
    _check_known("--dataset", request.dataset, channels)
    _check_known("--stem", request.stem, channels)
    for head in request.heads:
        _check_known("--head", head, known_heads)
    dataset = request.dataset
    if request.heads:
        owners = list(dict.fromkeys(known_heads[head] for head in request.heads))
        if dataset is not None and owners != [dataset]:
            raise ConfigError(f"--head: {few_of(owners)} is not the --dataset {dataset}")
        if len(owners) > 1:
            raise ConfigError(
                f"--head: heads of {few_of(owners)}, whose label ids mean different things; "
                "predict one data set at a time, each into a folder of its own"
            )
        dataset = owners[0]
    elif dataset is None:
        dataset = request.stem or _only_dataset(space, num_channels)
    heads = request.heads or tuple(head.name for head in space.heads_of(dataset))
    return Choice(dataset, tuple(dict.fromkeys(heads)), request.stem or dataset)


def written_names(heads: Sequence[Head], *, overlapping: bool) -> dict[int, str]:
    """The label ids that `heads` write, by id, with the names of their targets."""
    names: dict[int, list[str]] = {}
    sizes = [len(head.targets) + (not head.regions) for head in heads]
    first = 0
    for head, size in zip(heads, sizes, strict=True):
        for number, target in enumerate(head.targets):
            certain = torch.zeros(sum(sizes), 1)
            certain[first + number + (not head.regions)] = 1.0
            written = int(merge_heads(heads, certain, overlapping=overlapping))
            names.setdefault(written, []).append(target.name)
        first += size
    return {number: ", ".join(names[number]) for number in sorted(names)}


def to_original(
    labels: NDArray[np.unsignedinteger[Any]], mapping: StoredToOriginal
) -> NDArray[np.unsignedinteger[Any]]:
    """Labels on the crop of `mapping` (its `crop_shape`) in the file's whole array, 0 outside."""
    whole = np.zeros(mapping.reorientation.target_shape, dtype=labels.dtype)
    (z, y, x), (d, h, w) = mapping.crop_start, mapping.crop_shape
    whole[z : z + d, y : y + h, x : x + w] = labels
    return np.ascontiguousarray(mapping.reorientation.inverse().apply_array(whole))


def learnt_labels(run: Path, predictions: Path) -> DatasetLabels:
    """What a run learnt of the data set that `predictions` (a folder of this module) are of."""
    _, space, _ = read_run(run)
    if len(space.datasets) == 1:
        return next(iter(space.datasets))
    path = predictions / MANIFEST_FILE
    dataset = read_json(path).get("dataset")
    if dataset not in [labels.name for labels in space.datasets]:
        raise DataError(f"{path}: of data set {dataset!r}, which {run} does not know")
    return space.dataset(dataset)


def _check_known(option: str, name: str | None, known: Collection[str]) -> None:
    if name is not None and name not in known:
        raise ConfigError(f"{option} {name}: the run has {few_of(list(known), limit=12)}")


def _only_dataset(space: LabelSpace, num_channels: int) -> str:
    if len(space.datasets) == 1:
        return space.datasets[0].name
    listed = {d.name: f"{d.name} ({', '.join(d.channels)})" for d in space.datasets}
    fitting = [d.name for d in space.datasets if len(d.channels) == num_channels]
    if len(fitting) == 1:
        return fitting[0]
    number = f"{num_channels} channel" + ("s" if num_channels > 1 else "")
    if not fitting:
        raise ConfigError(
            f"the images have {number}; the run has no such data set but "
            f"{few_of(list(listed.values()), limit=12)}"
        )
    raise ConfigError(
        f"{len(fitting)} data sets of the run have {number}: "
        f"{few_of([listed[name] for name in fitting], limit=12)}; choose with --dataset NAME"
    )


def _predictor(
    trained: TrainedNetwork, choice: Choice, request: PredictionRequest, device: torch.device
) -> Predictor:
    config, augmentation = trained.config, trained.config.augmentation
    mirrored = request.mirror and augmentation.mirror_probability > 0
    place(trained.network, device, config.precision)
    return Predictor.build(
        trained.network,
        trained.space,
        heads=choice.heads,
        stem=choice.stem,
        patch_size=config.patch_size,
        device=device,
        precision=config.precision,
        mirror_axes=augmentation.mirror_axes if mirrored else (),
    )


def _predict(
    predictor: Predictor,
    plan: StorePlan,
    choice: Choice,
    cases: Sequence[ImageCase],
    out: Path,
    *,
    pictures: bool,
) -> list[str]:
    """Predicts and writes `cases`; returns those that failed, each named on stderr."""
    names = written_names(predictor.heads, overlapping=predictor.overlapping)
    failed: list[str] = []
    read = partial(_read_case, plan, plan.datasets[choice.stem])
    outcomes = map_cases(read, cases, workers=PREPARED_AHEAD, description="predicting")
    for outcome in outcomes:
        try:
            match outcome:
                case Failed(error=error):
                    raise error
                case Done(item=case, value=(picture, prepared)):
                    mapping = prepared.mapping
                    found = predict_labels(predictor, prepared.image, shape=mapping.crop_shape)
                    labels = to_original(found, mapping)
                    grid = mapping.original_grid
                    if pictures:  # first: the label map says that the case is done
                        overlay = out / f"{case.case_id}.png"
                        write_overlay(overlay, picture, labels, grid=grid, names=names)
                    write_image(out / f"{case.case_id}{ENDING}", Volume(labels[None], grid))
        except VoxelbridgeError as error:
            text = str(error).removeprefix(f"{outcome.item}: ")
            print(f"error: {outcome.item}: {text}", file=sys.stderr)
            failed.append(outcome.item.case_id)
    return failed


def _read_case(
    plan: StorePlan, dataset: DatasetPlan, case: ImageCase
) -> tuple[NDArray[Any], Preprocessed]:
    """The first channel as stored, for the picture, and what the network sees."""
    volume = case.read()
    prepared = preprocess(
        volume,
        crop_mapping(volume),
        spacing_mm=plan.spacing_mm,
        normalization=dataset.normalization,
        resampling=plan.resampling,
    )
    return volume.array[0], prepared


def _settings(run: Path, choice: Choice, predictor: Predictor) -> dict[str, Any]:
    """What decides a prediction; two calls on one folder must agree in it."""
    names = written_names(predictor.heads, overlapping=predictor.overlapping)
    return {
        "weights_sha256": sha256_of(run / "checkpoints" / NETWORK_FILE),
        "dataset": choice.dataset,
        "heads": list(choice.heads),
        "stem": choice.stem,
        "mirror_axes": list(predictor.mirror_axes),
        "overlap": predictor.overlap,
        "labels": {str(number): name for number, name in names.items()},
    }


def _begin(
    out: Path, settings: dict[str, Any], cases: Sequence[ImageCase], *, overwrite: bool
) -> list[ImageCase]:
    """The cases that wait; ConfigError where `out` holds something else than such predictions."""
    folder = out.resolve()
    for case in cases:
        if any(folder in (path.resolve(), path.resolve().parent) for path in case.paths):
            raise ConfigError(f"{out}: holds the images themselves; take another folder for --out")
    done = {case.case_id for case in cases if (out / f"{case.case_id}{ENDING}").exists()}
    path = out / MANIFEST_FILE
    if path.is_file():
        before = read_json(path)
        different = [key for key, value in settings.items() if before.get(key) != value]
        stale = set(before.get("cases", {})) - {case.case_id for case in cases}
        if different and (stale or not overwrite):
            raise ConfigError(
                f"{out}: holds predictions with other settings ({few_of(different)}); take another "
                "folder" + ("" if stale else " or --overwrite")
            )
    elif done and not overwrite:
        raise ConfigError(
            f"{out}: holds {sorted(done)[0]}{ENDING} but no {MANIFEST_FILE} that tells where it "
            "comes from; take another folder or --overwrite"
        )
    waiting = [case for case in cases if overwrite or case.case_id not in done]
    if len(waiting) < len(cases):
        print(
            f"note: {len(cases) - len(waiting)} of {len(cases)} cases are in {out} already; "
            "--overwrite predicts them again"
        )
    out.mkdir(parents=True, exist_ok=True)
    if overwrite:
        for case in waiting:  # an end half-way must not leave maps of two settings
            (out / f"{case.case_id}{ENDING}").unlink(missing_ok=True)
    known = read_json(path).get("cases", {}) if path.is_file() else {}
    write_json(path, {"schema": SCHEMA, **settings, "cases": known})
    return waiting


def _write_manifest(
    out: Path, settings: dict[str, Any], found: ImageCases, failed: Sequence[str]
) -> None:
    path = out / MANIFEST_FILE
    cases: dict[str, list[str]] = read_json(path)["cases"]
    for case in found.cases:
        if case.case_id in failed:
            cases.pop(case.case_id, None)
        else:
            cases[case.case_id] = [str(file) for file in case.paths]
    content = {"cases": cases, "failed": list(failed), "refused": list(found.refused)}
    write_json(path, {"schema": SCHEMA, **settings, **content})


def _report(
    found: ImageCases, waiting: Sequence[ImageCase], failed: Sequence[str], out: Path
) -> None:
    """DataError where something is missing."""
    written = len(found.cases) - len(failed)
    if failed:
        raise DataError(
            f"{len(failed)} of {len(waiting)} cases failed ({few_of(failed)}); "
            f"the other {written} are in {out}"
        )
    if found.refused:
        raise DataError(
            f"{len(found.refused)} DICOM series or files were refused; "
            f"the {written} cases that could be read are in {out}"
        )
