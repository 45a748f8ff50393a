"""The ranking of a study, from the tables that its finished cells hold."""

from collections.abc import Sequence

from voxelbridge.detect.rank_bootstrap import Entry, bootstrap, parse_measure
from voxelbridge.detect.ranking import Ranking, rank
from voxelbridge.detect.study_cells import CellKey, CellResult


def rank_cells(
    cells: Sequence[CellResult],
    *,
    measures: Sequence[str] = ("map_0.10", "froc_0.10"),
    samples: int = 1000,
    seed: int = 0,
    baseline: str | None = None,
) -> tuple[dict[str, Ranking], list[str]]:
    """The rankings of a study's cells by measure, and a line for each method left out.

    A method is an architecture/initialisation; only those with a result on every data set are
    ranked. No ranking where fewer than two are left.
    """
    datasets = list(dict.fromkeys(cell.key.dataset for cell in cells))
    of_method: dict[str, set[str]] = {}
    for cell in cells:
        of_method.setdefault(_method(cell.key), set()).add(cell.key.dataset)
    notes = [
        f"{method} is not ranked: no result on {', '.join(d for d in datasets if d not in found)}"
        for method, found in of_method.items()
        if len(found) < len(datasets)
    ]
    ranked = [cell for cell in cells if len(of_method[_method(cell.key)]) == len(datasets)]
    if len({_method(cell.key) for cell in ranked}) < 2:
        return {}, [*notes, "no ranking: fewer than two methods have results on every data set"]
    entries = [
        Entry(
            cell.key.dataset, _method(cell.key), cell.ground_truth, cell.predictions, cell.cases,
            seed=str(cell.key.seed), where=str(cell.key),
        )
        for cell in ranked
    ]  # fmt: skip
    parsed = [parse_measure(measure) for measure in measures]
    collected = bootstrap(entries, measures=parsed, samples=samples, seed=seed)
    return {name: rank(values, baseline=baseline) for name, values in collected.items()}, notes


def _method(key: CellKey) -> str:
    return f"{key.architecture}/{key.initialisation}"
