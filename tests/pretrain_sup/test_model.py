"""The networks of supervised pre-training: equal to core's parts, and apart where they must be."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from voxelbridge.core.arch.config import (
    AnyDecoderConfig,
    DecoderConfig,
    EncoderConfig,
    UFPNConfig,
)
from voxelbridge.core.arch.decoder import build_any_decoder
from voxelbridge.core.arch.encoder import build_encoder
from voxelbridge.core.arch.presets import PLAIN, RESENC_L
from voxelbridge.core.arch.ufpn import UFPN
from voxelbridge.core.checkpoint import collect_tensors
from voxelbridge.core.errors import ConfigError
from voxelbridge.pretrain_sup.model import SegmentationNetwork, build_network

RESIDUAL = EncoderConfig(
    kind="residual",
    features=(4, 6, 8),
    strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
    kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
    blocks=(1, 2, 1),
    conv_bias=True,
)
STRIDED = EncoderConfig(
    kind="plain",
    features=(4, 6, 8),
    strides=((1, 2, 2), (2, 2, 2), (2, 2, 2)),
    kernels=((3, 3, 3),) * 3,
    blocks=(2, 1, 2),
    conv_bias=False,
)
UNET = DecoderConfig(convs_per_stage=(1, 1), conv_bias=True)
PYRAMID = UFPNConfig(out_channels=8, first_level=1, min_channels=2)
KINDS: dict[str, tuple[EncoderConfig, AnyDecoderConfig]] = {
    "residual U-Net": (RESIDUAL, UNET),
    "plain encoder and U-FPN": (STRIDED, PYRAMID),
    "strided plain U-Net": (STRIDED, UNET),
}
STEMS = {"ct": 1, "glioma": 2, "duke": 4}
HEADS = {"organs.0": 4, "organs.1": 3, "glioma": 2, "duke": 2}
SIZE = (8, 16, 16)
BATCH = (
    ("glioma", "glioma"),
    ("ct", "organs.1"),
    ("glioma", "glioma"),
    ("ct", "organs.0"),
    ("duke", "duke"),
    ("ct", "organs.1"),
)


@pytest.fixture(params=list(KINDS))
def network(request: pytest.FixtureRequest) -> SegmentationNetwork:
    return network_of(*KINDS[request.param])


def network_of(
    encoder: EncoderConfig,
    decoder: AnyDecoderConfig,
    stems: dict[str, int] = STEMS,
    heads: dict[str, int] = HEADS,
) -> SegmentationNetwork:
    torch.manual_seed(3)
    network = build_network(encoder, decoder, stems=stems, heads=heads, init="torch_default")
    with torch.no_grad():
        for parameter in network.parameters():  # norms that do something
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return network


def images_of(stems: Sequence[str], channels: dict[str, int] = STEMS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn((channels[stem], *SIZE), generator=generator) for stem in stems]


def names_of(batch: Sequence[tuple[str, str]]) -> tuple[list[str], list[str]]:
    return [stem for stem, _ in batch], [head for _, head in batch]


@pytest.mark.parametrize("kind", list(KINDS))
def test_with_one_data_set_it_is_cores_network_bit_for_bit(kind: str) -> None:
    config, decoder_config = KINDS[kind]
    network = network_of(config, decoder_config, stems={"mr": 2}, heads={"mr": 3})
    encoder = build_encoder(config, in_channels=2)
    decoder = build_any_decoder(decoder_config, config)
    state = network.state_dict()
    encoder.load_state_dict(
        {
            name.removeprefix("encoder.").replace("stems.mr.", "stem."): tensor
            for name, tensor in state.items()
            if name.startswith("encoder.")
        }
    )
    decoder.load_state_dict(part_of(state, "decoder."))
    heads = nn.ModuleList(nn.Conv3d(width, 3, 1) for width in decoder.channels)
    heads.load_state_dict(part_of(state, "heads.mr.levels."))

    images = images_of(["mr"] * 3, {"mr": 2})
    ours = network(images, ["mr"] * 3, ["mr"] * 3)
    maps = decoder(encoder(torch.stack(images)))
    theirs = [head(map_) for head, map_ in zip(heads, maps, strict=True)]
    assert [len(sample) for sample in ours] == [len(decoder.channels)] * 3
    for index, sample in enumerate(ours):
        for level, logits in enumerate(sample):
            assert torch.equal(logits, theirs[level][index])

    torch.stack([logits.square().sum() for sample in ours for logits in sample]).sum().backward()
    torch.stack([level.square().sum() for level in theirs]).sum().backward()
    for a, b in (
        *zip(network.encoder.stems["mr"].parameters(), encoder.stem.parameters(), strict=True),
        *zip(network.decoder.parameters(), decoder.parameters(), strict=True),
    ):
        assert a.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


def part_of(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def test_a_mixed_batch_gives_what_every_sample_gives_alone(network: SegmentationNetwork) -> None:
    network.double()  # what is left of rounding shows nothing of a mixed norm
    stems, heads = names_of(BATCH)
    images = [image.double() for image in images_of(stems)]
    together = network(images, stems, heads)
    for index, (stem, head) in enumerate(BATCH):
        alone = network([images[index]], [stem], [head])[0]
        assert len(alone) == len(together[index]) == len(network.level_strides)
        for a, b, stride in zip(alone, together[index], network.level_strides, strict=True):
            size = tuple(edge // step for edge, step in zip(SIZE, stride, strict=True))
            assert a.shape == b.shape == (HEADS[head], *size)
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@settings(max_examples=15, deadline=None)
@given(
    batch=st.lists(
        st.tuples(st.sampled_from(list(STEMS)), st.sampled_from(list(HEADS))),
        min_size=1,
        max_size=5,
    )
)
def test_any_batch_comes_back_in_its_own_order(batch: list[tuple[str, str]]) -> None:
    network = network_of(STRIDED, PYRAMID).double()
    stems, heads = names_of(batch)
    images = [image.double() for image in images_of(stems)]
    with torch.no_grad():
        together = network(images, stems, heads)
        for image, stem, head, logits in zip(images, stems, heads, together, strict=True):
            alone = network([image], [stem], [head])[0]
            for a, b in zip(alone, logits, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_gradients_of_a_mixed_batch_are_the_sums_of_its_samples(
    network: SegmentationNetwork,
) -> None:
    stems, heads = names_of(BATCH)
    images = images_of(stems)

    def gradients(indices: Sequence[int]) -> dict[str, Tensor]:
        network.zero_grad(set_to_none=True)
        chosen = [[images[i] for i in indices], [stems[i] for i in indices]]
        logits = network(*chosen, [heads[i] for i in indices])
        torch.stack([level.square().mean() for s in logits for level in s]).sum().backward()
        return {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}

    together = gradients(range(len(BATCH)))
    assert together.keys() == dict(network.named_parameters()).keys()
    alone = [gradients([index]) for index in range(len(BATCH))]
    for name, gradient in together.items():
        total = sum(own[name] for own in alone if name in own)
        torch.testing.assert_close(gradient, total, rtol=1e-3, atol=1e-5, msg=name)


def test_absent_stems_and_heads_have_no_gradient_and_stay_bit_identical(
    network: SegmentationNetwork,
) -> None:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    step(network, optimizer, BATCH)  # momentum everywhere
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    step(network, optimizer, [("ct", "organs.1"), ("ct", "organs.1")])
    absent = (
        "encoder.stems.glioma.",
        "encoder.stems.duke.",
        "heads.organs/0.",
        "heads.glioma.",
        "heads.duke.",
    )
    for name, parameter in network.named_parameters():
        if name.startswith(absent):
            assert parameter.grad is None, name
            assert torch.equal(parameter, before[name]), name
        else:
            assert parameter.grad is not None, name
            assert not torch.equal(parameter, before[name]), name


def step(
    network: SegmentationNetwork,
    optimizer: torch.optim.Optimizer,
    batch: Sequence[tuple[str, str]],
) -> None:
    optimizer.zero_grad(set_to_none=True)
    stems, heads = names_of(batch)
    logits = network(images_of(stems), stems, heads)
    torch.stack([level.square().mean() for s in logits for level in s]).sum().backward()
    optimizer.step()


def test_every_part_runs_once_per_group_and_the_trunk_once(network: SegmentationNetwork) -> None:
    calls: list[tuple[str, int]] = []

    def count(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: calls.append((name, len(inputs[0])))

    for name in STEMS:
        network.encoder.stems[name].register_forward_pre_hook(count(f"stem {name}"))
    network.encoder.stages[0].register_forward_pre_hook(count("trunk"))
    for name in HEADS:
        network.heads[name].levels[0].register_forward_pre_hook(count(f"head {name}"))
    stems, heads = names_of(BATCH)
    network(images_of(stems), stems, heads)
    assert sorted(calls) == [
        ("head duke", 1), ("head glioma", 2), ("head organs.0", 1), ("head organs.1", 2),
        ("stem ct", 3), ("stem duke", 1), ("stem glioma", 2), ("trunk", 6),
    ]  # fmt: skip


def test_one_head_for_all_data_sets_runs_once_over_all_stems() -> None:
    network = network_of(RESIDUAL, UNET, heads={"joint": 5}).double()
    calls: list[int] = []
    network.heads["joint"].register_forward_pre_hook(lambda _, maps: calls.append(len(maps[0][0])))
    stems = ["duke", "ct", "glioma", "ct"]
    images = [image.double() for image in images_of(stems)]
    logits = network(images, stems, ["joint"] * 4)
    assert calls == [4]
    alone = network(images[2:3], ["glioma"], ["joint"])[0]
    torch.testing.assert_close(logits[2][0], alone[0], rtol=0, atol=1e-10)


def test_prediction_gives_the_finest_logits_of_every_head_asked_for(
    network: SegmentationNetwork,
) -> None:
    images = images_of(["ct", "ct"])
    predicted = network.predict(torch.stack(images), stem="ct", heads=["organs.1", "organs.0"])
    assert list(predicted) == ["organs.1", "organs.0"]
    for name, logits in predicted.items():
        for index, sample in enumerate(network(images, ["ct", "ct"], [name, name])):
            torch.testing.assert_close(logits[index], sample[0])


def test_the_encoders_tensors_have_the_names_of_a_checkpoint(network: SegmentationNetwork) -> None:
    names = collect_tensors(network.encoder, network.decoder)
    stems = {name.split(".")[2] for name in names if name.startswith("encoder.stems.")}
    assert stems == set(STEMS)
    assert names["encoder.stems.duke.conv.weight"].shape[1] == 4
    assert {name.split(".")[0] for name in names} == {"encoder", "decoder"}
    assert not any(name.startswith("encoder.stem.") for name in names)


def test_names_that_modules_use_themselves_are_names_too() -> None:
    awkward = ["type", "keys", "forward", "training", "a", "a.0", "a.0.0"]
    network = network_of(RESIDUAL, UNET, stems={"train": 1}, heads=dict.fromkeys(awkward, 2))
    again = network_of(RESIDUAL, UNET, stems={"train": 1}, heads=dict.fromkeys(awkward, 2))
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.fill_(0.5)
    again.load_state_dict(network.state_dict())
    image = images_of(["train"], {"train": 1})
    for name in awkward:
        a, b = (net(image, ["train"], [name])[0][0] for net in (network, again))
        assert torch.equal(a, b)
    assert network.training
    assert not network.eval().training


@pytest.mark.parametrize("name", ["organs.0", "a/b", "", "random", "two words", "x" * 65, "a\n"])
def test_a_stem_that_no_checkpoint_could_hold_is_refused_at_once(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^stem .*a checkpoint takes"):
        network_of(RESIDUAL, UNET, stems={name: 1})


@pytest.mark.parametrize(
    ("images", "stems", "heads", "message"),
    [
        ([(1, *SIZE)], ["mr"], ["duke"], r"no stem 'mr'; stems are ct, glioma, duke"),
        ([(1, *SIZE)], ["ct"], ["organs"], r"no head 'organs'; heads are organs\.0, "),
        ([(1, *SIZE)], ["duke"], ["duke"], r"stem duke takes an image \(4, D, H, W\), got \(1,"),
        ([(1, 1, *SIZE)], ["ct"], ["duke"], r"stem ct takes an image"),
        ([(1, *SIZE), (1, 8, 16, 8)], ["ct"] * 2, ["duke"] * 2, "must have one size"),
        ([(1, 6, 16, 16)], ["ct"], ["duke"], "no multiple of the encoder's total stride"),
        ([(1, *SIZE)], ["ct"], [], "1 images, 1 stems, 0 heads"),
        ([], [], [], "0 images"),
    ],
)
def test_batches_that_do_not_fit_are_refused(
    images: list[tuple[int, ...]], stems: list[str], heads: list[str], message: str
) -> None:
    network = network_of(STRIDED, PYRAMID)
    with pytest.raises(ValueError, match=message):
        network([torch.zeros(shape) for shape in images], stems, heads)


def test_a_network_without_stems_or_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one stem"):
        network_of(RESIDUAL, UNET, stems={})
    with pytest.raises(ValueError, match="at least one head"):
        network_of(RESIDUAL, UNET, heads={})


def test_further_data_sets_leave_the_first_weights_of_the_trunk() -> None:
    states = []
    for stems, heads in ((STEMS, HEADS), ({"ct": 1}, {"duke": 2})):
        torch.manual_seed(11)
        network = build_network(RESIDUAL, UNET, stems=stems, heads=heads, init="kaiming")
        states.append(network.state_dict())
    for name, tensor in states[0].items():
        if name.startswith(("encoder.stages.", "decoder.")):
            assert torch.equal(tensor, states[1][name]), name


@pytest.mark.parametrize(
    ("encoder", "convs", "count"),
    [
        (RESENC_L, 1, 102_349_770),
        (PLAIN.model_copy(update={"conv_bias": True}), 2, 31_195_594),  # nnU-Net's
        (PLAIN, 2, 31_190_954),  # nnDetection's encoder: convolutions without bias
    ],
)
def test_full_size_networks_have_the_exact_number_of_parameters(
    encoder: EncoderConfig, convs: int, count: int
) -> None:
    decoder = DecoderConfig(convs_per_stage=(convs,) * 5, conv_bias=encoder.conv_bias)
    assert parameters(encoder, decoder, {"ct": 1}, {"ct": 2}) == count


def test_the_retina_u_net_without_detection_heads_has_its_exact_number_of_parameters() -> None:
    heads_per_output = 32 + 64 + 4 * 128 + 6
    trunk = 14_022_880 + 2_520_256
    assert parameters(PLAIN, UFPNConfig(), {"ct": 1}, {"ct": 2}) == trunk + 2 * heads_per_output
    stem = 2 * 32 + 27 * 32 * 4
    more = parameters(PLAIN, UFPNConfig(), {"ct": 1, "duke": 4}, {"ct": 2, "duke": 3})
    assert more == trunk + 5 * heads_per_output + stem


def parameters(
    encoder: EncoderConfig, decoder: AnyDecoderConfig, stems: dict[str, int], heads: dict[str, int]
) -> int:
    with torch.device("meta"):
        network = build_network(encoder, decoder, stems=stems, heads=heads, init="torch_default")
    return sum(parameter.numel() for parameter in network.parameters())


def test_kaiming_starts_residual_blocks_as_shortcuts_and_counts_the_pyramids_outputs() -> None:
    torch.manual_seed(0)
    residual = build_network(RESIDUAL, UNET, stems=STEMS, heads=HEADS, init="kaiming")
    state = residual.state_dict()
    assert state["encoder.stages.0.blocks.0.conv2.norm.weight"].eq(0).all()
    assert state["encoder.stems.ct.conv.bias"].eq(0).all()
    wide = UFPNConfig(out_channels=64, first_level=2)
    pyramid = build_network(STRIDED, wide, stems=STEMS, heads=HEADS, init="kaiming").decoder
    assert isinstance(pyramid, UFPN)
    # std = sqrt(2 / (1 + 0.01^2) / fan), the fan counting 64 outputs and not 8 inputs
    assert pyramid.state_dict()["lateral.2.weight"].std().item() == pytest.approx(
        (2 / 64) ** 0.5, rel=0.15
    )
    assert all(a <= b for a, b in pairwise(pyramid.channels))
