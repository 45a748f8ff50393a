"""The memory model against what torch really keeps for the backward pass."""

import pytest
import torch

from voxelbridge.core.arch.config import EncoderConfig
from voxelbridge.core.train.optim import AdamW
from voxelbridge.detect.batches import DetectionBatch
from voxelbridge.detect.build import build_detector, build_objective, load_detect_config
from voxelbridge.detect.config import DetectConfig, encoder_config
from voxelbridge.detect.detections import Targets
from voxelbridge.detect.info import describe_preset, memory_of
from voxelbridge.detect.memory_model import NetworkShape, training_memory

ANISOTROPIC = (
    "architecture=plan",
    "patch_size=[8,48,32]",
    "stages.features=[8,16,32,32]",
    "stages.strides=[[1,1,1],[1,2,2],[1,2,2],[2,2,2]]",
    "stages.kernels=[[1,3,3],[1,3,3],[3,3,3],[3,3,3]]",
    "detector.head_levels=[1,2,3]",
)


def kept_bytes(config: DetectConfig, *, in_channels: int, num_classes: int) -> int:
    """Bytes that autograd keeps in one step, each storage once, parameters left out."""
    detector = build_detector(config, in_channels=in_channels, num_classes=num_classes)
    objective = build_objective(detector, config)
    size, count = config.patch_size, config.batch_size
    box = torch.tensor([[1.0, 4.0, 4.0, 6.0, 12.0, 12.0]])
    batch = DetectionBatch(
        image=torch.rand(count, in_channels, *size),
        targets=tuple(Targets(box, torch.tensor([0])) for _ in range(count)),
        foreground=torch.rand(count, *size) > 0.9,
    )
    seen = {parameter.untyped_storage()._cdata for parameter in objective.parameters()}
    alive: list[torch.Tensor] = []  # so that no storage's address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage()._cdata
        if address not in seen:
            seen.add(address)
            alive.append(tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.precision == "bf16"),
    ):
        objective(batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in alive)


@pytest.mark.parametrize("name", ["retunet_small", "resenc_retunet_small"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("overrides", [("patch_size=[48,32,48]",), ANISOTROPIC])
@pytest.mark.parametrize("weight", [0.1, 0.0])
def test_prediction_is_near_what_torch_keeps(
    name: str, precision: str, overrides: tuple[str, ...], weight: float
) -> None:
    config = small_config(
        name, *overrides, f"precision={precision}", f"detector.segmentation_weight={weight}"
    )
    measured = kept_bytes(config, in_channels=2, num_classes=3)
    memory = memory_of(config, in_channels=2, num_classes=3)
    copies = memory.num_parameters * 2 if precision == "bf16" else 0
    predicted = memory.activations + memory.losses + copies
    tolerance = 0.05 if precision == "fp32" else 0.25  # autocast keeps other copies on a CPU
    assert predicted == pytest.approx(measured, rel=tolerance)


@pytest.mark.parametrize("name", ["defdetr_small", "resenc_defdetr_small"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("detector.head_levels=[1,2,3]", "patch_size=[32,48,32]", "detector.hidden=256",
         "detector.encoder_blocks=2", "detector.queries=60"),
    ],
)  # fmt: skip
def test_prediction_for_deformable_detr_is_near_what_torch_keeps(
    name: str, precision: str, overrides: tuple[str, ...]
) -> None:
    config = small_config(name, *overrides, f"precision={precision}")
    measured = kept_bytes(config, in_channels=2, num_classes=3)
    memory = memory_of(config, in_channels=2, num_classes=3, fused=False)
    copies = memory.num_parameters * 2 if precision == "bf16" else 0
    predicted = memory.activations + memory.losses + copies
    assert predicted == pytest.approx(measured, rel=0.05 if precision == "fp32" else 0.25)


def test_the_fused_kernel_keeps_no_sampled_values() -> None:
    config = small_config("defdetr_small")
    fused, plain = (
        memory_of(config, in_channels=1, num_classes=1, fused=fused) for fused in (True, False)
    )
    tokens, sampled = 12**3 + 6**3, 2 * 4 * 64 * 4  # levels x points x width x bytes
    assert plain.activations - fused.activations > tokens * sampled * config.batch_size
    assert plain.losses == fused.losses


@pytest.mark.parametrize(
    "name",
    [
        "retunet", "resenc_retunet", "resenc_retunet_small", "nndet_v001",
        "defdetr", "resenc_defdetr", "defdetr_small",
    ],
)  # fmt: skip
def test_parameters_are_counted_exactly(name: str) -> None:
    config = load_detect_config(name)
    with torch.device("meta"):
        detector = build_detector(config, in_channels=3, num_classes=2)
    counted = memory_of(config, in_channels=3, num_classes=2).num_parameters
    assert counted == sum(parameter.numel() for parameter in detector.parameters())


def test_memory_grows_with_batch_patch_and_optimizer() -> None:
    encoder = EncoderConfig(
        kind="plain",
        features=(4, 8),
        strides=((1, 1, 1), (2, 2, 2)),
        kernels=((3, 3, 3),) * 2,
        blocks=(2, 2),
        conv_bias=False,
    )
    network = NetworkShape(encoder, head_levels=(1,), channels=16)
    one = training_memory(network, patch_size=(16, 16, 16), batch_size=1)
    two = training_memory(network, patch_size=(16, 16, 16), batch_size=2)
    larger = training_memory(network, patch_size=(32, 32, 32), batch_size=1)
    adam = training_memory(network, patch_size=(16, 16, 16), batch_size=1, optimizer_states=2)
    assert two.activations == 2 * one.activations
    assert larger.activations == 8 * one.activations
    assert adam.weights - one.weights == 4 * one.num_parameters
    assert one.total < two.total < larger.total


def test_info_tells_tokens_and_the_plans_queries() -> None:
    facts = describe_preset("defdetr_small")
    assert (facts["tokens"], facts["queries"]) == (12**3 + 6**3, 24)
    assert "anchors" not in facts
    assert list(facts["parameters"]) == ["total", "encoder", "projection", "transformer"]


def test_info_tells_the_models_figure() -> None:
    config = load_detect_config("retunet_small")
    assert isinstance(config.optim, AdamW)
    total = memory_of(config, in_channels=1, num_classes=1).total
    assert describe_preset("retunet_small")["memory_gib"] == round(total / 2**30, 2)


def test_the_papers_networks_fit_the_cards_they_were_trained_on() -> None:
    memory = [
        memory_of(load_detect_config(name), in_channels=1, num_classes=1).total / 2**30
        for name in ("retunet", "defdetr", "resenc_retunet", "resenc_defdetr")
    ]
    assert 5 < memory[0] < 11
    assert 5 < memory[1] < 11
    assert max(memory[:2]) < min(memory[2:])
    assert max(memory[2:]) < 24


def small_config(name: str, *overrides: str) -> DetectConfig:
    from voxelbridge.core.config import load_config, preset_path

    path = preset_path("voxelbridge.detect", name)
    config = load_config(DetectConfig, path, overrides).config
    assert encoder_config(config).features[0] == 8
    return config
