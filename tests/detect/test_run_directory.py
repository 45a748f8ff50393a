"""What a run directory holds: best and last weights, and everything that predicting needs."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from torch import nn

from voxelbridge.core.errors import CheckpointError, ConfigError
from voxelbridge.core.train.metrics import read_metrics
from voxelbridge.detect.best import BestWeights
from voxelbridge.detect.origins import settings_of
from voxelbridge.detect.plan import read_plan
from voxelbridge.detect.predict_cases import predict_cases
from voxelbridge.detect.prepare import prepare
from voxelbridge.detect.splits import read_splits
from voxelbridge.detect.train import train
from voxelbridge.detect.weights import Which

SETTINGS = (
    "patch_size=[16,16,16]", "schedule.steps=5", "schedule.warmup_steps=1", "log_every_steps=1",
    "checkpoint_every_steps=3", "validation_batches=1", "validate_every_steps=2",
    "validate_cases_every_steps=4", "validation_cases=1", "best_metric=val_total",
)  # fmt: skip


class Killed(BaseException):
    """Ends a training where a SIGKILL could."""


@pytest.fixture
def store(raw_dataset: Path, tmp_path: Path) -> Path:
    prepare(raw_dataset, tmp_path / "store", workers=0)
    return tmp_path / "store"


def start(store: Path, run: Path) -> None:
    train("retunet_small", store=store, run=run, overrides=SETTINGS, device="cpu", workers=0)


def predictions(run: Path, raw_dataset: Path, out: Path, weights: Which) -> bytes:
    images = [raw_dataset / "imagesTs"]
    predict_cases([run], images, out, device="cpu", pictures=False, weights=weights)
    return (out / "predictions.csv").read_bytes()


@pytest.mark.slow
def test_best_weights_survive_a_kill_before_the_next_state_and_predict_from_anywhere(
    store: Path, raw_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    start(store, alone)
    records = read_metrics(alone / "metrics.jsonl")
    validated = {record["step"]: record for record in records if "val_total" in record}
    assert set(validated) == {1, 3, 4}
    assert {step for step, r in validated.items() if "val_case_map_range" in r} == {3, 4}
    offer = BestWeights.offer

    def offer_and_die(
        best: BestWeights, detector: nn.Module, values: Mapping[str, float], *, step: int,
        attempt: int = 0,
    ) -> bool:  # fmt: skip
        taken = offer(best, detector, values, step=step, attempt=attempt)
        if step == 3:  # the last state is that of three steps
            raise Killed
        return taken

    with monkeypatch.context() as patch:
        patch.setattr(BestWeights, "offer", offer_and_die)
        with pytest.raises(Killed):
            start(store, killed)
    with pytest.raises(CheckpointError, match="not finished; take --weights best"):
        predictions(killed, raw_dataset, tmp_path / "out", "last")
    here = predictions(killed, raw_dataset, tmp_path / "here", "best")
    elsewhere = tmp_path / "moved" / "away"
    elsewhere.parent.mkdir()
    killed.rename(elsewhere)
    assert predictions(elsewhere, raw_dataset, tmp_path / "there", "best") == here
    elsewhere.rename(killed)
    start(store, killed)
    best = json.loads((killed / "checkpoints" / "best.json").read_text())
    lowest = min(validated, key=lambda step: (validated[step]["val_total"], step))
    assert (best["step"], best["value"]) == (lowest, validated[lowest]["val_total"])
    assert read_metrics(killed / "metrics.jsonl") == records
    for name in ("best.json", "best.safetensors", "detector.json", "detector.safetensors"):
        first, second = (run / "checkpoints" / name for run in (alone, killed))
        assert first.read_bytes() == second.read_bytes(), name
    _check_contents(alone, store)


def _check_contents(run: Path, store: Path) -> None:
    def content(name: str) -> dict:
        return json.loads((run / name).read_text())

    assert read_plan(run) == read_plan(store)
    preset = content("preset.json")
    assert preset["preset"] == "retunet_small"
    assert preset["overrides"] == list(SETTINGS)
    assert preset["origins"]["schedule.steps"] == "--set"
    assert preset["origins"]["optim.lr"] == "preset"
    assert preset["origins"]["object_fraction"] == "default"
    assert content("transfer.json")["checkpoint"] is None
    data, fold = content("data.json"), read_splits(store)[0]
    assert (data["fold"], data["train"], data["val"]) == (0, fold["train"], fold["val"])
    assert len(data["store"]) == 64
    start = content("environment.json")["starts"][0]
    assert {"torch", "numpy", "SimpleITK", "blosc2", "voxelbridge-detect"} <= set(start["versions"])
    assert "code" in start
    shown = settings_of(str(run)).describe().splitlines()
    assert "schedule.steps" in "".join(line for line in shown if line.endswith("(--set)"))
    with pytest.raises(ConfigError, match="--set and --store are for presets"):
        settings_of(str(run), ["seed=3"])


def test_show_prints_every_setting_with_its_origin() -> None:
    lines = settings_of("retunet_small", ["optim.lr=0.5"]).describe().splitlines()
    found = {line.split(" =")[0].rstrip(): line for line in lines}
    assert found["optim.lr"].endswith("= 0.5  (--set)")
    assert found["encoder"].endswith('= "plain_small"  (preset)')
    assert found["validation_cases"].endswith("= 10  (default)")
