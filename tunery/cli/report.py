"""How `tunery files report` gets a report, and how it looks in a terminal: a block a kind, the worst first."""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.table import Table
from rich.text import Text

from tunery import ids
from tunery.cli import output
from tunery.cli.client import ApiClient, Refused
from tunery.datasets.report import page
from tunery.datasets.report.page import mixes, places
from tunery.datasets.report.titles import TITLES
from tunery.errors import TuneryError
from tunery.spec import Columns, named_columns

POLL_SECONDS = 1.0


class ReportUnavailable(TuneryError):
    """A report needs packages that are not installed ('{package}' is missing). Install them:
    pip install 'tunery[report]'."""

    code = "report_unavailable"


def make(
    path: Path, against: str | None, *, base: str | None, max_tokens: int, columns: Columns | None = None
) -> dict[str, Any]:
    """Returns the report of a file here. Raises ReportUnavailable."""
    try:
        from tunery.datasets.report import answer_ends, maker
    except ModuleNotFoundError as error:
        raise ReportUnavailable(package=error.name) from None
    other, folder = existing("--against", against), existing("--base", base)
    names = named_columns(columns)
    ask = answer_ends.asking(folder, max_tokens) if folder else None
    with output.waiting("making the report"):
        return maker.make(path, other, base=folder, max_tokens=max_tokens, ask=ask, columns=names).as_dict()


def existing(option: str, value: str | None) -> Path | None:
    """Returns the path that an option names. Raises BadParameter where nothing is there."""
    if value is not None and not Path(value).exists():
        raise typer.BadParameter(f"{option} {value}: no such file. It must be a local file like the first one.")
    return None if value is None else Path(value)


def no_such_file(file: str) -> typer.BadParameter:
    """Returns the error for what is neither a file here nor the id of one."""
    return typer.BadParameter(f"{file}: no such file, and ids begin with {ids.FILE}")


def fetch(api: ApiClient, file: str, **query: str | None) -> dict[str, Any]:
    """Returns the report of an uploaded file, once it is made. Raises Refused where there is none."""
    asked = {name: value for name, value in query.items() if value is not None}
    with output.waiting("waiting for the report") as status:
        while (found := api.call("GET", f"/files/{file}/report", params=asked))["status"] in ("queued", "running"):
            status.update(f"{found['status']}: {found['progress']:.0%}")
            time.sleep(POLL_SECONDS)
    if found["status"] == "failed":
        raise Refused(message=found["error"])
    return found


_SHOWN = 3
_LINES = 8


def print_report(said: Mapping[str, Any], name: str) -> None:
    """Prints the whole report."""
    findings, rows = said["findings"], said["rows_named"]
    count = output.counted(len(findings), "finding")
    what = f": {count} in {rows:,} of them" if rows else ", no findings"
    output.console.print(
        Text.assemble((name, "bold"), f" has {output.counted(said['rows'], 'row')}{what}."), soft_wrap=True
    )
    output.console.print(Text(page.describe(said), style="dim"), soft_wrap=True)
    if said["reason"]:
        output.console.print(Text(f"It cannot be used for training: {said['reason']}", style="red"), soft_wrap=True)
    for line in _figures(said["figures"]):
        output.console.print(Text(line, style="dim"), soft_wrap=True)
    for kind, title in TITLES.items():
        if found := [finding for finding in findings if finding["kind"] == kind]:
            _print_kind(title, found)


def _figures(figures: Mapping[str, Any]) -> Iterator[str]:
    if diversity := figures.get("diversity"):
        prompts = diversity["prompts"]
        yield (
            f"{prompts:,} different prompt{'s' * (prompts != 1)}, effectively {diversity['effective_prompts']:,.0f}; "
            f"the largest group of similar ones has {diversity['largest_cluster']:.0%} of the rows."
        )
    for part, mix in mixes(figures).items():
        yield f"Languages of the {part}: {mix}."
    if (other := figures.get("against")) and other["compared"] < other["rows"]:
        yield f"Of the {other['rows']:,} rows of the other file, {other['compared']:,} can be read and were compared."
    if answers := figures.get("answers"):
        said = f"{answers['loss']} nats per token (median; {answers['loss_without_question']} without the question)"
        yield f"The base scored {answers['judged']:,} answers, with a loss of {said}."
    if (tokens := figures.get("tokens")) and tokens["spreads"]:
        row = tokens["spreads"]["row"]
        yield f"Rows have {row['p50']:,} tokens (median; 99 %: {row['p99']:,}; longest: {row['max']:,})."
        cuts = [f"{cut['length']:,}: {cut['share']:.1%}" for cut in tokens["lengths"]]
        yield f"Rows cut by a length limit: {', '.join(cuts)}."


def _print_kind(title: str, findings: Sequence[Mapping[str, Any]]) -> None:
    output.console.print()
    output.console.print(
        Text.assemble((title, "bold yellow"), (f"  {len(findings):,}", "dim"), "  ", findings[0]["kind"])
    )
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", style="cyan", min_width=8)
    table.add_column(ratio=1)
    for finding in sorted(findings, key=lambda one: -one["score"])[:_SHOWN]:
        table.add_row(places(finding["lines"], _LINES), Text(finding["why"]))
    if len(findings) > _SHOWN:
        rest = sorted({line for finding in findings for line in finding["lines"]})
        table.add_row("", Text(f"all lines: {places(rest, _LINES)}", style="dim"))
    table.add_row("→", Text(findings[0]["action"], style="dim"))
    output.console.print(table)
