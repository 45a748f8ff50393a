import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from voxelbridge.core.checkpoint import read_checkpoint
from voxelbridge.core.config import load_config, preset_path
from voxelbridge.core.data.case_store import CaseStore, CaseStoreWriter
from voxelbridge.core.data.patient_split import patients_of, split_cases
from voxelbridge.core.data.provenance import Provenance
from voxelbridge.core.data.volume import Grid
from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.core.train.metrics import read_metrics
from voxelbridge.core.transfer import load_encoder
from voxelbridge.pretrain_ssl.config import PretrainConfig
from voxelbridge.pretrain_ssl.export import export
from voxelbridge.pretrain_ssl.train import train

WaitForRecords = Callable[[Path, int, subprocess.Popen[str]], None]

STEPS = 30
METHODS = ("mae", "s3d", "models_genesis", "voco")
SMALL = (
    "patch_size=[16,16,16]",
    f"schedule.steps={STEPS}",
    "log_every_steps=4",
    "checkpoint_every_steps=5",
    "validate_every_steps=6",
    "validation_patches=2",
)


def small(*overrides: str) -> PretrainConfig:
    path = preset_path("voxelbridge.pretrain_ssl", "mae_small")
    return load_config(PretrainConfig, path, [*SMALL, *overrides]).config


def command(store: Path, run: Path, overrides: Sequence[str] = (), *more: str) -> list[str]:
    settings = [part for text in (*SMALL, *overrides) for part in ("--set", text)]
    places = ["--store", str(store), "--run", str(run), "--device", "cpu"]
    words = ["train", "mae_small", *places, *settings, *more]
    # One thread, as in the test process: sums over threads may differ in the last bit.
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from voxelbridge.pretrain_ssl.cli import main; main()"
    )
    return [sys.executable, "-c", code, *words]


def test_short_run_writes_everything(tiny_store: Path, tmp_path: Path) -> None:
    config = small("schedule.steps=6")
    path = train(config, store=tiny_store, run=tmp_path / "run", device="cpu")
    assert path is not None
    assert path == tmp_path / "run" / "checkpoints" / "final.safetensors"
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records] == [3, 5]
    assert {"step", "loss", "learning_rate", "gradient_norm"} == set(records[0])
    assert set(records[1]) - set(records[0]) == {"val_loss", "val_trivial"}
    pictures = [item.name for item in sorted((tmp_path / "run" / "pictures").iterdir())]
    assert pictures == ["step-00000005-0.png", "step-00000005-1.png"]
    metadata = read_checkpoint(path).metadata
    assert metadata.method == "mae"
    assert metadata.source.steps == 6
    assert metadata.source.datasets == ("store",)
    assert metadata.source.data_sha256 == CaseStore.open(tiny_store).digest
    assert metadata.spacing_mm == (1.0, 1.0, 1.0)
    assert metadata.patch_size == (16, 16, 16)
    assert metadata.normalization == ({"name": "zscore", "nonzero_only": False},)
    assert metadata.init == "torch_default"
    assert metadata.citations
    assert metadata.decoder is not None
    assert {name.split(".")[0] for name in read_checkpoint(path).tensors} == {"encoder", "decoder"}
    assert [m.shape[1] for m in load_encoder(path)(torch.zeros(1, 1, 16, 16, 16))] == [
        8,
        16,
        32,
        64,
    ]


def test_finished_run_is_left_as_it_is(tiny_store: Path, tmp_path: Path) -> None:
    config = small("schedule.steps=3")
    path = train(config, store=tiny_store, run=tmp_path, device="cpu")
    assert path is not None
    before = path.read_bytes(), (tmp_path / "metrics.jsonl").read_bytes()
    assert train(config, store=tiny_store, run=tmp_path, device="cpu") == path
    assert (path.read_bytes(), (tmp_path / "metrics.jsonl").read_bytes()) == before


def test_losses_do_not_depend_on_workers(tiny_store: Path, tmp_path: Path) -> None:
    config = small("schedule.steps=5", "log_every_steps=1", "validation_patches=0")
    for workers in (0, 2):
        train(config, store=tiny_store, run=tmp_path / str(workers), device="cpu", workers=workers)
    first, second = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("0", "2"))
    assert first == second


