"""What the page of every pre-training run tells: how far it is, where it ran, its settings."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from voxelbridge.core.config import Config, flatten
from voxelbridge.core.files import read_json
from voxelbridge.core.report.losses import Record

MAX_PICTURE_BYTES = 12_000_000  # of all pictures in one page; base64 makes a third more of it
TIMES = " \N{MULTIPLICATION SIGN} "
NOTHING_RECORDED = '<p class="caution">Nothing was recorded yet.</p>'

Facts = Mapping[str, Any]  # Any: JSON values


def read_if_there(path: Path) -> Facts:
    """The JSON object in `path`; an empty one where the run has no such file."""
    return read_json(path) if path.is_file() else {}


def progress(records: Sequence[Record], steps: int) -> str:
    """Steps recorded so far, of all: `1,200 of 4,000`."""
    done = int(records[-1]["step"]) + 1 if records else 0
    return f"{done:,} of {steps:,}"


def run_notes(*, finished: bool, validated: bool) -> list[str]:
    """What a reader must know of a run that is not finished, or that validated nothing."""
    notes = []
    if not finished:
        notes.append("The run is not finished: the same training command goes on where it stopped.")
    if not validated:
        notes.append("The run has no validation: training losses alone say nothing about others.")
    return notes


def last_value(records: Sequence[Record], key: str) -> float | None:
    """The newest value under `key`; None where no record has one."""
    return next((float(r[key]) for r in reversed(records) if key in r), None)


def start_facts(starts: Sequence[Facts]) -> dict[str, str]:
    """Device of the last start and number of starts, from `environment.json`."""
    if not starts:
        return {}
    last = starts[-1]
    device = ", ".join([str(last.get("device", "")), *last.get("gpus", [])])
    return {"device": device, "starts": str(len(starts))}


def settings_table(config: Config) -> str:
    """Every setting with its dotted key, as HTML."""
    rows = "".join(
        f'<tr><th scope="row">{escape(key)}</th>'
        f'<td class="text">{escape("none" if value is None else str(value))}</td></tr>'
        for key, value in flatten(config.model_dump(mode="json")).items()
    )
    return f'<div class="scroll"><table>{rows}</table></div>'
