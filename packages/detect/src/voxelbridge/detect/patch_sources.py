"""Patches read from a case store: the voxels that a transform needs, and the patch made of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.data.augment import SpatialParams
from voxelbridge.core.data.case_store import CaseStore
from voxelbridge.core.data.foreground import boxes_from_instances
from voxelbridge.core.data.patches import boxes_in_patch
from voxelbridge.detect.patch_objects import CaseObjects, PatchObjects, objects_in_patch

BoxMasks = Literal["none", "ellipsoid"]


@dataclass(frozen=True)
class Sample:
    """One patch: image (C, D, H, W), boxes (N, 6) in its voxel edges, labels, foreground."""

    image: NDArray[np.float32]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    foreground: NDArray[np.bool_] | None


@dataclass(frozen=True, eq=False)
class Source:
    """The stored voxels that a patch needs, and the transform that makes the patch of them."""

    image: NDArray[np.float32]  # (C, *size)
    instances: NDArray[np.int32] | None  # (*size)
    drawn: NDArray[np.bool_] | None  # foreground (*patch_size) made of boxes
    objects: PatchObjects
    params: SpatialParams

    def transformed(self) -> Sample:
        """The patch."""
        image = self.params.apply_image(self.image)
        foreground = self.drawn
        ids, tight = np.zeros(0, dtype=np.int64), np.zeros((0, 6), dtype=np.float32)
        if self.instances is not None:
            instances = self.params.apply_labels(self.instances)
            foreground = instances > 0
            if len(self.objects.uncertain):
                ids, tight = boxes_from_instances(instances)
        boxes, labels = self.objects.boxed(ids, tight)
        return Sample(image=image, boxes=boxes, labels=labels, foreground=foreground)


def read_sample(
    store: CaseStore,
    case_id: str,
    case: CaseObjects,
    start: Sequence[int],
    params: SpatialParams,
    *,
    box_masks: BoxMasks = "none",
) -> Sample:
    """The patch at `start` as `params` shows it, 0 where it leaves the volume.

    Where the case has voxel labels, objects that are rotated or cut by the patch are boxed anew,
    tightly around the voxels that are left; an object without any is dropped. Boxes-only cases keep
    the transformed boxes and get the `foreground` that `box_masks` names.
    """
    return read_source(store, case_id, case, start, params, box_masks=box_masks).transformed()


def read_source(
    store: CaseStore,
    case_id: str,
    case: CaseObjects,
    start: Sequence[int],
    params: SpatialParams,
    *,
    box_masks: BoxMasks = "none",
) -> Source:
    """What `read_sample` makes its patch of."""
    first, size = params.source_box(start)
    whole = params.apply_boxes(case.boxes, start=start)
    instances = drawn = None
    if case.has_instances:
        instances = store.read_instances_patch(case_id, first, size, pad_value=0)
    elif box_masks == "ellipsoid":
        near, _ = boxes_in_patch(whole, (0, 0, 0), params.patch_size)
        drawn = params.draw_ellipsoids(case.boxes, start=start) if len(near) else None
        if drawn is None:
            drawn = np.zeros(params.patch_size, dtype=bool)
    return Source(
        image=store.read_patch(case_id, first, size, pad_value=0.0),
        instances=instances,
        drawn=drawn,
        objects=objects_in_patch(case, whole, params),
        params=params,
    )
