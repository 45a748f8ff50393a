"""Line charts as inline SVG text: crisp at any size, styled by the page (dark mode, print).

Lines differ by dash pattern as well as by colour and carry their names at their ends.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 450, 290
MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 50, 138, 12, 44
LABEL_STEP = 15  # pixels between two labels at the right edge
LABEL_LENGTH = 17  # characters of name and value together
MAX_POINTS = 400  # per line: more than the pixels of the chart show nothing new

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Axis:
    """One axis of a chart: label, range, ticks (value, text) and how values are spread."""

    label: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    scale: Literal["linear", "log"] = "linear"

    def position(self, values: FloatArray) -> FloatArray:
        """Values as shares of the axis, clipped to [0, 1]."""
        low, high = self.low, self.high
        if self.scale == "log":
            low, high = math.log(low), math.log(high)
            values = np.log(np.maximum(values, self.low))
        return np.clip((values - low) / (high - low), 0.0, 1.0)


@dataclass(frozen=True)
class Line:
    """One curve, labelled `name value`; `style` picks colour and dashes, alike in all charts.

    `faint` is drawn thinly behind it (the same quantity before smoothing); `dots` mark points.
    """

    name: str
    value: str
    x: FloatArray
    y: FloatArray
    style: int = 0
    faint: tuple[FloatArray, FloatArray] | None = None
    dots: tuple[FloatArray, FloatArray] | None = None


def linear_axis(label: str, values: Sequence[FloatArray], *, zero: bool = False) -> Axis:
    """An axis that spans the finite `values` with four to eight round ticks."""
    finite = np.concatenate([v[np.isfinite(v)] for v in values] or [np.zeros(0)])
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    low = min(low, 0.0) if zero else low
    if high - low <= 1e-12 * max(abs(high), abs(low), 1e-300):
        spread = max(abs(high) * 0.1, 1e-6)
        low, high = low - spread, high + spread
    step = _round_step((high - low) / 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    ticks = [(k * step, _tick_text(k * step, step)) for k in range(first, last + 1)]
    return Axis(label, min(low, first * step), max(high, last * step), ticks)


def line_chart(title: str, lines: Sequence[Line], *, x: Axis, y: Axis, marker: str = "") -> str:
    """An <svg> with axes, grid, `lines` and their names; empty `lines` give a chart that says so.

    `marker` is a space-free key under which the page's script may draw its own points.
    """
    parts = [_frame(x, y)]
    if not lines:
        middle_x, middle_y = MARGIN_LEFT + _plot_width() / 2, MARGIN_TOP + _plot_height() / 2
        parts.append(
            f'<text class="empty" x="{middle_x:.0f}" y="{middle_y:.0f}" '
            f'text-anchor="middle">nothing to draw</text>'
        )
    parts += [_line(line, x, y) for line in lines]
    parts.append(_end_labels(lines, x, y))
    summary = ", ".join(f"{line.name} {line.value}" for line in lines) or "no data"
    plot = f"{MARGIN_LEFT},{MARGIN_TOP},{_plot_width()},{_plot_height()}"
    place = f' data-marker="{escape(marker)}" data-x="{x.low},{x.high}" data-plot="{plot}"'
    attributes = place if marker else ""
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(f"{title}: {summary}")}"{attributes}>{"".join(parts)}</svg>'
    )


def chart_figure(title: str, lines: Sequence[Line], *, x: Axis, y: Axis, marker: str = "") -> str:
    """The <figure> of a `line_chart` under its title."""
    chart = line_chart(title, lines, x=x, y=y, marker=marker)
    return f"<figure><figcaption>{escape(title)}</figcaption>{chart}</figure>"


def smoothed(values: FloatArray, *, window: int) -> FloatArray:
    """Centred running median of odd `window`, shorter at both ends."""
    half = window // 2
    return np.array(
        [np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    )


def _plot_width() -> int:
    return WIDTH - MARGIN_LEFT - MARGIN_RIGHT


def _plot_height() -> int:
    return HEIGHT - MARGIN_TOP - MARGIN_BOTTOM


def _pixels(x: Axis, y: Axis, xs: FloatArray, ys: FloatArray) -> list[tuple[float, float]]:
    left = MARGIN_LEFT + x.position(xs) * _plot_width()
    top = MARGIN_TOP + (1 - y.position(ys)) * _plot_height()
    return list(zip(left.tolist(), top.tolist(), strict=True))


def _frame(x: Axis, y: Axis) -> str:
    right, bottom = WIDTH - MARGIN_RIGHT, HEIGHT - MARGIN_BOTTOM
    parts = ['<g class="axis">']
    for value, text in x.ticks:
        at = MARGIN_LEFT + float(x.position(np.array(value))) * _plot_width()
        parts.append(f'<path class="grid" d="M{at:.1f} {MARGIN_TOP}V{bottom}"/>')
        parts.append(
            f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{escape(text)}</text>'
        )
    for value, text in y.ticks:
        at = MARGIN_TOP + (1 - float(y.position(np.array(value)))) * _plot_height()
        parts.append(f'<path class="grid" d="M{MARGIN_LEFT} {at:.1f}H{right}"/>')
        parts.append(
            f'<text x="{MARGIN_LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{escape(text)}</text>'
        )
    parts.append(f'<path class="frame" d="M{MARGIN_LEFT} {MARGIN_TOP}V{bottom}H{right}"/>')
    centre_x, centre_y = MARGIN_LEFT + _plot_width() / 2, MARGIN_TOP + _plot_height() / 2
    parts.append(
        f'<text class="name" x="{centre_x:.0f}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{escape(x.label)}</text>"
    )
    parts.append(
        f'<text class="name" transform="translate(13 {centre_y:.0f}) rotate(-90)" '
        f'text-anchor="middle">{escape(y.label)}</text></g>'
    )
    return "".join(parts)


def _line(line: Line, x: Axis, y: Axis) -> str:
    parts = [f'<g class="line style{line.style % 4}">']
    if line.faint is not None:
        parts.append(f'<path class="faint" d="{_path(x, y, *line.faint)}"/>')
    parts.append(f'<path class="main" d="{_path(x, y, line.x, line.y)}"/>')
    if line.dots is not None:
        for left, top in _pixels(x, y, *line.dots):
            parts.append(f'<circle cx="{left:.1f}" cy="{top:.1f}" r="3"/>')
    return "".join(parts) + "</g>"


def _path(x: Axis, y: Axis, xs: FloatArray, ys: FloatArray) -> str:
    keep = np.isfinite(xs) & np.isfinite(ys)
    xs, ys = xs[keep], ys[keep]
    if len(xs) > MAX_POINTS:
        chosen = np.unique(np.linspace(0, len(xs) - 1, MAX_POINTS).round().astype(int))
        xs, ys = xs[chosen], ys[chosen]
    points = [f"{left:.1f} {top:.1f}" for left, top in _pixels(x, y, xs, ys)]
    return "M" + "L".join(points) if points else ""


def _end_labels(lines: Sequence[Line], x: Axis, y: Axis) -> str:
    """Names in the right margin, pushed apart, each tied to its line's last point."""
    ends = []
    for line in lines:
        keep = np.isfinite(line.x) & np.isfinite(line.y)
        if keep.any():
            (end,) = _pixels(x, y, line.x[keep][-1:], line.y[keep][-1:])
            ends.append((end, line))
    ends.sort(key=lambda item: item[0][1])
    tops = _spread([end[1] for end, _ in ends])
    edge, parts = WIDTH - MARGIN_RIGHT, []
    for ((left, top), line), label_top in zip(ends, tops, strict=True):
        room = LABEL_LENGTH - len(line.value) - 1
        name = line.name if len(line.name) <= room else f"{line.name[: room - 1]}…"
        parts.append(
            f'<g class="line style{line.style % 4}">'
            f'<path class="leader" d="M{left:.1f} {top:.1f}H{edge + 2}'
            f'L{edge + 9} {label_top:.1f}"/>'
            f'<text x="{edge + 12}" y="{label_top + 4:.1f}">'
            f"{escape(name)} {escape(line.value)}</text></g>"
        )
    return "".join(parts)


def _spread(tops: list[float]) -> list[float]:
    lowest = HEIGHT - MARGIN_BOTTOM
    placed: list[float] = []
    for top in tops:
        placed.append(max(top, placed[-1] + LABEL_STEP) if placed else max(top, MARGIN_TOP))
    overflow = placed[-1] - lowest if placed else 0.0
    if overflow > 0:  # push the stack up from the bottom again
        for i in range(len(placed) - 1, -1, -1):
            placed[i] = min(placed[i], lowest - (len(placed) - 1 - i) * LABEL_STEP)
    assert all(b - a >= LABEL_STEP - 1e-6 for a, b in pairwise(placed))
    return placed


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(f * power for f in (1, 2, 5, 10) if f * power >= step * 0.999)


def _tick_text(value: float, step: float) -> str:
    if abs(value) >= 1e5 or step < 1e-4:
        return f"{value:.2g}"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value + 0.0:.{decimals}f}"  # + 0.0 turns a negative zero into zero
