"""Charts as SVG text: axes that hold their values, names that do not overlap."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelbridge.core.report.charts import (
    Axis,
    Line,
    chart_figure,
    line_chart,
    linear_axis,
    smoothed,
)


@settings(deadline=None, max_examples=25)
@given(values=st.lists(st.floats(-1e9, 1e9), max_size=20))
def test_axis_holds_all_values_and_few_ticks(values: list[float]) -> None:
    axis = linear_axis("loss", [np.array(values)])
    assert all(axis.low <= value <= axis.high for value in values)
    assert 2 <= len(axis.ticks) <= 12
    slack = 1e-9 * (axis.high - axis.low) + 1e-12 * max(map(abs, values), default=0)
    assert all(axis.low - slack <= tick <= axis.high + slack for tick, _ in axis.ticks)


def test_names_at_line_ends_do_not_overlap() -> None:
    axis = Axis("share", 0.0, 1.0, [(0.0, "0"), (1.0, "1")])
    lines = [
        Line("arm" * 9, str(k), np.array([0.0, 1.0]), np.array([0.0, 0.0]), k) for k in range(5)
    ]
    chart = line_chart("many", lines, x=axis, y=axis)
    labels = re.findall(r'<path class="leader".*?<text x="\d+" y="([\d.]+)">(.*?)</text>', chart)
    tops = sorted(float(top) for top, _ in labels)
    assert len(tops) == 5
    assert min(np.diff(tops)) >= 14.9
    assert all(len(text) <= 17 for _, text in labels)


def test_log_axis_spreads_octaves_evenly() -> None:
    axis = Axis("rate", 1 / 8, 8, [], scale="log")
    positions = axis.position(np.array([0.0, 1 / 8, 1, 8, 99]))
    assert positions.tolist() == pytest.approx([0, 0, 0.5, 1, 1])


def test_running_median_ignores_a_spike_and_keeps_the_length() -> None:
    values = np.array([1.0, 1.0, 50.0, 1.0, 1.0])
    assert smoothed(values, window=3).tolist() == [1.0, 1.0, 1.0, 1.0, 1.0]


def test_chart_is_well_formed_and_escapes_its_names() -> None:
    hostile = "<b>&\"'"
    axis = linear_axis(hostile, [np.array([0.0, 3.0])])
    line = Line(hostile, "<1>", np.array([0.0, 1.0, np.nan]), np.array([1.0, 2.0, 3.0]))
    root = ET.fromstring(chart_figure(hostile, [line], x=axis, y=axis))
    texts = [element.text for element in root.iter() if element.text]
    assert texts.count(hostile) == 3  # caption and both axes
    assert f"{hostile} <1>" in texts


def test_chart_without_lines_says_so() -> None:
    axis = linear_axis("x", [])
    assert "nothing to draw" in line_chart("empty", [], x=axis, y=axis)
