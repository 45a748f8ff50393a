"""The index: lines that lead nowhere else, old lines, and 100 000 of them."""

import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from voxelbridge.core.data.batches import step_batches
from voxelbridge.core.data.case_store import CaseStore, CaseStoreWriter
from voxelbridge.core.data.provenance import Provenance
from voxelbridge.core.errors import DataError

MANY = 100_000
FILE = {"bytes": 12345678, "sha256": "0" * 64}
LINE: dict[str, Any] = {
    "shape": [1, 200, 300, 300],
    "spacing_mm": [1.0, 0.7, 0.7],
    "boxes": [[1.5, 2.5, 3.5, 40.25, 50.5, 60.125], [1, 2, 3, 4, 5, 6]],
    "labels": [0, 1],
    "files": dict.fromkeys(("case", "image", "instances", "locations", "mask.body"), FILE),
    "provenance": {
        "patient": "p",
        "origins": ["dicom:1.3.6.1.4.1.14519.5.2.1.6279.6001.1234567890"],
        "content_sha256": ["f" * 64],
    },
}


def _write_index(root: Path, lines: Iterable[dict[str, Any]]) -> None:
    rows = [json.dumps(line) for line in lines]
    body = ("\n".join(rows) + "\n").encode()
    digest = hashlib.sha256(body).hexdigest()
    header = {"schema": 1, "num_cases": len(rows), "cases_sha256": digest}
    (root / "index.jsonl").write_bytes(json.dumps(header).encode() + b"\n" + body)


def test_record_carries_everything_of_its_line(tmp_path: Path) -> None:
    _write_index(tmp_path, [{"case_id": "a", **LINE}])
    (record,) = CaseStore.open(tmp_path).cases
    assert record.shape == (1, 200, 300, 300)
    assert record.mask_names == ("body",)
    assert record.files["mask.body"].num_bytes == 12345678
    assert record.provenance == Provenance(
        "p", ("dicom:1.3.6.1.4.1.14519.5.2.1.6279.6001.1234567890",), ("f" * 64,)
    )


def test_line_without_the_newer_keys_is_read(tmp_path: Path) -> None:
    old = {key: value for key, value in LINE.items() if key != "provenance"}
    _write_index(tmp_path, [{"case_id": "a", **old, "files": {"case": FILE, "image": FILE}}])
    (record,) = CaseStore.open(tmp_path).cases
    assert record.provenance == Provenance()
    assert record.mask_names == ()


def test_names_that_lead_out_of_the_store_are_never_followed(tmp_path: Path) -> None:
    _write_index(tmp_path, [{"case_id": "../../a", **LINE}])
    with pytest.raises(DataError, match="damaged"):
        CaseStore.open(tmp_path)
    _write_index(tmp_path, [{"case_id": "a", **LINE, "files": {"mask./../../../b": FILE}}])
    assert not CaseStore.open(tmp_path).cases[0].files


@pytest.mark.slow
def test_100_000_cases_open_in_little_memory_and_feed_a_loader(tmp_path: Path) -> None:
    _write_index(tmp_path, ({"case_id": f"case_{n:06d}", **LINE} for n in range(MANY)))
    before = _resident_megabytes()
    start = time.perf_counter()
    store = CaseStore.open(tmp_path)
    opened = time.perf_counter() - start
    grown = _resident_megabytes() - before
    assert len(store.cases) == MANY
    assert store.record("case_099999").boxes.shape == (2, 6)

    def make(step: int, rng: np.random.Generator) -> tuple[int, str]:
        return step, store.cases[int(rng.integers(MANY))].case_id

    start = time.perf_counter()
    first = next(iter(step_batches(make, seed=0, first_step=0, steps=10, workers=2)))
    started = time.perf_counter() - start
    print(f"opened in {opened:.1f} s, {grown:.0f} MB; first batch after {started:.2f} s")
    assert first[0] == 0
    assert grown < 1000  # times depend on what else the machine does: they are printed


def test_one_changed_case_among_thousands_is_found_by_name(tmp_path: Path) -> None:
    writer = CaseStoreWriter(tmp_path)
    (tmp_path / "cases").mkdir()
    count = 5000
    for number in range(count):
        _fake_case(tmp_path, f"case_{number:06d}")
    start = time.perf_counter()
    assert all(writer.is_done(f"case_{number:06d}") for number in range(count))
    checked = time.perf_counter() - start
    start = time.perf_counter()
    writer.finish()
    finished = time.perf_counter() - start
    print(f"{count} cases: is_done {checked:.1f} s, finish {finished:.1f} s")
    store = CaseStore.open(tmp_path)
    (tmp_path / "cases" / "case_003210.b2nd").write_bytes(b"voxelz")
    problems = store.verify()
    assert len(problems) == 1
    assert "case case_003210: its content changed" in problems[0]
    index = tmp_path / "index.jsonl"
    index.write_bytes(index.read_bytes().replace(b"case_003210", b"case_x03210", 1))
    with pytest.raises(DataError, match="its content changed"):
        CaseStore.open(tmp_path)


def _fake_case(root: Path, name: str) -> None:
    """A case as far as the index is concerned; no array is ever opened."""
    stamp = {"bytes": 6, "sha256": hashlib.sha256(b"voxels").hexdigest()}
    content = {"schema": 1, "case_id": name, **LINE, "files": {"image": stamp}}
    (root / "cases" / f"{name}.b2nd").write_bytes(b"voxels")
    (root / "cases" / f"{name}.json").write_text(json.dumps(content))


def _resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
