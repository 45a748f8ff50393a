"""LIDC-IDRI: outlines, grouping over readers, consensus, a tiny download, and the real tables."""

import csv
import gzip
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

from voxelbridge.core.data.dataset import RawDataset
from voxelbridge.core.errors import DataError
from voxelbridge.core.files import read_json
from voxelbridge.detect.convert.lidc import convert
from voxelbridge.detect.convert.lidc_consensus import (
    VoxelMask,
    consensus,
    fill_contour,
    group_readings,
    is_malignant,
    reading_masks,
)
from voxelbridge.detect.convert.lidc_readings import Contour, Reading, read_tables, read_xml

SERIES = "1.3.6.1.4.1.14519.5.2.1.6279.6001.10"
Z0, STEP = -100.0, 2.5
SIZE = 24


def square(y0: int, x0: int, y1: int, x1: int) -> list[tuple[int, int]]:
    """Closed outline (x, y) around the pixels y0 <= y < y1, x0 <= x < x1: one pixel outside."""
    top = [(x, y0 - 1) for x in range(x0 - 1, x1)]
    right = [(x1, y) for y in range(y0 - 1, y1)]
    bottom = [(x, y1) for x in range(x1, x0 - 1, -1)]
    left = [(x0 - 1, y) for y in range(y1, y0 - 1, -1)]
    return [*top, *right, *bottom, *left, top[0]]


def test_outline_itself_is_outside() -> None:
    inside, outline = fill_contour(contour(square(3, 4, 6, 9)), (0, 0), (10, 12))
    expected = np.zeros((10, 12), dtype=bool)
    expected[3:6, 4:9] = True
    np.testing.assert_array_equal(inside, expected)
    assert not (inside & outline).any()
    assert outline.sum() == 5 * 7 - 3 * 5


def test_filling_agrees_with_point_by_point_winding() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        angle = np.sort(rng.uniform(0, 2 * np.pi, 9))
        radius = rng.uniform(2, 7, 9)
        points = np.rint(8 + radius * [np.cos(angle), np.sin(angle)]).astype(int).T
        inside, outline = fill_contour(contour(points.tolist()), (0, 0), (17, 17))
        for y in range(17):
            for x in range(17):
                on, crossings = _slow(points, x, y)
                assert outline[y, x] == on
                assert inside[y, x] == (not on and crossings % 2 == 1)


def test_holes_are_cut_out_of_the_nodule_only() -> None:
    hole = Contour(0.0, np.array(square(5, 5, 7, 7)), False)
    reading = Reading(0, 3, (hole, contour(square(2, 2, 10, 10))))
    nodule, touched = reading_masks(reading, [0, 0])
    assert nodule.array.sum() == 64 - 4
    assert touched.array.sum() == 100
    assert nodule.start.tolist() == [0, 1, 1]


def test_overlapping_readings_of_different_readers_are_one_nodule() -> None:
    boxes = [(0, 5, 5, 9, 9), (1, 6, 6, 10, 10), (2, 5, 6, 9, 10), (0, 15, 15, 18, 18)]
    assert grouped(boxes) == [[0, 1, 2], [3]]


def test_near_readings_join_within_the_tolerance_only() -> None:
    boxes = [(0, 2, 2, 6, 6), (1, 2, 9, 6, 12)]  # outlines at x = 6 and 8: two pixels apart
    assert grouped(boxes, tolerance_mm=2.0) == [[0, 1]]
    assert grouped(boxes, tolerance_mm=1.9) == [[0], [1]]


def test_a_small_reading_within_a_large_one_joins_it() -> None:
    assert grouped([(0, 2, 2, 20, 20), (1, 10, 10, 12, 12)]) == [[0, 1]]


def test_second_part_of_a_split_nodule_stays_alone() -> None:
    boxes = [(0, 2, 2, 10, 12), (1, 2, 2, 10, 8), (1, 2, 9, 10, 12), (2, 2, 2, 10, 12)]
    assert grouped(boxes) == [[0, 1, 3], [2]]


def test_unknown_readers_make_at_most_four() -> None:
    boxes = [(None, 5, 5, 9 + n, 9) for n in range(5)]
    assert sorted(map(len, grouped(boxes))) == [1, 4]


