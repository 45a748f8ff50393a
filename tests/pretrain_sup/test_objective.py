"""The loss of a batch of several data sets, and what a step leaves alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from voxelbridge.core.arch.config import DecoderConfig, EncoderConfig
from voxelbridge.core.train.absent_parts import lacks_parts
from voxelbridge.core.train.distributed import World
from voxelbridge.core.train.steps import train_steps
from voxelbridge.pretrain_sup.batches import SegmentationBatch
from voxelbridge.pretrain_sup.dataset_labels import DatasetLabels, Target
from voxelbridge.pretrain_sup.label_space import (
    LabelSpace,
    Layout,
    build_label_space,
    encode_target,
)
from voxelbridge.pretrain_sup.losses import head_loss, level_weights
from voxelbridge.pretrain_sup.model import build_network
from voxelbridge.pretrain_sup.objective import MultiTalentObjective

ENCODER = EncoderConfig(
    kind="residual",
    features=(3, 4, 5),
    strides=((1, 1, 1), (2, 2, 2), (2, 2, 2)),
    kernels=((3, 3, 3),) * 3,
    blocks=(1, 1, 1),
    conv_bias=True,
)
DECODER = DecoderConfig(convs_per_stage=(1, 1), conv_bias=True)
ORGANS = DatasetLabels("organs", ("CT",), tuple(Target(n, (i + 1,)) for i, n in enumerate("abc")),
                       None, 5)  # fmt: skip
GLIOMA = DatasetLabels(
    "glioma", ("T1", "T2"), (Target("whole", (1, 2)), Target("core", (2,))), 3, 2, regions=True
)
LUNG = DatasetLabels("lung", ("CT",), (Target("lung", (2,)),), None, 3)
LAYOUTS: tuple[Layout, ...] = ("per_dataset", "joint")


def space_of(layout: Layout) -> LabelSpace:
    return build_label_space([ORGANS, GLIOMA, LUNG], layout=layout, max_targets=2)


def objective_of(layout: Layout, **settings: Any) -> MultiTalentObjective:
    space = space_of(layout)
    stems = {dataset.name: len(dataset.channels) for dataset in space.datasets}
    torch.manual_seed(0)
    network = build_network(
        ENCODER, DECODER, stems=stems, heads=space.output_layers, init="torch_default"
    )
    return MultiTalentObjective(network, space, **{"reduction": "mean", **settings})


def batch_of(space: LabelSpace, datasets: list[str], *, seed: int = 0) -> SegmentationBatch:
    """Noise; of the parts of a data set the last one."""
    generator = torch.Generator().manual_seed(seed)

    def labels() -> Tensor:
        return torch.randint(-1, 4, (8, 8, 8), generator=generator, dtype=torch.int32)

    channels = [len(space.dataset(name).channels) for name in datasets]
    return SegmentationBatch(
        images=[torch.randn(count, 8, 8, 8, generator=generator) for count in channels],
        segmentations=[labels() for _ in datasets],
        datasets=datasets,
        heads=[space.heads_of(name)[-1].name for name in datasets],
        cases=[f"{name}__x" for name in datasets],
    )


def test_the_loss_of_heads_is_the_mean_of_the_samples_losses() -> None:
    objective = objective_of("per_dataset")
    space = space_of("per_dataset")
    batch = batch_of(space, ["organs", "glioma", "organs", "lung"])
    losses = objective(batch)
    alone = []
    logits = objective.network(batch["images"], batch["datasets"], batch["heads"])
    for levels, name, segmentation in zip(
        logits, batch["heads"], batch["segmentations"], strict=True
    ):
        head = space.head(name)
        target, annotated = encode_target(head, segmentation)
        loss = head_loss(levels, target, head, level_weights(2), annotated=annotated)
        alone.append(loss["total"].item())
    assert losses["total"].item() == pytest.approx(sum(alone) / 4)
    assert losses["total"].item() == pytest.approx((losses["ce"] + losses["dice"]).item())
    assert losses["organs"].item() == pytest.approx((alone[0] + alone[2]) / 2)
    assert losses["glioma"].item() == pytest.approx(alone[1])
    assert set(losses) == {"total", "ce", "dice", "organs", "glioma", "lung"}
    assert not losses["organs"].requires_grad


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_entry_of_a_data_set_does_not_depend_on_the_rest(
    layout: Layout, reduction: str
) -> None:
    space = space_of(layout)
    objective = objective_of(layout, reduction=reduction, ranks=1, accumulation_steps=3)
    whole = batch_of(space, ["organs", "glioma", "glioma", "lung"])
    together = objective(whole)
    own = [1, 2]
    part = SegmentationBatch(
        images=[whole["images"][i] for i in own],
        segmentations=[whole["segmentations"][i] for i in own],
        datasets=["glioma"] * 2,
        heads=["glioma"] * 2,
        cases=["a", "b"],
    )
    assert objective(part)["glioma"].item() == pytest.approx(together["glioma"].item(), rel=1e-5)
    assert set(together) == {"total", "ce", "dice", "organs", "glioma", "lung"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sum_does_not_depend_on_the_number_of_parts(layout: Layout) -> None:
    batch = batch_of(space_of(layout), ["organs", "lung"])
    one = objective_of(layout, reduction="sum")(batch)
    four = objective_of(layout, reduction="sum", accumulation_steps=4)(batch)
    assert four["ce"].item() == pytest.approx(4 * one["ce"].item(), rel=1e-5)
    evaluated = objective_of(layout, reduction="sum", accumulation_steps=4, ranks=2).eval()(batch)
    assert evaluated["total"].item() == pytest.approx(one["total"].item(), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "used"),
    [
        ({}, {0}),  # the coarsest of two levels counts for nothing
        ({"supervise_coarsest": True}, {0, 1}),
        ({"deep_supervision": False, "supervise_coarsest": True}, {0}),
    ],
)
def test_levels_of_the_heads_that_learn(settings: dict[str, bool], used: set[int]) -> None:
    objective = objective_of("per_dataset", **settings)
    objective(batch_of(space_of("per_dataset"), ["lung"]))["total"].backward()
    levels = objective.network.heads["lung"].levels
    assert {n for n, level in enumerate(levels) if level.weight.grad is not None} == used


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_leaves_stems_and_heads_without_a_sample_as_they_are(layout: Layout) -> None:
    objective, space = objective_of(layout), space_of(layout)
    assert lacks_parts(objective)
    steps = [["organs", "lung"], ["glioma", "glioma"], ["lung", "lung"]]
    optimizer = torch.optim.SGD(
        objective.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1
    )
    state = [{name: p.detach().clone() for name, p in objective.named_parameters()}]
    for _ in train_steps(
        objective, [batch_of(space, names, seed=n) for n, names in enumerate(steps)], optimizer,
        world=World(torch.device("cpu")), learning_rate=lambda _: 0.1, first_step=0, steps=3,
        precision="fp32", clip_norm=12.0, accumulation_steps=1, seed=0,
    ):  # fmt: skip
        state.append({name: p.detach().clone() for name, p in objective.named_parameters()})
    for number, names in enumerate(steps):
        used_heads = {space.layer_of(space.heads_of(name)[-1]) for name in names}
        for name in state[0]:
            same = torch.equal(state[number][name], state[number + 1][name])
            match name.removeprefix("network.").split("."):
                case ["encoder", "stems", stem, *_]:
                    assert same == (stem not in names), (number, name)
                case ["heads", key, "levels", level, *_]:
                    learns = key.replace("/", ".") in used_heads and level == "0"
                    assert same == (not learns), (number, name)
                case ["encoder", "stages", *_]:
                    assert not same or name.endswith("conv.bias"), (number, name)
                case _:
                    pass


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_gives_about_the_same_loss_in_float32(layout: Layout) -> None:
    objective, batch = objective_of(layout), batch_of(space_of(layout), ["organs", "glioma"])
    exact = objective(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rough = objective(batch)
    assert rough["total"].dtype == torch.float32
    assert rough["total"].item() == pytest.approx(exact["total"].item(), rel=2e-2)


def test_a_batch_without_an_annotated_voxel_costs_nothing() -> None:
    for layout in LAYOUTS:
        objective, batch = objective_of(layout), batch_of(space_of(layout), ["organs"])
        batch["segmentations"] = [torch.full((8, 8, 8), -1, dtype=torch.int32)]
        losses = objective(batch)
        losses["total"].backward()
        assert losses["total"].item() == 0
        assert all(p.grad is None or not p.grad.any() for p in objective.parameters())
