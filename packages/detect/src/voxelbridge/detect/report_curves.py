"""The charts of a detector: FROC and precision against recall."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.report.charts import Axis, Line, chart_figure
from voxelbridge.detect.evaluate.froc import FPPI, sensitivity_at_rates
from voxelbridge.detect.evaluate.metrics import froc_curve, precision_recall_curve
from voxelbridge.detect.report_outcomes import Arm
from voxelbridge.detect.report_tables import FPPI_NAMES, figure_text

MAX_CLASS_CHARTS = 8
LOWEST_FPPI = 1 / 16  # left end of the logarithmic axis, half of the first rate

Floats = NDArray[np.float64]


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
