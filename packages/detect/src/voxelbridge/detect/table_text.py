"""A table of figures as Markdown, LaTeX or HTML: two levels of heads, bold and underlined cells."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

DASH = "\N{EN DASH}"  # a cell without a figure

_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#",
    "%": r"\%", "_": r"\_", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}",
    "\N{PLUS-MINUS SIGN}": r"$\pm$", "\N{MINUS SIGN}": r"$-$", "<": r"\textless{}",
    ">": r"\textgreater{}", DASH: "--",
}  # fmt: skip
_MARKDOWN = re.compile(r"([\\`*_\[\]<>|])")


@dataclass(frozen=True)
class TextCell:
    """What a cell shows; `deviation` stands small behind the figure."""

    text: str
    bold: bool = False
    underlined: bool = False
    deviation: str = ""


@dataclass(frozen=True)
class TextTable:
    """Rows of cells under `heads`; `groups` are titles over that many heads each ("" for none).

    The first `num_names` columns name the row. Where the first name changes, a new part begins.
    """

    caption: str
    groups: Sequence[tuple[str, int]]
    heads: Sequence[str]
    rows: Sequence[Sequence[TextCell]]
    num_names: int
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        spans = sum(span for _, span in self.groups)
        if spans != len(self.heads) or any(len(row) != len(self.heads) for row in self.rows):
            raise ValueError(f"table: {spans} columns in groups, {len(self.heads)} heads")


def to_markdown(table: TextTable) -> str:
    """A pipe table: bold as `**`, underlined as `<u>`; titles of groups are put into the heads."""
    titles = [title for title, span in table.groups for _ in range(span)]
    heads = [
        _markdown(f"{title} {head}" if title else head)
        for title, head in zip(titles, table.heads, strict=True)
    ]
    marks = [":--"] * table.num_names + ["--:"] * (len(heads) - table.num_names)
    lines = [f"**{_markdown(table.caption)}**", "", _pipes(heads), _pipes(marks)]
    lines += [_pipes([_markdown_cell(cell) for cell in row]) for row in _shown_once(table)]
    lines += ["", *(f"- {_markdown(note)}" for note in table.notes)] if table.notes else []
    return "\n".join(lines) + "\n"


def to_latex(table: TextTable, *, label: str) -> str:
    """A `table*` environment; needs `\\usepackage{booktabs}` and `\\usepackage{graphicx}`."""
    count = len(table.heads)
    names, figures = "l" * table.num_names, "r" * (count - table.num_names)
    titled = [_latex_group(title, span) for title, span in table.groups]
    lines = [
        r"\begin{table*}[t]",
        rf"\caption{{{_latex(table.caption)}}}",
        rf"\label{{{re.sub(r'[^A-Za-z0-9:.-]', '-', label)}}}",
        r"\centering",
        r"\resizebox{\textwidth}{!}{%",
        rf"\begin{{tabular}}{{{names}{figures}}}",
        r"\toprule",
        *([" & ".join(titled) + r" \\", _rules(table)] if any(t for t, _ in table.groups) else []),
        " & ".join(_latex(head) for head in table.heads) + r" \\",
        r"\midrule",
    ]
    previous = table.rows[0][0].text if table.rows else ""
    for full, row in zip(table.rows, _shown_once(table), strict=True):
        if full[0].text != previous:
            lines.append(r"\midrule")
        previous = full[0].text
        lines.append(" & ".join(_latex_cell(cell) for cell in row) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}%", "}"]
    if table.notes:
        notes = r"\\ ".join(_latex(note) for note in table.notes)
        lines += [r"\par\smallskip\raggedright\footnotesize", notes]
    return "\n".join([*lines, r"\end{table*}"]) + "\n"


def to_html(table: TextTable) -> str:
    """A `<table>` with the classes of a report page, notes below."""
    groups = "".join(
        f'<th colspan="{span}" scope="colgroup">{escape(title)}</th>'
        for title, span in table.groups
    )
    top = f"<tr>{groups}</tr>" if any(title for title, _ in table.groups) else ""
    name_class = [' class="text"' if i < table.num_names else "" for i in range(len(table.heads))]
    heads = "".join(
        f'<th scope="col"{kind}>{escape(head)}</th>'
        for head, kind in zip(table.heads, name_class, strict=True)
    )
    body = []
    for row in _shown_once(table):
        names = "".join(
            f'<th scope="row" class="text">{escape(cell.text)}</th>'
            for cell in row[: table.num_names]
        )
        cells = "".join(f"<td>{_html_cell(cell)}</td>" for cell in row[table.num_names :])
        body.append(f"<tr>{names}{cells}</tr>")
    notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes)
    return (
        f'<div class="scroll"><table class="figures"><caption>{escape(table.caption)}</caption>'
        f"<thead>{top}<tr>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        + (f'<ul class="notes">{notes}</ul>' if notes else "")
    )


def _shown_once(table: TextTable) -> list[list[TextCell]]:
    """The rows with the first name only where it changes."""
    rows, previous = [], None
    for row in table.rows:
        same = table.num_names > 1 and row[0].text == previous
        rows.append([TextCell("") if same else row[0], *row[1:]])
        previous = row[0].text
    return rows


def _pipes(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown(text: str) -> str:
    return _MARKDOWN.sub(r"\\\1", text)


def _markdown_cell(cell: TextCell) -> str:
    text = _markdown(cell.text)
    text = f"<u>{text}</u>" if cell.underlined else text
    text = f"**{text}**" if cell.bold else text
    return f"{text} {_markdown(cell.deviation)}" if cell.deviation else text


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def _latex_cell(cell: TextCell) -> str:
    text = _latex(cell.text)
    text = rf"\underline{{{text}}}" if cell.underlined else text
    text = rf"\textbf{{{text}}}" if cell.bold else text
    return rf"{text} {{\tiny {_latex(cell.deviation)}}}" if cell.deviation else text


def _latex_group(title: str, span: int) -> str:
    return rf"\multicolumn{{{span}}}{{c}}{{{_latex(title)}}}"


def _rules(table: TextTable) -> str:
    parts, first = [], 1
    for title, span in table.groups:
        if title:
            parts.append(rf"\cmidrule(lr){{{first}-{first + span - 1}}}")
        first += span
    return " ".join(parts)


def _html_cell(cell: TextCell) -> str:
    text = escape(cell.text)
    text = f"<u>{text}</u>" if cell.underlined else text
    text = f"<strong>{text}</strong>" if cell.bold else text
    return f"{text}<small>{escape(cell.deviation)}</small>" if cell.deviation else text
