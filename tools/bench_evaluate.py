"""Confidence intervals by array arithmetic against evaluating every resample anew.

    uv run tools/bench_evaluate.py [--quick]

2,000 cases with 40,000 objects and 200,000 predictions of three classes; 1,000 resamples of the
cases for mAP and FROC at IoU 0.1. The loop puts the drawn cases into tables and evaluates these,
once with the same vectorised assignment and once with a plain loop over cases, classes and
predictions. It runs a few resamples and is extrapolated to all. One thread, CPU seconds; all sides
must give the same figures, or the run fails.
"""

import argparse
import resource
import time
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from voxelbridge.detect.evaluate.assign import paired_iou
from voxelbridge.detect.evaluate.average_precision import average_precision
from voxelbridge.detect.evaluate.bootstrap import draws, resampled
from voxelbridge.detect.evaluate.froc import froc_points, sensitivity_at_rates
from voxelbridge.detect.evaluate.measures import Measures
from voxelbridge.detect.evaluate.metrics import compute_metrics
from voxelbridge.detect.evaluate.tables import BoxTable

T = TypeVar("T")

IOU, KEY = 0.1, "0.10"
MEASURES = Measures(ap=(IOU,), ap_range=False, froc=(IOU,), sizes=None)
CLASSES = 3
KEPT = 100  # predictions of a case and class
LARGEST_DIFFERENCE = 1e-12

Floats = NDArray[np.float64]
Figures = tuple[float, float]  # mAP, mean sensitivity of FROC
Data = tuple[list[str], BoxTable, BoxTable]


