"""The U-Net decoder against the peer's, with the same weights."""

from typing import Any

import pytest
import torch
from torch import nn

from voxelbridge.core.arch.config import DecoderConfig, EncoderConfig
from voxelbridge.core.arch.encoder import build_encoder
from voxelbridge.core.arch.presets import PLAIN_SMALL, RESENC_L, RESENC_SMALL
from voxelbridge.core.arch.unet import UNetDecoder, build_decoder

ANISOTROPIC = RESENC_SMALL.model_copy(
    update={
        "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2)),
        "kernels": ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3)),
    }
)


def peer_of(config: EncoderConfig, convs_coarse_first: list[int], num_classes: int) -> nn.Module:
    peer = pytest.importorskip(
        "dynamic_network_architectures.architectures.unet", reason="the peer is not installed"
    )
    residual = config.kind == "residual"
    network: Any = peer.ResidualEncoderUNet if residual else peer.PlainConvUNet
    return network(
        1,
        len(config.features),
        list(config.features),
        nn.Conv3d,
        [list(kernel) for kernel in config.kernels],
        [list(stride) for stride in config.strides],
        list(config.blocks),
        num_classes,
        convs_coarse_first,
        conv_bias=config.conv_bias,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    )


def load_from_peer(decoder: UNetDecoder, peer: nn.Module) -> None:
    """The peer counts levels from the coarsest, we from the finest."""
    last = len(decoder.stages) - 1
    state = {}
    for name, tensor in peer.decoder.state_dict().items():  # type: ignore[union-attr]
        if ".all_modules." in name or name.startswith(("encoder.", "seg_layers.")):
            continue
        kind, level, rest = name.split(".", 2)
        ours = {"transpconvs": "upsample", "stages": "stages"}[kind]
        state[f"{ours}.{last - int(level)}.{rest}"] = tensor
    decoder.load_state_dict(state)


@pytest.mark.parametrize(
    ("config", "convs"),
    [(RESENC_SMALL, (1, 1, 1)), (PLAIN_SMALL, (2, 1, 3)), (ANISOTROPIC, (1, 2, 1))],
)
def test_decoder_maps_give_the_logits_of_the_peer(
    config: EncoderConfig, convs: tuple[int, ...]
) -> None:
    peer = peer_of(config, list(reversed(convs)), num_classes=3)
    with torch.no_grad():
        for parameter in peer.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.linspace(-0.2, 0.3, parameter.numel()))
    encoder = build_encoder(config, in_channels=1)
    for theirs, ours in zip(peer.encoder.parameters(), encoder.parameters(), strict=True):  # type: ignore[union-attr]
        ours.data.copy_(theirs)
    decoder = build_decoder(
        DecoderConfig(convs_per_stage=convs, conv_bias=config.conv_bias), config
    )
    load_from_peer(decoder, peer)
    image = torch.randn(2, 1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = decoder(encoder(image))
        logits = peer(image)
        heads = list(peer.decoder.seg_layers)[::-1]  # type: ignore[union-attr]
        assert len(maps) == len(logits) == 3
        for feature_map, head, expected in zip(maps, heads, logits, strict=True):
            torch.testing.assert_close(head(feature_map), expected, rtol=0, atol=1e-5)
    assert decoder.channels == tuple(feature_map.shape[1] for feature_map in maps)


def test_full_size_decoder_is_the_known_network_without_its_output_layers() -> None:
    """Known: 12,052,389 with one class and an output layer on each of the five levels."""
    with torch.device("meta"):
        decoder = build_decoder(DecoderConfig(convs_per_stage=(1,) * 5, conv_bias=True), RESENC_L)
    parameters = sum(parameter.numel() for parameter in decoder.parameters())
    output_layers = [width + 1 for width in RESENC_L.features[:-1]]  # 1x1x1 to one class, bias
    assert parameters == 12_052_389 - sum(output_layers) == 12_051_584
    assert parameters + output_layers[0] == 12_051_617  # with the only one that MAE uses
    # 102,349,770: the whole network with two classes, which the literature states.
    assert 90_296_576 + parameters + 2 * sum(output_layers) == 102_349_770


def test_every_parameter_is_registered_once_and_none_is_the_encoders() -> None:
    decoder = build_decoder(DecoderConfig(convs_per_stage=(1, 1, 1), conv_bias=True), RESENC_SMALL)
    state = decoder.state_dict()
    assert len({tensor.untyped_storage().data_ptr() for tensor in state.values()}) == len(state)
    assert {name.split(".")[0] for name in state} == {"upsample", "stages"}


def test_all_encoder_maps_and_parameters_get_a_gradient() -> None:
    decoder = UNetDecoder(
        (2, 3, 4),
        ((1, 1, 1), (1, 2, 2), (2, 2, 2)),
        convs_per_stage=(1, 1),
        conv_bias=False,
    )
    shapes = ((1, 2, 4, 8, 8), (1, 3, 4, 4, 4), (1, 4, 2, 2, 2))
    features = [torch.linspace(-1, 1, torch.Size(s).numel()).reshape(s) for s in shapes]
    for feature in features:
        feature.requires_grad_()
    decoder(features)[0].square().sum().backward()
    for tensor in [*features, *decoder.parameters()]:
        assert tensor.grad is not None
        assert tensor.grad.any()


@pytest.mark.parametrize("convs", [(1,), (1, 1, 0), (1, 1, 1, 1)])
def test_a_wrong_number_of_convolutions_is_refused(convs: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="convs_per_stage needs 3"):
        UNetDecoder(
            RESENC_SMALL.features, RESENC_SMALL.strides, convs_per_stage=convs, conv_bias=True
        )


def test_a_wrong_number_of_maps_is_refused() -> None:
    decoder = build_decoder(DecoderConfig(convs_per_stage=(1, 1, 1), conv_bias=True), RESENC_SMALL)
    with pytest.raises(ValueError, match="expected 4 encoder maps, got 3"):
        decoder([torch.zeros(1, 8, 8, 8, 8)] * 3)
