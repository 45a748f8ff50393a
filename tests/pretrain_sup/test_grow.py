"""Further data sets: what was there stays, what is new is new, anything else is refused."""

import pytest
import torch
from torch import Tensor

from voxelbridge.core.arch.config import DecoderConfig, EncoderConfig
from voxelbridge.core.errors import CheckpointError
from voxelbridge.pretrain_sup.grow import Growth, grow
from voxelbridge.pretrain_sup.model import SegmentationNetwork, build_network

ENCODER = EncoderConfig(
    kind="residual",
    features=(2, 3),
    strides=((1, 1, 1), (2, 2, 2)),
    kernels=((3, 3, 3), (3, 3, 3)),
    blocks=(1, 1),
    conv_bias=True,
)
UNET = DecoderConfig(convs_per_stage=(1,), conv_bias=True)


def network_of(stems: dict[str, int], heads: dict[str, int], *, seed: int) -> SegmentationNetwork:
    torch.manual_seed(seed)
    return build_network(ENCODER, UNET, stems=stems, heads=heads, init="torch_default")


def state_of(network: SegmentationNetwork) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def test_a_new_stem_and_head_are_added_and_everything_else_is_kept() -> None:
    old = network_of({"ct": 1}, {"ct.0": 3, "ct.1": 2}, seed=1)
    new = network_of({"ct": 1, "ct2": 4}, {"ct.0": 3, "ct.1": 2, "ct": 5}, seed=2)
    fresh = state_of(new)
    assert grow(new, old.state_dict()) == Growth(stems=("ct2",), heads=("ct",), widened=())
    kept = old.state_dict()
    for name, tensor in new.state_dict().items():
        assert torch.equal(tensor, kept[name] if name in kept else fresh[name]), name
    image = torch.randn(1, 8, 8, 8)
    for head in ("ct.0", "ct.1"):
        a, b = (net([image], ["ct"], [head])[0][0] for net in (old, new))
        assert torch.equal(a, b)


def test_a_data_set_on_a_known_stem_adds_a_head_alone() -> None:
    old = network_of({"ct": 1}, {"a": 2}, seed=1)
    new = network_of({"ct": 1}, {"a": 2, "b": 3}, seed=2)
    assert grow(new, old.state_dict()) == Growth(stems=(), heads=("b",), widened=())


def test_an_equal_network_takes_everything_over() -> None:
    old, new = (network_of({"ct": 1}, {"a": 2}, seed=seed) for seed in (1, 2))
    assert grow(new, old.state_dict()) == Growth((), (), ())
    assert all(torch.equal(t, old.state_dict()[n]) for n, t in new.state_dict().items())


def test_outputs_of_a_widened_head_go_where_they_are_said_to_stand() -> None:
    old = network_of({"ct": 1}, {"joint": 3}, seed=1)
    new = network_of({"ct": 1, "mr": 1}, {"joint": 5}, seed=2)
    fresh = state_of(new)
    growth = grow(new, old.state_dict(), outputs={"joint": (4, 0, 1)})
    assert growth == Growth(stems=("mr",), heads=(), widened=("joint",))
    image = torch.randn(1, 8, 8, 8)
    before = old([image], ["ct"], ["joint"])[0][0]
    after = new([image], ["ct"], ["joint"])[0][0]
    torch.testing.assert_close(after[[4, 0, 1]], before)
    for name, tensor in new.state_dict().items():
        if name.startswith("heads."):
            assert torch.equal(tensor[[2, 3]], fresh[name][[2, 3]])


@pytest.mark.parametrize(
    ("stems", "heads", "message"),
    [
        ({"mr": 1}, {"a": 2, "b": 2}, r"encoder\.stems\.ct\.conv\.bias of the state is not in"),
        ({"ct": 1}, {"a": 2}, r"heads\.b\.levels\.0\.bias of the state is not in the network"),
        ({"ct": 1}, {"a": 2, "b": 3}, r"b\.levels\.0\.bias: state \(2,\), expected \(3,\)"),
        ({"ct": 2}, {"a": 2, "b": 2}, r"conv\.weight: state \(2, 1, 3, 3, 3\), expected \(2, 2,"),
    ],
)
def test_other_differences_are_refused_and_nothing_is_copied(
    stems: dict[str, int], heads: dict[str, int], message: str
) -> None:
    old = network_of({"ct": 1}, {"a": 2, "b": 2}, seed=1)
    new = network_of(stems, heads, seed=2)
    before = state_of(new)
    with pytest.raises(CheckpointError, match=message) as caught:
        grow(new, old.state_dict())
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in new.state_dict().items())


@pytest.mark.parametrize(
    "name", ["encoder.stems.ct.conv.bias", "encoder.stages.0.blocks.0.conv1.conv.weight"]
)
def test_a_state_with_a_gap_is_refused(name: str) -> None:
    old, new = (network_of({"ct": 1}, {"a": 2}, seed=seed) for seed in (1, 2))
    state = {key: tensor for key, tensor in old.state_dict().items() if key != name}
    with pytest.raises(CheckpointError, match=f"in 1 places.*{name} is not in the state"):
        grow(new, state)


@pytest.mark.parametrize("places", [(0, 0), (0, 5), (-1, 0)])
def test_places_outside_the_head_are_refused(places: tuple[int, ...]) -> None:
    new = network_of({"ct": 1}, {"joint": 5}, seed=2)
    with pytest.raises(ValueError, match="must be distinct and below 5"):
        grow(new, new.state_dict(), outputs={"joint": places})
    with pytest.raises(ValueError, match="no head 'a'; heads are joint"):
        grow(new, new.state_dict(), outputs={"a": places})
