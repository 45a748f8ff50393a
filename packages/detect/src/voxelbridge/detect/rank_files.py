"""`vb-detect rank`: tables in; ranking.csv, ranking.json and figures out."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from voxelbridge.core.errors import ConfigError
from voxelbridge.core.files import atomic_write, write_json
from voxelbridge.detect.rank_bootstrap import parse_measure
from voxelbridge.detect.rank_figures import draw_overall, draw_per_dataset, measure_text
from voxelbridge.detect.rank_tables import TABLE_MEASURE, collect, method_names
from voxelbridge.detect.ranking import Ranking, baselines, rank, ranking_rows

SCHEMA = 1
CSV_NAME = "ranking.csv"
JSON_NAME = "ranking.json"
OVERALL, PER_DATASET = "ranks_", "ranks_per_dataset_"  # figures, followed by the measure
USUAL_MEASURES = ("map_0.10", "froc_0.10")


def run_rank(
    tables: Sequence[Path],
    output: Path,
    *,
    baseline: str | None = None,
    measures: Sequence[str] = (),
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, Ranking]:
    """Ranks what `tables` hold and writes it to `output`; the ranking of each measure.

    `measures` empty: mAP and FROC at IoU 0.1 as the paper; tables of single figures take none.
    """
    names = list(dict.fromkeys(measures or USUAL_MEASURES))
    parsed = [parse_measure(name) for name in names]
    baselines(method_names(tables), baseline)  # a typing error shows before the long work
    collected = collect(tables, measures=parsed, samples=samples, seed=seed)
    if measures and TABLE_MEASURE in collected:
        raise ConfigError(
            f"--measure: got {measures[0]}, but the tables hold single figures; leave it out"
        )
    rankings = {name: rank(values, baseline=baseline) for name, values in collected.items()}
    write_ranking(output, rankings, facts={"samples": samples, "seed": seed})
    return rankings


def describe_ranking(measure: str, ranking: Ranking) -> str:
    """A line for each method, best first: mean rank, figure, gain on its baseline."""
    width = max(len(name) for name in ranking.methods)
    lines = [f"{measure}, {len(ranking.datasets)} data sets:"]
    for method in ranking.order:
        gap = ranking.difference(method)
        gain = ""
        if gap is not None and ranking.baselines[method] != method:
            gain = f"  {gap.value:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]"
        lines.append(
            f"  {ranking.methods[method]:<{width}}  rank {ranking.overall.mean[method]:5.2f}"
            f"  {ranking.means[method]:.4f}{gain}"
        )
    return "\n".join(lines)


def write_ranking(
    output: Path, rankings: Mapping[str, Ranking], *, facts: Mapping[str, Any]
) -> list[Path]:
    """Writes ranking.csv, ranking.json and the figures of every measure; the written files.

    `facts` go to the JSON file as they are.
    """
    output.mkdir(parents=True, exist_ok=True)
    written = [output / CSV_NAME, output / JSON_NAME]
    with atomic_write(written[0]) as temporary:
        temporary.write_text(ranking_csv(rankings), encoding="utf-8", newline="")
    write_json(written[1], ranking_json(rankings, facts=facts))
    for measure, ranking in rankings.items():
        written += draw_overall(output / f"{OVERALL}{measure}", ranking, measure, others=rankings)
        written += draw_per_dataset(output / f"{PER_DATASET}{measure}", ranking, measure)
    return written


def figure_caption(stem: str) -> str:
    """What a figure that `write_ranking` calls `stem` shows."""
    if stem.startswith(PER_DATASET):
        return f"Ranks on each data set by {measure_text(stem.removeprefix(PER_DATASET))}"
    return f"Ranks over all data sets by {measure_text(stem.removeprefix(OVERALL))}"


def ranking_csv(rankings: Mapping[str, Ranking]) -> str:
    """Text of ranking.csv: a row for each measure, data set (or all) and method."""
    text = io.StringIO()
    rows = [{"measure": name, **row} for name, each in rankings.items()
            for row in ranking_rows(each)]  # fmt: skip
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def ranking_json(rankings: Mapping[str, Ranking], *, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Content of ranking.json: the rows of ranking.csv with the shares of every place."""
    measures = {}
    for name, ranking in rankings.items():
        placings = {"(all)": ranking.overall}
        placings.update(zip(ranking.datasets, ranking.per_dataset, strict=True))
        rows = ranking_rows(ranking)
        index = {method: number for number, method in enumerate(ranking.methods)}
        datasets: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            key = row.pop("dataset")
            shares = placings[key].shares[index[row["method"]]]
            datasets.setdefault(key, []).append({**row, "place_shares": shares.tolist()})
        counts = {
            dataset: len(part)
            for dataset, part in zip(ranking.datasets, ranking.samples, strict=True)
        }
        measures[name] = {
            "num_resamples": counts,
            "all": datasets.pop("(all)"),
            "datasets": datasets,
        }
    return {"schema": SCHEMA, **facts, "measures": measures}
