"""The frame of a report page: one HTML file that loads nothing, readable in light, dark and print.

What is text in an argument is escaped here; what is HTML says so.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from voxelbridge.core.errors import DataError

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
NOT_DEFINED = '<span class="none" title="not defined: no object of this kind">n/a</span>'


@dataclass(frozen=True)
class Section:
    """A part of the page with a link in its navigation; `key` is its id, `html` its content."""

    key: str
    title: str
    html: str


def html_page(
    title: str,
    sections: Sequence[Section],
    *,
    lede: str,
    facts: Mapping[str, str],
    distribution: str,
    style: str = "",
    tail: str = "",
) -> str:
    """The whole page. `lede` (under the title) and `tail` (end of the body: scripts) are HTML.

    `distribution` is the installed package that writes the page, `style` its CSS beside the
    common one.
    """
    common = (files("voxelbridge.core.report") / "assets" / "page.css").read_text(encoding="utf-8")
    writer = f"{distribution} {version(distribution)}"
    links = "".join(f'<li><a href="#{s.key}">{escape(s.title)}</a></li>' for s in sections)
    body = "".join(
        f'<section id="{s.key}" aria-labelledby="{s.key}-title">'
        f'<h2 id="{s.key}-title">{escape(s.title)}</h2>{s.html}</section>\n'
        for s in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="{escape(writer)}">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{common}{style}</style>
</head>
<body>
<header><h1>{escape(title)}</h1><p class="lede">{lede}</p>{facts_list(facts)}</header>
<nav aria-label="Sections"><ul>{links}</ul></nav>
<main>
{body}</main>
<footer><p><strong>Research use only, not a medical device.</strong> Written by {escape(writer)};
this file needs no network.</p></footer>
{tail}</body>
</html>
"""


def facts_list(facts: Mapping[str, str]) -> str:
    """What was run, as a compact list of terms."""
    items = "".join(
        f"<div><dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd></div>"
        for name, value in facts.items()
    )
    return f'<dl class="facts">{items}</dl>' if items else ""


def notes_list(notes: Sequence[str]) -> str:
    """Remarks, one per line; empty where there are none."""
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<ul class="notes">{items}</ul>' if items else ""


def figures_table(
    caption: str, corner: str, heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]
) -> str:
    """A table with a named first column; `heads` and row names are text, cells are HTML."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in (corner, *heads))
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        f"{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for name, cells in rows
    )
    return (
        f'<div class="scroll"><table class="figures"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def figure_cell(value: float | None, *, form: str = ".3f") -> str:
    """A value in the format `form` to read, as HTML; the exact one stays in the markup."""
    if value is None or value != value:
        return NOT_DEFINED
    return f'<data value="{value!r}" title="{value!r}">{value:{form}}</data>'


def png_figure(path: Path, caption: str, *, alt: str) -> str:
    """The <figure> of a PNG file, which the page then holds; DataError for another file."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not content.startswith(PNG_SIGNATURE):
        raise DataError(f"{path}: not a PNG file; delete it")
    source = f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}"
    return (
        f"<figure><figcaption>{escape(caption)}</figcaption>"
        f'<img src="{source}" alt="{escape(alt)}"></figure>'
    )
