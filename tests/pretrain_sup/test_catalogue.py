"""The catalogue is table 4 of the paper: every cell, right or corrected; and it tells leakage."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from voxelbridge.core.command_line import run_app
from voxelbridge.core.config import validate
from voxelbridge.core.data.known_overlaps import KnownOverlaps, read_known_overlaps
from voxelbridge.core.errors import ConfigError
from voxelbridge.pretrain_sup.catalogue import (
    Catalogue,
    conflicts,
    leakage_notes,
    overlaps_of,
    read_catalogue,
)
from voxelbridge.pretrain_sup.cli import app

# In the list of known overlaps, but neither pre-training data sets of the paper nor D01 to D08.
OTHERS = {"abdomenct-1k", "cads", "mama-mia", "panorama", "ribseg"}
COLUMNS = ("name", "images", "modality", "targets", "links")
PRINTED_SUM = 21_425  # of the counts as printed; PROMISE12 has none


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return read_catalogue()


@pytest.fixture(scope="module")
def known() -> KnownOverlaps:
    return read_known_overlaps()


def call(*arguments: str) -> int:
    try:
        run_app(app, arguments)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def table_4(paper: Path) -> list[list[str]]:
    """The cells of the table, without references to the literature, links with https."""
    lines = paper.read_text(encoding="utf-8").splitlines()
    begin = next(n for n, line in enumerate(lines) if line.startswith("Dataset\t# Images"))
    rows = []
    for line in lines[begin + 1 :]:
        if line.startswith("<b>"):
            return rows
        if line.strip():
            cells = [re.sub(r"<[^>]*>", "", cell).strip() for cell in line.split("\t")]
            cells[0] = re.sub(r" \[[\d,]+\]$", "", cells[0])
            cells[2] = ", ".join(cells[2].split(",")) if cells[2] else ""
            cells[4] = cells[4].replace(" , ", ", ").replace("http://", "https://")
            rows.append(cells)
    raise AssertionError("the table has no end")


def tree(**entry: Any) -> dict[str, Any]:
    right = {
        "row": 1, "id": "one", "name": "One", "images": 3, "modality": ["CT"], "targets": "liver",
        "links": ["https://one.org/"],
    }  # fmt: skip
    return {
        "schema": 1, "source": "s", "printed_datasets": 1, "printed_images": 3, "findings": [],
        "datasets": [right | entry],
    }  # fmt: skip


def test_every_cell_is_the_printed_one_or_corrected(catalogue: Catalogue, shared: Path) -> None:
    printed = table_4(shared / "paper" / "the_missing_piece.md")
    ours = [[entry.printed(column) for column in COLUMNS] for entry in catalogue.datasets]
    assert ours == printed


def test_the_images_add_up_to_the_printed_total_once_four_counts_are_right(
    catalogue: Catalogue,
) -> None:
    assert len(catalogue.datasets) == catalogue.printed_datasets == 65
    assert catalogue.num_images == catalogue.printed_images == 21_436
    counts = [entry.printed("images") for entry in catalogue.datasets]
    assert sum(int(count) for count in counts if count.isdigit()) == PRINTED_SUM
    wrong = {
        entry.id: entry.printed("images")
        for entry in catalogue.datasets
        if entry.printed("images") != str(entry.images)
    }
    assert wrong == {"promise12": "MRI", "acdc": "209", "atriaseg": "190", "crossmoda2022": "108"}


def test_every_id_of_the_known_overlaps_is_an_entry_or_another_data_set(
    catalogue: Catalogue, known: KnownOverlaps
) -> None:
    ids = {entry.id for entry in catalogue.datasets}
    measured = {dataset.slug for dataset in known.datasets if dataset.detection}
    assert {dataset.slug for dataset in known.datasets} - ids - measured == OTHERS
    assert not ids & measured
    for entry in catalogue.datasets:  # a name must lead to its own entry in both lists
        assert known.slug(entry.name) in (None, entry.id)
        assert catalogue.find(entry.name) == catalogue.find(entry.id) == entry


def test_entries_that_share_scans_with_detection_data_sets(
    catalogue: Catalogue, known: KnownOverlaps
) -> None:
    found: dict[str, set[str]] = {}
    for entry in catalogue.datasets:
        for overlap in overlaps_of(entry, known):
            number = known.dataset(overlap.between[1]).detection
            if number and overlap.certainty == "known":
                found.setdefault(number, set()).add(entry.id)
    assert found == {"D01": {"abdomenatlas"}, "D03": {"abdomenatlas", "sega"}}


def test_the_page_lists_every_correction_and_finding(catalogue: Catalogue) -> None:
    page = (Path(__file__).parents[2] / "docs" / "catalogue.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("|")]
    for entry in catalogue.datasets:
        for wrong in entry.corrections:
            texts = (wrong.printed.removeprefix("https://"), wrong.right.removeprefix("https://"))
            begin = f"| {entry.row} | {entry.name} | {wrong.field} | "
            (row,) = (row for row in rows if row.startswith(begin))
            assert all(text in row for text in (*texts, wrong.why))
    for finding in catalogue.findings:
        assert f"| {finding.what} | {finding.printed} | {finding.found} | {finding.why} |" in rows


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"images": 0}, "images"),
        ({"links": ["http://one.org/"]}, "links"),
        ({"id": "One Two"}, "id"),
        ({"row": 2}, "not numbered"),
        ({"modality": ["XR"]}, "modality"),
        ({"size": 3}, "size"),
        (
            {"corrections": [
                {"field": "images", "printed": "4", "right": "5", "why": "", "basis": "table"}
            ]},
            "correction of images from '4' to '5', but the value is '3'",
        ),
        (
            {"corrections": [
                {"field": "name", "printed": "One", "right": "One", "why": "", "basis": "table"}
            ]},
            "correction of name",
        ),
    ],
)  # fmt: skip
def test_a_catalogue_that_makes_no_sense_is_refused(entry: dict[str, Any], message: str) -> None:
    assert validate(Catalogue, tree(), where="t").num_images == 3
    with pytest.raises(ConfigError, match=re.escape(message)):
        validate(Catalogue, tree(**entry), where="t")


def test_an_id_or_name_listed_twice_is_refused() -> None:
    twice = tree()
    twice["datasets"].append(twice["datasets"][0] | {"row": 2, "id": "two", "name": "o-n-e"})
    with pytest.raises(ConfigError, match="listed twice: one"):
        validate(Catalogue, twice, where="t")


def test_conflicts_of_names_with_a_detection_data_set() -> None:
    names = ["AbdomenAtlas1.1Mini", "Dataset009_Spleen", "BTCV 2", "spine-mets"]
    found = conflicts(names, "D01")
    assert [(c.dataset, c.detection, c.certainty) for c in found] == [
        ("abdomenatlas", "D01", "known"),
        ("msd-spleen", "D01", "possible"),
    ]
    assert "BDMAP" in (found[0].exclude or "")
    assert conflicts(["sega", "SegA", "AVT"], "kits21") == conflicts(["sega"], "D03")
    assert [c.certainty for c in conflicts(["kits19"], "d03")] == ["same"]
    assert [c.certainty for c in conflicts(["LUNA16"], "D04")] == ["known"]
    assert [c.certainty for c in conflicts(["LIDC-IDRI"], "D06")] == ["known"]
    assert conflicts(["btcv"], "D01") == conflicts([], "D01") == []


def test_unknown_names_are_refused_with_a_hint() -> None:
    with pytest.raises(ConfigError, match="did you mean segthor"):
        conflicts(["segthorr"], "D01")
    with pytest.raises(ConfigError, match=r"D99: no detection data set; there are D01 \(msd-panc"):
        conflicts(["sega"], "D99")
    with pytest.raises(ConfigError, match="btcv: no detection data set"):
        conflicts(["sega"], "btcv")


def test_notes_for_a_store_name_what_it_spoils_and_pass_over_other_names() -> None:
    notes = leakage_notes(["mine", "Dataset220_KiTS2023", "sega"])
    assert [note.partition(":")[0] for note in notes] == [
        "Dataset220_KiTS2023 holds scans of D03 (KiTS (19, 21, 23))",
        "sega holds scans of D03 (KiTS (19, 21, 23))",
    ]
    assert leakage_notes(["mine"]) == []


def test_the_command_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("catalogue") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 65 + 2
    assert lines[12].split()[:4] == ["12", "AbdomenAtlas1.1Mini", "5195", "CT"]
    assert "D01 D03" in lines[12]
    assert lines[12].endswith("https://huggingface.co/datasets/AbdomenAtlas/_AbdomenAtlas1.1Mini")
    assert "65 data sets, 21,436 images" in lines[-2]


def test_the_command_lists_a_modality_and_conflicts(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("catalogue", "--modality", "pet") == 0
    out = capsys.readouterr().out
    assert "AutoPET1" in out
    assert "HECKTOR2022" in out
    assert "2 of 65 data sets, 1,538 images" in out
    assert call("catalogue", "--conflicts", "D03") == 0
    out = capsys.readouterr().out
    assert "K1 to K20 of SegA" in out
    assert "BTCV" not in out
    assert call("catalogue", "--conflicts", "D03", "--modality", "CT") == 0
    assert "SegA" not in capsys.readouterr().out  # CT angiography
    assert call("catalogue", "--conflicts", "D02") == 0
    assert "D02 (RibFrac): no overlap is known" in capsys.readouterr().out


def test_on_a_terminal_the_link_stands_below_the_targets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
    monkeypatch.setenv("COLUMNS", "160")
    assert call("catalogue", "--modality", "CBCT") == 0
    plain = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    assert "targets, link" in lines[0]
    assert lines[2].endswith("Jaw, Teeth, and Related Structures")
    assert lines[3] == "https://toothfairy2.grand-challenge.org/"


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("catalogue", "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert (content["num_datasets"], content["num_images"]) == (65, 21_436)
    assert content["conflicts_with"] is None
    sets = {entry["id"]: entry for entry in content["datasets"]}
    assert sets["msd-prostate"]["num_channels"] == 2
    assert sets["isles2022"]["num_channels"] is None
    assert sets["acdc"]["licence"] == "unknown"
    assert sets["acdc"]["corrections"][0]["printed"] == "209"
    assert {o["detection"] for o in sets["sega"]["overlaps"]} == {"D03"}
    assert call("catalogue", "--json", "--conflicts", "D01") == 0
    content = json.loads(capsys.readouterr().out)
    assert {c["dataset"] for c in content["conflicts"]} == {e["id"] for e in content["datasets"]}
    assert content["conflicts_with"] == "D01"


def test_the_command_refuses_what_is_no_detection_data_set(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call("catalogue", "--conflicts", "D09") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "D08 (cta-a)" in error


def test_neither_help_nor_the_command_imports_torch() -> None:
    code = (
        "import sys\n"
        "from voxelbridge.pretrain_sup.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'scipy', 'SimpleITK', 'blosc2'} & sys.modules.keys()"
    )
    for words in (["--help"], ["--conflicts", "D01"]):
        done = subprocess.run(
            [sys.executable, "-c", code, "catalogue", *words],
            check=True, timeout=60, capture_output=True, encoding="utf-8",
        )  # fmt: skip
        assert "D01" in done.stdout
