"""The frame of a page: complete, escaped, loads nothing."""

import re
from pathlib import Path

import numpy as np

from voxelbridge.core.report.page import (
    PNG_SIGNATURE,
    Section,
    facts_list,
    figure_cell,
    figures_table,
    html_page,
    notes_list,
    png_figure,
)

HOSTILE = "</style><script>alert(1)</script>&\"'"


def page(**changes: str) -> str:
    sections = [Section("one", "First <part>", "<p>1</p>"), Section("two", "Second", "<p>2</p>")]
    return html_page(
        changes.get("title", "Title"),
        sections,
        lede="<b>lede</b>",
        facts={"name": changes.get("fact", "value")},
        distribution="voxelbridge-core",
        style=".own { color: red; }",
        tail="<script>go()</script>",
    )


def test_page_has_its_parts_in_order() -> None:
    text = page()
    assert text.startswith("<!DOCTYPE html>")
    places = [
        text.index(part)
        for part in (
            "<title>Title</title>", "--ink", ".own {", "<h1>Title</h1>", "<b>lede</b>",
            "<dt>name</dt><dd>value</dd>", '<a href="#two">Second</a>', '<section id="one"',
            "<p>1</p>", '<section id="two"', "not a medical device", "<script>go()</script>",
            "</html>",
        )
    ]  # fmt: skip
    assert places == sorted(places)
    assert "First &lt;part&gt;" in text


def test_names_stay_text() -> None:
    text = page(title=HOSTILE, fact=HOSTILE)
    assert text.count("<script>") == 1
    assert text.count("</style>") == 1
    assert HOSTILE not in facts_list({HOSTILE: HOSTILE})
    assert "<script>" not in notes_list([HOSTILE])
    assert "<script>" not in figures_table(HOSTILE, HOSTILE, [HOSTILE], [(HOSTILE, ["1"])])


def test_page_loads_nothing() -> None:
    text = page()
    assert "http" not in text
    assert "@import" not in text
    assert re.findall(r"url\((?!data:)", text) == []
    assert set(re.findall(r'href="(.*?)"', text)) == {"data:,", "#one", "#two"}


def test_cell_keeps_the_exact_value() -> None:
    assert figure_cell(1 / 3) == f'<data value="{1 / 3!r}" title="{1 / 3!r}">0.333</data>'
    assert ">0.3333<" in figure_cell(1 / 3, form=".4g")
    assert "n/a" in figure_cell(None)
    assert "n/a" in figure_cell(float(np.nan))


def test_nothing_to_list_is_nothing() -> None:
    assert facts_list({}) == ""
    assert notes_list([]) == ""


def test_pictures_are_never_wider_than_the_page(tmp_path: Path) -> None:
    picture = tmp_path / "wide.png"
    picture.write_bytes(PNG_SIGNATURE)
    section = Section("a", "A", png_figure(picture, "caption", alt="wide"))
    page = html_page("t", [section], lede="", facts={}, distribution="voxelbridge-core")
    assert "figure img { display: block; max-width: 100%; height: auto; }" in page
