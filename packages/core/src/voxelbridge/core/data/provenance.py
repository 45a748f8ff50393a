"""Where the voxels of a stored case come from: its patient, its names elsewhere, its content.

`dataset`, `scan` and `modality` group cases, so that training can draw them by stated shares.

Two stores that share a patient, an origin or a content hash overlap: what was learned on one must
not be measured on the other.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from voxelbridge.core.data.volume import Volume, reorientation_to_lps


@dataclass(frozen=True, slots=True)
class Provenance:
    """What tells whether two cases, maybe of different data sets, show the same scan."""

    patient: str | None = None  # unique within its data set only
    origin_ids: tuple[str, ...] = ()  # "space:name", for instance "dicom:1.2.840..."
    content_sha256: tuple[str, ...] = ()  # one per channel, see `content_hashes`
    dataset: str | None = None
    scan: str | None = None  # images of one scan show one acquisition
    modality: str | None = None  # such as "CT" or "T1w", as the source spells it


def content_hashes(volume: Volume) -> tuple[str, ...]:
    """A SHA-256 per channel of the voxels in LPS order as float32, led by their shape.

    The same scan gives the same hash in every file format and axis order that keeps its values;
    spacing and position do not enter.
    """
    array = reorientation_to_lps(volume.grid).apply_array(volume.array)
    hashes = []
    for channel in array:
        digest = hashlib.sha256(repr(channel.shape).encode())
        for plane in channel:  # slice by slice: a whole float32 copy would double the memory
            # + 0.0 turns -0.0 into 0.0, which compare equal and must hash equal
            digest.update((np.ascontiguousarray(plane, dtype="<f4") + np.float32(0.0)).data)
        hashes.append(digest.hexdigest())
    return tuple(hashes)
