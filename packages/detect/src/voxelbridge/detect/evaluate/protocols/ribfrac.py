"""The official detection score of RibFrac: instance maps and tables, mean recall at five rates.

P predicted instances of all scans.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.data.executor import Failed, map_cases
from voxelbridge.core.data.image_io import describe_grid, read_grid, read_image
from voxelbridge.core.data.raw_problems import few_of
from voxelbridge.core.errors import DataError
from voxelbridge.core.files import write_json
from voxelbridge.detect.evaluate.protocols.froc_readings import protocol_json
from voxelbridge.detect.evaluate.protocols.marks import check_arguments
from voxelbridge.detect.evaluate.protocols.ribfrac_matching import MIN_IOU, ScanMatch, match_scan
from voxelbridge.detect.evaluate.tables import finite_numbers, line_error, read_rows

PROTOCOL = "RibFrac"
KEY_RATES = (0.5, 1.0, 2.0, 4.0, 8.0)  # false positives per scan
TRUTH_TABLE, PREDICTION_TABLE = "ribfrac-gt-info.csv", "ribfrac-pred-info.csv"
UNDEFINED_CODE = -1
MAX_LABEL = 65_535  # a larger number is no instance

Undefined = Literal["count", "ignore"]
Floats = NDArray[np.float64]
Rows = Mapping[str, Mapping[int, float]]  # scan -> instance -> code or confidence


@dataclass(frozen=True, eq=False)
class Predicted:
    """All predicted instances: scan (P,), confidence (P,) or NaN, fracture (P,) hit or 0.

    ignored (P,): neither right nor wrong. num_fractures, num_scans: of all scans.
    """

    scan: NDArray[np.int64]
    confidence: Floats
    fracture: NDArray[np.int64]
    ignored: NDArray[np.bool_]
    num_fractures: int
    num_scans: int


def evaluate_ribfrac(
    ground_truth: Path,
    predictions: Path,
    *,
    output: Path,
    undefined: Undefined = "count",
    workers: int = 2,
) -> dict[str, Any]:  # Any: a JSON object
    """Scores a folder of predictions, writes the result to `output` and returns it.

    `undefined`: whether fractures of code -1 count as all others, as in the official program, or
    are left out together with the predictions that hit them.
    """
    check_arguments(output)
    truth_files, predicted_files = _files(ground_truth), _files(predictions)
    if not truth_files:
        raise DataError(f"{ground_truth}: no ID-label.nii.gz; expected the official label maps")
    for folder, missing in (
        (predictions, set(truth_files) - set(predicted_files)),
        (ground_truth, set(predicted_files) - set(truth_files)),
    ):
        if missing:
            raise DataError(
                f"{folder}: no label map of {few_of(sorted(missing))}, which the other folder has"
            )
    codes = _read_table(_table(ground_truth, TRUTH_TABLE), "label_code")
    confidences = _read_table(_table(predictions, PREDICTION_TABLE), "confidence")
    names = list(truth_files)
    matches: list[ScanMatch] = []
    for outcome in map_cases(
        partial(_match_files, truth_files, predicted_files),
        names,
        workers=workers,
        description="comparing label maps",
    ):
        if isinstance(outcome, Failed):
            raise DataError(f"{outcome.item}: {outcome.error}")
        matches.append(outcome.value)
    found = _collect(names, matches, codes, confidences, undefined)
    sensitivity, counts = score(found)
    facts = {
        "undefined": undefined,
        "num_scans": found.num_scans,
        "num_fractures": found.num_fractures,
        "without_confidence": int(np.isnan(found.confidence).sum()),
    }
    content = protocol_json(PROTOCOL, sensitivity, fppi=KEY_RATES, counts=counts, facts=facts)
    write_json(output, content)
    return content


def score(found: Predicted) -> tuple[Floats, dict[str, int]]:
    """Recall at the key rates and the counts at the lowest threshold, where all pass that can.

    Thresholds 0, 0.01, ... 0.99; an instance passes at its confidence. A fracture is found once
    however many instances hit it.
    """
    passing = ~found.ignored & (found.confidence >= 0)  # NaN does not pass
    hits = passing & (found.fracture > 0)
    false = np.sort(found.confidence[passing & (found.fracture == 0)])
    best: dict[tuple[int, int], float] = {}
    for scan, fracture, confidence in zip(
        found.scan[hits].tolist(), found.fracture[hits].tolist(), found.confidence[hits].tolist(),
        strict=True,
    ):  # fmt: skip
        best[scan, fracture] = max(confidence, best.get((scan, fracture), confidence))
    true = np.sort(np.array(list(best.values()), dtype=np.float64))
    thresholds = np.arange(0, 1, 0.01)
    num_false = len(false) - np.searchsorted(false, thresholds, side="left")
    num_true = len(true) - np.searchsorted(true, thresholds, side="left")
    recall = num_true / max(found.num_fractures, 1)
    sensitivity = recall_at_rates(num_false / found.num_scans, recall)
    return sensitivity, {
        "true_positives": len(true),
        "false_positives": len(false),
        "missed": found.num_fractures - len(true),
        "candidates": len(found.scan),
        "ignored": int((~passing).sum()),
        "duplicates": int(hits.sum()) - len(true),
    }


def recall_at_rates(fppi: Floats, recall: Floats) -> Floats:
    """Recall at the key rates of a curve's points in any order.

    Of points at one rate the highest; linear between rates, 0 below the lowest, the highest recall
    above the highest.
    """
    rates = np.unique(fppi)
    highest = np.array([recall[fppi == rate].max() for rate in rates])
    return np.interp(KEY_RATES, rates, highest, left=0.0, right=float(recall.max()))


def _match_files(
    truth_files: Mapping[str, Path], predicted_files: Mapping[str, Path], name: str
) -> ScanMatch:
    truth, predicted = truth_files[name], predicted_files[name]
    grid, other = read_grid(truth), read_grid(predicted)
    if not grid.agrees_with(other):
        raise DataError(
            f"{predicted}: grid {describe_grid(other)} differs from {truth.name}: "
            f"{describe_grid(grid)}; write predictions with the shape and affine of the truth"
        )
    return match_scan(_read_labels(truth), _read_labels(predicted))


def _read_labels(path: Path) -> NDArray[Any]:
    """Instance numbers (X, Y, Z): the file's own order, in which the program meets components."""
    labels = read_image(path).array[0].transpose()
    whole = labels.dtype.kind != "f" or (np.isfinite(labels) & (np.rint(labels) == labels)).all()
    if not whole:
        raise DataError(f"{path}: label values are not whole numbers")
    low, high = labels.min(), labels.max()
    if low < 0 or high > MAX_LABEL:
        raise DataError(
            f"{path}: got the label {int(low if low < 0 else high)}, expected instances 1 to n "
            f"(at most {MAX_LABEL})"
        )
    return labels.astype(np.uint16, copy=False)


