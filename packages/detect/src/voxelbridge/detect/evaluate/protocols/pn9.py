"""The score of PN9 as its authors' program (SANet) computes it: LUNA16's with other settings."""

import re
from pathlib import Path
from typing import Any

from voxelbridge.core.files import write_json
from voxelbridge.detect.evaluate.protocols.froc_readings import Reading
from voxelbridge.detect.evaluate.protocols.marks import (
    Cut,
    Findings,
    check_arguments,
    read_findings,
    read_marks,
    read_scans,
    score_marks,
)

PROTOCOL = "PN9"
FINDING_COLUMNS = ("pid", "center_x", "center_y", "center_z", "diameter")
MARK_COLUMNS = ("pid", "center_x", "center_y", "center_z", "probability")
CUT = Cut(limit=300, slack=1e-8)


def evaluate_pn9(
    annotations: Path,
    *,
    scans: Path,
    predictions: Path,
    output: Path,
    reading: Reading = "next",
    samples: int = 0,
    seed: int = 0,
) -> dict[str, Any]:  # Any: a JSON object
    """Writes the score of a table of detections, or of a folder of `vb-detect predict`.

    Positions are voxel centres of the 1 mm volumes in x, y, z. `samples` resamples of the scans
    give 95 % intervals. Returns what was written to `output`.
    """
    check_arguments(output, annotations, scans, predictions, bootstrap=samples)
    listed = read_scans(scans, key=pid_of)
    nodules = read_findings(annotations, listed, FINDING_COLUMNS, key=pid_of)
    marks = read_marks(predictions, listed, MARK_COLUMNS, key=pid_of, case_key=pid_of)
    content = score_marks(
        PROTOCOL, marks, nodules, Findings.none(), num_scans=len(listed), cut=CUT, reading=reading,
        samples=samples, seed=seed,
    )  # fmt: skip
    write_json(output, content)
    return content


def pid_of(text: str) -> str:
    """The scan that a pid names: numbers without leading zeros (0012, 12, 12.0), else the text."""
    number = re.fullmatch(r"0*(\d+)(\.0*)?", text.strip(), flags=re.ASCII)
    return number[1] if number else text.strip()
