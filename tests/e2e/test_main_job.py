"""The main job on a tiny data set, and training that is killed and started again."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from voxelbridge.core.data.dataset import RawDataset
from voxelbridge.core.train.metrics import read_metrics
from voxelbridge.detect.evaluate.tables import read_cases, read_predictions
from voxelbridge.detect.prepare import prepare

QUICKSTART = Path(__file__).resolve().parents[2] / "tools" / "quickstart.py"
STEPS = 24


@pytest.mark.slow
def test_the_quickstart_runs_on_a_raw_data_set(raw_dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, str(QUICKSTART), "--data", str(raw_dataset), "--out", str(out)]
    done = subprocess.run(
        [*command, "--pretrain-steps", "3", "--steps", "20", "--device", "cpu"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    content = json.loads((out / "metrics.json").read_text())
    assert content["schema"] == 1
    assert list(content["arms"]) == ["scratch", "pretrained"]
    page = (out / "report.html").read_text(encoding="utf-8")
    for arm, metrics in content["arms"].items():
        assert metrics["num_cases"] == 2
        assert metrics["num_objects"] == 4
        assert f"{metrics['ap']['0.10']['map']:.3f}" in page
        _check_predictions(out / "predictions" / arm, raw_dataset)
    assert "http://" not in page.replace("http://www.w3.org", "")
    transfer = json.loads((out / "runs" / "pretrained" / "transfer.json").read_text())
    assert transfer["metadata"]["method"] == "mae"
    assert transfer["left_at_init"] == []
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1


def _check_predictions(folder: Path, dataset: Path) -> None:
    names = read_cases(folder / "cases.csv")
    assert names == ["case6", "case7"]
    table = read_predictions(folder / "predictions.csv", names)
    assert len(table) > 0
    shapes = {
        case.case_id: case.read_image().grid.shape for case in RawDataset.open(dataset).test_cases
    }
    limits = np.array([shapes[names[index]] for index in table.case_index])
    assert (table.boxes[:, :3] >= 0).all()
    assert (table.boxes[:, 3:] <= limits).all()
    for name in names:
        assert json.loads((folder / f"{name}.json").read_text())["case_id"] == name
        assert (folder / f"{name}.mrk.json").is_file()
        assert (folder / f"{name}.png").is_file()


@pytest.mark.long  # shorter: core/train/test_restart.py, pretrain_ssl/test_train.py
@pytest.mark.slow
def test_a_killed_training_goes_on_bit_identically(raw_dataset: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    prepare(raw_dataset, store, workers=0)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert _train(store, undisturbed).wait() == 0
    rng = random.Random(3)
    hits = 0
    for _ in range(4):
        process = _train(store, killed)
        before = _steps_done(killed)
        while process.poll() is None and _steps_done(killed) < before + 3:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.2))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            hits += 1
        process.wait()
    assert hits >= 2
    assert _train(store, killed).wait() == 0
    first = read_metrics(undisturbed / "metrics.jsonl")
    second = read_metrics(killed / "metrics.jsonl")
    assert [record["step"] for record in first] == list(range(STEPS))
    assert first == second
    for name in ("detector.safetensors", "best.safetensors", "best.json"):
        weights = Path("checkpoints") / name
        assert (undisturbed / weights).read_bytes() == (killed / weights).read_bytes(), name
    assert list(killed.rglob(".partial-*")) == []


def _train(store: Path, run: Path) -> subprocess.Popen[bytes]:
    settings = {
        "patch_size": "[16,16,16]",
        "schedule.steps": str(STEPS),
        "schedule.warmup_steps": "2",
        "log_every_steps": "1",
        "checkpoint_every_steps": "4",
        "validation_batches": "1",
        "validate_every_steps": "3",
    }
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return subprocess.Popen(
        [
            sys.executable, "-m", "voxelbridge.detect.cli", "train", "retunet_small",
            "--store", str(store), "--run", str(run), "--device", "cpu", "--workers", "1", *sets,
        ],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip


def _steps_done(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0
