"""What a preset costs before anything is trained: parameters, operations, anchors, memory."""

from collections.abc import Sequence
from typing import Any, assert_never

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from voxelbridge.core.train.optim import AdamW
from voxelbridge.detect.build import DEFAULT_QUERIES, Detector, build_detector, load_detect_config
from voxelbridge.detect.config import (
    DeformableDETRConfig,
    DetectConfig,
    RetinaUNetConfig,
    encoder_config,
)
from voxelbridge.detect.memory_model import NetworkShape, StepMemory, training_memory
from voxelbridge.detect.memory_model_detr import DETRShape, detr_memory
from voxelbridge.detect.plan import Plan
from voxelbridge.detect.retina_unet import RetinaUNet

GIB = 2**30


def describe_preset(
    preset: str,
    *,
    in_channels: int = 1,
    num_classes: int = 1,
    plan: Plan | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:  # Any: JSON values
    """Facts of a preset as the JSON object of `vb-detect info --json`.

    `gflop` (2 x multiply-adds) is one forward pass of one patch as in training, without the
    sampling of deformable attention. `memory_gib` is the memory model's figure for a training step
    of the whole batch on one device, with the fused attention kernel. Anchor detectors have
    `anchors` per patch, transformers `tokens` and `queries`.
    `plan` is that of a store, for presets whose architecture is "plan" and for the queries.
    """
    config = load_detect_config(preset, overrides, plan=plan)
    queries = plan.num_queries if plan else None
    with torch.device("meta"):
        detector = build_detector(
            config, in_channels=in_channels, num_classes=num_classes, queries=queries
        )
        image = torch.empty(1, in_channels, *config.patch_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        sizes = _forward(detector, image)
    memory = memory_of(config, in_channels=in_channels, num_classes=num_classes, queries=queries)
    return {
        "preset": preset,
        "patch_size": list(config.patch_size),
        "batch_size": config.batch_size,
        "parameters": {
            "total": _count(detector),
            **{name: _count(module) for name, module in detector.named_children()},
        },
        "gflop": round(counter.get_total_flops() / 1e9, 1),
        **sizes,
        "memory_gib": round(memory.total / GIB, 2),
    }


def memory_of(
    config: DetectConfig,
    *,
    in_channels: int,
    num_classes: int,
    queries: int | None = None,
    fused: bool = True,
) -> StepMemory:
    """The memory of a training step of a config; `queries` and `fused` matter to transformers."""
    batch_size = config.batch_size // config.accumulation_steps or 1
    states = 2 + config.optim.amsgrad if isinstance(config.optim, AdamW) else 1
    match config.detector:
        case RetinaUNetConfig() as detector:
            return training_memory(
                NetworkShape(
                    encoder_config(config),
                    detector.head_levels,
                    in_channels=in_channels,
                    num_classes=num_classes,
                    channels=detector.channels,
                    anchors_per_cell=detector.sizes_per_axis**3,
                    upsample_bias=detector.upsample_bias,
                ),
                patch_size=config.patch_size,
                batch_size=batch_size,
                precision=config.precision,
                segment=detector.segmentation_weight > 0,
                optimizer_states=states,
            )
        case DeformableDETRConfig() as detector:
            return detr_memory(
                DETRShape(
                    encoder_config(config),
                    detector.head_levels,
                    in_channels=in_channels,
                    num_classes=num_classes,
                    width=detector.width,
                    heads=detector.heads,
                    points=detector.points,
                    encoder_blocks=detector.encoder_blocks,
                    decoder_blocks=detector.decoder_blocks,
                    hidden=detector.hidden,
                    queries=detector.queries or queries or DEFAULT_QUERIES,
                ),
                patch_size=config.patch_size,
                batch_size=batch_size,
                precision=config.precision,
                optimizer_states=states,
                fused=fused,
            )
        case _:
            assert_never(config.detector)


def _forward(detector: Detector, image: Tensor) -> dict[str, int]:
    """One pass as in training; what there is of anchors, or of tokens and queries."""
    if isinstance(detector, RetinaUNet):
        return {"anchors": detector(image, segment=True).anchors.num_anchors}
    output = detector(image)
    return {"tokens": len(output.valid), "queries": output.blocks[-1].logits.shape[1]}


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
