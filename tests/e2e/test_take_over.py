"""`train --init`: a checkpoint of several data sets enters a detector, stem and pyramid by name."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from pydantic import JsonValue
from torch import Tensor
from typer.testing import CliRunner

from voxelbridge.core.arch.config import AnyDecoderConfig, DecoderConfig, EncoderConfig, UFPNConfig
from voxelbridge.core.arch.presets import PLAIN_SMALL, RESENC_SMALL
from voxelbridge.core.checkpoint import (
    Checkpoint,
    CheckpointMetadata,
    Stem,
    collect_tensors,
    write_checkpoint,
)
from voxelbridge.core.errors import CheckpointError, ConfigError
from voxelbridge.detect.cli import app
from voxelbridge.detect.config import InitParts
from voxelbridge.detect.prepare import prepare
from voxelbridge.detect.train import train
from voxelbridge.pretrain_sup.model import build_network

TINY = (
    "patch_size=[16,16,16]",
    "schedule.steps=1",
    "schedule.warmup_steps=0",
    "optim.lr=1e-30",  # what was taken over can be read from the weights of the run
    "validation_batches=0",
)
STEMS = {"Dataset104_TotalSegmentator": 1, "Dataset10": 1, "Dataset1": 1, "Dataset137_BraTS": 4}
ZSCORE: dict[str, JsonValue] = {"name": "zscore"}
WEIGHTS = ("weight", "bias")
UNET = DecoderConfig(convs_per_stage=(1, 1, 1), conv_bias=True)
PYRAMID = UFPNConfig(out_channels=32, first_level=2)  # as in retunet_small


def checkpoint_file(
    folder: Path, encoder: EncoderConfig, decoder: AnyDecoderConfig, *, default: str | None = None
) -> Path:
    torch.manual_seed(2)
    heads = dict.fromkeys(STEMS, 2)
    network = build_network(encoder, decoder, stems=STEMS, heads=heads, init="torch_default")
    stems = {
        name: Stem(channels=count, dataset=name, normalization=(ZSCORE,) * count)
        for name, count in STEMS.items()
    }
    metadata = CheckpointMetadata(
        method="multitalent", arch=encoder, decoder=decoder, stems=stems, default_stem=default
    )
    path = folder / "multitalent.safetensors"
    tensors = collect_tensors(network.encoder, network.decoder)
    write_checkpoint(path, Checkpoint(metadata, tensors, origin=str(path)))
    return path


def same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-20)


def weights_of(run: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(run / "checkpoints" / "detector.safetensors")


@pytest.fixture
def store(raw_dataset: Path, tmp_path: Path) -> Path:
    prepare(raw_dataset, tmp_path / "store", workers=0)
    return tmp_path / "store"


@pytest.fixture
def four_channels(raw_dataset: Path, tmp_path: Path) -> Path:
    """The same cases with four equal channels."""
    for first in raw_dataset.glob("images*/*_0000.nii.gz"):
        for channel in (1, 2, 3):
            shutil.copy(first, first.with_name(first.name.replace("_0000", f"_000{channel}")))
    path = raw_dataset / "dataset.json"
    names = {str(channel): f"MR{channel}" for channel in range(4)}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"modalities": names}))
    prepare(raw_dataset, tmp_path / "store", workers=0)
    return tmp_path / "store"


def trained(
    store: Path, preset: str, init: Path, *, stem: str, parts: InitParts = "encoder"
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Weights and transfer report of a run of one step that changes next to nothing."""
    run = store.parent / "run"
    train(
        preset, store=store, run=run, overrides=TINY, init=init, stem=stem, init_parts=parts,
        device="cpu", workers=0,
    )  # fmt: skip
    return weights_of(run), json.loads((run / "transfer.json").read_text())


@pytest.mark.parametrize(
    ("preset", "encoder"),
    [("resenc_retunet_small", RESENC_SMALL), ("defdetr_small", PLAIN_SMALL)],
)
def test_a_stem_of_a_data_set_enters_both_detectors(
    store: Path, tmp_path: Path, preset: str, encoder: EncoderConfig
) -> None:
    init = checkpoint_file(tmp_path, encoder, UNET if encoder is RESENC_SMALL else PYRAMID)
    weights, transfer = trained(store, preset, init, stem="Dataset1")
    held = weights_of_file(init)
    assert same(weights["encoder.stem.conv.weight"], held["encoder.stems.Dataset1.conv.weight"])
    for name, tensor in held.items():
        if name.startswith("encoder.stages."):
            assert same(weights[name], tensor), name
    unused = transfer["unused"]
    assert isinstance(unused, list)
    assert {n.split(".")[2] for n in unused if n.startswith("encoder.")} == STEMS.keys() - {
        "Dataset1"
    }
    assert transfer["left_at_init"] == []
    assert transfer["decoder"] is None


