"""What prediction writes beside the table: per case JSON, 3D Slicer markups and an overlay picture.

All boxes come in voxel edges (z0, y0, x0, z1, y1, x1) of the original image; world coordinates are
LPS mm.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.data.volume import Grid, boxes_to_world_mm, edges_to_world
from voxelbridge.core.files import atomic_write, write_json

SCHEMA = 1
MARKUPS_SCHEMA = (
    "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/"
    "Resources/Schema/markups-schema-v1.0.3.json#"
)
OVERLAY_BOXES = 8  # pictures of the highest-scoring boxes; more are not looked at
WINDOW_PERCENTILES = (0.5, 99.5)
WINDOW_SAMPLES = 1 << 22  # voxels that decide the window of grey values
WINDOW_SLICES = 64  # of them, so that a volume in a file is not read whole

FloatArray = NDArray[np.float64]


class Slices(Protocol):
    """An image (D, H, W) whose slices can be had one by one: an array, a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: Any, /) -> Any: ...  # Any: a number -> (H, W)


def write_case_json(
    path: Path,
    case_id: str,
    *,
    grid: Grid,
    boxes: FloatArray,
    scores: FloatArray,
    labels: NDArray[np.int64],
    class_names: Sequence[str],
    source: Mapping[str, Any] | None = None,
) -> None:
    """Boxes of one case in voxel edges and in LPS mm (`box_mm`: centre x, y, z, then widths).

    `source` says which image it was.
    """
    world = boxes_to_world_mm(boxes, grid)
    write_json(
        path,
        {
            "schema": SCHEMA,
            "case_id": case_id,
            **({} if source is None else {"source": dict(source)}),
            "shape": list(grid.shape),
            "spacing_mm": list(grid.spacing_mm),
            "boxes": [
                {
                    "label": int(label),
                    "class": class_names[int(label)],
                    "score": float(score),
                    "box": [float(edge) for edge in box],
                    "box_mm": [float(value) for value in box_mm],
                }
                for box, box_mm, score, label in zip(boxes, world, scores, labels, strict=True)
            ],
        },
    )


def write_slicer_markups(
    path: Path,
    *,
    grid: Grid,
    boxes: FloatArray,
    scores: FloatArray,
    labels: NDArray[np.int64],
    class_names: Sequence[str],
    max_boxes: int = 50,
) -> None:
    """3D Slicer markups with one locked ROI per box, highest scores first.

    At most `max_boxes`, since Slicer becomes unusable with about a thousand ROI nodes.
    """
    order = np.argsort(-scores, kind="stable")[:max_boxes]
    rois = [
        _roi(grid, boxes[row], f"{class_names[int(labels[row])]} {scores[row]:.3f}")
        for row in order
    ]
    write_json(path, {"@schema": MARKUPS_SCHEMA, "markups": rois})


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
    patient's proportions; without a box the middle slice is shown.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    order = np.argsort(-scores, kind="stable")[:OVERLAY_BOXES]
    middles = [(boxes[row, 0] + boxes[row, 3]) / 2 for row in order] or [image.shape[0] / 2]
    columns = min(len(middles), 4)
    rows = -(-len(middles) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    low, high = _window(image)
    aspect = grid.spacing_mm[1] / grid.spacing_mm[2]
    for position, middle in enumerate(middles):
        index = int(np.clip(np.floor(middle), 0, image.shape[0] - 1))
        axes = figure.add_subplot(rows, columns, position + 1)
        slice_ = np.asarray(image[index], dtype=np.float32)
        axes.imshow(slice_, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=aspect)
        axes.set_axis_off()
        for row in order:
            z0, y0, x0, z1, y1, x1 = boxes[row]
            if not z0 <= index + 0.5 <= z1:
                continue
            # imshow puts pixel centres on whole numbers, edges half a pixel before.
            corner = (x0 - 0.5, y0 - 0.5)
            axes.add_patch(Rectangle(corner, x1 - x0, y1 - y0, fill=False, edgecolor="#ffb000"))
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


def _roi(grid: Grid, box: FloatArray, label: str) -> dict[str, Any]:  # Any: a JSON object
    center = edges_to_world((box[:3] + box[3:]) / 2, grid)
    size = (box[3:] - box[:3]) * np.asarray(grid.spacing_mm)
    # Slicer's axes are x, y, z of the box; a rotation is right-handed, and turning an axis round
    # changes no box.
    axes = grid.directions[:, ::-1].copy()
    if np.linalg.det(axes) < 0:
        axes[:, 2] *= -1
    return {
        "type": "ROI",
        "coordinateSystem": "LPS",
        "coordinateUnits": "mm",
        "locked": True,
        "fixedNumberOfControlPoints": False,
        "labelFormat": "%N-%d",
        "lastUsedControlPointNumber": 1,
        "roiType": "Box",
        "center": [float(value) for value in center],
        "orientation": [float(value) for value in axes.reshape(-1)],
        "size": [float(value) for value in size[::-1]],
        "insideOut": False,
        "controlPoints": [
            {
                "id": "1",
                "label": label,
                "description": "",
                "associatedNodeID": "",
                "position": [float(value) for value in center],
                "orientation": [-1.0, -0.0, -0.0, -0.0, -1.0, -0.0, 0.0, 0.0, 1.0],
                "selected": True,
                "locked": True,
                "visibility": True,
                "positionStatus": "defined",
            }
        ],
    }
