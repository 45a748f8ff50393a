import dataclasses

import pytest
import torch

from voxelbridge.detect.detections import Detections, Targets

BOXES = torch.tensor([[0.0, 0, 0, 2, 3, 4], [1.0, 1, 1, 2, 2, 2]])
SCORES = torch.tensor([0.5, 0.9])
LABELS = torch.tensor([0, 1])


def test_empty_results_have_the_documented_shapes() -> None:
    detections, targets = Detections.empty(), Targets.empty()
    assert [tuple(t.shape) for t in (detections.boxes, detections.scores, detections.labels)] == [
        (0, 6),
        (0,),
        (0,),
    ]
    assert (targets.boxes.shape, targets.labels.shape) == ((0, 6), (0,))
    assert len(detections) == len(targets) == 0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("boxes", BOXES.double(), "expected \\(N, 6\\) float32"),
        ("boxes", BOXES[:, :4], "expected \\(N, 6\\) float32"),
        ("boxes", BOXES[:1], "labels: got"),
        ("boxes", BOXES.new_full((2, 6), torch.nan), "finite"),
        ("boxes", BOXES[:, [3, 4, 5, 0, 1, 2]], "inverted"),
        ("labels", LABELS.int(), "expected \\(2,\\) int64"),
        ("labels", LABELS - 1, "0 or more"),
        ("scores", SCORES.double(), "expected \\(2,\\) float32"),
        ("scores", SCORES[:1], "expected \\(2,\\) float32"),
        ("scores", torch.tensor([0.5, torch.nan]), "finite"),
    ],
)
def test_detections_refuse_wrong_fields(field: str, value: torch.Tensor, message: str) -> None:
    good = Detections(boxes=BOXES, scores=SCORES, labels=LABELS)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(good, **{field: value})


def test_flat_boxes_are_detections_but_no_targets() -> None:
    flat = torch.tensor([[0.0, 0, 0, 2, 3, 0], [1.0, 1, 1, 2, 2, 2]])
    assert len(Detections(boxes=flat, scores=SCORES, labels=LABELS)) == 2
    with pytest.raises(ValueError, match="end > start"):
        Targets(boxes=flat, labels=LABELS)


def test_select_takes_rows_in_the_given_order() -> None:
    detections = Detections(boxes=BOXES, scores=SCORES, labels=LABELS)
    assert detections.select(torch.tensor([1, 0])).labels.tolist() == [1, 0]
    assert detections.select(SCORES > 0.6).scores.tolist() == SCORES[1:].tolist()


def test_to_keeps_the_content() -> None:
    moved = Targets(boxes=BOXES, labels=LABELS).to("cpu")
    assert torch.equal(moved.boxes, BOXES)
    assert len(Detections(boxes=BOXES, scores=SCORES, labels=LABELS).to("cpu")) == 2
