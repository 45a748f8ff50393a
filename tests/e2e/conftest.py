"""What several tests across the parts share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from voxelbridge.core.train.metrics import read_metrics
from voxelbridge.detect.train import train

DETECTORS = ("resenc_retunet_small", "resenc_defdetr_small")

FineTune = Callable[..., None]


@pytest.fixture
def fine_tune_both_detectors(tmp_path: Path) -> FineTune:
    """Starts both detectors from a checkpoint; their losses fall over the first steps."""

    def fine_tune(checkpoint: Path, *, store: Path, steps: int) -> None:
        for detector in DETECTORS:
            run = train(
                detector, store=store, run=tmp_path / detector, init=checkpoint, device="cpu",
                overrides=[
                    "patch_size=[32,32,32]", f"schedule.steps={steps}", "schedule.warmup_steps=2",
                    "log_every_steps=1",
                ],
                workers=0,
            )  # fmt: skip
            losses = [record["loss"] for record in read_metrics(run / "metrics.jsonl")]
            assert len(losses) == steps
            few = steps // 4
            assert sum(losses[-few:]) < sum(losses[:few])

    return fine_tune
