"""The charts of a detector: FROC, precision against recall, validation during the training."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.report.charts import Axis, Line, chart_figure, linear_axis
from voxelbridge.detect.evaluate.curves import froc_curve, precision_recall_curve
from voxelbridge.detect.evaluate.froc import FPPI, sensitivity_at_rates
from voxelbridge.detect.report_outcomes import Arm
from voxelbridge.detect.report_tables import FPPI_NAMES, figure_text

MAX_CLASS_CHARTS = 8
LOWEST_FPPI = 1 / 16  # left end of the logarithmic axis, half of the first rate

# What a training measures beside its losses (`validation`), and the titles of the charts.
VALIDATION_TITLES = {
    "val_map_range": "patches: mAP@0.10:0.50",
    "val_map_0.10": "patches: mAP@0.10",
    "val_case_map_range": "whole cases: mAP@0.10:0.50",
    "val_case_map_0.10": "whole cases: mAP@0.10",
    "val_case_froc_0.10": "whole cases: FROC@0.10, mean",
}
NOT_DRAWN = ("val_case_failed",)

Floats = NDArray[np.float64]
Record = Mapping[str, Any]  # Any: one parsed line of metrics.jsonl


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


def validation_charts(runs: Sequence[tuple[str, Sequence[Record]]]) -> str:
    """One chart per figure of the validation with the runs overlaid; empty without any."""
    figures = []
    for name, title in VALIDATION_TITLES.items():
        lines = []
        for style, (run, records) in enumerate(runs):
            by_step = {float(r["step"]): float(r[name]) for r in records if name in r}
            if not by_step:
                continue
            x = np.array(sorted(by_step), dtype=np.float64)
            y = np.array([by_step[step] for step in x.tolist()], dtype=np.float64)
            text = f"{y[-1]:.3f}, highest {y.max():.3f}"
            lines.append(Line(run, text, x, y, style=style, dots=(x, y)))
        if lines:
            steps = linear_axis("optimizer step", [line.x for line in lines])
            figures.append(chart_figure(title, lines, x=steps, y=_share_axis(title)))
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def without_validation_figures(records: Sequence[Record]) -> list[Record]:
    """The records with the losses alone, for the charts of losses."""
    drawn = {*VALIDATION_TITLES, *NOT_DRAWN}
    return [{key: value for key, value in r.items() if key not in drawn} for r in records]


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
    return chart_figure(title, lines, x=x_axis, y=_share_axis("sensitivity"), marker=f"froc-{key}")


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
    return chart_figure(title, lines, x=_share_axis("recall"), y=_share_axis("precision"))


def _share_axis(label: str) -> Axis:
    ticks = [(value / 5, f"{value / 5:g}") for value in range(6)]
    return Axis(label, 0.0, 1.0, ticks)
