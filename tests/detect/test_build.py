"""What a config becomes: which network, with which head, heads' start and losses."""

from pathlib import Path

import pytest
import torch

from voxelbridge.core.errors import ConfigError
from voxelbridge.detect.build import (
    DEFAULT_QUERIES,
    build_detector,
    build_objective,
    load_detect_config,
    resolve_detect_config,
)
from voxelbridge.detect.deformable_detr import BoxHead, DeformableDETR
from voxelbridge.detect.objective import DETRObjective, RetinaObjective
from voxelbridge.detect.plan import Plan
from voxelbridge.detect.retina_unet import RetinaUNet


def small_detr(*overrides: str, queries: int | None = None) -> DeformableDETR:
    torch.manual_seed(0)
    config = load_detect_config("defdetr_small", overrides)
    detector = build_detector(config, in_channels=1, num_classes=2, queries=queries)
    assert isinstance(detector, DeformableDETR)
    return detector


def test_a_table_without_a_name_is_a_retina_unet() -> None:
    config = load_detect_config("retunet", ["detector.class_weight=2"])
    assert config.detector.name == "retina_unet"
    assert config.detector.class_weight == 2.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("detector.heads=7", "width 64 must be a multiple of the 7 heads"),
        ("detector.width=30", "detector: .*width 30 must be a multiple"),
        ("detector.sizes_per_axis=3", "no such setting"),
        ("detector.name=yolo", "expected one of 'retina_unet', 'deformable_detr'"),
        ("detector.head_levels=[1,4]", "neighbouring levels"),
        ("detector.head_levels=[3,4]", "levels 0..3"),
        ("detector.class_prior=1.0", "detector.class_prior"),
        ("detector.box_head_init=ones", "detector.box_head_init"),
    ],
)
def test_an_impossible_detr_is_refused_by_name(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_detect_config("defdetr_small", [override])
    assert "\n" not in str(caught.value)


def test_queries_are_the_configs_else_the_plans_else_300() -> None:
    assert small_detr(queries=50).transformer.queries == 24
    assert small_detr("detector.queries=null", queries=50).transformer.queries == 50
    assert small_detr("detector.queries=null").transformer.queries == DEFAULT_QUERIES == 300


PLAN = Plan.model_construct(
    patch_size=(32, 64, 64),
    head_levels=(1, 2),
    features=(32, 64, 128),
    strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
    kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
)


def test_a_plan_replaces_what_a_base_states_and_not_what_the_preset_itself_states(
    tmp_path: Path,
) -> None:
    preset = tmp_path / "own.toml"
    preset.write_text('extends = "resenc_retunet"\narchitecture = "plan"\n')
    resolved = resolve_detect_config(str(preset), plan=PLAN)
    assert resolved.config.patch_size == PLAN.patch_size
    assert resolved.config.detector.head_levels == PLAN.head_levels
    assert resolved.origins["patch_size"] == resolved.origins["stages.strides"] == "plan"
    assert resolved.origins["batch_size"] == "resenc_retunet.toml"
    beside = tmp_path / "beside.toml"
    beside.write_text('extends = "own.toml"\npatch_size = [64, 64, 64]\n')
    config = load_detect_config(str(beside), plan=PLAN)
    assert (config.patch_size, config.stages is None) == ((64, 64, 64), False)
    with pytest.raises(ConfigError, match="name the store with --store"):
        load_detect_config(str(beside))
    unplanned = load_detect_config(str(beside), ["architecture=preset"])
    assert unplanned.stages is None


def test_first_class_probabilities_are_the_prior() -> None:
    heads = small_detr("detector.class_prior=0.2").transformer.class_heads
    for head in heads:
        assert isinstance(head, torch.nn.Linear)
        torch.testing.assert_close(head.bias.sigmoid(), torch.full_like(head.bias, 0.2))


@pytest.mark.parametrize(("start", "is_zero"), [("zero", True), ("torch_default", False)])
def test_box_heads_start_as_asked(start: str, is_zero: bool) -> None:
    for head in small_detr(f"detector.box_head_init={start}").transformer.box_heads:
        assert isinstance(head, BoxHead)
        last = head[-1]
        assert isinstance(last, torch.nn.Linear)
        assert bool((last.weight == 0).all()) == is_zero
        assert bool((last.bias == 0).all()) == is_zero


@pytest.mark.parametrize("name", ["retunet_small", "resenc_retunet_small", "defdetr_small"])
def test_equal_seeds_build_equal_networks(name: str) -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(build_detector(name, in_channels=1, num_classes=1).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_each_config_has_its_objective() -> None:
    retina, detr = load_detect_config("retunet_small"), load_detect_config("defdetr_small")
    networks = [build_detector(c, in_channels=1, num_classes=1) for c in (retina, detr)]
    assert isinstance(build_objective(networks[0], retina), RetinaObjective)
    assert isinstance(build_objective(networks[1], detr), DETRObjective)
    with pytest.raises(ValueError, match="DeformableDETR is no retina_unet"):
        build_objective(networks[1], retina)


@pytest.mark.parametrize("name", ["retunet_small", "resenc_defdetr_small"])
def test_candidates_are_boxes_in_voxels_and_probabilities(name: str) -> None:
    torch.manual_seed(0)
    detector = build_detector(name, in_channels=1, num_classes=3).eval()
    with torch.no_grad():
        found = detector.candidates(torch.randn(2, 1, 16, 24, 32))
    assert len(found) == 2
    for boxes, probabilities in found:
        assert boxes.shape == (len(probabilities), 6)
        assert probabilities.shape[1] == 3
        assert boxes.dtype == probabilities.dtype == torch.float32
        assert ((probabilities > 0) & (probabilities < 1)).all()
        centres = (boxes[:, :3] + boxes[:, 3:]) / 2
        assert (boxes[:, 3:] > boxes[:, :3]).all()
        middle = centres.mean(dim=0)
        assert ((middle > 0) & (middle < torch.tensor([16.0, 24.0, 32.0]))).all()
        assert centres[:, 2].max() > 16  # voxels, not parts of the patch


def test_nndet_v001_has_its_biases_and_activations() -> None:
    with torch.device("meta"):
        detector = build_detector("nndet_v001", in_channels=1, num_classes=1)
    assert isinstance(detector, RetinaUNet)
    biases = [layer.bias for layer in detector.neck.upsample]
    assert sum(bias.numel() for bias in biases if isinstance(bias, torch.Tensor)) == 480
    layers = list(detector.head.modules())
    assert sum(isinstance(layer, torch.nn.ReLU) for layer in layers) == 4
    assert not any(isinstance(layer, torch.nn.LeakyReLU) for layer in layers)
