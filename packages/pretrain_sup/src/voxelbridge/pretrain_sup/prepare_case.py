"""One case on its way into a store of many data sets."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.data.case_names import safe_case_id
from voxelbridge.core.data.case_store import CaseStoreWriter
from voxelbridge.core.data.dataset import RawCase
from voxelbridge.core.data.foreground import class_locations
from voxelbridge.core.data.preprocess import labels_to_stored, preprocess
from voxelbridge.core.data.provenance import Provenance, content_hashes
from voxelbridge.pretrain_sup.dataset_labels import DatasetLabels
from voxelbridge.pretrain_sup.fingerprint import LabelledImage
from voxelbridge.pretrain_sup.plan import DatasetPlan, StorePlan


@dataclass(frozen=True)
class SourceCase:
    """A case of a raw data set under the name of its data set."""

    raw: RawCase
    dataset: str

    @property
    def case_id(self) -> str:
        """The case's name in the store; a data set's name holds no "__", so it is unique."""
        return safe_case_id([self.dataset, self.raw.case_id])

    def __str__(self) -> str:
        return f"data set {self.dataset}: {self.raw}"


@dataclass(frozen=True)
class CaseTask:
    """A case to store, and all that its data set decides about it."""

    case: SourceCase
    labels: DatasetLabels
    plan: DatasetPlan
    provenance: Provenance

    def __str__(self) -> str:
        return str(self.case)


def store_case(task: CaseTask, *, writer: CaseStoreWriter, plan: StorePlan) -> None:
    """Reads, preprocesses and stores one case."""
    labelled = LabelledImage.read(task.case.raw, task.labels)
    prepared = preprocess(
        labelled.volume,
        labelled.crop_mapping(),
        spacing_mm=plan.spacing_mm,
        normalization=task.plan.normalization,
        resampling=plan.resampling,
    )
    segmentation = labels_to_stored(
        labelled.segmentation,
        prepared.mapping,
        resampling=plan.resampling,
        spacing_mm=plan.spacing_mm,
    )
    writer.write_case(
        task.case.case_id,
        prepared.image,
        grid=prepared.mapping.stored_grid,
        boxes=np.zeros((0, 6), dtype=np.float32),
        labels=np.zeros(0, dtype=np.int64),
        mapping=prepared.mapping,
        segmentation=segmentation,
        locations=_locations(segmentation, task.labels),
        provenance=replace(task.provenance, content_sha256=content_hashes(labelled.volume)),
        extra={
            "normalization": [scheme.model_dump(mode="json") for scheme in task.plan.normalization],
            "channel_names": list(task.plan.channel_names),
        },
    )


def _locations(
    segmentation: NDArray[np.integer], labels: DatasetLabels
) -> dict[int, NDArray[np.int32]]:
    """Voxels of every label id that the stored map holds, by the id itself."""
    found = class_locations(segmentation, labels.legal_ids - {0})
    return {number: voxels for number, voxels in found.items() if len(voxels)}
