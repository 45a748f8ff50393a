"""What a check of a raw data set finds, in the order and the forms in which it is shown."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from voxelbridge.core.data.raw_problems import Problem, few_of

SCHEMA = 1
MAX_ROWS_OF_ONE = 20  # equal findings in more cases than this become one row
MAX_NAMES_IN_ROW = 200  # of that row; `--json` has all

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """One row of the table; `case_id` is None for what concerns the data set as a whole."""

    severity: Severity
    case_id: str | None
    check: str
    message: str


def finding_of(problem: Problem, case_id: str | None) -> Finding:
    """A problem that makes a case unusable, as an error."""
    return Finding("error", problem.case_id or case_id, problem.kind, problem.message)


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """Without repetitions: errors before warnings, then by check, case and message."""
    return sorted(
        dict.fromkeys(findings),
        key=lambda f: (f.severity != "error", f.check, f.case_id or "", f.message),
    )


def count(findings: Iterable[Finding], severity: Severity) -> int:
    return sum(finding.severity == severity for finding in findings)


def summary(findings: Sequence[Finding], num_cases: int) -> str:
    """One line: how many errors and warnings in how many cases."""
    errors, warnings = count(findings, "error"), count(findings, "warning")
    bad = {finding.case_id for finding in findings if finding.severity == "error"} - {None}
    return (
        f"{num_cases} cases checked: {errors} error{'s' * (errors != 1)} in {len(bad)} "
        f"case{'s' * (len(bad) != 1)}, {warnings} warning{'s' * (warnings != 1)}"
    )


def findings_json(findings: Sequence[Finding], *, dataset: Path, num_cases: int) -> dict[str, Any]:
    """What `check --json` prints."""
    return {
        "schema": SCHEMA,
        "dataset": str(dataset),
        "num_cases": num_cases,
        "errors": count(findings, "error"),
        "warnings": count(findings, "warning"),
        "findings": [asdict(finding) for finding in findings],
    }


def rows(findings: Sequence[Finding]) -> Iterator[tuple[str, str, str, str]]:
    """Severity, check, case and message of each row; many equal findings are folded into one."""
    ordered = sorted(findings, key=lambda f: (f.severity != "error", f.check))  # stable
    for (severity, check), same_check in groupby(ordered, lambda f: (f.severity, f.check)):
        of_check = list(same_check)
        holders: dict[str, list[str]] = {}
        for finding in of_check:
            holders.setdefault(finding.message, []).append(finding.case_id or "")
        for finding in of_check:
            names = holders[finding.message]
            if len(names) <= MAX_ROWS_OF_ONE:
                yield severity, check, finding.case_id or "-", finding.message
            elif finding.case_id == names[0]:
                message = f"{finding.message} (cases {few_of(names, limit=MAX_NAMES_IN_ROW)})"
                yield severity, check, f"{len(names)} cases", message


def print_table(findings: Sequence[Finding]) -> None:
    """A table on a terminal, one plain line per row anywhere else."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        for severity, check, case_id, message in rows(findings):
            print(f"{severity:<8} {check:<18} {case_id:<16} {message}")
        return
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("severity", "check", "case", "what"):
        table.add_column(name, overflow="fold")
    for severity, *texts in rows(findings):
        style = "bold red" if severity == "error" else "yellow"
        # Text, because names may hold square brackets, which rich takes for markup.
        table.add_row(Text(severity, style=style), *(Text(text) for text in texts))
    console.print(table)
