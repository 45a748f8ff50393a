"""Dice and surface distances of predicted label maps against references, per case and target.

Everything is measured on the grid of the reference file, with its spacing. The files:
docs/methods/multitalent.md, section Evaluation.
"""

import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from voxelbridge.core.data.dataset import RawCase, RawDataset
from voxelbridge.core.data.executor import Failed, map_cases
from voxelbridge.core.data.image_io import image_ending, image_stem, read_grid, read_image
from voxelbridge.core.data.raw_objects import values_of
from voxelbridge.core.data.raw_problems import few_of, grid_differences
from voxelbridge.core.data.volume import match_grid
from voxelbridge.core.errors import DataError
from voxelbridge.core.files import atomic_write, write_json
from voxelbridge.pretrain_sup.dataset_labels import (
    DatasetLabels,
    Target,
    check_values,
    read_dataset_labels,
    read_segmentation,
    unreadable_paint,
)
from voxelbridge.pretrain_sup.mask_scores import MaskScores, compare_labels

SCHEMA = 1
TABLE_NAME, SUMMARY_NAME = "scores.csv", "scores.json"
MEASURES = ("dice", "assd_mm", "hd95_mm")
COLUMNS = ("case_id", "target", "reference_voxels", "predicted_voxels", *MEASURES)


@dataclass(frozen=True)
class LabelSource:
    """Reference label maps: what they label, and the cases that have one."""

    labels: DatasetLabels
    cases: tuple[RawCase, ...]

    @classmethod
    def of_dataset(cls, folder: Path, *, labels: DatasetLabels | None = None) -> "LabelSource":
        """The labelled training and test cases of a raw data set.

        `labels` None: those of its dataset.json; give them where a declaration changed them.
        """
        dataset = RawDataset.open(folder)
        found = read_dataset_labels(folder) if labels is None else labels
        cases = (*dataset.cases, *dataset.test_cases)
        return cls(found, tuple(case for case in cases if case.has_labels))

    @classmethod
    def of_folder(cls, folder: Path, labels: DatasetLabels) -> "LabelSource":
        """A folder of label maps `{case}.nii.gz` (or another ending), without their images."""
        paths = _label_maps(folder)
        count = len(labels.class_ids)
        cases = []
        for case_id, path in paths.items():
            objects = folder / f"{case_id}.json"
            beside = objects if objects.is_file() else None
            cases.append(RawCase(case_id, (path,), path, beside, (), count))
        return cls(labels, tuple(cases))


def evaluate_folder(
    labels: LabelSource,
    predictions: Path,
    *,
    output: Path | None = None,
    targets: Sequence[str] | None = None,
    workers: int = 0,
) -> dict[str, Any]:  # Any: a JSON object
    """Compares `predictions`/{case}.nii.gz (or another ending) with the references of `labels`.

    Predictions hold label ids of the data set. Cases without a prediction are counted, not scored;
    a prediction without a reference is an error, and so is a grid that differs. `targets` names
    what is compared (None: everything). Returns the summary; with `output` (a folder) it is written
    there as scores.json, and the table of cases as scores.csv. `workers` 0: in this process. Raises
    DataError naming the case; then nothing is written.
    """
    return evaluate_files(
        labels,
        predictions,
        output=None if output is None else output / SUMMARY_NAME,
        table=None if output is None else output / TABLE_NAME,
        targets=targets,
        workers=workers,
    )


def evaluate_files(
    labels: LabelSource,
    predictions: Path,
    *,
    output: Path | None = None,
    table: Path | None = None,
    targets: Sequence[str] | None = None,
    workers: int = 0,
) -> dict[str, Any]:  # Any: a JSON object
    """As `evaluate_folder`; the summary goes to the file `output`, the rows to `table` (CSV)."""
    chosen = _chosen(labels.labels, targets)
    if warning := unreadable_paint(labels.labels):
        print(f"warning: {warning}", file=sys.stderr)
    references = {case.case_id: case for case in labels.cases}
    predicted = _label_maps(predictions)
    if unknown := sorted(set(predicted) - set(references)):
        raise DataError(
            f"{predictions}: no reference label for {few_of(unknown)}; data set "
            f"{labels.labels.name} has {few_of(sorted(references))}"
        )
    if not predicted:
        raise DataError(f"{predictions}: no predicted label map; expected one file per case")
    pairs = [_Pair(references[case_id], path) for case_id, path in sorted(predicted.items())]
    compare = _Comparison(labels.labels, chosen)
    rows: dict[str, list[MaskScores]] = {}
    for done in map_cases(compare, pairs, workers=workers, description="evaluate"):
        if isinstance(done, Failed):
            text = str(done.error)
            named = text.startswith(str(done.item.reference))
            raise DataError(text if named else f"{done.item.reference}: {text}") from done.error
        rows[done.item.reference.case_id] = done.value
    summary = summarise(rows, chosen, labels.labels.name)
    summary["num_without_prediction"] = len(references) - len(predicted)
    if table is not None:
        _write_table(table, rows, chosen)
    if output is not None:
        write_json(output, summary)
    return summary


