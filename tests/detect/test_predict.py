"""Sliding windows: what one window sees, the whole volume gets, mirrored or not."""

import numpy as np
import pytest
import torch
from torch import Tensor

from voxelbridge.detect.anchors import anchor_grid
from voxelbridge.detect.box_coder import decode, encode
from voxelbridge.detect.build import load_detect_config
from voxelbridge.detect.config import DetectConfig
from voxelbridge.detect.predict import mirrorings, predict_volume

SIZES = (((6.0,), (6.0,), (6.0,)),)


class BrightBoxFinder:
    """A perfect network: it boxes the bright voxels of a patch, whatever the patch is."""

    def candidates(self, patches: Tensor) -> list[tuple[Tensor, Tensor]]:
        shape = [edge // 4 for edge in patches.shape[2:]]
        grid = anchor_grid([shape], [(4, 4, 4)], SIZES)
        anchors = grid.boxes()
        logits = torch.full((len(patches), len(anchors), 1), -20.0)
        deltas = torch.zeros((len(patches), len(anchors), 6))
        for index, patch in enumerate(patches[:, 0]):
            bright = (patch > 0.5).nonzero().float()
            if len(bright) == 0:
                continue
            box = torch.cat([bright.min(dim=0).values, bright.max(dim=0).values + 1])[None]
            middle = (box[:, :3] + box[:, 3:]) / 2
            centers = (anchors[:, :3] + anchors[:, 3:]) / 2
            nearest = (centers - middle).norm(dim=1).argmin()
            deltas[index, nearest] = encode(box, anchors[nearest][None])[0]
            logits[index, nearest] = float(len(bright)) / 50
        boxes = [decode(delta, anchors) for delta in deltas]
        return list(zip(boxes, logits.sigmoid(), strict=True))


@pytest.fixture
def config() -> DetectConfig:
    config = load_detect_config("retunet_small")
    post = config.post_processing.model_copy(update={"min_score": 0.01})
    return config.model_copy(
        update={"patch_size": (16, 16, 16), "batch_size": 3, "post_processing": post}
    )


@pytest.mark.parametrize("shape", [(16, 16, 16), (9, 30, 41), (33, 12, 20)])
@pytest.mark.parametrize("mirrors", [1, 4, 8])
def test_an_object_is_found_at_its_place(
    config: DetectConfig, shape: tuple[int, int, int], mirrors: int
) -> None:
    image = np.zeros((1, *shape), dtype=np.float32)
    box = np.array([2, 5, 7, 6, 9, 12])
    image[0, 2:6, 5:9, 7:12] = 1.0
    network = BrightBoxFinder()
    found = predict_volume(
        [(network, config)],
        image,
        device=torch.device("cpu"),
        num_mirrorings=mirrors,
    )
    np.testing.assert_allclose(found.boxes[0].numpy(), box, atol=1e-4)
    assert found.labels[0] == 0
    assert len(found) == 1 or mirrors == 1


def test_an_empty_volume_gives_no_boxes(config: DetectConfig) -> None:
    image = np.zeros((1, 20, 20, 20), dtype=np.float32)
    found = predict_volume(
        [(BrightBoxFinder(), config)],
        image,
        device=torch.device("cpu"),
    )
    assert found.boxes.shape == (0, 6)


def test_mirrorings_start_with_none_and_are_all_different() -> None:
    assert mirrorings(0) == mirrorings(1) == [()]
    assert mirrorings(4) == [(), (1,), (2,), (1, 2)]
    assert len(set(mirrorings(8))) == 8
