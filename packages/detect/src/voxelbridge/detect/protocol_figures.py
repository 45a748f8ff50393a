"""Own scores under official protocols beside published ones, as bars.

After figures 4 to 6 of arXiv 2509.15947. The published scores are typed, each with its source, in
published_baselines.toml.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from voxelbridge.core.errors import DataError
from voxelbridge.core.files import atomic_write

FORMATS = ("png", "pdf", "svg")
PROTOCOLS: Mapping[str, str] = {
    "luna16": "LUNA16: mean sensitivity",
    "luna16-8-1-1": "LUNA16, folds 8-1-1: mean sensitivity",
    "luna16-9-0-1": "LUNA16, folds 9-0-1: mean sensitivity",
    "pn9": "PN9: mean sensitivity",
    "cta-a-internal": "CTA-A, internal test set: FROC at IoU 0.3",
    "cta-a-external": "CTA-A, external test set: FROC at IoU 0.3",
    "ribfrac": "RibFrac: mean sensitivity",
}
OWN, OTHER = "#1b6ca8", "#b9b9b9"
ROW = 0.3  # inches per bar


@dataclass(frozen=True)
class Published:
    """A score of another method, a share; `source` says where it is printed."""

    protocol: str
    name: str
    value: float
    source: str


@dataclass(frozen=True)
class OwnScore:
    """An own score under a protocol, a share, with its 95 % interval where there is one."""

    name: str
    value: float
    interval: tuple[float, float] | None = None


def load_published(path: Path | None = None) -> list[Published]:
    """The shipped scores, or those of a file of the same form."""
    if path is None:
        text = (files("voxelbridge.detect") / "published_baselines.toml").read_text("utf-8")
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    where = path or "published_baselines.toml"
    try:
        found = [Published(**each) for each in tomllib.loads(text).get("baselines", [])]
    except (tomllib.TOMLDecodeError, TypeError) as error:
        raise DataError(
            f"{where}: not a list of baselines with protocol, name, value, source ({error})"
        ) from error
    for each in found:
        if not isinstance(each.value, int | float) or not 0 <= each.value <= 1:
            raise DataError(
                f"{where}: {each.name}: got the value {each.value!r}, expected a share from 0 to 1"
            )
        if not each.source:
            raise DataError(f"{where}: {each.name}: says no source")
    return found


def protocol_bars(
    results: Mapping[str, Sequence[OwnScore]], baselines: Sequence[Published], path: Path
) -> list[Path]:
    """Draws a panel for each protocol of `results`, best bar on top; the files written.

    `path` gets the ending of every format. A protocol of a split (luna16-8-1-1) takes the
    baselines of the protocol too (luna16).
    """
    if not results or not all(results.values()):
        raise ValueError("protocol bars: no own score")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars = {name: _bars(name, own, baselines) for name, own in results.items()}
    counts = [len(rows) for rows in bars.values()]
    height = sum(ROW * count + 0.85 for count in counts)
    figure = Figure(figsize=(7.5, height + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(
        len(bars), 1, squeeze=False, height_ratios=[ROW * count + 0.5 for count in counts]
    )
    for ax, (protocol, rows) in zip(grid[:, 0], bars.items(), strict=True):
        _panel(ax, protocol, rows)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    written = [path.with_name(f"{path.name}.{ending}") for ending in FORMATS]
    for each, ending in zip(written, FORMATS, strict=True):
        with atomic_write(each) as temporary:
            figure.savefig(temporary, format=ending, dpi=150)
    return written


def _bars(
    protocol: str, own: Sequence[OwnScore], baselines: Sequence[Published]
) -> list[OwnScore | Published]:
    published = [
        each
        for each in baselines
        if protocol == each.protocol or protocol.startswith(f"{each.protocol}-")
    ]
    return sorted([*own, *published], key=lambda each: -each.value)


def _panel(ax: Any, protocol: str, rows: Sequence[OwnScore | Published]) -> None:
    for index, each in enumerate(rows):
        is_own = isinstance(each, OwnScore)
        ax.barh(index, 100 * each.value, color=OWN if is_own else OTHER, height=0.7)
        if isinstance(each, OwnScore) and each.interval is not None:
            low, high = (100 * bound for bound in each.interval)
            ax.plot([low, high], [index, index], color="black", linewidth=1)
        ax.annotate(
            f"{100 * each.value:.1f}", (1.01, index), xycoords=("axes fraction", "data"),
            va="center", fontsize=8, annotation_clip=False,
        )  # fmt: skip
    ax.set_yticks(range(len(rows)), [each.name for each in rows], fontsize=8)
    for label, each in zip(ax.get_yticklabels(), rows, strict=True):
        label.set_color(OWN if isinstance(each, OwnScore) else "black")
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlim(0, 100)
    none = not any(isinstance(each, Published) for each in rows)
    note = "; no published score as text" if none else ""
    ax.set_title(PROTOCOLS.get(protocol, protocol), fontsize=9, loc="left")
    ax.set_xlabel(f"percent{note}", fontsize=7)
    ax.tick_params(axis="x", labelsize=7, length=2)
    ax.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
