"""Sliding windows: what one window sees, the whole volume gets, mirrored or not."""

import time

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from voxelbridge.core.errors import DataError
from voxelbridge.detect.anchors import anchor_grid
from voxelbridge.detect.box_coder import decode, encode
from voxelbridge.detect.boxes import flip_boxes
from voxelbridge.detect.build import Detector, build_detector, load_detect_config
from voxelbridge.detect.config import DetectConfig, PostProcessing
from voxelbridge.detect.deform_transformer import DeformableAttention
from voxelbridge.detect.deformable_detr import BoxHead, DeformableDETR
from voxelbridge.detect.detections import Detections
from voxelbridge.detect.predict import (
    Proposals,
    detect_in_patches,
    merge_proposals,
    mirrorings,
    predict_volume,
    propose,
)
from voxelbridge.detect.retina_unet import RetinaUNet

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


CPU = torch.device("cpu")
FLIPS = mirrorings(8)


def make_symmetric(detector: Detector) -> None:
    """Changes weights until mirrored images give mirrored boxes, exactly up to rounding."""
    with torch.no_grad():
        for module in detector.modules():
            if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
                kernel = module.weight
                if isinstance(module, nn.Conv3d) and max(module.stride) > 1 and kernel.shape[2] > 1:
                    # Only an even kernel lies centred on the two voxels of a coarse cell.
                    kernel[:, :, 0], kernel[:, :, :, 0], kernel[..., 0] = 0, 0, 0
                    inner = kernel[:, :, 1:, 1:, 1:]
                    inner.copy_(mean_of_flips(inner))
                else:
                    kernel.copy_(mean_of_flips(kernel))
    match detector:
        case RetinaUNet():
            symmetric_retina_head(detector)
        case DeformableDETR():
            symmetric_transformer(detector)


def mean_of_flips(kernel: Tensor) -> Tensor:
    flips = [kernel.flip([2 + axis for axis in axes]) for axes in FLIPS]
    return torch.stack(flips).mean(dim=0)


def symmetric_retina_head(detector: RetinaUNet) -> None:
    with torch.no_grad():
        classes, deltas = detector.head.classifier[-1], detector.head.regressor[-1]
        assert isinstance(classes, nn.Conv3d)
        assert isinstance(deltas, nn.Conv3d)
        classes.weight.copy_(mean_of_flips(torch.randn_like(classes.weight) * 0.1))
        drawn = torch.randn_like(deltas.weight) * 0.1
        kernel = drawn.unflatten(0, (-1, 6))  # (A, 6, C, 3, 3, 3)
        views = []
        for axes in FLIPS:
            view = kernel.flip([3 + axis for axis in axes]).clone()
            for axis in axes:
                view[:, axis] *= -1  # a shift changes its sign in a mirror
            views.append(view)
        deltas.weight.copy_(torch.stack(views).mean(dim=0).flatten(0, 1))


def symmetric_transformer(detector: DeformableDETR) -> None:
    """Attention without directions and queries without places."""
    transformer = detector.transformer
    with torch.no_grad():
        for module in transformer.modules():
            match module:
                case DeformableAttention():
                    module.offsets.bias.zero_()
                case nn.MultiheadAttention():
                    module.in_proj_weight[: 2 * transformer.width] = 0
                case BoxHead():
                    last = module[-1]
                    assert isinstance(last, nn.Linear)
                    last.weight.normal_(std=0.05)
                    last.weight[:3] = 0
                    last.bias[:3] = 0
                    last.bias[3:] = 0.4  # boxes large enough to reach the only slice
                case _:
                    pass
        transformer.query_projection.weight.zero_()


@pytest.fixture(scope="module", params=["retunet_small", "resenc_defdetr_small"])
def symmetric(request) -> tuple[Detector, DetectConfig]:
    config = load_detect_config(request.param, ["patch_size=[16,32,16]"])
    post = PostProcessing(boxes_per_patch=10, boxes_per_case=10)
    torch.manual_seed(3)
    detector = build_detector(config, in_channels=1, num_classes=2, queries=20).eval()
    make_symmetric(detector)
    return detector, config.model_copy(update={"post_processing": post})


