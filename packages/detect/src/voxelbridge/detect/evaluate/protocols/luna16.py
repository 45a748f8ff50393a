"""The official score of LUNA16: marks in world coordinates, mean sensitivity at seven rates."""

from pathlib import Path
from typing import Any

from voxelbridge.core.files import write_json
from voxelbridge.detect.evaluate.protocols.froc_readings import Reading
from voxelbridge.detect.evaluate.protocols.marks import (
    Cut,
    check_arguments,
    read_findings,
    read_marks,
    read_scans,
    score_marks,
)

PROTOCOL = "LUNA16"
FINDING_COLUMNS = ("seriesuid", "coordX", "coordY", "coordZ", "diameter_mm")
MARK_COLUMNS = ("seriesuid", "coordX", "coordY", "coordZ", "probability")
CUT = Cut(limit=100)


def evaluate_luna16(
    annotations: Path,
    excluded: Path,
    *,
    scans: Path,
    predictions: Path,
    output: Path,
    reading: Reading = "interpolated",
    samples: int = 0,
    seed: int = 0,
) -> dict[str, Any]:  # Any: a JSON object
    """Writes the score of a submission, or of a folder of `vb-detect predict`, to `output`.

    `samples` resamples of the scans give 95 % intervals. Returns what was written.
    """
    check_arguments(output, annotations, excluded, scans, predictions, bootstrap=samples)
    listed = read_scans(scans)
    included = read_findings(annotations, listed, FINDING_COLUMNS, key=str)
    others = read_findings(excluded, listed, FINDING_COLUMNS, key=str)
    marks = read_marks(predictions, listed, MARK_COLUMNS, key=str, case_key=_case_id)
    content = score_marks(
        PROTOCOL, marks, included, others, num_scans=len(listed), cut=CUT, reading=reading,
        samples=samples, seed=seed,
    )  # fmt: skip
    write_json(output, content)
    return content


def _case_id(uid: str) -> str:
    return uid.replace(".", "_")  # as `vb-detect convert luna16` names its cases
