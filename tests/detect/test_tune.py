"""Linear and low-rank tuning: what stays to the bit, what trains, what is written and resumed."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from voxelbridge.core.train.distributed import World
from voxelbridge.core.train.optim import SGD, AdamW, build_optimizer
from voxelbridge.core.train.steps import freeze, train_steps
from voxelbridge.detect.batches import DetectionBatch
from voxelbridge.detect.build import (
    Detector,
    build_detector,
    build_objective,
    load_detect_config,
    with_arguments,
)
from voxelbridge.detect.config import LinearTuning, LowRankTuning, Tuning
from voxelbridge.detect.detections import Targets
from voxelbridge.detect.low_rank import LowRankUpdate, add_low_rank_updates, merged_state
from voxelbridge.detect.tune import apply_tuning, describe_tuning
from voxelbridge.detect.weights import read_weights, write_weights

SIZE = 16
LORA = LowRankTuning(rank=4, alpha=8.0)
UPDATE = re.compile(r"\.parametrizations\.weight\.0\.(up|down)$")


def detector_of(preset: str, *, channels: int = 1) -> Detector:
    torch.manual_seed(0)
    return build_detector(preset, in_channels=channels, num_classes=1)


def batch(step: int) -> DetectionBatch:
    image = torch.randn(2, 1, SIZE, SIZE, SIZE, generator=torch.Generator().manual_seed(step))
    box = torch.tensor([[2.0, 3.0, 4.0, 8.0, 10.0, 12.0]])
    targets = tuple(
        Targets(boxes=box + i, labels=torch.zeros(1, dtype=torch.int64)) for i in (0, 1)
    )
    return DetectionBatch(image, targets, foreground=image[:, 0] > 1)


def steps_of(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    first: int = 0,
    last: int = 2,
    *,
    world: World | None = None,
) -> list[float]:
    world = world or World(torch.device("cpu"))
    results = train_steps(
        objective, (batch(step + 10 * world.rank) for step in range(first, last)), optimizer,
        world=world, learning_rate=lambda _: 1e-2, first_step=first,
        steps=last, precision="fp32", clip_norm=1.0, accumulation_steps=1, seed=0,
    )  # fmt: skip
    return [result.losses["total"].item() for result in results]


def tuned(preset: str, tune: Tuning) -> tuple[Detector, nn.Module]:
    detector = detector_of(preset)
    apply_tuning(detector, tune)
    return detector, build_objective(detector, load_detect_config(preset))


@pytest.mark.parametrize("preset", ["resenc_retunet_small", "resenc_defdetr_small"])
@pytest.mark.parametrize("tune", [LinearTuning(), LORA], ids=["linear", "lora"])
def test_the_encoder_stays_to_the_bit_and_all_else_trains(preset: str, tune: Tuning) -> None:
    before = {k: v.clone() for k, v in detector_of(preset).state_dict().items()}
    detector, objective = tuned(preset, tune)
    optimizer = build_optimizer(AdamW(lr=1e-2, weight_decay=0.5, amsgrad=True), objective)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = {name for name, p in detector.named_parameters() if id(p) in held}
    if isinstance(tune, LinearTuning):
        assert not [name for name in names if name.startswith("encoder.")]
    else:
        assert all(UPDATE.search(name) for name in names if name.startswith("encoder."))
    assert {name for name in before if not name.startswith("encoder.")} <= names
    steps_of(objective, optimizer)
    after = detector.state_dict()
    idle = {id(p) for p in detector.idle_parameters(**_segment(preset))}
    idle_names = {name for name, p in detector.named_parameters() if id(p) in idle}
    for name, tensor in before.items():
        kept = after.get(
            name, after.get(name.replace("weight", "parametrizations.weight.original"))
        )
        assert kept is not None
        if name not in idle_names:
            assert torch.equal(kept, tensor) is name.startswith("encoder."), name
    for name, p in detector.named_parameters():  # every update has moved, `down` after `up`
        if UPDATE.search(name) and id(p) not in idle:
            assert p.grad is not None
            assert p.grad.abs().sum() > 0, name
            assert name.endswith("down") or p.abs().sum() > 0, name


def _segment(preset: str) -> dict[str, bool]:
    return {"segment": True} if "retunet" in preset else {}


def test_a_frozen_encoder_keeps_nothing_for_a_backward_pass() -> None:
    detector, _ = tuned("resenc_retunet_small", LinearTuning())
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        maps = detector.encoder(batch(0).image)
    assert kept == []
    assert not any(level.requires_grad for level in maps)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_low_rank_updates_start_as_the_network_they_update(precision: str) -> None:
    plain = detector_of("resenc_retunet_small")
    updated = copy.deepcopy(plain)
    apply_tuning(updated, LORA)
    for network in (plain, updated):
        network.to(memory_format=torch.channels_last_3d)  # pyright: ignore[reportCallIssue] torch's stubs miss it
    image = batch(0).image
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        for a, b in zip(updated.encoder(image), plain.encoder(image), strict=True):
            assert torch.equal(a, b)


def test_an_update_is_alpha_over_rank_times_up_times_down() -> None:
    conv = nn.Conv3d(2, 3, (1, 2, 3), bias=False)
    weight = conv.weight.detach().clone()
    network = nn.Sequential(conv)
    add_low_rank_updates(network, rank=2, alpha=6.0)
    update = conv.get_submodule("parametrizations.weight.0")
    assert isinstance(update, LowRankUpdate)
    assert (update.up.shape, update.down.shape) == ((3, 2), (2, 12))
    nn.init.normal_(update.up)
    expected = weight + 3.0 * torch.einsum("or,rn->on", update.up, update.down).view_as(weight)
    torch.testing.assert_close(conv.weight, expected)
    state = merged_state(network)
    assert state.keys() == {"0.weight"}
    assert torch.equal(state["0.weight"], conv.weight)
    wide = nn.Conv3d(1, 2, 1)
    add_low_rank_updates(nn.Sequential(wide), rank=8, alpha=8.0)  # no more rows than there are
    assert [tuple(p.shape) for p in wide.parameters() if p.requires_grad] == [(1, 1), (2, 1)]


def test_written_weights_are_merged_under_plain_names(tmp_path: Path) -> None:
    detector, objective = tuned("resenc_retunet_small", LORA)
    steps_of(objective, build_optimizer(SGD(lr=1e-2), objective))
    (tmp_path / "checkpoints").mkdir()
    write_weights(tmp_path, detector)
    plain = detector_of("resenc_retunet_small")
    read_weights(tmp_path, plain)
    with torch.no_grad():
        image = batch(9).image
        ours, theirs = (net.eval()(image, segment=True) for net in (detector, plain))
    torch.testing.assert_close(theirs.logits, ours.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs.deltas, ours.deltas, rtol=0, atol=1e-5)
    start = detector_of("resenc_retunet_small").state_dict()
    moved = [n for n, t in plain.state_dict().items() if not torch.equal(t, start[n])]
    assert "encoder.stem.conv.weight" in moved


def test_a_resumed_low_rank_tuning_repeats_every_bit() -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        _, objective = tuned("resenc_defdetr_small", LORA)
        return objective, build_optimizer(AdamW(weight_decay=0.1), objective)

    whole, optimizer = fresh()
    straight = steps_of(whole, optimizer)
    half, first = fresh()
    losses = steps_of(half, first, last=1)
    resumed, second = fresh()
    resumed.load_state_dict(half.state_dict())
    second.load_state_dict(first.state_dict())
    assert losses + steps_of(resumed, second, first=1) == straight
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_the_frozen_phase_stops_the_updates_and_its_end_does_not_free_the_weights() -> None:
    _, objective = tuned("resenc_retunet_small", LORA)
    trainable = [p for p in objective.parameters() if p.requires_grad]
    freeze(objective, ("detector.encoder",), trainable=trainable)
    names = {name for name, p in objective.named_parameters() if p.requires_grad}
    assert not [name for name in names if ".encoder." in name]
    freeze(objective, (), trainable=trainable)
    thawed = {name for name, p in objective.named_parameters() if p.requires_grad} - names
    assert thawed
    assert all(UPDATE.search(name) for name in thawed)


RANK = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from test_tune import LORA, AdamW, LinearTuning, build_optimizer, steps_of, tuned
from voxelbridge.core.train.distributed import join_world
facts = []
with join_world("cpu") as world:
    for preset, tune in (("resenc_retunet_small", LORA), ("resenc_defdetr_small", LORA),
                         ("resenc_defdetr_small", LinearTuning())):
        _, objective = tuned(preset, tune)
        steps_of(objective, build_optimizer(AdamW(), objective), world=world)
        facts.append([p.double().sum().item() for p in objective.parameters()])
    with open(f"{sys.argv[2]}/{world.rank}.json", "w") as stream:
        json.dump(facts, stream)
"""