def assert_same_boxes(one: Detections, other: Detections) -> None:
    """To 1e-3 voxel, in any order: rounding may swap boxes of nearly equal scores."""
    assert len(one) == len(other) > 0
    distance = (one.boxes[:, None] - other.boxes[None]).abs().amax(dim=2)
    assert distance.amin(dim=0).max() < 1e-3
    assert distance.amin(dim=1).max() < 1e-3
    torch.testing.assert_close(
        one.scores.sort().values, other.scores.sort().values, rtol=0, atol=1e-5
    )


def test_a_symmetric_network_finds_the_same_boxes_in_a_mirrored_patch(symmetric) -> None:
    detector, config = symmetric
    patch = torch.randn(1, 1, *config.patch_size, generator=torch.Generator().manual_seed(1))
    (plain,) = detect_in_patches(detector, patch, config.post_processing)
    for axes in FLIPS[1:]:
        flipped = patch.flip([2 + axis for axis in axes])
        (found,) = detect_in_patches(detector, flipped, config.post_processing)
        back = flip_boxes(found.boxes, config.patch_size, axes=axes)
        assert_same_boxes(plain, Detections(back, found.scores, found.labels))


@pytest.mark.parametrize("shape", [(19, 45, 16), (1, 33, 30)])
def test_all_eight_views_of_a_volume_give_the_same_boxes(symmetric, shape) -> None:
    detector, config = symmetric
    image = np.random.default_rng(2).standard_normal((1, *shape), dtype=np.float32)
    views = propose(detector, config, image, device=CPU, num_mirrorings=8)
    post = config.post_processing
    plain, *others = (merge_proposals([view], shape, post) for view in views)
    assert len(others) == 7
    for other in others:
        assert_same_boxes(plain, other)
    # All pairs agree, so that clustering them changes nothing.
    assert_same_boxes(plain, merge_proposals(views, shape, post))


def test_only_the_best_candidates_are_decoded_and_nothing_else_changes(symmetric) -> None:
    detector, config = symmetric

    class Wrapped:
        candidates = staticmethod(detector.candidates)

    patches = torch.randn(2, 1, *config.patch_size, generator=torch.Generator().manual_seed(4))
    ours = detect_in_patches(detector, patches, config.post_processing)
    plain = detect_in_patches(Wrapped(), patches, config.post_processing)
    for one, other in zip(ours, plain, strict=True):
        assert torch.equal(one.boxes, other.boxes)
        assert torch.equal(one.scores, other.scores)
        assert torch.equal(one.labels, other.labels)


def test_levels_that_no_head_reads_are_not_computed(symmetric) -> None:
    detector, config = symmetric
    if not isinstance(detector, RetinaUNet):
        pytest.skip("has no pyramid")
    ran: list[nn.Module] = []
    fine = range(detector.head_levels[0])
    modules = [detector.segmenter, *(detector.neck.out[level] for level in fine)]
    modules += [detector.neck.lateral[level] for level in fine]
    hooks = [m.register_forward_hook(lambda module, *_: ran.append(module)) for m in modules]
    detect_in_patches(detector, torch.zeros(1, 1, *config.patch_size), config.post_processing)
    for hook in hooks:
        hook.remove()
    assert ran == []


def test_batches_of_windows_and_memory_maps_change_nothing(config, tmp_path) -> None:
    image = np.zeros((1, 40, 20, 33), dtype=np.float32)
    image[0, 5:9, 3:9, 20:26] = image[0, 30:35, 10:15, 2:9] = 1.0
    np.save(tmp_path / "image.npy", image)
    mapped = np.load(tmp_path / "image.npy", mmap_mode="r")
    network = BrightBoxFinder()
    one = predict_volume([(network, config)], image, device=CPU, window_batch=1)
    many = predict_volume([(network, config)], mapped, device=CPU, window_batch=7)
    assert len(one) > 0
    assert torch.equal(one.boxes, many.boxes)
    assert torch.equal(one.scores, many.scores)


