"""The pyramid: exact size, a slow reference, and levels that are not asked for."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from voxelbridge.core.arch.config import Triple
from voxelbridge.core.arch.encoder import build_encoder
from voxelbridge.core.arch.presets import PLAIN, RESENC_L
from voxelbridge.core.arch.ufpn import UFPN

CHANNELS = (2, 3, 4, 5)
STRIDES = ((1, 1, 1), (1, 2, 2), (2, 4, 4), (4, 8, 8))


def small() -> UFPN:
    pyramid = UFPN(CHANNELS, STRIDES, out_channels=8, first_level=2, min_channels=3)
    with torch.no_grad():
        for index, parameter in enumerate(pyramid.parameters()):
            ramp = torch.arange(parameter.numel(), dtype=torch.float32)
            parameter.copy_((torch.sin(ramp * 0.7 + index) * 0.3).reshape(parameter.shape))
    return pyramid


def encoder_maps() -> list[Tensor]:
    shapes = [
        (2, c, 8 // z, 16 // y, 16 // x) for c, (z, y, x) in zip(CHANNELS, STRIDES, strict=True)
    ]
    return [torch.sin(torch.arange(torch.Size(s).numel()) ** 1.1).reshape(s) for s in shapes]


def slow_pyramid(pyramid: UFPN, features: list[Tensor]) -> list[Tensor]:
    """Upsampling written out: with kernel = stride each coarse cell paints its own block."""
    fused: list[Tensor] = []
    for level in reversed(range(len(features))):
        lateral = pyramid.lateral[level]
        x = torch.einsum("bcdhw,oc->bodhw", features[level], lateral.weight[:, :, 0, 0, 0])  # type: ignore[index]
        x = x + lateral.bias.view(1, -1, 1, 1, 1)  # type: ignore[operator]
        if fused:
            weight = pyramid.upsample[level].weight
            painted = torch.einsum("bcdhw,copqr->bodphqwr", fused[0], weight)
            x = x + painted.reshape(x.shape)
        fused.insert(0, x)
    return [
        F.conv3d(x, out.weight, out.bias, padding=1)  # type: ignore[arg-type]
        for x, out in zip(fused, pyramid.out, strict=True)
    ]


@pytest.mark.parametrize("preset", [RESENC_L, PLAIN])
def test_paper_pyramid_has_the_exact_number_of_parameters(preset) -> None:
    with torch.device("meta"):
        encoder = build_encoder(preset, in_channels=1)
        pyramid = UFPN(encoder.channels, encoder.strides)
    assert sum(parameter.numel() for parameter in pyramid.parameters()) == 2_520_256
    assert pyramid.channels == (32, 64, 128, 128, 128, 128)
    assert pyramid.strides == encoder.strides


def test_pyramid_equals_slow_reference_forward_and_gradient() -> None:
    pyramid, features = small(), encoder_maps()
    results = []
    for function in (pyramid, lambda maps: slow_pyramid(pyramid, maps)):
        inputs = [feature.clone().requires_grad_() for feature in features]
        outputs = function(inputs)
        loss = torch.stack([output.square().sum() for output in outputs]).sum()
        gradients = torch.autograd.grad(loss, [*inputs, *pyramid.parameters()])
        results.append([output.detach() for output in outputs] + list(gradients))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-3)


def test_finer_levels_are_narrower_down_to_the_minimum() -> None:
    assert small().channels == (3, 4, 8, 8)


def test_levels_come_in_the_order_asked_for_and_are_those_of_the_whole_pyramid() -> None:
    pyramid, features = small(), encoder_maps()
    everything = pyramid(features)
    for levels in ((2, 3), (3, 1), (0,), ()):
        some = pyramid(features, levels=levels)
        assert len(some) == len(levels)
        for level, feature_map in zip(levels, some, strict=True):
            assert torch.equal(feature_map, everything[level])


def test_levels_not_asked_for_are_not_computed() -> None:
    pyramid, features = small(), encoder_maps()
    called: list[str] = []
    for name, module in pyramid.named_modules():
        if "." in name:
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    pyramid(features, levels=(2,))
    assert sorted(called) == ["lateral.2", "lateral.3", "out.2", "upsample.2"]


@pytest.mark.parametrize("levels", [(4,), (-1,), (0, 7)])
def test_an_unknown_level_is_refused(levels: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"not all within 0\.\.3"):
        small()(encoder_maps(), levels=levels)


def test_upsampling_has_no_bias_and_every_parameter_is_registered_once() -> None:
    state = small().state_dict()
    assert not [name for name in state if name.startswith("upsample") and name.endswith("bias")]
    assert len({tensor.untyped_storage().data_ptr() for tensor in state.values()}) == len(state)


@pytest.mark.parametrize(
    ("channels", "strides", "first_level", "message"),
    [
        ((2, 3), STRIDES, 2, "2 channels for 4 strides"),
        (CHANNELS, STRIDES, 4, "first_level must be below 4"),
        ((2, 3), ((1, 2, 2), (2, 3, 4)), 0, "no multiple"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    channels: tuple[int, ...], strides: tuple[Triple, ...], first_level: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        UFPN(channels, strides, first_level=first_level)
