"""Loss curves of one run or of several, from the records of their `metrics.jsonl`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from voxelbridge.core.report.charts import Line, chart_figure, linear_axis, smoothed

# Keys of metrics.jsonl; gradient_norm is shown, as its jumps explain those of a loss.
NOT_A_LOSS = (
    "step", "epoch", "learning_rate", "seconds", "failed_cases", "attempt", "restart", "improvement"
)  # fmt: skip
TOTAL = "loss"
VALIDATION_PREFIX = "val_"
TRIVIAL = "val_trivial"  # loss of the trivial predictor on the validation patches
MAX_LOSS_CHARTS = 12
SMOOTH_FROM = 25  # records: shorter curves are shown as they are

Record = Mapping[str, Any]  # Any: one parsed line of metrics.jsonl
Curve = tuple[str, Sequence[Record], str]  # name of the line, where from, key of the records


def loss_charts(runs: Sequence[tuple[str, Sequence[Record]]]) -> str:
    """One small chart per loss part with the runs overlaid, the total first."""
    names = dict.fromkeys(key for _, records in runs for r in records for key in loss_names(r))
    ordered = sorted(names, key=lambda name: (name != TOTAL, "val" in name))
    return _charts([(name, [(run, records, name) for run, records in runs]) for name in ordered])


def training_charts(records: Sequence[Record], *, limit: int = MAX_LOSS_CHARTS) -> str:
    """One small chart per loss part of one run: training, validation and trivial predictor.

    At most `limit` of them. `val_loss` and `val_trivial` lie on the chart of the total,
    `val_<part>` on that of its part.
    """
    names = list(dict.fromkeys(key for record in records for key in loss_names(record)))
    parts = dict.fromkeys(name.removeprefix(VALIDATION_PREFIX) for name in names if name != TRIVIAL)
    charts = []
    for part in sorted(parts, key=lambda part: (part != TOTAL, part == "gradient_norm")):
        curves = [("training", records, part), ("validation", records, VALIDATION_PREFIX + part)]
        if part == TOTAL:
            curves.append(("trivial", records, TRIVIAL))
        charts.append((part, curves))
    return _charts(charts, limit=limit)


def loss_names(record: Record) -> list[str]:
    """The keys of a record whose values are losses."""
    return [
        key
        for key, value in record.items()
        if key not in NOT_A_LOSS and isinstance(value, int | float) and not isinstance(value, bool)
    ]


def _charts(charts: Sequence[tuple[str, Sequence[Curve]]], *, limit: int = MAX_LOSS_CHARTS) -> str:
    if not charts:
        return '<p class="soft">No loss was recorded.</p>'
    figures = []
    for name, curves in charts[:limit]:
        drawn = [_line(*curve, style=style) for style, curve in enumerate(curves)]
        lines = [line for line in drawn if line is not None]
        x = linear_axis("optimizer step", [line.x for line in lines])
        y = linear_axis(
            name, [part for line in lines for part in (line.y, *(line.faint or ())[1:])]
        )
        figures.append(chart_figure("total loss" if name == TOTAL else name, lines, x=x, y=y))
    note = (
        '<p class="soft">Thin: recorded values; thick: running median over about a tenth of the '
        "run (only of curves with many records)."
    )
    if len(charts) > limit:
        note += f" {len(charts) - limit} more loss parts are in metrics.jsonl."
    return f'{note}</p><div class="charts">{"".join(figures)}</div>'


def _line(name: str, records: Sequence[Record], key: str, *, style: int) -> Line | None:
    by_step = {int(r["step"]): float(r[key]) for r in records if key in r and "step" in r}
    steps = np.array(sorted(by_step), dtype=np.float64)
    values = np.array([by_step[int(step)] for step in steps], dtype=np.float64)
    keep = np.isfinite(values)
    steps, values = steps[keep], values[keep]
    if not len(values):
        return None
    dots = (steps, values) if len(values) == 1 else None  # a line of one point is invisible
    if len(values) < SMOOTH_FROM:
        return Line(name, f"{values[-1]:.3g}", steps, values, style=style, dots=dots)
    median = smoothed(values, window=2 * (len(values) // 20) + 1)
    return Line(name, f"{median[-1]:.3g}", steps, median, style=style, faint=(steps, values))
