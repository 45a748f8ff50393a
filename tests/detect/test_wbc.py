import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from voxelbridge.detect.boxes import box_iou, box_volume
from voxelbridge.detect.detections import Detections
from voxelbridge.detect.wbc import weighted_box_clustering

THRESHOLDS = {"1em05": 1e-5, "0_1": 0.1, "0_3": 0.3, "0_5": 0.5}


def plain_clustering(
    found: Detections, weights: Tensor, expected: Tensor, threshold: float, by_volume: bool
) -> list[tuple[int, float, list[float]]]:
    """Clusters (label, score, box) by the definition, one at a time."""
    clusters = []
    for label in sorted(set(found.labels.tolist())):
        rows = [i for i in range(len(found)) if int(found.labels[i]) == label]
        rows = sorted(rows, key=lambda i: (-float(found.scores[i]), i))
        while rows:
            iou = box_iou(found.boxes[rows[:1]], found.boxes[rows])[0]  # compared in float32
            cluster = [(row, v.item()) for row, v in zip(rows, iou, strict=True) if v > threshold]
            best, inside = rows[0], {row for row, _ in cluster}
            rows = [row for row in rows if row not in inside and row != best]
            if not cluster:
                continue
            volume = box_volume(found.boxes).tolist()
            mass = [v * float(weights[r]) * (volume[r] if by_volume else 1) for r, v in cluster]
            scored = [m * float(found.scores[r]) for m, (r, _) in zip(mass, cluster, strict=True)]
            missing = sum(float(expected[r]) for r, _ in cluster) / len(cluster) - len(cluster)
            score = sum(scored) / (sum(mass) + max(0, missing) * sum(mass) / len(cluster))
            if score > 0:
                members = found.boxes[[row for row, _ in cluster]].double()
                box = (members.T @ torch.tensor(scored).double() / sum(scored)).tolist()
                clusters.append((label, score, box))
    return clusters


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(0, 25),
    seed=st.integers(0, 10_000),
    threshold=st.sampled_from([0.0, 0.1, 0.5]),
    by_volume=st.booleans(),
)
def test_clustering_equals_the_plain_loop(
    count: int, seed: int, threshold: float, by_volume: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    low = torch.randint(0, 8, (count, 3), generator=generator).float()
    size = torch.randint(0, 6, (count, 3), generator=generator).float()  # some are flat
    found = Detections(
        boxes=torch.cat([low, low + size], 1),
        scores=torch.randint(0, 9, (count,), generator=generator).float() / 8,
        labels=torch.randint(0, 2, (count,), generator=generator),
    )
    weights = torch.rand(count, generator=generator) + 0.1
    expected = torch.randint(1, 5, (count,), generator=generator).float()
    result = weighted_box_clustering(
        found, weights, iou_threshold=threshold, expected=expected, weigh_by_volume=by_volume
    )
    plain = plain_clustering(found, weights, expected, threshold, by_volume)
    assert result.labels.tolist() == [label for label, _, _ in plain]
    assert result.scores.tolist() == pytest.approx([score for _, score, _ in plain], abs=1e-5)
    boxes = torch.tensor([box for _, _, box in plain]).reshape(-1, 6)
    torch.testing.assert_close(result.boxes, boxes, rtol=1e-5, atol=1e-5)


def test_clustering_over_several_blocks_equals_the_plain_loop() -> None:
    generator = torch.Generator().manual_seed(5)
    low = torch.randint(0, 22, (280, 3), generator=generator).float()
    size = torch.randint(0, 9, (280, 3), generator=generator).float()
    found = Detections(
        boxes=torch.cat([low, low + size], 1),
        scores=torch.randint(1, 40, (280,), generator=generator).float() / 40,
        labels=torch.zeros(280, dtype=torch.int64),
    )
    ones = torch.ones(280)
    result = weighted_box_clustering(found, ones, iou_threshold=0.2, expected=4 * ones)
    plain = plain_clustering(found, ones, 4 * ones, 0.2, by_volume=False)
    assert len(plain) > 128
    assert result.scores.tolist() == pytest.approx([score for _, score, _ in plain], abs=1e-5)
    boxes = torch.tensor([box for _, _, box in plain])
    torch.testing.assert_close(result.boxes, boxes, rtol=1e-5, atol=1e-5)


def test_two_boxes_of_eight_expected_give_the_measured_value() -> None:
    found = Detections(
        boxes=torch.tensor([[0.0, 0, 0, 10, 10, 10], [1.0, 0, 0, 11, 10, 10]]),
        scores=torch.tensor([0.8, 0.6]),
        labels=torch.tensor([0, 0]),
    )
    merged = weighted_box_clustering(
        found, torch.ones(2), iou_threshold=0.1, expected=torch.full((2,), 8.0)
    )
    assert merged.scores.tolist() == pytest.approx([0.1775], abs=1e-4)
    assert merged.boxes[0].tolist() == pytest.approx([0.3803, 0, 0, 10.3803, 10, 10], abs=1e-4)


def test_nothing_and_flat_boxes_give_nothing() -> None:
    assert (
        len(
            weighted_box_clustering(
                Detections.empty(), torch.zeros(0), iou_threshold=0.5, expected=torch.zeros(0)
            )
        )
        == 0
    )
    flat = Detections(
        boxes=torch.tensor([[1.0, 1, 1, 4, 4, 1]]),
        scores=torch.tensor([0.9]),
        labels=torch.tensor([3]),
    )
    merged = weighted_box_clustering(flat, torch.ones(1), iou_threshold=0.0, expected=torch.ones(1))
    assert len(merged) == 0


def test_a_negative_score_threshold_is_refused() -> None:
    with pytest.raises(ValueError, match="score_threshold"):
        weighted_box_clustering(
            Detections.empty(),
            torch.zeros(0),
            iou_threshold=0.5,
            expected=torch.zeros(0),
            score_threshold=-1.0,
        )


def reference_input(boxops, prefix: str, *, classes: bool) -> tuple[Detections, Tensor]:
    golden = boxops("wbc")
    labels = golden.tensor(f"{prefix}_labels").long()
    found = Detections(
        boxes=golden.boxes(f"{prefix}_boxes"),
        scores=golden.tensor(f"{prefix}_scores"),
        labels=labels if classes else torch.zeros_like(labels),
    )
    return found, golden.tensor(f"{prefix}_weights")


@pytest.mark.parametrize("prefix", ["w0", "w1", "w2"])
@pytest.mark.parametrize("name", THRESHOLDS)
def test_clustering_equals_the_reference(boxops, prefix: str, name: str) -> None:
    golden = boxops("wbc")
    found, weights = reference_input(boxops, prefix, classes=False)
    merged = weighted_box_clustering(
        found,
        weights,
        iou_threshold=THRESHOLDS[name],
        expected=golden.tensor(f"{prefix}_expected"),
    )
    assert_equal(merged, golden, f"{prefix}_out", name)
    found, weights = reference_input(boxops, prefix, classes=True)
    merged = weighted_box_clustering(
        found,
        weights,
        iou_threshold=THRESHOLDS[name],
        expected=golden.tensor(f"{prefix}_expected_varied"),
        score_threshold=0.1,
    )
    assert_equal(merged, golden, f"{prefix}_cls", name)
    labels = golden.tensor(f"{prefix}_cls_labels_iou_{name}")
    assert merged.labels.tolist() == labels.tolist()


@pytest.mark.parametrize("prefix", ["w0", "w1", "w2"])
def test_volume_and_missing_weights_equal_the_reference(boxops, prefix: str) -> None:
    golden = boxops("wbc")
    found, weights = reference_input(boxops, prefix, classes=False)
    by_volume = weighted_box_clustering(
        found,
        weights,
        iou_threshold=0.3,
        expected=golden.tensor(f"{prefix}_expected"),
        weigh_by_volume=True,
    )
    assert_equal(by_volume, golden, f"{prefix}_area", "0_3")
    lenient = weighted_box_clustering(
        found,
        weights,
        iou_threshold=0.3,
        expected=golden.tensor(f"{prefix}_expected_varied"),
        missing_weight=0.0,
    )
    assert_equal(lenient, golden, f"{prefix}_nomissing", "0_3")


def assert_equal(merged: Detections, golden, prefix: str, name: str) -> None:
    boxes = golden.boxes(f"{prefix}_boxes_iou_{name}")
    scores = golden.tensor(f"{prefix}_scores_iou_{name}")
    torch.testing.assert_close(merged.boxes, boxes, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(merged.scores, scores, rtol=1e-5, atol=1e-6)
