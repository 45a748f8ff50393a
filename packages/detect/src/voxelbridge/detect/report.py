"""One self-contained HTML page about detection runs: figures, curves, worst errors, every case.

Nothing is loaded from anywhere: style, script, charts and pictures are inside the file. What a
person sees without JavaScript are the tables, charts and lists; the case viewer needs it.
"""

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from voxelbridge.core.files import atomic_write
from voxelbridge.core.report.losses import loss_charts, training_charts
from voxelbridge.core.report.page import Section, html_page, notes_list
from voxelbridge.detect.report_curves import (
    evaluation_charts,
    validation_charts,
    without_validation_figures,
)
from voxelbridge.detect.report_images import CaseImage
from voxelbridge.detect.report_outcomes import (
    FALSE,
    Arm,
    Finding,
    Outcomes,
    assess,
    worst_errors,
)
from voxelbridge.detect.report_tables import (
    class_table,
    figure_text,
    froc_table,
    summary_table,
)
from voxelbridge.detect.report_viewer import viewer_content

__all__ = ["Arm", "CaseImage", "write_report"]

MAX_ERRORS = 25  # per arm, in the list of worst errors


def write_report(
    path: Path,
    *,
    title: str,
    arms: Sequence[Arm],
    pretraining_records: Sequence[Mapping[str, Any]],
    case_images: Sequence[CaseImage],
    class_names: Sequence[str],
    facts: Mapping[str, str],
    notes: Sequence[str] = (),
) -> None:
    """Writes the page to `path`, atomically. `arms` needs one entry at least, each with its name.

    Pictures of the cases with the worst errors come first, until the page holds 4.5 MB of them;
    cases without a `CaseImage` are listed without pictures.
    """
    names = [arm.name for arm in arms]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"a report needs arms of different names, got {names}")
    keys = [key for key in arms[0].metrics["ap"] if ":" not in key]
    outcomes = [
        {key: assess(arm.ground_truth, arm.predictions, iou=float(key)) for key in keys}
        for arm in arms
    ]
    content = viewer_content(arms, outcomes, case_images, class_names)
    sections = [
        Section("result", "Result", _result(arms, class_names, notes)),
        Section("curves", "Curves", _curves(arms, class_names, keys)),
        Section("cases", "Cases", _viewer(content)),
        Section("errors", "Worst errors", _errors(arms, outcomes, class_names, keys[0])),
        Section("training", "Training", _training(arms, pretraining_records)),
    ]
    page = html_page(
        title,
        sections,
        lede=_lede(arms),
        facts=facts,
        distribution="voxelbridge-detect",
        style=(files("voxelbridge.detect") / "report_assets" / "report.css").read_text("utf-8"),
        tail=_tail(content),
    )
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _tail(content: Mapping[str, Any]) -> str:
    script = (files("voxelbridge.detect") / "report_assets" / "report.js").read_text("utf-8")
    return (
        f'<script type="application/json" id="report-data">{_script_json(content)}</script>\n'
        f"<script>\n{script}</script>\n"
    )


def _lede(arms: Sequence[Arm]) -> str:
    cases, objects = arms[0].metrics["num_cases"], arms[0].metrics["num_objects"]
    figures = "; ".join(
        f"<strong>{escape(arm.name)}</strong> mAP@0.1 {figure_text(_map_at_first(arm))}"
        for arm in arms
    )
    return f"{_count(cases, 'test case')} with {_count(objects, 'object')}. {figures}."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _map_at_first(arm: Arm) -> float | None:
    return arm.metrics["ap"]["0.10"]["map"]


def _result(arms: Sequence[Arm], class_names: Sequence[str], notes: Sequence[str]) -> str:
    names, metrics = [arm.name for arm in arms], [arm.metrics for arm in arms]
    labels = arms[0].ground_truth.labels
    objects = [int((labels == index).sum()) for index in range(len(class_names))]
    parts = [summary_table(names, metrics)]
    if len(arms) > 1:
        parts.append(
            '<p class="caution">Each row is one training run on one split. Runs that differ in '
            "nothing but the seed often differ by as much as the rows here, so this table is no "
            "evidence that pre-training helps or harms; that takes several seeds and many more "
            "cases.</p>"
        )
    parts.append(froc_table(names, metrics, next(iter(metrics[0]["froc"]))))
    parts.append(class_table(names, metrics, class_names, objects))
    parts.append(notes_list(notes))
    return "".join(parts)


