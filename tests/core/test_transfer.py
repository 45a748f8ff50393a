"""Transfer: every tensor accounted for, every unnamed difference an error."""

from pathlib import Path

import pytest
import torch

from voxelbridge.core.arch.config import (
    AnyDecoderConfig,
    DecoderConfig,
    EncoderConfig,
    UFPNConfig,
)
from voxelbridge.core.arch.decoder import Decoder, build_any_decoder
from voxelbridge.core.arch.encoder import Encoder, build_encoder
from voxelbridge.core.checkpoint import (
    Checkpoint,
    CheckpointMetadata,
    Stem,
    collect_tensors,
    write_checkpoint,
)
from voxelbridge.core.errors import CheckpointError, ConfigError
from voxelbridge.core.transfer import (
    ShapeMismatch,
    load_encoder,
    transfer_decoder,
    transfer_encoder,
)

TINY = EncoderConfig(
    kind="residual",
    features=(2, 3),
    strides=((1, 1, 1), (2, 2, 2)),
    kernels=((3, 3, 3), (1, 1, 1)),
    blocks=(1, 2),
    conv_bias=True,
)


def ramp_encoder(channels: int, *, start: float = 0.0, config: EncoderConfig = TINY) -> Encoder:
    encoder = build_encoder(config, in_channels=channels)
    with torch.no_grad():
        for index, parameter in enumerate(encoder.parameters()):
            ramp = torch.arange(parameter.numel(), dtype=torch.float32)
            parameter.copy_(torch.sin(ramp + index + start).reshape(parameter.shape))
    return encoder


def checkpoint_of(channels: int = 1, *, config: EncoderConfig = TINY) -> Checkpoint:
    metadata = CheckpointMetadata(
        method="mae", arch=config, stems={"ct": Stem(channels=channels, modality="CT")}
    )
    tensors = collect_tensors(ramp_encoder(channels, config=config))
    return Checkpoint(metadata, tensors, origin="weights.safetensors")


def several_stems(channels: dict[str, int]) -> Checkpoint:
    """Stems whose weights are filled with the number in their name."""
    one = checkpoint_of()
    tensors = {k: v for k, v in one.tensors.items() if not k.startswith("encoder.stem.")}
    for name, count in channels.items():
        for key, tensor in ramp_encoder(count).stem.state_dict().items():
            tensors[f"encoder.stems.{name}.{key}"] = torch.full_like(tensor, float(name))
    stems = {name: Stem(channels=count) for name, count in channels.items()}
    metadata = one.metadata.model_copy(update={"stems": stems})
    return Checkpoint(metadata, tensors, origin="weights.safetensors")


def test_checkpoint_policy_copies_everything() -> None:
    checkpoint, encoder = checkpoint_of(), ramp_encoder(1, start=0.5)
    report = transfer_encoder(checkpoint, encoder)
    assert set(report.loaded) == encoder.state_dict().keys()
    assert report.left_at_init == report.unused == report.shape_mismatched == ()
    for name, tensor in collect_tensors(encoder).items():
        assert torch.equal(tensor, checkpoint.tensors[name])
    assert "checkpoint: ct (1 channel)" in report.describe()


def test_other_channels_are_an_error_that_lists_what_to_do() -> None:
    encoder = ramp_encoder(4)
    with pytest.raises(CheckpointError) as caught:
        transfer_encoder(checkpoint_of(), encoder)
    message = str(caught.value)
    assert message.startswith("weights.safetensors: stem ct takes 1 channel, the encoder 4 ")
    assert "'random'" in message
    assert "replicate" in message
    assert "\n" not in message


