import pytest
import torch

from voxelbridge.detect.detections import Detections
from voxelbridge.detect.postprocess import (
    merge_models,
    merge_tiles,
    select_detections,
    tile_center_weights,
)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("default", {}),
        (
            "strict",
            {"top_k": 150, "score_threshold": 0.2, "nms_iou": 0.1, "max_detections": 20},
        ),
    ],
)
def test_selection_equals_the_reference(boxops, name: str, options: dict) -> None:
    golden = boxops("postprocess")
    found = select_detections(
        golden.boxes("boxes"),
        golden.tensor("probs"),
        shape=golden.tensor("image_shape").tolist(),
        **options,
    )
    torch.testing.assert_close(found.boxes, golden.boxes(f"{name}_boxes"), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.scores, golden.tensor(f"{name}_scores"), rtol=0, atol=1e-6)
    assert torch.equal(found.labels, golden.tensor(f"{name}_labels"))


def test_tied_candidates_at_the_cut_are_taken_in_order() -> None:
    boxes = torch.tensor([[0.0, 0, 0, 1, 1, 1]]) + torch.arange(6.0)[:, None] * 2
    probabilities = torch.tensor([[0.5], [0.5], [0.9], [0.5], [0.5], [0.1]])
    found = select_detections(boxes, probabilities, shape=(20, 20, 20), top_k=3)
    assert found.boxes[:, 0].tolist() == [4, 0, 2]


def test_no_anchor_and_no_score_give_nothing() -> None:
    none = select_detections(torch.zeros((0, 6)), torch.zeros((0, 2)), shape=(4, 4, 4))
    low = select_detections(torch.ones((3, 6)), torch.zeros((3, 2)), shape=(4, 4, 4))
    assert len(none) == len(low) == 0


def test_boxes_outside_the_patch_are_dropped() -> None:
    boxes = torch.tensor([[-5.0, 0, 0, 0, 4, 4], [6.0, 0, 0, 12, 4, 4]])
    found = select_detections(boxes, torch.tensor([[0.9], [0.8]]), shape=(8, 8, 8))
    assert found.boxes.tolist() == [[6, 0, 0, 8, 4, 4]]


def test_tile_weights_equal_the_reference(boxops) -> None:
    golden = boxops("wbc")
    centers = golden.tensor("tile_centers")
    boxes = torch.cat([centers - 1, centers + 1], dim=1)
    weights = tile_center_weights(boxes, golden.tensor("tile_shape").tolist())
    expected = golden.tensor("tile_weight_linear")
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)


def test_merging_tiles_then_models_equals_the_reference(boxops) -> None:
    golden = boxops("wbc")
    kept, kept_weights = [], []
    for model in range(3):
        prefix = f"ens_model{model}"
        found = Detections(
            boxes=golden.boxes(f"{prefix}_boxes"),
            scores=golden.tensor(f"{prefix}_scores"),
            labels=golden.tensor(f"{prefix}_labels").long(),
        )
        merged, weights = merge_tiles(
            found,
            golden.tensor(f"{prefix}_weights"),
            shape=golden.tensor("ens_shape").tolist(),
        )
        expected = golden.boxes(f"{prefix}_kept_boxes")
        torch.testing.assert_close(merged.boxes, expected, rtol=0, atol=1e-5)
        assert torch.equal(merged.scores, golden.tensor(f"{prefix}_kept_scores"))
        assert torch.equal(merged.labels.float(), golden.tensor(f"{prefix}_kept_labels"))
        assert torch.equal(weights, golden.tensor(f"{prefix}_kept_weights"))
        kept.append(merged)
        kept_weights.append(weights)
    result = merge_models(kept, kept_weights)
    torch.testing.assert_close(result.boxes, golden.boxes("ens_out_boxes"), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(result.scores, golden.tensor("ens_out_scores"), rtol=0, atol=1e-6)
    assert torch.equal(result.labels.float(), golden.tensor("ens_out_labels"))


def test_plain_suppression_ranks_by_score_and_keeps_the_weights() -> None:
    boxes = torch.tensor([[0.0, 0, 0, 4, 4, 4], [0.0, 0, 0, 4, 4, 5]])
    found = Detections(
        boxes=boxes, scores=torch.tensor([0.8, 0.7]), labels=torch.zeros(2, dtype=torch.int64)
    )
    weights = torch.tensor([0.5, 1.0])
    plain, plain_weights = merge_tiles(found, weights, shape=(9, 9, 9), suppression="plain")
    weighted, weighted_weights = merge_tiles(found, weights, shape=(9, 9, 9))
    assert (plain.scores.tolist(), plain_weights.tolist()) == (
        [pytest.approx(0.8)],
        [0.5],
    )
    assert (weighted.scores.tolist(), weighted_weights.tolist()) == ([pytest.approx(0.7)], [1.0])


def test_models_that_found_nothing_pull_the_score_down() -> None:
    one = Detections(
        boxes=torch.tensor([[0.0, 0, 0, 4, 4, 4]]),
        scores=torch.tensor([0.8]),
        labels=torch.tensor([0]),
    )
    merged = merge_models([one, Detections.empty()], [torch.ones(1), torch.zeros(0)])
    assert merged.scores.tolist() == pytest.approx([0.4])
    with pytest.raises(ValueError, match="at least one"):
        merge_models([], [])
