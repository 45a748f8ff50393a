"""What prediction writes beside the table: per case JSON and 3D Slicer markups.

All boxes come in voxel edges (z0, y0, x0, z1, y1, x1) of the original image; world coordinates are
LPS mm.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.data.volume import Grid, boxes_to_world_mm, edges_to_world
from voxelbridge.core.files import write_json

SCHEMA = 1
MARKUPS_SCHEMA = (
    "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/"
    "Resources/Schema/markups-schema-v1.0.3.json#"
)
FloatArray = NDArray[np.float64]


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
