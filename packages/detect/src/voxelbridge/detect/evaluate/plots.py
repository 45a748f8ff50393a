"""Pictures of an evaluation as SVG files: FROC, precision against recall, scores."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from voxelbridge.core.files import atomic_write
from voxelbridge.core.report.charts import HEIGHT, WIDTH, Axis, Line, line_chart, linear_axis
from voxelbridge.detect.evaluate.curves import froc_curve, precision_recall_curve
from voxelbridge.detect.evaluate.tables import BoxTable

TITLE_HEIGHT = 24
MAX_CLASSES = 8  # curves of single classes drawn, the commonest ones

Metrics = Mapping[str, Any]  # Any: a metrics.json object


def write_plots(
    folder: Path,
    cases: Sequence[str],
    ground_truth: BoxTable,
    predictions: BoxTable,
    *,
    metrics: Metrics,
) -> None:
    """Writes froc.svg, precision_recall_{class}.svg and scores_{iou}.svg to `folder`.

    Curves at every IoU threshold of FROC; with a bootstrap, sensitivities with their intervals.
    """
    tables = (cases, ground_truth, predictions)
    pictures = {"froc.svg": _froc(*tables, metrics)}
    counts = np.bincount(ground_truth.labels, minlength=metrics["num_classes"])
    commonest = np.argsort(-counts, kind="stable")[:MAX_CLASSES]
    for label in sorted(commonest.tolist()):
        pictures[f"precision_recall_{label}.svg"] = _precision_recall(*tables, metrics, label)
    for key in metrics["froc"]:
        pictures[f"scores_{key}.svg"] = _scores(metrics["score_histogram"], key)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pictures.items():
        with atomic_write(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _froc(
    cases: Sequence[str], ground_truth: BoxTable, predictions: BoxTable, metrics: Metrics
) -> str:
    rates = np.array(metrics["fppi"])
    low, high = float(rates[0]) / 2, float(max(rates[-1], rates[0] * 2))
    lines: list[Line] = []
    for style, (key, content) in enumerate(metrics["froc"].items()):
        fppi, sensitivity, _ = froc_curve(
            cases, ground_truth, predictions, iou_threshold=float(key)
        )
        if not len(fppi):
            continue
        x = np.union1d(np.geomspace(low, high, 300), fppi[(fppi >= low) & (fppi <= high)])
        pooled = content["pooled"]
        dots = np.array([np.nan if v is None else v for v in pooled["sensitivity"]])
        name = f"IoU {key}"
        y = np.interp(x, fppi, sensitivity)
        seen = ~np.isnan(dots)
        lines.append(Line(name, _text(pooled["mean"]), x, y, style, dots=(rates[seen], dots[seen])))
    lines += _bounds(metrics, rates)
    ticks = [(rate, f"{rate:g}") for rate in metrics["fppi"]]
    x_axis = Axis("false positives per image", low, high, ticks, scale="log")
    return _picture("FROC, all classes (mean of the dots)", lines, x_axis, _shares("sensitivity"))


def _bounds(metrics: Metrics, rates: np.ndarray[Any, np.dtype[np.float64]]) -> list[Line]:
    """The 95 % interval of the first threshold's sensitivities, as two lines."""
    bands = metrics.get("bootstrap", {}).get("sensitivity", {})
    key = next(iter(bands), None)
    if key is None or any(bound is None for pair in bands[key] for bound in pair):
        return []
    low, high = np.array(bands[key]).T
    return [
        Line(name, "", rates, bound, style=3)
        for name, bound in ((f"{key}: 97.5 %", high), (f"{key}: 2.5 %", low))
    ]


def _precision_recall(
    cases: Sequence[str],
    ground_truth: BoxTable,
    predictions: BoxTable,
    metrics: Metrics,
    label: int,
) -> str:
    lines: list[Line] = []
    for style, (key, content) in enumerate(metrics["ap"].items()):
        if ":" in key:
            continue
        recall, precision, _ = precision_recall_curve(
            cases, ground_truth, predictions, label=label, iou_threshold=float(key)
        )
        if not len(recall):
            continue
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        steps = np.repeat(np.concatenate([[0.0], recall]), 2)[1:-1]
        value = _text(content["per_class"][str(label)])
        lines.append(Line(f"IoU {key}", value, steps, np.repeat(envelope, 2), style))
    title = f"Class {label}: precision against recall (AP)"
    return _picture(title, lines, _shares("recall"), _shares("precision"))


def _scores(histogram: Mapping[str, Any], key: str) -> str:
    edges = np.repeat(np.array(histogram["edges"]), 2)[1:-1]
    counts = {name: np.array(values) for name, values in histogram[key]["pooled"].items()}
    lines = [
        Line(name.split("_")[0], f"{each.sum()}", edges, np.repeat(np.log10(each + 1.0), 2), style)
        for style, (name, each) in enumerate(counts.items())
    ]
    highest = np.array([each.max(initial=1) for each in counts.values()], dtype=np.float64)
    decades = range(int(np.ceil(np.log10(highest.max() + 1))) + 1)
    ticks = [(float(np.log10(10.0**power + 1)), f"{10**power}") for power in decades]
    y = Axis("predictions (logarithmic)", 0.0, ticks[-1][0], [(0.0, "0"), *ticks])
    title = f"True and false positives by score, IoU {key}"
    return _picture(title, lines, linear_axis("score", [edges]), y)


def _shares(label: str) -> Axis:
    return Axis(label, 0.0, 1.0, [(value / 5, f"{value / 5:g}") for value in range(6)])


def _picture(title: str, lines: Sequence[Line], x: Axis, y: Axis) -> str:
    """A chart that stands alone: the report's style sheet and a title inside the file."""
    style = (files("voxelbridge.core.report") / "assets" / "page.css").read_text(encoding="utf-8")
    own = "svg { background: var(--paper); font-family: sans-serif; }"
    chart = line_chart(title, lines, x=x, y=y).replace(
        "<svg ", f'<svg y="{TITLE_HEIGHT}" width="{WIDTH}" height="{HEIGHT}" ', 1
    )
    height = HEIGHT + TITLE_HEIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{2 * WIDTH}" height="{2 * height}"><style><![CDATA[{style}{own}]]></style>'
        f'<text x="8" y="17" font-size="14" style="fill: var(--ink)">{title}</text>{chart}</svg>'
    )


def _text(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
