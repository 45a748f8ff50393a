"""Either kind of decoder from its config."""

import pytest
import torch

from voxelbridge.core.arch.config import AnyDecoderConfig, DecoderConfig, EncoderConfig, UFPNConfig
from voxelbridge.core.arch.decoder import build_any_decoder, decoder_kind
from voxelbridge.core.arch.encoder import build_encoder
from voxelbridge.core.arch.ufpn import UFPN
from voxelbridge.core.arch.unet import UNetDecoder

ENCODER = EncoderConfig(
    kind="plain",
    features=(3, 4, 5),
    strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
    kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
    blocks=(2, 1, 1),
    conv_bias=False,
)
CONFIGS: list[tuple[AnyDecoderConfig, type, int]] = [
    (DecoderConfig(convs_per_stage=(2, 1), conv_bias=True), UNetDecoder, 2),
    (UFPNConfig(out_channels=8, first_level=1, min_channels=4), UFPN, 3),
]


@pytest.mark.parametrize(("config", "kind", "levels"), CONFIGS)
def test_the_decoder_of_a_config_goes_with_its_encoder(
    config: AnyDecoderConfig, kind: type, levels: int
) -> None:
    decoder = build_any_decoder(config, ENCODER)
    assert isinstance(decoder, kind)
    assert decoder_kind(decoder) == config.kind
    encoder = build_encoder(ENCODER, in_channels=1)
    maps = decoder(encoder(torch.zeros(1, 1, 4, 8, 8)))
    assert [len(map_[0]) for map_ in maps] == list(decoder.channels)
    assert len(maps) == levels
    for map_, stride in zip(maps, encoder.strides, strict=False):
        assert tuple(map_.shape[2:]) == (4 // stride[0], 8 // stride[1], 8 // stride[2])


def test_every_setting_of_a_pyramid_is_used() -> None:
    config = UFPNConfig(
        out_channels=8, first_level=2, min_channels=3, kernel=(1, 3, 3), upsample_bias=True
    )
    pyramid = build_any_decoder(config, ENCODER)
    assert pyramid.channels == (3, 4, 8)
    shapes = {name: tuple(tensor.shape) for name, tensor in pyramid.state_dict().items()}
    assert shapes["out.0.weight"] == (3, 3, 1, 3, 3)
    assert shapes["upsample.0.bias"] == (3,)
    assert shapes["upsample.0.weight"] == (4, 3, 1, 2, 2)  # in, out, factor


def test_a_pyramid_whose_first_level_the_encoder_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="first_level must be below 3, got 3"):
        build_any_decoder(UFPNConfig(first_level=3), ENCODER)
