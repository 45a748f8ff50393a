"""What a detector returns and what it is trained on: boxes with labels, checked at construction."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Detections:
    """Scored boxes of one image or patch, on one device, in any order.

    boxes (N, 6) float32 voxel edges (z0, y0, x0, z1, y1, x1), finite, end >= start: a box cut at
    the border may be flat; scores (N,) float32, finite, higher is more certain; labels (N,) int64,
    0-based foreground classes. Anything else is a ValueError.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        _check_boxes_and_labels(self.boxes, self.labels)
        _check(
            self.scores.shape == self.labels.shape and self.scores.dtype == torch.float32,
            f"scores: got {_describe(self.scores)}, expected ({len(self.boxes)},) float32",
        )
        _check(self.scores.device == self.boxes.device, "scores and boxes are on two devices")
        _check(
            bool(self.scores.isfinite().all() & (self.boxes[:, 3:] >= self.boxes[:, :3]).all()),
            "scores must be finite and boxes must not be inverted",
        )

    def __len__(self) -> int:
        return len(self.boxes)

    @classmethod
    def empty(cls, device: torch.device | str = "cpu") -> Self:
        """No detection: shapes (0, 6), (0,), (0,)."""
        boxes, labels = _no_boxes(device)
        return cls(boxes=boxes, scores=boxes.new_zeros(0), labels=labels)

    def to(self, device: torch.device | str) -> Self:
        """The same detections on `device`."""
        return type(self)(
            boxes=self.boxes.to(device),
            scores=self.scores.to(device),
            labels=self.labels.to(device),
        )

    def select(self, index: Tensor) -> Self:
        """The rows of an index or of a boolean mask, in the index's order."""
        return type(self)(
            boxes=self.boxes[index], scores=self.scores[index], labels=self.labels[index]
        )


@dataclass(frozen=True, eq=False)
class Targets:
    """Annotated objects of one image or patch.

    boxes (N, 6) float32 voxel edges (z0, y0, x0, z1, y1, x1), finite, every side longer than 0
    (a regression target has a logarithm of the size); labels (N,) int64, 0-based foreground
    classes. Anything else is a ValueError.
    """

    boxes: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        _check_boxes_and_labels(self.boxes, self.labels)
        _check(
            bool((self.boxes[:, 3:] > self.boxes[:, :3]).all()),
            "boxes of targets need end > start on every axis",
        )

    def __len__(self) -> int:
        return len(self.boxes)

    @classmethod
    def empty(cls, device: torch.device | str = "cpu") -> Self:
        """No object: shapes (0, 6), (0,)."""
        boxes, labels = _no_boxes(device)
        return cls(boxes=boxes, labels=labels)

    def to(self, device: torch.device | str) -> Self:
        """The same targets on `device`."""
        return type(self)(boxes=self.boxes.to(device), labels=self.labels.to(device))


def _check_boxes_and_labels(boxes: Tensor, labels: Tensor) -> None:
    _check(
        boxes.ndim == 2 and boxes.shape[1] == 6 and boxes.dtype == torch.float32,
        f"boxes: got {_describe(boxes)}, expected (N, 6) float32",
    )
    _check(
        labels.shape == boxes.shape[:1] and labels.dtype == torch.int64,
        f"labels: got {_describe(labels)}, expected ({len(boxes)},) int64",
    )
    _check(labels.device == boxes.device, "labels and boxes are on two devices")
    # One question to the device instead of two: each waits for the GPU.
    _check(
        bool(boxes.isfinite().all() & (labels >= 0).all()),
        "boxes must be finite and labels must be 0 or more",
    )


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _no_boxes(device: torch.device | str) -> tuple[Tensor, Tensor]:
    boxes = torch.zeros((0, 6), dtype=torch.float32, device=device)
    return boxes, torch.zeros(0, dtype=torch.int64, device=device)
