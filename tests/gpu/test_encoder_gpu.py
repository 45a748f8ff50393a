"""Encoders on a CUDA device against the CPU."""

import pytest
import torch
from torch import Tensor

from voxelbridge.core.arch.config import DecoderConfig, EncoderConfig
from voxelbridge.core.arch.encoder import Encoder, build_encoder
from voxelbridge.core.arch.init import initialize
from voxelbridge.core.arch.presets import PLAIN_SMALL, RESENC_L, RESENC_SMALL
from voxelbridge.core.arch.ufpn import UFPN
from voxelbridge.core.arch.unet import build_decoder

pytestmark = pytest.mark.gpu


def seeded(config: EncoderConfig) -> Encoder:
    encoder = build_encoder(config, in_channels=1)
    # Not kaiming, whose zero norms would hide the second half of every residual block.
    initialize(encoder, "torch_default", generator=torch.Generator().manual_seed(0))
    return encoder


def image_of(*size: int) -> Tensor:
    return torch.randn(2, 1, *size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    # cuDNN's convolutions default to TF32, which keeps three decimal digits only.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("config", [RESENC_SMALL, PLAIN_SMALL])
def test_forward_and_gradient_on_cuda_equal_the_cpu(config: EncoderConfig) -> None:
    results = []
    for device in ("cpu", "cuda"):
        encoder = seeded(config).to(device)
        outputs = encoder(image_of(16, 32, 32).to(device))
        torch.stack([output.square().mean() for output in outputs]).sum().backward()
        gradients = [parameter.grad for parameter in encoder.parameters()]
        results.append((outputs, gradients))
    for cpu, cuda in zip(*(outputs for outputs, _ in results), strict=True):
        torch.testing.assert_close(cuda.cpu(), cpu, rtol=1e-4, atol=1e-4)
    for cpu, cuda in zip(*(gradients for _, gradients in results), strict=True):
        assert cpu is not None
        assert cuda is not None
        torch.testing.assert_close(cuda.cpu(), cpu, rtol=1e-3, atol=1e-4)


def test_decoder_and_pyramid_on_cuda_equal_the_cpu() -> None:
    encoder = seeded(RESENC_SMALL)
    decoder = build_decoder(DecoderConfig(convs_per_stage=(1, 1, 1), conv_bias=True), RESENC_SMALL)
    pyramid = UFPN(encoder.channels, encoder.strides, out_channels=32)
    with torch.no_grad():
        features = encoder(image_of(16, 32, 32))
        on_cuda = [feature.cuda() for feature in features]
        for module in (decoder, pyramid):
            expected = module(features)
            for cpu, cuda in zip(expected, module.cuda()(on_cuda), strict=True):
                torch.testing.assert_close(cuda.cpu(), cpu, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [RESENC_SMALL, RESENC_L])
def test_bfloat16_step_is_finite_and_near_float32(config: EncoderConfig) -> None:
    encoder = seeded(config).cuda()
    image = image_of(64, 64, 64).cuda()
    with torch.no_grad():
        exact = encoder(image)[0]
    with torch.autocast("cuda", dtype=torch.bfloat16):
        outputs = encoder(image)
    torch.stack([output.float().square().mean() for output in outputs]).sum().backward()
    difference = (outputs[0].float() - exact).square().mean().sqrt()
    assert difference < 0.05 * exact.square().mean().sqrt()
    assert all(output.isfinite().all() for output in outputs)
    for parameter in encoder.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
