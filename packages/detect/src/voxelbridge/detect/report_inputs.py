"""Collects from folders of predictions what the report page shows."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from voxelbridge.core.errors import DataError
from voxelbridge.core.run import CONFIG_FILE
from voxelbridge.core.train.metrics import read_metrics
from voxelbridge.detect.report import CaseImage, write_report
from voxelbridge.detect.report_sources import PREDICTIONS, ArmSource, read_arm

GROUND_TRUTH = "ground_truth.csv"
BASELINE = "scratch"


def report_folder(
    folder: Path,
    output: Path,
    *,
    ground_truth: Path | None = None,
    pretraining_run: Path | None = None,
    title: str | None = None,
    facts: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Writes the page for the predictions in `folder`, or in each of its sub-folders (arms).

    A run directory counts by its own `predictions/`. What `out-of-fold` wrote is read too. The
    objects come from `ground_truth` or from a ground_truth.csv in the arm's folder or above it.
    """
    folders = find_arms(folder)
    table = ground_truth or _find_ground_truth(folders[0])
    sources = [read_arm(path, table) for path in folders]
    _require_one_grid(folder, sources)
    images: dict[str, CaseImage] = {}
    for source in sources:
        images.update(source.images)
    records = read_metrics(pretraining_run / "metrics.jsonl") if pretraining_run else []
    arms = [source.arm for source in sources]
    write_report(
        output,
        title=title or folder.resolve().name,
        arms=arms,
        pretraining_records=records,
        case_images=[images[name] for name in arms[0].cases if name in images],
        class_names=sources[-1].class_names,
        facts=facts or {"predictions": str(folder), "ground truth": str(table)},
        notes=[*notes, *(note for source in sources for note in source.notes)],
    )


def find_arms(folder: Path) -> list[Path]:
    """Folders with predictions: `folder`, its `predictions/`, or its sub-folders.

    Sub-folders are sorted by name, `scratch` first: the baseline that the others are compared to.
    """
    for candidate in (folder, folder / "predictions"):
        if (candidate / PREDICTIONS).is_file():
            return [candidate]
        found = [path.parent for path in candidate.glob(f"*/{PREDICTIONS}")]
        found.sort(key=lambda path: (path.name != BASELINE, path.name))
        if found:
            return found
    if not folder.is_dir():
        raise DataError(f"{folder}: {'no folder' if folder.exists() else 'does not exist'}")
    if (folder / CONFIG_FILE).is_file():
        raise DataError(
            f"{folder}: a run without predictions; run `vb-detect predict {folder} --images DIR "
            f"--out {folder}/predictions`, or `vb-detect out-of-fold {folder} --out DIR` for its "
            "held-out cases and report on DIR"
        )
    raise DataError(
        f"{folder}: no {PREDICTIONS} in it or in its sub-folders; "
        "run `vb-detect predict RUN --images DIR --out RUN/predictions` first"
    )


def _find_ground_truth(arm: Path) -> Path:
    for place in (arm, *arm.resolve().parents[:3]):
        if (place / GROUND_TRUTH).is_file():
            return place / GROUND_TRUTH
    raise DataError(f"{arm}: no {GROUND_TRUTH} beside the predictions; name it by --ground-truth")


def _require_one_grid(folder: Path, sources: Sequence[ArmSource]) -> None:
    grids = {source.grid: source.arm.name for source in sources}
    if len(grids) > 1:
        (one, first), (other, second) = list(grids.items())[:2]
        raise DataError(
            f"{folder}: {first} is shown on another grid ({one}) than {second} ({other}); make a "
            "report of each"
        )
