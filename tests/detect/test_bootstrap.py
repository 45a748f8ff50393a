from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from voxelbridge.detect.evaluate.bootstrap import draws, most_copies, resampled
from voxelbridge.detect.evaluate.case_level import CaseRanking
from voxelbridge.detect.evaluate.measures import Convention, Measures, Sizes
from voxelbridge.detect.evaluate.metrics import compute_metrics
from voxelbridge.detect.evaluate.operating_points import operating_point
from voxelbridge.detect.evaluate.ranked import FEW_POINTS
from voxelbridge.detect.evaluate.size_strata import SizeStrata
from voxelbridge.detect.evaluate.standings import Standings
from voxelbridge.detect.evaluate.tables import BoxTable

MEASURES = Measures(
    ap=(0.1, 0.25, 0.5), froc=(0.1, 0.25), fppi=(0.1, 0.3, 1.0, 3.0), sizes=Sizes(edges=(40.0,))
)


def make_tables(
    seed: int, *, cases: int, objects: int, boxes: int, classes: int = 3, scores: int = 6
) -> tuple[BoxTable, BoxTable]:
    """Boxes of whole coordinates in a small volume and `scores` different scores: many ties."""
    rng = np.random.default_rng(seed)

    def table(count: int, *, scored: bool) -> BoxTable:
        low = rng.integers(0, 6, (count, 3)).astype(np.float64)
        return BoxTable(
            case_index=rng.integers(0, cases, count),
            labels=rng.integers(0, classes, count),
            boxes=np.concatenate([low, low + rng.integers(1, 7, (count, 3))], axis=1),
            scores=rng.integers(0, scores, count) / scores if scored else None,
        )

    return table(objects, scored=False), table(boxes, scored=True)


def written_out(table: BoxTable, weights: np.ndarray) -> BoxTable:
    """The drawn images as images of their own, copies following each other."""
    parts = [
        np.flatnonzero(table.case_index == case)
        for case in np.repeat(np.arange(len(weights)), weights)
    ]
    rows = np.concatenate(parts)
    return BoxTable(
        case_index=np.repeat(np.arange(len(parts)), [len(part) for part in parts]),
        labels=table.labels[rows],
        boxes=table.boxes[rows],
        scores=None if table.scores is None else table.scores[rows],
    )


def numbers(values: object) -> np.ndarray:
    """Nested lists with None as an array with NaN."""
    return np.array(values, dtype=np.float64)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    cases=st.integers(1, 7),
    objects=st.integers(0, 14),
    boxes=st.integers(0, 60),
    convention=st.sampled_from(["clean", "nndetection"]),
)
def test_every_resample_equals_the_evaluation_of_its_images_written_out(
    seed: int, cases: int, objects: int, boxes: int, convention: Convention
) -> None:
    # Ties, cases and classes that a resample lacks, a single image: all within these ranges.
    tables = make_tables(seed, cases=cases, objects=objects, boxes=boxes)
    names = [str(case) for case in range(cases)]
    got = resampled(
        names, *tables, num_classes=3, samples=4, seed=seed, measures=MEASURES,
        convention=convention,
    )  # fmt: skip
    most = most_copies(cases, samples=4, seed=seed)
    standings = Standings(cases, 3, *tables, measures=MEASURES, convention=convention)
    assert MEASURES.sizes is not None
    strata = SizeStrata(standings, *tables, sizes=MEASURES.sizes, spacings=None)
    strata.allow_copies(most)
    for number, weights in enumerate(draws(cases, samples=4, seed=seed)):
        expected = compute_metrics(
            names, *(written_out(table, weights) for table in tables), num_classes=3,
            measures=MEASURES, convention=convention,
        )  # fmt: skip
        for key, ap in expected["ap"].items():
            same(got["map"][key][number], ap["map"])
            same(got["ap_per_class"][key][number], [*ap["per_class"].values()])
        for key, froc in expected["froc"].items():
            same(got["sensitivity"][key][number], froc["pooled"]["sensitivity"])
            same(got["froc"][key][number], froc["pooled"]["mean"])
        by_size = strata.values(weights)
        for row, stratum in enumerate(expected["sizes"]["strata"]):
            for key in ("0.10", "0.25"):
                same(by_size["map"][key][row], stratum["ap"][key]["map"])
                same(by_size["froc"][key][row], stratum["froc"][key]["mean"])


