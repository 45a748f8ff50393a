from pathlib import Path

import pytest
import torch

from voxelbridge.core.arch.presets import ENCODER_PRESETS
from voxelbridge.core.config import load_config, preset_path
from voxelbridge.core.errors import ConfigError
from voxelbridge.pretrain_sup.config import MultiTalentConfig
from voxelbridge.pretrain_sup.model import build_network

PRESETS = ("multitalent_resenc_l", "multitalent_retina_unet", "multitalent_small")


def load(name: str, *overrides: str) -> MultiTalentConfig:
    path = preset_path("voxelbridge.pretrain_sup", name)
    return load_config(MultiTalentConfig, path, overrides).config


@pytest.mark.parametrize("name", [*PRESETS, "multitalent_retina_unet_small"])
def test_presets_build_a_network_on_their_patches(name: str) -> None:
    config = load(name)
    encoder = ENCODER_PRESETS[config.encoder]
    with torch.device("meta"):
        network = build_network(
            encoder, config.decoder, stems={"a": 1, "b": 4}, heads={"a": 3}, init="torch_default"
        )
        image = torch.empty(4, *config.patch_size)
        (levels,) = network([image], ["b"], ["a"])
    assert levels[0].shape == (3, *config.patch_size)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("patch_size=[20,32,32]", r"encoder: .*\[8, 8, 8\] does not divide patch_size \[20, 32"),
        ("decoder.convs_per_stage=[1,1]", r"decoder: .*needs 3 entries, one fewer than the stages"),
        ('decoder={"kind": "ufpn", "first_level": 4}', r"first_level must be below 4"),
        ("decoder.kind=fpn", r'decoder\.kind: got "fpn", expected one of'),
        ("decoder.conv=1", r"decoder\.conv: no such setting; did you mean decoder\.conv_bias"),
        ("reduction=max", r"reduction: got \"max\"; input should be 'sum' or 'mean'"),
        ("sampling.dataset_weights.a=-1", r"dataset_weights"),
        ("batch=2", r"batch: no such setting"),
    ],
)
def test_wrong_settings_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load("multitalent_small", override)
    assert "\n" not in str(caught.value)


def test_settings_of_the_decoder_can_be_changed_one_by_one() -> None:
    config = load("multitalent_retina_unet", "decoder.out_channels=64", "decoder.first_level=1")
    assert config.decoder.model_dump()["out_channels"] == 64


def test_weights_of_data_sets_are_given_as_a_table(tmp_path: Path) -> None:
    config = load("multitalent_small", 'sampling.dataset_weights={"a": 0.5, "b": 0}')
    assert config.sampling.dataset_weights == {"a": 0.5, "b": 0}
    text = preset_path("voxelbridge.pretrain_sup", "multitalent_small").read_text()
    (tmp_path / "own.toml").write_text(f"{text}\n[sampling.dataset_weights]\na = 2.0\n")
    own = load_config(MultiTalentConfig, tmp_path / "own.toml").config
    assert own.sampling.dataset_weights == {"a": 2.0}


def test_what_costs_gpu_weeks_when_wrong_has_no_default() -> None:
    fields = MultiTalentConfig.model_fields.items()
    required = {name for name, field in fields if field.is_required()}
    assert {"patch_size", "batch_size", "schedule", "optim", "encoder", "decoder"} <= required