def test_random_policy_leaves_the_stem_alone() -> None:
    checkpoint, encoder = checkpoint_of(), ramp_encoder(4, start=0.5)
    before = {name: tensor.clone() for name, tensor in encoder.stem.state_dict().items()}
    report = transfer_encoder(checkpoint, encoder, stem="random")
    assert set(report.left_at_init) == {f"stem.{name}" for name in before}
    assert set(report.unused) == {f"encoder.stem.{name}" for name in before}
    for name, tensor in encoder.stem.state_dict().items():
        assert torch.equal(tensor, before[name])
    for name, tensor in encoder.stages.state_dict().items():
        assert torch.equal(tensor, checkpoint.tensors[f"encoder.stages.{name}"])


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_replicated_stem_of_equal_channels_gives_the_original_maps(channels: int) -> None:
    source, encoder = ramp_encoder(1), ramp_encoder(channels, start=0.5)
    report = transfer_encoder(checkpoint_of(), encoder, stem="replicate")
    assert report.left_at_init == report.unused == ()
    weight = encoder.stem.conv.weight
    assert weight.shape[1] == channels
    torch.testing.assert_close(weight.sum(dim=1), source.stem.conv.weight[:, 0])
    image = torch.sin(torch.arange(512.0)).reshape(1, 1, 8, 8, 8)
    for a, b in zip(encoder(image.repeat(1, channels, 1, 1, 1)), source(image), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_replication_needs_a_stem_of_one_channel() -> None:
    with pytest.raises(CheckpointError, match="stem ct has 2 channels, only a stem of one channel"):
        transfer_encoder(checkpoint_of(2), ramp_encoder(4), stem="replicate")


def test_a_named_stem_is_that_stem_and_not_one_whose_name_begins_alike() -> None:
    checkpoint = several_stems({"40": 1, "4": 1, "400": 1})
    for name in ("4", "40", "400"):
        encoder = ramp_encoder(1)
        report = transfer_encoder(checkpoint, encoder, stem=name)
        assert encoder.stem.conv.weight.eq(float(name)).all()
        others = {"4", "40", "400"} - {name}
        assert {key.split(".")[2] for key in report.unused} == others
        assert set(report.loaded) == encoder.state_dict().keys()


def test_an_unknown_stem_lists_the_stems() -> None:
    checkpoint = several_stems({"40": 1, "41": 4})
    with pytest.raises(CheckpointError, match=r"no stem '4'.*40 \(1 channel\), 41 \(4 channels\)"):
        transfer_encoder(checkpoint, ramp_encoder(1), stem="4")


@pytest.mark.parametrize("policy", ["checkpoint", "replicate"])
def test_several_stems_need_a_name(policy: str) -> None:
    with pytest.raises(CheckpointError, match=r"several stems, name one of them: 4 .*, 40 "):
        transfer_encoder(several_stems({"4": 1, "40": 1}), ramp_encoder(1), stem=policy)


def test_the_one_stem_that_fits_is_taken_where_none_is_the_default() -> None:
    several = several_stems({"4": 1, "40": 3, "41": 2})
    three, five = ramp_encoder(3), ramp_encoder(5)
    assert transfer_encoder(several, three).stem == "checkpoint: 40 (3 channels)"
    assert three.stem.conv.weight.eq(40).all()
    report = transfer_encoder(several, five, stem="replicate")
    assert report.stem == "replicate: 4, 1 -> 5 channels, divided by their number"
    torch.testing.assert_close(five.stem.conv.weight.sum(dim=1), torch.full((2, 3, 3, 3), 4.0))
    with pytest.raises(CheckpointError, match="several stems, name one of them"):
        transfer_encoder(several, ramp_encoder(5))


def test_a_named_stem_of_other_channels_points_to_those_that_fit() -> None:
    with pytest.raises(CheckpointError, match=r"or one of the stems with its channels: 41$"):
        transfer_encoder(several_stems({"40": 1, "41": 4}), ramp_encoder(4), stem="40")


def test_every_difference_is_refused_with_both_shapes_and_nothing_is_copied() -> None:
    other = TINY.model_copy(update={"features": (2, 5), "blocks": (1, 1)})
    encoder = ramp_encoder(1, start=0.5, config=other)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        transfer_encoder(checkpoint_of(), encoder)
    message = str(caught.value)
    assert "\n" not in message
    assert "stages.1.blocks.0.conv1.conv.bias: checkpoint (3,), encoder (5,)" in message
    assert "more" in message
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_allowed_differences_are_reported() -> None:
    other = TINY.model_copy(update={"features": (2, 5), "blocks": (1, 1)})
    encoder = ramp_encoder(1, config=other)
    report = transfer_encoder(checkpoint_of(), encoder, allow=("stages.1",))
    assert all(not name.startswith("stages.1.") for name in report.loaded)
    assert set(report.loaded) | set(report.left_at_init) == encoder.state_dict().keys()
    bias = ShapeMismatch("stages.1.blocks.0.conv1.conv.bias", (3,), (5,))
    assert bias in report.shape_mismatched
    assert "encoder.stages.1.blocks.1.conv1.conv.bias" in report.unused
    assert bias.describe() in report.describe()


def test_a_missing_stage_is_left_at_init_when_allowed() -> None:
    deeper = TINY.model_copy(
        update={
            "features": (2, 3, 4),
            "strides": (*TINY.strides, (2, 2, 2)),
            "kernels": (*TINY.kernels, (1, 1, 1)),
            "blocks": (1, 2, 1),
        }
    )
    encoder = ramp_encoder(1, config=deeper)
    with pytest.raises(CheckpointError, match=r"stages\.2\.blocks\.0.*checkpoint none"):
        transfer_encoder(checkpoint_of(), encoder, allow=("strides",))
    report = transfer_encoder(checkpoint_of(), encoder, allow=("strides", "stages.2"))
    assert all(name.startswith("stages.2.") for name in report.left_at_init)


def test_an_allowance_ends_at_a_dot() -> None:
    encoder = ramp_encoder(1, config=TINY.model_copy(update={"blocks": (1, 1)}))
    with pytest.raises(ConfigError, match=r"'stages\.1\.blocks\.1\.conv' names no tensor"):
        transfer_encoder(checkpoint_of(), encoder, allow=("stages.1.blocks.1.conv",))
    transfer_encoder(checkpoint_of(), encoder, allow=("stages.1.blocks.1",))


def test_different_strides_are_refused_although_all_shapes_agree() -> None:
    encoder = ramp_encoder(1, config=TINY.model_copy(update={"strides": ((1, 1, 1), (1, 2, 2))}))
    with pytest.raises(CheckpointError, match="strides: checkpoint"):
        transfer_encoder(checkpoint_of(), encoder)
    report = transfer_encoder(checkpoint_of(), encoder, allow=("strides",))
    assert report.left_at_init == ()


def test_decoder_weights_are_unused_and_no_difference() -> None:
    checkpoint = checkpoint_of()
    tensors = dict(checkpoint.tensors) | {"decoder.upsample.0.weight": torch.zeros(1)}
    report = transfer_encoder(Checkpoint(checkpoint.metadata, tensors), ramp_encoder(1, start=0.5))
    assert report.unused == ("decoder.upsample.0.weight",)


def test_half_precision_weights_arrive_in_the_encoders_type() -> None:
    checkpoint = checkpoint_of()
    half = {name: tensor.to(torch.bfloat16) for name, tensor in checkpoint.tensors.items()}
    encoder = ramp_encoder(1, start=0.5)
    transfer_encoder(Checkpoint(checkpoint.metadata, half), encoder)
    weight = encoder.stem.conv.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, half["encoder.stem.conv.weight"].float())


