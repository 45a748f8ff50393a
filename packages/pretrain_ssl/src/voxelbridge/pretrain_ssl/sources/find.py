"""What kind of source a path is, and all images in it."""

from collections.abc import Collection, Mapping
from pathlib import Path

from voxelbridge.core.data.case_names import safe_case_id
from voxelbridge.core.data.file_tree import walk_files
from voxelbridge.core.data.image_io import image_ending, image_stem
from voxelbridge.core.data.sources import find_images
from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.core.files import read_json
from voxelbridge.pretrain_ssl.sources.bids import Frames, find_bids, is_bids
from voxelbridge.pretrain_ssl.sources.ct_rate import find_ct_rate, is_ct_rate
from voxelbridge.pretrain_ssl.sources.nnssl import FILE_NAME, find_collection
from voxelbridge.pretrain_ssl.sources.scan import (
    FileImage,
    Scan,
    Source,
    sorted_scans,
)

ACCEPTED = (
    "accepted are nnssl's pretrain_data.json, a folder of images (.nii.gz, .nii, .nrrd, .mha, "
    ".mhd) or of DICOM series, searched with its subfolders, a raw data set with dataset.json and "
    "imagesTr, a BIDS tree and CT-RATE's"
)


def find_scans(
    source: Path,
    *,
    roots: Mapping[str, Path] | None = None,
    allow: Collection[str] = (),
    frames: Frames = "mean",
) -> Source:
    """All images of `source`, by its kind: see the modules of this package.

    `roots` stand for `$NAME` in an nnssl collection, `allow` downgrades refusals of DICOM series
    (docs/dicom.md), `frames` makes one volume of a BIDS series. Raises DataError where there is
    nothing to read.
    """
    if not source.exists():
        raise DataError(f"{source}: does not exist; {ACCEPTED}")
    collection = source / FILE_NAME if source.is_dir() else source
    if collection.suffix == ".json" and collection.is_file():
        found = find_collection(collection, roots or {})
    elif roots:
        raise ConfigError(f"{source}: --root is for nnssl's {FILE_NAME}, this is another source")
    else:
        found = _find_in_folder(source, allow=allow, frames=frames)
    if not found.scans and not found.refused:
        raise DataError(f"{source}: no image found; {ACCEPTED}")
    return found


def _find_in_folder(folder: Path, *, allow: Collection[str], frames: Frames) -> Source:
    if not folder.is_dir() and image_ending(folder.name) is None:
        raise DataError(f"{folder}: no folder; {ACCEPTED}")
    if (folder / "dataset.json").is_file() and (folder / "imagesTr").is_dir():
        return _raw_data_set(folder)
    if folder.is_dir():
        if is_bids(folder):
            return find_bids(folder, _image_files(folder), frames=frames)
        images = _image_files(folder)
        if is_ct_rate(path.name for path in images):
            return find_ct_rate(folder, images)
    sources = find_images(folder, allow=allow)
    scans = [
        Scan(
            image.case_id,
            image,
            where=str(image.files[0]),
            origin_ids=tuple(image.provenance_names),
        )
        for image in sources.images
    ]
    return Source("folder", sorted_scans(scans), refused=tuple(sources.refused))


def _raw_data_set(folder: Path) -> Source:
    """One scan per channel file of imagesTr; the channels of a case are one patient's scan."""
    patients = read_json(folder / "groups.json") if (folder / "groups.json").is_file() else {}
    origins = read_json(folder / "origins.json") if (folder / "origins.json").is_file() else {}
    scans = []
    for path in _image_files(folder / "imagesTr"):
        name = safe_case_id((image_stem(path.name),))
        case = name[:-5] if name[-5:-4] == "_" and name[-4:].isdigit() else name
        patient = f"{folder.name}:{patients.get(case, case)}"
        scans.append(
            Scan(
                name,
                FileImage(path),
                where=str(path),
                dataset=folder.name,
                patient=patient,
                scan=f"{folder.name}:{case}",
                origin_ids=tuple(str(origin) for origin in origins.get(case, ())),
            )
        )
    return Source("raw data set", sorted_scans(scans))


def _image_files(folder: Path) -> list[Path]:
    """Image files below a folder in the order of their paths; from names alone, none is opened."""
    found = [
        name  # 100 000 path objects would cost seconds to compare
        for name in walk_files(folder)
        if image_ending(name) is not None
    ]
    return [Path(name) for name in sorted(found)]
