"""The presets and the configs they are made of."""

import json

import pytest
import torch
from pydantic import ValidationError

from voxelbridge.core.arch.config import EncoderConfig, cumulative_strides
from voxelbridge.core.arch.encoder import build_encoder
from voxelbridge.core.arch.presets import ENCODER_PRESETS, PLAIN, RESENC_L, RESENC_SMALL

# ResEnc-L: facts of the paper's networks; the small ones are counted by hand below.
PARAMETERS = {"resenc_l": 90_296_576, "plain": 14_022_880}


@pytest.mark.parametrize(("name", "expected"), PARAMETERS.items())
def test_paper_encoders_have_the_exact_number_of_parameters(name: str, expected: int) -> None:
    with torch.device("meta"):
        encoder = build_encoder(ENCODER_PRESETS[name], in_channels=1)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == expected


def test_plain_encoder_with_bias_has_the_bias_of_every_convolution_more() -> None:
    with torch.device("meta"):
        encoder = build_encoder(PLAIN.model_copy(update={"conv_bias": True}), in_channels=1)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 14_025_120


def test_residual_encoder_without_bias_matches_the_known_count() -> None:
    with torch.device("meta"):
        encoder = build_encoder(RESENC_L.model_copy(update={"conv_bias": False}), in_channels=1)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 90_284_320


def test_small_residual_encoder_is_counted_by_hand() -> None:
    def conv(before: int, after: int) -> int:
        return before * after * 27 + after + 2 * after  # weight, bias, norm

    def block(before: int, after: int) -> int:
        skip = before * after + 2 * after if before != after else 0
        return conv(before, after) + conv(after, after) + skip

    expected = conv(1, 8) + block(8, 8) + block(8, 16) + block(16, 32) + block(32, 64)
    with torch.device("meta"):
        encoder = build_encoder(RESENC_SMALL, in_channels=1)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == expected


def test_presets_are_the_four_named_ones() -> None:
    assert list(ENCODER_PRESETS) == ["resenc_l", "plain", "resenc_small", "plain_small"]


@pytest.mark.parametrize("name", list(ENCODER_PRESETS))
def test_preset_survives_json(name: str) -> None:
    preset = ENCODER_PRESETS[name]
    assert EncoderConfig.model_validate_json(preset.model_dump_json()) == preset


def test_cumulative_strides_multiply_per_axis() -> None:
    assert cumulative_strides(((1, 1, 1), (1, 2, 2), (2, 2, 2))) == (
        (1, 1, 1),
        (1, 2, 2),
        (2, 4, 4),
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("blocks", [1, 1, 1], "blocks has 3 entries for 4 stages"),
        ("kernels", [[3, 3, 3], [3, 3, 2], [3, 3, 3], [3, 3, 3]], "odd"),
        ("features", [8, 0, 32, 64], "greater than or equal to 1"),
        ("kind", "vision_transformer", "residual"),
        ("conv_bias", 1, "boolean"),
        ("activation", "relu", "Extra inputs"),
    ],
)
def test_unusable_config_is_refused(key: str, value: object, message: str) -> None:
    tree = json.loads(RESENC_SMALL.model_dump_json()) | {key: value}
    with pytest.raises(ValidationError, match=message):
        EncoderConfig.model_validate_json(json.dumps(tree))
