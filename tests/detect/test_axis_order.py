"""The order of the axes through the whole of Deformable DETR, shown on a patch that is no cube.

Tokens, reference points, offsets, sine encodings and boxes each have an order of their own; a
mix-up of two of them would still train on cubes.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from voxelbridge.detect.batches import DetectionBatch
from voxelbridge.detect.build import build_detector, build_objective, load_detect_config
from voxelbridge.detect.config import DetectConfig
from voxelbridge.detect.deformable_detr import DeformableDETR
from voxelbridge.detect.detections import Targets

SHAPE = (16, 24, 32)
SIZE = (5, 7, 9)  # of the object, voxels
STEPS = 150


def tiny_config() -> DetectConfig:
    return load_detect_config(
        "defdetr_small",
        [
            f"patch_size={list(SHAPE)}",
            "detector.width=32",
            "detector.encoder_blocks=1",
            "detector.decoder_blocks=2",
            "detector.queries=8",
            "detector.head_levels=[1,2]",
        ],
    )


def patch_with_object(start: tuple[int, int, int], noise: np.random.Generator) -> Tensor:
    image = noise.normal(0.0, 0.1, size=(1, *SHAPE)).astype(np.float32)
    z, y, x = start
    image[0, z : z + SIZE[0], y : y + SIZE[1], x : x + SIZE[2]] += 2.0
    return torch.from_numpy(image)


def box_at(start: tuple[int, int, int]) -> Tensor:
    end = [first + size for first, size in zip(start, SIZE, strict=True)]
    return torch.tensor([[*start, *end]], dtype=torch.float32)


def trained() -> DeformableDETR:
    torch.manual_seed(0)
    config = tiny_config()
    detector = build_detector(config, in_channels=1, num_classes=1)
    assert isinstance(detector, DeformableDETR)
    objective = build_objective(detector, config).train()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=2e-3, weight_decay=1e-4)
    rng = np.random.default_rng(0)
    room = [extent - size + 1 for extent, size in zip(SHAPE, SIZE, strict=True)]
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min((step + 1) / 10, 1 - step / STEPS)
        z, y, x = (rng.integers(0, r, size=2) for r in room)
        starts = [(int(z[i]), int(y[i]), int(x[i])) for i in range(2)]
        batch = DetectionBatch(
            torch.stack([patch_with_object(start, rng) for start in starts]),
            tuple(Targets(box_at(start), torch.tensor([0])) for start in starts),
            None,
        )
        losses = objective(batch)
        optimizer.zero_grad()
        losses["total"].backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
    return detector.eval()


@torch.no_grad()
def best_centre(detector: DeformableDETR, start: tuple[int, int, int]) -> Tensor:
    """Centre (3,) of the likeliest box."""
    image = patch_with_object(start, np.random.default_rng(1))
    boxes, probabilities = detector.candidates(image[None])[0]
    best = boxes[probabilities[:, 0].argmax()]
    return (best[:3] + best[3:]) / 2


@pytest.mark.slow
def test_a_moved_object_moves_its_box_along_the_same_axis_only() -> None:
    detector = trained()
    for axis in range(3):
        middle = [(extent - size) // 2 for extent, size in zip(SHAPE, SIZE, strict=True)]
        low, high = list(middle), list(middle)
        low[axis], high[axis] = 1, SHAPE[axis] - SIZE[axis] - 1
        shift = float(high[axis] - low[axis])
        centres = [best_centre(detector, (s[0], s[1], s[2])) for s in (low, high)]
        moved = (centres[1] - centres[0]) / shift
        assert 0.5 < moved[axis] < 1.5
        others = [other for other in range(3) if other != axis]
        assert moved[others].abs().max() < 0.2