def same(got: np.ndarray, expected: object) -> None:
    np.testing.assert_allclose(got, numbers(expected), rtol=0, atol=1e-12, equal_nan=True)


def test_copies_of_an_image_with_tied_hits_and_errors_rank_image_by_image() -> None:
    # Two images, one drawn twice: hit, error | hit, error at one score, and not two hits first.
    box = np.array([[0.0, 0, 0, 4, 4, 4]])
    far = box + 50
    truth = BoxTable.from_cases([box, far[:0]], [np.zeros(1), np.zeros(0)])
    found = BoxTable.from_cases(
        [np.concatenate([box, far]), far[:0]],
        [np.zeros(2), np.zeros(0)],
        scores=[np.full(2, 0.5), np.zeros(0)],
    )
    standings = Standings(2, 1, truth, found, measures=Measures(), convention="clean")
    standings.allow_copies(2)
    weights = np.array([2, 0])
    # hit, error, hit, error: 2/3 beyond half the recall; both hits first would give 1.
    expected = (51 * 1 + 50 * 2 / 3) / 101
    assert standings.values(weights)["map"]["0.10"] == pytest.approx(expected, abs=1e-12)


def test_long_curves_are_bisected_to_the_same_sensitivities() -> None:
    truth, found = make_tables(5, cases=40, objects=200, boxes=3 * FEW_POINTS, scores=10**9)
    names = [str(case) for case in range(40)]
    values = resampled(names, truth, found, num_classes=3, samples=3, measures=MEASURES)
    for number, weights in enumerate(draws(40, samples=3, seed=0)):
        expected = compute_metrics(
            names, *(written_out(table, weights) for table in (truth, found)), num_classes=3,
            measures=MEASURES,
        )  # fmt: skip
        assert expected["counts"]["0"]["predictions_after_cut"] * 3 > FEW_POINTS
        same(
            values["sensitivity"]["0.10"][number], expected["froc"]["0.10"]["pooled"]["sensitivity"]
        )


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**20), cases=st.integers(1, 9), label=st.sampled_from([None, 0, 2]))
def test_the_area_under_the_case_curve_is_scikit_learns(
    seed: int, cases: int, label: int | None
) -> None:
    truth, found = make_tables(seed, cases=cases, objects=cases, boxes=2 * cases)
    (weights,) = draws(cases, samples=1, seed=seed)
    got = float(CaseRanking(truth, found, num_cases=cases, label=label).area(weights))
    assert found.scores is not None
    best, positive = np.full(cases, -1.0), np.zeros(cases, dtype=bool)
    for case, score, own in zip(found.case_index, found.scores, found.labels, strict=True):
        if label in (None, own):
            best[case] = max(best[case], score)
    positive[truth.case_index[(truth.labels == label) | (label is None)]] = True
    drawn = np.repeat(np.arange(cases), weights)
    if positive[drawn].all() or not positive[drawn].any():
        assert np.isnan(got)
    else:
        assert got == pytest.approx(roc_auc_score(positive[drawn], best[drawn]), abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**20), rate=st.sampled_from([0.1, 0.5, 1.0, 2.0, 100.0]))
def test_an_operating_point_is_the_lowest_score_within_the_rate(seed: int, rate: float) -> None:
    truth, found = make_tables(seed, cases=5, objects=8, boxes=25, classes=1)
    standings = Standings(5, 1, truth, found, measures=Measures(), convention="clean")
    once = np.ones(5, dtype=np.int64)
    got = operating_point(standings.pooled, 0, rate=rate).to_json(once)
    ranked = standings.pooled
    hit = np.isin(np.arange(len(ranked.rows)), ranked.hits[0])
    allowed = [
        score
        for score in sorted(set(ranked.scores.tolist()))
        if (~hit[ranked.scores >= score]).sum() / 5 <= rate
    ]
    assert got["threshold"] == (allowed[0] if allowed else None)
    passing = ranked.scores >= allowed[0] if allowed else np.zeros(len(hit), dtype=bool)
    assert got["fppi"] == (~hit[passing]).sum() / 5
    assert got["sensitivity"] == hit[passing].sum() / 8
    assert got["precision"] == (hit[passing].mean() if passing.any() else None)
    assert got["fppi"] <= rate