def _curves(arms: Sequence[Arm], class_names: Sequence[str], keys: Sequence[str]) -> str:
    parts = []
    for number, key in enumerate(keys):
        state = " open" if number == 0 else ""
        parts.append(
            f"<details{state}><summary>IoU {float(key):g}</summary>"
            f"{evaluation_charts(arms, class_names, key=key)}</details>"
        )
    rings = "Rings on the FROC curves: where the score thresholds of the case viewer stand."
    return f'<p class="soft">{rings}</p>{"".join(parts)}'


def _training(arms: Sequence[Arm], pretraining_records: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    if pretraining_records:
        parts.append("<h3>Pre-training</h3>")
        parts.append(training_charts(pretraining_records))
    parts.append("<h3>Fine-tuning</h3>")
    curves = [curve for arm in arms for curve in _trainings(arm, alone=len(arms) == 1)]
    figures = validation_charts(curves)
    if figures:
        parts.append(f"<h4>Validation</h4>{figures}<h4>Losses</h4>")
    losses = [(name, without_validation_figures(records)) for name, records in curves]
    parts.append(loss_charts(losses))
    return "".join(parts)


def _trainings(arm: Arm, *, alone: bool) -> list[tuple[str, Sequence[Mapping[str, Any]]]]:
    """The records of the arm's run, or of every fold's."""
    prefix = "" if alone else f"{arm.name} "
    folds = [(f"{prefix}{name}", records) for name, records in arm.folds.items()]
    return folds or [(arm.name, arm.records)]


def _errors(
    arms: Sequence[Arm],
    outcomes: Sequence[Mapping[str, Outcomes]],
    class_names: Sequence[str],
    key: str,
) -> str:
    parts = [
        f'<p class="soft">At IoU {float(key):g}, whatever the score: first objects that no '
        "prediction found, the largest on top, then false positives by score. The links lead into "
        f"the viewer. At most {MAX_ERRORS} per arm.</p>",
        '<div class="columns">',
    ]
    for arm, outcome in zip(arms, [each[key] for each in outcomes], strict=True):
        missed = int((outcome.found_by < 0).sum())
        false = int((outcome.matched == FALSE).sum())
        findings = worst_errors(arm.ground_truth, arm.predictions, outcome, limit=MAX_ERRORS)
        rows = "".join(_error_row(arm, finding, class_names, key) for finding in findings)
        body = rows or '<tr><td colspan="6" class="text">No error.</td></tr>'
        heads = ("error", "why", "case", "class", "score", "voxels z &times; y &times; x")
        head = "".join(f'<th scope="col">{text}</th>' for text in heads)
        parts.append(
            f"<div><h3>{escape(arm.name)}: {missed} missed, {false} false</h3>"
            f'<div class="scroll"><table class="errors"><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div></div>"
        )
    return "".join(parts) + "</div>"


def _error_row(arm: Arm, finding: Finding, class_names: Sequence[str], key: str) -> str:
    case = arm.cases[finding.case_index]
    target = f"{'t' if finding.kind == 'missed' else 'p'}{finding.row}"
    link = urlencode({"case": case, "arm": arm.name, "iou": key, "object": target})
    size = " &times; ".join(f"{round(finding.box[k + 3] - finding.box[k], 1):g}" for k in range(3))
    cells = (
        f'<a href="#{escape(link)}">{finding.kind}</a>',
        escape(finding.reason),
        escape(case),
        escape(_class_name(class_names, finding.label)),
        "" if finding.score is None else f"{finding.score:.3f}",
        size,
    )
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _class_name(class_names: Sequence[str], label: int) -> str:
    return class_names[label] if label < len(class_names) else f"class {label}"


def _viewer(content: Mapping[str, Any]) -> str:
    if not content["cases"]:
        return '<p class="soft">No case was evaluated.</p>'
    template = files("voxelbridge.detect") / "report_assets" / "viewer.html"
    return template.read_text(encoding="utf-8")


def _script_json(content: Mapping[str, Any]) -> str:
    """JSON that no HTML parser can take for markup."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