def test_load_encoder_gives_the_written_encoder_in_eval_mode(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    write_checkpoint(path, checkpoint_of(2))
    state = torch.random.get_rng_state()
    encoder = load_encoder(path)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not encoder.training
    assert encoder.in_channels == 2
    assert encoder.config == TINY
    image = torch.sin(torch.arange(1024.0)).reshape(1, 2, 8, 8, 8)
    for a, b in zip(encoder(image), ramp_encoder(2)(image), strict=True):
        assert torch.equal(a, b)
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_load_encoder_with_several_stems(tmp_path: Path) -> None:
    path = tmp_path / "several.safetensors"
    write_checkpoint(path, several_stems({"4": 1, "40": 3}))
    assert load_encoder(str(path), stem="40").in_channels == 3
    assert load_encoder(path, stem="4").stem.conv.weight.eq(4).all()
    with pytest.raises(CheckpointError, match="has no stem '400'"):
        load_encoder(path, stem="400")
    with pytest.raises(CheckpointError, match="several stems"):
        load_encoder(path)
    with pytest.raises(CheckpointError, match="has no stem 'random'"):
        load_encoder(path, stem="random")


def test_the_default_stem_is_taken_where_none_is_named(tmp_path: Path) -> None:
    several = several_stems({"4": 1, "40": 3, "5": 1})
    metadata = several.metadata.model_copy(update={"default_stem": "5"})
    path = tmp_path / "several.safetensors"
    checkpoint = Checkpoint(metadata, several.tensors, origin=str(path))
    write_checkpoint(path, checkpoint)
    assert load_encoder(path).stem.conv.weight.eq(5).all()
    assert load_encoder(path, stem="40").in_channels == 3
    encoder = ramp_encoder(1)
    assert transfer_encoder(checkpoint, encoder).stem == "checkpoint: 5 (1 channel)"
    assert encoder.stem.conv.weight.eq(5).all()
    four = ramp_encoder(4)
    transfer_encoder(checkpoint, four, stem="replicate")
    assert four.stem.conv.weight.eq(5 / 4).all()
    with pytest.raises(CheckpointError, match=r"or one of the stems with its channels: 40$"):
        transfer_encoder(checkpoint, ramp_encoder(3))


UNET = DecoderConfig(convs_per_stage=(1,), conv_bias=True)
PYRAMID = UFPNConfig(out_channels=4, first_level=1, min_channels=2)


def ramp_decoder(config: AnyDecoderConfig, *, start: float = 0.0) -> Decoder:
    decoder = build_any_decoder(config, TINY)
    with torch.no_grad():
        for index, parameter in enumerate(decoder.parameters()):
            ramp = torch.arange(parameter.numel(), dtype=torch.float32)
            parameter.copy_(torch.cos(ramp + index + start).reshape(parameter.shape))
    return decoder


def with_decoder(config: AnyDecoderConfig) -> Checkpoint:
    metadata = checkpoint_of().metadata.model_copy(update={"decoder": config})
    tensors = collect_tensors(ramp_encoder(1), ramp_decoder(config))
    return Checkpoint(metadata, tensors, origin="weights.safetensors")


@pytest.mark.parametrize("config", [UNET, PYRAMID])
def test_a_decoder_of_the_same_kind_takes_everything_over(config: AnyDecoderConfig) -> None:
    decoder = ramp_decoder(config, start=0.5)
    report = transfer_decoder(with_decoder(config), decoder)
    source = ramp_decoder(config).state_dict()
    assert set(report.loaded) == source.keys()
    assert report.left_at_init == report.unused == report.shape_mismatched == ()
    assert all(torch.equal(tensor, source[n]) for n, tensor in decoder.state_dict().items())
    assert report.describe().startswith(f"decoder\nloaded            {len(source)} tensors\n")


@pytest.mark.parametrize(
    ("checkpoint", "wanted", "message"),
    [
        (checkpoint_of(), PYRAMID, "holds no decoder, needed is a U-FPN"),
        (with_decoder(UNET), PYRAMID, "holds a U-Net decoder, needed is a U-FPN"),
        (with_decoder(PYRAMID), UNET, "holds a U-FPN, needed is a U-Net decoder"),
    ],
)
def test_a_decoder_of_another_kind_is_refused(
    checkpoint: Checkpoint, wanted: AnyDecoderConfig, message: str
) -> None:
    with pytest.raises(CheckpointError, match=f"^weights.safetensors: {message}; transfer the"):
        transfer_decoder(checkpoint, ramp_decoder(wanted))


def test_a_pyramid_of_other_widths_is_refused_with_both_shapes() -> None:
    wider = PYRAMID.model_copy(update={"min_channels": 3})
    decoder = ramp_decoder(wider, start=0.5)
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        transfer_decoder(with_decoder(PYRAMID), decoder)
    message = str(caught.value)
    assert "does not fit the decoder in 5 places" in message
    assert "lateral.0.bias: checkpoint (2,), decoder (3,)" in message
    assert "\n" not in message
    assert all(torch.equal(tensor, before[n]) for n, tensor in decoder.state_dict().items())


def test_allowed_differences_of_a_decoder_are_reported_per_tensor() -> None:
    other = PYRAMID.model_copy(update={"min_channels": 3, "upsample_bias": True})
    decoder = ramp_decoder(other, start=0.5)
    checkpoint = with_decoder(PYRAMID)
    allow = ("lateral.0", "upsample", "out.0")
    report = transfer_decoder(checkpoint, decoder, allow=allow)
    assert set(report.loaded) == {
        "lateral.1.weight", "lateral.1.bias", "out.1.weight", "out.1.bias",
    }  # fmt: skip
    assert ShapeMismatch("lateral.0.bias", (2,), (3,), "decoder") in report.shape_mismatched
    assert "decoder (3,)" in report.describe()
    assert "upsample.0.bias" in report.left_at_init
    assert set(report.unused) == {f"decoder.{m.name}" for m in report.shape_mismatched}
    assert set(report.loaded) | set(report.left_at_init) == decoder.state_dict().keys()
    with pytest.raises(ConfigError, match=r"'stages.9' names no tensor of the decoder"):
        transfer_decoder(checkpoint, decoder, allow=[*allow, "stages.9"])
    with pytest.raises(ConfigError, match=r"'strides' names no tensor of the decoder"):
        transfer_decoder(checkpoint, decoder, allow=[*allow, "strides"])