def test_sizes_part_objects_by_millimetres_where_spacings_are_known() -> None:
    truth, found = make_tables(1, cases=4, objects=30, boxes=60)
    names = list("abcd")
    voxels = compute_metrics(names, truth, found, measures=Measures(sizes=Sizes(edges=(50.0,))))
    doubled = compute_metrics(
        names, truth, found, spacings=np.full((4, 3), 2.0),
        measures=Measures(sizes=Sizes(edges=(400.0,))),
    )  # fmt: skip
    assert (voxels["sizes"]["unit"], doubled["sizes"]["unit"]) == ("voxels", "mm^3")
    counts = [[s["num_objects"] for s in m["sizes"]["strata"]] for m in (voxels, doubled)]
    assert counts[0] == counts[1]
    assert sum(counts[0]) == 30
    for one, other in zip(voxels["sizes"]["strata"], doubled["sizes"]["strata"], strict=True):
        assert (one["ap"], one["froc"]) == (other["ap"], other["froc"])
    longest = Measures(sizes=Sizes("longest-side", (4.0,)))
    content = compute_metrics(names, truth, found, measures=longest)["sizes"]
    sides = (truth.boxes[:, 3:] - truth.boxes[:, :3]).max(axis=1)
    assert [s["num_objects"] for s in content["strata"]] == [(sides < 4).sum(), (sides >= 4).sum()]


def test_one_stratum_of_all_sizes_is_the_whole_evaluation() -> None:
    truth, found = make_tables(2, cases=4, objects=20, boxes=50)
    metrics = compute_metrics(
        list("abcd"), truth, found, measures=Measures(sizes=Sizes(edges=(1e9,)))
    )
    everything, nothing = metrics["sizes"]["strata"]
    for key in ("0.10", "0.30"):
        assert everything["ap"][key] == metrics["ap"][key]
        assert everything["froc"][key] == metrics["froc"][key]["pooled"]
    assert nothing["num_objects"] == 0
    assert nothing["froc"]["0.10"]["mean"] is None


def test_the_histogram_counts_every_kept_prediction_once() -> None:
    truth, found = make_tables(3, cases=4, objects=20, boxes=50)
    metrics = compute_metrics(list("abcd"), truth, found)
    histogram = metrics["score_histogram"]
    pooled = histogram["0.10"]["pooled"]
    kept = sum(count["true_positives"]["0.10"] for count in metrics["counts"].values())
    assert sum(pooled["true_positives"]) == kept
    assert sum(pooled["false_positives"]) == 50 - kept
    assert (histogram["edges"][0], histogram["edges"][-1]) == (0.0, 1.0)


def test_bounds_hold_their_estimates_for_every_figure() -> None:
    truth, found = make_tables(4, cases=30, objects=60, boxes=200, scores=1000)
    metrics = compute_metrics([str(n) for n in range(30)], truth, found, bootstrap=60)
    bounds = metrics["bootstrap"]

    def holds(interval: list[float], value: float) -> bool:
        return interval[0] <= value <= interval[1]

    assert holds(bounds["case_level"]["pooled"], metrics["case_level"]["pooled"]["auc"])
    for label in ("0", "1", "2"):
        froc = metrics["froc"]["0.10"]["per_class"][label]["mean"]
        assert holds(bounds["froc_per_class"]["0.10"][label], froc)
        assert holds(
            bounds["ap_per_class"]["0.10"][label], metrics["ap"]["0.10"]["per_class"][label]
        )
    points = zip(bounds["operating_points"]["0.10"], metrics["operating_points"]["0.10"]["pooled"],
                 strict=True)  # fmt: skip
    for interval, point in points:
        assert holds(interval["sensitivity"], point["sensitivity"])
        assert holds(interval["fppi"], point["fppi"])
    for interval, stratum in zip(bounds["sizes"]["froc"]["0.10"], metrics["sizes"]["strata"],
                                 strict=True):  # fmt: skip
        assert holds(interval, stratum["froc"]["0.10"]["mean"])


def test_the_benchmark_compares_equal_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "tools")
    import_module("bench_evaluate").bench(num_cases=20, samples=5, tables=2, loops=1)
    assert "1 of 5 extrapolated" in capsys.readouterr().out
