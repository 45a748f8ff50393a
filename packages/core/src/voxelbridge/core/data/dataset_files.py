"""Which files belong to which case of a raw data set, from names alone: no file is looked at."""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from voxelbridge.core.data.dataset_description import CaseFiles, Description
from voxelbridge.core.data.image_io import READ_ENDINGS, image_ending
from voxelbridge.core.data.raw_problems import Problem, few_of
from voxelbridge.core.errors import DataError

IMAGE_NAME = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")


@dataclass(frozen=True)
class FoundCase:
    """The files of one case."""

    case_id: str
    images: tuple[Path, ...]  # one per channel
    label: Path | None  # label map
    objects: Path | None  # JSON file
    problem: str | None  # why its images cannot be read, as far as names tell


def _names_in(folder: Path) -> list[str]:
    """File names of `folder`, sorted; names that start with a dot are left out."""
    try:
        with os.scandir(folder) as entries:  # names only: no file is looked at
            return sorted(entry.name for entry in entries if not entry.name.startswith("."))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror})") from error


def find_cases(
    root: Path, part: str, description: Description
) -> tuple[tuple[FoundCase, ...], list[Problem]]:
    """The cases of images{part}, and the labels of labels{part} that belong to none of them."""
    images, labels = root / f"images{part}", root / f"labels{part}"
    channels: dict[str, list[tuple[int, str]]] = {}
    unnumbered: dict[str, str] = {}
    for name in _names_in(images):
        ending = _ending_of(name, description.ending)
        if ending is None:
            continue
        parts = IMAGE_NAME.fullmatch(name[: -len(ending)])
        if parts is None:
            unnumbered[name[: -len(ending)]] = name
        else:
            channels.setdefault(parts["case"], []).append((int(parts["channel"]), name))
    if unnumbered and not channels:
        name = min(unnumbered.values())
        ending = _ending_of(name, description.ending)
        raise DataError(
            f"{images / name}: no channel number in its name; expected CASE_0000{ending}"
        )
    label_names = set(_names_in(labels))
    cases = []
    for case_id, of_case in channels.items():
        of_case.sort()
        paths = tuple(images / name for _, name in of_case)
        ending = _ending_of(of_case[0][1], description.ending) or ""
        label = _label_name(case_id, ending, label_names, description)
        cases.append(
            FoundCase(
                case_id,
                paths,
                None if label is None else labels / label,
                labels / f"{case_id}.json" if f"{case_id}.json" in label_names else None,
                _channel_problem([n for n, _ in of_case], images.name, description),
            )
        )
    for case_id, name in unnumbered.items():
        if case_id not in channels:
            wrong = f"no channel number in the name {name}; expected {case_id}_0000"
            cases.append(FoundCase(case_id, (images / name,), None, None, wrong))
    cases.sort(key=lambda case: case.case_id)
    known = channels.keys() | unnumbered.keys()
    return tuple(cases), _orphans(labels.name, images.name, label_names, known, description)


def named_cases(
    files: Mapping[str, CaseFiles], labels: Path, description: Description
) -> tuple[FoundCase, ...]:
    """The cases of dataset.json's own `dataset` map; a JSON file may lie beside each label map."""
    in_folder: dict[Path, set[str]] = {}
    cases = []
    for case_id, named in sorted(files.items()):
        where, name = labels, f"{case_id}.json"
        if named.label is not None:
            where = named.label.parent
            name = named.label.name.removesuffix(image_ending(named.label.name) or "") + ".json"
        if where not in in_folder:
            in_folder[where] = set(_names_in(where))
        wrong = None
        if len(named.images) != len(description.channel_names):
            wrong = (
                f"{len(named.images)} images in dataset.json, which declares "
                f"{len(description.channel_names)} channels"
            )
        cases.append(
            FoundCase(
                case_id,
                named.images,
                named.label,
                where / name if name in in_folder[where] else None,
                wrong,
            )
        )
    return tuple(cases)


def _channel_problem(numbers: Sequence[int], folder: str, description: Description) -> str | None:
    declared = len(description.channel_names)
    if list(numbers) == list(range(declared)):
        return None
    if twice := sorted(number for number, count in Counter(numbers).items() if count > 1):
        return f"several files of channel {few_of(twice)} in {folder}; keep one of them"
    return (
        f"channels {list(numbers)} in {folder}, dataset.json declares {declared}; "
        "add or remove files"
    )


def _label_name(case_id: str, ending: str, names: set[str], description: Description) -> str | None:
    """The label map of a case: with the images' ending, or where no ending is declared any."""
    if f"{case_id}{ending}" in names:
        return f"{case_id}{ending}"
    if description.ending is not None:
        return None
    found = [f"{case_id}{other}" for other in READ_ENDINGS if f"{case_id}{other}" in names]
    return found[0] if len(found) == 1 else None


def _orphans(
    labels: str, images: str, names: set[str], known: set[str], description: Description
) -> list[Problem]:
    found: dict[str, str] = {}
    for name in sorted(names):
        ending = ".json" if name.endswith(".json") else _ending_of(name, description.ending)
        if ending is not None and name[: -len(ending)] not in known:
            found.setdefault(name[: -len(ending)], name)
    return [
        Problem("orphan-label", f"{labels}/{name} has no image in {images}; add the image", case_id)
        for case_id, name in found.items()
    ]


def _ending_of(name: str, ending: str | None) -> str | None:
    if ending is None:
        return image_ending(name)
    return ending if name.endswith(ending) else None


def no_images(folder: Path, description: Description) -> DataError:
    ending = description.ending or ".nii.gz"
    others = [name for name in _names_in(folder / "imagesTr") if image_ending(name)]
    why = f"; {few_of(others)} do not end in {ending} ('file_ending')" if others else ""
    return DataError(f"{folder}: no images in imagesTr; expected {{case}}_0000{ending}{why}")
