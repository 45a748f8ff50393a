"""Pictures of a ranking: how often each method has each place, beside its gain on the baseline.

After figures 2 (all data sets) and 3 (each data set) of arXiv 2509.15947. A circle's area is how
often a method has a place; the upright line is its mean rank.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from voxelbridge.core.files import atomic_write
from voxelbridge.detect.ranking import SEPARATOR, Placing, Ranking

FORMATS = ("png", "pdf", "svg")
ROW = 0.27  # inches per method
LARGEST_CIRCLE = 130.0  # square points
COLOURS = ("#1b6ca8", "#c2571a", "#3b7d3b", "#7d4fa0", "#8a6d1f", "#a8324a", "#3d7f86", "#5a5a5a")
BETTER, WORSE, NEUTRAL = "#3b7d3b", "#b5402f", "#777777"
MEASURE_NAMES = {"map": "mAP", "froc": "FROC"}

# Any: figures and axes; matplotlib is imported where it is needed


def draw_overall(
    path: Path, ranking: Ranking, measure: str, *, others: Mapping[str, Ranking]
) -> list[Path]:
    """Ranks over all data sets (figure 2) with the mean gain in every measure of `others`.

    Writes `path` with the ending of every format; the written files.
    """
    order = _row_order(ranking)
    shown = {
        name: each
        for name, each in others.items()
        if each.methods == ranking.methods and any(b is not None for b in each.baselines)
    }
    panels = len(shown)
    count = len(order)
    width = _label_width(ranking) + 0.24 * count + 1.2 + 1.75 * panels
    figure = _figure(max(6.0, width), ROW * count + 1.5)
    ratios = [max(2.4, 0.24 * count), *[1.75] * panels]
    axes = figure.subplots(1, 1 + panels, sharey=True, squeeze=False, width_ratios=ratios)[0]
    _places(axes[0], ranking, ranking.overall, order)
    axes[0].set_xlabel(f"place by {measure_text(measure)}", fontsize=9)
    _method_labels(axes[0], ranking, order)
    for ax, (name, each) in zip(axes[1:], shown.items(), strict=True):
        gaps = [each.difference(method) for method in order]
        _gains(ax, gaps, [each.baselines[m] == m for m in order], measure=name)
        ax.set_title(f"gain in {measure_text(name)}", fontsize=9)
    datasets = f"{len(ranking.datasets)} data set{'s' if len(ranking.datasets) > 1 else ''}"
    draws = max(len(part) for part in ranking.samples)
    _title(figure, f"Ranks over {datasets}, {draws} resamples of the images each")
    return _save(figure, path)


def draw_per_dataset(path: Path, ranking: Ranking, measure: str) -> list[Path]:
    """Ranks on every data set (figure 3) with the gain on the baseline there."""
    order = _row_order(ranking)
    count, sets = len(order), len(ranking.datasets)
    columns = min(4 if count <= 12 else 2 if sets > 1 else 1, sets)
    columns = min(columns, sets)
    rows = -(-sets // columns)
    gains = any(index is not None for index in ranking.baselines)
    places = max(2.2, 0.2 * count)
    width = _label_width(ranking) + columns * (places + (1.7 if gains else 0.3))
    figure = _figure(max(5.0, width), rows * (ROW * 0.92 * count + 1.0) + 0.6)
    per_set = 2 if gains else 1
    ratios = [places, 1.45][:per_set] * columns
    grid = figure.subplots(rows, columns * per_set, sharey=True, squeeze=False, width_ratios=ratios)
    for ax in grid.flat[:]:
        ax.set_visible(False)
    for number, (name, placing) in enumerate(
        zip(ranking.datasets, ranking.per_dataset, strict=True)
    ):
        row, column = divmod(number, columns)
        ax = grid[row, column * per_set]
        ax.set_visible(True)
        _places(ax, ranking, placing, order)
        ax.set_title(name, fontsize=10, fontweight="bold", loc="left")
        if column == 0:
            _method_labels(ax, ranking, order)
        if gains:
            side = grid[row, column * per_set + 1]
            side.set_visible(True)
            found = [ranking.difference(method, dataset=number) for method in order]
            own = [ranking.baselines[m] == m for m in order]
            _gains(side, found, own, measure=measure)
            side.set_title(f"gain in {measure_text(measure)}", fontsize=8)
    _title(figure, f"Ranks by {measure_text(measure)} on each data set")
    return _save(figure, path)


def measure_text(measure: str) -> str:
    """`map_0.10` -> `mAP@0.1`; other names as they are."""
    figure, _, key = measure.partition("_")
    if figure not in MEASURE_NAMES or not key:
        return measure
    where = "0.1:0.5" if key == "range" else f"{float(key):g}"
    return f"{MEASURE_NAMES[figure]}@{where}"


def _row_order(ranking: Ranking) -> list[int]:
    """Architectures as they first appear, inside the best mean rank first; else all by rank."""
    groups = list(dict.fromkeys(_group(name) for name in ranking.methods))
    return sorted(ranking.order, key=lambda m: groups.index(_group(ranking.methods[m])))


def _group(method: str) -> str:
    return method.rpartition(SEPARATOR)[0]


def _places(ax: Any, ranking: Ranking, placing: Placing, order: Sequence[int]) -> None:
    count = len(order)
    groups = list(dict.fromkeys(_group(ranking.methods[m]) for m in order))
    size = LARGEST_CIRCLE / max(float(placing.shares.max()), 1 / count)
    for row, method in enumerate(order):
        colour = COLOURS[groups.index(_group(ranking.methods[method])) % len(COLOURS)]
        shares = placing.shares[method]
        seen = np.flatnonzero(shares > 0)
        ax.plot([placing.low[method], placing.high[method]], [row, row], color=colour,
                linewidth=1.0, alpha=0.35, zorder=1, solid_capstyle="butt")  # fmt: skip
        ax.scatter(seen + 1, np.full(len(seen), row), s=size * shares[seen], color=colour,
                   alpha=0.75, linewidths=0, zorder=2, clip_on=False)  # fmt: skip
        mean = placing.mean[method]
        ax.plot([mean, mean], [row - 0.38, row + 0.38], color="black", linewidth=1.4, zorder=3)
        _behind(ax, row, f"{mean:.1f}")
    ax.set_xlim(0.4, count + 0.6)
    ax.set_ylim(count - 0.4, -0.6)
    step = 1 if count <= 10 else 2 if count <= 20 else 5
    ax.set_xticks(range(1, count + 1, step))
    ax.tick_params(axis="x", labelsize=7, length=2)
    ax.tick_params(axis="y", length=0, labelleft=False)
    ax.grid(axis="x", color="#e3e3e3", linewidth=0.5, zorder=0)
    ax.set_axisbelow(True)
    _separate(ax, ranking, order)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)


def _method_labels(ax: Any, ranking: Ranking, order: Sequence[int]) -> None:
    ax.set_yticks(range(len(order)), [ranking.methods[m] for m in order], fontsize=8)
    ax.tick_params(axis="y", labelleft=True, length=0)
    groups = list(dict.fromkeys(_group(ranking.methods[m]) for m in order))
    for label, method in zip(ax.get_yticklabels(), order, strict=True):
        colour = COLOURS[groups.index(_group(ranking.methods[method])) % len(COLOURS)]
        label.set_color(colour if len(groups) > 1 else "black")


def _separate(ax: Any, ranking: Ranking, order: Sequence[int]) -> None:
    """A line between architectures."""
    for row in range(1, len(order)):
        if _group(ranking.methods[order[row]]) != _group(ranking.methods[order[row - 1]]):
            ax.axhline(row - 0.5, color="#999999", linewidth=0.6, zorder=0)


def _gains(ax: Any, gaps: Sequence[Any], is_baseline: Sequence[bool], *, measure: str) -> None:
    """Bars with their 95 % interval and the number behind; mAP and FROC in percentage points."""
    is_share = measure_text(measure) != measure
    scale = 100.0 if is_share else 1.0
    ends = [scale * end for gap in gaps if gap for end in (gap.low, gap.high, gap.value)]
    lowest, highest = min([*ends, 0.0]), max([*ends, 0.0])
    margin = 0.06 * (highest - lowest) or 1.0
    for row, (gap, own) in enumerate(zip(gaps, is_baseline, strict=True)):
        if gap is None or own:
            middle = (0.5, row)
            ax.annotate("baseline" if own else "no baseline", middle, va="center", ha="center",
                        xycoords=("axes fraction", "data"), fontsize=6.5, color=NEUTRAL,
                        bbox={"facecolor": "white", "linewidth": 0, "pad": 1})  # fmt: skip
            continue
        value, low, high = scale * gap.value, scale * gap.low, scale * gap.high
        ax.barh(row, value, height=0.62, color=BETTER if value >= 0 else WORSE, alpha=0.55,
                linewidth=0)  # fmt: skip
        ax.plot([low, high], [row, row], color="black", linewidth=0.8)
        _behind(ax, row, _signed(value, digits=1 if is_share else 3))
    ax.axvline(0, color="black", linewidth=0.7)
    ax.set_xlim(lowest - margin, highest + margin)
    ax.tick_params(axis="x", labelsize=7, length=2)
    ax.tick_params(axis="y", length=0, labelleft=False)
    ax.locator_params(axis="x", nbins=4)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.set_xlabel("percentage points" if is_share else "difference", fontsize=7)


def _behind(ax: Any, row: int, text: str) -> None:
    """A number at the right of a row, outside of the axes."""
    ax.annotate(text, (1.02, row), xycoords=("axes fraction", "data"), fontsize=7,
                va="center", ha="left", annotation_clip=False)  # fmt: skip


def _signed(value: float, *, digits: int) -> str:
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def _label_width(ranking: Ranking) -> float:
    """Inches that the longest method name takes."""
    return 0.3 + 0.068 * max(len(name) for name in ranking.methods)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _title(figure: Any, text: str) -> None:
    figure.suptitle(text, fontsize=11, x=0.01, ha="left")
    note = (
        "Area of a circle: how often the method has that place. Black line and number: mean rank. "
        "Coloured line, black bar: 95 % intervals over the resamples."
    )
    lines = textwrap.wrap(note, int(15 * figure.get_figwidth()))
    figure.supxlabel("\n".join(lines), fontsize=7, x=0.01, ha="left", color="#555555")


def _save(figure: Any, path: Path) -> list[Path]:
    figure.draw_without_rendering()  # the layout is found once, not for every format
    figure.set_layout_engine("none")
    written = [path.with_name(f"{path.name}.{ending}") for ending in FORMATS]
    for each, ending in zip(written, FORMATS, strict=True):
        with atomic_write(each) as temporary:
            metadata = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}[ending]
            figure.savefig(temporary, format=ending, dpi=150, metadata=metadata)
    return written
