"""How `tunery files report` looks in a terminal: one block a kind of finding, the worst first."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from tunery.cli import show
from tunery.errors import TuneryError

if TYPE_CHECKING:
    from tunery.datasets.report.case import Finding
    from tunery.datasets.report.maker import Report


class ReportUnavailable(TuneryError):
    """A report needs packages that are not installed ('{package}' is missing). Install them:
    pip install 'tunery[report]'."""

    code = "report_unavailable"


_TITLES = {
    "invalid_row": "Rows that a job would refuse",
    "wrong_roles": "Roles out of order",
    "empty_output": "Empty answers",
    "truncated_output": "Answers that break off",
    "too_long": "Rows that are too long",
    "pii": "Personal data and secrets",
    "test_leak": "Rows that stand in the other file",
    "exact_duplicate": "Exact duplicates",
    "contradiction": "Like questions with different labels",
    "mislabelled": "Labels that are likely wrong",
    "near_duplicate": "Near-duplicates",
    "inconsistent_output": "Answers in another format",
    "answer_is_prompt": "Answers that are the question",
    "dominant_answer": "One answer for many rows",
    "label_imbalance": "Uneven labels",
}
"""The kinds in the order of the page."""
_SHOWN = 3
_LINES = 8


def print_report(report: "Report", name: str) -> None:
    """The whole page."""
    rows = {line for finding in report.findings for line in finding.lines}
    said = f": {len(rows):,} named in {len(report.findings):,} findings" if rows else ": nothing found"
    show.console.print(Text.assemble((name, "bold"), f" has {report.rows:,} rows{said}."), soft_wrap=True)
    counts = report.counts()
    for kind, title in _TITLES.items():
        if counts[kind]:
            _print_kind(title, [finding for finding in report.findings if finding.kind == kind])


def _print_kind(title: str, findings: Sequence["Finding"]) -> None:
    show.console.print()
    show.console.print(Text.assemble((title, "bold yellow"), (f"  {len(findings):,}", "dim"), "  ", findings[0].kind))
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", style="cyan", min_width=8)
    table.add_column(ratio=1)
    for finding in sorted(findings, key=lambda one: -one.score)[:_SHOWN]:
        table.add_row(_places(finding.lines), Text(finding.why))
    if len(findings) > _SHOWN:
        rest = sorted({line for finding in findings for line in finding.lines})
        table.add_row("", Text(f"all lines: {_places(rest)}", style="dim"))
    table.add_row("→", Text(findings[0].action, style="dim"))
    show.console.print(table)


def _places(lines: Sequence[int]) -> str:
    more = f" and {len(lines) - _LINES:,} more" if len(lines) > _LINES else ""
    return ", ".join(map(str, lines[:_LINES])) + more
