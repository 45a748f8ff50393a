"""Which curves lie on which chart."""

import re
from typing import Any

from voxelbridge.core.report.losses import MAX_LOSS_CHARTS, loss_charts, training_charts


def charts_of(html: str) -> dict[str, list[str]]:
    """Title of every chart -> names of its lines with their last values."""
    found = {}
    for title, chart in re.findall(r"<figcaption>(.*?)</figcaption>(.*?)</figure>", html):
        labels = re.findall(r'<path class="leader".*?<text[^>]*>(.*?)</text>', chart)
        found[title] = sorted(labels)
    return found


def records() -> list[dict[str, Any]]:
    values = [{"step": step, "loss": 1.0 / (1 + step), "gradient_norm": 2.0} for step in range(5)]
    values[2] |= {"val_loss": 0.5, "val_trivial": 0.9, "val_intra": 0.25, "failed_cases": 3}
    for record in values:
        record |= {"intra": 0.125, "learning_rate": 0.01}
    return values


def test_validation_and_trivial_predictor_lie_on_the_chart_of_the_total() -> None:
    assert charts_of(training_charts(records())) == {
        "total loss": ["training 0.2", "trivial 0.9", "validation 0.5"],
        "intra": ["training 0.125", "validation 0.25"],
        "gradient_norm": ["training 2"],
    }


def test_total_comes_first_and_the_gradient_norm_last() -> None:
    assert list(charts_of(training_charts(records()))) == ["total loss", "intra", "gradient_norm"]


def test_single_validation_is_a_dot() -> None:
    assert training_charts(records()).count("<circle") == 3  # val_loss, val_trivial, val_intra


def test_part_that_only_validation_has_gets_a_chart() -> None:
    assert charts_of(training_charts([{"step": 0, "val_dice": 0.5}])) == {
        "dice": ["validation 0.5"]
    }


def test_no_record_gives_a_sentence() -> None:
    assert "No loss was recorded" in training_charts([])
    assert "No loss was recorded" in loss_charts([("run", [{"step": 1, "learning_rate": 0.1}])])


def test_last_record_of_a_step_counts_and_broken_values_are_left_out() -> None:
    values = [{"step": 1, "loss": 5.0}, {"step": 2, "loss": float("nan")}, {"step": 1, "loss": 3.0}]
    html = training_charts(values)
    assert charts_of(html) == {"total loss": ["training 3"]}
    assert "nan" not in html


def test_runs_are_overlaid_by_name() -> None:
    html = loss_charts([("scratch", records()), ("pretrained", [{"step": 0, "loss": 7.0}])])
    assert charts_of(html)["total loss"] == ["pretrained 7", "scratch 0.2"]


def test_more_parts_than_charts_are_counted() -> None:
    many = {f"part{number}": 1.0 for number in range(MAX_LOSS_CHARTS + 3)}
    html = training_charts([{"step": 0, "loss": 1.0, **many}])
    assert html.count("<figure>") == MAX_LOSS_CHARTS
    assert "4 more loss parts" in html
