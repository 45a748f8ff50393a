import pytest
import torch
from torch import nn

from voxelbridge.core.config import Config, validate
from voxelbridge.core.errors import ConfigError
from voxelbridge.core.train.optim import SGD, AdamW, Optim, build_optimizer, parameter_groups


def network() -> nn.Sequential:
    norm = nn.InstanceNorm3d(4, affine=True)
    return nn.Sequential(nn.Conv3d(1, 4, 3), norm, nn.Conv3d(4, 4, 1), nn.GroupNorm(2, 4))


def test_every_parameter_is_in_exactly_one_group() -> None:
    net = network()
    for decays in (True, False):
        groups = parameter_groups(net, weight_decay=0.1, decay_norm_layers=decays)
        listed = [id(p) for group in groups for p in group["params"]]  # type: ignore[union-attr]
        assert sorted(listed) == sorted(id(p) for p in net.parameters())


def test_norm_layers_escape_decay_and_biases_do_not() -> None:
    net = network()
    decayed, undecayed = parameter_groups(net, weight_decay=0.1, decay_norm_layers=False)
    assert decayed["weight_decay"] == 0.1
    assert undecayed["weight_decay"] == 0.0
    conv_biases = {id(m.bias) for m in net if isinstance(m, nn.Conv3d)}
    assert conv_biases <= {id(p) for p in decayed["params"]}  # type: ignore[union-attr]
    assert len(undecayed["params"]) == 4  # type: ignore[arg-type]


def test_sgd_is_the_papers_by_default() -> None:
    optimizer = build_optimizer(SGD(), network())
    assert isinstance(optimizer, torch.optim.SGD)
    settings = optimizer.param_groups[0]
    assert (settings["lr"], settings["momentum"], settings["nesterov"]) == (1e-2, 0.99, True)
    assert settings["weight_decay"] == 3e-5
    assert len(optimizer.param_groups) == 1


def test_sgd_without_momentum_is_plain() -> None:
    assert build_optimizer(SGD(momentum=0.0), network()).param_groups[0]["nesterov"] is False


def test_adamw_takes_amsgrad_and_eps() -> None:
    optimizer = build_optimizer(AdamW(amsgrad=True, eps=1e-4, weight_decay=1e-4), network())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["amsgrad"] is True
    assert optimizer.param_groups[0]["eps"] == 1e-4


class Holder(Config):
    optim: Optim


def test_optimizer_is_chosen_by_name() -> None:
    assert validate(Holder, {"optim": {"name": "adamw"}}, where="x").optim == AdamW()
    with pytest.raises(ConfigError, match=r"optim\.name: got \"lamb\""):
        validate(Holder, {"optim": {"name": "lamb"}}, where="x")


def test_rate_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optim\.lr: got 0"):
        validate(Holder, {"optim": {"name": "sgd", "lr": 0.0}}, where="x")
