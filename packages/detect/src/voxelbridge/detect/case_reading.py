"""From an image on disk to what the network sees, in files beside the predictions.

One channel is in memory at a time, in the type that the file has; the resampled image and what is
half resampled lie in scratch files (scratch.py). Windows are read from there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.data.foreground import nonzero_box
from voxelbridge.core.data.image_cases import ImageCase
from voxelbridge.core.data.mapping import StoredToOriginal
from voxelbridge.core.data.preprocess import at_spacing, preprocess_channel
from voxelbridge.core.data.volume import Grid, reorientation_to_lps
from voxelbridge.detect.plan import Plan
from voxelbridge.detect.scratch import FileWorkspace, ScratchFile, scratch_prefix


@dataclass(frozen=True, eq=False)
class ReadCase:
    """A case ready for the network: scratch files of the image (C, D, H, W) and of the picture.

    `picture` holds the first channel (D, H, W) as the file has it, where it was asked for.
    """

    mapping: StoredToOriginal
    image: ScratchFile
    picture: ScratchFile | None


def read_case(plan: Plan, folder: Path, case: ImageCase, *, picture: bool = True) -> ReadCase:
    """Reads, crops, resamples and normalises `case` as training does; files go to `folder`.

    Raises DataError, which need not name the case.
    """
    workspace = FileWorkspace(folder, scratch_prefix(case.case_id))
    num_channels = len(plan.channel_names)
    files: list[ScratchFile] = []
    boxes: list[NDArray[np.int64]] = []
    grid: Grid | None = None
    only: NDArray[Any] | None = None  # a single channel stays in memory
    for number, channel in enumerate(case.channels()):
        grid, array = channel.grid, channel.array[0]
        boxes += _nonzero(array, grid)
        if num_channels > 1 or picture:
            files.append(workspace.copy_of(f"channel{number}", array))
        only = array if num_channels == 1 else None
        del channel, array
    assert grid is not None, "a case has a channel"
    mapping = StoredToOriginal.build(grid, crop_box=_union(boxes))
    mapping = at_spacing(mapping, plan.spacing_mm)
    file, image = workspace.named("image", (num_channels, *mapping.stored_shape))
    for number, scheme in enumerate(plan.normalization):
        array = _array_of(files[number]) if only is None else only
        preprocess_channel(
            array, image[number], mapping,
            spacing_mm=plan.spacing_mm, normalization=scheme,
            resampling=plan.resampling, workspace=workspace,
        )  # fmt: skip
        del array
    for other in files[1:] if picture else files:
        other.path.unlink()
    return ReadCase(mapping, file, files[0] if picture else None)


def _array_of(file: ScratchFile) -> NDArray[Any]:
    return np.fromfile(file.path, file.dtype).reshape(file.shape)


def _nonzero(array: NDArray[Any], grid: Grid) -> list[NDArray[np.int64]]:
    """The box of voxels other than 0 in LPS order, or none."""
    box = nonzero_box(reorientation_to_lps(grid).apply_array(array)[None])
    whole = (box[3:] - box[:3]).prod() == array.size
    return [] if whole and not array.any() else [box]


def _union(boxes: Sequence[NDArray[np.int64]]) -> list[int] | None:
    if not boxes:  # an image of zeros keeps its whole extent
        return None
    together = np.stack(boxes)
    return [int(edge) for edge in (*together[:, :3].min(axis=0), *together[:, 3:].max(axis=0))]
