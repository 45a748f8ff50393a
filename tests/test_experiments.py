"""The pages of experiments say what their stored cells say."""

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = ROOT / "docs" / "experiments"
RUNS = ("few_labels.csv", "few_labels_again.csv")

Results = list[dict[str, Any]]  # JSON values


def cells_of(name: str) -> Results:
    """The cells of a run as its script has them."""
    with (EXPERIMENTS / name).open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    texts = ("arm",)
    counts = ("seed", "labels")
    return [
        {k: v if k in texts else int(v) if k in counts else float(v) for k, v in row.items()}
        for row in rows
    ]


@pytest.fixture(params=RUNS)
def results(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Results:
    monkeypatch.syspath_prepend(ROOT / "tools")
    monkeypatch.delitem(sys.modules, "few_labels_results", raising=False)
    return cells_of(request.param)


def test_the_page_has_the_table_of_the_cells(results: Results) -> None:
    from few_labels_results import comparison_table

    assert comparison_table(results) in (EXPERIMENTS / "few_labels.md").read_text()


def test_differences_are_those_of_paired_t_tests_with_holms_correction(results: Results) -> None:
    from few_labels_results import differences

    found = differences(results)
    by_cell = {(r["arm"], r["labels"], r["seed"]): r["mAP@0.10"] for r in results}
    seeds = sorted({r["seed"] for r in results})
    for d in found:
        pairs = [[by_cell[arm, d.labels, seed] for seed in seeds] for arm in (d.arm, d.baseline)]
        expected = stats.ttest_rel(pairs[0], pairs[1])
        low, high = expected.confidence_interval(0.95)
        assert d.mean == pytest.approx(np.mean(pairs[0]) - np.mean(pairs[1]), abs=1e-12)
        assert d.p_value == pytest.approx(expected.pvalue, rel=1e-9)
        assert (d.low, d.high) == pytest.approx((low, high), abs=1e-12)
    # Holm: a hypothesis' p is the largest of (those not below it in rank) x p up to its own.
    ordered = sorted(found, key=lambda d: d.p_value)
    for rank, d in enumerate(ordered):
        steps = [(len(found) - k) * ordered[k].p_value for k in range(rank + 1)]
        assert d.adjusted == pytest.approx(min(1.0, max(steps)))
