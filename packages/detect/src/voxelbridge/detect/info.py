"""What a preset costs before anything is trained: parameters, operations, anchors, memory."""

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from voxelbridge.core.train.optim import AdamW
from voxelbridge.detect.build import build_detector, load_detect_config
from voxelbridge.detect.config import DetectConfig, encoder_config
from voxelbridge.detect.memory_model import NetworkShape, StepMemory, training_memory
from voxelbridge.detect.plan import Plan

GIB = 2**30


def describe_preset(
    preset: str, *, in_channels: int = 1, num_classes: int = 1, plan: Plan | None = None
) -> dict[str, Any]:  # Any: JSON values
    """Facts of a preset as the JSON object of `vb-detect info --json`.

    `gflop` (2 x multiply-adds) is one forward pass of one patch with the segmentation branch.
    `memory_gib` is the memory model's figure for a training step of the whole batch on one device.
    `plan` is that of a store, for presets whose architecture is "plan".
    """
    config = load_detect_config(preset, plan=plan)
    with torch.device("meta"):
        detector = build_detector(config, in_channels=in_channels, num_classes=num_classes)
        image = torch.empty(1, in_channels, *config.patch_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        output = detector(image, segment=True)
    memory = memory_of(config, in_channels=in_channels, num_classes=num_classes)
    return {
        "preset": preset,
        "patch_size": list(config.patch_size),
        "batch_size": config.batch_size,
        "parameters": {
            "total": _count(detector),
            **{name: _count(module) for name, module in detector.named_children()},
        },
        "gflop": round(counter.get_total_flops() / 1e9, 1),
        "anchors": output.anchors.num_anchors,
        "memory_gib": round(memory.total / GIB, 2),
    }


def memory_of(config: DetectConfig, *, in_channels: int, num_classes: int) -> StepMemory:
    """The memory of a training step of a config."""
    detector = config.detector
    return training_memory(
        NetworkShape(
            encoder_config(config),
            detector.head_levels,
            in_channels=in_channels,
            num_classes=num_classes,
            channels=detector.channels,
            anchors_per_cell=detector.sizes_per_axis**3,
        ),
        patch_size=config.patch_size,
        batch_size=config.batch_size // config.accumulation_steps or 1,
        precision=config.precision,
        segment=detector.segmentation_weight > 0,
        optimizer_states=2 if isinstance(config.optim, AdamW) else 1,
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
