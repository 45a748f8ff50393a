"""Adapting weights to another encoder: what is changed is right, told, and nothing else passes."""

from typing import Any

import pytest
import torch

from voxelbridge.core.adapt import difference_table
from voxelbridge.core.arch.config import EncoderConfig
from voxelbridge.core.arch.encoder import build_encoder
from voxelbridge.core.arch.presets import PLAIN_SMALL, RESENC_SMALL
from voxelbridge.core.checkpoint import Checkpoint, CheckpointMetadata, Stem, collect_tensors
from voxelbridge.core.errors import CheckpointError
from voxelbridge.core.transfer import encoder_differences, transfer_encoder


def checkpoint_of(config: EncoderConfig) -> Checkpoint:
    torch.manual_seed(0)
    metadata = CheckpointMetadata(method="test", arch=config, stems={"a": Stem(channels=1)})
    return Checkpoint(metadata, collect_tensors(build_encoder(config, in_channels=1)))


def changed(**changes: Any) -> EncoderConfig:
    return RESENC_SMALL.model_copy(update=changes)


FLAT = changed(kernels=((1, 3, 3), *RESENC_SMALL.kernels[1:]))


def test_a_kernel_shrinks_by_the_mean_along_its_axis() -> None:
    source, encoder = checkpoint_of(RESENC_SMALL), build_encoder(FLAT, in_channels=1)
    with pytest.raises(CheckpointError, match=r"stages\.0\.blocks\.0\.conv1\.conv\.weight"):
        transfer_encoder(source, encoder)
    report = transfer_encoder(source, encoder, adapt=True)
    name = "stages.0.blocks.0.conv1.conv.weight"
    expected = source.tensors[f"encoder.{name}"].mean(dim=2, keepdim=True)
    torch.testing.assert_close(encoder.state_dict()[name], expected)
    assert {d.name for d in report.adapted} == {
        "stem.conv.weight", name, "stages.0.blocks.0.conv2.conv.weight"
    }  # fmt: skip
    assert f"{name}" in report.describe()
    assert "(8, 8, 3, 3, 3)  (8, 8, 1, 3, 3)  mean along z" in report.describe()
    assert not report.left_at_init


def test_a_kernel_grows_without_a_change_of_outputs() -> None:
    source = checkpoint_of(FLAT)
    encoder = build_encoder(RESENC_SMALL, in_channels=1)
    transfer_encoder(source, encoder, adapt=True)
    same = build_encoder(FLAT, in_channels=1)
    transfer_encoder(source, same)
    image = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        for a, b in zip(encoder(image), same(image), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("stages", [3, 5])
def test_depth_differs(stages: int) -> None:
    per_stage = {
        "features": (8, 16, 32, 64, 64),
        "strides": ((1, 1, 1), *((2, 2, 2),) * 4),
        "kernels": ((3, 3, 3),) * 5,
        "blocks": (1,) * 5,
    }
    ours = changed(**{key: value[:stages] for key, value in per_stage.items()})
    source, encoder = checkpoint_of(RESENC_SMALL), build_encoder(ours, in_channels=1)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    report = transfer_encoder(source, encoder, adapt=True)
    for name, tensor in encoder.state_dict().items():
        if name.startswith("stages.4."):
            assert name in report.left_at_init
            assert torch.equal(tensor, before[name])
        else:
            assert torch.equal(tensor, source.tensors[f"encoder.{name}"])
    deeper = [name for name in source.tensors if name.startswith("encoder.stages.3.")]
    assert report.unused == (tuple(deeper) if stages == 3 else ())
    assert f"stages.{min(stages, 4)}" in {d.name for d in report.adapted}


def test_biases_before_a_norm_come_and_go_without_effect() -> None:
    for bias in (True, False):
        source = checkpoint_of(changed(conv_bias=bias))
        encoder = build_encoder(changed(conv_bias=not bias), in_channels=1)
        same = build_encoder(changed(conv_bias=bias), in_channels=1)
        transfer_encoder(source, same)
        report = transfer_encoder(source, encoder, adapt=True)
        assert all(d.name.endswith("conv.bias") for d in report.adapted)
        assert len(report.adapted) == 9
        image = torch.randn(1, 1, 16, 16, 16)
        with torch.no_grad():
            for a, b in zip(encoder(image), same(image), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


def test_other_strides_are_told() -> None:
    ours = changed(strides=((1, 1, 1), (1, 2, 2), *RESENC_SMALL.strides[2:]))
    encoder = build_encoder(ours, in_channels=1)
    source = checkpoint_of(RESENC_SMALL)
    with pytest.raises(CheckpointError, match="strides"):
        transfer_encoder(source, encoder)
    (difference,) = transfer_encoder(source, encoder, adapt=True).adapted
    assert difference.name == "strides"


@pytest.mark.parametrize(
    ("ours", "message"),
    [
        (changed(features=(8, 16, 32, 48)), "stages.3"),
        (changed(kernels=((5, 3, 3), *RESENC_SMALL.kernels[1:])), "stages.0"),
        (PLAIN_SMALL, "kind: checkpoint residual, encoder plain"),
    ],
)
def test_what_cannot_be_adapted_stays_an_error_and_copies_nothing(
    ours: EncoderConfig, message: str
) -> None:
    source, encoder = checkpoint_of(RESENC_SMALL), build_encoder(ours, in_channels=1)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        transfer_encoder(source, encoder, adapt=True)
    assert all(torch.equal(t, before[n]) for n, t in encoder.state_dict().items())
    table = difference_table(encoder_differences(source, encoder))
    assert "checkpoint" in table.splitlines()[0]
    assert "cannot be adapted" in table


def test_channel_policies_hold_while_adapting() -> None:
    source = checkpoint_of(RESENC_SMALL)
    encoder = build_encoder(FLAT, in_channels=4)
    with pytest.raises(CheckpointError, match="takes 1 channel, the encoder 4 channels"):
        transfer_encoder(source, encoder, adapt=True)
    transfer_encoder(source, encoder, stem="replicate", adapt=True)
    stem = source.tensors["encoder.stem.conv.weight"].mean(dim=2, keepdim=True) / 4
    torch.testing.assert_close(encoder.state_dict()["stem.conv.weight"], stem.repeat(1, 4, 1, 1, 1))
    fresh = build_encoder(FLAT, in_channels=4)
    before = fresh.state_dict()["stem.conv.weight"].clone()
    transfer_encoder(source, fresh, stem="random", adapt=True)
    assert torch.equal(fresh.state_dict()["stem.conv.weight"], before)