def summarise(
    table: Mapping[str, Sequence[MaskScores]], targets: Sequence[Target], dataset: str
) -> dict[str, Any]:  # Any: a JSON object
    """Means per target over the cases where a measure is defined, and the means of those means.

    A target absent from reference and prediction is no case of it; absent from one, it has Dice 0
    and no distance, and is counted as missed or spurious.
    """
    of_target: dict[str, dict[str, Any]] = {}
    for number, target in enumerate(targets):
        scores = [row[number] for row in table.values()]
        present = [score for score in scores if score.dice is not None]
        of_target[target.name] = {
            "num_cases": len(present),
            "num_missed": sum(score.predicted_voxels == 0 for score in present),
            "num_spurious": sum(score.reference_voxels == 0 for score in present),
            "num_absent": len(scores) - len(present),
            **{key: _mean([getattr(score, key) for score in scores]) for key in MEASURES},
        }
    return {
        "schema": SCHEMA,
        "dataset": dataset,
        "num_cases": len(table),
        "mean": {key: _mean([row[key] for row in of_target.values()]) for key in MEASURES},
        "targets": of_target,
    }


def describe_summary(summary: Mapping[str, Any]) -> str:  # Any: a JSON object
    """The summary as a table to read: a row per target, then the means."""
    heads = ("target", "cases", "missed", "spurious", "Dice", "ASSD mm", "HD95 mm")
    counts = ("num_cases", "num_missed", "num_spurious")
    rows: list[tuple[str, ...]] = [heads]
    for name, scores in summary["targets"].items():
        rows.append((name, *(str(scores[key]) for key in counts), *_shown(scores)))
    rows.append(("mean", "", "", "", *_shown(summary["mean"])))
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    without = summary.get("num_without_prediction", 0)
    note = f", {without} without a prediction" if without else ""
    return "\n".join([*lines, f"{summary['dataset']}: {summary['num_cases']} cases{note}"])


@dataclass(frozen=True)
class _Pair:
    reference: RawCase
    prediction: Path

    def __str__(self) -> str:
        return str(self.reference)


@dataclass(frozen=True)
class _Comparison:
    """One case's scores; a class so that other processes can be given it."""

    labels: DatasetLabels
    targets: tuple[Target, ...]

    def __call__(self, pair: _Pair) -> list[MaskScores]:
        case = pair.reference
        own = case.label_path
        grid = case.read_grid() if own is None or not own.exists() else read_grid(own)
        reference = read_segmentation(case, self.labels, grid)
        volume = read_image(pair.prediction)
        matched = match_grid(volume, grid)
        if matched is None:
            differences = "; ".join(grid_differences(volume.grid, grid))
            raise DataError(
                f"{case}: grid of {pair.prediction.name} differs from the reference's: "
                f"{differences}; predict on the original grid"
            )
        predicted = matched.array[0]
        if predicted.dtype.kind not in "iu":
            whole = np.rint(predicted)
            if not np.array_equal(whole, predicted):
                raise DataError(
                    f"{case}: {pair.prediction.name} holds values that are no label ids"
                )
            predicted = whole.astype(np.int64)
        check_values(self.labels, values_of(predicted), where=f"{case}: {pair.prediction.name}")
        ids = [target.ids for target in self.targets]
        spacing, uncounted = grid.spacing_mm, self.labels.uncounted
        return compare_labels(reference, predicted, ids, spacing, uncounted=uncounted)


def _chosen(labels: DatasetLabels, names: Sequence[str] | None) -> tuple[Target, ...]:
    return labels.targets if names is None else tuple(labels.target(name) for name in names)


def _label_maps(folder: Path) -> dict[str, Path]:
    """Image files of a folder by case."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected one label map per case")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or image_ending(path.name) is None:
            continue
        if (other := found.setdefault(image_stem(path.name), path)) != path:
            raise DataError(f"{folder}: {other.name} and {path.name} are of one case; keep one")
    return found


def _shown(scores: Mapping[str, float | None]) -> list[str]:
    values = [(scores[key], digits) for key, digits in zip(MEASURES, (3, 2, 2), strict=True)]
    return ["-" if value is None else f"{value:.{digits}f}" for value, digits in values]


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


def _write_table(
    path: Path, table: Mapping[str, Sequence[MaskScores]], targets: Sequence[Target]
) -> None:
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(COLUMNS)
        for case_id, row in table.items():
            for target, score in zip(targets, row, strict=True):
                values = [getattr(score, column) for column in COLUMNS[2:]]
                writer.writerow([case_id, target.name, *("" if v is None else v for v in values)])
