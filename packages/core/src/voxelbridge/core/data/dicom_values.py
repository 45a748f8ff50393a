"""Values of a DICOM header by keyword, from a frame's functional groups or the object itself."""

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydicom import Dataset

from voxelbridge.core.data.dicom_layout import FrameError


@dataclass(frozen=True, slots=True)
class HeaderValues:
    """Looks a value up in a header and then in the functional groups of a frame."""

    places: tuple[Dataset, ...]

    def numbers(self, keyword: str, count: int) -> tuple[float, ...] | None:
        for place in reversed(self.places):  # the frame's own word before the object's
            value = place.get(keyword)
            if value is None or value == "":
                continue
            values = tuple(float(v) for v in (value if count > 1 else (_first(value),)))
            if len(values) != count or not np.isfinite(values).all():
                raise FrameError(f"{keyword} is not {count} finite number(s)")
            return values
        return None

    def number(self, *keywords: str) -> float | None:
        found = (self.numbers(keyword, 1) for keyword in keywords)
        return next((values[0] for values in found if values is not None), None)

    def integer(self, *keywords: str) -> int | None:
        value = self.number(*keywords)
        return None if value is None else int(value)

    def words(self, *keywords: str) -> tuple[str, ...]:
        for place in reversed(self.places):
            for keyword in keywords:
                value = place.get(keyword)
                if value:
                    return (str(value),) if isinstance(value, str) else tuple(map(str, value))
        return ()


def b_value(values: HeaderValues, header: Dataset) -> int | None:
    """From the standard's element, else from Siemens', GE's and Philips' own, else the sequence."""
    value = values.number("DiffusionBValue")
    if value is None:
        value = _private_number(header, 0x0019, "SIEMENS MR HEADER", 0x0C)
    if value is None:
        value = _private_number(header, 0x0043, "GEMS_PARM_01", 0x39)
        # newer GE software adds 10^9 to mark the field's new meaning
        value = None if value is None else value % 1_000_000_000
    if value is None:
        value = _private_number(header, 0x2001, "Philips Imaging DD 001", 0x03)
    if value is None and (name := re.match(r"\*?ep_b(\d+)", text_value(header, "SequenceName"))):
        value = float(name[1])
    return None if value is None else round(value)


def text_value(header: Dataset, keyword: str) -> str:
    return _text_of_value(header.get(keyword))


def _private_number(header: Dataset, group: int, creator: str, element: int) -> float | None:
    tag = (group, 0x1000 | element)
    if (group, 0x0010) not in header or tag not in header:
        return None
    if _text_of_value(header[group, 0x0010].value).upper() != creator.upper():
        return None
    value = _first(header[tag].value)
    if isinstance(value, bytes):  # stored with an unknown type
        if group == 0x2001 and len(value) == 4:
            return float(struct.unpack("<f", value)[0])
        value = value.decode("ascii", "replace").split("\\")[0].strip(" \0")
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _first(value: Any) -> Any:  # whatever type pydicom gives
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        return value
    return value[0] if len(value) else None


def _text_of_value(value: Any) -> str:  # whatever type pydicom gives
    value = _first(value)
    if isinstance(value, bytes):
        value = value.decode("ascii", "replace")
    return "" if value is None else str(value).strip(" \0")