class Broken:
    def candidates(self, patches: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(torch.zeros(3, 6), torch.full((3, 1), torch.nan))] * len(patches)


def test_an_output_that_is_not_finite_is_an_error_and_not_an_empty_answer(config) -> None:
    with pytest.raises(DataError, match="not finite"):
        predict_volume([(Broken(), config)], np.zeros((1, 16, 16, 16), np.float32), device=CPU)


def proposals(boxes: list[list[float]], scores: list[float]) -> Proposals:
    labels = torch.arange(len(boxes)) % 2
    found = Detections(boxes=torch.tensor(boxes), scores=torch.tensor(scores), labels=labels)
    return Proposals(found, torch.ones(len(boxes)))


def test_merged_boxes_are_best_first_and_alone_come_out_as_they_went_in() -> None:
    boxes = [[0.1, 0.2, 0.3, 4.1, 5.7, 6.9], [20.3, 2, 3, 24, 25, 26], [40, 4, 4, 47, 7.7, 8]]
    scores = [0.123456789, 0.987654321, 0.5]
    merged = merge_proposals([proposals(boxes, scores)], (60, 60, 60), PostProcessing())
    assert torch.equal(merged.scores, torch.tensor(scores).sort(descending=True).values)
    assert torch.equal(merged.boxes, torch.tensor(boxes)[[1, 2, 0]])


def test_every_pair_of_model_and_mirroring_is_expected_to_find_the_object(config) -> None:
    patches = config.model_copy(update={"patch_size": (24, 16, 32)})
    image = np.zeros((1, 24, 16, 32), dtype=np.float32)
    image[0, 5:9, 3:9, 20:26] = 1.0

    class Blind:
        def candidates(self, patches: Tensor) -> list[tuple[Tensor, Tensor]]:
            return [(torch.zeros(1, 6), torch.zeros(1, 1))] * len(patches)

    seeing = (BrightBoxFinder(), patches)
    alone = predict_volume([seeing], image, device=CPU, num_mirrorings=4)
    half = predict_volume([seeing, (Blind(), config)], image, device=CPU, num_mirrorings=4)
    assert half.scores[0] == pytest.approx(float(alone.scores[0]) / 2, abs=1e-6)


def test_200_000_candidates_merge_in_seconds() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(200_000, 3, generator=generator) * 280
    size = torch.rand(200_000, 3, generator=generator) * 18 + 2
    found = Detections(
        boxes=torch.cat([low, low + size], dim=1),
        scores=torch.rand(200_000, generator=generator),
        labels=torch.randint(0, 4, (200_000,), generator=generator),
    )
    # Also where nothing is cut off before the suppression.
    post = PostProcessing(model_top_k=200_000)
    start = time.process_time()
    merged = merge_proposals([Proposals(found, torch.ones(200_000))] * 2, (300, 300, 300), post)
    assert time.process_time() - start < 10
    assert len(merged) == 100


def test_thresholds_of_both_stages_and_small_sides_apply() -> None:
    boxes = [[0.0, 0, 0, 9, 9, 9], [20.0, 20, 20, 21, 29, 29], [40, 40, 40, 49, 49, 49]]
    found = proposals(boxes, [0.9, 0.8, 0.3])
    shape = (60, 60, 60)
    strict = PostProcessing(model_min_score=0.5, min_size=2.0)
    assert merge_proposals([found], shape, strict).boxes.tolist() == [boxes[0]]
    last = PostProcessing(ensemble_min_score=0.35)
    two = [found, proposals(boxes[:1], [0.9])]
    assert merge_proposals(two, shape, last).boxes.tolist() == [boxes[0], boxes[1]]
