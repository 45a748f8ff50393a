"""The weighted total, names that every step has, and gradients that every rank needs."""

import pytest
import torch
from torch import Tensor

from voxelbridge.detect.batches import DetectionBatch
from voxelbridge.detect.build import build_detector, build_objective, load_detect_config
from voxelbridge.detect.deformable_detr import DeformableDETR
from voxelbridge.detect.detections import Targets
from voxelbridge.detect.objective import DETRObjective, Objective

SHAPE = (16, 16, 24)
V001 = (
    "detector.classification_loss=hard_negatives",
    "detector.box_loss=giou",
    "detector.upsample_bias=true",
    "detector.head_activation=relu",
)


def objective(name: str, *overrides: str) -> Objective:
    torch.manual_seed(0)
    config = load_detect_config(name, [f"patch_size={list(SHAPE)}", *overrides])
    return build_objective(build_detector(config, in_channels=1, num_classes=2), config).train()


def batch(*, objects: bool, labelled: bool = True) -> DetectionBatch:
    image = torch.randn(2, 1, *SHAPE, generator=torch.Generator().manual_seed(1))
    one = Targets(torch.tensor([[2.0, 3.0, 4.0, 9.0, 10.0, 12.0]]), torch.tensor([1]))
    targets = (one if objects else Targets.empty(), Targets.empty())
    return DetectionBatch(image, targets, torch.zeros(2, *SHAPE).bool() if labelled else None)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("defdetr_small", ()),
        ("defdetr_small", ("detector.decoder_blocks=1",)),
        ("resenc_defdetr_small", ("detector.head_levels=[1,2]",)),
        ("retunet_small", ()),
        ("retunet_small", V001),
    ],
)
@pytest.mark.parametrize("objects", [True, False])
def test_every_parameter_has_a_finite_gradient(
    name: str, overrides: tuple[str, ...], objects: bool
) -> None:
    """Ranks that average gradients would wait forever for a missing one."""
    trained = objective(name, *overrides)
    losses = trained(batch(objects=objects))
    losses["total"].backward()
    for parameter_name, parameter in trained.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("name", ["defdetr_small", "retunet_small"])
def test_names_do_not_depend_on_the_batch(name: str) -> None:
    trained = objective(name)
    found = [
        set(trained(batch(objects=objects, labelled=labelled)))
        for objects in (True, False)
        for labelled in (True, False)
    ]
    assert all(names == found[0] for names in found)


def test_the_total_of_detr_weighs_all_stages_alike() -> None:
    trained = objective("defdetr_small", "detector.l1_weight=3", "detector.class_weight=0.5")
    losses = trained(batch(objects=True))
    assert len(losses) == 10
    weights = {"classification": 0.5, "l1": 3.0, "giou": 2.0}
    expected = sum(
        weight * losses[f"{stage}{part}"]
        for stage in ("", "aux_", "proposal_")
        for part, weight in weights.items()
    )
    torch.testing.assert_close(losses["total"], expected)


def test_boxes_of_detr_lose_nothing_without_objects() -> None:
    losses: dict[str, Tensor] = objective("defdetr_small")(batch(objects=False))
    for stage in ("", "aux_", "proposal_"):
        assert losses[f"{stage}l1"].item() == losses[f"{stage}giou"].item() == 0.0
        assert losses[f"{stage}classification"].item() > 0


def test_a_frozen_encoder_keeps_nothing_for_the_gradient() -> None:
    trained = objective("defdetr_small")
    assert isinstance(trained, DETRObjective)
    assert isinstance(trained.detector, DeformableDETR)
    trained.get_submodule("detector.encoder").requires_grad_(False)
    maps = trained.detector.encoder(torch.randn(1, 1, *SHAPE))
    assert not any(level.requires_grad for level in maps)
    trained(batch(objects=True))["total"].backward()
    assert all(p.grad is None for p in trained.detector.encoder.parameters())
    assert all(p.grad is not None for p in trained.detector.transformer.parameters())
