"""What planning needs of each case: its spacing, what the crop leaves, intensities of targets."""

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.data.dataset import RawCase
from voxelbridge.core.data.foreground import foreground_samples, nonzero_box
from voxelbridge.core.data.mapping import StoredToOriginal
from voxelbridge.core.data.preprocess import crop_mapping
from voxelbridge.core.data.raw_problems import image_problems
from voxelbridge.core.data.volume import Volume
from voxelbridge.core.errors import DataError
from voxelbridge.pretrain_sup.dataset_labels import DatasetLabels, read_segmentation


@dataclass(frozen=True, eq=False)
class CaseMeasures:
    """One case, measured in LPS order after the crop to voxels other than 0."""

    spacing_mm: tuple[float, float, float]
    kept_by_crop: float  # share of the file's voxels, in (0, 1]
    samples: NDArray[np.float32]  # (C, S) intensities in targets; S = 0 without any


@dataclass(frozen=True, eq=False)
class LabelledImage:
    """A case as its files hold it: the image, and the label ids on the image's grid."""

    volume: Volume
    segmentation: NDArray[np.integer[Any]]  # (D, H, W)

    @classmethod
    def read(cls, case: RawCase, labels: DatasetLabels) -> "LabelledImage":
        """Raises DataError that names the case and what is wrong with its image or labels."""
        segmentation = read_segmentation(case, labels, case.read_grid())
        return cls(_read_image(case), segmentation)

    def crop_mapping(self) -> StoredToOriginal:
        """The crop to voxels other than 0, widened to hold all labels: none is cut away."""
        labelled = self.segmentation != 0
        return crop_mapping(
            self.volume, boxes=nonzero_box(labelled[None]) if labelled.any() else ()
        )


def measure_case(case: RawCase, *, labels: DatasetLabels, num_samples: int) -> CaseMeasures:
    """Reads and measures one case; without `num_samples` its label map is not read.

    The intensities are those of targets: neither background nor voxels that never count. The draw
    depends on the case's name alone.
    """
    if num_samples == 0:
        volume = _read_image(case)
        mapping = crop_mapping(volume)
        samples = np.zeros((len(volume.array), 0), dtype=np.float32)
    else:
        labelled = LabelledImage.read(case, labels)
        volume, mapping = labelled.volume, labelled.crop_mapping()
        mask = np.isin(labelled.segmentation, target_ids(labels))
        rng = np.random.default_rng(zlib.crc32(case.case_id.encode()))
        samples = np.stack(
            [
                foreground_samples(channel, mask, count=num_samples, rng=rng)
                for channel in volume.array
            ]
        )
    return CaseMeasures(
        spacing_mm=mapping.reorientation.apply_grid(volume.grid).spacing_mm,
        kept_by_crop=float(np.prod(mapping.crop_shape) / np.prod(volume.grid.shape)),
        samples=samples,
    )


def target_ids(labels: DatasetLabels) -> list[int]:
    """The label ids of all targets, sorted: what counts as foreground."""
    return sorted({number for target in labels.targets for number in target.ids})


def _read_image(case: RawCase) -> Volume:
    volume = case.read_image()
    if problems := image_problems(volume):
        raise DataError(f"{case}: {problems[0].message}")
    return volume
