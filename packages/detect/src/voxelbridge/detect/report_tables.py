"""The figures of a report as HTML tables, from metrics.json objects."""

from collections.abc import Mapping, Sequence
from typing import Any

from voxelbridge.core.report.page import NOT_DEFINED, figure_cell, figures_table

Metrics = Mapping[str, Any]  # Any: the parsed metrics.json object (docs/formats/predictions.md)

FPPI_NAMES = ("1/8", "1/4", "1/2", "1", "2", "4", "8")


def summary_table(names: Sequence[str], metrics: Sequence[Metrics]) -> str:
    """One row per arm: mAP at every threshold, the mean FROC sensitivity, cases and objects."""
    thresholds = list(metrics[0]["ap"])
    heads = [f"mAP@{_iou(key)}" for key in thresholds]
    heads += [f"FROC@{_iou(key)}" for key in metrics[0]["froc"]] + ["cases", "objects"]
    rows = []
    for name, entry in zip(names, metrics, strict=True):
        intervals = entry.get("bootstrap", {})
        cells = [
            figure_cell(entry["ap"][key]["map"]) + _interval(intervals.get("map", {}).get(key))
            for key in thresholds
        ]
        cells += [
            figure_cell(entry["froc"][key]["pooled"]["mean"])
            + _interval(intervals.get("froc", {}).get(key))
            for key in metrics[0]["froc"]
        ]
        rows.append((name, [*cells, str(entry["num_cases"]), str(entry["num_objects"])]))
    values = [[_map_of(entry, key) for key in thresholds] for entry in metrics]
    for row, entry in zip(values, metrics, strict=True):
        row += [entry["froc"][key]["pooled"]["mean"] for key in metrics[0]["froc"]]
    rows += _difference(names, values, padding=2)
    caption = (
        "mAP: mean average precision over classes; FROC: mean sensitivity at the 7 rates below"
    )
    return figures_table(caption, "arm", heads, rows)


def froc_table(names: Sequence[str], metrics: Sequence[Metrics], key: str) -> str:
    """Sensitivity at 1/8 to 8 false positives per image, all classes pooled, at IoU `key`."""
    values = [entry["froc"][key]["pooled"]["sensitivity"] for entry in metrics]
    rows = [
        (name, [figure_cell(value) for value in row])
        for name, row in zip(names, values, strict=True)
    ]
    rows += _difference(names, values, padding=0)
    caption = f"Sensitivity at false positives per image, IoU {_iou(key)}, all classes together"
    return figures_table(caption, "arm", FPPI_NAMES, rows)


def class_table(
    names: Sequence[str],
    metrics: Sequence[Metrics],
    class_names: Sequence[str],
    objects: Sequence[int],
) -> str:
    """Average precision of each class (rows) in each arm (columns), beside its object count."""
    keys = [key for key in metrics[0]["ap"] if ":" not in key]
    heads = ["objects"] + [f"{name} AP@{_iou(key)}" for key in keys for name in names]
    rows = []
    for index, class_name in enumerate(class_names):
        cells = [str(objects[index])]
        for key in keys:
            for entry in metrics:
                cells.append(figure_cell(entry["ap"][key]["per_class"].get(str(index))))
        rows.append((class_name, cells))
    return figures_table("Average precision per class", "class", heads, rows)


def figure_text(value: float | None) -> str:
    """The value with three decimals, as plain text."""
    return "n/a" if value is None else f"{value:.3f}"


def _map_of(entry: Metrics, key: str) -> float | None:
    return entry["ap"][key]["map"]


def _iou(key: str) -> str:
    """`0.10` -> `0.1`, `0.10:0.50:0.05` -> `0.1:0.5`."""
    return ":".join(f"{float(part):g}" for part in key.split(":")[:2])


def _interval(bounds: Sequence[float | None] | None) -> str:
    if bounds is None or None in bounds:
        return ""
    low, high = (f"{bound:.3f}" for bound in bounds)
    return f'<small title="95 % bootstrap interval over images">[{low}, {high}]</small>'


def _difference(
    names: Sequence[str], values: Sequence[Sequence[float | None]], *, padding: int
) -> list[tuple[str, list[str]]]:
    """A row `second minus first` where there are two arms; no colour: one run proves nothing."""
    if len(values) != 2:
        return []
    cells = []
    for first, second in zip(*values, strict=True):
        if first is None or second is None:
            cells.append(NOT_DEFINED)
        else:
            text = f"{second - first:+.3f}".replace("-", "\N{MINUS SIGN}")
            cells.append("0.000" if float(f"{second - first:.3f}") == 0 else text)
    return [(f"{names[1]} minus {names[0]}", cells + [""] * padding)]