def test_dry_run_writes_nothing(
    tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(small(), store=tiny_store, run=run, device="cpu", dry_run=True) is None
    assert not run.exists()
    output = capsys.readouterr().out
    assert "dry run: nothing written" in output
    assert "peak memory" in output


def test_differing_config_on_an_existing_run_lists_the_keys(
    tiny_store: Path, tmp_path: Path
) -> None:
    train(small("schedule.steps=1"), store=tiny_store, run=tmp_path, device="cpu")
    for dry_run in (False, True):
        with pytest.raises(ConfigError, match=r"schedule\.steps: 1 -> 2; seed: 0 -> 1"):
            train(
                small("schedule.steps=2", "seed=1"),
                store=tiny_store,
                run=tmp_path,
                device="cpu",
                dry_run=dry_run,
            )


def test_other_store_on_an_existing_run_is_refused(tiny_store: Path, tmp_path: Path) -> None:
    train(small("schedule.steps=1"), store=tiny_store, run=tmp_path, device="cpu")
    facts = json.loads((tmp_path / "data.json").read_text())
    (tmp_path / "data.json").write_text(json.dumps({**facts, "store_sha256": "0" * 64}))
    with pytest.raises(DataError, match="the run was started with other data"):
        train(small("schedule.steps=1"), store=tiny_store, run=tmp_path, device="cpu")


def test_export_gives_the_finished_checkpoint_again(tiny_store: Path, tmp_path: Path) -> None:
    path = train(small("schedule.steps=2"), store=tiny_store, run=tmp_path / "run", device="cpu")
    assert path is not None
    export(tmp_path / "run", tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_killed_and_resumed_run_is_bit_identical(
    tiny_store: Path, tmp_path: Path, wait_for_records: WaitForRecords
) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    subprocess.run(command(tiny_store, straight), check=True, stdout=subprocess.DEVNULL)
    kills = 0
    for number, more in enumerate((0, 1, 1, 2, 1, 2)):
        written = broken / "metrics.jsonl"
        before = written.read_bytes().count(b"\n") if written.exists() else 0
        process = subprocess.Popen(
            command(tiny_store, broken, (), "--workers", str(number % 2)),
            stdout=subprocess.DEVNULL,
            text=True,
        )
        wait_for_records(broken, before + more, process)
        time.sleep(0.011 * number)  # somewhere within the following steps
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 4
    with (broken / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 28, "lo')  # as a power cut leaves it
    subprocess.run(command(tiny_store, broken), check=True, stdout=subprocess.DEVNULL)
    assert read_metrics(broken / "metrics.jsonl") == read_metrics(straight / "metrics.jsonl")
    final = Path("checkpoints") / "final.safetensors"
    assert (broken / final).read_bytes() == (straight / final).read_bytes()
    leftovers = [p for p in broken.rglob("*") if p.name.startswith(".partial")]
    assert leftovers == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGTERM, 0),
        pytest.param(signal.SIGUSR1, 0, marks=pytest.mark.long),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.long),
    ],
)
def test_signal_saves_within_a_step_and_the_same_command_goes_on(
    tiny_store: Path,
    tmp_path: Path,
    wait_for_records: WaitForRecords,
    number: signal.Signals,
    status: int,
) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    changed = ("checkpoint_every_steps=1000", "log_every_steps=1", "validate_every_steps=1000")
    process = subprocess.Popen(
        command(tiny_store, stopped, changed, "--workers", "1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for_records(stopped, 3, process)
    os.killpg(process.pid, number)  # workers get it too, as from a terminal or a batch system
    before = len(read_metrics(stopped / "metrics.jsonl"))
    output, errors = process.communicate(timeout=120)
    assert process.returncode == status
    assert f"stopped by {number.name} after step" in output
    assert "Traceback" not in errors
    state = json.loads((stopped / "checkpoints" / "state.json").read_text())
    assert state["step"] == len(read_metrics(stopped / "metrics.jsonl")) < STEPS
    assert state["step"] - before <= 2
    subprocess.run(command(tiny_store, stopped, changed), check=True, stdout=subprocess.DEVNULL)
    subprocess.run(command(tiny_store, straight, changed), check=True, stdout=subprocess.DEVNULL)
    assert read_metrics(stopped / "metrics.jsonl") == read_metrics(straight / "metrics.jsonl")


def test_pictures_reach_tensorboard(tiny_store: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra [track] is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    config = small("schedule.steps=6", "pictures=1")
    train(config, store=tiny_store, run=run, device="cpu", tensorboard=True)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert events.Tags()["images"] == ["patch 0"]
    (picture,) = events.Images("patch 0")
    assert (picture.step, picture.height > 0) == (5, True)


def flip_a_bit(path: Path) -> Path:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def test_unreadable_case_is_skipped_counted_and_may_end_the_run(
    tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    shutil.copytree(tiny_store, store)
    broken = flip_a_bit(store / "cases" / "case05.b2nd")
    settings = ("schedule.steps=12", "validation_patches=0")
    train(small(*settings), store=store, run=tmp_path / "run", device="cpu")
    errors = capsys.readouterr().err
    assert errors.count("skipped: ") == 1
    assert str(broken) in errors
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["failed_cases"] == 1
    config = small(*settings, "max_failed_share=0.05")
    with pytest.raises(DataError, match=r"1 of 12 cases could not be read, more than max_failed"):
        train(config, store=store, run=tmp_path / "stopped", device="cpu")


def test_unreadable_held_out_case_is_said_once_and_training_goes_on(
    tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, run = tmp_path / "store", tmp_path / "run"
    shutil.copytree(tiny_store, store)
    config = small("schedule.steps=4", "validate_every_steps=2")
    (case,) = split_cases(patients_of(CaseStore.open(store)), seed=config.seed)[1]
    broken = flip_a_bit(store / "cases" / f"{case}.b2nd")
    assert train(config, store=store, run=run, device="cpu") is not None
    errors = capsys.readouterr().err
    assert errors.count("skipped: ") == errors.count(str(broken)) == 1
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert last["failed_cases"] == 1
    assert "val_loss" not in last


def test_first_case_without_its_json_is_skipped_and_counted(
    tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, run = tmp_path / "store", tmp_path / "run"
    shutil.copytree(tiny_store, store)
    (store / "cases" / "case00.json").unlink()
    config = small("schedule.steps=1", "validation_patches=0")
    path = train(config, store=store, run=run, device="cpu")
    assert path is not None
    assert read_checkpoint(path).metadata.normalization == (
        {"name": "zscore", "nonzero_only": False},
    )
    errors = capsys.readouterr().err
    assert (
        errors.count("skipped: ") == errors.count("case00.json: case case00: cannot be read") == 1
    )
    assert read_metrics(run / "metrics.jsonl")[-1]["failed_cases"] == 1
    for file in (store / "cases").glob("*.json"):
        file.unlink(missing_ok=True)
    with pytest.raises(DataError, match=r"2 of 12 cases could not be read, more than max_failed"):
        train(config, store=store, run=tmp_path / "none", device="cpu")


def test_data_set_of_one_broken_volume_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    writer = CaseStoreWriter(store, patch_size=(16, 16, 16))
    rng = np.random.default_rng(0)
    for name, dataset in [("alone", "B"), *((f"a{number}", "A") for number in range(4))]:
        writer.write_case(
            name, rng.standard_normal((1, 16, 16, 16)).astype(np.float32),
            grid=Grid.from_parts((16, 16, 16), (1.0, 1.0, 1.0)),
            provenance=Provenance(dataset=dataset),
            boxes=np.zeros((0, 6), np.float32), labels=np.zeros(0, np.int64),
        )  # fmt: skip
    writer.finish()
    flip_a_bit(store / "cases" / "alone.b2nd")
    config = small(
        "schedule.steps=6", "validation_patches=0", "sampling.exponent=0", "max_failed_share=0.2"
    )
    assert train(config, store=store, run=tmp_path / "run", device="cpu") is not None
    assert capsys.readouterr().err.count("skipped: ") == 1
