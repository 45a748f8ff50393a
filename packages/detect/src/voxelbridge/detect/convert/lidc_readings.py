"""What the readers of LIDC-IDRI drew: from the XML files of the download or from tables of them.

A reading is one nodule of at least 3 mm as outlined by one reader. Points are (column, row) of the
DICOM slice at `z_mm`; an outline runs over the first pixels outside the nodule.
"""

import csv
import gzip
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.errors import DataError

CT_ROOT = "LidcReadMessage"  # chest radiographs have IdriReadMessage
TABLES = ("scans.csv", "readings.csv", "contours.csv.gz")


@dataclass(frozen=True, eq=False)
class Contour:
    """One closed outline: points (P, 2) of whole (column, row), its slice, nodule or hole."""

    z_mm: float
    points: NDArray[np.int64]
    inclusion: bool


@dataclass(frozen=True, eq=False)
class Reading:
    """One nodule of one reader; `reader` is None where the source does not tell readers apart."""

    reader: int | None
    malignancy: int | None  # 1 to 5
    contours: tuple[Contour, ...]


def read_xml(path: Path) -> tuple[str, tuple[Reading, ...]] | None:
    """Series UID and readings of a CT's XML file; None for other XML files (radiographs).

    Marks without an outline (nodules below 3 mm and non-nodules are single points) are left out.
    """
    try:
        root = ET.parse(path).getroot()
    except (ET.ParseError, OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as XML ({error})") from error
    if _name(root) != CT_ROOT:
        return None
    uid = next((e.text for e in root.iter() if _name(e).lower() == "seriesinstanceuid"), None)
    if not uid or not uid.strip():
        raise DataError(f"{path}: no SeriesInstanceUid in its header")
    sessions = [element for element in root if _name(element) == "readingSession"]
    readings = [
        reading
        for reader, session in enumerate(sessions)
        for nodule in session
        if _name(nodule) == "unblindedReadNodule"
        and (reading := _reading_of(nodule, reader, path)) is not None
    ]
    return uid.strip(), tuple(readings)


def read_tables(folder: Path) -> dict[str, tuple[Reading, ...]]:
    """Readings of every series UID, from the tables scans, readings and contours in `folder`.

    A scan without outlines has an empty tuple. The tables do not name readers.
    """
    missing = [name for name in TABLES if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder}: no {', '.join(missing)}; expected {', '.join(TABLES)}")
    series = {row["scan_id"]: row["series_instance_uid"] for row in _rows(folder / TABLES[0])}
    contours: dict[str, list[Contour]] = {}
    for row in _rows(folder / TABLES[2]):
        points = np.array([pair.split(",") for pair in row["coords_xy"].split(";")], dtype=np.int64)
        contour = Contour(float(row["image_z_position_mm"]), points, row["inclusion"] == "1")
        contours.setdefault(row["reading_id"], []).append(contour)
    readings: dict[str, list[Reading]] = {uid: [] for uid in series.values()}
    for row in _rows(folder / TABLES[1]):
        drawn = tuple(contours.get(row["reading_id"], ()))
        readings[series[row["scan_id"]]].append(Reading(None, _score(row["malignancy"]), drawn))
    return {uid: tuple(listed) for uid, listed in readings.items()}


def read_annotations(
    folders: Sequence[Path],
) -> tuple[Mapping[str, tuple[Reading, ...]], list[str]]:
    """Readings by series UID: the tables of the first folder if it has them, else all XML files.

    XML files are taken from anywhere below the folders. Two files of one series: the first counts.
    Also returns a line for each XML file that cannot be read.
    """
    if all((folders[0] / name).is_file() for name in TABLES):
        return read_tables(folders[0]), []
    found: dict[str, tuple[Reading, ...]] = {}
    broken = []
    for path in (path for folder in folders for path in sorted(folder.rglob("*.xml"))):
        if path.name.startswith("."):
            continue
        try:
            content = read_xml(path)
        except DataError as error:
            broken.append(str(error))
            continue
        if content is not None:
            found.setdefault(*content)
    if broken and not found:
        raise DataError(broken[0])
    if not found:
        raise DataError(
            f"{folders[0]}: no reader annotations; expected an XML file per CT series below it, "
            f"or the tables {', '.join(TABLES)}"
        )
    return found, broken


def _reading_of(nodule: ET.Element, reader: int, path: Path) -> Reading | None:
    contours = []
    malignancy = None
    for element in nodule:
        match _name(element):
            case "roi":
                contours.append(_contour_of(element, path))
            case "characteristics":
                malignancy = _score(_text(element, "malignancy"))
            case _:
                pass
    outlined = tuple(contour for contour in contours if len(contour.points) > 1)
    return Reading(reader, malignancy, outlined) if outlined else None


def _contour_of(roi: ET.Element, path: Path) -> Contour:
    try:
        points = [
            (int(_text(edge, "xCoord") or ""), int(_text(edge, "yCoord") or ""))
            for edge in roi
            if _name(edge) == "edgeMap"
        ]
        z_mm = float(_text(roi, "imageZposition") or "")
    except ValueError as error:
        raise DataError(f"{path}: an outline holds something other than numbers") from error
    inclusion = (_text(roi, "inclusion") or "TRUE").upper() != "FALSE"
    return Contour(z_mm, np.array(points, dtype=np.int64).reshape(-1, 2), inclusion)


def _score(text: str | None) -> int | None:
    value = int(text) if text and text.isdecimal() else 0
    return value if 1 <= value <= 5 else None


def _name(element: ET.Element) -> str:
    return element.tag.rpartition("}")[2]  # without the namespace, which differs between files


def _text(element: ET.Element, name: str) -> str | None:
    found = next((child.text for child in element if _name(child) == name), None)
    return found.strip() if found else None


def _rows(path: Path) -> Iterator[dict[str, str]]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8", newline="") as stream:
            yield from csv.DictReader(stream)
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
