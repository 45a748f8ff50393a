"""Ranks over resamples: ties, several data sets, baselines, tables, the command."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.detect.evaluate.bootstrap import resampled
from voxelbridge.detect.evaluate.tables import (
    BoxTable,
    read_cases,
    read_ground_truth,
    read_predictions,
    write_cases,
    write_ground_truth,
    write_predictions,
)
from voxelbridge.detect.rank_bootstrap import Entry, bootstrap, parse_measure
from voxelbridge.detect.rank_files import run_rank
from voxelbridge.detect.rank_tables import collect
from voxelbridge.detect.ranking import Values, baselines, place_shares, rank, rank_rows
from voxelbridge.detect.study_cells import CellKey, CellResult, read_cells
from voxelbridge.detect.study_ranking import rank_cells

CASES = [f"case_{index}" for index in range(12)]


def boxes_of(seed: int, *, hits: float) -> tuple[BoxTable, BoxTable]:
    """One object per case (none in the last), and predictions that hit a share of them."""
    rng = np.random.default_rng(seed)
    low = np.tile([4.0, 4, 4], (11, 1))
    truth = BoxTable(np.arange(11), np.arange(11) % 2, np.concatenate([low, low + 6], axis=1))
    found = rng.random(11) < hits
    shift = np.where(found, 0.5, 20.0)[:, None]
    predictions = BoxTable(
        np.arange(11), truth.labels, truth.boxes + shift, rng.random(11).round(3)
    )
    return truth, predictions


def write_boxes(folder: Path, seed: int, *, hits: float, cases: list[str] | None = None) -> None:
    """The three tables of a method; `cases` in another order move the rows along."""
    truth, predictions = boxes_of(seed, hits=hits)
    names = cases or CASES
    folder.mkdir(parents=True)
    write_cases(folder / "cases.csv", names)
    write_ground_truth(folder / "ground_truth.csv", truth, cases=CASES)
    write_predictions(folder / "predictions.csv", predictions, cases=CASES)


def write_table(path: Path, rows: Sequence[tuple[object, ...]]) -> Path:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return path


def box_row(dataset: str, method: str, folder: str) -> tuple[str, ...]:
    parts = (f"{folder}/ground_truth.csv", f"{folder}/predictions.csv", f"{folder}/cases.csv")
    return (dataset, method, *parts)


BOX_HEADER = ("dataset", "method", "ground_truth", "predictions", "cases")


def test_equal_figures_share_the_mean_of_their_ranks_and_their_places() -> None:
    samples = np.array([[0.5, 0.9, 0.5, 0.1], [0.3, 0.3, 0.3, 0.3]])
    assert rank_rows(samples).tolist() == [[2.5, 1, 2.5, 4], [2.5] * 4]
    shares = place_shares(samples)
    assert shares[0].tolist() == [0.125, 0.375, 0.375, 0.125]
    assert shares[1].tolist() == [0.625, 0.125, 0.125, 0.125]
    np.testing.assert_allclose(shares.sum(axis=0), 1)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(2, 6), st.integers(1, 3))
def test_mean_ranks_add_up_and_agree_with_the_places(seed: int, methods: int, sets: int) -> None:
    rng = np.random.default_rng(seed)
    values = {
        f"D{d}": {
            f"m{m}": Values(float(rng.random()), rng.integers(0, 4, 5 + d) / 4.0)
            for m in range(methods)
        }
        for d in range(sets)
    }
    ranking = rank(values)
    overall = ranking.overall
    assert overall.mean.sum() == pytest.approx(methods * (methods + 1) / 2)
    places = np.arange(1, methods + 1)
    np.testing.assert_allclose(overall.shares @ places, overall.mean)
    np.testing.assert_allclose(
        overall.mean, np.mean([one.mean for one in ranking.per_dataset], axis=0)
    )
    slow = [[1 + sum(x > row[m] for x in row) + (sum(x == row[m] for x in row) - 1) / 2
             for m in range(methods)] for row in ranking.samples[0]]  # fmt: skip
    np.testing.assert_allclose(rank_rows(ranking.samples[0]), slow)


def test_each_architecture_has_its_own_baseline() -> None:
    names = ("a/none-default", "a/mae", "b/mae", "b/none-default", "c/mae")
    assert baselines(names, None) == (0, 0, 3, 3, None)
    assert baselines(names, "a/mae") == (1,) * 5
    assert baselines(("x", "y"), None) == (None, None)
    with pytest.raises(ConfigError, match="--baseline: got 'voco'"):
        baselines(names, "voco")


def test_difference_is_taken_resample_by_resample() -> None:
    common = np.linspace(0, 0.5, 101)
    values = {
        "D1": {"default": Values(0.5, common), "new": Values(0.6, common + 0.1)},
        "D2": {"default": Values(0.4, common), "new": Values(0.7, common + 0.3)},
    }
    ranking = rank(values)
    gap = ranking.difference(1)
    assert gap is not None
    assert (gap.value, gap.low, gap.high) == pytest.approx((0.2, 0.2, 0.2))
    one = ranking.difference(1, dataset=1)
    assert one is not None
    assert one.value == pytest.approx(0.3)


def test_resamples_without_an_object_are_left_out_for_all() -> None:
    part = np.array([0.1, np.nan, 0.3])
    ranking = rank({"D": {"a": Values(0.2, part), "b": Values(0.1, part - 0.05)}})
    assert len(ranking.samples[0]) == 2
    with pytest.raises(DataError, match=r"resample 1 of a is not a number"):
        rank({"D": {"a": Values(0.2, part), "b": Values(0.1, np.zeros(3))}})


def test_a_missing_method_is_named() -> None:
    one = Values(0.1, np.zeros(3))
    with pytest.raises(DataError, match="data set D2: method b is missing"):
        rank({"D1": {"a": one, "b": one}, "D2": {"a": one}})
    with pytest.raises(DataError, match="b has 2 resamples, a has 3"):
        rank({"D1": {"a": one, "b": Values(0.1, np.zeros(2))}})


def test_box_tables_give_the_evaluators_resamples_in_any_order_of_cases(tmp_path: Path) -> None:
    write_boxes(tmp_path / "good", 1, hits=0.9)
    write_boxes(tmp_path / "bad", 2, hits=0.3, cases=CASES[::-1])
    table = write_table(
        tmp_path / "table.csv",
        [BOX_HEADER, box_row("D01", "good", "good"), box_row("D01", "bad", "bad")],
    )
    measures = [parse_measure(name) for name in ("map_0.10", "froc_0.10", "map_range")]
    found = collect([table], measures=measures, samples=25, seed=3)
    folder = tmp_path / "bad"
    truth = read_ground_truth(folder / "ground_truth.csv", CASES)
    predictions = read_predictions(folder / "predictions.csv", CASES)
    expected = resampled(CASES, truth, predictions, num_classes=2, samples=25, seed=3)
    np.testing.assert_allclose(
        found["map_0.10"]["D01"]["bad"].samples, expected["map"]["0.10"], atol=1e-12
    )
    np.testing.assert_allclose(
        found["froc_0.10"]["D01"]["bad"].samples, expected["froc"]["0.10"], atol=1e-12
    )
    only_froc = collect([table], measures=measures[1:2], samples=25, seed=3)
    np.testing.assert_array_equal(
        only_froc["froc_0.10"]["D01"]["bad"].samples, found["froc_0.10"]["D01"]["bad"].samples
    )
    assert read_cases(folder / "cases.csv") == CASES[::-1]


def test_seeds_are_averaged_and_folds_put_together(tmp_path: Path) -> None:
    measures = [parse_measure("map_0.10")]
    entries = []
    for seed in (1, 2):
        write_boxes(tmp_path / f"{seed}", seed, hits=0.6)
        folder = tmp_path / f"{seed}"
        entries.append(Entry("D", "m", folder / "ground_truth.csv", folder / "predictions.csv",
                             folder / "cases.csv", seed=f"{seed}", where=f"{seed}"))  # fmt: skip
    both = bootstrap(entries, measures=measures, samples=10, seed=0)["map_0.10"]["D"]["m"]
    single = [bootstrap([e], measures=measures, samples=10, seed=0)["map_0.10"]["D"]["m"]
              for e in entries]  # fmt: skip
    np.testing.assert_allclose(both.samples, (single[0].samples + single[1].samples) / 2)
    # Two folds: the cases of one training, split into two folders.
    truth, predictions = boxes_of(1, hits=0.6)
    halves = []
    for number, rows in enumerate((range(6), range(6, 12))):
        folder = tmp_path / f"fold_{number}"
        folder.mkdir()
        names = [CASES[row] for row in rows]
        write_cases(folder / "cases.csv", names)
        inside = np.isin(truth.case_index, list(rows))
        for write, table in ((write_ground_truth, truth), (write_predictions, predictions)):
            scores = None if table.scores is None else table.scores[inside]
            part = BoxTable(table.case_index[inside], table.labels[inside], table.boxes[inside],
                            scores)  # fmt: skip
            name = "ground_truth.csv" if scores is None else "predictions.csv"
            write(folder / name, part, cases=CASES)
        halves.append(Entry("D", "m", folder / "ground_truth.csv", folder / "predictions.csv",
                            folder / "cases.csv", where=f"fold {number}"))  # fmt: skip
    pooled = bootstrap(halves, measures=measures, samples=10, seed=0)["map_0.10"]["D"]["m"]
    np.testing.assert_array_equal(pooled.samples, single[0].samples)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("dataset", "method", "score")], "line 1: got the columns dataset,method,score"),
        ([("dataset", "method", "case_id", "value", "x")], "unknown column 'x'"),
        ([("dataset", "method", "case_id", "value")], "only a header"),
        ([("dataset", "method", "case_id", "value"), ("D", "a", "1")], "line 2: got 3 fields"),
        ([("dataset", "method", "case_id", "value"), ("D", "a", "1", "nan")],
         "line 2: value: got 'nan', expected a finite number"),
        ([("dataset", "method", "case_id", "value"), ("D", "a", "1", "2"), ("D", "a", "1", "3")],
         "line 3: case_id 1 of method a on D is there twice"),
        ([("dataset", "method", "case_id", "value"), ("D", "a", "1", "2"), ("D", "b", "2", "3")],
         "data set D: case 1 is there for a, but not for b"),
        ([("dataset", "method", "sample", "value"), ("D", "a", "1", "2"), ("E", "b", "1", "3")],
         "data set D: method b is missing"),
        ([("dataset", "method", "sample", "value"), ("D", "a", "1", "2")], "got 1 method"),
    ],
)  # fmt: skip
def test_wrong_tables_are_told_in_one_line(
    tmp_path: Path, rows: list[tuple[object, ...]], message: str
) -> None:
    table = write_table(tmp_path / "table.csv", rows)
    with pytest.raises(DataError) as caught:
        run_rank([table], tmp_path / "out", samples=5)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_other_cases_and_other_objects_are_refused(tmp_path: Path) -> None:
    write_boxes(tmp_path / "a", 1, hits=0.9)
    write_boxes(tmp_path / "b", 1, hits=0.9)
    rows = [BOX_HEADER, box_row("D01", "a", "a"), box_row("D01", "b", "b")]
    table = write_table(tmp_path / "table.csv", rows)
    truth = (tmp_path / "b/ground_truth.csv").read_text()
    (tmp_path / "b/ground_truth.csv").write_text(truth.replace("10.0", "11.0", 1))
    with pytest.raises(DataError, match="has other objects than"):
        run_rank([table], tmp_path / "out", samples=5)
    (tmp_path / "b/ground_truth.csv").write_text(truth)
    write_cases(tmp_path / "b/cases.csv", [*CASES, "more"])
    with pytest.raises(DataError, match=r"case more is evaluated by .*line 3, but not by .*line 2"):
        run_rank([table], tmp_path / "out", samples=5)
    with pytest.raises(ConfigError, match=r"--baseline: got 'c', expected one of a, b"):
        run_rank([table], tmp_path / "out", baseline="c")
    write_table(table, [*rows, box_row("D01", "a", "a")])
    with pytest.raises(DataError, match="are there already"):
        run_rank([table], tmp_path / "out", samples=5)


def test_equal_cases_in_another_order_tie(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scores = rng.random(20)
    rows: list[tuple[object, ...]] = [("dataset", "method", "case_id", "value")]
    for method, order in (("a", range(20)), ("b", range(19, -1, -1))):
        rows += [("D", method, f"c{index}", scores[index]) for index in order]
    rows += [("D", "better", f"c{index}", scores[index] + 0.01) for index in range(20)]
    found = collect([write_table(tmp_path / "t.csv", rows)], measures=[], samples=50, seed=0)
    assert rank(found["value"]).overall.mean.tolist() == [2.5, 2.5, 1.0]


@pytest.mark.slow
def test_files_and_figures_of_two_measures(tmp_path: Path) -> None:
    rows: list[tuple[str, ...]] = [BOX_HEADER]
    for dataset in ("D01", "D02"):
        for number, method in enumerate(("net/none-default", "net/mae")):
            folder = f"{dataset}_{number}"
            write_boxes(tmp_path / folder, number, hits=0.3 + 0.6 * number)
            rows.append(box_row(dataset, method, folder))
    output = tmp_path / "out"
    run_rank([write_table(tmp_path / "table.csv", rows)], output, samples=30)
    with (output / "ranking.csv").open() as stream:
        table = list(csv.DictReader(stream))
    assert [row["dataset"] for row in table[:6]] == ["(all)"] * 2 + ["D01"] * 2 + ["D02"] * 2
    assert table[0]["method"] == "net/mae"
    assert table[0]["baseline"] == "net/none-default"
    assert float(table[0]["difference"]) > 0
    content = json.loads((output / "ranking.json").read_text())
    assert content["schema"] == 1
    assert content["samples"] == 30
    first = content["measures"]["froc_0.10"]["all"][0]
    assert sum(first["place_shares"]) == pytest.approx(1)
    for name in ("ranks_map_0.10", "ranks_per_dataset_froc_0.10"):
        for ending in ("png", "pdf", "svg"):
            assert (output / f"{name}.{ending}").stat().st_size > 1000


def test_cells_of_a_study_are_found_and_ranked(tmp_path: Path) -> None:
    metrics = {"schema": 1, "ap": {}, "froc": {}}
    cells = [("D01", "mae"), ("D01", "mg"), ("D02", "mae"), ("D02", "mg"), ("D02", "voco")]
    for number, (dataset, initialisation) in enumerate(cells):
        key = CellKey(dataset, "net", initialisation, fold=0, seed=1)
        write_boxes(tmp_path / key.path, number, hits=0.5)
        (tmp_path / key.path / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "D02/net/mae/fold_0_seed_x").mkdir()
    (tmp_path / "D02/net/mae/fold_0_seed_x/metrics.json").write_text("{}")
    found = read_cells(tmp_path)
    assert [cell.key.initialisation for cell in found] == ["mae", "mg", "mae", "mg", "voco"]
    assert isinstance(found[0], CellResult)
    rankings, notes = rank_cells(found, samples=10)
    assert rankings["map_0.10"].methods == ("net/mae", "net/mg")
    assert notes == ["net/voco is not ranked: no result on D01"]
    with pytest.raises(ConfigError, match="it names a folder"):
        CellKey("a/b", "net", "mae", fold=0, seed=0)
    (found[0].folder / "metrics.json").write_text('{"schema": 2, "ap": {}, "froc": {}}')
    with pytest.raises(DataError, match="got schema 2, expected 1"):
        read_cells(tmp_path)