@pytest.mark.long
@pytest.mark.slow
def test_two_ranks_have_the_same_updates_after_each_step(
    two_ranks: Callable[[str], list[Any]],
) -> None:
    ranks = two_ranks(RANK)
    assert ranks[0] == ranks[1]


def test_a_stem_drawn_anew_trains_whole_beside_low_rank_updates() -> None:
    detector = detector_of("resenc_retunet_small", channels=3)
    new = [f"stem.{name}" for name in detector.encoder.stem.state_dict()]
    apply_tuning(detector, LORA, left_at_init=new)
    trained = {name for name, p in detector.encoder.named_parameters() if p.requires_grad}
    assert set(new) <= trained
    assert all(UPDATE.search(name) for name in trained - set(new))
    count = sum(p.numel() for p in detector.encoder.parameters() if p.requires_grad)
    assert "rank 4, alpha 8): " in describe_tuning(detector, LORA)
    assert describe_tuning(detector, LORA).endswith(f"{count:,} of them in the encoder")


def test_the_command_line_chooses_the_tuning_and_keeps_its_figures() -> None:
    def tune_of(preset: str, *overrides: str, tune: str | None) -> Tuning:
        assert tune in ("full", "linear", "lora", None)
        texts = with_arguments(preset, overrides, tune=tune)
        return load_detect_config(preset, texts).tune

    assert tune_of("resenc_retunet_lora_small", tune="lora") == LowRankTuning(rank=4, alpha=8.0)
    assert tune_of("resenc_retunet_lora_small", tune="linear") == LinearTuning()
    assert tune_of("resenc_retunet", "tune.rank=2", tune="lora") == LowRankTuning(rank=2)
    assert tune_of("resenc_retunet_lora", "tune.rank=2", tune=None) == LowRankTuning(rank=2)


def test_a_linear_tuning_has_no_phase_with_a_frozen_encoder() -> None:
    linear, paper = (
        load_detect_config("resenc_retunet_linear"),
        load_detect_config("resenc_retunet"),
    )
    assert linear.schedule.frozen is None
    assert linear.schedule.steps == 50 * 2500
    assert (linear.schedule.warmup_steps, linear.optim) == (4000, paper.optim)
    on_demand = load_detect_config("resenc_retunet", ['tune={"name": "linear"}'])
    assert on_demand.schedule == linear.schedule
    assert load_detect_config("resenc_retunet_lora").schedule == paper.schedule
    other = 'schedule.frozen={"steps": 5, "parts": ["detector.neck"]}'
    kept = load_detect_config("resenc_retunet_linear", [other]).schedule
    assert kept.frozen is not None
    assert json.loads(kept.frozen.model_dump_json())["steps"] == 5