def _files(folder: Path) -> dict[str, Path]:
    """The label maps of a folder by scan: ID-label.nii.gz or ID.nii.gz, also uncompressed."""
    if not folder.is_dir():
        raise DataError(f"{folder}: not a folder")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        parts = re.fullmatch(r"([^.].*?)(-label)?\.nii(\.gz)?", path.name)
        if parts is None or not path.is_file():
            continue
        if parts[1] in found:
            raise DataError(f"{folder}: {found[parts[1]].name} and {path.name} are the same scan")
        found[parts[1]] = path
    return found


def _table(folder: Path, name: str) -> Path:
    if (folder / name).is_file():
        return folder / name
    others = sorted(path for path in folder.glob("*.csv") if not path.name.startswith("."))
    if len(others) == 1:  # the official program takes any name
        return others[0]
    raise DataError(f"{folder}: no {name}" + (f" ({len(others)} other tables)" if others else ""))


def _read_table(path: Path, column: str) -> Rows:
    """`column` of every instance of each scan; rows of label 0, the background, name a scan only.

    A confidence may be empty or NaN.
    """
    rows: dict[str, dict[int, float]] = {}
    for line, (scan, label_text, text) in read_rows(path, ("public_id", "label_id", column)):
        label = _whole(path, line, "label_id", label_text)
        of_scan = rows.setdefault(scan, {})
        if label == 0:
            continue
        if label in of_scan:
            raise line_error(path, line, f"instance {label} of {scan} is there twice; drop one row")
        if column == "confidence":
            empty = text.lower() in ("", "nan")
            of_scan[label] = math.nan if empty else finite_numbers(path, line, [column], [text])[0]
        else:
            of_scan[label] = _whole(path, line, column, text)
    return rows


def _whole(path: Path, line: int, column: str, text: str) -> int:
    (value,) = finite_numbers(path, line, [column], [text])
    if value != int(value) or (column == "label_id" and value < 0):
        raise line_error(path, line, f"{column}: got {text!r}, expected a whole number")
    return int(value)


def _collect(
    names: list[str], matches: list[ScanMatch], codes: Rows, confidences: Rows, undefined: Undefined
) -> Predicted:
    scan, confidence, fracture, ignored = [], [], [], []
    num_fractures = 0
    notes: list[str] = []
    for number, (name, match) in enumerate(zip(names, matches, strict=True)):
        for kind, rows, largest in (
            ("fractures of the truth", codes, match.num_fractures),
            ("predictions", confidences, len(match.iou)),
        ):
            notes += _without_rows(name, rows, largest, kind)
        of_scan = confidences.get(name, {})
        hit = np.where(match.iou > MIN_IOU, match.fracture, 0)
        left_out = np.zeros(match.num_fractures + 1, dtype=bool)
        if undefined == "ignore":
            for label, code in codes.get(name, {}).items():
                if code == UNDEFINED_CODE and label <= match.num_fractures:
                    left_out[label] = True
        scan.append(np.full(len(hit), number, dtype=np.int64))
        fracture.append(hit)
        confidence.append(np.array([of_scan.get(n, math.nan) for n in range(1, len(hit) + 1)]))
        ignored.append(left_out[hit])
        num_fractures += match.num_fractures - int(left_out.sum())
    for note in notes:
        print(f"note: {note}")
    return Predicted(
        np.concatenate(scan), np.concatenate(confidence), np.concatenate(fracture),
        np.concatenate(ignored), num_fractures, len(names),
    )  # fmt: skip


def _without_rows(name: str, rows: Rows, largest: int, kind: str) -> Iterator[str]:
    """A note where instances lack rows; DataError where a scan with instances has no row at all."""
    if largest == 0:
        return
    table = TRUTH_TABLE if "truth" in kind else PREDICTION_TABLE
    if name not in rows:
        raise DataError(f"{name}: its label map has {largest} {kind}, and {table} no row of it")
    if missing := sorted(set(range(1, largest + 1)) - set(rows[name])):
        what = "they count all the same" if "truth" in kind else "they never count"
        yield f"{name}: {kind} {few_of(missing)} have no row in {table}; {what}"
