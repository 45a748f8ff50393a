"""DUKE breast MRI: boxes of a spreadsheet, slice numbers by the file mapping, no silent flip."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from openpyxl import Workbook
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

from voxelbridge.core.data.dataset import RawDataset
from voxelbridge.core.errors import DataError
from voxelbridge.detect.convert.duke_breast import SEQUENCES, convert
from voxelbridge.detect.convert.duke_tables import ORIGINAL, SliceFile, read_boxes, series_files

ROWS, COLUMNS, NUM_SLICES = 12, 14, 9
BOX = (3, 6, 5, 9, 2, 4)  # rows 3-6, columns 5-9, slices 2-4, from 1, ends included
HEADER = ("Patient ID", "Start Row", "End Row", "Start Column", "End Column", "Start Slice")
LESION = 1000

Mapping_ = list[tuple[str, str, str]]


def test_box_is_the_lesion_of_the_image_to_the_voxel(tmp_path: Path) -> None:
    src = _download(tmp_path / "src", patients=4)
    report = convert(src, tmp_path / "out", workers=0)
    raw = RawDataset.open(tmp_path / "out")
    assert (report.num_cases, report.num_objects, report.failures) == (4, 4, [])
    assert raw.channel_names == SEQUENCES
    assert raw.class_names == ("lesion",)
    for case in (*raw.cases, *raw.test_cases):
        volume = case.read_image()
        assert volume.array.shape[0] == 4
        inside = np.argwhere(volume.array[0] == LESION)
        (box,) = case.read_objects(volume.grid).boxes.tolist()
        assert box == [*inside.min(axis=0), *(inside.max(axis=0) + 1)]
        assert [box[3] - box[0], box[4] - box[1], box[5] - box[2]] == [3, 4, 5]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("instance_reverse", [False, True])
def test_order_of_slices_is_taken_from_the_mapping(
    tmp_path: Path, reverse: bool, instance_reverse: bool
) -> None:
    """The numbering of the mapping, of the files and of positions may each run either way."""
    src = _download(tmp_path / "src", reverse=reverse, instance_reverse=instance_reverse)
    convert(src, tmp_path / "out", workers=0)
    (case,) = RawDataset.open(tmp_path / "out").cases
    volume = case.read_image()
    inside = np.argwhere(volume.array[0] == LESION)
    (box,) = case.read_objects(volume.grid).boxes.tolist()
    assert box == [*inside.min(axis=0), *(inside.max(axis=0) + 1)]


def test_origins_name_the_series_of_every_channel(tmp_path: Path) -> None:
    src = _download(tmp_path / "src")
    convert(src, tmp_path / "out", workers=0)
    origins = json.loads((tmp_path / "out" / "origins.json").read_text())["Breast_MRI_001"]
    series = [path.name for path in sorted((src / "Duke-Breast-Cancer-MRI").glob("*/*/*"))]
    assert sorted(origins) == sorted(f"dicom:{uid}" for uid in series)


def test_thirty_percent_of_the_patients_are_held_out(tmp_path: Path) -> None:
    src = _download(tmp_path / "src", patients=10, sequences=("pre",))
    convert(src, tmp_path / "out", workers=0, sequences=("pre",))
    raw = RawDataset.open(tmp_path / "out")
    assert (len(raw.cases), len(raw.test_cases)) == (7, 3)
    assert raw.splits is not None
    assert sorted(n for fold in raw.splits for n in fold["val"]) == [c.case_id for c in raw.cases]


def test_other_padding_of_instance_numbers_and_csv_tables(tmp_path: Path) -> None:
    src = _download(tmp_path / "src", as_csv=True)
    for path in src.rglob("*.dcm"):
        path.rename(path.with_name(path.name.replace("1-0", "1-")))  # 1-001 -> 1-01
    assert convert(src, tmp_path / "out", workers=0).num_cases == 1


def test_descriptive_layout_with_its_slips(tmp_path: Path) -> None:
    src = _download(tmp_path / "src")
    for number, folder in enumerate(sorted((src / "Duke-Breast-Cancer-MRI").glob("*/*/*"))):
        study = folder.parent.with_name("01-01-1990-MRI BREAST")
        study.mkdir(exist_ok=True)
        folder.rename(study / f"{number}.000000-ax dyn")
    mapping: Mapping_ = []
    for number, sequence in enumerate(SEQUENCES):
        study = "BreastMRI001//01-01-1990-MRI BREAST"
        for index in range(NUM_SLICES):
            name = f"{sequence}/Breast_MRI_001_{sequence}_{index + 1:03d}.dcm"
            place = f"Duke-Breast-Cancer-MRI/{study}/{number}.000000-ax dyn/1-{index + 1:03d}.dcm"
            mapping.append((f"DICOM_Images/Breast_MRI_001/{name}", "gone/x/y/1-001.dcm", place))
    _tables(src, {"Breast_MRI_001": BOX}, mapping, as_csv=False)
    report = convert(src, tmp_path / "out", workers=0)
    assert (report.num_cases, report.num_objects) == (1, 1)


def test_bad_patients_cost_a_line_each_and_the_others_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    boxes = {
        "Breast_MRI_002": (3, 6, 5, 9, 2, NUM_SLICES + 1),
        "Breast_MRI_003": (3, ROWS + 1, 5, 9, 2, 4),
        "Breast_MRI_009": BOX,
    }
    src = _download(tmp_path / "src", patients=6, boxes=boxes, sequences=("pre", "post_2"))
    root = src / "Duke-Breast-Cancer-MRI"
    next(iter(sorted((root / "Breast_MRI_004").rglob("1-005.dcm")))).unlink()
    for path in _series(root / "Breast_MRI_005", "post_2"):  # another grid
        header = dcmread(path)
        header.PixelSpacing = [1.4, 1.4]
        header.save_as(path)
    report = convert(src, tmp_path / "out", workers=2, sequences=("pre", "post_2"))
    lines = capsys.readouterr().err.splitlines()
    assert report.num_cases == 2
    assert len(lines) == len(report.failures) == 5
    for number, reason in (
        (2, "box ends at slice 10"),
        (3, "leaves the 12x14 image"),
        (4, "no file 1-005.dcm"),
        (5, "sequence post_2: grid"),
        (9, "no folder"),
    ):
        (line,) = [line for line in lines if f"Breast_MRI_{number:03d}" in line]
        assert reason in line


def test_sequence_missing_from_the_mapping_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = _download(tmp_path / "src", sequences=("pre", "post_1", "post_3"))
    with pytest.raises(DataError, match="no case"):
        convert(src, tmp_path / "out", workers=0)
    assert "no sequence post_2" in capsys.readouterr().err


def test_mac_files_in_series_are_no_slices(tmp_path: Path) -> None:
    src = _download(tmp_path / "src")
    for path in list(src.rglob("1-001.dcm")):
        path.with_name("._1-001.dcm").write_bytes(b"\x00\x05\x16\x07")
    assert convert(src, tmp_path / "out", workers=0).num_cases == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("Breast_MRI_001", 6, 3, 5, 9, 2, 4), "line 2"),
        (("Breast_MRI_001", 0, 3, 5, 9, 2, 4), "line 2"),
        (("Breast_MRI_001", "x", 3, 5, 9, 2, 4), "line 2"),
        ((), "no boxes"),
    ],
)
def test_broken_box_row_is_named(tmp_path: Path, row: tuple[object, ...], message: str) -> None:
    _write_table(tmp_path / "Annotation_Boxes.xlsx", [(*HEADER, "End Slice"), row])
    with pytest.raises(DataError, match=message):
        read_boxes(tmp_path)


def test_missing_tables_and_columns_are_named(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    with pytest.raises(DataError, match=r"Annotation_Boxes\.xlsx"):
        convert(tmp_path / "src", tmp_path / "out")
    _write_table(tmp_path / "src" / "Annotation_Boxes.xlsx", [HEADER])
    with pytest.raises(DataError, match="no column End Slice"):
        convert(tmp_path / "src", tmp_path / "out")
    (tmp_path / "src" / "Annotation_Boxes.xlsx").write_bytes(b"no workbook")
    with pytest.raises(DataError, match="not an Excel workbook"):
        convert(tmp_path / "src", tmp_path / "out")


def test_gap_in_the_slice_numbers_is_refused(tmp_path: Path) -> None:
    slices = [SliceFile(n, f"C/Breast_MRI_001/a/b/1-{n}.dcm", "") for n in (1, 2, 4)]
    with pytest.raises(DataError, match="gaps"):
        series_files(tmp_path, slices, "pre")
    outside = [SliceFile(1, "C/../../b/1-1.dcm", "")]
    with pytest.raises(DataError, match="leads out"):
        series_files(tmp_path, outside, "pre")


def _series(patient: Path, sequence: str) -> list[Path]:
    paths = sorted(patient.rglob("*.dcm"))
    return [path for path in paths if dcmread(path).SeriesDescription == sequence]


def _download(
    root: Path,
    *,
    patients: int = 1,
    sequences: Sequence[str] = SEQUENCES,
    boxes: dict[str, tuple[int, ...]] | None = None,
    reverse: bool = False,
    instance_reverse: bool = False,
    as_csv: bool = False,
) -> Path:
    mapping: Mapping_ = []
    names = [f"Breast_MRI_{number:03d}" for number in range(1, patients + 1)]
    for patient in names:
        study = generate_uid()
        for sequence in sequences:
            folder = f"Duke-Breast-Cancer-MRI/{patient}/{study}/{generate_uid()}"
            for slice_number in range(1, NUM_SLICES + 1):
                place = slice_number - 1 if not reverse else NUM_SLICES - slice_number
                instance = place + 1 if not instance_reverse else NUM_SLICES - place
                path = f"{folder}/1-{instance:03d}.dcm"
                header = _slice(path.split("/")[-2], sequence, place, instance)
                _paint(header, BOX, slice_number)
                _save(header, root / path)
                original = f"{patient}/{sequence}/{patient}_{sequence}_{slice_number:03d}.dcm"
                mapping.append((f"DICOM_Images/{original}", path, ""))
    mapping.sort(key=lambda row: row[1])  # no order may be relied on
    _tables(root, {**dict.fromkeys(names, BOX), **(boxes or {})}, mapping, as_csv=as_csv)
    return root


def _slice(uid: str, sequence: str, place: int, instance: int) -> Dataset:
    header = Dataset()
    header.SOPClassUID = MRImageStorage
    header.SOPInstanceUID = generate_uid()
    header.SeriesInstanceUID = uid
    header.SeriesDescription = sequence
    header.Modality = "MR"
    header.InstanceNumber = instance
    header.ImagePositionPatient = [-40.0, 30.0, 12.0 + 2.0 * place]
    header.ImageOrientationPatient = [1, 0, 0, 0, -1, 0]  # rows run to the front
    header.PixelSpacing = [0.8, 0.7]
    header.SliceThickness = 2.0
    header.Rows, header.Columns = ROWS, COLUMNS
    header.SamplesPerPixel = 1
    header.PhotometricInterpretation = "MONOCHROME2"
    header.BitsAllocated, header.BitsStored, header.HighBit = 16, 16, 15
    header.PixelRepresentation = 0
    return header


def _paint(header: Dataset, box: Sequence[int], slice_number: int) -> None:
    pixels = np.arange(ROWS * COLUMNS, dtype=np.uint16).reshape(ROWS, COLUMNS)
    row0, row1, column0, column1, first, last = box
    if first <= slice_number <= last:
        pixels[row0 - 1 : row1, column0 - 1 : column1] = LESION
    header.PixelData = pixels.tobytes()


def _save(header: Dataset, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID
    header.save_as(path, enforce_file_format=True)


def _tables(
    root: Path, boxes: dict[str, tuple[int, ...]], mapping: Mapping_, *, as_csv: bool
) -> None:
    write: Callable[[Path, Sequence[Sequence[object]]], None] = (
        _write_csv if as_csv else _write_table
    )
    ending = "csv" if as_csv else "xlsx"
    rows = [(*HEADER, "End Slice"), *((name, *box) for name, box in sorted(boxes.items()))]
    write(root / f"Annotation_Boxes.{ending}", rows)
    head = (ORIGINAL, "classic_path", "descriptive_path")
    name = f"Breast-Cancer-MRI-filepath_filename-mapping.{ending}"
    write(root / name, [head, *mapping])


def _write_table(path: Path, rows: Sequence[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    book = Workbook()
    sheet = book.active
    assert sheet is not None
    for row in rows:
        sheet.append(list(row))
    book.save(path)


def _write_csv(path: Path, rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(rows)
