"""`vb-detect convert`: picks the converter of a source and tells what came out."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, assert_never

from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.detect.convert.raw_writer import ConversionReport

Source = Literal[
    "msd-pancreas", "ribfrac", "kits21", "lidc", "duke-breast", "luna16", "pn9", "cta-a",
    "monai-json", "csv", "slicer",
]  # fmt: skip

MAX_NOTES = 20  # lines; conversions of thousands of cases may have one per case


@dataclass(frozen=True, kw_only=True)
class Options:
    """What only some sources take; None = not given, the converter's default."""

    annotations: Path | None = None  # lidc
    malignancy: Literal["nndetection", "mean-of-readers"] | None = None  # lidc
    allow: tuple[str, ...] | None = None  # lidc
    test_subset: int | None = None  # luna16
    images: Path | None = None  # monai-json, csv, slicer
    box_mode: Literal["cccwhd", "xyzxyz", "xyzwhd", "xxyyzz"] | None = None  # monai-json
    space: Literal["lps", "ras", "voxel"] | None = None  # monai-json, csv
    class_names: tuple[str, ...] | None = None  # slicer
    classes: Literal["fracture", "types"] | None = None  # ribfrac
    test_set: Literal["internal", "external"] | None = None  # cta-a


OPTIONS: Mapping[Source, tuple[str, ...]] = {
    "lidc": ("annotations", "malignancy", "allow"),
    "luna16": ("test_subset",),
    "monai-json": ("images", "box_mode", "space"),
    "csv": ("images", "space"),
    "slicer": ("images", "class_names"),
    "ribfrac": ("classes",),
    "cta-a": ("test_set",),
}
COMMAND_LINE_NAME: Mapping[str, str] = {"class_names": "--class"}


def convert(
    source: Source,
    src: Path,
    out: Path,
    *,
    seed: int = 0,
    workers: int = 2,
    options: Options | None = None,
) -> ConversionReport:
    """Converts `src` to a raw data set at `out` and prints counts and notes.

    What is done is skipped. The cases that fail are named on stderr; the others are written, and a
    DataError at the end counts the failures.
    """
    given = _given(source, options or Options())
    if not src.exists():
        raise DataError(f"{src}: does not exist")
    if out.resolve() == src.resolve():
        raise ConfigError(f"{out}: source and target are the same folder")
    report = _convert(source, src, out, given | {"seed": seed, "workers": workers})
    print(f"{report.num_cases} cases with {report.num_objects} objects are in {out}")
    for note in report.notes[:MAX_NOTES]:
        print(f"note: {note}")
    if more := report.notes[MAX_NOTES:]:
        print(f"note: {len(more)} more like these")
    if report.failures:
        raise DataError(
            f"{src}: {len(report.failures)} failures, see the lines above; "
            f"the other {report.num_cases} cases are in {out}"
        )
    return report


def _convert(source: Source, src: Path, out: Path, arguments: dict[str, Any]) -> ConversionReport:
    # Imported one by one: a converter may need a library that the others do not.
    # Any: what each converter takes is checked against OPTIONS, not by types.
    match source:
        case "msd-pancreas":
            from voxelbridge.detect.convert import msd_pancreas as module
        case "ribfrac":
            from voxelbridge.detect.convert import ribfrac as module
        case "kits21":
            from voxelbridge.detect.convert import kits21 as module
        case "lidc":
            from voxelbridge.detect.convert import lidc as module
        case "duke-breast":
            from voxelbridge.detect.convert import duke_breast as module
        case "luna16":
            from voxelbridge.detect.convert import luna16 as module
        case "pn9":
            from voxelbridge.detect.convert import pn9 as module
        case "cta-a":
            from voxelbridge.detect.convert import cta_a as module
        case "monai-json":
            from voxelbridge.detect.convert import monai_json as module
        case "csv":
            from voxelbridge.detect.convert import csv_boxes as module
        case "slicer":
            from voxelbridge.detect.convert import slicer as module
        case _:
            assert_never(source)
    return module.convert(src, out, **arguments)


def _given(source: Source, options: Options) -> dict[str, Any]:
    given = {
        field.name: value
        for field in fields(options)
        if (value := getattr(options, field.name)) not in (None, ())
    }
    allowed = OPTIONS.get(source, ())
    for name in given:
        if name not in allowed:
            flag = COMMAND_LINE_NAME.get(name, f"--{name.replace('_', '-')}")
            known = ", ".join(key for key, names in OPTIONS.items() if name in names)
            raise ConfigError(f"{flag} is no option of {source}; it belongs to {known}")
    return given
