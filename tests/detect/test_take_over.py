"""What a detector takes from a checkpoint: reports, allowances, warnings, and what runs record."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import JsonValue

from voxelbridge.core.arch.config import EncoderConfig
from voxelbridge.core.arch.encoder import build_encoder
from voxelbridge.core.arch.presets import RESENC_SMALL
from voxelbridge.core.checkpoint import (
    Checkpoint,
    CheckpointMetadata,
    Stem,
    collect_tensors,
    read_checkpoint,
    write_checkpoint,
)
from voxelbridge.core.data.normalize import CTPercentile, ZScore
from voxelbridge.core.errors import CheckpointError, ConfigError
from voxelbridge.core.train.resume import load_state
from voxelbridge.detect.build import build_detector, load_detect_config
from voxelbridge.detect.plan import Plan, read_plan
from voxelbridge.detect.prepare import prepare
from voxelbridge.detect.take_over import TakenOver, data_differences, take_over
from voxelbridge.detect.train import load_run, train

ZSCORE: dict[str, JsonValue] = {"name": "zscore", "nonzero_only": False}
PRESET = "resenc_retunet_small"


def checkpoint_file(
    folder: Path, *, arch: EncoderConfig = RESENC_SMALL, **metadata: Any
) -> Path:  # Any: fields of the metadata
    torch.manual_seed(7)
    path = folder / "encoder.safetensors"
    facts = CheckpointMetadata(
        method="mae", arch=arch, stems={"main": Stem(channels=1)}, **metadata
    )
    tensors = collect_tensors(build_encoder(arch, in_channels=1))
    write_checkpoint(path, Checkpoint(facts, tensors, origin=str(path)))
    return path


@pytest.fixture(scope="module")
def plan() -> Plan:
    text = Plan.model_construct(
        spacing_mm=(1.0, 1.0, 1.0), channel_names=("MR",), normalization=(ZScore(),)
    )
    return text


def taken(
    init: Path | None, plan: Plan, *overrides: str, channels: int = 1, preset: str = PRESET
) -> TakenOver:
    config = load_detect_config(preset, overrides)
    torch.manual_seed(0)
    detector = build_detector(config, in_channels=channels, num_classes=1)
    return take_over(detector, init, config=config, plan=plan)


def test_data_like_the_checkpoints_give_no_warning(tmp_path: Path, plan: Plan) -> None:
    init = checkpoint_file(tmp_path, spacing_mm=(1.0, 1.0, 1.004), normalization=(ZSCORE,))
    result = taken(init, plan)
    assert result.report["warnings"] == []
    assert result.report["stem"] == {"policy": "checkpoint", "taken": "main"}
    assert result.left_at_init == ()
    assert taken(checkpoint_file(tmp_path), plan).report["warnings"] == []  # nothing is stated


def test_other_spacing_and_normalisation_are_one_line_each(tmp_path: Path, plan: Plan) -> None:
    init = checkpoint_file(tmp_path, spacing_mm=(1.0, 1.0, 1.0), normalization=(ZSCORE,))
    ct = CTPercentile(lower=-1000.0, upper=400.0, mean=-20.0, std=120.0)
    other = plan.model_copy(update={"spacing_mm": (2.5, 0.7, 0.7), "normalization": (ct,)})
    lines = data_differences(read_checkpoint(init), other, stem="main")
    assert lines == [
        "warning: spacing: the checkpoint was trained at 1 x 1 x 1 mm, the store has "
        "2.5 x 0.7 x 0.7 mm (z y x)",
        "warning: normalisation of channel MR: the checkpoint's stem main was trained with "
        "zscore (nonzero_only no), the store has ct_percentile (lower -1000, upper 400, "
        "mean -20, std 120)",
    ]
    assert len(data_differences(read_checkpoint(init), other, stem=None)) == 1
    skull = plan.model_copy(update={"normalization": (ZScore(nonzero_only=True),)})
    assert len(data_differences(read_checkpoint(init), skull, stem="main")) == 1


def test_from_scratch_a_frozen_random_encoder_is_told(plan: Plan) -> None:
    paper = taken(None, plan, preset="retunet_small")
    assert paper.lines == ()
    frozen = 'schedule.frozen={"steps": 20, "parts": ["detector.encoder"]}'
    (line,) = taken(None, plan, frozen).lines
    assert line.startswith("warning: no --init: the encoder's random weights stay frozen for the")
    assert "first 20 steps" in line
    assert "--set schedule.frozen=none" in line
    (line,) = taken(None, plan, 'tune={"name": "linear"}').lines
    assert "--tune linear keeps the encoder's random weights" in line
    (line,) = taken(None, plan, "transfer.stem=random", preset="retunet_small").lines
    assert line.startswith("warning: no --init: transfer.stem of the preset says how a checkpoint")


def test_an_encoder_of_another_depth_and_kernel_is_adapted_on_request(
    tmp_path: Path, plan: Plan
) -> None:
    deeper = RESENC_SMALL.model_copy(
        update={
            "features": (*RESENC_SMALL.features, 64),
            "strides": (*RESENC_SMALL.strides, (2, 2, 2)),
            "kernels": ((1, 3, 3), *RESENC_SMALL.kernels[1:], (3, 3, 3)),
            "blocks": (*RESENC_SMALL.blocks, 1),
        }
    )
    init = checkpoint_file(tmp_path, arch=deeper)
    with pytest.raises(CheckpointError, match=r"--set transfer\.adapt=true reconciles"):
        taken(init, plan)
    result = taken(init, plan, "transfer.adapt=true")
    assert result.left_at_init == ()
    adapted = result.report["adapted"]
    assert any(line.startswith("stages.4: ") and "not used" in line for line in adapted)
    assert any("zeros around along z" in line for line in adapted)
    wider = RESENC_SMALL.model_copy(update={"features": (8, 16, 32, 48)})
    with pytest.raises(CheckpointError, match=r"--set architecture=checkpoint builds it$"):
        taken(checkpoint_file(tmp_path, arch=wider), plan, "transfer.adapt=true")


def test_a_stem_that_stays_random_under_a_linear_tuning_is_told(tmp_path: Path, plan: Plan) -> None:
    init = checkpoint_file(tmp_path)
    result = taken(init, plan, "transfer.stem=random", 'tune={"name": "linear"}', channels=3)
    assert len(result.left_at_init) == 4
    assert "--tune linear keeps 4 tensors of the encoder" in result.lines[-1]
    assert result.report["stem"] == {"policy": "random", "taken": None}


def test_other_stages_are_refused_unless_they_are_allowed(tmp_path: Path, plan: Plan) -> None:
    shallow = EncoderConfig(
        kind="residual",
        features=RESENC_SMALL.features[:-1],
        strides=RESENC_SMALL.strides[:-1],
        kernels=RESENC_SMALL.kernels[:-1],
        blocks=RESENC_SMALL.blocks[:-1],
        conv_bias=RESENC_SMALL.conv_bias,
    )
    last = f"stages.{len(shallow.features)}"
    init = checkpoint_file(tmp_path, arch=shallow)
    with pytest.raises(CheckpointError, match="checkpoint none"):
        taken(init, plan)
    result = taken(init, plan, f'transfer.allow=["strides", "{last}"]')
    assert {name.rsplit(".blocks")[0] for name in result.left_at_init} == {last}
    with pytest.raises(ConfigError, match=r"transfer\.allow: stages\.77 names no tensor"):
        taken(init, plan, 'transfer.allow=["stages.77"]')


TINY = (
    "patch_size=[16,16,16]", "schedule.steps=2", "schedule.warmup_steps=0", "optim.lr=1e-3",
    "validation_batches=0", "log_every_steps=1",
)  # fmt: skip


@pytest.mark.slow
def test_a_fraction_and_low_rank_updates_travel_from_the_command_to_the_run(
    raw_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, run = tmp_path / "store", tmp_path / "run"
    prepare(raw_dataset, store, workers=0)
    init = checkpoint_file(tmp_path, spacing_mm=(9.0, 9.0, 9.0))
    train(
        PRESET, store=store, run=run, init=init, stem="replicate", tune="lora", device="cpu",
        workers=0, overrides=[*TINY, "data_fraction=0.5", "tune.rank=2"],
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "tune lora (rank 2, alpha 16): " in said
    assert "warning: spacing: the checkpoint was trained at 9 x 9 x 9 mm" in said
    facts = json.loads((run / "data.json").read_text())
    assert facts["train_patients"] == len(facts["train"]) == round(facts["of_patients"] / 2)
    assert not set(facts["train"]) & set(facts["val"])
    config = json.loads((run / "config.json").read_text())
    assert config["tune"] == {"name": "lora", "rank": 2, "alpha": 16.0}
    assert config["transfer"]["stem"] == "replicate"
    assert json.loads((run / "transfer.json").read_text())["stem"]["taken"] == "main"
    state = load_state(run / "checkpoints")
    assert state is not None
    base = "detector.encoder.stem.conv.parametrizations.weight.original"
    assert torch.equal(state.model[base], read_checkpoint(init).tensors["encoder.stem.conv.weight"])
    detector, _, _ = load_run(run)
    update = state.model[base.replace("original", "0.up")]
    assert update.abs().sum() > 0
    down = state.model[base.replace("original", "0.down")]
    merged = state.model[base] + 8.0 * (update @ down).view_as(state.model[base])
    torch.testing.assert_close(detector.encoder.stem.conv.weight, merged)
    assert read_plan(run) == read_plan(store)
    with pytest.raises(ConfigError, match=r"store_plan: .* was prepared with --plan default"):
        train(PRESET, store=store, run=tmp_path / "other", overrides=["store_plan=fixed"])
