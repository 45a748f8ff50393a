import copy
import functools
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from voxelbridge.core.arch.encoder import build_encoder
from voxelbridge.core.arch.presets import PLAIN_SMALL, RESENC_SMALL
from voxelbridge.core.arch.unet import UNetDecoder
from voxelbridge.core.errors import ConfigError
from voxelbridge.core.train.optim import SGD
from voxelbridge.core.train.placement import place_objective, recompute_activations
from voxelbridge.core.train.schedule import PolySchedule
from voxelbridge.core.train.settings import TrainingSettings

CPU = torch.device("cpu")
CHANNELS_LAST = torch.channels_last_3d


class Objective(nn.Module):
    """Encoder, decoder with dropout between them; counts what is computed."""

    def __init__(self, config: Any = RESENC_SMALL) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = build_encoder(config, in_channels=1)
        self.decoder = UNetDecoder(
            config.features,
            config.strides,
            convs_per_stage=(1,) * (len(config.features) - 1),
            conv_bias=False,
        )

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        features = [nn.functional.dropout(f, 0.1) for f in self.encoder(image)]
        return {"total": self.decoder(features)[0].square().mean()}


def settings(**changed: Any) -> TrainingSettings:
    return TrainingSettings(
        patch_size=(16, 16, 16),
        batch_size=1,
        schedule=PolySchedule(steps=9),
        optim=SGD(),
        **changed,
    )


def gradients(objective: nn.Module, *, precision: torch.dtype | None = None) -> dict[str, Tensor]:
    torch.manual_seed(1)
    image = torch.randn(1, 1, 32, 32, 32)
    with torch.autocast("cpu", precision, enabled=precision is not None):
        loss = objective(image)["total"]
    objective.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("config", [RESENC_SMALL, PLAIN_SMALL])
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_recomputed_stages_give_the_same_gradients_to_the_bit(
    config: Any, precision: torch.dtype | None
) -> None:
    plain, thrifty = Objective(config), Objective(config)
    names = list(thrifty.state_dict())
    recompute_activations(thrifty, stages=2)
    assert list(thrifty.state_dict()) == names
    expected, found = (gradients(o, precision=precision) for o in (plain, thrifty))
    assert list(expected) == names == list(found)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_recomputed_stages_keep_less_for_the_backward_pass() -> None:
    def kept_bytes(objective: nn.Module) -> int:
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            objective(torch.randn(1, 1, 32, 32, 32))
        return total

    plain, thrifty = Objective(), Objective()
    recompute_activations(thrifty, stages=1)
    all_stages = Objective()
    recompute_activations(all_stages, stages=len(all_stages.encoder.stages))
    kept = [kept_bytes(objective) for objective in (plain, thrifty, all_stages)]
    assert kept[0] > 1.2 * kept[1] > 1.2 * kept[2]


def test_recomputed_stages_run_once_without_gradients_and_twice_with() -> None:
    objective = Objective()
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    objective.get_submodule("encoder.stages.0.blocks").register_forward_pre_hook(count)
    recompute_activations(objective, stages=1)
    with torch.no_grad():
        objective(torch.randn(1, 1, 32, 32, 32))
    assert calls == 1
    gradients(objective)
    assert calls == 3


def test_copy_of_a_recomputed_encoder_uses_its_own_weights() -> None:
    objective = Objective()
    recompute_activations(objective, stages=2)
    teacher = copy.deepcopy(objective)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.zero_()
    image = torch.randn(1, 1, 32, 32, 32)
    assert float(teacher(image)["total"].detach()) > 0
    assert float(objective(image)["total"].detach()) == 0


def test_more_stages_than_there_are_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"activation_checkpointing: got 9, .* of 4 stages"):
        place_objective(Objective(), settings(activation_checkpointing=9), CPU)
    with pytest.raises(ConfigError, match="no encoder with stages"):
        place_objective(nn.Linear(2, 2), settings(activation_checkpointing=1), CPU)


@pytest.mark.parametrize(
    ("changed", "last"),
    [
        ({}, True),
        ({"precision": "bf16"}, False),
        ({"memory_format": "contiguous"}, False),
        ({"memory_format": "channels_last_3d", "precision": "bf16"}, True),
    ],
)
def test_memory_format_is_what_the_settings_say(changed: dict[str, Any], last: bool) -> None:
    objective = nn.Conv3d(4, 4, 3)
    place_objective(objective, settings(**changed), CPU)
    assert objective.weight.is_contiguous(memory_format=CHANNELS_LAST) == last


def test_defaults_change_nothing() -> None:
    objective = Objective()
    place_objective(objective, settings(), CPU)
    assert "forward" not in vars(objective.encoder.stages[0])
    assert objective._compiled_call_impl is None


def test_compiler_that_is_not_there_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler found"):
        place_objective(Objective(), settings(compile=True), CPU)


@pytest.mark.slow
def test_compiled_objective_gives_the_same_losses_and_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Traced as ever, but run without the code generator, which takes minutes on a busy machine.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    plain, compiled = Objective(), Objective()
    place_objective(compiled, settings(compile=True, activation_checkpointing=2), CPU)
    place_objective(plain, settings(), CPU)
    assert compiled._compiled_call_impl is not None
    assert list(compiled.state_dict()) == list(plain.state_dict())
    expected, found = gradients(plain), gradients(compiled)
    torch.testing.assert_close(found, expected)
