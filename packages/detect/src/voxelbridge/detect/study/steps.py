"""What each kind of job calls. Every one can be called again after it was interrupted."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import assert_never

from voxelbridge.core.errors import DataError
from voxelbridge.core.files import atomic_write, read_json, write_json
from voxelbridge.core.train.distributed import DeviceChoice
from voxelbridge.detect.study.tasks import (
    Evaluate,
    Predict,
    Prepare,
    Sweep,
    Task,
    Train,
    Truth,
)
from voxelbridge.detect.study_cells import (
    CASES_FILE,
    GROUND_TRUTH_FILE,
    METRICS_FILE,
    PREDICTIONS_FILE,
)

IMAGES_FILE = "images.json"
METRICS_LOG = "metrics.jsonl"


def do(task: Task, *, device: DeviceChoice, workers: int) -> bool:
    """Does a task; False where it ended early, to be gone on with."""
    match task:
        case Prepare():
            _prepare(task, workers=workers)
        case Truth():
            _truth(task, workers=workers)
        case Train():
            return _train(task, device=device, workers=workers)
        case Sweep():
            _sweep(task, device=device, workers=workers)
        case Predict():
            _predict(task, device=device, workers=workers)
        case Evaluate():
            _evaluate(task, workers=workers)
        case _:
            assert_never(task)
    return True


def reached_steps(task: Task) -> int | None:
    """Steps that a training has done so far; None for other tasks."""
    return steps_of_run(Path(task.run)) if isinstance(task, Train) else None


def steps_of_run(run: Path) -> int:
    """Steps that the records of a run reach; 0 where there are none."""
    last = 0
    for record in _records(run / METRICS_LOG):
        if isinstance(step := record.get("step"), int):
            last = step + 1
    return last


def _prepare(task: Prepare, *, workers: int) -> None:
    from voxelbridge.detect.plan_request import parse_request
    from voxelbridge.detect.prepare import describe, prepare

    plan = task.plan
    request = parse_request(
        plan.rule, gpu_memory=plan.gpu_memory, spacing_mm=plan.spacing_mm,
        settings=list(plan.settings), resampling=plan.resampling,
    )  # fmt: skip
    store = Path(task.store)
    print(describe(prepare(Path(task.dataset), store, request=request, workers=workers), store))


def _truth(task: Truth, *, workers: int) -> None:
    from voxelbridge.core.data.dataset import RawDataset
    from voxelbridge.detect.prepare import write_tables_of

    raw = RawDataset.open(Path(task.dataset))
    cases = [case for case in raw.test_cases if case.has_labels]
    if not cases and not task.only_unseen:
        cases = [case for case in raw.cases if case.has_labels]
    if not cases:
        raise DataError(
            f"{raw.folder}: no labelled case in imagesTs; label them, or state another `test` "
            "for this data set, such as held-out"
        )
    out = Path(task.out)
    unreadable = write_tables_of(out, cases, workers=workers)
    if unreadable:
        raise DataError(
            f"{raw.folder}: the labels of {len(unreadable)} test cases could not be read "
            f"({', '.join(unreadable[:5])})"
        )
    write_json(out / IMAGES_FILE, [str(path) for case in cases for path in case.image_paths])


def _train(task: Train, *, device: DeviceChoice, workers: int) -> bool:
    from voxelbridge.detect.train import train
    from voxelbridge.detect.weights import stored_weights

    run = Path(task.run)
    try:
        train(
            task.preset, store=Path(task.store), run=run, overrides=task.settings,
            init=Path(task.init) if task.init else None, stem=task.stem, init_parts=task.parts,
            tune=task.tune, fold=task.fold, device=device, workers=workers,
        )  # fmt: skip
    except KeyboardInterrupt:  # after Ctrl-C, with the state saved
        return False
    return stored_weights(run, "last") is not None


def _sweep(task: Sweep, *, device: DeviceChoice, workers: int) -> None:
    from voxelbridge.detect.sweep import chosen_steps, describe, raise_for_failures, sweep

    swept = sweep(
        [Path(task.run)], store=Path(task.store), objective=task.objective,
        steps=chosen_steps(only=[], skip=list(task.skip)), num_mirrorings=task.tta,
        weights=task.weights, device=device, workers=workers,
    )  # fmt: skip
    print(describe(swept))
    raise_for_failures(swept.failed_cases, of=swept.num_cases)


def _predict(task: Predict, *, device: DeviceChoice, workers: int) -> None:
    from voxelbridge.detect.cross_validation import out_of_fold
    from voxelbridge.detect.predict_cases import predict_cases
    from voxelbridge.detect.sweep import raise_for_failures

    run, out = Path(task.run), Path(task.out)
    if task.truth is None:
        result = out_of_fold(
            [run], out, store=Path(task.store), steps=(), num_mirrorings=task.tta,
            weights=task.weights, device=device, workers=workers,
        )  # fmt: skip
        raise_for_failures(result.failed, of=result.metrics["num_cases"])
        return
    images = [Path(path) for path in read_json(Path(task.truth) / IMAGES_FILE)]
    predict_cases(
        [run], images, out, device=device, num_mirrorings=task.tta, pictures=False,
        weights=task.weights,
    )  # fmt: skip


def _evaluate(task: Evaluate, *, workers: int) -> None:
    from voxelbridge.detect.evaluate.metrics import evaluate_files
    from voxelbridge.detect.plan import read_plan

    truth, predictions, out = Path(task.truth), Path(task.predictions), Path(task.out)
    # Without metrics.json the cell counts as not finished while its tables change.
    (out / METRICS_FILE).unlink(missing_ok=True)
    for source in (
        truth / CASES_FILE, truth / GROUND_TRUTH_FILE, predictions / PREDICTIONS_FILE
    ):  # fmt: skip
        with atomic_write(out / source.name) as temporary:
            shutil.copyfile(source, temporary)
    metrics = evaluate_files(
        out / GROUND_TRUTH_FILE,
        out / PREDICTIONS_FILE,
        cases=out / CASES_FILE,
        output=out / METRICS_FILE,
        convention=task.convention,
        num_classes=len(read_plan(Path(task.run)).class_names),
        bootstrap=task.bootstrap,
        workers=workers,
    )
    print(f"mAP@0.10 {metrics['ap']['0.10']['map']}")


def _records(path: Path) -> Iterator[dict[str, object]]:
    """The records of the end of a metrics.jsonl; a line that is being written is passed over."""
    if not path.is_file():
        return
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 65_536))
        lines = stream.read().splitlines()
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record