def test_consensus_takes_voxels_of_two_of_four_readers() -> None:
    masks = [box_mask(0, 0, 4, 4), box_mask(1, 0, 5, 4), box_mask(2, 2, 3, 9)]
    agreed = consensus(masks)
    assert agreed is not None
    full = np.zeros((6, 10), dtype=int)
    for mask in masks:
        (_, y, x), (_, y1, x1) = mask.start, mask.stop
        full[y:y1, x:x1] += 1
    (_, y, x), (_, y1, x1) = agreed.start, agreed.stop
    np.testing.assert_array_equal(agreed.array[0], full[y:y1, x:x1] >= 2)
    assert agreed.array.sum() == (full >= 2).sum()
    assert consensus([masks[0]]) is None
    assert consensus([masks[0], box_mask(7, 7, 9, 9)]) is None


def test_missing_readers_count_as_zero_in_the_published_rule() -> None:
    assert not is_malignant([5, 5], "nndetection")
    assert is_malignant([5, 5], "mean-of-readers")
    assert is_malignant([3, 3, 3, 3], "nndetection")
    assert not is_malignant([None], "mean-of-readers")


def test_download_becomes_a_data_set(tmp_path: Path) -> None:
    src = tmp_path / "src"
    nodules = [
        [drawn(2, 5, 5, 10, 10, malignancy=4)],
        [drawn(2, 5, 5, 10, 11, malignancy=4)],
        [drawn(2, 6, 5, 10, 10, malignancy=5), drawn(4, 16, 16, 20, 20, malignancy=5)],
        [],
    ]
    write_scan(src, "LIDC-IDRI-0001", SERIES + "1", nodules)
    write_scan(src, "LIDC-IDRI-0002", SERIES + "2", [[], [], [], []])
    write_scan(src, "LIDC-IDRI-0002", SERIES + "3", [[], [], [], []])
    write_scan(src, "LIDC-IDRI-0001", SERIES + "9", None, modality="DX")
    report = convert(src, tmp_path / "out", workers=0)
    assert report.failures == []
    assert (report.num_cases, report.num_objects) == (3, 1)
    assert any("1 nodules without a voxel of two readers" in note for note in report.notes)
    raw = RawDataset.open(tmp_path / "out")
    assert raw.class_names == ("benign", "malignant")
    groups = read_json(tmp_path / "out" / "groups.json")
    assert groups == {
        "LIDC-IDRI-0001": "LIDC-IDRI-0001",
        "LIDC-IDRI-0002a": "LIDC-IDRI-0002",
        "LIDC-IDRI-0002b": "LIDC-IDRI-0002",
    }
    origins = read_json(tmp_path / "out" / "origins.json")
    assert origins["LIDC-IDRI-0002b"] == [f"dicom:{SERIES}3"]
    case = next(c for c in (*raw.cases, *raw.test_cases) if c.case_id == "LIDC-IDRI-0001")
    image = case.read_image()
    objects = case.read_objects(image.grid)
    assert objects.boxes.tolist() == [[2, 5, 5, 4, 10, 10]]
    assert objects.labels.tolist() == [1]  # 13 / 4
    # the pixels under the nodule are bright in the miniature: rows and columns fit the image
    assert (image.array[0][np.asarray(objects.instances) > 0] == 100).all()
    with pytest.raises(DataError, match=r"converted with .*malignancy nndetection"):
        convert(src, tmp_path / "out", malignancy="mean-of-readers")


def test_annotations_may_be_the_tables(tmp_path: Path) -> None:
    src = tmp_path / "src"
    write_scan(src, "LIDC-IDRI-0001", SERIES + "1", None)
    write_scan(src, "LIDC-IDRI-0003", SERIES + "3", None)
    write_tables(tmp_path / "tables", SERIES + "1")
    report = convert(src, tmp_path / "out", workers=0, annotations=tmp_path / "tables")
    assert (report.num_cases, report.num_objects) == (1, 1)
    assert report.notes == ["1 CT series without reader annotations were left out"]


