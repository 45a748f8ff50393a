"""The picture of a predicted case: slices through its best boxes, as radiologists hang them.

Slices lie across the first axis of the file, the one in which few voxels have to be read. In the
plane the head or the front is up and the patient's left is on the right, whatever order the file
stores its voxels in.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.data.volume import Grid, reorientation_to_lps
from voxelbridge.core.files import atomic_write

OVERLAY_BOXES = 8  # pictures of the highest-scoring boxes; more are not looked at
WINDOW_PERCENTILES = (0.5, 99.5)
WINDOW_SAMPLES = 1 << 22  # voxels that decide the window of grey values
WINDOW_SLICES = 64  # of them, so that a volume in a file is not read whole
BOX_COLOR = "#ffb000"

FloatArray = NDArray[np.float64]


class Slices(Protocol):
    """An image (D, H, W) whose slices can be had one by one: an array, a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: Any, /) -> Any: ...  # Any: a number -> (H, W)


@dataclass(frozen=True)
class Hanging:
    """How a slice (H, W) across the first axis of a grid is turned to be looked at."""

    transposed: bool  # the file's last axis runs down the picture
    flipped: tuple[bool, bool]  # rows, columns of the picture
    spacing_mm: tuple[float, float]  # of rows and columns
    shape: tuple[int, int]

    @classmethod
    def of(cls, grid: Grid) -> "Hanging":
        """The hanging that `grid` needs: z before y runs down the picture, x or y across."""
        order = reorientation_to_lps(grid)
        world = {axis: place for place, axis in enumerate(order.permutation)}  # 0 = z, 1 = y, 2 = x
        rows, columns = sorted((1, 2), key=lambda axis: world[axis])

        def flipped(axis: int) -> bool:
            grows_up = world[axis] == 0  # z grows towards the head, which is up
            return order.flips[world[axis]] != grows_up

        return cls(
            transposed=rows == 2,
            flipped=(flipped(rows), flipped(columns)),
            spacing_mm=(grid.spacing_mm[rows], grid.spacing_mm[columns]),
            shape=(grid.shape[rows], grid.shape[columns]),
        )

    def picture(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """The slice (H, W) as rows and columns of the picture."""
        turned = pixels.T if self.transposed else pixels
        return turned[:: -1 if self.flipped[0] else 1, :: -1 if self.flipped[1] else 1]

    def rectangle(self, box: FloatArray) -> tuple[float, float, float, float]:
        """Top, left, bottom, right edge of a box (6,) in the picture."""
        spans = [(box[1], box[4]), (box[2], box[5])]
        if self.transposed:
            spans.reverse()
        (top, bottom), (left, right) = (
            (size - high, size - low) if flip else (low, high)
            for (low, high), flip, size in zip(spans, self.flipped, self.shape, strict=True)
        )
        return float(top), float(left), float(bottom), float(right)


def write_overlay(
    path: Path,
    image: Slices,
    *,
    grid: Grid,
    boxes: FloatArray,
    scores: FloatArray,
    labels: NDArray[np.int64],
    class_names: Sequence[str],
) -> None:
    """PNG of the slices (first array axis) through the middle of the highest-scoring boxes.

    `image` (D, H, W) of any type; only some slices of a large one are read. Pixels keep the
    patient's proportions; without a box the middle slice is shown. The box that a slice was chosen
    for is drawn thicker than the others in it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    order = np.argsort(-scores, kind="stable")[:OVERLAY_BOXES]
    middles = [(boxes[row, 0] + boxes[row, 3]) / 2 for row in order] or [image.shape[0] / 2]
    columns = min(len(middles), 4)
    rows = -(-len(middles) // columns)
    hanging = Hanging.of(grid)
    height, width = (n * mm for n, mm in zip(hanging.shape, hanging.spacing_mm, strict=True))
    tall = float(np.clip(height / width, 0.3, 3.0))
    figure = Figure(figsize=(3.2 * columns, (3.2 * tall + 0.3) * rows), layout="constrained")
    FigureCanvasAgg(figure)
    low, high = _window(image)
    aspect = hanging.spacing_mm[0] / hanging.spacing_mm[1]
    for position, middle in enumerate(middles):
        index = int(np.clip(np.floor(middle), 0, image.shape[0] - 1))
        axes = figure.add_subplot(rows, columns, position + 1)
        pixels = hanging.picture(np.asarray(image[index], dtype=np.float32))
        axes.imshow(pixels, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=aspect)
        axes.set_axis_off()
        for place, row in enumerate(order):
            if not boxes[row, 0] <= index + 0.5 <= boxes[row, 3]:
                continue
            top, left, bottom, right = hanging.rectangle(boxes[row])
            # imshow puts pixel centres on whole numbers, edges half a pixel before.
            axes.add_patch(
                Rectangle(
                    (left - 0.5, top - 0.5), right - left, bottom - top, fill=False,
                    edgecolor=BOX_COLOR, linewidth=2.0 if place == position else 0.7,
                )
            )  # fmt: skip
        title = "no box"
        if len(order):
            row = order[position]
            title = f"{class_names[int(labels[row])]} {scores[row]:.2f}"
        axes.set_title(f"slice {index}: {title}", fontsize=8)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


def _window(image: Slices) -> tuple[float, float]:
    """The grey values between which the picture is drawn, from evenly spaced voxels."""
    depth, height, width = image.shape
    step = max(1, depth // WINDOW_SLICES)
    numbers = range(step // 2, depth, step)
    every = max(1, round((len(numbers) * height * width / WINDOW_SAMPLES) ** 0.5))
    sample = np.stack([np.asarray(image[n])[::every, ::every] for n in numbers])
    low, high = np.percentile(sample.astype(np.float32), WINDOW_PERCENTILES)
    return float(low), float(high)
