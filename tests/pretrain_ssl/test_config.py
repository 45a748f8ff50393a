from pathlib import Path
from typing import get_args

import pytest

from voxelbridge.core.arch.encoder import build_encoder
from voxelbridge.core.arch.presets import ENCODER_PRESETS
from voxelbridge.core.config import Resolved, load_config, preset_path
from voxelbridge.core.errors import ConfigError
from voxelbridge.core.train.optim import SGD
from voxelbridge.core.train.settings import patches_per_pass
from voxelbridge.pretrain_ssl.config import PretrainConfig
from voxelbridge.pretrain_ssl.methods.mae import MAE
from voxelbridge.pretrain_ssl.train import build_objective


def load(preset: str, *overrides: str) -> Resolved[PretrainConfig]:
    return load_config(PretrainConfig, preset_path("voxelbridge.pretrain_ssl", preset), overrides)


def test_mae_preset_is_the_papers() -> None:
    config = load("mae").config
    assert config.encoder == "resenc_l"
    assert config.patch_size == (192, 192, 192)
    assert config.batch_size == 12
    assert config.schedule.steps == 4000 * 250
    assert config.schedule.warmup_steps == 0
    assert config.schedule.power == 0.9
    assert config.optim == SGD(lr=1e-2, momentum=0.99, nesterov=True, weight_decay=3e-5)
    assert config.optim.decay_norm_layers
    assert config.clip_norm == 12
    assert config.precision == "bf16"
    assert config.method == MAE(mask_ratio=0.75, block_size=16)
    assert patches_per_pass(config, ranks=4) == 3


def test_mae_network_has_nnssls_parameters_without_its_unused_layers() -> None:
    import torch

    with torch.device("meta"):
        encoder = build_encoder(ENCODER_PRESETS["resenc_l"], in_channels=1)
        objective = load("mae").config.method.build(encoder)
    # nnssl: 102,348,965 with output layers on all five levels (320, 256, 128 and 64 unused)
    unused = sum(channels + 1 for channels in (320, 256, 128, 64))
    assert sum(p.numel() for p in objective.parameters()) == 102_348_965 - unused
    assert sum(p.numel() for p in objective.encoder.parameters()) == 90_296_576


def test_small_preset_builds() -> None:
    config = load("mae_small").config
    assert config.precision == "fp32"
    assert sum(p.numel() for p in build_objective(config, 1).parameters()) < 500_000


def test_encoder_names_are_those_of_the_presets() -> None:
    names = get_args(PretrainConfig.model_fields["encoder"].annotation)
    assert set(names) == set(ENCODER_PRESETS)


def test_same_seed_draws_the_same_network() -> None:
    first, again, other = (
        build_objective(load("mae_small", f"seed={seed}").config, 1).get_parameter("output.weight")
        for seed in (1, 1, 2)
    )
    assert first.equal(again)
    assert not first.equal(other)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.block_size=7", r"method: .*blocks of 7 voxels do not divide the patch \[48"),
        ("method.mask_ratio=0.001", r"method: .*hides none of the"),
        ("method.mask_ratio=1.0", r"method\.mask_ratio: got 1\.0"),
        ("patch_size=[48,48,44]", r"method: .*blocks of 8 voxels do not divide the patch"),
        ("method.mask_ration=0.5", r"did you mean method\.mask_ratio\?"),
        ("method.name=vocoo", r"method\.name: got \"vocoo\""),
        ("seed=-1", "seed: got -1"),
        ("schedule.warmup_steps=60", "take all 60 steps"),
    ],
)
def test_wrong_settings_are_config_errors(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load("mae_small", override)


@pytest.mark.parametrize("key", ["patch_size", "batch_size", "schedule"])
def test_what_costs_weeks_when_wrong_has_no_default(tmp_path: Path, key: str) -> None:
    source = preset_path("voxelbridge.pretrain_ssl", "mae_small").read_text()
    path = tmp_path / "mine.toml"
    if key == "schedule":
        path.write_text(source.replace("steps = 60", ""))
    else:
        path.write_text("\n".join(x for x in source.splitlines() if not x.startswith(key)))
    with pytest.raises(ConfigError, match=rf"{key}\S*: missing"):
        load_config(PretrainConfig, path)


def test_batch_that_does_not_divide_is_a_config_error() -> None:
    config = load("mae_small", "accumulation_steps=2").config
    assert patches_per_pass(config, ranks=1) == 1
    with pytest.raises(ConfigError, match="batch_size: got 2, expected a multiple of 4"):
        patches_per_pass(config, ranks=2)


def test_patch_must_fit_the_encoder() -> None:
    path = preset_path("voxelbridge.pretrain_ssl", "mae_small")
    overrides = ["patch_size=[48,48,44]", "method.block_size=4"]
    with pytest.raises(ConfigError, match=r"total stride \[8, 8, 8\] of resenc_small does not div"):
        load_config(PretrainConfig, path, overrides)
