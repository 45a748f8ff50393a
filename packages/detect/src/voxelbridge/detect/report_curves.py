"""The charts of a report: losses over steps, FROC and precision against recall."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelbridge.detect.evaluate.froc import FPPI, sensitivity_at_rates
from voxelbridge.detect.evaluate.metrics import froc_curve, precision_recall_curve
from voxelbridge.detect.report_charts import Axis, Line, line_chart, linear_axis, smoothed
from voxelbridge.detect.report_outcomes import Arm
from voxelbridge.detect.report_tables import FPPI_NAMES, figure_text

NOT_A_LOSS = ("step", "epoch", "learning_rate", "seconds")  # keys of metrics.jsonl
MAX_LOSS_CHARTS = 12
SMOOTH_FROM = 25  # records: shorter curves are shown as they are
MAX_CLASS_CHARTS = 8
LOWEST_FPPI = 1 / 16  # left end of the logarithmic axis, half of the first rate

Floats = NDArray[np.float64]
Record = Mapping[str, Any]  # Any: one parsed line of metrics.jsonl


def loss_charts(runs: Sequence[tuple[str, Sequence[Record]]]) -> str:
    """One small chart per loss part with the runs overlaid, the total first."""
    names = dict.fromkeys(key for _, records in runs for r in records for key in _losses(r))
    ordered = sorted(names, key=lambda name: (name != "loss", "val" in name))
    if not ordered:
        return '<p class="soft">No loss was recorded.</p>'
    charts = []
    for name in ordered[:MAX_LOSS_CHARTS]:
        lines = [
            line
            for style, (run, records) in enumerate(runs)
            if (line := _loss_line(run, records, name, style)) is not None
        ]
        x = linear_axis("optimizer step", [line.x for line in lines])
        y = linear_axis(
            name, [part for line in lines for part in (line.y, *(line.faint or ())[1:])]
        )
        charts.append(_figure("total loss" if name == "loss" else name, lines, x=x, y=y))
    note = (
        '<p class="soft">Thin: recorded values; thick: running median over about a tenth of the '
        "run (only of runs with many records)."
    )
    if len(ordered) > MAX_LOSS_CHARTS:
        note += f" {len(ordered) - MAX_LOSS_CHARTS} more loss parts are in metrics.jsonl."
    return f'{note}</p><div class="charts">{"".join(charts)}</div>'


def evaluation_charts(arms: Sequence[Arm], class_names: Sequence[str], *, key: str) -> str:
    """FROC over all classes, then precision against recall of each class, arms overlaid.

    `key` is the IoU threshold as metrics.json writes it, such as "0.10".
    """
    charts = [_froc_chart(arms, key)]
    labels = list(range(len(class_names)))
    if len(labels) > MAX_CLASS_CHARTS:  # the commonest ones, in class order
        counts = np.bincount(arms[0].ground_truth.labels, minlength=len(labels))
        labels = sorted(
            np.argsort(-counts[: len(labels)], kind="stable")[:MAX_CLASS_CHARTS].tolist()
        )
    charts += [_precision_chart(arms, key, label, class_names[label]) for label in labels]
    left_out = len(class_names) - len(labels)
    note = f'<p class="soft">{left_out} rarer classes are not drawn.</p>' if left_out else ""
    return f'<div class="charts">{"".join(charts)}</div>{note}'


def _losses(record: Record) -> list[str]:
    return [
        key
        for key, value in record.items()
        if key not in NOT_A_LOSS and isinstance(value, int | float) and not isinstance(value, bool)
    ]


def _loss_line(run: str, records: Sequence[Record], name: str, style: int) -> Line | None:
    by_step = {int(r["step"]): float(r[name]) for r in records if name in r and "step" in r}
    steps = np.array(sorted(by_step), dtype=np.float64)
    values = np.array([by_step[int(step)] for step in steps], dtype=np.float64)
    keep = np.isfinite(values)
    steps, values = steps[keep], values[keep]
    if not len(values):
        return None
    if len(values) < SMOOTH_FROM:
        return Line(run, f"{values[-1]:.3g}", steps, values, style=style)
    median = smoothed(values, window=2 * (len(values) // 20) + 1)
    return Line(run, f"{median[-1]:.3g}", steps, median, style=style, faint=(steps, values))


def _froc_chart(arms: Sequence[Arm], key: str) -> str:
    lines = []
    for style, arm in enumerate(arms):
        fppi, sensitivity, _ = froc_curve(
            arm.cases, arm.ground_truth, arm.predictions, iou_threshold=float(key)
        )
        if not len(fppi):
            continue
        # Straight between points on the linear axis, as the metric reads it: bent on this one.
        grid = np.geomspace(LOWEST_FPPI, FPPI[-1], 300)
        x = np.union1d(grid, fppi[(fppi >= LOWEST_FPPI) & (fppi <= FPPI[-1])])
        mean = arm.metrics["froc"].get(key, {}).get("pooled", {}).get("mean")
        lines.append(
            Line(
                arm.name,
                figure_text(mean),
                x,
                np.interp(x, fppi, sensitivity),
                style=style,
                dots=(np.array(FPPI), sensitivity_at_rates(fppi, sensitivity)),
            )
        )
    ticks = list(zip(FPPI, FPPI_NAMES, strict=True))
    x_axis = Axis("false positives per image", LOWEST_FPPI, FPPI[-1], ticks, scale="log")
    title = "FROC, all classes (mean of the 7 dots)"
    return _figure(title, lines, x=x_axis, y=_share_axis("sensitivity"), marker=f"froc-{key}")


def _precision_chart(arms: Sequence[Arm], key: str, label: int, class_name: str) -> str:
    lines = []
    for style, arm in enumerate(arms):
        recall, precision, _ = precision_recall_curve(
            arm.cases, arm.ground_truth, arm.predictions, label=label, iou_threshold=float(key)
        )
        if not len(recall):
            continue
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        steps_x = np.repeat(np.concatenate([[0.0], recall]), 2)[1:-1]
        value = arm.metrics["ap"].get(key, {}).get("per_class", {}).get(str(label))
        steps_y = np.repeat(envelope, 2)
        lines.append(Line(arm.name, figure_text(value), steps_x, steps_y, style=style))
    title = f"{class_name}: precision against recall (AP)"
    return _figure(title, lines, x=_share_axis("recall"), y=_share_axis("precision"))


def _share_axis(label: str) -> Axis:
    ticks = [(value / 5, f"{value / 5:g}") for value in range(6)]
    return Axis(label, 0.0, 1.0, ticks)


def _figure(title: str, lines: Sequence[Line], *, x: Axis, y: Axis, marker: str = "") -> str:
    chart = line_chart(title, lines, x=x, y=y, marker=marker)
    return f"<figure><figcaption>{escape(title)}</figcaption>{chart}</figure>"