def main() -> None:
    """Command line: prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a twentieth of the cases")
    quick = parser.parse_args().quick
    with threadpool_limits(1):
        bench(num_cases=100 if quick else 2000, samples=1000, tables=3, loops=1)


def bench(*, num_cases: int, samples: int, tables: int, loops: int) -> None:
    """Prints CPU seconds of `samples` resamples; `tables` and `loops` of them are done anew."""
    data = make_data(num_cases)
    names, truth, found = data
    print(
        f"{num_cases} cases, {len(truth)} objects, {len(found)} predictions, {CLASSES} classes; "
        f"{samples} resamples\n"
    )
    ours, values = _timed(
        lambda: resampled(
            names, truth, found, num_classes=CLASSES, samples=samples, measures=MEASURES
        )
    )
    memory = _peak_mib()
    print("| mAP@0.1 and FROC@0.1, resample by resample | seconds | is |\n|---|---|---|")
    print(f"| array arithmetic, all {samples} | {ours:.2f} | |")
    for name, evaluate, count in (
        ("evaluated anew, vectorised", _with_tables, tables),
        ("evaluated anew, loop over cases and predictions", _with_loops, loops),
    ):
        seconds, figures = _timed(lambda evaluate=evaluate, count=count: _anew(
            data, evaluate, count))  # fmt: skip
        for number, (mean_ap, froc) in enumerate(figures):
            difference = max(
                abs(mean_ap - values["map"][KEY][number]), abs(froc - values["froc"][KEY][number])
            )
            if difference > LARGEST_DIFFERENCE:
                raise SystemExit(f"{name}: resample {number} differs by {difference}")
        whole = seconds * samples / count
        print(f"| {name}, {count} of {samples} extrapolated | {whole:.0f} | {whole / ours:.0f} x |")
    print(f"\npeak memory until then {memory:.0f} MiB")
    everything, _ = _timed(
        lambda: compute_metrics(names, truth, found, num_classes=CLASSES, bootstrap=samples)
    )
    print(
        f"every figure of metrics.json with its interval: {everything:.1f} s, "
        f"{_peak_mib():.0f} MiB at most"
    )


def make_data(num_cases: int) -> Data:
    """20 objects and 100 predictions per case on average, a quarter of these near an object."""
    rng = np.random.default_rng(0)
    objects, near, far = 20 * num_cases, 25 * num_cases, 75 * num_cases
    boxes, labels = _boxes(rng, objects), rng.integers(0, CLASSES, objects)
    cases = np.sort(rng.integers(0, num_cases, objects))
    source = rng.integers(0, objects, near)
    moved = boxes[source] + rng.normal(0, 1.5, (near, 1))
    found = BoxTable(
        case_index=np.concatenate([cases[source], rng.integers(0, num_cases, far)]),
        labels=np.concatenate([labels[source], rng.integers(0, CLASSES, far)]),
        boxes=np.concatenate([moved, _boxes(rng, far)]),
        scores=np.concatenate([rng.beta(4, 2, near), rng.beta(1.5, 4, far)]),
    )
    names = [f"case_{number:05d}" for number in range(num_cases)]
    return names, BoxTable(case_index=cases, labels=labels, boxes=boxes), found


def _boxes(rng: np.random.Generator, count: int) -> Floats:
    low = rng.random((count, 3)) * [100, 300, 300]
    return np.concatenate([low, low + 3 + 20 * rng.random((count, 3))], axis=1)


def _anew(data: Data, evaluate: Callable[[Data], Figures], count: int) -> list[Figures]:
    names, *tables = data
    rows = [
        np.split(
            np.argsort(table.case_index, kind="stable"),
            np.cumsum(np.bincount(table.case_index, minlength=len(names)))[:-1],
        )
        for table in tables
    ]
    figures: list[Figures] = []
    for weights in draws(len(names), samples=count, seed=0):
        drawn = np.repeat(np.arange(len(names)), weights)
        truth, found = (
            _of_cases(table, [each[case] for case in drawn])
            for table, each in zip(tables, rows, strict=True)
        )
        figures.append(evaluate((names, truth, found)))
    return figures


def _of_cases(table: BoxTable, rows: Sequence[NDArray[np.int64]]) -> BoxTable:
    chosen = np.concatenate(rows)
    return BoxTable(
        case_index=np.repeat(np.arange(len(rows)), [len(each) for each in rows]),
        labels=table.labels[chosen],
        boxes=table.boxes[chosen],
        scores=None if table.scores is None else table.scores[chosen],
    )


def _with_tables(data: Data) -> Figures:
    metrics = compute_metrics(*data, num_classes=CLASSES, measures=MEASURES)
    return metrics["ap"][KEY]["map"], metrics["froc"][KEY]["pooled"]["mean"]


def _with_loops(data: Data) -> Figures:
    names, truth, found = data
    assert found.scores is not None
    flags: list[list[bool]] = [[] for _ in range(CLASSES)]
    scores: list[list[float]] = [[] for _ in range(CLASSES)]
    for case in range(len(names)):
        mine, theirs = (np.flatnonzero(t.case_index == case) for t in (truth, found))
        for label in range(CLASSES):
            objects = truth.boxes[mine[truth.labels[mine] == label]]
            rows = theirs[found.labels[theirs] == label]
            rows = rows[np.argsort(-found.scores[rows], kind="stable")][:KEPT]
            scores[label] += found.scores[rows].tolist()
            flags[label] += _matched(found.boxes[rows], objects)
    precisions: list[float] = []
    for label in range(CLASSES):
        hit, _ = _ranked(flags[label], scores[label])
        precisions.append(average_precision(hit, int((truth.labels == label).sum())))
    hit, ranked = _ranked([*chain(*flags)], [*chain(*scores)])
    fppi, sensitivity, _ = froc_points(hit, ranked, num_objects=len(truth), num_images=len(names))
    return float(np.mean(precisions)), float(sensitivity_at_rates(fppi, sensitivity).mean())


def _matched(boxes: Floats, objects: Floats) -> list[bool]:
    """Whether each box, best first, takes an object that is still free."""
    free = np.ones(len(objects), dtype=bool)
    result: list[bool] = []
    for box in boxes:
        overlap = np.where(free, paired_iou(np.broadcast_to(box, objects.shape), objects), -1.0)
        hit = bool((overlap >= IOU).any())
        if hit:
            free[len(overlap) - 1 - int(np.argmax(overlap[::-1]))] = False
        result.append(hit)
    return result


def _ranked(flags: list[bool], scores: list[float]) -> tuple[NDArray[np.bool_], Floats]:
    values = np.array(scores)
    order = np.argsort(-values, kind="stable")
    return np.array(flags, dtype=bool)[order], values[order]


def _timed(run: Callable[[], T]) -> tuple[float, T]:
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
