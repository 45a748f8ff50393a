"""BIDS trees, as ABCD's: sub-*/[ses-*/]{anat,func,...}/*_T1w.nii.gz.

Functional and diffusion series are four-dimensional; the paper pre-trains on single volumes of them
without saying which. Here a series gives one volume: the mean over time or its first frame.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from voxelbridge.core.data.case_names import safe_case_id
from voxelbridge.core.data.image_io import image_stem
from voxelbridge.pretrain_ssl.sources.scan import (
    FileImage,
    Scan,
    Source,
    sorted_scans,
)

SUBJECT = re.compile(r"sub-[A-Za-z0-9]+")
SESSION = re.compile(r"ses-[A-Za-z0-9]+")
IMAGE_FOLDERS = ("anat", "func", "dwi", "perf", "pet", "ct")  # BIDS "datatypes" that hold images

Frames = Literal["mean", "first"]


def is_bids(folder: Path) -> bool:
    """Whether `folder` has subjects (sub-*) with folders of images or of sessions."""
    return any(
        _is_kind(inner) or SESSION.fullmatch(inner.name)
        for subject in folder.glob("sub-*")
        if SUBJECT.fullmatch(subject.name) and subject.is_dir()
        for inner in subject.iterdir()
        if inner.is_dir()
    )


def find_bids(folder: Path, images: Sequence[Path], *, frames: Frames) -> Source:
    """The images of a BIDS tree; derivatives and files outside of subjects are left out."""
    scans = []
    for path in images:
        parts = path.relative_to(folder).parts
        if not SUBJECT.fullmatch(parts[0]) or not _is_kind(path.parent):
            continue
        name = image_stem(path.name)
        session = parts[1] if SESSION.fullmatch(parts[1]) else "ses-"
        patient = f"{folder.name}:{parts[0]}"
        scans.append(
            Scan(
                safe_case_id((*parts[:-1], name)),
                FileImage(path, frames),
                where=str(path),
                dataset=folder.name,
                patient=patient,
                scan=f"{patient}/{session}",
                modality=name.rsplit("_", 1)[-1],
                origin_ids=(f"bids:{folder.name}/{'/'.join(parts)}",),
            )
        )
    left_out = len(images) - len(scans)
    notes = (f"{left_out} images outside of sub-*/{{anat,func,...}} are left out",)
    return Source("BIDS", sorted_scans(scans), notes=notes if left_out else ())


def _is_kind(folder: Path) -> bool:
    return folder.name in IMAGE_FOLDERS
