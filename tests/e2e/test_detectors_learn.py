"""Both detectors learn on a CPU: four phantoms by heart, and unseen phantoms from sixty-four.

The small presets as they are, but with fewer steps, so that each takes about a minute.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from voxelbridge.core.data.dataset import RawDataset
from voxelbridge.detect.evaluate.metrics import evaluate_files
from voxelbridge.detect.predict_cases import predict_cases
from voxelbridge.detect.prepare import prepare
from voxelbridge.detect.train import train

PHANTOM = Path(__file__).resolve().parents[2] / "tools" / "phantom.py"
# Optimizer steps: by heart, and for unseen phantoms.
STEPS = {"resenc_retunet_small": (80, 100), "resenc_defdetr_small": (200, 160)}
SEEDS = (0, 1, 2)


def make_store(folder: Path, *, num_train: int, num_test: int, seed: int) -> tuple[Path, Path]:
    """A phantom data set all of whose training cases train, and its store."""
    raw, store = folder / "raw", folder / "store"
    arguments = ["--train", num_train, "--test", num_test, "--seed", seed]
    subprocess.run([sys.executable, str(PHANTOM), str(raw), *map(str, arguments)], check=True)
    names = [case.case_id for case in RawDataset.open(raw).cases]
    (raw / "splits.json").write_text(json.dumps([{"train": names, "val": []}]))
    prepare(raw, store, workers=0)
    return raw, store


def score(
    preset: str, folder: Path, store: Path, images: Path, *, tables: str, settings: list[str]
) -> dict[str, Any]:  # Any: metrics.json
    """Trains, predicts `images` and measures against the store's tables."""
    run, out = folder / "run", folder / "out"
    train(preset, store=store, run=run, overrides=settings, device="cpu", workers=0)
    predict_cases([run], [images], out, device="cpu", pictures=False)
    return evaluate_files(
        store / f"{tables}ground_truth.csv", out / "predictions.csv",
        cases=store / f"{tables}cases.csv", output=folder / "metrics.json",
    )  # fmt: skip


def skip_unless_asked(request: pytest.FixtureRequest, seed: int) -> None:
    """Leaves all seeds but the first to `--all-seeds`: twelve trainings take seven minutes."""
    if seed != SEEDS[0] and not request.config.getoption("--all-seeds"):
        pytest.skip(f"seed {seed} is trained with --all-seeds, as `make test` does")


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("preset", STEPS)
def test_four_phantoms_are_learned_by_heart(
    preset: str, seed: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    skip_unless_asked(request, seed)
    raw, store = make_store(tmp_path, num_train=4, num_test=0, seed=seed)
    metrics = score(
        preset, tmp_path, store, raw / "imagesTr", tables="",
        settings=[
            f"seed={seed}", f"schedule.steps={STEPS[preset][0]}",
            "augmentation.mirror_probability=0.0",
        ],
    )  # fmt: skip
    figure = metrics["ap"]["0.50"]["map"]
    print(f"{preset}, seed {seed}: mAP@0.50 {figure:.3f} on its own four phantoms")
    assert figure > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("preset", STEPS)
def test_lesions_of_unseen_phantoms_are_found(
    preset: str, seed: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    skip_unless_asked(request, seed)
    raw, store = make_store(tmp_path, num_train=64, num_test=12, seed=seed)
    metrics = score(
        preset, tmp_path, store, raw / "imagesTs", tables="test_",
        settings=[f"seed={seed}", f"schedule.steps={STEPS[preset][1]}"],
    )  # fmt: skip
    figure = metrics["ap"]["0.10"]["map"]
    print(f"{preset}, seed {seed}: mAP@0.10 {figure:.3f} on twelve unseen phantoms")
    assert figure > 0.8