def test_outline_off_the_slices_fails_its_case(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = tmp_path / "src"
    write_scan(src, "LIDC-IDRI-0001", SERIES + "1", [[drawn(40, 5, 5, 9, 9)], [], [], []])
    write_scan(src, "LIDC-IDRI-0002", SERIES + "2", [[], [], [], []])
    report = convert(src, tmp_path / "out", workers=0)
    assert report.num_cases == 1
    assert "LIDC-IDRI-0001: an outline lies on none of the slices" in capsys.readouterr().err


def test_broken_files_cost_their_scan_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = tmp_path / "src"
    for number in (1, 2, 3):
        write_scan(src, f"LIDC-IDRI-000{number}", f"{SERIES}{number}", [[], [], [], []])
    next((src / "LIDC-IDRI-0001").rglob("*.xml")).write_text("<LidcReadMessage>")
    for path in (src / "LIDC-IDRI-0002").rglob("*.dcm"):
        path.write_bytes(b"nothing")
    report = convert(src, tmp_path / "out", workers=0)
    assert (report.num_cases, len(report.failures)) == (1, 2)
    told = capsys.readouterr().err
    assert "069.xml: not readable as XML" in told
    assert "none of its .dcm files can be read" in told


def test_wrong_layouts_say_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected an XML file per CT series"):
        convert(tmp_path, tmp_path / "out")
    write_tables(tmp_path / "tables", SERIES + "1")
    with pytest.raises(DataError, match="expected LIDC-IDRI-XXXX/STUDY/SERIES"):
        convert(tmp_path, tmp_path / "out", annotations=tmp_path / "tables")
    broken = tmp_path / "LIDC-IDRI-0001" / "069.xml"
    broken.parent.mkdir()
    broken.write_text("<LidcReadMessage>")
    with pytest.raises(DataError, match=r"069\.xml: not readable as XML"):
        convert(tmp_path, tmp_path / "out")


def test_xml_of_radiographs_and_single_points_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.xml"
    path.write_text('<IdriReadMessage xmlns="http://www.nih.gov/idri"/>')
    assert read_xml(path) is None
    point = drawn(2, 5, 5, 9, 9)
    small = Drawn(point.contours[:1], None)
    small.contours[0][1][:] = [(5, 5)]
    path.write_text(xml_text(SERIES, [[small], [], [], []]))
    assert read_xml(path) == (SERIES, ())


def test_real_tables_have_the_published_counts(shared: Path) -> None:
    folder = shared / "data" / "lidc_annotations"
    readings = read_tables(folder)
    listed = [reading for of_scan in readings.values() for reading in of_scan]
    assert len(readings) == 1018
    assert len(listed) == 6859
    assert sum(len(reading.contours) for reading in listed) == 41406
    assert sum(not of_scan for of_scan in readings.values()) == 135
    scores = Counter(reading.malignancy for reading in listed)
    assert scores == {1: 1020, 2: 1580, 3: 2606, 4: 962, 5: 691}
    patients = Counter(row["patient_id"] for row in table(folder / "scans.csv"))
    assert len(patients) == 1010
    assert sum(count == 2 for count in patients.values()) == 8


@pytest.mark.slow
def test_real_outlines_give_the_nodules_of_luna16(shared: Path) -> None:
    folder, protocol = shared / "data" / "lidc_annotations", shared / "data" / "luna16_protocol"
    readings = read_tables(folder)
    published = Counter(row["seriesuid"] for row in table(protocol / "annotations.csv"))
    luna = set((protocol / "seriesuids.csv").read_text().split())
    heights = defaultdict(list)
    for row in table(folder / "slice_z.csv.gz"):
        heights[row["scan_id"]].append(float(row["z_mm"]))
    agreed: dict[str, int] = {}
    sizes: Counter[int] = Counter()
    volumes, vanished = [], 0
    for row in table(folder / "scans.csv"):
        uid, pixel = row["series_instance_uid"], float(row["pixel_spacing_mm"])
        z = np.unique(heights[row["scan_id"]])
        spacing = (float(np.median(np.diff(z))), pixel, pixel)
        masks = [reading_masks(r, _slices(r, z)) for r in readings[uid]]
        groups = group_readings(
            readings[uid],
            [touched for _, touched in masks],
            spacing_mm=spacing,
            tolerance_mm=spacing[0],
        )
        sizes.update(map(len, groups))
        agreed[uid] = sum(len(group) >= 3 for group in groups)
        for group in groups:
            mask = consensus([masks[index][0] for index in group])
            vanished += mask is None
            if mask is not None:
                volumes.append(float(mask.array.sum() * np.prod(spacing)))
    # 1189 nodules of at least three readers in LUNA16's scans; it lists 1186, in 885 scans as many
    assert abs(sum(agreed[uid] for uid in luna) - 1186) <= 5
    assert sum(agreed[uid] == published[uid] for uid in luna) >= 883
    assert 2600 <= sum(sizes.values()) <= 2700
    assert set(sizes) == {1, 2, 3, 4}
    assert vanished < sizes[1] + 10  # a single reader is no majority, two nearly always share
    assert len(volumes) == 1884  # the objects of arXiv 2509.15947, table 1
    low, middle, high = np.percentile(volumes, [1, 50, 99])
    assert 4 < low < 40
    assert 80 < middle < 300  # a sphere of 6 mm has 113 cubic mm
    assert 2000 < high < 20000


@dataclass
class Drawn:
    contours: list[tuple[float, list[tuple[int, int]], bool]]
    malignancy: int | None


def drawn(first: int, y0: int, x0: int, y1: int, x1: int, *, malignancy: int | None = 3) -> Drawn:
    """A nodule on two slices from index `first` on."""
    outline = square(y0, x0, y1, x1)
    return Drawn([(Z0 + STEP * (first + n), list(outline), True) for n in (0, 1)], malignancy)


def contour(points: Sequence[Sequence[int]]) -> Contour:
    return Contour(0.0, np.array(points, dtype=np.int64), True)


def box_mask(y0: int, x0: int, y1: int, x1: int) -> VoxelMask:
    return VoxelMask(np.array([0, y0, x0]), np.ones((1, y1 - y0, x1 - x0), dtype=bool))


def grouped(
    boxes: Sequence[tuple[int | None, int, int, int, int]], *, tolerance_mm: float = 1.0
) -> list[list[int]]:
    readings = [Reading(reader, 3, (contour(square(*box)),)) for reader, *box in boxes]
    touched = [reading_masks(reading, [0])[1] for reading in readings]
    return group_readings(readings, touched, spacing_mm=(2.0, 1.0, 1.0), tolerance_mm=tolerance_mm)


def xml_text(uid: str, sessions: Sequence[Sequence[Drawn]]) -> str:
    parts = [
        '<?xml version="1.0" encoding="UTF-8"?>\n<LidcReadMessage uid="1.3.6.1" '
        'xmlns="http://www.nih.gov" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance">\n'
        "<ResponseHeader><Version>1.8.1</Version>"
        f"<SeriesInstanceUid>{uid}</SeriesInstanceUid></ResponseHeader>"
    ]
    for session in sessions:
        parts.append("<readingSession><servicingRadiologistID>anon</servicingRadiologistID>")
        for number, nodule in enumerate(session):
            parts.append(f"<unblindedReadNodule><noduleID>Nodule 00{number}</noduleID>")
            if nodule.malignancy is not None:
                parts.append(
                    "<characteristics><subtlety>5</subtlety>"
                    f"<malignancy>{nodule.malignancy}</malignancy></characteristics>"
                )
            for z, points, inclusion in nodule.contours:
                parts.append(
                    f"<roi><imageZposition>{z}</imageZposition><imageSOP_UID>1.2</imageSOP_UID>"
                    f"<inclusion>{str(inclusion).upper()}</inclusion>"
                )
                parts += [
                    f"<edgeMap><xCoord>{x}</xCoord><yCoord>{y}</yCoord></edgeMap>"
                    for x, y in points
                ]
                parts.append("</roi>")
            parts.append("</unblindedReadNodule>")
        parts.append(
            "<nonNodule><nonNoduleID>9</nonNoduleID><imageZposition>1</imageZposition>"
            "<locus><xCoord>3</xCoord><yCoord>4</yCoord></locus></nonNodule></readingSession>"
        )
    return "".join([*parts, "</LidcReadMessage>"])


def write_scan(
    src: Path,
    patient: str,
    uid: str,
    sessions: Sequence[Sequence[Drawn]] | None,
    *,
    modality: str = "CT",
) -> None:
    folder = src / patient / f"01-01-2000-{uid[-2:]}" / f"3000566-{uid[-2:]}"
    folder.mkdir(parents=True)
    pixels = np.zeros((8, SIZE, SIZE), dtype=np.int16)
    for session in sessions or ():
        for nodule in session:
            for z, points, _ in nodule.contours:
                (x0, y0), (x1, y1) = np.min(points, axis=0) + 1, np.max(points, axis=0)
                if (index := round((z - Z0) / STEP)) < len(pixels):
                    pixels[index, y0:y1, x0:x1] = 100
    for index in range(len(pixels)):  # file numbers run from head to feet, as in real scans
        write_slice(
            folder / f"1-{len(pixels) - index:03d}.dcm",
            pixels[index],
            index,
            patient,
            uid,
            modality,
        )
    if sessions is not None:
        (folder / "069.xml").write_text(xml_text(uid, sessions))


def write_slice(
    path: Path, pixels: NDArray[np.int16], index: int, patient: str, uid: str, modality: str
) -> None:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = UID(f"{uid}.{index + 1}")
    content: dict[str, Any] = {
        "SOPClassUID": CTImageStorage,
        "SOPInstanceUID": f"{uid}.{index + 1}",
        "StudyInstanceUID": f"{uid}.77",
        "SeriesInstanceUID": uid,
        "Modality": modality,
        "PatientID": patient,
        "InstanceNumber": str(8 - index),
        "ImagePositionPatient": [-10.0, -20.0, Z0 + STEP * index],
        "ImageOrientationPatient": [1.0, 0.0, 0.0, 0.0, 1.0, 0.0],
        "PixelSpacing": [0.7, 0.7],
        "SliceThickness": str(STEP),
        "Rows": SIZE,
        "Columns": SIZE,
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 1,
        "RescaleSlope": "1",
        "RescaleIntercept": "0",
        "PixelData": pixels.tobytes(),
    }
    dataset = Dataset()
    for name, value in content.items():
        setattr(dataset, name, value)
    dataset.file_meta = meta
    dataset.save_as(path, enforce_file_format=True)


def write_tables(folder: Path, uid: str) -> None:
    folder.mkdir()
    (folder / "scans.csv").write_text(
        "scan_id,patient_id,study_instance_uid,series_instance_uid,slice_thickness_mm,"
        f"pixel_spacing_mm,contrast_used,n_slices\n1,LIDC-IDRI-0001,1.2,{uid},2.5,0.7,0,8\n"
    )
    (folder / "readings.csv").write_text(
        "reading_id,scan_id,nodule_id_of_reader,subtlety,internalStructure,calcification,"
        "sphericity,margin,lobulation,spiculation,texture,malignancy\n"
        "1,1,3,5,1,6,3,4,1,1,5,3\n2,1,4,4,1,6,4,4,1,2,5,3\n"
    )
    text = ";".join(f"{x},{y}" for x, y in square(5, 5, 9, 9))
    with gzip.open(folder / "contours.csv.gz", "wt") as stream:
        stream.write("contour_id,reading_id,inclusion,image_z_position_mm,coords_xy\n")
        for number in (1, 2):
            stream.write(f'{number},{number},1,{Z0 + STEP},"{text}"\n')


def table(path: Path) -> list[Mapping[str, str]]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt") as stream:
        return list(csv.DictReader(stream))


def _slices(reading: Reading, heights: NDArray[np.float64]) -> list[int]:
    found = [int(np.abs(heights - one.z_mm).argmin()) for one in reading.contours]
    off = [abs(heights[k] - one.z_mm) for k, one in zip(found, reading.contours, strict=True)]
    assert max(off, default=0.0) < 0.01  # every outline lies on a slice
    return found


def _slow(points: NDArray[np.int64], x: int, y: int) -> tuple[bool, int]:
    on, crossings = False, 0
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
        cross = (x1 - x0) * (y - y0) - (x - x0) * (y1 - y0)
        between = min(x0, x1) <= x <= max(x0, x1) and min(y0, y1) <= y <= max(y0, y1)
        on |= bool(cross == 0 and between)
        if (y0 <= y) != (y1 <= y):
            crossings += bool(x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return on, crossings
