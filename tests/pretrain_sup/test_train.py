"""Trainings of seconds: what they write, that they resume exactly, and several ranks as one.

Started under torchrun this file is the program of each rank.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from voxelbridge.core.checkpoint import read_checkpoint
from voxelbridge.core.config import load_config, preset_path
from voxelbridge.core.data.case_store import CaseStore
from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.core.files import read_json
from voxelbridge.core.train.distributed import join_world
from voxelbridge.core.train.metrics import read_metrics
from voxelbridge.core.transfer import load_encoder
from voxelbridge.pretrain_sup import train as train_module
from voxelbridge.pretrain_sup.config import MultiTalentConfig
from voxelbridge.pretrain_sup.train import train
from voxelbridge.pretrain_sup.weights import read_network, saved_weights

WriteStore = Callable[..., Path]
WaitForRecords = Callable[[Path, int, subprocess.Popen[str]], None]

LAYOUTS = ("per_dataset", "joint")
STEPS = 24
SMALL = (
    "patch_size=[16,16,16]",
    "batch_size=4",
    f"schedule.steps={STEPS}",
    "log_every_steps=4",
    "checkpoint_every_steps=5",
    "validate_every_steps=6",
    "validation_patches=2",
)
SGD = (
    'optim={"name": "sgd", "lr": 1e-2, "momentum": 0.9, "weight_decay": 1e-2}',
    "schedule.steps=4",
    "validation_patches=0",
)
PARTS = {"loss", "ce", "dice", "learning_rate", "gradient_norm", "step"}


def small(*overrides: str, preset: str = "multitalent_small") -> MultiTalentConfig:
    path = preset_path("voxelbridge.pretrain_sup", preset)
    return load_config(MultiTalentConfig, path, [*SMALL, *overrides]).config


def command(store: Path, run: Path, overrides: Sequence[str] = (), *more: str) -> list[str]:
    settings = [part for text in (*SMALL, *overrides) for part in ("--set", text)]
    places = ["--store", str(store), "--run", str(run), "--device", "cpu"]
    words = ["train", "multitalent_small", *places, *settings, *more]
    # One thread, as in the test process: sums over threads may differ in the last bit.
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from voxelbridge.pretrain_sup.cli import main; main()"
    )
    return [sys.executable, "-c", code, *words]


def test_short_run_writes_everything(organs_store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    path = train(small("schedule.steps=6"), store=organs_store, run=run, device="cpu")
    assert path == run / "checkpoints" / "final.safetensors"
    records = read_metrics(run / "metrics.jsonl")
    assert [record["step"] for record in records] == [3, 5]
    datasets = {"organs", "glioma", "lung"}
    assert set(records[0]) == PARTS | datasets
    assert set(records[1]) >= PARTS | {"val_loss", "val_ce", "val_dice", "val_organs"}
    assert 0 <= records[1]["val_organs.dice"] <= 1
    assert records[1]["val_loss"] == pytest.approx(records[1]["val_organs"])  # none else has 10
    network, space, plan, config = read_network(run)
    assert set(space.output_layers) == {"organs.0", "organs.1", "glioma", "lung"}
    assert set(plan.datasets) == datasets == set(network.encoder.stem_channels)
    assert config == small("schedule.steps=6")
    assert not network.training
    saved = saved_weights(run)
    assert saved.steps == 6
    assert all(torch.equal(t, saved.tensors[n]) for n, t in network.state_dict().items())
    facts = read_json(run / "data.json")
    assert facts["cases_per_dataset"] == {"organs": 10, "glioma": 2, "lung": 1}
    assert not (run / "extension.json").exists()


def test_small_runs_have_no_validation_and_say_so(
    write_store: WriteStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = write_store(tmp_path / "store", ("glioma", "lung"), layout="per_dataset")
    train(small("schedule.steps=1"), store=store, run=tmp_path / "run", device="cpu")
    (record,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert not any("val" in name for name in record)
    output = capsys.readouterr().out
    assert "no validation: no data set has 10 patients" in output
    assert "share of the samples: glioma 58.6%, lung 41.4%" in output


@pytest.mark.parametrize("preset", ["multitalent_small", "multitalent_retina_unet_small"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_of_all_data_sets_fall(
    write_store: WriteStore, tmp_path: Path, layout: str, preset: str
) -> None:
    store = write_store(tmp_path / "store", ("glioma", "lung"), layout=layout)
    config = small(
        "schedule.steps=16", "log_every_steps=4", "validation_patches=0", "optim.lr=5e-3",
        preset=preset,
    )  # fmt: skip
    train(config, store=store, run=tmp_path / "run", device="cpu")
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    for name in ("glioma", "lung"):
        assert records[-1][name] < 0.9 * records[0][name], name


def test_finished_run_is_left_as_it_is(organs_store: Path, tmp_path: Path) -> None:
    config = small("schedule.steps=2")
    path = train(config, store=organs_store, run=tmp_path, device="cpu")
    assert path is not None
    names = ("checkpoints/final.safetensors", "checkpoints/network.safetensors", "metrics.jsonl")
    before = [(tmp_path / name).read_bytes() for name in names]
    assert train(config, store=organs_store, run=tmp_path, device="cpu") == path
    assert [(tmp_path / name).read_bytes() for name in names] == before


def test_losses_do_not_depend_on_workers(organs_store: Path, tmp_path: Path) -> None:
    config = small("schedule.steps=4", "log_every_steps=1", "validation_patches=0")
    for workers in (0, 2):
        run = tmp_path / str(workers)
        train(config, store=organs_store, run=run, device="cpu", workers=workers)
    first, second = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("0", "2"))
    assert first == second


def test_dry_run_writes_nothing(
    organs_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(small(), store=organs_store, run=run, device="cpu", dry_run=True) is None
    assert not run.exists()
    output = capsys.readouterr().out
    assert "dry run: nothing written" in output
    assert "peak memory" in output


def test_parts_of_a_step_give_the_gradient_of_the_whole(organs_store: Path, tmp_path: Path) -> None:
    for parts in (1, 2):
        config = small(*SGD, "log_every_steps=1", f"accumulation_steps={parts}")
        train(config, store=organs_store, run=tmp_path / str(parts), device="cpu")
    whole, cut = (read_network(tmp_path / name).network.state_dict() for name in ("1", "2"))
    for name, tensor in whole.items():
        torch.testing.assert_close(cut[name], tensor, rtol=1e-4, atol=1e-5)


def test_other_store_or_config_on_an_existing_run_is_refused(
    organs_store: Path, write_store: WriteStore, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(small("schedule.steps=1"), store=organs_store, run=run, device="cpu")
    with pytest.raises(ConfigError, match=r"schedule\.steps: 1 -> 2"):
        train(small("schedule.steps=2"), store=organs_store, run=run, device="cpu")
    other = write_store(tmp_path / "store", ("organs",), layout="per_dataset")
    with pytest.raises(DataError, match="the run was started with other data"):
        train(small("schedule.steps=1"), store=other, run=run, device="cpu")


def test_a_store_for_something_else_is_refused(
    organs_store: Path, write_store: WriteStore, tmp_path: Path
) -> None:
    store = write_store(tmp_path / "store", ("lung",), layout="per_dataset")
    text = (store / "label_space.json").read_text()
    (store / "label_space.json").write_text(text.replace('"name": "lung"', '"name": "dice"', 1))
    with pytest.raises(DataError, match="data set 'dice': the name cannot be that of a stem"):
        train(small(), store=store, run=tmp_path / "run", device="cpu")
    (store / "label_space.json").unlink()
    with pytest.raises(DataError, match=r"label_space\.json is missing; prepare the store"):
        train(small(), store=store, run=tmp_path / "run", device="cpu")
    (store / "prepare.json").unlink()
    with pytest.raises(DataError, match=r"prepare\.json is missing; prepare the store"):
        train(small(), store=store, run=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_the_finished_checkpoint_gives_the_encoder_of_every_stem(
    organs_store: Path, tmp_path: Path
) -> None:
    path = train(small("schedule.steps=1"), store=organs_store, run=tmp_path, device="cpu")
    assert path is not None
    metadata = read_checkpoint(path).metadata
    assert metadata.source.data_sha256 == CaseStore.open(organs_store).digest
    network = read_network(tmp_path).network
    for stem, channels in {"organs": 1, "glioma": 2, "lung": 1}.items():
        image = torch.randn(1, channels, 16, 16, 16)
        maps = load_encoder(path, stem=stem)(image)
        for found, expected in zip(maps, network.encoder([(stem, image)]), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.long
@pytest.mark.slow
def test_killed_and_resumed_run_is_bit_identical(
    organs_store: Path, tmp_path: Path, wait_for_records: WaitForRecords
) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train(small(), store=organs_store, run=straight, device="cpu")
    kills = 0
    for number, more in enumerate((1, 2)):
        written = broken / "metrics.jsonl"
        before = written.read_bytes().count(b"\n") if written.exists() else 0
        process = subprocess.Popen(
            command(organs_store, broken, (), "--workers", str(number)),
            stdout=subprocess.DEVNULL,
            text=True,
        )
        wait_for_records(broken, before + more, process)
        time.sleep(0.023 * number)  # somewhere within the following steps
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills == 2
    train(small(), store=organs_store, run=broken, device="cpu")
    assert read_metrics(broken / "metrics.jsonl") == read_metrics(straight / "metrics.jsonl")
    for name in ("final.safetensors", "network.safetensors"):
        final = Path("checkpoints") / name
        assert (broken / final).read_bytes() == (straight / final).read_bytes()


def train_layouts(store: Path, out: Path) -> None:
    for layout in LAYOUTS:
        config = small(*SGD, "log_every_steps=1")
        train(config, store=store / layout, run=out / layout, device="cpu")


def run_rank(store: Path, out: Path) -> None:
    torch.set_num_threads(1)
    with join_world("cpu") as world, pytest.MonkeyPatch.context() as patch:
        # A process joins its job once; both trainings run in it.
        patch.setattr(train_module, "join_world", lambda _: nullcontext(world))
        train_layouts(store, out)


@pytest.mark.long
@pytest.mark.slow
def test_two_ranks_train_like_one_process_with_the_joined_batch(
    write_store: WriteStore, tmp_path: Path
) -> None:
    for layout in LAYOUTS:
        write_store(tmp_path / layout, ("glioma", "lung"), layout=layout)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    words = [str(tmp_path), str(tmp_path / "two")]
    subprocess.run(
        [sys.executable, *launcher, __file__, *words], check=True, timeout=400, capture_output=True
    )
    train_layouts(tmp_path, tmp_path / "one")
    for layout in LAYOUTS:
        one, two = (read_metrics(tmp_path / n / layout / "metrics.jsonl") for n in ("one", "two"))
        for expected, found in zip(one, two, strict=True):
            for name in ("loss", "ce", "dice", "gradient_norm"):
                assert found[name] == pytest.approx(expected[name], rel=1e-5), (layout, name)
        weights = [read_network(tmp_path / n / layout).network.state_dict() for n in ("one", "two")]
        for name, tensor in weights[0].items():
            torch.testing.assert_close(weights[1][name], tensor, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]), Path(sys.argv[2]))
