"""nnssl's pretrain_data.json: collections of data sets, subjects, sessions and images.

Paths may start with a root such as `$nnssl_raw`; what it stands for is given by name
(`--root nnssl_raw=PATH`). Masks keep their names: nnssl itself swaps them by position.
"""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import pydantic

from voxelbridge.core.data.case_names import safe_case_id
from voxelbridge.core.data.image_io import image_stem
from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.core.files import read_json
from voxelbridge.pretrain_ssl.sources.scan import (
    FileImage,
    Scan,
    Source,
    sorted_scans,
)

FILE_NAME = "pretrain_data.json"
MASK_NAMES = {"anonymization_mask": "anonymization", "anatomy_mask": "anatomy"}

Info = dict[str, Any] | None  # Any: free facts about a subject, a session, an image
Index = str | int


class _Level(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="ignore", frozen=True)


class AssociatedMasks(_Level):
    """Paths of the masks of an image; None where there is none."""

    anonymization_mask: str | None = None
    anatomy_mask: str | None = None


class CollectionImage(_Level):
    """One image of a session."""

    name: str
    image_path: str
    modality: str | None = None
    image_info: Info = None
    associated_masks: AssociatedMasks | None = None


class Session(_Level):
    """Images taken in one visit."""

    session_id: Index | None = None
    session_info: Info = None
    images: list[CollectionImage]


class Subject(_Level):
    """One patient or volunteer."""

    subject_id: Index | None = None
    subject_info: Info = None
    sessions: dict[str, Session]


class CollectionDataset(_Level):
    """One data set of a collection."""

    dataset_index: Index | None = None
    name: str | None = None
    dataset_info: Info = None
    subjects: dict[str, Subject]


class Collection(_Level):
    """The whole file."""

    collection_index: Index | None = None
    collection_name: str
    datasets: dict[str, CollectionDataset]


def find_collection(path: Path, roots: Mapping[str, Path]) -> Source:
    """The images of a pretrain_data.json. DataError for a broken file, ConfigError for a root.

    Paths without a root are relative to the file's own folder. What is known about subjects (age,
    sex, ...) is not read into the store.
    """
    collection = _read(path)
    resolve = _Roots(path, roots)
    scans = []
    for dataset_id, dataset in collection.datasets.items():
        for subject_id, subject in dataset.subjects.items():
            for session_id, session in subject.sessions.items():
                ids = (collection.collection_name, dataset_id, subject_id, session_id)
                scans += [_scan(ids, image, resolve) for image in session.images]
    if missing := resolve.unknown:
        wanted = " ".join(f"--root {name}=PATH" for name in sorted(missing))
        raise ConfigError(f"{path}: its paths start with roots that are not given; add {wanted}")
    unused = sorted(set(roots) - resolve.used)
    notes = (f"no path starts with the root {', '.join(unused)}",) if unused else ()
    return Source("nnssl collection", sorted_scans(scans), notes=notes)


class _Roots:
    """Turns the paths of a collection into paths of this machine; remembers unknown roots."""

    def __init__(self, file: Path, roots: Mapping[str, Path]) -> None:
        self.file = file
        self.roots = roots
        self.used: set[str] = set()
        self.unknown: set[str] = set()

    def __call__(self, text: str) -> Path:
        first, *rest = PurePosixPath(text).parts
        if not first.startswith("$"):
            return self.file.parent / text
        name = first[1:].strip("{}")
        if name not in self.roots:
            self.unknown.add(name)
            return self.file.parent
        self.used.add(name)
        return self.roots[name].joinpath(*rest)


def _scan(ids: tuple[str, str, str, str], image: CollectionImage, resolve: _Roots) -> Scan:
    collection_name, dataset_id, subject_id, _ = ids
    path = resolve(image.image_path)
    masks = image.associated_masks or AssociatedMasks()
    return Scan(
        safe_case_id((*ids, image_stem(image.name))),
        FileImage(path),
        where=str(path),
        dataset=f"{collection_name}__{dataset_id}",
        patient="__".join((collection_name, dataset_id, subject_id)),
        scan="__".join(ids),
        modality=image.modality,
        origin_ids=(f"nnssl:{'/'.join((*ids, image.name))}",),
        masks={
            MASK_NAMES[key]: resolve(text)
            for key, text in masks.model_dump().items()
            if text is not None
        },
    )


def _read(path: Path) -> Collection:
    content = read_json(path)
    try:
        collection = Collection.model_validate(content)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(
            f"{path}: {where}: {first['msg'].lower()}; expected nnssl's {FILE_NAME} with datasets, "
            "subjects, sessions and images"
        ) from error
    empty = [image for image in _images(collection) if not image.image_path or not image.name]
    if empty:
        raise DataError(f"{path}: an image without 'name' or 'image_path'; correct the file")
    return collection


def _images(collection: Collection) -> list[CollectionImage]:
    return [
        image
        for dataset in collection.datasets.values()
        for subject in dataset.subjects.values()
        for session in subject.sessions.values()
        for image in session.images
    ]