def weights_of_file(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def test_a_stem_of_four_channels_enters_a_detector_of_four_channels(
    four_channels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init = checkpoint_file(tmp_path, PLAIN_SMALL, PYRAMID, default="Dataset104_TotalSegmentator")
    weights, _ = trained(four_channels, "retunet_small", init, stem="Dataset137_BraTS")
    taken = weights["encoder.stem.conv.weight"]
    assert taken.shape[1] == 4
    assert same(taken, weights_of_file(init)["encoder.stems.Dataset137_BraTS.conv.weight"])
    assert "stem              Dataset137_BraTS (4 channels)" in capsys.readouterr().out
    arguments = {"store": four_channels, "run": tmp_path / "other", "init": init, "device": "cpu"}
    fits = r"or one of the stems with its channels: Dataset137_BraTS$"
    for stem in ("checkpoint", "Dataset10"):
        with pytest.raises(CheckpointError, match=fits):
            train("retunet_small", overrides=TINY, stem=stem, **arguments)
    with pytest.raises(CheckpointError, match=r"has no stem 'Dataset137', expected one of: "):
        train("retunet_small", overrides=TINY, stem="Dataset137", **arguments)


def test_the_default_stem_is_taken_where_none_is_named(store: Path, tmp_path: Path) -> None:
    init = checkpoint_file(tmp_path, PLAIN_SMALL, PYRAMID, default="Dataset10")
    weights, _ = trained(store, "retunet_small", init, stem="checkpoint")
    assert same(
        weights["encoder.stem.conv.weight"],
        weights_of_file(init)["encoder.stems.Dataset10.conv.weight"],
    )


def test_encoder_and_pyramid_are_taken_over_on_request(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init = checkpoint_file(tmp_path, PLAIN_SMALL, PYRAMID)
    weights, transfer = trained(
        store, "retunet_small", init, stem="Dataset10", parts="encoder+decoder"
    )
    for name, tensor in weights_of_file(init).items():
        if name.startswith("decoder."):
            assert same(weights[name.replace("decoder.", "neck.")], tensor), name
    decoder = transfer["decoder"]
    assert isinstance(decoder, dict)
    assert len(decoder["loaded"]) == len([n for n in weights if n.startswith("neck.")])
    assert decoder["left_at_init"] == decoder["unused"] == []
    assert not [n for n in json.dumps(transfer["unused"]).split('"') if n.startswith("decoder.")]
    assert "\ndecoder\nloaded" in capsys.readouterr().out
    run = store.parent / "run"
    assert json.loads((run / "detector.json").read_text())["init_parts"] == "encoder+decoder"


def test_a_pyramid_whose_head_begins_elsewhere_gives_its_levels_of_equal_width(
    store: Path, tmp_path: Path
) -> None:
    pyramid = UFPNConfig(out_channels=32, first_level=1)  # 16, 32, 32, 32; the detector's 8, 16, ..
    init = checkpoint_file(tmp_path, PLAIN_SMALL, pyramid)
    _, transfer = trained(store, "retunet_small", init, stem="Dataset10", parts="encoder+decoder")
    decoder = transfer["decoder"]
    assert isinstance(decoder, dict)
    coarse = {f"{part}.{i}.{n}" for part in ("lateral", "out") for i in (2, 3) for n in WEIGHTS}
    assert set(decoder["loaded"]) == coarse | {"upsample.2.weight"}
    assert len(decoder["left_at_init"]) == len(decoder["unused"]) == 10
    assert "lateral.0.bias: checkpoint (16,), decoder (8,)" in decoder["shape_mismatched"]


UNFIT: list[tuple[str, AnyDecoderConfig, str]] = [
    ("resenc_retunet_small", UNET, "holds a U-Net decoder, needed is a U-FPN; transfer the"),
    (
        "resenc_retunet_small",
        UFPNConfig(),
        r"lateral\.2\.bias: checkpoint \(128,\), decoder \(32,\)",
    ),
    ("resenc_defdetr_small", PYRAMID, "a deformable_detr has no decoder"),
]


def test_a_decoder_that_does_not_fit_the_detector_is_refused_in_one_line(
    store: Path, tmp_path: Path
) -> None:
    for preset, decoder, message in UNFIT:
        init = checkpoint_file(tmp_path, RESENC_SMALL, decoder)
        with pytest.raises((CheckpointError, ConfigError)) as caught:
            trained(store, preset, init, stem="Dataset10", parts="encoder+decoder")
        assert "\n" not in str(caught.value)
        assert re.search(message, str(caught.value))


def test_the_command_asks_for_parts_by_name(store: Path, tmp_path: Path) -> None:
    command = ["train", "retunet_small", "--store", str(store), "--run", str(tmp_path / "run")]
    command += [part for text in TINY for part in ("--set", text)]
    runner = CliRunner()
    wrong = runner.invoke(app, [*command, "--init-parts", "decoder"])
    assert wrong.exit_code == 2
    alone = runner.invoke(app, [*command, "--init-parts", "encoder+decoder"])
    assert isinstance(alone.exception, ConfigError)
    assert "needs a checkpoint; give it with --init" in str(alone.exception)
    init = checkpoint_file(tmp_path, PLAIN_SMALL, PYRAMID)
    parts = ["--init", str(init), "--stem", "Dataset104_TotalSegmentator"]
    parts += ["--init-parts", "encoder+decoder", "--device", "cpu", "--workers", "0", "--dry-run"]
    done = runner.invoke(app, [*command, *parts])
    assert done.exit_code == 0, done.exception
    assert "stem              Dataset104_TotalSegmentator (1 channel)" in done.stdout
    assert not (tmp_path / "run" / "transfer.json").exists()
