"""A checkpoint of nnssl, imported, is fine-tuned by both detectors over its own architecture."""

import json
from pathlib import Path

import pytest
import torch

from voxelbridge.core.checkpoint import read_checkpoint, write_checkpoint
from voxelbridge.core.errors import CheckpointError, ConfigError
from voxelbridge.core.foreign.import_file import import_checkpoint
from voxelbridge.detect.build import build_detector, load_detect_config
from voxelbridge.detect.prepare import prepare
from voxelbridge.detect.train import train

SAMPLE = "checkpoints/nnssl_mae/checkpoint_final.pth"
FEW = (
    "patch_size=[16,16,16]",
    "schedule.steps=3",
    "schedule.warmup_steps=0",
    "log_every_steps=1",
    "validation_batches=0",
)
OWN = "architecture=checkpoint"


@pytest.fixture
def encoder(shared: Path, tmp_path: Path) -> Path:
    if not (shared / SAMPLE).is_file():
        pytest.skip(f"needs {SAMPLE}")
    path = tmp_path / "mae.safetensors"
    write_checkpoint(path, import_checkpoint(shared / SAMPLE).checkpoint)
    return path


@pytest.fixture
def store(raw_dataset: Path, tmp_path: Path) -> Path:
    prepare(raw_dataset, tmp_path / "store", workers=0)
    return tmp_path / "store"


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["resenc_retunet_small", "resenc_defdetr_small"])
def test_both_detectors_learn_over_the_imported_encoder(
    preset: str, encoder: Path, store: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for _ in range(2):  # the second time resumes a finished run, with its own config
        train(preset, store=store, run=run, overrides=(*FEW, OWN), init=encoder, device="cpu",
              workers=0)  # fmt: skip
    transfer = json.loads((run / "transfer.json").read_text())
    held = read_checkpoint(encoder).tensors
    assert len(transfer["loaded"]) == len([n for n in held if n.startswith("encoder.")])
    assert transfer["left_at_init"] == transfer["shape_mismatched"] == []
    config = json.loads((run / "config.json").read_text())
    assert config["stages"]["features"] == [8, 16, 24, 24]
    assert config["stages"]["blocks"] == [1, 2, 2, 2]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {r["step"]: r["loss"] for r in records if "loss" in r}
    assert len(losses) == 3
    assert all(torch.isfinite(torch.tensor(loss)) for loss in losses.values())


@pytest.mark.slow
def test_without_its_architecture_every_difference_is_told(encoder: Path, store: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"in 46 places.*--set architecture=checkpoint builds"
    ):
        train("resenc_retunet_small", store=store, run=store.parent / "run", overrides=FEW,
              init=encoder, device="cpu", workers=0)  # fmt: skip


def test_the_checkpoints_architecture_needs_a_checkpoint_of_the_same_kind(encoder: Path) -> None:
    with pytest.raises(ConfigError, match="name it with --init"):
        load_detect_config("resenc_retunet_small", [OWN])
    with pytest.raises(ConfigError, match="holds a residual encoder, plain_small of retunet_small"):
        load_detect_config("retunet_small", [OWN], init=encoder)
    config = load_detect_config("resenc_retunet_small", [OWN], init=encoder)
    detector = build_detector(config, in_channels=1, num_classes=1)
    assert detector.encoder.config == read_checkpoint(encoder).metadata.arch
