"""Overlap of two case stores by what their indexes know."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from voxelbridge.core.cli import app
from voxelbridge.core.command_line import run_app
from voxelbridge.core.data.case_store import CaseStoreWriter
from voxelbridge.core.data.overlap import compare_stores, find_overlaps, origin_key
from voxelbridge.core.data.provenance import Provenance
from voxelbridge.core.data.volume import Grid
from voxelbridge.core.errors import DataError

A, B, C = "a" * 64, "b" * 64, "c" * 64


def store(root: Path, cases: dict[str, Provenance | None]) -> Path:
    writer = CaseStoreWriter(root)
    grid = Grid.from_parts((4, 4, 4), (1, 1, 1))
    for case_id, provenance in cases.items():
        image = np.zeros((1, 4, 4, 4), dtype=np.float32)
        writer.write_case(case_id, image, grid=grid, boxes=[], labels=[], provenance=provenance)
    writer.finish()
    return root


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        run_app(app, arguments)
    return int(end.value.code or 0)


def pairs(a: Provenance, b: Provenance) -> list[tuple[str, ...]]:
    return [overlap.reasons for overlap in find_overlaps({"x": a}, {"y": b})]


def test_an_equal_hash_of_any_channel_is_an_overlap() -> None:
    assert pairs(Provenance(content_sha256=(A, B)), Provenance(content_sha256=(C, A))) == [
        ("image",)
    ]
    assert pairs(Provenance(content_sha256=(A,)), Provenance(content_sha256=(B,))) == []


def test_an_equal_origin_is_an_overlap_whatever_part_of_the_series_it_is() -> None:
    assert origin_key("dicom:1.2#b=50") == origin_key("dicom:1.2") == "dicom:1.2"
    first = Provenance(origin_ids=("dicom:1.2#b=50", "kits:1"))
    assert pairs(first, Provenance(origin_ids=("dicom:1.2#b=800",))) == [("origin",)]
    assert pairs(first, Provenance(origin_ids=("kits:1",))) == [("origin",)]
    assert pairs(first, Provenance(origin_ids=("dicom:1.20", "msd:1"))) == []


def test_a_patient_counts_within_one_data_set_only() -> None:
    def of(patient: str, *origins: str) -> Provenance:
        return Provenance(patient, origins)

    assert pairs(of("7", "lidc:a"), of("7", "lidc:b")) == [("patient",)]
    assert pairs(of("7", "lidc:a"), of("7", "kits:a")) == []
    assert pairs(of("7", "lidc:a"), of("8", "lidc:b")) == []
    assert pairs(of("7", "dicom:1"), of("7", "dicom:2")) == []
    assert pairs(of("7"), of("7")) == []


def test_several_reasons_and_pairs_come_sorted() -> None:
    shared = Provenance("7", ("lidc:a",), (A,))
    found = find_overlaps({"q": shared, "p": shared, "o": Provenance()}, {"z": shared})
    assert [(o.first, o.second, o.reasons) for o in found] == [
        ("p", "z", ("image", "origin", "patient")),
        ("q", "z", ("image", "origin", "patient")),
    ]


def test_stores_are_compared_and_cases_without_provenance_counted(tmp_path: Path) -> None:
    a = store(tmp_path / "a", {"1": Provenance(None, ("dicom:9",), (A,)), "2": None, "3": None})
    b = store(tmp_path / "b", {"one": Provenance(None, (), (A,)), "x": Provenance("p")})
    found = compare_stores(a, b)
    assert [(o.first, o.second) for o in found.overlaps] == [("1", "one")]
    assert found.num_cases == (3, 2)
    assert found.without_provenance == (2, 1)
    with pytest.raises(DataError, match=r"no index\.jsonl"):
        compare_stores(a, tmp_path)


def test_command_ends_with_one_on_overlap_and_names_both_cases(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = store(tmp_path / "a", {"1": Provenance(None, ("dicom:9",), (A,)), "2": None})
    b = store(tmp_path / "b", {"one": Provenance(None, ("dicom:9",), (A,))})
    c = store(tmp_path / "c", {"other": Provenance(None, ("dicom:8",), (B,))})
    assert run("overlap", str(a), str(b)) == 1
    out, err = capsys.readouterr()
    assert "1  one  (same image, origin)" in out
    assert "2 cases, 1 without provenance that cannot be compared" in out
    assert err.count("\n") == 1
    assert run("overlap", str(a), str(c)) == 0
    assert "0 overlapping pairs" in capsys.readouterr().out
    assert run("overlap", str(a), str(b), "--json") == 1
    content = json.loads(capsys.readouterr().out)
    assert content == {
        "schema": 1,
        "stores": [str(a), str(b)],
        "num_cases": [2, 1],
        "without_provenance": [1, 0],
        "overlaps": [{"a": "1", "b": "one", "reasons": ["image", "origin"]}],
        "known_overlaps": [],
    }


def test_data_sets_known_to_share_scans_are_named_where_no_case_shows_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    atlas = Provenance(None, (), (A,), dataset="Dataset023_AbdomenAtlas1.1Mini")
    a = store(tmp_path / "a", {"BDMAP_00000001": atlas})
    b = store(tmp_path / "b", {"case_00000": Provenance(None, ("kits:case_00000",), (B,))})
    assert [known.between for known in compare_stores(a, b).known] == [("abdomenatlas", "kits")]
    assert compare_stores(b, a).known == compare_stores(a, b).known
    assert run("overlap", str(a), str(b)) == 0  # a warning: the images may have been left out
    assert "warning: AbdomenAtlas Mini and KiTS (19, 21, 23) share" in capsys.readouterr().out
    assert run("overlap", str(a), str(b), "--json") == 0
    known = json.loads(capsys.readouterr().out)["known_overlaps"]
    assert [(item["between"], item["certainty"]) for item in known] == [
        (["abdomenatlas", "kits"], "known")
    ]


def test_a_store_without_provenance_is_known_by_its_folder(tmp_path: Path) -> None:
    a, b = store(tmp_path / "SegA", {"K1": None}), store(tmp_path / "kits21", {"1": None})
    assert [known.between for known in compare_stores(a, b).known] == [("sega", "kits")]


def test_without_the_data_extra_the_command_says_what_to_install(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['blosc2'] = None; "
        "from voxelbridge.core.cli import app; from voxelbridge.core.command_line import run_app; "
        f"run_app(app, ['overlap', {str(tmp_path)!r}, {str(tmp_path)!r}])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 1
    assert "install voxelbridge-core[data]" in done.stderr
    assert done.stderr.count("\n") == 1
