"""What a preset costs before anything is trained: parameters, operations, anchors, memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from voxelbridge.core.train.optim import AdamW
from voxelbridge.detect.build import build_detector, load_detect_config

GIB = 2**30


def describe_preset(
    preset: str, *, in_channels: int = 1, num_classes: int = 1
) -> dict[str, Any]:  # Any: JSON values
    """Facts of a preset as the JSON object of `vb-detect info --json`.

    `gflop` (2 x multiply-adds) is one forward pass of one patch with the segmentation branch.
    `memory_gib` estimates a training step of the whole batch on one device: weights, gradients,
    optimizer and what the backward pass keeps; workspace of the kernels is not in it.
    """
    config = load_detect_config(preset)
    with torch.device("meta"):
        detector = build_detector(config, in_channels=in_channels, num_classes=num_classes)
        image = torch.empty(1, in_channels, *config.patch_size)
    with FlopCounterMode(display=False) as counter, _kept_tensors() as kept:
        output = detector(image, segment=True)
    counts = {name: _count(module) for name, module in detector.named_children()}
    total = _count(detector)
    states = 2 if isinstance(config.optim, AdamW) else 1
    bytes_per_value = 2 if config.precision == "bf16" else 4
    activations = kept.values * bytes_per_value * config.batch_size
    return {
        "preset": preset,
        "patch_size": list(config.patch_size),
        "batch_size": config.batch_size,
        "parameters": {"total": total, **counts},
        "gflop": round(counter.get_total_flops() / 1e9, 1),
        "anchors": output.anchors.num_anchors,
        "memory_gib": round((total * 4 * (2 + states) + activations) / GIB, 2),
    }


@dataclass
class _Kept:
    values: int = 0
    storages: set[int] = field(default_factory=set)


@contextmanager
def _kept_tensors() -> Iterator[_Kept]:
    """Counts the values that autograd keeps for the backward pass, each storage once."""
    kept = _Kept()
    alive: list[Tensor] = []  # so that no storage's address is used twice

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage()._cdata
        if not isinstance(tensor, nn.Parameter) and address not in kept.storages:
            kept.storages.add(address)
            kept.values += tensor.untyped_storage().nbytes() // tensor.element_size()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
